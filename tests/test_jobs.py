"""The queue of notebooks: what is taken next, how many run at once, what is told meanwhile, and how it ends."""

from __future__ import annotations

import json
import os
import re
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import nbformat
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy import COMPUTE, make_checkout, notebook

from knbook import jobs, runner, runs
from knbook.checkout import chapters
from knbook.errors import RunError, UsageError
from knbook.jobs import Job
from knbook.parameters import parse_parameters
from kncore.store import disk

# A job that notes when it begins and ends, waits until as many have begun as its second option says, and then goes on
# with its third.
PROGRAM = """
import os, sys, time
here, name, others, then = sys.argv[1:]
def note(what):
    with open(os.path.join(here, "noted"), "a") as file:
        file.write(f"{what} {name} {os.getpid()} {os.environ['OMP_NUM_THREADS']}\\n")
note("begin")
while open(os.path.join(here, "noted")).read().count("begin") < int(others):
    time.sleep(0.01)
exec(then)
note("end")
"""


@pytest.fixture
def pretend(tmp_path, monkeypatch):
    """Processes of `PROGRAM` in the place of `kncore run`; a function that runs such jobs and gives what they noted."""
    monkeypatch.setattr(runs, "bound", lambda *words: [sys.executable, "-c", PROGRAM, str(tmp_path), *words[2:]])
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def run(given: Sequence[Job], workers: int, stored=lambda job: None) -> None:
        jobs.run_all(tmp_path, given, workers, tmp_path, stored)

    return run


def pretended(name: str, seconds: float, others: int = 0, then: str = "", **shares) -> Job:
    return Job(name, (name, str(others), then), seconds, **shares)


def noted(folder: Path) -> list[tuple[str, str]]:
    return [tuple(line.split()[:2]) for line in (folder / "noted").read_text().splitlines()]


def schedule(given: Sequence[Job], workers: int) -> list[tuple[float, float, Job]]:
    """When each job begins and ends where they take what they took last, event by event."""
    waiting, running, done, now = list(given), [], [], 0.0
    while waiting or running:
        while waiting and len(running) < workers:
            one = jobs.following(waiting, [job for *_, job in running])
            waiting.remove(one)
            running.append((now, now + one.seconds, one))
        first = min(running, key=lambda ran: ran[1])
        running.remove(first)
        done.append(first)
        now = first[1]
    return done


lists = st.lists(st.tuples(st.integers(1, 50), st.sets(st.sampled_from("ab"), max_size=1)), min_size=1, max_size=12)


@given(lists, st.integers(1, 4))
def test_no_core_is_idle_while_a_notebook_waits_and_the_end_is_near_the_best_one(made, workers):
    given = [Job(str(i), (), seconds, frozenset(shares)) for i, (seconds, shares) in enumerate(made)]
    ran = schedule(given, workers)
    assert sorted(job.name for *_, job in ran) == sorted(job.name for job in given)
    for begun, _, _ in ran:
        assert sum(start <= begun < end for start, end, _ in ran) <= workers
        for moment in range(int(begun)):
            assert sum(start <= moment < end for start, end, _ in ran) == workers, "a core was idle, and a job waited"
    total, longest = sum(job.seconds for job in given), max(job.seconds for job in given)
    assert max(end for _, end, _ in ran) <= total / workers + longest * (1 - 1 / workers) + 1e-9  # Graham's bound


def test_the_longest_comes_first_and_one_that_shares_waits_while_there_is_another():
    facts, fewer, other = Job("facts", (), 9, frozenset("s")), Job("fewer", (), 8, frozenset("s")), Job("other", (), 1)
    assert jobs.following([fewer, other, facts], []) == facts
    assert jobs.following([fewer, other], [facts]) == other
    assert jobs.following([fewer], [facts]) == fewer, "a free core has nothing better to do"
    assert jobs.following([fewer, other], [Job("else", (), 9, frozenset("t"))]) == fewer


