"""The way from a notebook to a stored notebook, on toy notebooks that need no model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup
from docutils.core import publish_string
from hypothesis import example, given
from hypothesis import strategies as st
from myst_parser.parsers.docutils_ import Parser
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from kncore import __main__, claims, models, pipeline, stored
from kncore.stats import Estimate

PARAMETERS = 'model = "tiny"\nn = 2\nscale = 0.5'
COMPUTE = """\
import json, os, pathlib, sys
print("to be dropped", file=sys.stderr)
for i in range(n):
    print(model, i * scale, flush=True)
folder = pathlib.Path(os.environ["KNCORE_RESULTS"], "tiny")
folder.mkdir(parents=True, exist_ok=True)
_ = (folder / "claim.json").write_text(json.dumps({"n": n}))"""


def notebook(*sources: str) -> nbformat.NotebookNode:
    first = new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    return new_notebook(cells=[new_markdown_cell("# Toy"), first, *map(new_code_cell, sources)])


def make_checkout(folder: Path, **notebooks: nbformat.NotebookNode) -> Path:
    (folder / "notebooks").mkdir(parents=True)
    (folder / "_toc.yml").write_text("format: jb-book\nroot: book/index\nparts: []\n")
    for name, content in notebooks.items():
        nbformat.write(content, folder / "notebooks" / f"{name[1:].replace('_', '-')}.ipynb")
    return folder


@pytest.fixture
def toy(tmp_path):
    return make_checkout(tmp_path / "toy", n01_toy=notebook(COMPUTE))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


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


# ------------------------------------------------------------------------------------------------ the book


def test_staging_copies_and_adds_the_runs_on_other_models(toy):
    (toy / "_config.yml").write_text("title: Toy\n")
    (toy / "book" / "runs" / "other").mkdir(parents=True)
    (toy / "book" / "index.md").write_text("# Toy\n")
    shutil.copy(toy / "notebooks" / "01-toy.ipynb", toy / "book" / "runs" / "other")
    before = snapshot(toy)
    staging = pipeline.stage(toy)
    assert (staging / "book" / "index.md").read_text() == "# Toy\n"
    contents = yaml.safe_load((staging / "_toc.yml").read_text())
    below = [{"file": "book/runs/other/01-toy"}]
    assert contents["parts"][-1]["chapters"] == [{"file": "book/runs/other/index", "sections": below}]
    assert (staging / "book" / "runs" / "other" / "index.md").read_text().startswith("# other\n")
    assert {name: data for name, data in snapshot(toy).items() if not name.startswith("_build")} == before


def test_the_page_of_a_model_that_comes_with_the_package_is_its_card(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "SHIPPED", tmp_path / "weights")
    (tmp_path / "weights" / "known").mkdir(parents=True)
    (tmp_path / "weights" / "known" / "README.md").write_text("# known\n\nMade of sugar.\n")
    (toy / "_config.yml").write_text("title: Toy\n")
    (toy / "book" / "runs" / "known").mkdir(parents=True)
    shutil.copy(toy / "notebooks" / "01-toy.ipynb", toy / "book" / "runs" / "known")
    page = (pipeline.stage(toy) / "book" / "runs" / "known" / "index.md").read_text()
    assert page.startswith("# known\n") and page.endswith("Made of sugar.\n") and page.count("# ") == 1


def test_a_chapter_that_compares_models_is_given_one_and_has_no_run_of_its_own(tmp_path):
    compares = notebook("print(models)")
    compares.cells[1].source = 'models = "tiny,other"'
    root = make_checkout(tmp_path / "toy", n01_toy=notebook(COMPUTE), n02_both=compares)
    written = pipeline.run(root, model="one")
    assert [path.name for path in written] == ["01-toy.ipynb"]
    assert not (root / "book" / "runs" / "one" / "02-both.ipynb").exists()
    pipeline.run(root, model="one", only=["02"], out=tmp_path / "out")
    ran = nbformat.read(tmp_path / "out" / "02-both.ipynb", as_version=4)
    assert ran.cells[-1].outputs[0].text == "one\n"


def test_a_run_leaves_the_records_that_another_one_made_meanwhile(tmp_path):
    meanwhile = tmp_path / "toy" / "results" / "other" / "claim.json"
    source = COMPUTE + f"\n_ = pathlib.Path({str(meanwhile)!r}).write_text('newer')"
    root = make_checkout(tmp_path / "toy", n01_toy=notebook(source))
    meanwhile.parent.mkdir(parents=True)
    meanwhile.write_text("older")
    pipeline.run(root)
    assert meanwhile.read_text() == "newer"
    assert (root / "results" / "tiny" / "claim.json").is_file()


def test_the_models_beside_run_together_and_their_records_join(tmp_path, monkeypatch):
    source = COMPUTE.replace('"tiny")', "model)")
    root = make_checkout(tmp_path / "toy", n01_toy=notebook(source))
    (root / "_config.yml").write_text("title: Toy\n")
    monkeypatch.setattr(pipeline, "BESIDE", ("one", "two", "three"))
    for name in ("one", "two"):
        (root / "book" / "runs" / name).mkdir(parents=True)
        shutil.copy(root / "notebooks" / "01-toy.ipynb", root / "book" / "runs" / name)
    staging = pipeline.stage(root)
    pipeline._run_beside(root, staging, 60)
    for name in ("one", "two"):
        ran = nbformat.read(staging / "book" / "runs" / name / "01-toy.ipynb", as_version=4)
        assert ran.cells[-1].outputs[0].text.startswith(f"{name} 0.0")
        assert (staging / "results" / name / "claim.json").is_file()
        assert not (staging / "book" / "runs" / name / "results").exists()
    assert not (staging / "book" / "runs" / "three").exists()


def test_a_model_beside_that_fails_is_named_with_its_cell(tmp_path, monkeypatch):
    root = make_checkout(tmp_path / "toy", n01_toy=notebook("1 / 0"))
    (root / "_config.yml").write_text("title: Toy\n")
    monkeypatch.setattr(pipeline, "BESIDE", ("one",))
    (root / "book" / "runs" / "one").mkdir(parents=True)
    shutil.copy(root / "notebooks" / "01-toy.ipynb", root / "book" / "runs" / "one")
    with pytest.raises(pipeline.RunError, match=r"(?s)one:.*cell 4 .*ZeroDivisionError"):
        pipeline._run_beside(root, pipeline.stage(root), 60)


def test_a_label_stays_with_the_chapter(toy):
    (toy / "_config.yml").write_text("title: Toy\n")
    (toy / "book" / "runs" / "other").mkdir(parents=True)
    nbformat.write(
        new_notebook(cells=[new_markdown_cell("(there)=\n## There\n\n(not) = one")]),
        toy / "book" / "runs" / "other" / "01-toy.ipynb",
    )
    staging = pipeline.stage(toy)
    cell = nbformat.read(staging / "book" / "runs" / "other" / "01-toy.ipynb", as_version=4).cells[0]
    assert cell.source == "## There\n\n(not) = one"


def test_the_links_of_a_run_lead_where_they_led_in_the_notebook(toy):
    (toy / "_config.yml").write_text("title: Toy\n")
    (toy / "book" / "runs" / "other").mkdir(parents=True)
    (toy / "book" / "thesis.md").touch()
    links = "[a](../book/thesis.md#part) [](02-toy.ipynb) ![c](03-toy.ipynb) [d](https://x.org/a) [e](#part) [f](no.md)"
    for folder, names in (("notebooks", "123"), ("book/runs/other", "12")):
        for number in names:
            nbformat.write(new_notebook(cells=[new_markdown_cell(links)]), toy / folder / f"0{number}-toy.ipynb")
    staging = pipeline.stage(toy)
    nb = nbformat.read(staging / "book" / "runs" / "other" / "01-toy.ipynb", as_version=4)
    assert nb.cells[0].source == links.replace("../book", "../..").replace("03-", "../../../notebooks/03-")
    assert nbformat.read(staging / "notebooks" / "01-toy.ipynb", as_version=4).cells[0].source == links


def put(folder: Path, claim: str, model: str, monkeypatch, **changes) -> Path:
    """A record with made-up numbers below `folder`; `changes` are made and sealed after it was recorded."""
    monkeypatch.setenv("KNCORE_RESULTS", str(folder))
    lm = SimpleNamespace(name=model, revision="0123456789abcdef", dtype="float32")
    claims.record(claim, lm, Estimate(0.8, 0.6, 0.9, 40), seed=0, source="own")
    path = folder / model.replace("/", "--") / f"{claim}.json"
    told = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(told | {"checksum": claims.checksum(told)}, indent=1, ensure_ascii=False) + "\n")
    return path


def test_the_book_keeps_the_dates_of_unchanged_records_and_no_claim_that_is_no_longer_recorded(tmp_path, monkeypatch):
    new, old = tmp_path / "new", tmp_path / "toy" / "results"
    told = [put(new, claim, "tiny", monkeypatch) for claim in ("fact-has-neurons", "fact-owns-neuron")]
    source = "import json, os, pathlib\nfolder = pathlib.Path(os.environ['KNCORE_RESULTS'], 'tiny')\nfolder.mkdir()\n"
    source += "\n".join(f"_ = (folder / {p.name!r}).write_text({p.read_text()!r})" for p in told)
    toy = make_checkout(tmp_path / "toy", n01_toy=notebook(source))
    (toy / "_config.yml").touch()
    put(old, "fact-has-neurons", "tiny", monkeypatch, date="2020-02-02")
    put(old, "fact-owns-neuron", "tiny", monkeypatch, date="2020-02-02", value=0.7)
    put(old, "equally-few", "tiny", monkeypatch, date="2020-02-02")
    put(old, "equally-few", "other", monkeypatch, date="2020-02-02")

    def build(command, **_):
        pipeline.write(Path(command[-1]) / "_build" / "html" / "index.html", "")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(pipeline, "subprocess", SimpleNamespace(run=build))
    before = snapshot(toy)
    pipeline.book(toy)
    assert {name: data for name, data in snapshot(toy).items() if not name.startswith("_build")} == before
    staging = toy / "_build" / "staging"
    dates = {(told["claim"], told["model"]): told["date"] for told in claims.read(staging / "results")}
    today = json.loads(told[0].read_text())["date"]
    assert dates == {
        ("fact-has-neurons", "tiny"): "2020-02-02",
        ("fact-owns-neuron", "tiny"): today,
        ("equally-few", "other"): "2020-02-02",
    }
    rows = body(shown(staging, "provenance.md"))
    assert [row[-1].get_text() for row in rows] == ["2020-02-02", today, "2020-02-02"]


# -------------------------------------------------------------------------------------------------- claims


def shown(staging: Path, name: str) -> BeautifulSoup:
    """A generated page as a reader sees it; whatever the parser warns of is an error."""
    root = Path(__file__).resolve().parent.parent
    extensions = yaml.safe_load((root / "_config.yml").read_text())["parse"]["myst_enable_extensions"]
    settings = {"myst_enable_extensions": extensions, "myst_all_links_external": True, "halt_level": 2}
    settings |= {"output_encoding": "unicode", "embed_stylesheet": False, "stylesheet_path": None}
    text = (staging / "book" / "generated" / name).read_text(encoding="utf-8")
    html = publish_string(text, parser=Parser(), writer_name="html5", settings_overrides=settings)
    return BeautifulSoup(html, "html.parser")


def body(page: BeautifulSoup) -> list:
    return [row.find_all(["th", "td"]) for row in page.select("tbody tr")]


def lines(cell) -> list[str]:
    return [paragraph.get_text() for paragraph in cell.find_all("p")]


@pytest.fixture
def staging(toy):
    (toy / "_toc.yml").write_text(yaml.safe_dump({"parts": [{"chapters": [{"file": "notebooks/01-toy"}]}]}))
    return toy


def test_the_matrix_has_a_row_for_each_claim_and_a_column_for_each_model(staging, monkeypatch):
    for claim in claims.CLAIMS:
        put(staging / "results", claim, "tiny", monkeypatch)
    put(staging / "results", "fact-has-neurons", "z", monkeypatch)
    put(staging / "results", "equally-few", "a/b@c", monkeypatch)
    pipeline.generate(staging)
    page = shown(staging, "matrix.md")
    assert [head.get_text() for head in page.select("thead th")] == ["Claim", "tiny", "a/b@c", "z"]
    rows = dict(zip(claims.CLAIMS, body(page), strict=True))
    for claim, cells in rows.items():
        told = claims.CLAIMS[claim]
        assert lines(cells[0]) == [told.statement, f"Chapter {told.chapter}, {claim}: {told.metric}"]
        verdict = told.verdict(Estimate(0.8, 0.6, 0.9, 40))
        assert lines(cells[1]) == [verdict, "0.80 [0.60, 0.90]", "n = 40"]
        assert cells[1].find("span")["class"] == [verdict]
    empty = {
        (claim, column) for claim, cells in rows.items() for column in (2, 3) if lines(cells[column]) == ["not run"]
    }
    assert len(empty) == 2 * len(rows) - 2
    assert not empty & {("fact-has-neurons", 3), ("equally-few", 2)}


def test_a_cell_leads_to_the_chapter_or_the_run_that_it_came_from(staging, monkeypatch):
    for model in ("tiny", "owner/ran", "unran"):
        for claim in ("fact-has-neurons", "grammar-has-neurons"):
            put(staging / "results", claim, model, monkeypatch)
    (staging / "_config.yml").touch()
    (staging / "book" / "runs" / "owner--ran").mkdir(parents=True)
    shutil.copy(staging / "notebooks" / "01-toy.ipynb", staging / "book" / "runs" / "owner--ran")
    nbformat.write(notebook(), staging / "notebooks" / "02-not-in-the-contents.ipynb")
    staging = pipeline.stage(staging)
    pipeline.generate(staging)
    rows = dict(zip(claims.CLAIMS, body(shown(staging, "matrix.md")), strict=True))
    links = [[a["href"] for a in cell.find_all("a")] for cell in rows["fact-has-neurons"]]
    assert links == [["../notebooks/01-toy.ipynb"], ["../notebooks/01-toy.ipynb"], ["runs/owner--ran/01-toy.ipynb"], []]
    assert all((staging / "book" / target).is_file() for cell in links for target in cell)
    assert not [a for cell in rows["grammar-has-neurons"] for a in cell.find_all("a")], "there is no page of chapter 02"


def test_the_matrix_says_what_is_stale_and_why(staging, monkeypatch):
    results = staging / "results"
    put(results, "fact-has-neurons", "fresh", monkeypatch)
    put(results, "fact-has-neurons", "other", monkeypatch, code="0" * 16, metric="m")
    path = put(results, "fact-has-neurons", "edited", monkeypatch)
    path.write_text(path.read_text().replace('"supported"', '"contradicted"'))
    path = put(results, "fact-has-neurons", "old", monkeypatch)
    unsealed = json.loads(path.read_text())
    path.write_text(json.dumps({name: unsealed[name] for name in unsealed if name not in ("date", "checksum")}))
    pipeline.generate(staging)
    page = shown(staging, "matrix.md")
    models = [head.get_text() for head in page.select("thead th")]
    assert models[:2] == ["Claim", "tiny"]
    cells = dict(zip(models, body(page)[0], strict=True))
    assert lines(cells["fresh"]) == ["supported", "0.80 [0.60, 0.90]", "n = 40"]
    assert lines(cells["edited"])[::3] == ["contradicted", "stale: edited after it was recorded"]
    assert lines(cells["other"])[-1] == "stale: the code has changed since; the metric has changed since"
    assert lines(cells["old"])[-1] == "stale: it has no checksum"
    assert {model: "outdated" in cells[model].find("span")["class"] for model in models[2:]} == {
        "fresh": False,
        "edited": True,
        "other": True,
        "old": True,
    }
    dates = {row[1].get_text(): row[-1].get_text() for row in body(shown(staging, "provenance.md"))}
    assert dates["old"] == "not recorded" and dates["fresh"] == unsealed["date"]


def test_provenance_has_a_row_for_each_record(staging, monkeypatch):
    put(staging / "results", "fact-has-neurons", "tiny", monkeypatch)
    put(staging / "results", "equally-few", "a/b@c", monkeypatch, date="2026-03-04")
    pipeline.generate(staging)
    rows = [[cell.get_text() for cell in row] for row in body(shown(staging, "provenance.md"))]
    known = ["01234567", "own", "0", "40", claims.code_version()[:8], claims.package_version()]
    assert [row[:-1] for row in rows] == [["fact-has-neurons", "tiny", *known], ["equally-few", "a/b@c", *known]]
    assert rows[1][-1] == "2026-03-04"


def test_hub_models_without_a_record_have_the_command_that_runs_them(staging, monkeypatch):
    put(staging / "results", "fact-has-neurons", "gpt2", monkeypatch)
    pipeline.generate(staging)
    rows = {row[0].get_text(): row[-1].get_text() for row in body(shown(staging, "hub.md"))}
    hub = [name for name, entry in models.REGISTRY.items() if isinstance(entry, models.Hub)]
    assert rows == {name: f"python -m kncore run --model {name}" for name in hub if name != "gpt2"}


def test_without_records_the_matrix_says_that_nothing_has_been_run(staging):
    pipeline.generate(staging)
    page = shown(staging, "matrix.md")
    assert [head.get_text() for head in page.select("thead th")] == ["Claim", "tiny"]
    assert [lines(row[1]) for row in body(page)] == [["not run"]] * len(claims.CLAIMS)
    assert shown(staging, "provenance.md").find("p").get_text() == "No claim has a record yet."


@given(st.text(st.characters(codec="ascii", categories=("L", "N", "P", "S", "Z")), min_size=1))
@example("<script>alert(1)</script>")
@example("*a* _b_ `c` [d](e) ![f](g) $h$ {{i}} {.j} {k}`l` | \\ <m> &amp; https://n.org --- # + 1. \n\n```\n:::")
def test_generated_text_is_shown_as_it_is(tmp_path_factory, text):
    plain = " ".join(text.split()) or "x"
    folder = tmp_path_factory.mktemp("text")
    table = pipeline._list_table([["Claim", "Code"], [[pipeline._text(plain)] * 2, pipeline._code(plain)]], "x")
    pipeline.write(folder / "book" / "generated" / "x.md", table)
    (row,) = body(shown(folder, "x.md"))
    assert lines(row[0]) == [plain, plain] and row[1].get_text() == plain
    assert not row[0].find(["script", "em", "code", "a", "img", "span"])


def test_the_readme_keeps_all_but_its_table(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "claims_table", lambda *_, **__: "| new |\n")
    path = tmp_path / "README.md"
    path.write_text(f"before\n{pipeline.BEGIN}\nold\n{pipeline.END}\nafter\n")
    assert pipeline.readme(tmp_path) == f"before\n{pipeline.BEGIN}\n| new |\n{pipeline.END}\nafter\n"
    path.write_text("no markers\n")
    with pytest.raises(pipeline.UsageError, match="once each"):
        pipeline.readme(tmp_path)
