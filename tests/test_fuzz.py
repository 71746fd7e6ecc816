"""Whatever is typed or handed over has an answer in one line: a result, or an error that says what was wrong."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import subprocess
import sys
import traceback
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from papermill.translators import translate_parameters
from toy import COMPUTE, make_checkout, notebook

import kncore
from knbook import book, checkout, cli, kernel, prompts, shards
from knbook.errors import RunError, UsageError
from knbook.parameters import check_parameters, parse_parameters
from kncore import Query, editors, models, zoo
from knpaper import grammar, tasks
from knpaper.datasets import blimp, counterfact, known_1000, pararel
from knpaper.records import read_records

ROOT = Path(__file__).resolve().parent.parent
LMS = {family: tiny.lm(family) for family in ("gpt2", "bert")}
ODD = (
    "",
    " ",
    "\n\t",
    "\0",
    "\ud800",
    "مدينة باريس هي عاصمة",
    "\u202eFrance\u202c",
    "🇫🇷👩‍👩‍👧 is",
    "e\u0301\u0301\u0301",
    "[MASK]",
    "[MASK] [MASK]",
    "[CLS] the capital [SEP]",
    "[PAD] [UNK]",
    "<|endoftext|>",
    "</s><s>",
    "<script>alert(1)</script>",
    "$$\\frac{1}{0}$$",
    "{} {}",
    "%s %n",
    "../../etc/passwd",
    "~nobody/x",
    "-1",
    "1e999",
    "the " * 80 + "cat",
    "x" * 5000,
)
texts = st.sampled_from(ODD) | st.text(max_size=40) | st.sampled_from(["the capital of France is", "Paris", "cat"])
few = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def deliberate(error: Exception) -> bool:
    """Whether a line of this package that says `raise` raised it, and no call of something else."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    folders = {folder.name for folder in Path(last.filename).parents[:2]}
    ours = not folders.isdisjoint(("kncore", "knpaper", "knbook"))
    return ours and (last.line or "").startswith("raise ") and isinstance(error, ValueError | TypeError | RuntimeError)


