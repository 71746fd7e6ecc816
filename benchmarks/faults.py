"""What happens to results when a run is killed, a disk is full, a file is damaged: tried, counted, put into a table.

Each trial does harm, looks whether anything half-written can be seen, runs again plainly and compares what comes out
with an undisturbed run. The same trials are tests (tests/test_faults.py).

    python benchmarks/faults.py --out book/benchmark-faults.md
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import shards  # noqa: E402
import torch  # noqa: E402
from toy import COMPUTE, make_checkout, notebook  # noqa: E402

from kncore import cache, claims, disk, pipeline, stats, sweep  # noqa: E402

REAL = ["--model", "controlled-gpt2", "--only", "00"]
SWEEP = ["attribution", "capital", "official_language", "-n", "120", "--model", "controlled-gpt2"]


@dataclass
class Told:
    """How often harm was done, and after how many of these: a half-written file was seen (`half`), the harm was said or
    did nothing (`said`), a plain rerun finished (`again`), with the undisturbed result (`same`). None: not looked at in
    that trial."""

    tried: int = 0
    half: int | None = 0
    said: int | None = 0
    again: int | None = 0
    same: int | None = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Nothing half-written, nothing unsaid, nothing lost."""
        return not self.half and 0 < self.tried and {self.said, self.again, self.same} - {None} == {self.tried}


HARM = """
import fcntl, os, random, time
fcntl.flock = fcntl.lockf = lambda *_: None  # as on file systems on which every lock succeeds
replace = os.replace


def late(*paths):  # as on a busy disk
    time.sleep(random.uniform(0, float(os.environ["KNCORE_LATE"])))
    return replace(*paths)


os.replace = late
"""  # run by Python at its start, as the module sitecustomize


