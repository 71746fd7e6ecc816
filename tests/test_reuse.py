"""Runs of a book that are kept: found again where nothing that decides them changed, and only there."""

import dataclasses

import pytest
import toy as toys

from knbook import checkout, reuse
from knpaper import stored


@pytest.fixture
def chapter(tmp_path) -> checkout.Chapter:
    root = toys.make_checkout(tmp_path / "toy", n01_toy=toys.notebook("print(n)"))
    (found,) = checkout.chapters(root)
    return dataclasses.replace(found, defaults={**found.defaults, "model": "controlled-gpt2"})


def test_place_is_another_for_other_cells_parameters_models_settings_and_versions(chapter, monkeypatch):
    places = [reuse.place(chapter, {}), reuse.place(chapter, {"model": "controlled-llama"})]
    places.append(reuse.place(chapter, {"n": 3}))
    with monkeypatch.context() as context:
        context.setenv("KNCORE_DTYPE", "float64")
        places.append(reuse.place(chapter, {}))
    with monkeypatch.context() as context:
        context.setattr(reuse, "_installed", lambda: ["torch==0.1"])
        places.append(reuse.place(chapter, {}))
    assert reuse.place(chapter, {}) == places[0]
    notebook = stored.read(chapter.path)
    notebook.cells[2].source += " "
    chapter.path.write_text(stored.dumps(notebook))
    places.append(reuse.place(chapter, {}))
    assert None not in places and len(set(places)) == 6


def test_place_is_the_same_whatever_a_notebook_gave_and_wherever_scores_go(chapter, monkeypatch, tmp_path):
    before = reuse.place(chapter, {})
    notebook = stored.read(chapter.path)
    notebook.cells[2].execution_count = 7
    chapter.path.write_text(stored.dumps(notebook))
    assert reuse.place(chapter, {}) == before
    monkeypatch.setenv("KNCORE_SCORES", str(tmp_path / "elsewhere"))
    assert reuse.place(chapter, {}).name == before.name


@pytest.mark.parametrize("parameters", [{"source": "folder"}, {"corpus": "folder"}])
def test_place_of_a_run_that_reads_a_folder_is_none(chapter, parameters):
    assert reuse.place(chapter, parameters) is None


def test_installed_sees_a_changed_file_of_a_package(monkeypatch, tmp_path):
    package = tmp_path / "pinned_package"
    package.mkdir()
    (package / "__init__.py").write_text("a = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(reuse, "PACKAGES", ("pinned_package",))
    before = reuse._installed.__wrapped__()
    (package / "data.tsv").write_text("b\n")
    assert reuse._installed.__wrapped__() != before
    (package / "data.tsv").unlink()
    assert reuse._installed.__wrapped__() == before


def test_restore_gives_back_every_byte_that_was_kept_and_nothing_of_a_damaged_run(tmp_path, capsys):
    run, place = tmp_path / "run", tmp_path / "store" / "aa" / "name.safetensors"
    files = {"01-toy.ipynb": b"{}\n", "results/tiny/claim.json": bytes(range(256)), "results/tiny/empty.toml": b""}
    for name, content in files.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(content)
    assert not reuse.restore(place, tmp_path / "none") and not (tmp_path / "none").exists()
    reuse.keep(place, run)
    assert reuse.restore(place, tmp_path / "again")
    assert toys.snapshot(tmp_path / "again") == files
    place.write_bytes(place.read_bytes()[:-1] + b"x")
    assert not reuse.restore(place, tmp_path / "damaged") and not (tmp_path / "damaged").exists()
    assert "is damaged" in capsys.readouterr().err
