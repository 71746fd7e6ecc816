"""The way from a notebook to a stored notebook, on toy notebooks that need no model."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from safetensors.torch import save_file
from toy import COMPUTE, make_checkout, notebook, snapshot

from kncore import __main__, book, claims, disk, models, pipeline, stored

# ------------------------------------------------------------------------------------------------ finalise


@st.composite
def noise(draw):
    """The same run of the same notebook, with all that may differ between two machines or two days."""
    text = "a 0.25\nb 0.50\n"
    cut = draw(st.integers(1, len(text) - 1))
    style = draw(st.from_regex(r"T_[0-9a-f]{5}", fullmatch=True))
    bar = "".join(f"\r{i} %" for i in range(draw(st.integers(0, 3))))
    outputs = [
        new_output("stream", name="stdout", text=text[:cut]),
        new_output("stream", name="stderr", text=draw(st.text())),
        new_output("stream", name="stdout", text=text[cut:] + (bar + "\r" if bar else "") + "done\n"),
        new_output(
            "display_data",
            {"text/html": f'<style>#{style}_row0 {{}}</style><table id="{style}">1</table>', "text/plain": "table"},
        ),
        new_output("display_data", {stored_widget: {"model_id": draw(st.text())}, "text/plain": "bar"}),
    ]
    cell = new_code_cell("compute()", outputs=outputs, execution_count=1)
    cell.metadata = nbformat.from_dict(
        {"execution": {"iopub.execute_input": draw(st.text())}, "papermill": {"duration": draw(st.floats())}}
    )
    if draw(st.booleans()):
        cell.metadata.tags = []
    nb = new_notebook(cells=[new_markdown_cell("# Title"), cell])
    nb.metadata.update(
        nbformat.from_dict(
            {
                "papermill": {"output_path": draw(st.text())},
                "language_info": {"name": "python", "version": draw(st.text())},
                "kernelspec": {"name": draw(st.text()), "display_name": "Own"},
                "widgets": {"state": draw(st.text())},
            }
        )
    )
    return nb


stored_widget = "application/vnd.jupyter.widget-view+json"


@given(noise(), noise())
def test_two_runs_that_computed_the_same_are_stored_as_the_same_bytes(one, other):
    first = stored.dumps(stored.finalise(one))
    assert first == stored.dumps(stored.finalise(other))
    assert first == stored.dumps(stored.finalise(nbformat.reads(first, as_version=4)))
    assert "a 0.25\\n" in first and "done\\n" in first and '"execution_count": 1' in first


def test_finalise_leaves_its_argument_alone_and_names_no_folder(tmp_path):
    nb = notebook("x")
    nb.cells[2].outputs = [new_output("stream", name="stdout", text=f"{tmp_path}/a {tmp_path}-b x{tmp_path}\n")]
    before = json.dumps(nb)
    done = stored.finalise(nb, {str(tmp_path): "."})
    assert done.cells[2].outputs[0].text == f"./a {tmp_path}-b x{tmp_path}\n"
    assert json.dumps(nb) == before


# ------------------------------------------------------------------------------------- comparing two outputs


@given(st.floats(1e-3, 1e6), st.sampled_from([1e-4, -1e-4, 5e-4]))
def test_numbers_agree_within_the_tolerance(value, shift):
    assert stored.agree(f"gap  {value!r} of 12", f"gap {value * (1 + shift)!r} of 12")


@given(st.floats(1e-2, 1e6), st.sampled_from([2e-3, -2e-3, 1.0, -2.0]))
def test_numbers_disagree_beyond_the_tolerance(value, shift):
    assert not stored.agree(f"gap {value!r}", f"gap {value * (1 + shift)!r}")


@given(st.integers(-(10**9), 10**9), st.integers(1, 5))
def test_whole_numbers_agree_only_when_equal(value, shift):
    assert stored.agree(f"neuron {value}.", f"neuron {value}.")
    assert not stored.agree(f"neuron {value} x", f"neuron {value + shift} x")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("supported 0.5000", "supported 0.5001", True),
        ("supported 0.5000", "contradicted 0.5000", False),
        ("a 0.51 b", "a 0.51", False),
        ("L19N1044 0.5", "L19N1045 0.5", False),
        ("−0.500", "-0.5001", True),
        ("0.500", "-0.500", False),
        ("1.0e-03", "1.0001e-3", True),
        ("blocks 5-8", "blocks 5-9", False),
        ("<td>0.91234</td>", "<td>0.91235</td>", True),
        ("  9.9999 x", " 10.0000 x", True),
        ("1\n2", "1 2", False),
        ("nan", "0.1", False),
    ],
)
def test_agree(one, other, same):
    assert stored.agree(one, other) is same
    assert stored.agree(other, one) is same


def test_problems_of_a_notebook_are_named():
    nb = notebook("print(1)", "object()", "1/0", "unrun()", "path()")
    for number, cell in enumerate(nb.cells[1:], 1):
        cell.execution_count = number
    assert stored.problems(nb) == []
    nb.cells[2].outputs = [new_output("stream", name="stderr", text="warning")]
    nb.cells[3].outputs = [new_output("execute_result", {"text/plain": "<object at 0x7f00deadbeef>"})]
    nb.cells[4].outputs = [new_output("error", ename="ZeroDivisionError", evalue="division by zero")]
    nb.cells[5].execution_count = None
    nb.cells[6].outputs = [new_output("stream", name="stdout", text="saved /home/someone/x.json; see https://a.b/c/d")]
    del nb.cells[1].metadata["tags"]
    found = "\n".join(stored.problems(nb))
    for text in (
        "'parameters'",
        "cell 3 holds stderr",
        "0x7f00deadbeef",
        "ZeroDivisionError: division by zero",
        "cell 6 has no execution count",
        "cell 7 prints an absolute path: /home/someone/x.json",
    ):
        assert text in found
    assert len(stored.problems(nb)) == 6


def nbval(folder: Path, checkout: Path) -> subprocess.CompletedProcess:
    shutil.copy(checkout / "notebooks" / "conftest.py", folder / "notebooks")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--color=no", "--nbval"]
    command += ["--nbval-current-env", "--rootdir", str(folder), str(folder / "notebooks")]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)


def test_nbval_compares_numbers_loosely_text_exactly_and_skips_nothing(tmp_path, checkout):
    sources = ["print('loss', 0.12345)", "print('fact')", "2 + 2;", "0.5"]
    make_checkout(tmp_path / "toy", n01_toy=notebook(*sources))
    pipeline.run(tmp_path / "toy")
    path = tmp_path / "toy" / "notebooks" / "01-toy.ipynb"
    nb = nbformat.read(path, as_version=4)
    nb.cells[2].outputs[0].text = "loss 0.12346\n"
    nbformat.write(nb, path)
    sound = nbval(tmp_path / "toy", checkout)
    assert sound.returncode == 0, sound.stdout
    assert "5 passed" in sound.stdout

    nb.cells[2].outputs[0].text = "loss 0.12400\n"
    nb.cells[3].outputs[0].text = "grammar\n"
    nb.cells[4].execution_count = None
    nb.cells[5].outputs[0].data["text/plain"] = "0.502"
    nbformat.write(nb, path)
    broken = nbval(tmp_path / "toy", checkout)
    assert broken.returncode == 1
    assert "4 failed, 1 passed" in broken.stdout, broken.stdout
    assert "never run" in broken.stdout


# ------------------------------------------------------------------------------------------------- running


def test_a_run_is_stored_with_its_records_and_repeats_byte_for_byte(toy):
    assert pipeline.run(toy) == [toy / "notebooks" / "01-toy.ipynb"]
    first = snapshot(toy)
    nb = nbformat.reads(first["notebooks/01-toy.ipynb"].decode(), as_version=4)
    assert [output.text for output in nb.cells[2].outputs] == ["tiny 0.0\ntiny 0.5\n"]
    assert stored.problems(nb) == []
    assert json.loads(first["results/tiny/claim.json"]) == {"n": 2}
    pipeline.run(toy)
    assert snapshot(toy) == first


def test_other_parameters_never_touch_what_is_tracked(toy, tmp_path):
    before = snapshot(toy)
    (path,) = pipeline.run(toy, parameters={"n": 3})
    assert path == toy / "_build" / "runs" / "tiny" / "01-toy.ipynb"
    assert json.loads((path.parent / "results" / "tiny" / "claim.json").read_text()) == {"n": 3}
    (path,) = pipeline.run(toy, out=tmp_path / "out")
    assert path == tmp_path / "out" / "01-toy.ipynb"
    assert (tmp_path / "out" / "results" / "tiny" / "claim.json").exists()
    assert {name: data for name, data in snapshot(toy).items() if not name.startswith("_build")} == before


def test_a_local_model_is_named_after_its_folder_and_its_files(tmp_path, monkeypatch):
    toy = make_checkout(tmp_path / "toy", n01_toy=notebook("print(model)"))
    name = models.identity(str(model_folder(tmp_path / "models" / "mine")))[0]
    assert re.fullmatch("mine@[0-9a-f]{8}", name)
    monkeypatch.chdir(tmp_path / "models")
    (path,) = pipeline.run(toy, model="./mine")
    assert path == toy / "book" / "runs" / name / "01-toy.ipynb"
    assert (toy / "results" / name / "01.toml").is_file()
    text = path.read_text()
    assert f'model = \\"{name}\\"' in text and f"{name}\\n" in text and str(tmp_path) not in text
    assert pipeline.slug("owner/name") == "owner--name"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "m=3"], "no parameter 'm'"),
        (["-p", "modle=x"], "did you mean model?"),
        (["-p", "n=many"], "n is int (default 2), got str 'many'"),
        (["-p", "n=1.5"], "got float 1.5"),
        (["-p", "n"], "expected name=value"),
        (["-p", "n=[1]"], "expected one value"),
        (["--only", "07"], "no chapter '07'; there are 01-toy"),
        (["--model", "a", "-p", "model=b"], "disagree"),
    ],
)
def test_what_cannot_be_run_is_an_error_before_anything_runs(toy, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(toy)
    monkeypatch.setattr(pipeline, "_execute", lambda *_: pytest.fail("something ran"))
    before = snapshot(toy)
    assert __main__.main(["run", *arguments]) == 2
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
    assert __main__.main(["run", "--only", "2"]) == 1
    error = capsys.readouterr().err
    assert "02-bad.ipynb, cell 4 (In [3]): ValueError: the neuron is unknown" in error
    assert "Traceback" not in error
    assert snapshot(toy) == before
    assert list((toy / "_build").iterdir()) == []
    with pytest.raises(pipeline.RunError):
        __main__.main(["run", "--debug", "--only", "2"])


def test_a_cell_that_takes_too_long_is_named(tmp_path):
    toy = make_checkout(tmp_path / "toy", n01_slow=notebook("import time; time.sleep(10_000)"))
    before = snapshot(toy)
    with pytest.raises(pipeline.RunError, match=r"01-slow.ipynb, cell [23] took longer than 1 s"):
        pipeline.run(toy, timeout=1)
    assert snapshot(toy) == before


def test_parameters_are_numbers_true_false_null_or_text():
    read = pipeline.parse_parameters(["a=5", "b=0.2", "c=true", "d=null", "e=x=y", "f=2024-05-03", "g='5'"])
    assert read == {"a": 5, "b": 0.2, "c": True, "d": None, "e": "x=y", "f": "2024-05-03", "g": "5"}


def test_outside_a_checkout_the_command_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "__file__", str(tmp_path / "site" / "kncore" / "pipeline.py"))
    with pytest.raises(pipeline.UsageError, match="in no checkout"):
        pipeline.find_root(tmp_path)


# ------------------------------------------------------------------------------- a record with its notebook


def model_folder(path: Path, number: float = 0.0) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text('{"model_type": "gpt2"}')
    save_file({"weight": torch.full((2,), float(number))}, path / "model.safetensors")
    return path


@pytest.fixture
def pretended(monkeypatch):
    """Runs that need no kernel: the notebook's last cell prints n, and its record holds n; then `steps` are taken."""
    steps = []

    def execute(chapter, parameters, scratch, *_):
        scratch = Path(scratch)
        for folder in ("results", "before", "notebooks"):
            (scratch / folder).mkdir(exist_ok=True)
        shutil.copy(chapter.path, scratch / "notebooks")
        told = {**chapter.defaults, **parameters}
        place = told["model"] if models.local(told["model"]) is None else models.identity(told["model"])[0]
        if told["n"]:
            record = scratch / "results" / place.replace("/", "--") / "claim.json"
            disk.write(record, json.dumps({"n": told["n"]}))
        nb = nbformat.read(chapter.path, as_version=4)
        nb.cells[-1].outputs = [new_output("stream", name="stdout", text=f"{told['n']}\n")]
        nb.metadata.papermill = {"duration": 1.0}
        for step in steps:
            step(scratch)
        return nb

    monkeypatch.setattr(pipeline, "_execute", execute)
    return steps


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
                pipeline.run(toy, parameters={"n": 3}, out=out)
        return replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        pipeline.run(toy, parameters={"n": 2}, out=out)
    assert len(moved) > 3 and pair(out) in ((2, 2), (3, 3))
    assert not [path for path in out.rglob("*") if path.name.startswith(".")]


