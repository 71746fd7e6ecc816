"""What is kept on disk: whole or not at all, found damaged, bounded, and never in the way of a result."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from storing import make, place

from kncore.store import disk

TENSORS = {"x": torch.arange(12.0).reshape(3, 4), "empty": torch.zeros(0), "half": torch.ones(2, dtype=torch.bfloat16)}


pytestmark = pytest.mark.usefixtures("own_cache")


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def no_room(*_, **__):
    raise OSError(28, "No space left on device")


# ------------------------------------------------------------------------------------------- sealed tensors


def test_what_is_sealed_comes_back_bit_for_bit():
    back = disk.unpack(disk.pack(TENSORS))
    assert set(back) == set(TENSORS)
    assert all(torch.equal(back[name], value) and back[name].dtype == value.dtype for name, value in TENSORS.items())


RAW = disk.pack(TENSORS)


@given(st.integers(0, 8 * len(RAW) - 1))
def test_a_bit_turned_anywhere_in_a_sealed_file_is_found(at):
    turned = bytearray(RAW)
    turned[at // 8] ^= 1 << at % 8
    with pytest.raises(ValueError):
        disk.unpack(bytes(turned))


@given(st.integers(0, len(RAW) - 1))
def test_a_sealed_file_cut_anywhere_is_found(length):
    with pytest.raises(ValueError):
        disk.unpack(RAW[:length])


@given(st.binary(max_size=200))
def test_what_was_never_sealed_is_no_result(raw):
    with pytest.raises(ValueError):
        disk.unpack(raw)


def test_damage_is_said_in_one_line_and_the_result_computed_anew(tmp_path, capsys):
    path = place(tmp_path, "ab12")
    disk.keep(path, TENSORS)
    path.write_bytes(path.read_bytes()[:-1])
    assert disk.kept(path) is None
    assert capsys.readouterr().err == f"kncore: {path} is damaged (its checksum is another); it is computed anew\n"
    disk.keep(path, TENSORS)
    assert torch.equal(disk.kept(path)["x"], TENSORS["x"])
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------------------- writing


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    path = disk.write(tmp_path / "a" / "b.txt", "before")
    for name in ("fsync", "replace", "chmod", "fdopen"):
        with monkeypatch.context() as broken, pytest.raises(OSError, match="No space left"):
            broken.setattr(os, name, no_room)
            disk.write(path, "after")
        assert path.read_text() == "before" and files(tmp_path) == ["a/b.txt"]
    disk.write(path, b"after")
    assert path.read_bytes() == b"after"


def hammer(folder: str, seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(60):
        number = draw.randrange(5)
        disk.keep(place(Path(folder), f"{number:04d}"), {"x": torch.full((500,), float(number))})
        found = disk.kept(place(Path(folder), f"{draw.randrange(5):04d}"))
        assert found is None or len(set(found["x"].tolist())) == 1


def test_processes_that_write_the_same_results_at_once_see_them_whole(tmp_path):
    context = multiprocessing.get_context("fork")
    several = [context.Process(target=hammer, args=(str(tmp_path), seed)) for seed in range(4)]
    for process in several:
        process.start()
    for process in several:
        process.join()
    assert [process.exitcode for process in several] == [0] * 4
    assert files(tmp_path) == [f"00/{number:04d}.safetensors" for number in range(5)]


def test_a_store_that_cannot_be_written_is_said_once(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    for name in ("ab12", "cd34"):
        disk.keep(place(tmp_path / "file", name), TENSORS)
        assert disk.kept(place(tmp_path / "file", name)) is None
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "cannot be written (Not a directory)" in said and "cache --prune" in said
    monkeypatch.setattr(os, "replace", no_room)
    disk.keep(place(tmp_path / "store", "ab12"), TENSORS)
    assert "No space left on device" in capsys.readouterr().err
    assert files(tmp_path / "store") == []


def test_a_folder_is_made_once_and_made_anew_where_it_is_damaged(tmp_path, capsys):
    target, made = tmp_path / "models" / "m", []

    def counted(staged):
        made.append(staged)
        make(staged)

    assert disk.folder(target, counted) == disk.folder(target, counted) == target and len(made) == 1
    whole = {path.name: path.read_bytes() for path in target.iterdir()}
    spoil = (
        lambda: (target / "weights").write_bytes(bytes(255) + b"\1"),
        lambda: (target / "config.json").unlink(),
        lambda: (target / disk.SEAL).write_text("[]"),
        lambda: (target / disk.SEAL).write_text("{"),
    )
    for number, harm in enumerate(spoil, 2):
        harm()
        monkey = capsys.readouterr()
        disk._said.clear()
        assert disk.folder(target, counted) == target and len(made) == number
        assert monkey.err == "" and f"{target} is damaged" in capsys.readouterr().err
        assert {path.name: path.read_bytes() for path in target.iterdir()} == whole
        assert [path.name for path in target.parent.iterdir()] == ["m"]


def test_a_folder_of_an_earlier_version_is_sealed_as_it_stands(tmp_path):
    make(tmp_path / "m")
    assert disk.folder(tmp_path / "m", lambda _: pytest.fail("made anew")) == tmp_path / "m"
    assert set(json.loads((tmp_path / "m" / disk.SEAL).read_text())) == {"config.json", "weights"}
    (tmp_path / "m" / "weights").write_bytes(b"")
    assert disk.damage(tmp_path / "m") == "weights has another checksum"


def test_a_folder_that_cannot_be_written_is_made_for_this_process(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    place = disk.folder(tmp_path / "file" / "m", make)
    assert (place / "weights").stat().st_size == 256 and tmp_path not in place.parents
    assert disk.folder(tmp_path / "file" / "m", lambda _: pytest.fail("made twice")) == place
    assert capsys.readouterr().err.count("cannot be written") == 1


def test_a_disk_that_is_full_half_way_leaves_nothing_and_the_folder_is_made_elsewhere(tmp_path, capsys):
    def full_here(staged):
        make(staged)
        if tmp_path in staged.parents:
            no_room()

    place = disk.folder(tmp_path / "models" / "m", full_here)
    assert (place / "weights").is_file() and list((tmp_path / "models").iterdir()) == []
    assert "No space left on device" in capsys.readouterr().err
