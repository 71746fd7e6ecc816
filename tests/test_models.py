"""Loading: what comes back equals what was saved, and everything that cannot be trusted is refused."""

import shutil

import pytest
import tiny
import torch
import transformers
from saving import IDS, rewrite, save

from kncore import Query, predictions, tokens, zoo
from kncore.arch import spec_for
from kncore.models import load
from kncore.zoo import DEFAULT, REGISTRY


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_saved_folder_loads_as_the_model_it_was(family, tmp_path):
    folder = tmp_path / "some-model"
    source = save(folder, family)
    lm = load(folder)
    assert torch.equal(lm.model(IDS).logits, source(IDS).logits)
    assert lm.name == f"some-model@{lm.revision[:8]}" and lm.spec is spec_for(family)
    assert not lm.model.training and not lm.is_modified
    assert all(not p.requires_grad and p.dtype == torch.float32 for p in lm.model.parameters())
    assert (len(lm.blocks), lm.n_neurons, lm.device.type) == (3, 24, "cpu")
    assert tokens.encode(lm, Query("the capital of France is", "Paris")).target == (13,)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_readout_of_the_last_state_is_the_models_own_logits(family):
    lm = tiny.lm(family)
    seen = []
    hook = lm.blocks[-1].register_forward_hook(
        lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    logits = lm.model(IDS).logits
    hook.remove()
    torch.testing.assert_close(lm.readout(seen[0]), logits, atol=1e-5, rtol=1e-5)
    states = lm.model.base_model(IDS).last_hidden_state
    torch.testing.assert_close(lm.readout(states, normed=True), logits, atol=1e-5, rtol=1e-5)


def test_the_revision_of_a_folder_follows_its_weights_and_its_configuration(tmp_path):
    save(tmp_path / "one", "gpt2")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    one, two = load(tmp_path / "one"), load(tmp_path / "two")
    assert one.revision == two.revision
    with torch.no_grad():
        two.model.transformer.h[0].mlp.c_fc.weight[0, 0] += 1
    two.model.save_pretrained(tmp_path / "two")
    assert load(tmp_path / "two").revision != one.revision
    rewrite(tmp_path / "one", activation_function="relu")
    assert load(tmp_path / "one").revision not in (one.revision, two.revision)


def test_dtype_by_name_and_by_value(tmp_path):
    source = save(tmp_path / "m", "llama")
    for dtype in ("bfloat16", torch.bfloat16):
        lm = load(tmp_path / "m", dtype=dtype)
        assert lm.dtype == torch.bfloat16
        assert torch.equal(lm.model.lm_head.weight, source.lm_head.weight.bfloat16())
    for bad in ("float31", "int8", torch.int64, "nn"):
        with pytest.raises(ValueError, match="cannot be used: a model is computed in one of float32"):
            load(tmp_path / "m", dtype=bad)


@pytest.mark.parametrize(
    "family, body, lacking",
    [("bert", "bert", "cls.predictions"), ("roberta", "roberta", "lm_head"), ("llama", "model", "lm_head.weight")],
)
def test_a_checkpoint_without_its_head_is_refused(family, body, lacking, tmp_path):
    model = save(tmp_path, family)
    getattr(model, body).save_pretrained(tmp_path)
    for claimed in ([type(getattr(model, body)).__name__], [type(model).__name__]):
        rewrite(tmp_path, architectures=claimed)
        with pytest.raises(ValueError, match=f"lacks the weights of {lacking}.*would be random"):
            load(tmp_path)


def test_a_head_tied_to_the_embedding_is_not_missing(tmp_path):
    model = save(tmp_path, "gpt2")
    model.transformer.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path).model(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("config", [transformers.T5Config, transformers.OPTConfig])
def test_an_unsupported_family_is_refused_before_any_weight_is_read(config, tmp_path):
    config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{config.model_type!r} is not supported; supported: .*llama"):
        load(tmp_path)


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not a model folder: it has no config.json"):
        load(tmp_path)


def test_pickled_weights_are_refused(tmp_path):
    model = save(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no weights in safetensors.*pickled weights .pytorch_model.bin. are refused"):
        load(tmp_path)


def test_code_in_a_model_folder_is_never_run(tmp_path):
    save(tmp_path, "llama")
    (tmp_path / "theirs.py").write_text("raise SystemExit('this was run')\n")
    auto = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    rewrite(tmp_path, auto_map=auto)
    with pytest.raises(ValueError, match="asks for code of its own .*theirs.Config.*which is not run"):
        load(tmp_path)
    rewrite(tmp_path, auto_map=auto, model_type="theirs")
    with pytest.raises(ValueError, match="'theirs' is not supported"):
        load(tmp_path)


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "gpt_neox", "qwen2"])
def test_a_folder_without_tokenizer_is_refused(family, tmp_path):
    save(tmp_path, family, tokenizer=False)
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load(tmp_path)