@pytest.mark.kind("record-with-notebook", own=True)
@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_what_a_killed_run_had_begun_to_store_is_stored_whole_by_who_comes_next(toy, pretended, at):
    pipeline.run(toy)
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
        pipeline.run(toy)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (9 if at < 3 else 0)
    staged = book.stage(toy)
    assert pair(staged / "notebooks", staged / "results") == (7, 7)
    assert pair(toy / "notebooks", toy / "results") == (7, 7)


@pytest.mark.kind("record-with-notebook", own=True)
@pytest.mark.parametrize("at", [0, 1, 2])
def test_where_a_file_cannot_be_moved_all_is_as_it_was(toy, monkeypatch, capsys, pretended, at):
    pipeline.run(toy)
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
    assert __main__.main(["run"]) == 1
    assert snapshot(toy) == before and "Input/output error" in capsys.readouterr().err


@pytest.mark.kind("record-with-notebook", own=True)
def test_a_record_that_a_run_found_to_hold_is_stored_with_its_notebook(toy, pretended):
    """Another run replaced it meanwhile; one that the run has nothing to do with stays as that one left it."""
    pipeline.run(toy)
    disk.write(toy / "results" / "tiny" / "other.json", "1")

    def meanwhile(scratch):
        kept = (scratch / "results" / "tiny" / "claim.json").stat().st_mtime_ns
        assert kept > 10**18
        disk.write(toy / "results" / "tiny" / "claim.json", '{"n": 9}')
        disk.write(toy / "results" / "tiny" / "other.json", "2")

    pretended.append(meanwhile)
    pipeline.run(toy)
    assert pair(toy / "notebooks", toy / "results") == (2, 2)
    assert (toy / "results" / "tiny" / "other.json").read_text() == "2"


