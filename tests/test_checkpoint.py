"""Model folders: what stands for one, and what is refused when it is loaded, with the true cause."""

import json
import os
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from kncore import models, rome
from kncore.arch import spec_for
from kncore.models import REGISTRY, load


def save(folder, family="llama"):
    """A tiny model as a folder of the kind `save_pretrained` leaves; the folder."""
    tiny.model(family).save_pretrained(folder)
    tiny.tokenizer(spec_for(family).masked).save_pretrained(folder)
    return Path(folder)


def rewrite(folder, name="config.json", **changes):
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | changes))


def weights(folder, change):
    """Rewrite model.safetensors by `change`, which takes and gives a dict of tensors."""
    held = change({name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()})
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


def shard(folder, below="", unlisted=()):
    """Split model.safetensors in two, put into a subfolder if `below` names one, with an index."""
    held = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    named = {}
    for i in (0, 1):
        part = {name: tensor for k, (name, tensor) in enumerate(sorted(held.items())) if k % 2 == i}
        file = f"{below}model-{i + 1:05}-of-00002.safetensors"
        (folder / file).parent.mkdir(exist_ok=True, parents=True)
        save_file(part, folder / file, metadata={"format": "pt"})
        named |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": {k: v for k, v in named.items() if k not in unlisted}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


# ------------------------------------------------------------------------------------ the revision of a folder


@pytest.fixture
def folder(tmp_path):
    return save(tmp_path / "mine")


def change_file(name):
    def change(folder):
        (folder / name).parent.mkdir(exist_ok=True)
        with (folder / name).open("ab") as file:
            file.write(b"\n ")

    return change


@pytest.mark.kind("tokenizer-in-identity")
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_the_revision_changes_with_each_file_that_is_read(folder, name):
    before = models.identity(folder)
    change_file(name)(folder)
    assert models.identity(folder)[1] != before[1]


@pytest.mark.kind("tokenizer-in-identity", own=True)
@pytest.mark.parametrize(
    "name",
    [
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "vocab.bpe",
        "merges.txt",
        "tokenizer.model",
        "spiece.model",
        "tokenizer.4.0.json",
    ],
)
def test_the_revision_changes_with_every_file_that_a_tokenizer_may_be_read_from(folder, name):
    before = models.identity(folder)
    (folder / name).write_text("{}")
    assert models.identity(folder)[1] != before[1]


@pytest.mark.kind("tokenizer-in-identity")
@pytest.mark.parametrize("below", ["", "parts/", "../elsewhere/"])
def test_the_revision_changes_with_shards_wherever_the_index_points_and_with_the_index(folder, below):
    whole = load(folder)
    shard(folder, below)
    before = load(folder)
    ids = torch.tensor([[5, 9, 11]])
    assert torch.equal(before.model(ids).logits, whole.model(ids).logits)
    part = folder / f"{below}model-00002-of-00002.safetensors"
    held = load_file(part)
    save_file({name: tensor + 1 for name, tensor in held.items()}, part, metadata={"format": "pt"})
    after = load(folder)
    assert (after.name, after.revision) == models.identity(folder) and after.revision != before.revision
    change_file("model.safetensors.index.json")(folder)
    assert models.identity(folder)[1] not in (before.revision, after.revision)


@pytest.mark.kind("tokenizer-in-identity", own=True)
def test_the_revision_stays_with_files_that_decide_no_number(folder, tmp_path):
    before = models.identity(folder)
    for name in (
        "README.md",
        ".git/HEAD",
        "trainer_state.json",
        "runs/events",
        "generation_config.json",
        "x.safetensors",
    ):
        change_file(name)(folder)
    os.utime(folder / "model.safetensors", (1, 1))
    assert models.identity(folder) == before
    shutil.copytree(folder, tmp_path / "copy")
    assert models.identity(tmp_path / "copy")[1] == before[1]


@pytest.mark.kind("tokenizer-in-identity", own=True)
def test_the_revision_of_a_model_that_comes_with_the_package_changes_with_its_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "SHIPPED", tmp_path)
    save(tmp_path / "controlled-llama")
    before = load("controlled-llama")
    assert models.identity("controlled-llama") == ("controlled-llama", before.revision)
    change_file("tokenizer.json")(tmp_path / "controlled-llama")
    assert load("controlled-llama").revision != before.revision


# ---------------------------------------------------------------------------------------- the name of a folder


@pytest.mark.kind("folder-named-like-a-model")
def test_a_folder_called_like_a_registered_model_has_another_name_and_not_its_settings(tmp_path):
    lm = load(save(tmp_path / "smollm2-135m"))
    assert lm.name == f"smollm2-135m@{lm.revision[:8]}" and lm.name not in REGISTRY
    assert (lm.name, lm.revision) == models.identity(str(tmp_path / "smollm2-135m"))
    assert rome.hyper(lm) != rome.HYPER["smollm2-135m"]


@pytest.mark.kind("folder-named-like-a-model")
def test_two_folders_of_one_name_are_two_models(tmp_path):
    first, second = (save(tmp_path / way / "checkpoint-500") for way in "ab")
    weights(second, lambda held: {name: tensor * 2 for name, tensor in held.items()})
    assert load(first).name != load(second).name


@pytest.mark.kind("folder-named-like-a-model", own=True)
def test_one_folder_has_one_name_however_it_is_reached(folder, monkeypatch):
    (folder.parent / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder.parent))
    for way in (".", "../mine", "../link", "../mine/", f"{folder}/.", "~/mine", Path("../mine"), folder):
        assert models.identity(way) == models.identity(str(folder))


@pytest.mark.kind("folder-named-like-a-model", own=True)
def test_a_path_object_is_a_folder_and_a_text_a_registered_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "controlled-gpt2")
    assert models.identity("controlled-gpt2")[0] == "controlled-gpt2"
    name, revision = models.identity(Path("controlled-gpt2"))
    assert name == f"controlled-gpt2@{revision[:8]}"
    lm = load(Path("controlled-gpt2"))
    assert (lm.name, lm.spec.family) == (name, "llama")
    with pytest.raises(ValueError, match="unknown model '/.*/gpt2'"):
        load(Path("gpt2"))


@pytest.mark.kind("folder-named-like-a-model", own=True)
@pytest.mark.parametrize(
    "name, plain",
    [
        ("my model", "my-model"),
        ("<script>alert(1)</script>"[:8], "script"),
        ("=1+1", "1-1"),
        (".hidden", "hidden"),
        ("a\nb\t\x7f", "a-b"),
        ("модель", "folder"),
        ("x" * 200, "x" * 60),
        ("v1.0_final-2", "v1.0_final-2"),
        ("a|b`c$d&e@f", "a-b-c-d-e-f"),
        ("-rf", "rf"),
    ],
)
def test_the_name_of_any_folder_is_safe_in_a_path_and_on_a_page(tmp_path, name, plain):
    found, revision = models.identity(save(tmp_path / name, "gpt2"))
    assert found == f"{plain}@{revision[:8]}"