@contextlib.contextmanager
def answered(*kinds: type[Exception], typed: bool = True):
    """No other error than these, raised by a line of ours, and each says something, which fits into one line.

    A value that is not of the type asked for (`typed` is False) may have Python's own answer.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except Exception as error:
            ours = not typed or hasattr(error, "exit_code") or isinstance(error, OSError) or deliberate(error)
            if not ours or not isinstance(error, kinds or (ValueError, TypeError)):
                raise
            told = cli._line(str(error))
            assert told and "\n" not in told and len(told) < 2000, told


# ------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def typed(tmp_path):
    """A function that runs a command in a toy checkout where nothing is computed or fetched: exit code, stderr."""
    root = make_checkout(tmp_path / "toy", n01_toy=notebook(COMPUTE))

    def stop(*_, **__):
        raise RunError("it would have been done")

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("KNCORE_CACHE", str(root / "cache"))
        patch.setenv("KNCORE_SCORES", str(root / "scores"))
        for place, name, put in (
            (kernel, "execute", stop),
            (book, "book", stop),
            (book, "pdf", stop),
            (models, "_from_pretrained", stop),
            (zoo, "_cached", stop),
            (zoo, "_snapshot", stop),
        ):
            patch.setattr(place, name, put)

        def run(arguments: list[str]) -> tuple[int, str]:
            said = io.StringIO()
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                code = cli.main(arguments)
            return code, said.getvalue()

        yield run


COMMANDS = ("run", "book", "render", "pdf", "sweep", "merge", "fetch", "cache", "readme")
OPTIONS = (
    "--model --only -p --out --timeout --prune --limit --shard --seed -n --queries --source --editor --steps --device "
    "--dtype --device-map --quadrature --jobs"
).split()
VALUES = ["n=1", "n=0", "n=", "=", "n=[1]", "scale=.nan", "model=..", "tiny", "gpt2", "1/2", "0/0", "5MB", "edits", "."]
VALUES += [
    "cuda:9",
    "meta",
    "hpu",
    "float8_e4m3fn",
    "int8",
    "auto",
    "attribution",
    "capital",
    "gauss",
    "controlled-gpt2",
]
arguments = st.lists(st.sampled_from(COMMANDS) | st.sampled_from(OPTIONS) | st.sampled_from(VALUES) | texts, max_size=7)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(COMMANDS), arguments)
@example("run", ["-p", "n=2024-99-99"])
@example("run", ["-p", "n=" + "[" * 5000])
@example("run", ["--model", "/"])
@example("run", ["--model", "\0"])
@example("run", ["--out", "\0"])
@example("run", ["--out", "notebooks/01-toy.ipynb"])
@example("run", ["--only", "²"])
@example("run", ["--timeout", "²"])
@example("run", ["--timeout", "9" * 30])
@example("sweep", ["edits", "--editor", "none", "--out", "o"])
@example("sweep", ["attribution", "--queries", "nowhere", "--out", "o"])
@example("merge", ["nowhere", "--out", "o"])
@example("merge", ["notebooks", "--out", "x" * 5000])
@example("fetch", ["owner/name@main"])
@example("fetch", ["../../x"])
@example("cache", ["--limit", "many"])
def test_a_command_is_done_or_answered_in_one_line(typed, command, rest):
    assume(not any(one.startswith("--deb") for one in rest))
    code, said = typed([command, *rest])
    assert code in (0, 1, 2) and "Traceback" not in said
    if code == 1:
        assert "it would have been done" in said or command == "merge", said
    if code == 2:
        assert said.startswith("kncore: ") and said.count("\n") == 1 and len(said) > 20, said


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["run", "-p", "n=0"], "expected a whole number from 1"),
        (["run", "-p", "n=99999999999"], "to 2**32 - 1"),
        (["run", "-p", "scale=.inf"], "a number is written as 5, -0.25 or 1e-3"),
        (["run", "-p", "n="], "is int"),
        (["run", "--only", ","], "name one"),
        (["run", "--model", ""], "name one"),
        (["run", "--out", ""], "name one"),
        (["run", "--out", "notebooks/01-toy.ipynb"], "give a folder"),
        (["run", "--out", "notebooks/01-toy.ipynb/x"], "give a folder"),
        (["fetch", ""], "name one"),
        (["merge", "notebooks", "--out", "notebooks"], "give the file"),
        (["merge", "", "--out", "o"], "name one"),
        (["sweep", "attribution", "--queries", "notebooks", "--out", "o"], "give another path"),
        (["sweep", "attribution", "--device", "meta", "--out", "o"], "'cpu' always can"),
        (["sweep", "attribution", "--device", "hpu", "--out", "o"], "'cpu' always can"),
        (["sweep", "attribution", "--device", "", "--out", "o"], "'cpu' always can"),
        (["sweep", "attribution", "--dtype", "float8_e4m3fn", "--out", "o"], "bfloat16"),
        (["sweep", "attribution", "--dtype", "nn", "--out", "o"], "bfloat16"),
        (["run", "-p", "n=null"], "a finite value"),
        (["run", "-p", "model=no-such"], "neither a registered name"),
        (["run", "--model", "gpt2@main"], "owner/name@commit"),
        (["run", "--model", "notebooks"], "has no config.json"),
        (["fetch", "owner/name@" + "0" * 39], "all 40 digits"),
        (["sweep", "edits", "--editor", "none", "--out", "o"], "rome"),
        (["sweep", "attribution", "--out", "notebooks/01-toy.ipynb"], "give a folder"),
        (["sweep", "attribution", "--out", "results"], "give a folder of its own"),
        (["sweep", "attribution", "--out", "scores/x"], "give a folder of its own"),
        (["sweep", "attribution", "--out", "_toc.yml"], "give a folder"),
        (["sweep", "attribution", "--queries", "_toc.yml", "--out", "o"], "Expected an object with prompt and target"),
        (["merge", "notebooks", "--out", "results/all.jsonl"], "give a folder of its own"),
        (["sweep", "attribution", "--device-map", "gpu", "--out", "o"], "sequential"),
        (["frobnicate"], "--help"),
        ([], "--help"),
    ],
)
def test_the_answer_names_a_remedy(typed, arguments, remedy):
    code, said = typed(arguments)
    assert code == 2 and remedy in said and said.count("\n") == 1


def test_a_traceback_is_shown_to_those_who_ask_for_it(typed):
    with pytest.raises(UsageError):
        typed(["run", "--debug", "-p", "n=0"])


@pytest.mark.parametrize("broken", [lambda *_: int("a fault"), lambda *_: 1 + "1", lambda *_: [][0]])
def test_a_fault_of_ours_is_not_called_wrong_input(typed, monkeypatch, broken):
    monkeypatch.setattr(checkout, "find_root", broken)
    code, said = typed(["run"])
    assert code == 1 and "a fault of kncore" in said and "--debug" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 7 TiB"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes"),
    ],
)
def test_memory_that_ran_out_is_called_that(typed, monkeypatch, error):
    def full():
        raise error

    monkeypatch.setattr(checkout, "find_root", full)
    code, said = typed(["run"])
    assert code == 1 and "memory ran out" in said and "--device-map" in said and said.count("\n") == 1


def test_what_is_printed_ends_where_nobody_reads_on_and_has_letters_everywhere(tmp_path):
    scores = str(tmp_path / "\u00f6")
    environment = {**os.environ, "KNCORE_SCORES": scores, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "kncore", "cache"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert r"\xf6" in done.stdout
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as nobody:
        done = subprocess.run(command, stdout=nobody, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    assert done.returncode == 1 and "kncore" not in done.stderr and "Traceback" not in done.stderr


# ------------------------------------------------------------------------------------------- parameters


CHAPTERS = checkout.chapters(ROOT)
NAMES = sorted({name for chapter in CHAPTERS for name in chapter.defaults})
pairs = st.tuples(st.sampled_from(NAMES) | texts, texts | st.integers().map(str) | st.floats().map(str))


@few
@given(st.sampled_from(CHAPTERS), st.lists(pairs, min_size=1, max_size=4))
def test_parameters_are_taken_or_refused_before_anything_runs(chapter, given_pairs):
    with answered(UsageError):
        check_parameters(chapter, parse_parameters([f"{n}={v}" for n, v in given_pairs]))


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.path.stem)
def test_the_defaults_and_their_like_are_taken(chapter):
    check_parameters(chapter, chapter.defaults)
    good = {"n": 2, "seed": 1, "source": "public", "quadrature": "riemann", "model": "gpt2", "sweep": "0,2"}
    good |= {"models": "controlled-gpt2,controlled-bert", "corpus": str(ROOT / "book")}
    check_parameters(chapter, {name: value for name, value in good.items() if name in chapter.defaults})
    bad = {"n": 0, "seed": -1, "source": "nowhere", "quadrature": "simpson", "model": "gpt", "sweep": "0,", "draws": 0}
    bad |= {"models": "controlled-gpt2,gpt", "corpus": "nowhere", "samples": -3, "stride": 0}
    for name, value in bad.items():
        if name in chapter.defaults:
            with pytest.raises(UsageError, match=f"parameter {name}: expected "):
                check_parameters(chapter, {name: value})


@few
@given(texts | st.integers() | st.floats(allow_nan=False) | st.booleans())
def test_a_parameter_arrives_in_the_notebook_as_the_value_it_was(value):
    """What is written into the cell of injected parameters is one assignment of one literal."""
    source = translate_parameters("python3", "python", {"n": value}, "")
    (line,) = ast.parse(source).body
    if isinstance(value, float) and value in (float("inf"), -float("inf")):
        assert "float(" in source
    else:
        assert ast.literal_eval(line.value) == value


# ------------------------------------------------------------------------------------------- queries and models


fields = st.fixed_dictionaries(
    {"prompt": texts, "target": texts},
    optional={name: texts | st.none() | st.integers() for name in ("subject", "foil", "task", "template")},
)


@settings(max_examples=200, deadline=None)
@given(fields)
def test_a_query_is_one_or_says_why_not(asked):
    with answered():
        query = Query(**asked)
        assert query.target.strip() and query.prompt == query.prompt.rstrip()


@few
@given(st.sampled_from(sorted(LMS)), fields)
@example("gpt2", {"prompt": "the " * 63 + "cat", "target": "cat cat cat"})
@example("bert", {"prompt": "[CLS] the [MASK] [SEP]", "target": "cat"})
@example("gpt2", {"prompt": "[MASK] is red", "target": "cat"})
@example("gpt2", {"prompt": "the cat [MASK].", "target": "is in"})
def test_any_prompt_is_attributed_predicted_and_suppressed_or_refused(family, asked):
    lm = LMS[family]
    with answered():
        query = Query(**asked)
        found = kncore.attribute(lm, [query], steps=2, store=False)
        assert bool(torch.isfinite(found.scores).all())
        row = kncore.predict(lm, [query])
        assert 0 <= row.probability[0] <= 1
        with kncore.suppress(lm, [(0, 1)]):
            kncore.predict(lm, [query])
    assert not lm.is_modified


numbers = st.integers(-3, 30) | st.floats() | st.none() | texts
neuron = st.tuples(numbers, numbers) | numbers | st.tuples(numbers)


@few
@given(st.lists(neuron, max_size=3), texts, st.floats() | st.lists(st.floats(), max_size=3))
def test_any_neurons_are_suppressed_or_refused(chosen, position, values):
    lm = LMS["gpt2"]
    for context in (
        lambda: kncore.suppress(lm, chosen, position="all"),
        lambda: kncore.suppress(lm, [(0, 0)], position=position),
        lambda: kncore.set_neurons(lm, [(0, 0), (1, 2)], values),
        lambda: kncore.enhance(lm, [(0, 0)], values if isinstance(values, float) else 2.0, site=position),
    ):
        with answered(), context():
            lm.model(torch.tensor([[5, 6]]))
    assert not lm.is_modified


@few
@given(texts, st.lists(texts | st.none() | st.builds(dict), max_size=2))
def test_any_request_for_an_edit_is_refused_unless_it_is_one(editor, requests):
    with answered():
        editors.edit(LMS["gpt2"], requests, editor)
    with answered():
        editors.edit(LMS["gpt2"], requests, "rome")
    for one in (kncore.attribute, kncore.predict):
        with answered():
            one(LMS["gpt2"], requests)


def test_ten_thousand_prompts_are_asked_without_holding_what_the_model_says_to_each():
    lm = LMS["gpt2"]
    four = ["the capital of France is", "Anna saw the", "these books", "the red cat in Spain is a"]
    many = [Query(four[i % 4], "cat") for i in range(10_000)]
    table = kncore.predict(lm, many)
    assert len(table) == 10_000 and table.probability.nunique() < 50
    one = kncore.predict(lm, many[:4])
    assert abs(table.probability[:4] - one.probability).max() < 1e-6
    found = kncore.attribute(lm, many, steps=2, store=False)
    assert found.scores.shape == (10_000, 3, 24)


names = texts | st.sampled_from(["gpt2@main", "a/b@" + "0" * 40, "../x", ".", "/", "~"])


@few
@given(names)
def test_any_name_of_a_model_is_known_or_refused(name):
    assume(name not in zoo.REGISTRY)
    with pytest.MonkeyPatch.context() as patch, answered(ValueError, OSError):
        patch.setattr(zoo, "_snapshot", lambda hub: (_ for _ in ()).throw(OSError(f"no {hub.repo} here")))
        models.load(name)
        pytest.fail("loaded")
    with answered(UsageError):
        assert checkout.slug(name) not in ("", ".", "..") and "/" not in checkout.slug(name)


trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
contents = st.binary(max_size=60) | trees.map(lambda tree: json.dumps(tree).encode())


@few
@given(contents, contents)
@example(b'{"model_type": "gpt2"}', b"")
@example(b'{"model_type": "gpt2", "n_layer": -1}', b"")
@example(b'{"model_type": "gpt2", "vocab_size": "many"}', b"{}")
@example(b'{"model_type": ["llama"]}', b"")
def test_any_folder_is_a_model_or_refused(config, weights):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_bytes(config)
        Path(folder, "model.safetensors").write_bytes(weights)
        with answered(ValueError, OSError):
            models.load(folder)
            pytest.fail("loaded")
        with answered(ValueError):
            models.check(folder)


# ------------------------------------------------------------------------------------------- files of data


READERS = {
    "blimp": lambda path: blimp.read("anaphor_gender_agreement", path),
    "pararel": lambda path: pararel.read("P36", path),
    "counterfact": counterfact.read,
    "known_1000": known_1000.read,
    "queries": lambda path: prompts.read_queries(path, "attribution"),
    "requests": lambda path: prompts.read_queries(path, "edits"),
    "records": lambda path: shards.load_records([path]),
}
LIKELY = (
    {"P36": [[["[MASK] is", "a", "P36"]]]},
    [{"subject": "A", "attribute": "b", "prompt": "A is", "relation_id": "P1"}],
    {"prompt": "A is", "target": "b", "subject": "A", "foil": "c"},
    {"sentence_good": "a b c", "sentence_bad": "a c c", "UID": "anaphor_gender_agreement", "pairID": "1"},
    [{"case_id": 1, "requested_rewrite": {}, "paraphrase_prompts": [], "neighborhood_prompts": []}],
)


@st.composite
def nearly(draw):
    """Something of the right form with one value in it exchanged."""
    tree = json.loads(json.dumps(draw(st.sampled_from(LIKELY))))
    at = tree
    while isinstance(at, dict | list) and at:
        key = draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        if not isinstance(at[key], dict | list) or not at[key] or draw(st.booleans()):
            at[key] = draw(trees)
            break
        at = at[key]
    return json.dumps(tree).encode()


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(sorted(READERS)), contents | nearly())
@example("blimp", b"[" * 100_000)
@example("known_1000", b"[" * 100_000)
@example("queries", b"[" * 100_000)
@example("records", b"[" * 100_000)
@example("pararel", b"9" * 5000)
@example("queries", b"\xff")
@example("requests", b'\xef\xbb\xbf{"prompt": "A\xe2\x80\xa8is", "target": "b", "subject": "A", "foil": "c"}')
def test_any_file_of_data_is_read_or_refused(tmp_path_factory, reader, content):
    path = tmp_path_factory.getbasetemp() / "fuzzed.json"
    path.write_bytes(content)
    with answered(ValueError, TypeError, OSError, UsageError, RunError):
        READERS[reader](path)


blank = st.text(" \t\u00a0\u3000", max_size=3)
prompt_rows = st.builds(dict, prompt=st.sampled_from(["A is", "the sun"]), target=st.sampled_from(["b", "à\u2028c"]))


@pytest.mark.kind("blank-lines", own=True)
@few
@given(st.lists(blank | prompt_rows, max_size=8), st.sampled_from(["\n", "\r\n", "\r"]), st.booleans(), st.booleans())
def test_prompts_are_read_whatever_blank_lines_stand_between(tmp_path_factory, rows, end, mark, last):
    path = tmp_path_factory.getbasetemp() / "prompts.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    text = "\ufeff" * mark + "".join(line + end for line in lines)
    path.write_text(text if last else text.removesuffix(end), encoding="utf-8", newline="")
    wanted = [Query(**row) for row in rows if isinstance(row, dict)]
    if wanted:
        assert prompts.read_queries(path, "attribution") == wanted
    else:
        with pytest.raises(UsageError, match="holds no prompts"):
            prompts.read_queries(path, "attribution")
    path.write_text(text + "no prompt", encoding="utf-8", newline="")
    with pytest.raises(UsageError, match=f"line {len(lines) + 1}: no JSON"):
        prompts.read_queries(path, "attribution")


@few
@given(st.sampled_from(sorted(READERS)), texts)
def test_any_path_to_data_is_found_or_refused(reader, path):
    assume(path and reader not in ("queries", "requests", "records"))
    with pytest.MonkeyPatch.context() as patch, answered(ValueError, OSError):
        patch.chdir(os.path.dirname(__file__))
        READERS[reader](path)


@few
@given(contents)
def test_any_record_is_one_or_refused(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "records"
    (folder / "m").mkdir(parents=True, exist_ok=True)
    (folder / "m" / "equally-few.json").write_bytes(content)
    with answered(ValueError):
        read_records(folder)


@few
@given(texts, st.integers(-5, 10**9) | texts | st.none(), st.integers() | texts)
def test_any_relation_phenomenon_and_number_is_known_or_refused(name, n, seed):
    for ask in (tasks.facts, grammar.minimal_pairs):
        for about in (name, tasks.relations()[0], grammar.phenomena()[0]):
            with answered(typed=not isinstance(n, str) and not isinstance(seed, str)):
                ask(about, n, seed)
