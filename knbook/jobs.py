"""Run chapters side by side: a queue of single notebooks, the longest first, taken by as many workers as there are.

How long a chapter takes is what the notes of its last stored run say (`results/<model>/NN.toml`). That decides the
order and what is told of the time left, and nothing else.
"""

from __future__ import annotations

import math
import os
import queue
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from knbook import bound, runs
from knbook.checkout import Chapter, timing, timing_path
from knbook.errors import RunError
from knbook.kernel import CELLS
from kncore.store.disk import warn

EDITS = re.compile(r"\bimport (?:\w+, )*(?:rome|editors)\b|\bkncore\.editors\b")
CELL = re.compile(r": cell (\d+) of (\d+)$")


@dataclass(frozen=True)
class Job:
    """A chapter to run: its name, the options of `kncore run`, the seconds that it took last (0: not known), and what
    it looks up, or computes and stores, as other chapters do."""

    name: str
    options: tuple[str, ...]
    seconds: float = 0
    shares: frozenset[str] = frozenset()


@dataclass
class Running:
    """A job under way: its process and who reads what that says; since when, and the share of its cells that ran."""

    job: Job
    process: subprocess.Popen
    reader: threading.Thread
    begun: float
    done: float = 0


def job(root: Path, chapter: Chapter, options: Iterable[str], model: str | None = None) -> Job:
    """Return the job of a chapter, on its own model or another one, with these options beside --only."""
    notes = (timing_path(root / "results", chapter, name) for name in ([model] if model else []) + [None])
    seconds = next((float(noted["seconds"]) for noted in map(timing, notes) if noted), 0.0)
    name = f"{chapter.path.stem} ({model})" if model else chapter.path.stem
    return Job(name, ("--only", chapter.number, *options), seconds, _shares(chapter, model))


def _shares(chapter: Chapter, model: str | None) -> frozenset[str]:
    """Return what a chapter has in common with others on its model: scores, or second moments and searches of edits."""
    kinds = ["scores"] if "quadrature" in chapter.defaults else []
    kinds += ["edits"] if EDITS.search(chapter.path.read_text(encoding="utf-8")) else []
    return frozenset(f"{kind} of {model or chapter.defaults.get('model')}" for kind in kinds)


def following(waiting: Sequence[Job], running: Iterable[Job]) -> Job:
    """Return the job to take next: the longest that shares nothing with one that runs, or else the longest.

    Of two that share something the first stores it for the second, and beside one another both would compute it. No
    worker waits for that, as a free core has nothing better to do.
    """
    used = frozenset().union(*(other.shares for other in running))
    return max(waiting, key=lambda one: (not one.shares & used, one.seconds))


def left(seconds: float, elapsed: float, done: float = 0, pace: float = 1) -> float | None:
    """Return the seconds that a job has left, None where nothing says so.

    By what it took last, if it has not taken longer by now: `pace` is how much longer than last the jobs before it
    took. Otherwise by the share of its cells that are done.
    """
    if seconds * pace > elapsed:
        return seconds * pace - elapsed
    return elapsed * (1 - done) / done if done else None


def in_words(seconds: float | None) -> str:
    """Return a time that is left as a part of a sentence."""
    return "" if seconds is None else f", about {max(1, math.ceil(seconds / 60))} min left"


def run_all(
    root: Path, jobs: Sequence[Job], workers: int, logs: Path, stored: Callable[[Job], object] = lambda job: None
) -> None:
    """Run jobs, `workers` at once, which share the cores out; `stored` is called after each that succeeded.

    What a job says goes to a log of its name in the folder `logs`; a line is printed when it begins, for each quarter
    of its cells, and when it ends. Raises RunError where one fails; the others are stopped.
    """
    workers = max(1, min(workers, len(jobs)))
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    settings = {"OMP_NUM_THREADS": threads} | os.environ | {"PYTHONPATH": runs.python_path(), CELLS: "1"}
    waiting, running, heard = list(jobs), {}, queue.SimpleQueue()
    spent = planned = 0.0
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                one = following(waiting, running)
                waiting.remove(one)
                running[one] = _start(root, one, settings, logs / f"{log_name(one)}.log", heard)
                pace = spent / planned if planned else 1
                print(f"{one.name}: begun{in_words(left(one.seconds, 0, 0, pace))}", flush=True)
            one, line, said = heard.get()
            elapsed = time.monotonic() - running[one].begun
            if line is not None:
                _tell(running[one], line, elapsed, spent / planned if planned else 1)
                continue
            code = running.pop(one).process.wait()
            _warn(said[: -4 if code else None])
            if code:
                raise RunError("\n".join([f"{one.name}:", *said[-4:]]))
            stored(one)
            if one.seconds:
                spent, planned = spent + elapsed, planned + one.seconds
            rest = _rest(waiting, running.values(), workers, spent / planned if planned else 1)
            count = len(jobs) - len(waiting) - len(running)
            print(f"{one.name}: {elapsed:.0f} s; {count} of {len(jobs)} done{in_words(rest)}", flush=True)
    finally:
        end([started.process for started in running.values()])
        for started in running.values():
            started.reader.join()


def log_name(one: Job) -> str:
    """Return the name of a job as that of a file."""
    return re.sub(r"[^\w.@+=,~-]+", "-", one.name).strip("-")


def _start(root: Path, one: Job, settings: Mapping[str, str], log: Path, heard: queue.SimpleQueue) -> Running:
    """Start a job; its lines are put into its log and into `heard`, and at its end all of them."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8", "errors": "replace"}
    process = subprocess.Popen(runs.bound("kncore", "run", *one.options), cwd=root, env=settings, **streams)

    def read() -> None:
        said = []
        with process.stdout, log.open("w", encoding="utf-8") as stream:
            for line in process.stdout:
                print(line, end="", file=stream, flush=True)
                if not CELL.search(line):
                    said.append(line.rstrip("\n"))
                heard.put((one, line.rstrip("\n"), None))
        heard.put((one, None, said))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    return Running(one, process, reader, time.monotonic())


def _tell(started: Running, line: str, elapsed: float, pace: float) -> None:
    """Print how far a job is where a quarter of its cells has been passed."""
    if found := CELL.search(line):
        before, started.done = started.done, int(found[1]) / int(found[2])
        if int(4 * before) < int(4 * started.done) < 4:
            time_left = in_words(left(started.job.seconds, elapsed, started.done, pace))
            print(f"{started.job.name}: cell {found[1]} of {found[2]}{time_left}", flush=True)


def _rest(waiting: Sequence[Job], running: Iterable[Running], workers: int, pace: float) -> float | None:
    """Return the seconds that all jobs have left together, None where there are none."""
    now = time.monotonic()
    each = [left(some.job.seconds, now - some.begun, some.done, pace) or 0 for some in running]
    each += [one.seconds * pace for one in waiting]
    return max(sum(each) / workers, *each) if any(each) else None


def _warn(said: Iterable[str]) -> None:
    """Say once what jobs warned of."""
    for line in said:
        if line.startswith("kncore: "):
            warn(line.removeprefix("kncore: "))


def end(processes: Sequence[subprocess.Popen]) -> None:
    """End processes, which may end what they started; those that take too long for that are killed."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(bound.GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
