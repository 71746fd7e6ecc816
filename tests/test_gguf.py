"""GGUF files: the model of the file, bit for bit where it is not quantised; what would be passed over is refused."""

import re

import ggufs
import huggingface_hub
import pytest
import tiny
import torch
import transformers
from saving import IDS

from kncore import models, zoo
from kncore.store import disk

GPT2 = transformers.GPT2Config(vocab_size=29, n_embd=16, n_layer=2, n_head=4, bos_token_id=2, eos_token_id=3)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KNCORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def model(family):
    if family != "gpt2":
        return tiny.model(family)
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(GPT2).eval().requires_grad_(False)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_a_file_is_the_model_that_was_written_into_it(family, tmp_path, cache):
    source = model(family)
    if family == "qwen2":
        source.config.use_sliding_window = False
        source = transformers.Qwen2ForCausalLM(
            transformers.Qwen2Config(**{**source.config.to_dict(), "sliding_window": None, "layer_types": None})
        ).eval()
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    path = ggufs.write(tmp_path / "My model.gguf", source)
    lm = models.load(path)
    revision = disk.digest(path)[:16]
    assert (lm.name, lm.revision, lm.spec.family) == (f"My-model@{revision[:8]}", revision, family)
    assert models.identity(str(path)) == (lm.name, lm.revision)
    torch.testing.assert_close(lm.model(IDS).logits, source(IDS).logits, atol=1e-5, rtol=1e-5)
    assert lm.tokenizer.convert_ids_to_tokens(lm.tokenizer("ab a ab")["input_ids"]) == ["ab", "Ġa", "Ġab"]
    assert [folder.name for folder in cache.iterdir()] == [f"gguf-{revision}"]


def test_a_file_is_converted_once_and_anew_when_it_is_another(tmp_path, cache, monkeypatch):
    path = ggufs.write(tmp_path / "m.gguf", tiny.model("llama"))
    first = models.load(path)
    with monkeypatch.context() as patched:
        patched.setattr(zoo.gguf, "save", lambda *_: pytest.fail("converted again"))
        assert models.load(str(path)).loaded == first.loaded
    ggufs.write(path, tiny.model("llama", seed=1))
    second = models.load(path)
    assert second.revision != first.revision and second.loaded != first.loaded
    assert len(list(cache.iterdir())) == 2


REFUSED = {
    "another family": ({"general.architecture": "gemma2"}, {}, "gemma2"),
    "a family without its reader": ({"general.architecture": "bert"}, {}, "is a bert; of GGUF, gpt2, llama, qwen2"),
    "no epsilon": (
        {"llama.attention.layer_norm_rms_epsilon": None, "llama.attention.layer_norm_epsilon": 1e-5},
        {},
        r"no number for llama\.attention\.layer_norm_rms_epsilon",
    ),
    "an adapter": ({"general.type": "adapter"}, {}, "holds no model but: adapter"),
    "a part": ({"split.count": 3}, {}, "one of 3 parts; join them"),
    "scaled positions": ({"llama.rope.scaling.factor": 8.0}, {}, "llama.rope.scaling.factor = 8.0"),
    "a setting unknown": (
        {"llama.logit_scale": 0.25},
        {},
        "llama.logit_scale = 0.25, which transformers does not read",
    ),
    "half of the positions": ({"llama.rope.dimension_count": 2}, {}, "llama.rope.dimension_count = 2"),
    "scaled by a weight": ({}, {"rope_freqs.weight": torch.ones(2)}, "rope_freqs.weight"),
    "a weight too many": ({}, {"blk.0.attn_gate.weight": torch.ones(16, 16)}, "numbers, but its LlamaForCausalLM has"),
    "a weight too few": ({}, {"blk.1.ffn_up.weight": None}, r"lacks model\.layers\.1\.mlp\.up_proj\.weight"),
    "heads by block": ({"llama.attention.head_count": [4, 4, 2]}, {}, r"no number for llama\.attention\.head_count"),
    "another width": ({"llama.feed_forward_length": 20}, {}, "cannot be read by transformers"),
    "another cut": ({"tokenizer.ggml.pre": "viking"}, {}, "cuts text as 'viking' does"),
    "no cut": ({"tokenizer.ggml.pre": None}, {}, r"does not say how it cuts text \(tokenizer\.ggml\.pre\)"),
    "another tokenizer": ({"tokenizer.ggml.model": "rwkv"}, {}, "of the kind 'rwkv', expected 'gpt2' or 'llama'"),
    "no heads": ({"llama.attention.head_count": None}, {}, "llama.attention.head_count"),
    "a first token": ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 5}, {}, None),
}