@pytest.mark.kind("record-with-notebook", own=True)
def test_a_record_that_stands_is_marked_as_used(tmp_path, monkeypatch):
    monkeypatch.setenv("KNCORE_RESULTS", str(tmp_path))
    lm, claim = tiny.lm("gpt2"), "equally-few"
    stands, other = (disk.write(tmp_path / lm.name / f"{name}.json", "{}") for name in (claim, "other"))
    for path in (stands, other):
        os.utime(path, (10**9, 10**9))
    monkeypatch.setattr(claims, "_stands", lambda *_: True)
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
    monkeypatch.setattr(pipeline, "_execute", lambda *_: pytest.fail("something ran"))
    spoil(toy, toy / "out")
    assert __main__.main(["run", *arguments]) == 2
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
    monkeypatch.setattr(pipeline, "_execute", lambda *_: pytest.fail("something ran"))
    assert __main__.main(["run"]) == 2
    assert f"{folder}' (Permission denied)" in capsys.readouterr().err


@pytest.mark.kind("record-with-notebook", own=True)
def test_a_chapter_that_is_edited_while_it_runs_keeps_the_edit(toy, pretended):
    chapter = toy / "notebooks" / "01-toy.ipynb"

    def edit(_):
        chapter.write_text(chapter.read_text().replace("# Toy", "# Edited"))

    pretended.append(edit)
    with pytest.raises(pipeline.RunError, match="was edited while it ran; nothing was stored"):
        pipeline.run(toy)
    assert "# Edited" in chapter.read_text() and not list(toy.glob("results/*/*"))