def start(
    checkout: Path, folder: Path, *arguments: str, command: str = "run", limit: int | None = None, late: float = -1
) -> subprocess.Popen:
    """`python -m kncore run` in a checkout, its stores in `folder`; `limit` bytes at most for any file it writes.

    From `late` 0 on locks keep nobody out, and a file is moved to its place up to so many seconds late.
    """
    own = {"KNCORE_SCORES": str(folder / "scores"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if late >= 0:
        harm = disk.write(folder / "harm" / "sitecustomize.py", HARM).parent
        own |= {"PYTHONPATH": f"{harm}{os.pathsep}{ROOT}", "KNCORE_LATE": str(late)}

    def bounded() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen(
        [sys.executable, "-m", "kncore", command, *arguments],
        cwd=checkout,
        env=os.environ | own | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=bounded,
    )


def finished(process: subprocess.Popen) -> tuple[int, str]:
    """Exit code and what was said on stderr."""
    said = process.communicate()[1]
    return process.returncode, said


def results(*folders: Path) -> dict[str, str]:
    """What a run leaves, by name: notebooks and records, hashed; of the notes how long it took only that they parse."""
    import tomllib

    found = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
            if not path.is_file() or path.name.startswith("."):
                continue
            if path.suffix == ".toml":
                found[path.name] = str(sorted(tomllib.loads(path.read_text(encoding="utf-8"))))
            else:
                found[f"{folder.name}/{path.relative_to(folder)}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def scores(folder: Path) -> dict[str, bytes]:
    """The stored results, by name."""
    return {path.name: path.read_bytes() for path in sorted((folder / "scores").rglob("[!.]*.safetensors"))}


def unsealed(folder: Path) -> int:
    """How many stored results are not as they were written."""
    bad = 0
    for raw in scores(folder).values():
        try:
            disk.unpack(raw)
        except ValueError:
            bad += 1
    return bad


def kill(process: subprocess.Popen, whole: bool) -> None:
    """SIGKILL to a run, alone or with all that it started; what is left of these is gone when this returns."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL) if whole else process.kill()
    process.communicate()
    until = time.monotonic() + 10
    while time.monotonic() < until:  # a kernel ends by itself when its parent is gone
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)


# ------------------------------------------------------------------------------------------- whole runs


def toy(folder: Path) -> Path:
    return make_checkout(folder / "toy", n01_first=notebook(COMPUTE), n02_second=notebook(COMPUTE))


def killed(
    fresh: Callable[[Path], tuple[Path, list[str], list[Path]]], folder: Path, times: int, seed: int, told: Told
) -> Told:
    """Kill a run at a random moment, run it again; `fresh` gives checkout, arguments and the folders of its results."""
    checkout, arguments, places = fresh(folder / "whole")
    begun = time.monotonic()
    code, said = finished(start(checkout, folder / "whole", *arguments))
    took = time.monotonic() - begun
    if code:
        raise RuntimeError(f"the undisturbed run failed: {said}")
    want, kept = results(*places), scores(folder / "whole")
    draw = random.Random(seed)
    for i in range(times):
        here = folder / f"killed-{i}"
        checkout, arguments, places = fresh(here)
        before = results(*places)
        process = start(checkout, here, *arguments)
        moment = draw.uniform(0, took)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moment)
        kill(process, whole=bool(i % 2))
        told.tried += 1
        seen = results(*places)
        told.half += any(one not in (before.get(name), want.get(name)) for name, one in seen.items()) or unsealed(here)
        again(told, checkout, here, arguments, places, want)
        told.half += scores(here) != kept
    return told


def again(told: Told, checkout: Path, here: Path, arguments: list[str], places: list[Path], want: dict) -> None:
    """A plain rerun, compared; nothing of earlier runs may be left in _build."""
    code, said = finished(start(checkout, here, *arguments))
    told.again += code == 0
    told.same += results(*places) == want
    if code or results(*places) != want:
        told.wrong.append(said.strip() or "another result")


def _toy(folder: Path) -> tuple[Path, list[str], list[Path]]:
    checkout = toy(folder)
    return checkout, [], [checkout / "notebooks", checkout / "results"]


def _real(folder: Path) -> tuple[Path, list[str], list[Path]]:
    folder.mkdir(parents=True)
    return ROOT, [*REAL, "--out", str(folder / "out")], [folder / "out"]


def kills_of_a_toy(folder: Path, seed: int = 0) -> Told:
    return killed(_toy, folder, KILLS[kills_of_a_toy], seed, Told(said=None))


def kills_of_a_chapter(folder: Path, seed: int = 0) -> Told:
    return killed(_real, folder, KILLS[kills_of_a_chapter], seed, Told(said=None))


def kills_of_a_sweep(folder: Path, seed: int = 0) -> Told:
    """The records are those of one sweep; scores computed beside other prompts differ in the last digits."""
    told, draw = Told(said=None), random.Random(seed)

    def begun(here: Path) -> subprocess.Popen:
        return start(ROOT, here, *SWEEP, "--out", str(here / "records"), command="sweep")

    beginning = time.monotonic()
    code, said = finished(begun(folder / "whole"))
    took = time.monotonic() - beginning
    if code:
        raise RuntimeError(f"the undisturbed sweep failed: {said}")
    want = sweep.load_records([folder / "whole" / "records"])
    for i in range(KILLS[kills_of_a_sweep]):
        here = folder / f"killed-{i}"
        process = begun(here)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(draw.uniform(took / 4, took))  # before that it reads its modules
        kill(process, whole=True)
        told.tried += 1
        shown = list((here / "records").glob("[!.]*"))
        told.half += bool(shown) and len(sweep.load_records(shown)) != len(want)
        code, said = finished(begun(here))
        told.again += code == 0
        told.same += shards.apart(sweep.load_records([here / "records"]), want) < 1e-4
        told.half += len(list((here / "records").iterdir())) != 1
    return told


def _site(here: Path) -> tuple[Path, Path]:
    """A checkout with two chapters and what their pages need; the folder with pages of an earlier book."""
    checkout = make_checkout(here / "toy", n01_first=notebook("print(model, n)"), n02_second=notebook("n"))
    shutil.copy(ROOT / "_config.yml", checkout)
    shutil.copytree(ROOT / "book" / "assets", checkout / "book" / "assets")
    shutil.copy(ROOT / "book" / "references.bib", checkout / "book")
    pipeline.write(checkout / "book" / "index.md", "# Toy\n\nA book.\n")
    chapters = "[{file: notebooks/01-first}, {file: notebooks/02-second}]"
    toc = f"format: jb-book\nroot: book/index\nparts: [{{caption: Claims, chapters: {chapters}}}]\n"
    pipeline.write(checkout / "_toc.yml", toc)
    return checkout, pipeline.write(checkout / "_build" / "html" / "index.html", "earlier").parent


def processes(folder: Path) -> list[int]:
    """The processes that `start` began with their stores in a folder, and all that these began."""
    found = []
    for place in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended
            if f"KNCORE_SCORES={folder}/scores".encode() in place.read_bytes():
                found.append(int(place.parent.name))
    return found


def ended(folder: Path) -> bool:
    """Whether all of them end by themselves, soon; those that do not are killed."""
    until = time.monotonic() + 600
    while processes(folder) and time.monotonic() < until:
        time.sleep(0.1)
    left = processes(folder)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return not left


def ends_of_a_book_alone(folder: Path, seed: int = 0) -> Told:
    """What it started ends with it, and the next book, of other chapters, is made of nothing that it left."""
    told = Told()
    checkout, pages = _site(folder / "whole")
    code, said = finished(start(checkout, folder / "whole", command="book"))
    if code:
        raise RuntimeError(f"the undisturbed book failed: {said}")
    want, noted = results(pages), checkout / "_build" / "staging" / "results"
    for end in (signal.SIGKILL, signal.SIGTERM):
        here = folder / end.name
        checkout, pages = _site(here)
        chapter = checkout / "notebooks" / "01-first.ipynb"
        new = chapter.read_bytes()
        chapter.write_bytes(new.replace(b"print(model, n)", b"import time; time.sleep(6); print('old')"))
        process = start(checkout, here, command="book")
        while process.poll() is None and len(processes(here)) < 3:  # the book, a run of it, a kernel of that
            time.sleep(0.1)
        process.send_signal(end)
        process.communicate()
        told.tried += 1
        told.said += ended(here)
        told.half += (pages / "index.html").read_text() != "earlier"
        chapter.write_bytes(new)
        shutil.copytree(noted, checkout / "results")
        code, said = finished(start(checkout, here, command="book"))
        told.again += code == 0
        told.same += results(pages) == want
        if code or results(pages) != want:
            told.wrong.append(said.strip() or "other pages")
    return told


def kills_of_a_book(folder: Path, seed: int = 0) -> Told:
    """The earlier pages stay whole until all of the new ones take their place, and tracked files are only read."""
    told, draw = Told(said=None), random.Random(seed)
    checkout, pages = _site(folder / "whole")
    begun = time.monotonic()
    code, said = finished(start(checkout, folder / "whole", command="book"))
    took, want = time.monotonic() - begun, results(pages)
    if code:
        raise RuntimeError(f"the undisturbed book failed: {said}")
    noted = checkout / "_build" / "staging" / "results"  # how long the runs took, which pages tell and a book keeps
    for i in range(KILLS[kills_of_a_book]):
        here = folder / f"killed-{i}"
        checkout, pages = _site(here)
        shutil.copytree(noted, checkout / "results")
        places = [checkout / "notebooks", checkout / "book"]
        earlier, tracked = results(pages), results(*places)
        process = start(checkout, here, command="book")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(took * draw.uniform(i, i + 1) / KILLS[kills_of_a_book])
        kill(process, whole=True)
        told.tried += 1
        told.half += results(pages) not in (earlier, want) or results(*places) != tracked
        code, said = finished(start(checkout, here, command="book"))
        told.again += code == 0
        told.same += results(pages) == want and results(*places) == tracked
        if code or results(pages) != want:
            told.wrong.append(said.strip() or "other pages")
    return told


KILLS = {kills_of_a_toy: 14, kills_of_a_chapter: 6, kills_of_a_sweep: 5, kills_of_a_book: 3}


def two_runs_on_one_output(folder: Path, seed: int = 0) -> Told:
    told = Told()
    checkout, arguments, places = _toy(folder / "whole")
    finished(start(checkout, folder / "whole", *arguments))
    want = results(*places)
    for i in range(3):
        here = folder / f"two-{i}"
        checkout, arguments, places = _toy(here)
        both = [start(checkout, here, *arguments) for _ in range(2)]
        ends = [finished(process) for process in both]
        told.tried += 1
        told.said += all(code == 0 for code, _ in ends)
        told.half += results(*places) != want
        told.wrong += [said.strip() for code, said in ends if code]
        again(told, checkout, here, arguments, places, want)
    return told


def two_runs_of_unlike_results(folder: Path, seed: int = 0) -> Told:
    """What stands there is of one of them: its record says what its notebook shows. No lock keeps one of them out."""
    told = Told(again=None, same=None)
    for i in range(3):
        here = folder / f"unlike-{i}"
        checkout, out = toy(here), here / "out"
        numbers = (2 + i, 12 + i)
        both = [start(checkout, here, "--only", "01", "-p", f"n={n}", "--out", str(out), late=1) for n in numbers]
        ends = [finished(process) for process in both]
        told.tried += 1
        told.said += all(code == 0 for code, _ in ends)
        told.wrong += [said.strip() for code, said in ends if code]
        recorded, shown = told_by(out)
        told.half += recorded != shown or recorded not in numbers
    return told


def told_by(out: Path) -> tuple[int, int]:
    """The n of a toy's record, and that of its notebook."""
    outputs = json.loads((out / "01-first.ipynb").read_text(encoding="utf-8"))["cells"][-1]["outputs"]
    shown = sum(len("".join(output["text"]).splitlines()) for output in outputs)
    return json.loads((out / "results" / "tiny" / "claim.json").read_text(encoding="utf-8"))["n"], shown


def a_run_beside_an_old_one(folder: Path, seed: int = 0) -> Told:
    """A run that has lasted for days finishes beside a new one, though no lock keeps its scratch folder."""
    told = Told(half=None)
    checkout, arguments, places = _toy(folder / "whole")
    finished(start(checkout, folder / "whole", *arguments))
    want = results(*places)
    here = folder / "old"
    checkout, arguments, places = _toy(here)
    first = start(checkout, here, *arguments, late=0)
    while first.poll() is None and not any(checkout.glob("_build/run-*/results")):
        time.sleep(0.02)
    for path in checkout.glob("_build/run-*"):
        os.utime(path, (1, 1))
    second = start(checkout, here, *arguments, late=0)
    ends = [finished(first), finished(second)]
    told.tried += 1
    told.said += all(code == 0 for code, _ in ends)
    told.wrong += [said.strip() for code, said in ends if code]
    again(told, checkout, here, arguments, places, want)
    return told


def a_disk_that_fills_up(folder: Path, seed: int = 0) -> Told:
    """No file may grow beyond so many bytes, as on a disk with that much room left."""
    told = Told()
    checkout, arguments, places = _toy(folder / "whole")
    finished(start(checkout, folder / "whole", *arguments))
    want = results(*places)
    for i, limit in enumerate((0, *random.Random(seed).sample(range(100, 4000), 3))):
        here = folder / f"full-{i}"
        checkout, arguments, places = _toy(here)
        before = results(*places)
        code, said = finished(start(checkout, here, *arguments, limit=limit))
        told.tried += 1
        told.said += code == 0 or "kncore: " in said
        if code and "kncore: " not in said:
            told.wrong.append(said.strip()[-300:])
        seen = results(*places)
        told.half += any(one not in (before.get(name), want.get(name)) for name, one in seen.items())
        again(told, checkout, here, arguments, places, want)
    return told


def damaged_outputs(folder: Path, seed: int = 0) -> Told:
    """A stored notebook of another run and a record, cut short or with a bit turned: the next run replaces them."""
    told, draw = Told(half=None, said=None), random.Random(seed)
    checkout = toy(folder)
    arguments, places = ["--out", str(folder / "out")], [folder / "out"]
    finished(start(checkout, folder, *arguments))
    want = results(*places)
    for path in sorted(folder.glob("out/**/[!.]*.*")):
        if path.suffix not in (".ipynb", ".json"):
            continue
        raw = path.read_bytes()
        path.write_bytes(raw[: draw.randrange(len(raw))])
        told.tried += 1
        again(told, checkout, folder, arguments, places, want)
    return told


# ------------------------------------------------------------------------------------------- what is stored


@contextlib.contextmanager
def quiet(folder: Path) -> Iterator[io.StringIO]:
    """Own stores, nothing said before, and what is said on stderr."""
    before = {name: os.environ.get(name) for name in ("KNCORE_SCORES", "KNCORE_CACHE")}
    os.environ |= {"KNCORE_SCORES": str(folder / "scores"), "KNCORE_CACHE": str(folder / "cache")}
    disk._said.clear()
    disk._elsewhere.clear()
    heard = io.StringIO()
    try:
        with contextlib.redirect_stderr(heard):
            yield heard
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def flip(path: Path, draw: random.Random) -> bytes:
    """Turn one bit of a file, chosen at random; what it was."""
    raw = path.read_bytes()
    at = draw.randrange(8 * len(raw))
    turned = bytearray(raw)
    turned[at // 8] ^= 1 << at % 8
    path.write_bytes(turned)
    return raw


def attributed() -> tuple[torch.Tensor, ...]:
    """Scores of two prompts on a tiny model, one by one: computed alone or together they differ in the last digits."""
    import tiny

    from kncore import Query, attribute

    lm, asked = tiny.lm("gpt2"), (("the capital of France is", "Paris"), ("Anna saw the", "cat"))
    found = [attribute(lm, [Query(prompt, target)]) for prompt, target in asked]
    return tuple(value for one in found for value in (one.scores, one.gap, one.probability, one.rank))


def equal(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> bool:
    return all(map(torch.equal, one, other))


def bits_of_stored_scores(folder: Path, seed: int = 0) -> Told:
    told, draw = Told(half=None), random.Random(seed)
    with quiet(folder) as heard:
        want = attributed()
        files = sorted(cache.scores_folder().rglob("*.safetensors"))
        for _ in range(100):
            disk._said.clear()
            heard.truncate(0)
            path = draw.choice(files)
            raw = flip(path, draw)
            told.tried += 1
            told.same += equal(attributed(), want)
            told.said += f"{path} is damaged" in heard.getvalue()
            told.again += path.read_bytes() == raw
    return told


def bits_of_a_converted_model(folder: Path, seed: int = 0) -> Told:
    told, draw = Told(), random.Random(seed)
    target = folder / "cache" / "models" / "tiny-0"

    def make(staged: Path) -> None:
        import tiny
        from safetensors.torch import save_file

        staged.mkdir()
        save_file({name: value.contiguous() for name, value in tiny.model("llama").state_dict().items()},
                  staged / "model.safetensors")  # fmt: skip
        (staged / "config.json").write_text("{}")

    with quiet(folder) as heard:
        want = results(disk.folder(target, make))
        for _ in range(30):
            disk._said.clear()
            heard.truncate(0)
            flip(draw.choice(sorted(path for path in target.iterdir() if path.is_file())), draw)
            told.tried += 1
            told.same += results(disk.folder(target, make)) == want
            told.said += f"{target} is damaged" in heard.getvalue()
            told.again += disk.damage(target) == ""
            told.half += len(list(target.parent.iterdir())) > 1
    return told


def bits_of_a_record(folder: Path, seed: int = 0) -> Told:
    """A record with a bit turned is refused, or stale; one that reads the same all the same is as good as it was."""
    told, draw = Told(half=None, again=None, same=None), random.Random(seed)
    place = folder / "results" / "controlled-gpt2"
    shutil.copytree(ROOT / "results" / "controlled-gpt2", place)
    records = sorted(place.glob("*.json"))
    for _ in range(100):
        path = draw.choice(records)
        raw = flip(path, draw)
        told.tried += 1
        try:
            now = next(one for one in claims.read(folder / "results") if one["claim"] == path.stem)
            told.said += now == json.loads(raw) or "edited after it was recorded" in claims.stale(now)
        except ValueError as error:
            told.said += str(path) in str(error)
        disk.write(path, raw)
    return told


def cut_notebooks(folder: Path, seed: int = 0) -> Told:
    """A chapter that is cut short is named before anything runs."""
    told, draw = Told(half=None, again=None, same=None), random.Random(seed)
    checkout = toy(folder)
    for _ in range(50):
        path = draw.choice(sorted((checkout / "notebooks").glob("*.ipynb")))
        raw = path.read_bytes()
        path.write_bytes(raw[: draw.randrange(len(raw) - 1)])
        told.tried += 1
        try:
            pipeline.chapters(checkout)
        except ValueError as error:
            told.said += str(path) in str(error)
        path.write_bytes(raw)
    return told


def a_store_that_cannot_be_written(folder: Path, seed: int = 0) -> Told:
    """A file in the place of the folder, and a disk without room: results are computed, said once, nothing is left."""
    told = Told()
    with quiet(folder / "whole"):
        want = attributed()
    for i, spoil in enumerate((_file_in_place, _no_room, _no_room_at_the_end)):
        here = folder / f"spoilt-{i}"
        here.mkdir()
        with quiet(here) as heard:
            with spoil(here / "scores"):
                found = attributed()
            told.tried += 1
            told.same += equal(found, want)
            told.said += heard.getvalue().count("cannot be written") == 1
            told.half += any(path.is_file() for path in (here / "scores").rglob("*"))
            (here / "scores").unlink() if (here / "scores").is_file() else None
            told.again += equal(attributed(), want) and len(scores(here)) == 2
    return told


@contextlib.contextmanager
def _file_in_place(place: Path) -> Iterator[None]:
    place.write_text("")
    yield
    told = place.read_text()
    place.unlink()
    assert told == ""


@contextlib.contextmanager
def _no_room(place: Path) -> Iterator[None]:
    """As on a full disk: files can be made, and hold nothing."""
    before = os.fdopen

    def full(*arguments, **options):
        stream = before(*arguments, **options)
        stream.close()
        raise OSError(28, "No space left on device")

    os.fdopen = full
    try:
        yield
    finally:
        os.fdopen = before


@contextlib.contextmanager
def _no_room_at_the_end(place: Path) -> Iterator[None]:
    before = os.replace

    def full(*_):
        raise OSError(28, "No space left on device")

    os.replace = full
    try:
        yield
    finally:
        os.replace = before


TRIALS: dict[Callable[..., Told], str] = {
    kills_of_a_toy: "SIGKILL at a random moment of `python -m kncore run`, two chapters without a model",
    kills_of_a_chapter: f"SIGKILL at a random moment of `python -m kncore run {' '.join(REAL)}`, an empty store",
    kills_of_a_sweep: "SIGKILL at a random moment of `python -m kncore sweep`, facts on a small model",
    kills_of_a_book: "SIGKILL in each third of `python -m kncore book`, chapters without a model",
    ends_of_a_book_alone: "SIGKILL, and SIGTERM, of `python -m kncore book` and of nothing that it started",
    two_runs_on_one_output: "two runs at once on one output",
    two_runs_of_unlike_results: "two runs of unlike results at once on one output, a slow disk without locks",
    a_run_beside_an_old_one: "a run beside one that began long ago, a disk without locks",
    a_disk_that_fills_up: "a disk with room for so many bytes a file: 0, and three numbers up to 4,000",
    a_store_that_cannot_be_written: "a store that is no folder, or without room for the file or for its name",
    damaged_outputs: "a stored notebook or record of the output cut short",
    cut_notebooks: "a chapter cut short",
    bits_of_stored_scores: "one bit of a stored score turned",
    bits_of_a_converted_model: "one bit of a converted model turned",
    bits_of_a_record: "one bit of a record turned",
}


def table(told: dict[str, Told]) -> str:
    rows = ["| What was done | times | half-written files seen | found and said, or harmless | a plain rerun finished |"
            " with the undisturbed result |", "| --- | --: | --: | --: | --: | --: |"]  # fmt: skip
    columns = ("tried", "half", "said", "again", "same")
    counts = {what: [getattr(one, name) for name in columns] for what, one in told.items()}
    counts["**all**"] = [sum(n or 0 for n in column) for column in zip(*counts.values(), strict=True)]
    for what, row in counts.items():
        rows.append(f"| {what} | {' | '.join('–' if n is None else f'{n:,}' for n in row)} |")
    kills = [told[TRIALS[trial]] for trial in KILLS]
    back = stats.share([i < one.same for one in kills for i in range(one.tried)])
    rows += ["", f"Share of kills after which the undisturbed result came back: {back} (Wilson's interval)."]
    return "\n".join(rows) + "\n"


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    told = {}
    for trial, what in TRIALS.items():
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            told[what] = trial(Path(folder), given.seed)
        print(f"{trial.__name__}: {told[what]} {time.monotonic() - begun:.0f} s", flush=True)
    pipeline.write(given.out, table(told))
    return 0 if all(one.sound for one in told.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