@pytest.mark.parametrize(("says", "holds", "message"), REFUSED.values(), ids=REFUSED)
def test_what_would_be_passed_over_is_refused_in_one_line(says, holds, message, tmp_path, cache):
    path = ggufs.write(tmp_path / "m.gguf", tiny.model("llama"), says, holds)
    if message is None:  # transformers heeds it
        assert models.load(path).tokenizer("a")["input_ids"][0] == 5
        return
    with pytest.raises(ValueError, match=message) as error:
        models.load(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert not cache.is_dir() or list(cache.iterdir()) == []


@pytest.mark.parametrize(
    "content", [b"", b"GGUF", b"PK not one", b"version https://git-lfs.github.com/spec/v1\n"], ids=str
)
def test_a_file_that_is_none_is_refused(content, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    for call in (models.check, models.load, models.identity):
        with pytest.raises(ValueError, match=re.escape(str(path))):
            call(str(path))


def test_a_file_cut_short_is_refused(tmp_path):
    path = ggufs.write(tmp_path / "m.gguf", tiny.model("llama"))
    whole = path.read_bytes()
    for share in (0.2, 0.6, 0.99):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ValueError, match="damaged or not whole"):
            models.load(path)


def test_a_folder_with_a_gguf_alone_says_to_name_the_file(tmp_path):
    ggufs.write(tmp_path / "m.gguf", tiny.model("llama"))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"found m\.gguf; name that file itself"):
        models.load(tmp_path)


@pytest.fixture
def entry(tmp_path, monkeypatch):
    path = ggufs.write(tmp_path / "tiny.gguf", tiny.model("llama"))
    pinned = zoo.Gguf("owner/name", "tiny.gguf", "0" * 40, disk.digest(path))
    monkeypatch.setitem(zoo.REGISTRY, "tiny", pinned)
    monkeypatch.delenv("KNCORE_MODELS", raising=False)
    return path


def test_a_registered_file_is_taken_from_the_folder_of_the_environment_variable(entry, cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.setenv("KNCORE_MODELS", str(entry.parent))
    lm = models.load("tiny")
    assert (lm.name, lm.revision) == ("tiny", disk.digest(entry)[:16]) == models.identity("tiny")
    entry.unlink()
    assert models.load("tiny").loaded == lm.loaded
    assert [folder.name for folder in cache.iterdir()] == [f"tiny-{lm.revision}"]


def test_a_registered_file_is_fetched_at_its_revision(entry, monkeypatch):
    calls = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: calls.append((a, k)) or str(entry))
    assert models.load("tiny").name == "tiny"
    assert calls == [(("owner/name", "tiny.gguf"), {"revision": "0" * 40})]


def test_a_file_of_another_hash_is_not_used(entry, cache, monkeypatch):
    monkeypatch.setenv("KNCORE_MODELS", str(entry.parent))
    ggufs.write(entry, tiny.model("llama", seed=1))
    with pytest.raises(OSError, match="not the pinned file, not used"):
        models.load("tiny")
    assert list(cache.iterdir()) == []


def test_a_registered_file_that_is_nowhere_says_where_to_put_it(entry, monkeypatch):
    def offline(*_, **__):
        raise OSError("the hub cannot be reached.")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(OSError, match=r"put tiny\.gguf \(sha256 [0-9a-f]{64}\) into a folder .* KNCORE_MODELS"):
        models.load("tiny")
