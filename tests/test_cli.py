"""The command line: what is typed, what it is refused for, and what is said where a stream or a home is missing."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from commands import parsed

from knbook import cli
from kncore import models, zoo

ROW = '{"prompt": "the capital of", "target": "France"}'


@pytest.fixture
def folder(tmp_path):
    tiny.model("gpt2").save_pretrained(tmp_path / "model")
    tiny.tokenizer(False).save_pretrained(tmp_path / "model")
    return tmp_path


def test_the_command_line_sweeps_prompts_of_ones_own_and_merges(folder, capsys):
    own = folder / "prompts.jsonl"
    names = ("France", "Spain", "Paris", "Madrid", "Anna")
    rows = [{"prompt": f"the capital of {name} is in", "target": "Paris"} for name in names]
    own.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["sweep", "attribution", "--model", str(folder / "model"), "--queries", str(own)]
    for k in (1, 2):
        assert cli.main([*common, "--dtype", "float64", "--shard", f"{k}/2", "--out", str(folder / "out")]) == 0
    assert cli.main(["merge", str(folder / "out"), "--out", str(folder / "all.jsonl")]) == 0
    assert capsys.readouterr().out.split()[-1] == str(folder / "all.jsonl")
    records = [json.loads(line) for line in (folder / "all.jsonl").read_text().splitlines()]
    assert [record["query"] for record in records] == rows
    assert {record["dtype"] for record in records} == {"float64"}


@pytest.mark.parametrize("shard", ["0/3", "4/3", "3", "a/b", "-1/3", "1/0"])
def test_a_shard_that_is_none_is_a_usage_error(shard, capsys):
    assert cli.main(["sweep", "attribution", f"--shard={shard}", "--out", "x"]) == 2
    assert "expected K/N" in capsys.readouterr().err


def test_a_number_is_what_was_typed_or_refused(capsys):
    texts = ["٣", "1_0", "+5", "1e3", "5.0", "5x", "-1", "0x5", "²", "½", "", "五", "9" * 30]
    for option in ("-n", "--seed", "--steps", "--shard", "--limit"):
        start = ["cache", "--prune"] if option == "--limit" else ["sweep", "attribution", "--out", "o"]
        for text in texts:
            text = f"{text}/{text}" if option == "--shard" else text
            typed = ["-n", text] if option == "-n" else [f"{option}={text}"]
            assert cli.main([*start, *typed]) == 2
            said = capsys.readouterr().err
            assert said.count("\n") == 1 and repr(text) in said
    words = "sweep attribution -n 010 --seed 08 --steps 020 --shard 03/08 --out o"
    options = parsed(words.split())
    assert [options[name] for name in ("n", "seed", "steps", "shard")] == [10, 8, 20, "03/08"]


@pytest.mark.kind("parameter-as-typed", own=True)
@pytest.mark.parametrize(("arguments", "match"), [
    (["attribution", "--editor", "rome"], "attribution has no setting 'editor'"),
    (["edits", "--steps", "5"], "edits has no setting 'steps'"),
    (["attribution", "--steps", "1", "--quadrature", "trapezoid"], "needs more than 1 steps"),
    (["attribution", "--quadrature", "simpson"], "unknown quadrature 'simpson'"),
    (["attribution", "--queries", "q", "-n", "3"], "leave out -n"),
    (["attribution", "--queries", "q", "--seed", "0", "--source", "own"], "leave out --seed, --source"),
    (["attribution", "--queries", "q", "capital"], "leave out names"),
])  # fmt: skip
def test_what_would_have_no_effect_is_refused_before_a_model_is_loaded(arguments, match, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("loaded"))
    Path("q").write_text(ROW)
    assert cli.main(["sweep", *arguments, "--out", "o"]) == 2
    said = capsys.readouterr().err
    assert match in said and said.count("\n") == 1 and not Path("o").exists()


@pytest.mark.kind("parameter-as-typed", own=True)
def test_names_may_stand_after_the_options(capsys):
    for words in ("capital maker --out o -n 1", "--out o capital maker -n 1", "capital --out o maker -n 1"):
        assert parsed(["sweep", "attribution", *words.split()])["names"] == ["capital", "maker"]
    for words, match in (
        ("sweep attribution --out o --colour red capital", "No such option: --colour"),
        ("cache capital", "unexpected extra argument"),
    ):
        assert cli.main(words.split()) == 2
        assert match in capsys.readouterr().err


@pytest.mark.kind("raw-errors")
@pytest.mark.parametrize("words", [
    "Could not determine home directory.",  # of pathlib
    "could not determine the home directory for '~/.cache', set an absolute HOME or XDG variable",  # of pooch
])  # fmt: skip
def test_a_user_without_a_home_is_told_to_name_one(words, capsys, monkeypatch):
    def homeless():
        raise RuntimeError(words)

    monkeypatch.setattr(zoo, "cache_folder", homeless)
    assert cli.main(["cache"]) == 2
    assert capsys.readouterr().err == "kncore: this user has no home folder; set HOME to a folder that can be written\n"


@pytest.mark.kind("raw-errors")
def test_closed_streams_are_no_files_of_ours(tmp_path):
    """Without standard streams the next file that is opened would have their numbers, and get what is printed."""
    code = "import os, sys; from knbook import cli; code = cli.main(['cache']); "
    code += "sys.exit(code or not all(os.readlink(f'/proc/self/fd/{n}') == os.devnull for n in range(3)))"
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH") or str(root)}
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, code], env=environment, check=False
    )
    assert done.returncode == 0


@pytest.mark.kind("raw-errors", own=True)
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("buffering", [1, -1])  # found when a line is printed, and when all is
def test_a_stream_that_takes_nothing_is_named(buffering, capsys, monkeypatch):
    full = open("/dev/full", "w", buffering=buffering, encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", full)
    assert cli.main(["cache"]) == 1
    assert "No space left on device: 'standard output'; free some space" in capsys.readouterr().err
    with contextlib.suppress(OSError):
        full.close()
