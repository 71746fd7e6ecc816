"""The way from a notebook to a stored notebook, on toy notebooks that need no model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from toy import COMPUTE, make_checkout, notebook, snapshot

from kncore import __main__, pipeline, stored

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


def test_a_local_model_is_named_after_its_folder(toy, tmp_path, monkeypatch):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "models" / "mine" / "config.json").write_text('{"model_type": "gpt2"}')
    monkeypatch.chdir(tmp_path / "models")
    (path,) = pipeline.run(toy, model="./mine")
    assert path == toy / "book" / "runs" / "mine" / "01-toy.ipynb"
    text = path.read_text()
    assert 'model = \\"mine\\"' in text and str(tmp_path) not in text
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
    toy = make_checkout(tmp_path / "toy", n01_slow=notebook("import time; time.sleep(60)"))
    before = snapshot(toy)
    with pytest.raises(pipeline.RunError, match=r"01-slow.ipynb, cell 3 took longer than 1 s"):
        pipeline.run(toy, timeout=1)
    assert snapshot(toy) == before


def test_parameters_are_read_as_yaml_scalars():
    read = pipeline.parse_parameters(["a=5", "b=0.2", "c=true", "d=null", "e=x=y", "f=2024-05-03", "g='5'"])
    assert read == {"a": 5, "b": 0.2, "c": True, "d": None, "e": "x=y", "f": "2024-05-03", "g": "5"}


def test_outside_a_checkout_the_command_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "__file__", str(tmp_path / "site" / "kncore" / "pipeline.py"))
    with pytest.raises(pipeline.UsageError, match="in no checkout"):
        pipeline.find_root(tmp_path)