# ------------------------------------------------------------------------------- orphans and scratch folders


@pytest.mark.kind("orphans-and-scratch")
def test_a_run_that_lasts_keeps_its_scratch_folder_where_every_lock_succeeds(toy, tmp_path, monkeypatch, pretended):
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)

    def long_ago(scratch):
        os.utime(scratch, (1, 1))
        pretended.clear()
        pipeline.run(toy, out=tmp_path / "second")
        assert (scratch / "results").is_dir()

    pretended.append(long_ago)
    pipeline.run(toy, out=tmp_path / "first")
    assert pair(tmp_path / "first") == pair(tmp_path / "second") == (2, 2)


@pytest.mark.kind("orphans-and-scratch")
def test_a_run_that_is_asked_to_end_takes_its_kernel_and_its_scratch_folder_along(tmp_path):
    slow = "import os, time, pathlib; pathlib.Path('../../../pid').write_text(str(os.getpid())); time.sleep(10_000)"
    toy = make_checkout(tmp_path / "slow", n01_toy=notebook(slow))
    command = [sys.executable, "-m", "kncore", "run"]
    with subprocess.Popen(command, cwd=toy, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (toy / "pid").exists():
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        error = process.communicate()[1]
    assert process.returncode == 143 and "stopped by SIGTERM" in error and "Traceback" not in error
    kernel = Path("/proc") / (toy / "pid").read_text() / "stat"
    with contextlib.suppress(OSError):
        assert kernel.read_text().rpartition(")")[2].split()[0] == "Z"
    assert list((toy / "_build").iterdir()) == []


@pytest.mark.kind("orphans-and-scratch")
def test_a_sign_of_division_is_no_home_folder(toy, monkeypatch):
    monkeypatch.setenv("HOME", "/")
    nb = notebook('print("3 / 4")')
    nb.cells[-1].outputs = [new_output("stream", name="stdout", text="3 / 4, /, a/b, //\n")]
    done = stored.finalise(nb, {"/": "~", str(toy): "."})
    assert done.cells[-1].outputs[0].text == "3 / 4, /, a/b, //\n"


@pytest.mark.kind("orphans-and-scratch", own=True)
@pytest.mark.parametrize(
    ("home", "text", "kept"),
    [
        ("", ". / ~", ". / ~"),
        (".", "1 . 2", "1 . 2"),
        ("ab", "ab /ab", "ab /ab"),
        ("/a", "the sound /a/, 1 /a", "the sound /a/, 1 /a"),
        ("/home/a.b+c", "/home/a.b+c/x /home/aXb+c/x", "~/x /home/aXb+c/x"),
        ("/home/me/", "in /home/me/x and /home/me", "in ~/x and ~"),
    ],
)
def test_only_a_home_folder_that_can_be_told_is_taken_out(toy, monkeypatch, pretended, home, text, kept):
    monkeypatch.setenv("HOME", home)
    replaced = {}
    monkeypatch.setattr(stored, "finalise", lambda nb, places: replaced.update(places) or nb)
    pipeline.run(toy)
    replaced = {old: new for old, new in replaced.items() if str(toy) not in old}
    assert stored.stable(text, replaced) == kept


@pytest.mark.kind("orphans-and-scratch")
def test_what_the_package_warns_of_in_a_kernel_is_said_once(tmp_path, monkeypatch, capsys):
    said = "import sys; print('kncore: the store is full', file=sys.stderr); print('other', file=sys.stderr)"
    toy = make_checkout(tmp_path / "toy", n01_toy=notebook(said, said))
    monkeypatch.setattr(disk, "_said", set())
    (path,) = pipeline.run(toy)
    assert (
        capsys.readouterr().err == "kncore: the store is full\n" and "store" not in path.read_text().split("print")[0]
    )


@pytest.mark.kind("orphans-and-scratch", own=True)
def test_what_a_job_of_the_book_warns_of_is_said_once(tmp_path, monkeypatch, capsys):
    said = "import sys; print('kncore: the store of the book is full', file=sys.stderr); kncore = 'kncore.attribute('"
    toy = make_checkout(tmp_path / "toy", n01_one=notebook(said), n02_two=notebook(said.partition("; kncore")[0]))
    monkeypatch.setattr(disk, "_said", set())
    staged = book.stage(toy)
    book._run_all(toy, staged, 60)
    told = capsys.readouterr()
    assert told.err == "kncore: the store of the book is full\n" and told.out.count("01-one ...") == 1
    assert sorted(path.name for path in (toy / "_build").iterdir()) == [
        "chapters-that-attribute.log",
        "staging",
        "the-other-chapters.log",
    ]


# ------------------------------------------------------------------------------- a folder named like a model


@pytest.mark.kind("folder-named-like-a-model")
def test_a_folder_that_is_named_like_a_registered_model_has_a_place_of_its_own(toy, tmp_path, monkeypatch, pretended):
    pipeline.run(toy)
    disk.write(toy / "results" / "smollm2-135m" / "claim.json", "tracked")
    monkeypatch.chdir(model_folder(tmp_path / "mine" / "smollm2-135m").parent.parent)
    (path,) = pipeline.run(toy, model="mine/smollm2-135m")
    name = models.identity("mine/smollm2-135m")[0]
    assert path == toy / "book" / "runs" / name / "01-toy.ipynb"
    assert pair(path.parent, toy / "results", name) == (2, 2)
    assert (toy / "results" / name / "01.toml").is_file()
    assert (toy / "results" / "smollm2-135m" / "claim.json").read_text() == "tracked"


@pytest.mark.kind("folder-named-like-a-model")
def test_two_folders_of_one_name_have_two_places(toy, tmp_path, pretended):
    folders = [model_folder(tmp_path / one / "checkpoint-500", number) for number, one in enumerate(("a", "b"))]
    paths = [pipeline.run(toy, model=str(folder), parameters={"n": 5})[0] for folder in folders]
    paths += [pipeline.run(toy, model=str(folder))[0] for folder in folders]
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
        raise pipeline.RunError("seen")

    monkeypatch.setattr(pipeline, "_execute", execute)
    with pytest.raises(pipeline.RunError):
        pipeline.run(toy, parameters={"models": "a/gpt2,gpt2,./b/gpt2"})
    assert seen == [{"models": f"{tmp_path / 'a' / 'gpt2'},gpt2,{tmp_path / 'b' / 'gpt2'}"}]


@pytest.mark.kind("folder-named-like-a-model", own=True)
def test_a_record_of_another_model_than_the_notebook_s_is_an_error(toy, pretended):
    before = snapshot(toy)

    def elsewhere(scratch):
        disk.write(scratch / "results" / "smollm2-135m" / "claim.json", "{}")

    pretended.append(elsewhere)
    with pytest.raises(pipeline.RunError, match="recorded smollm2-135m/claim.json, and its model's place is tiny"):
        pipeline.run(toy)
    assert snapshot(toy) == before


@pytest.mark.kind("folder-named-like-a-model", own=True)
def test_a_folder_without_a_model_has_no_place(tmp_path):
    (tmp_path / "smollm2-135m").mkdir()
    with pytest.raises(pipeline.UsageError, match="has no name to put its runs under"):
        pipeline.slug(str(tmp_path / "smollm2-135m"))


# ------------------------------------------------------------------------------- the kernel


@pytest.mark.kind("another-kernel")
def test_the_kernel_is_of_this_interpreter_whatever_is_called_python3(tmp_path, monkeypatch):
    toy = make_checkout(
        tmp_path / "toy", n01_toy=notebook("import sys, kncore; print(sys.executable, kncore.__file__)")
    )
    for setting in ("JUPYTER_PATH", "JUPYTER_DATA_DIR"):
        other = {"argv": ["false"], "display_name": "Python 3", "language": "python"}
        disk.write(tmp_path / setting / "kernels" / "python3" / "kernel.json", json.dumps(other))
        monkeypatch.setenv(setting, str(tmp_path / setting))
    monkeypatch.setattr(stored, "stable", lambda text, replace: text)
    (path,) = pipeline.run(toy)
    nb = nbformat.read(path, as_version=4)
    assert nb.cells[-1].outputs[0].text == f"{sys.executable} {Path(pipeline.__file__).with_name('__init__.py')}\n"
    assert nb.metadata.kernelspec == stored.KERNEL


@pytest.mark.kind("another-kernel", own=True)
def test_what_a_user_has_run_at_the_start_of_each_python_is_not_run(tmp_path, monkeypatch):
    toy = make_checkout(tmp_path / "toy", n01_toy=notebook("print(globals().get('theirs', 'none'))"))
    monkeypatch.setenv("PYTHONSTARTUP", str(disk.write(tmp_path / "start.py", "theirs = 1\n")))
    (path,) = pipeline.run(toy)
    assert nbformat.read(path, as_version=4).cells[-1].outputs[0].text == "none\n"


@pytest.mark.kind("another-kernel", own=True)
def test_a_kernel_that_is_not_installed_is_named(toy, monkeypatch):
    monkeypatch.setattr(pipeline, "find_spec", lambda name: None)
    with pytest.raises(pipeline.RunError, match="install ipykernel beside kncore"):
        pipeline.run(toy)


@pytest.mark.kind("raw-errors", own=True)
@pytest.mark.parametrize("said", ["died before replying to kernel_info", "didn't respond in 600 seconds"])
def test_a_kernel_that_does_not_start_is_no_fault_of_ours(toy, monkeypatch, capsys, said):
    import papermill

    def execute(*_, **__):
        raise RuntimeError(f"Kernel {said}")

    monkeypatch.chdir(toy)
    monkeypatch.setattr(papermill, "execute_notebook", execute)
    assert __main__.main(["run"]) == 1
    error = capsys.readouterr().err
    assert f"its kernel did not start (Kernel {said})" in error and "fault of kncore" not in error


# ------------------------------------------------------------------------------- what is typed


@pytest.mark.kind("parameter-as-typed")
@pytest.mark.parametrize(
    "text",
    ["010", "1:30", "1_0", "0x10", "0b1", ".5", "1.", "+5", " 5", "inf", "nan", ".inf", "-.inf", ".NaN"],
)
def test_a_number_in_another_notation_is_refused(text):
    with pytest.raises(pipeline.UsageError, match="expected (a finite value written as 5|no white space)"):
        pipeline.parse_parameters([f"seed={text}"])


@pytest.mark.kind("parameter-as-typed", own=True)
@pytest.mark.parametrize(
    "text",
    ["00", "-01", "0o7", "1__0", "1:30:20.5", "\u0663", "\uff15", "\u22125", "1e999", "1e-400", "Infinity", "5\t"]
    + ["9" * 5000, "'5", "\"a'", "'a''b'", "'a\\n'", "+1_0", "01.5", "1e1_0"],
)
def test_so_is_one_that_nobody_thought_of(text):
    with pytest.raises(pipeline.UsageError, match="expected "):
        pipeline.parse_parameters([f"seed={text}"])


@pytest.mark.kind("parameter-as-typed")
@pytest.mark.parametrize(
    ("text", "value"),
    [("yes", "yes"), ("no", "no"), ("on", "on"), ("off", "off"), ("~", "~"), ("null", None), ("true", True)]
    + [("2024-01-01", "2024-01-01"), ("'5'", "5"), ('"5"', "5"), ("1e3", 1000.0), ("-5", -5), ("0.50", 0.5)],
)
def test_what_is_typed_is_what_arrives(text, value):
    found = pipeline.parse_parameters([f"x={text}"])["x"]
    assert found == value and type(found) is type(value)


@pytest.mark.kind("parameter-as-typed", own=True)
@given(st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False) | st.booleans() | st.none())
def test_a_literal_of_python_is_that_value(value):
    found = pipeline.parse_parameters([f"x={value!r}"])["x"]
    assert found == value and type(found) is type(value)


