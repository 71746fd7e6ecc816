from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from storing import make, place

from knbook import cli
from kncore import zoo
from kncore.store import cache, disk

pytestmark = pytest.mark.usefixtures("own_cache")


def filled(tmp_path: Path, monkeypatch) -> Path:
    """Twelve results, a model, and what two killed processes left, one of them long ago; the model was used last."""
    store = tmp_path / "scores"
    monkeypatch.setenv("KNCORE_SCORES", str(store))
    for i in range(12):
        disk.keep(place(store, f"{i:04x}"), {"x": torch.zeros(1000)})
        os.utime(store / f"{i:04x}"[:2] / f"{i:04x}.safetensors", (1000 + i, 1000 + i))
    disk.folder(zoo.cache_folder() / "models" / "m", make)
    old, new = store / "00" / ".old.part", zoo.cache_folder() / "models" / ".new.part"
    old.write_bytes(b"half")
    os.utime(old, (2000, 2000))
    new.mkdir()
    (new / "half").write_bytes(bytes(10**6))
    return store


def test_the_cache_lists_what_it_holds_and_makes_room(tmp_path, monkeypatch, capsys):
    store = filled(tmp_path, monkeypatch)
    disk.kept(place(store, "0000"))  # the oldest one is used again
    assert cli.main(["cache"]) == 0
    told = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert told["scores"][0] == "12" and told["models"][0] == "1" and told["leftover"] == ["2", "1.0", "MB"]
    size = next(entry.bytes for entry in cache.entries() if entry.kind == "scores")
    model = next(entry.bytes for entry in cache.entries() if entry.kind == "models")
    assert cli.main(["cache", "--prune", "--limit", f"{10**6 + model + 3 * size}"]) == 0
    assert "removed 10 of them" in capsys.readouterr().out  # a leftover of long ago, and nine results
    left = {entry.path.stem for entry in cache.entries() if entry.kind == "scores"}
    assert left == {"0000", "000a", "000b"}
    assert disk.kept(place(store, "0000")) is not None
    assert cli.main(["cache", "--prune", "--limit", "0"]) == 0
    assert [entry.kind for entry in cache.entries()] == ["leftover"]  # which a process may still be writing


def test_pruning_is_bounded_by_two_gigabytes_unless_told_otherwise(monkeypatch):
    seen = []
    monkeypatch.setattr(cache, "prune", lambda limit: seen.append(limit) or [])
    for arguments in ([], ["--limit", "5MB"], ["--limit", "1 GiB"], ["--limit", "7"]):
        assert cli.main(["cache", "--prune", *arguments]) == 0
    assert seen == [2 * 10**9, 5 * 10**6, 10**9, 7]
    assert cli.main(["cache", "--limit", "5MB"]) == 2


def test_an_empty_cache_is_an_empty_list(tmp_path, monkeypatch):
    monkeypatch.setenv("KNCORE_SCORES", str(tmp_path / "nowhere"))
    assert cache.entries() == [] and cache.prune(0) == []
