"""The way from a notebook to a stored notebook, on toy notebooks that need no model."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import nbformat
import pytest
import tiny
import torch
from safetensors.torch import save_file
from toy import COMPUTE, make_checkout, notebook, snapshot

from knbook import book, checkout, cli, kernel, runner
from knbook.errors import RunError, UsageError
from kncore import models
from kncore.store import disk
from knpaper import claims, stored


def test_nbval_compares_numbers_loosely_text_exactly_and_skips_nothing(tmp_path, checkout):
    sources = ["print('loss', 0.12345)", "print('fact')", "2 + 2;", "0.5"]
    toy = make_checkout(tmp_path / "toy", n01_sound=notebook(*sources))
    (path,) = runner.run(toy)
    nb = nbformat.read(path, as_version=4)
    nb.cells[2].outputs[0].text = "loss 0.12346\n"
    nbformat.write(nb, path)
    nb.cells[2].outputs[0].text = "loss 0.12400\n"
    nb.cells[3].outputs[0].text = "grammar\n"
    nb.cells[4].execution_count = None
    nb.cells[5].outputs[0].data["text/plain"] = "0.502"
    nbformat.write(nb, toy / "notebooks" / "02-broken.ipynb")
    shutil.copy(checkout / "notebooks" / "conftest.py", toy / "notebooks")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--color=no", "--nbval"]
    command += ["--nbval-current-env", "--rootdir", str(toy), str(toy / "notebooks")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=toy, check=False)
    assert done.returncode == 1 and "4 failed, 6 passed" in done.stdout, done.stdout
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert len(failed) == 4 and all("02-broken" in line for line in failed) and "never run" in done.stdout


# ------------------------------------------------------------------------------------------------- running


def test_a_run_is_stored_with_its_records_and_repeats_byte_for_byte(toy):
    assert runner.run(toy) == [toy / "notebooks" / "01-toy.ipynb"]
    first = snapshot(toy)
    nb = nbformat.reads(first["notebooks/01-toy.ipynb"].decode(), as_version=4)
    assert [output.text for output in nb.cells[2].outputs] == ["tiny 0.0\ntiny 0.5\n"]
    assert stored.problems(nb) == []
    assert json.loads(first["results/tiny/claim.json"]) == {"n": 2}
    runner.run(toy)
    assert snapshot(toy) == first


def test_other_parameters_never_touch_what_is_tracked(toy, tmp_path):
    before = snapshot(toy)
    (path,) = runner.run(toy, parameters={"n": 3})
    assert path == toy / "_build" / "runs" / "tiny" / "01-toy.ipynb"
    assert json.loads((path.parent / "results" / "tiny" / "claim.json").read_text()) == {"n": 3}
    (path,) = runner.run(toy, out=tmp_path / "out")
    assert path == tmp_path / "out" / "01-toy.ipynb"
    assert (tmp_path / "out" / "results" / "tiny" / "claim.json").exists()
    assert {name: data for name, data in snapshot(toy).items() if not name.startswith("_build")} == before


def test_a_local_model_is_named_after_its_folder_and_its_files(tmp_path, monkeypatch):
    toy = make_checkout(tmp_path / "toy", n01_toy=notebook("print(model)"))
    name = models.identity(str(model_folder(tmp_path / "models" / "mine")))[0]
    assert re.fullmatch("mine@[0-9a-f]{8}", name)
    monkeypatch.chdir(tmp_path / "models")
    (path,) = runner.run(toy, model="./mine")
    assert path == toy / "book" / "runs" / name / "01-toy.ipynb"
    assert (toy / "results" / name / "01.toml").is_file()
    text = path.read_text()
    assert f'model = \\"{name}\\"' in text and f"{name}\\n" in text and str(tmp_path) not in text
    assert checkout.slug("owner/name") == "owner--name"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "m=3"], "no parameter 'm'"),
        (["-p", "modle=x"], "did you mean model?"),
        (["-p", "n=many"], "n is int (default 2), got str 'many'"),
        (["-p", "n=1.5"], "got float 1.5"),
        (["-p", "n"], "expected name=value"),
        (["-p", "n=[1]"], "got str '[1]'"),
        (["--only", "07"], "no chapter '07'; there are 01-toy"),
        (["--model", "a", "-p", "model=b"], "disagree"),
    ],
)
def test_what_cannot_be_run_is_an_error_before_anything_runs(toy, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(toy)
    monkeypatch.setattr(kernel, "execute", lambda *_: pytest.fail("something ran"))
    before = snapshot(toy)
    assert cli.main(["run", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert snapshot(toy) == before


def test_a_failing_cell_is_named_and_the_stored_notebook_stays(tmp_path, monkeypatch, capsys):
    toy = make_checkout(
        tmp_path / "toy",
        n01_good=notebook(COMPUTE),
        n02_bad=notebook(COMPUTE, "raise ValueError('first line\\nthe neuron is unknown')"),
    )
    before = snapshot(toy)
    monkeypatch.chdir(toy)
    assert cli.main(["run", "--only", "2"]) == 1
    error = capsys.readouterr().err
    assert "02-bad.ipynb, cell 4 (In [3]): ValueError: the neuron is unknown" in error
    assert "Traceback" not in error
    assert snapshot(toy) == before
    assert list((toy / "_build").iterdir()) == []
    with pytest.raises(RunError):
        cli.main(["run", "--debug", "--only", "2"])


def test_a_cell_that_takes_too_long_is_named(tmp_path):
    toy = make_checkout(tmp_path / "toy", n01_slow=notebook("import time; time.sleep(10_000)"))
    before = snapshot(toy)
    with pytest.raises(RunError, match=r"01-slow.ipynb, cell [23] took longer than 1 s"):
        runner.run(toy, timeout=1)
    assert snapshot(toy) == before


def test_outside_a_checkout_the_command_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(checkout, "__file__", str(tmp_path / "site" / "knbook" / "checkout.py"))
    with pytest.raises(UsageError, match="in no checkout"):
        checkout.find_root(tmp_path)


# ------------------------------------------------------------------------------- a record with its notebook


def model_folder(path: Path, number: float = 0.0) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text('{"model_type": "gpt2"}')
    save_file({"weight": torch.full((2,), float(number))}, path / "model.safetensors")
    return path


def pair(notebooks: Path, results: Path | None = None, model: str = "tiny") -> tuple[int, int]:
    """What a record says, and what the notebook shows."""
    nb = nbformat.read(notebooks / "01-toy.ipynb", as_version=4)
    folder = results or notebooks / "results"
    return json.loads((folder / model / "claim.json").read_text())["n"], int(nb.cells[-1].outputs[0].text)


def final(path) -> bool:
    """Whether a path is that of a notebook or record in its place."""
    return Path(path).name in ("01-toy.ipynb", "claim.json", "01.toml") and "_build" not in Path(path).parts


@pytest.mark.kind("record-with-notebook")
@pytest.mark.parametrize("at", [0, 1, 2])
def test_two_runs_into_one_folder_leave_record_and_notebook_of_one(toy, tmp_path, monkeypatch, pretended, at):
    """The second run comes as a whole between two moves of the first."""
    out, replace, moved = tmp_path / "out", os.replace, []

    def interrupted(source, target):
        if final(target):
            moved.append(target)
            if len(moved) == at + 1:
                runner.run(toy, parameters={"n": 3}, out=out)
        return replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        runner.run(toy, parameters={"n": 2}, out=out)
    assert len(moved) > 3 and pair(out) in ((2, 2), (3, 3))
    assert not [path for path in out.rglob("*") if path.name.startswith(".")]


@pytest.mark.kind("record-with-notebook", own=True)
@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_what_a_killed_run_had_begun_to_store_is_stored_whole_by_who_comes_next(toy, pretended, at):
    runner.run(toy)
    child = os.fork()
    if child == 0:
        replace, moved = os.replace, []

        def fatal(source, target):
            moved.append(target) if final(target) else None
            if len(moved) > at:
                os._exit(9)
            return replace(source, target)

        os.replace = fatal
        nb = nbformat.read(toy / "notebooks" / "01-toy.ipynb", as_version=4)
        nb.cells[1].source = nb.cells[1].source.replace("n = 2", "n = 7")
        nbformat.write(nb, toy / "notebooks" / "01-toy.ipynb")
        runner.run(toy)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (9 if at < 3 else 0)
    staged = book.stage(toy)
    assert pair(staged / "notebooks", staged / "results") == (7, 7)
    assert pair(toy / "notebooks", toy / "results") == (7, 7)


@pytest.mark.kind("record-with-notebook", own=True)
@pytest.mark.parametrize("at", [0, 1, 2])
def test_where_a_file_cannot_be_moved_all_is_as_it_was(toy, monkeypatch, capsys, pretended, at):
    runner.run(toy)
    (toy / "results" / "tiny" / "claim.json").write_text('{"n": 1}')
    before, replace, moved = snapshot(toy), os.replace, []

    def broken(source, target):
        if final(target):
            moved.append(target)
            if len(moved) == at + 1:
                raise OSError(errno.EIO, "Input/output error", str(target))
        return replace(source, target)

    monkeypatch.setattr(os, "replace", broken)
    monkeypatch.chdir(toy)
    assert cli.main(["run"]) == 1
    assert snapshot(toy) == before and "Input/output error" in capsys.readouterr().err


@pytest.mark.kind("record-with-notebook", own=True)
def test_a_record_that_a_run_found_to_hold_is_stored_with_its_notebook(toy, pretended):
    """Another run replaced it meanwhile; one that the run has nothing to do with stays as that one left it."""
    runner.run(toy)
    disk.write(toy / "results" / "tiny" / "other.json", "1")

    def meanwhile(scratch):
        kept = (scratch / "results" / "tiny" / "claim.json").stat().st_mtime_ns
        assert kept > 10**18
        disk.write(toy / "results" / "tiny" / "claim.json", '{"n": 9}')
        disk.write(toy / "results" / "tiny" / "other.json", "2")

    pretended.append(meanwhile)
    runner.run(toy)
    assert pair(toy / "notebooks", toy / "results") == (2, 2)
    assert (toy / "results" / "tiny" / "other.json").read_text() == "2"


@pytest.mark.kind("record-with-notebook", own=True)
def test_a_record_that_stands_is_marked_as_used(tmp_path, monkeypatch):
    monkeypatch.setenv("KNCORE_RESULTS", str(tmp_path))
    lm, claim = tiny.lm("gpt2"), "equally-few"
    stands, other = (disk.write(tmp_path / lm.name / f"{name}.json", "{}") for name in (claim, "other"))
    for path in (stands, other):
        os.utime(path, (10**9, 10**9))
    monkeypatch.setattr(claims, "says_the_same", lambda *_: True)
    claims.record(claim, lm, claims.Estimate(0.5, 0.4, 0.6, 40), seed=0, source="own")
    assert stands.read_text() == "{}" and stands.stat().st_mtime > other.stat().st_mtime == 10**9


def spoil_results(toy, out):
    (toy / "results").write_text("")


def spoil_model(toy, out):
    disk.write(toy / "results" / "tiny", "")


def spoil_out(toy, out):
    disk.write(out / "results", "")


def spoil_notebook(toy, out):
    (out / "01-toy.ipynb").mkdir(parents=True)


@pytest.mark.kind("record-with-notebook")
@pytest.mark.parametrize(
    ("spoil", "arguments", "said"),
    [
        (spoil_results, [], "toy/results'"),
        pytest.param(spoil_model, [], "results/tiny'", marks=pytest.mark.kind("record-with-notebook", own=True)),
        pytest.param(
            spoil_out, ["--out", "out"], "out/results'", marks=pytest.mark.kind("record-with-notebook", own=True)
        ),
        pytest.param(
            spoil_notebook, ["--out", "out"], "01-toy.ipynb'", marks=pytest.mark.kind("record-with-notebook", own=True)
        ),
    ],
)
def test_where_nothing_can_be_stored_nothing_runs(toy, monkeypatch, capsys, spoil, arguments, said):
    monkeypatch.chdir(toy)
    monkeypatch.setattr(kernel, "execute", lambda *_: pytest.fail("something ran"))
    spoil(toy, toy / "out")
    assert cli.main(["run", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.kind("record-with-notebook")
@pytest.mark.parametrize("folder", ["notebooks", "results"])
def test_a_folder_that_is_read_only_is_found_before_the_work(toy, monkeypatch, capsys, folder):
    (toy / "results").mkdir()
    make = tempfile.TemporaryFile

    def refused(*_, dir, **options):
        if Path(dir) == toy / folder:
            raise PermissionError(errno.EACCES, "Permission denied", str(dir))
        return make(dir=dir, **options)

    monkeypatch.chdir(toy)
    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    monkeypatch.setattr(kernel, "execute", lambda *_: pytest.fail("something ran"))
    assert cli.main(["run"]) == 2
    assert f"{folder}' (Permission denied)" in capsys.readouterr().err


@pytest.mark.kind("record-with-notebook", own=True)
def test_a_chapter_that_is_edited_while_it_runs_keeps_the_edit(toy, pretended):
    chapter = toy / "notebooks" / "01-toy.ipynb"

    def edit(_):
        chapter.write_text(chapter.read_text().replace("# Toy", "# Edited"))

    pretended.append(edit)
    with pytest.raises(RunError, match="was edited while it ran; nothing was stored"):
        runner.run(toy)
    assert "# Edited" in chapter.read_text() and not list(toy.glob("results/*/*"))


# ------------------------------------------------------------------------------- orphans and scratch folders


@pytest.mark.kind("orphans-and-scratch")
def test_a_run_that_lasts_keeps_its_scratch_folder_where_every_lock_succeeds(toy, tmp_path, monkeypatch, pretended):
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)

    def long_ago(scratch):
        os.utime(scratch, (1, 1))
        pretended.clear()
        runner.run(toy, out=tmp_path / "second")
        assert (scratch / "results").is_dir()

    pretended.append(long_ago)
    runner.run(toy, out=tmp_path / "first")
    assert pair(tmp_path / "first") == pair(tmp_path / "second") == (2, 2)


@pytest.mark.kind("orphans-and-scratch", own=True)
def test_what_a_job_of_the_book_warns_of_is_said_once(tmp_path, monkeypatch, capsys):
    said = "import sys; print('kncore: the store of the book is full', file=sys.stderr)"
    toy = make_checkout(tmp_path / "toy", n01_one=notebook(said), n02_two=notebook(said))
    monkeypatch.setattr(disk, "_said", set())
    staged = book.stage(toy)
    book._run_all(toy, staged, 60)
    told = capsys.readouterr()
    assert told.err == "kncore: the store of the book is full\n"
    assert "01-one: begun\n" in told.out and re.search(r"^01-one: \d+ s; [12] of 2 done$", told.out, re.MULTILINE)
    assert "01-one: cell 3 of 3\n" in (toy / "_build" / "01-one.log").read_text()
    assert sorted(path.name for path in (toy / "_build").iterdir()) == ["01-one.log", "02-two.log", "staging"]


def test_a_second_book_runs_only_the_chapters_that_changed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "identity", lambda name: (name, "revision"))
    toy = make_checkout(tmp_path / "toy", n01_one=notebook(COMPUTE), n02_two=notebook("print(n)"))
    book._run_all(toy, book.stage(toy), 60)
    staging = toy / "_build" / "staging"
    first = snapshot(staging)
    assert {"results/tiny/claim.json", "results/tiny/01.toml"} <= first.keys()
    capsys.readouterr()
    book._run_all(toy, book.stage(toy), 60)
    assert capsys.readouterr().out.splitlines() == [
        "01-one: kept from an earlier book",
        "02-two: kept from an earlier book",
    ]
    assert snapshot(staging) == first
    nbformat.write(notebook("print(n + 1)"), toy / "notebooks" / "02-two.ipynb")
    book._run_all(toy, book.stage(toy), 60)
    said = capsys.readouterr().out
    assert "01-one: kept" in said and "02-two: begun" in said
    changed = {name for name, content in snapshot(staging).items() if first[name] != content}
    assert changed - {"results/tiny/02.toml"} == {"notebooks/02-two.ipynb"}  # the note has the seconds it took


# ------------------------------------------------------------------------------- a folder named like a model


@pytest.mark.kind("folder-named-like-a-model")
def test_a_folder_that_is_named_like_a_registered_model_has_a_place_of_its_own(toy, tmp_path, monkeypatch, pretended):
    runner.run(toy)
    disk.write(toy / "results" / "smollm2-135m" / "claim.json", "tracked")
    monkeypatch.chdir(model_folder(tmp_path / "mine" / "smollm2-135m").parent.parent)
    (path,) = runner.run(toy, model="mine/smollm2-135m")
    name = models.identity("mine/smollm2-135m")[0]
    assert path == toy / "book" / "runs" / name / "01-toy.ipynb"
    assert pair(path.parent, toy / "results", name) == (2, 2)
    assert (toy / "results" / name / "01.toml").is_file()
    assert (toy / "results" / "smollm2-135m" / "claim.json").read_text() == "tracked"


@pytest.mark.kind("folder-named-like-a-model")
def test_two_folders_of_one_name_have_two_places(toy, tmp_path, pretended):
    folders = [model_folder(tmp_path / one / "checkpoint-500", number) for number, one in enumerate(("a", "b"))]
    paths = [runner.run(toy, model=str(folder), parameters={"n": 5})[0] for folder in folders]
    paths += [runner.run(toy, model=str(folder))[0] for folder in folders]
    assert len({path.parent for path in paths}) == 4
    assert {path.parent.name for path in paths} == {models.identity(str(folder))[0] for folder in folders}


@pytest.mark.kind("folder-named-like-a-model", own=True)
def test_folders_among_several_models_are_absolute_and_have_names_of_their_own(tmp_path, monkeypatch):
    compares = notebook("print(models)")
    compares.cells[1].source = 'models = "gpt2"\nn = 2'
    toy = make_checkout(tmp_path / "toy", n01_toy=compares)
    for number, one in enumerate(("a", "b")):
        model_folder(tmp_path / one / "gpt2", number)
    monkeypatch.chdir(tmp_path)
    seen = []

    def execute(chapter, parameters, *_):
        seen.append(parameters)
        raise RunError("seen")

    monkeypatch.setattr(kernel, "execute", execute)
    with pytest.raises(RunError):
        runner.run(toy, parameters={"models": "a/gpt2,gpt2,./b/gpt2"})
    assert seen == [{"models": f"{tmp_path / 'a' / 'gpt2'},gpt2,{tmp_path / 'b' / 'gpt2'}"}]


def test_only_a_chapter_that_compares_models_records_their_training_seeds():
    made = [Path("controlled-gpt2/claim.json"), Path("controlled-gpt2-1/claim.json")]

    def job(**defaults):
        chapter = types.SimpleNamespace(path=Path("11-toy.ipynb"), defaults=defaults)
        return types.SimpleNamespace(chapter=chapter, models=("controlled-gpt2",))

    runner._check_records(job(models="controlled-gpt2"), made)
    with pytest.raises(RunError, match="recorded controlled-gpt2-1/claim.json"):
        runner._check_records(job(model="controlled-gpt2"), made)
    with pytest.raises(RunError, match="recorded controlled-llama-1/claim.json"):
        runner._check_records(job(models="controlled-gpt2"), [Path("controlled-llama-1/claim.json")])


@pytest.mark.kind("folder-named-like-a-model", own=True)
def test_a_record_of_another_model_than_the_notebook_s_is_an_error(toy, pretended):
    before = snapshot(toy)

    def elsewhere(scratch):
        disk.write(scratch / "results" / "smollm2-135m" / "claim.json", "{}")

    pretended.append(elsewhere)
    with pytest.raises(RunError, match="recorded smollm2-135m/claim.json, and the name of its model is tiny"):
        runner.run(toy)
    assert snapshot(toy) == before


@pytest.mark.kind("folder-named-like-a-model", own=True)
def test_a_folder_without_a_model_has_no_place(tmp_path):
    (tmp_path / "smollm2-135m").mkdir()
    with pytest.raises(UsageError, match="has no name to put its runs under"):
        checkout.slug(str(tmp_path / "smollm2-135m"))


# ------------------------------------------------------------------------------- errors in words


@pytest.mark.kind("raw-errors")
def test_a_file_system_without_locks_is_no_obstacle(toy, monkeypatch, pretended):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    runner.run(toy)
    with checkout.book_lock(toy):
        assert pair(toy / "notebooks", toy / "results") == (2, 2)


@pytest.mark.kind("raw-errors")
def test_a_user_who_is_not_known_to_the_system_can_run(toy, monkeypatch, pretended):
    def unknown(_):
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    runner.run(toy)
    assert pair(toy / "notebooks", toy / "results") == (2, 2)


@pytest.mark.kind("raw-errors")
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_what_is_full_is_named(toy, monkeypatch, capsys, number):
    def full(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.chdir(toy)
    monkeypatch.setattr(kernel, "execute", full)
    assert cli.main(["run"]) == 1
    error = capsys.readouterr().err
    assert f"{toy / '_build'} cannot be written ({os.strerror(number)})" in error and "free some space" in error


@pytest.mark.kind("raw-errors", own=True)
def test_a_file_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=re.escape(str(tmp_path / "record.json"))):
        disk.write(tmp_path / "record.json", "{}")


@pytest.mark.kind("raw-errors")
@pytest.mark.kind("clock")
def test_a_clock_that_is_set_back_gives_no_negative_time(toy, monkeypatch):
    import papermill

    def execute(source, target, **_):
        nb = nbformat.read(source, as_version=4)
        nb.metadata.papermill = {"duration": -166.0}
        nbformat.write(nb, target)

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    runner.run(toy)
    assert (toy / "results" / "tiny" / "01.toml").read_text().startswith("seconds = 0\n")