def test_jobs_are_taken_longest_first_and_never_more_at_once_than_workers(tmp_path, pretend, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    given = [pretended(str(i), seconds, others=3) for i, seconds in enumerate((1, 5, 3, 9, 2, 7))]
    done = []
    pretend(given, 3, done.append)
    found = noted(tmp_path)
    assert {name for what, name in found[:3]} == {"3", "5", "1"}, "the three longest, which wait for one another"
    under_way = 0
    for what, _ in found:
        under_way += 1 if what == "begin" else -1
        assert 0 <= under_way <= 3
    order = [name for what, name in found if what == "begin"]
    assert sorted(order[3:]) == ["0", "2", "4"] and {*done} == {*given}
    assert {line.split()[3] for line in (tmp_path / "noted").read_text().splitlines()} == {"2"}, "7 cores, 3 workers"


def test_one_worker_takes_them_in_order(tmp_path, pretend):
    pretend([pretended(str(i), seconds) for i, seconds in enumerate((1, 5, 3, 9, 2, 7))], 1)
    assert [name for what, name in noted(tmp_path) if what == "begin"] == ["3", "5", "1", "2", "4", "0"]


def test_where_one_fails_it_is_named_and_the_others_stop(tmp_path, pretend):
    fails = "print('kncore: a store is full'); print('cell 4: no such neuron'); sys.exit(1)"
    given = [pretended("long (tiny)", 9, then="time.sleep(1000)"), pretended("bad", 5, 2, fails), pretended("never", 1)]
    done = []
    with pytest.raises(RunError, match=r"^bad:\nkncore: a store is full\ncell 4: no such neuron$"):
        pretend(given, 2, done.append)
    assert not done and {name for _, name in noted(tmp_path)} == {"long", "bad"}
    pids = [int(re.search(r" (\d+) \d+$", line)[1]) for line in (tmp_path / "noted").read_text().splitlines()]
    assert not any(map(psutil.pid_exists, pids))
    assert (tmp_path / "bad.log").read_text().endswith("no such neuron\n") and (tmp_path / "long-tiny.log").is_file()


def test_an_interrupt_leaves_no_process(tmp_path, pretend):
    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretend([pretended("long", 9, then="time.sleep(1000)"), pretended("short", 1, 2)], 2, stop)
    pids = [int(line.split()[2]) for line in (tmp_path / "noted").read_text().splitlines()]
    assert len(set(pids)) == 2 and not any(map(psutil.pid_exists, pids))


# ------------------------------------------------------------------------------------------- what is told


def test_a_line_is_told_at_the_begin_at_each_quarter_of_the_cells_and_at_the_end(tmp_path, pretend, capsys):
    cells = "[print(f'x: cell {i} of 12', flush=True) for i in (1, 2, 3, 5, 7, 9, 11)]"
    pretend([pretended("slow", 6000, then=cells), pretended("new", 0)], 1)
    told = capsys.readouterr().out.splitlines()
    assert told[:4] == [
        "slow: begun, about 100 min left",
        "slow: cell 3 of 12, about 100 min left",
        "slow: cell 7 of 12, about 100 min left",
        "slow: cell 9 of 12, about 100 min left",
    ]
    assert re.fullmatch(r"slow: \d+ s; 1 of 2 done", told[4]), "how long the other takes is not known"
    assert told[5] == "new: begun" and re.fullmatch(r"new: \d+ s; 2 of 2 done", told[6]) and len(told) == 7


@pytest.mark.parametrize(
    ("seconds", "elapsed", "done", "pace", "expected"),
    [
        (100, 30, 0, 1, 70),  # what it took last
        (100, 30, 0.9, 1, 70),  # cells take unlike times
        (100, 30, 0, 0.5, 20),  # the machine is twice as fast today
        (100, 150, 0.75, 1, 50),  # longer than last: by its cells
        (100, 150, 0, 1, None),
        (0, 10, 0, 1, None),  # a chapter that never ran
        (0, 10, 0.5, 1, 10),
    ],
)
def test_the_time_left_is_that_of_the_last_run_or_told_by_the_cells(seconds, elapsed, done, pace, expected):
    assert jobs.left(seconds, elapsed, done, pace) == expected


def test_times_in_words():
    assert [jobs.in_words(s) for s in (None, 0.5, 60, 61, 3599)] == [
        "",
        *(f", about {n} min left" for n in (1, 1, 2, 60)),
    ]


# ------------------------------------------------------------------------------------- chapters as jobs


def test_how_long_a_chapter_takes_is_noted_beside_its_records(tmp_path):
    toy = make_checkout(tmp_path / "toy", n01_one=notebook(COMPUTE), n02_two=notebook("from kncore import rome"))
    toy_note = 'seconds = {}\ndate = "2026-01-01"\nthreads = "1"\nkncore = "0.1.0"\n'
    disk.write(toy / "results" / "tiny" / "01.toml", toy_note.format(7))
    disk.write(toy / "results" / "gpt2" / "01.toml", toy_note.format(3))
    one, two = chapters(toy)
    assert [jobs.job(toy, one, (), model).seconds for model in (None, "gpt2", "gpt2-xl")] == [7, 3, 7]
    assert jobs.job(toy, two, ()).seconds == 0
    disk.write(toy / "results" / "tiny" / "01.toml", "seconds = 'many'")
    with pytest.raises(UsageError, match="01.toml is not what a run notes"):
        runner.run(toy, at_once=2)


def test_chapters_that_attribute_share_scores_and_those_that_edit_share_searches(checkout):
    found = chapters(checkout)
    for kind, expected in {"scores": "01 02 03 04 05", "edits": "00 07 08 10"}.items():
        for model, name in ((None, "smollm2-135m"), ("gpt2", "gpt2")):
            some = [one.number for one in found if f"{kind} of {name}" in jobs.job(checkout, one, (), model).shares]
            assert " ".join(some) == expected


def test_nbval_takes_the_longest_notebooks_first(checkout):
    items = [SimpleNamespace(path=chapter.path, parent=None) for chapter in chapters(checkout) for _ in range(2)]
    ordered = list(items)
    runpy.run_path(str(checkout / "notebooks" / "conftest.py"))["pytest_collection_modifyitems"](ordered)
    assert [item.path for item in ordered[::2]] == [item.path for item in ordered[1::2]], (
        "a notebook stays in one piece"
    )
    times = [jobs.job(checkout, chapter, ()).seconds for chapter in chapters(checkout)]
    assert times != sorted(times, reverse=True)
    in_order = dict(zip([item.path for item in items[::2]], times, strict=True))
    assert [in_order[item.path] for item in ordered[::2]] == sorted(times, reverse=True)


def test_side_by_side_chapters_are_stored_with_what_was_given(tmp_path, capsys):
    toy = make_checkout(tmp_path / "toy", n01_toy=notebook(COMPUTE), n02_other=notebook("print(repr(model), n, scale)"))
    out, given = tmp_path / "out", {"model": "gpt2", "n": 3, "scale": 1e-07}
    assert runner.run(toy, parameters=given, out=out, at_once=2) == [out / "01-toy.ipynb", out / "02-other.ipynb"]
    shown = nbformat.read(out / "02-other.ipynb", as_version=4)
    assert shown.cells[-1].outputs[0].text == "'gpt2' 3 1e-07\n"
    assert json.loads((out / "results" / "gpt2" / "claim.json").read_text()) == {"n": 3}
    told = capsys.readouterr().out
    assert told.count(" done\n") == 2 and "02-other (gpt2): begun\n" in told
    assert "01-toy: cell 4 of 4\n" in (toy / "_build" / "01-toy-gpt2.log").read_text(), "one is injected"


values = st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False)


@given(values | st.text().filter(lambda text: not ({'"', "'"} <= set(text) or "\\" in text)))
def test_a_parameter_is_handed_on_as_it_was_given(value):
    (found,) = parse_parameters([f"a={runner._typed(value)}"]).values()
    assert type(found) is type(value) and found == value
