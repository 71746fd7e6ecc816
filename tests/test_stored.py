from __future__ import annotations

import json

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from toy import notebook

from knbook import runner
from knpaper import stored

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
    runner.run(toy)
    replaced = {old: new for old, new in replaced.items() if str(toy) not in old}
    assert stored.stable(text, replaced) == kept