@pytest.mark.kind("parameter-as-typed", own=True)
@given(st.text())
def test_text_arrives_letter_for_letter_or_is_refused(text):
    with contextlib.suppress(pipeline.UsageError):
        found = pipeline.parse_parameters([f"x={text}"])["x"]
        quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
        assert str(found) == (text[1:-1] if quoted else text) or not isinstance(found, str)
        assert isinstance(found, str) or found is None or text in ("true", "false") or float(text) == found


@pytest.mark.kind("parameter-as-typed", own=True)
def test_a_parameter_that_is_given_twice_has_one_value():
    assert pipeline.parse_parameters(["n=2", "n=2"]) == {"n": 2}
    for other in ("3", "'2'", "2.0"):
        with pytest.raises(pipeline.UsageError, match="given twice"):
            pipeline.parse_parameters(["n=2", f"n={other}"])


# ------------------------------------------------------------------------------- errors in words


@pytest.mark.kind("raw-errors")
def test_a_file_system_without_locks_is_no_obstacle(toy, monkeypatch, pretended):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    pipeline.run(toy)
    with pipeline.alone(toy):
        assert pair(toy / "notebooks", toy / "results") == (2, 2)


@pytest.mark.kind("raw-errors")
def test_a_user_who_is_not_known_to_the_system_can_run(toy, monkeypatch, pretended):
    def unknown(_):
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    pipeline.run(toy)
    assert pair(toy / "notebooks", toy / "results") == (2, 2)


