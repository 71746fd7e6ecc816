"""Runs kept apart: files published together or not at all, scratch folders of living processes, processes that end."""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy import COMPUTE, make_checkout, notebook

from knbook import book, bound, jobs, runs
from knbook.errors import UsageError
from knbook.kernel import kernel_environment
from kncore.store import disk

BOUND = Path(runs.__file__).with_name("bound.py")


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def numbers(folder: Path) -> set[str]:
    """What stands in the three files that belong together; a file that is not there counts as another text."""
    places = (folder / "a" / "1", folder / "a" / "2", folder / "b" / "3")
    return {place.read_text() if place.is_file() else "" for place in places}


def publish(folder: Path, number: int) -> None:
    files = {folder / "a" / "1": f"{number}", folder / "a" / "2": f"{number}", folder / "b" / "3": f"{number}"}
    journal = runs.journal_of(folder / "a", "some")
    runs.publish({path: text.encode() for path, text in files.items()}, journal)


def hammer(folder: str, seed: int) -> None:
    draw, replace = random.Random(seed), os.replace

    def late(*paths):
        time.sleep(draw.uniform(0, 0.002))
        replace(*paths)

    os.replace = late
    for number in range(20):
        publish(Path(folder), 100 * seed + number)


# ------------------------------------------------------------------------------------------- publishing


@pytest.mark.kind("record-with-notebook", own=True)
def test_files_that_many_processes_publish_at_once_are_of_one_of_them(tmp_path):
    context = multiprocessing.get_context("fork")
    several = [context.Process(target=hammer, args=(str(tmp_path), seed)) for seed in range(1, 5)]
    for process in several:
        process.start()
    for process in several:
        process.join()
    assert [process.exitcode for process in several] == [0] * 4
    (number,) = numbers(tmp_path)
    assert int(number) % 100 == 19, "the last one of a process"
    assert names(tmp_path) == ["a", "a/1", "a/2", "b", "b/3"]


@pytest.mark.kind("record-with-notebook", own=True)
@pytest.mark.parametrize("at", range(8))
def test_a_publication_that_is_killed_anywhere_is_made_whole_or_undone_by_the_next(tmp_path, at):
    publish(tmp_path, 1)
    child = os.fork()
    if child == 0:
        steps = []

        def counted(function):
            def call(*arguments, **options):
                steps.append(function)
                if len(steps) > at:
                    os._exit(9)
                return function(*arguments, **options)

            return call

        os.replace, os.rename, os.rmdir = counted(os.replace), counted(os.rename), counted(os.rmdir)
        publish(tmp_path, 2)
        os._exit(0)
    os.waitpid(child, 0)
    for journal in runs.journals(tmp_path / "a"):
        runs.settle(journal)
    assert numbers(tmp_path) in ({"1"}, {"2"})
    publish(tmp_path, 3)
    assert numbers(tmp_path) == {"3"}


@pytest.mark.kind("record-with-notebook", own=True)
def test_where_one_file_cannot_be_written_none_is(tmp_path):
    publish(tmp_path, 1)
    shutil.rmtree(tmp_path / "b")
    disk.write(tmp_path / "b", "a file")
    before = names(tmp_path)
    with pytest.raises(OSError, match="b"):
        publish(tmp_path, 2)
    assert (tmp_path / "a" / "1").read_text() == "1" and names(tmp_path) == before


@pytest.mark.kind("record-with-notebook", own=True)
def test_what_hinders_a_publication_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "ATTEMPTS", 2)
    journal = runs.journal_of(tmp_path / "a", "some")
    disk.write(journal / "something", "")
    with pytest.raises(OSError, match="delete it") as error:
        publish(tmp_path, 1)
    assert error.value.errno == errno.EBUSY and str(journal) in str(error.value) and numbers(tmp_path) == {""}


@pytest.mark.kind("record-with-notebook", own=True)
@pytest.mark.parametrize("moves", ["{", "[1]", '[["..", "../x", "y"]]', '[[".", "x", "y"]]', '[[".", ".x", "../y"]]'])
def test_a_list_of_moves_that_leads_elsewhere_is_refused(tmp_path, moves):
    journal = runs.journal_of(tmp_path / "a", "some")
    disk.write(journal / "x.moves", moves)
    for name in ("x", ".x"):
        disk.write(tmp_path / "a" / name, "")
    with pytest.raises(UsageError, match="is no list of moves .*delete"):
        runs.settle(journal)
    assert not list(tmp_path.rglob("*y"))