def test_a_cut_weights_file_is_named(tmp_path):
    save(tmp_path, "llama")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{weights}' is damaged .*deserializing"):
        load(tmp_path)


def test_a_masked_model_needs_a_mask_token(tmp_path):
    save(tmp_path, "bert")
    tokenizer = tiny.tokenizer(masked=True)
    tokenizer.mask_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tokenizer has no mask token"):
        load(tmp_path)


def test_touched_after_a_write_or_a_hook_and_only_then():
    lm = tiny.lm("llama")
    lm.model(IDS)
    assert not lm.is_modified
    for hang in ("register_forward_hook", "register_forward_pre_hook"):
        handle = getattr(lm.blocks[1].mlp, hang)(lambda *_: None)
        assert lm.is_modified
        handle.remove()
        assert not lm.is_modified
    with torch.no_grad():
        lm.blocks[2].mlp.down_proj.weight[0, 0] += 1.0
    assert lm.is_modified


@pytest.mark.parametrize("place", [(3,), (slice(None), 5), (slice(None),)])
def test_touched_after_a_row_or_a_column_was_written_behind_the_back_of_pytorch(place):
    lm = tiny.lm("gpt2")
    weight = lm.blocks[1].mlp.c_proj.weight
    before = weight[place].clone()
    weight.data[place] += 1e-6
    assert lm.is_modified
    weight.data[place] = before
    assert not lm.is_modified


def test_touched_after_a_weight_was_replaced_or_loaded():
    lm = tiny.lm("gpt2")
    lm.model.lm_head.weight = torch.nn.Parameter(lm.model.lm_head.weight.clone(), requires_grad=False)
    assert lm.is_modified
    lm = tiny.lm("gpt2")
    lm.model.load_state_dict({name: tensor + 1 for name, tensor in lm.model.state_dict().items()})
    assert lm.is_modified


@pytest.mark.model
def test_the_default_model_loads_from_the_cache_and_knows_the_capital_of_france(monkeypatch):
    entry = REGISTRY[DEFAULT]
    if not (zoo.cache_folder() / "models" / f"{DEFAULT}-{entry.sha256[:16]}").is_dir():
        pytest.skip("the default model is not in the cache; `make install` puts it there")
    monkeypatch.setattr(zoo, "_download", lambda *_: pytest.fail("downloaded although it is in the cache"))
    lm = load()
    assert (lm.name, lm.revision, lm.spec.family) == ("smollm2-135m", "bcc81830d10ce7d9", "llama")
    assert (len(lm.blocks), lm.n_neurons, lm.model.config.hidden_size) == (30, 1536, 576)
    encoded = tokens.encode(lm, Query("The capital of France is", "Paris"))
    said = int(lm.model(torch.tensor([encoded.ids])).logits[0, encoded.position].argmax())
    assert lm.tokenizer.decode([said]) == " Paris"
    assert encoded.target == (said,)
    assert lm.tokenizer("Paris")["input_ids"] != [said]


@pytest.mark.model
def test_the_masked_model_of_natural_english_loads_and_agrees_in_number(monkeypatch):
    if not (zoo.SHIPPED / "minilm-mlm").is_dir():
        pytest.skip("minilm-mlm is not in this package yet; training/natural.py trains it")
    if not (zoo.cache_folder() / "models" / f"minilm-mlm-{zoo.revision('minilm-mlm')}").is_dir():
        pytest.skip("minilm-mlm is not in the cache; `make install` puts it there")
    monkeypatch.setattr(zoo, "_download", lambda *_: pytest.fail("downloaded although it is in the cache"))
    lm = load("minilm-mlm")
    assert (len(lm.blocks), lm.n_neurons, lm.model.config.hidden_size) == (6, 1536, 384)
    assert lm.model.cls.predictions.decoder.weight is lm.model.bert.embeddings.word_embeddings.weight
    pairs = [
        ("She bought [MASK] books yesterday.", "these", "this"),
        ("She bought [MASK] book yesterday.", "this", "these"),
    ]
    assert all(predictions.predict(lm, [Query(prompt, good, foil=bad) for prompt, good, bad in pairs]).prefers)