@pytest.mark.kind("raw-errors")
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_what_is_full_is_named(toy, monkeypatch, capsys, number):
    def full(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.chdir(toy)
    monkeypatch.setattr(pipeline, "_execute", full)
    assert __main__.main(["run"]) == 1
    error = capsys.readouterr().err
    assert f"{toy / '_build'} cannot be written ({os.strerror(number)})" in error and "free some space" in error


@pytest.mark.kind("raw-errors", own=True)
def test_a_file_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=re.escape(str(tmp_path / "record.json"))):
        disk.write(tmp_path / "record.json", "{}")


@pytest.mark.kind("raw-errors", own=True)
def test_a_disk_without_room_for_a_kernel_is_named_before_one_starts(toy, monkeypatch):
    usage = shutil.disk_usage(toy)
    monkeypatch.setattr(pipeline.shutil, "disk_usage", lambda _: usage._replace(free=20_000))
    monkeypatch.setattr(pipeline, "_execute", lambda *_: pytest.fail("something ran"))
    with pytest.raises(pipeline.RunError, match=re.escape(f"{toy / '_build'} has 20,000 bytes left")):
        pipeline.run(toy)


@pytest.mark.kind("raw-errors")
@pytest.mark.kind("clock")
def test_a_clock_that_is_set_back_gives_no_negative_time(toy, monkeypatch):
    import papermill

    def execute(source, target, **_):
        nb = nbformat.read(source, as_version=4)
        nb.metadata.papermill = {"duration": -166.0}
        nbformat.write(nb, target)

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    pipeline.run(toy)
    assert (toy / "results" / "tiny" / "01.toml").read_text().startswith("seconds = 0\n")