@pytest.mark.kind("record-with-notebook", own=True)
def test_a_book_is_made_of_a_record_and_its_notebook_where_a_run_stores_both_meanwhile(tmp_path, monkeypatch):
    root = make_checkout(tmp_path / "toy", n01_toy=notebook(COMPUTE))
    disk.write(root / "results" / "tiny" / "claim.json", "old")
    copy, meanwhile = shutil.copytree, []

    def late(source, *rest, **options):
        made = copy(source, *rest, **options)
        if Path(source).name == "notebooks" and not meanwhile:
            meanwhile.append(source)
            text = (root / "notebooks" / "01-toy.ipynb").read_bytes().replace(b"# Toy", b"# New")
            files = {root / "notebooks" / "01-toy.ipynb": text, root / "results" / "tiny" / "claim.json": b"new"}
            runs.publish(files, runs.journal_of(root / "results", "01-toy"))
        return made

    monkeypatch.setattr(shutil, "copytree", late)
    staged = book.stage(root)
    assert (staged / "results" / "tiny" / "claim.json").read_text() == "new"
    assert "# New" in (staged / "notebooks" / "01-toy.ipynb").read_text()


def test_a_folder_that_another_one_takes_the_place_of_is_gone_and_comes_back_after_a_kill(tmp_path):
    for number in range(3):
        disk.write(tmp_path / "new" / "index.html", str(number))
        runs.exchange(tmp_path / "new", tmp_path / "html")
        assert names(tmp_path) == ["html", "html/index.html"]
    (tmp_path / "html.old-x").mkdir()
    os.replace(tmp_path / "html", tmp_path / "html.old-x" / "was")
    runs.restore(tmp_path / "html")
    assert (tmp_path / "html" / "index.html").read_text() == "2"


# ------------------------------------------------------------------------------------------- scratch folders


@pytest.mark.kind("orphans-and-scratch", own=True)
def test_only_the_scratch_of_a_dead_process_is_removed(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    here, mine = runs._machine(), os.getpid()
    owners = {"dead": f"{here}\n{gone.pid}\n", "alive": f"{here}\n{mine}\n", "far": f"far\n{gone.pid}\n"}
    owners |= {"old": f"far\n{mine}\n", "new": "", "aged": f"{here}\n{mine}\n"}
    for name, owner in owners.items():
        disk.write(tmp_path / f"run-{name}" / runs.OWNER, owner)
    for name in ("old", "aged"):
        os.utime(tmp_path / f"run-{name}", (1, 1))
    with runs.scratch(tmp_path, "run") as one, runs.scratch(tmp_path, "run") as other:
        assert one != other and (one / runs.OWNER).is_file()
        left = {path.name for path in tmp_path.iterdir()} - {one.name, other.name}
        assert left == {"run-alive", "run-far", "run-new", "run-aged"}
    assert {path.name for path in tmp_path.iterdir()} == left


# ------------------------------------------------------------------------------------------- processes


def alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat")
        return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.kind("orphans-and-scratch", own=True)
def test_a_bound_process_ends_with_the_one_that_started_it(tmp_path):
    disk.write(
        tmp_path / "sleeper.py", "import time\ndef main(): time.sleep(3000)\nif __name__ == '__main__': main()\n"
    )
    for module in ("sleeper", "sleeper:main"):
        program = (
            "import os, subprocess, sys, time\n"
            f"child = subprocess.Popen([sys.executable, '-P', {str(BOUND)!r}, str(os.getpid()), {module!r}])\n"
            "print(child.pid, flush=True)\ntime.sleep(300)"
        )
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment) as parent:
            child = int(parent.stdout.readline())
            assert alive(child)
            parent.kill()
        for _ in range(6000):
            if not alive(child):
                break
            time.sleep(0.1)
        assert not alive(child)


def test_a_bound_process_is_the_module_with_its_arguments(tmp_path, monkeypatch):
    disk.write(tmp_path / "told.py", "import json, sys\nprint(json.dumps([__name__, sys.argv[1:], sys.path[0]]))\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = subprocess.run(runs.bound("told", "a", "b c"), capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == ["__main__", ["a", "b c"], str(tmp_path)]


@pytest.mark.kind("orphans-and-scratch", own=True)
@pytest.mark.parametrize("wait", [0, 300])
def test_jobs_are_asked_to_end_and_killed_where_they_do_not(tmp_path, monkeypatch, wait):
    monkeypatch.setattr(bound, "GRACE", 1 if wait else 600)
    program = f"import signal, time; signal.signal(signal.SIGTERM, lambda *_: time.sleep({wait}) or exit(7))"
    program += "; print(1, flush=True); time.sleep(300)"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    process.stdout.readline()
    jobs.end([process])
    assert process.returncode == (-9 if wait else 7)
    process.stdout.close()


@pytest.mark.kind("another-kernel", own=True)
def test_processes_of_a_run_import_the_package_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    parent = Path(runs.__file__).resolve().parent.parent
    assert runs.python_path() == f"{parent}{os.pathsep}elsewhere"
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "site-packages" / "kncore" / "runs.py"))
    assert runs.python_path() == "elsewhere"
    assert kernel_environment(tmp_path, tmp_path)["KNCORE_RESULTS"] == str(tmp_path)
