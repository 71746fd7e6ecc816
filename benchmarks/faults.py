"""What happens to results when a run is killed, a disk is full, a file is damaged: tried, counted, put into a table.

Each trial does harm, looks whether anything half-written can be seen, runs again plainly and compares what comes out
with an undisturbed run. The same trials are tests (tests/test_faults.py).
"""

from __future__ import annotations

import contextlib
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
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import psutil  # noqa: E402
import report  # noqa: E402
import shards  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from toy import COMPUTE, make_checkout, notebook  # noqa: E402

from knbook.checkout import chapters  # noqa: E402
from knbook.errors import UsageError  # noqa: E402
from knbook.shards import load_records  # noqa: E402
from kncore import Query, attribute  # noqa: E402
from kncore.store import cache, disk  # noqa: E402
from knpaper import stats  # noqa: E402
from knpaper.records import read_records  # noqa: E402
from knpaper.staleness import stale  # noqa: E402

REAL = ["--model", "controlled-gpt2", "--only", "00"]
SWEEP = ["attribution", "capital", "official_language", "-n", "120", "--model", "controlled-gpt2"]
HARM = """
import fcntl, os, random, time
fcntl.flock = fcntl.lockf = lambda *_: None  # as on file systems on which every lock succeeds
replace = os.replace


def late(*paths):  # as on a busy disk
    time.sleep(random.uniform(0, float(os.environ["KNCORE_LATE"])))
    return replace(*paths)


os.replace = late
"""  # run by Python at its start, as the module sitecustomize


@dataclass
class Tally:
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


TRIALS: dict[Callable[..., Tally], str] = {}


def trial(what: str) -> Callable:
    """Note a function as the trial of that row of the table."""

    def note(function: Callable[..., Tally]) -> Callable[..., Tally]:
        TRIALS[function] = what
        return function

    return note


# ------------------------------------------------------------------------------------------- whole runs


def hashed(*folders: Path) -> dict:
    """The files by name, hashed; of the notes how long a run took, only that they parse."""
    found = {}
    for folder in folders:
        for path in sorted(path for path in folder.rglob("[!.]*") if path.is_file()):
            if path.suffix == ".toml":
                found[path.name] = str(sorted(tomllib.loads(path.read_text(encoding="utf-8"))))
            else:
                found[f"{folder.name}/{path.relative_to(folder)}"] = disk.digest(path)
    return found


@dataclass
class Run:
    """A command in a checkout, its stores in the folder `here`, its results in `places`."""

    here: Path
    checkout: Path
    places: list[Path]
    arguments: list[str] = field(default_factory=list)
    command: str = "run"

    def start(self, *more: str, limit: int | None = None, late: float = -1) -> subprocess.Popen:
        """`limit`: bytes at most for any file that it writes. From `late` 0 on locks keep nobody out, and a file is
        moved to its place up to so many seconds late."""
        own = {"KNCORE_SCORES": str(self.here / "scores"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        if late >= 0:
            harm = disk.write(self.here / "harm" / "sitecustomize.py", HARM).parent
            own |= {"PYTHONPATH": f"{harm}{os.pathsep}{ROOT}", "KNCORE_LATE": str(late)}

        def bounded() -> None:
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        return subprocess.Popen(
            [sys.executable, "-m", "kncore", self.command, *self.arguments, *more],
            cwd=self.checkout,
            env=os.environ | own | {"HF_HUB_OFFLINE": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=bounded,
        )

    def seen(self):
        return hashed(*self.places)

    def half(self, before, want) -> bool:
        """Whether anything is neither as it was nor as it is to be."""
        return any(content not in (before.get(name), want.get(name)) for name, content in self.seen().items())

    def same(self, want) -> bool:
        return self.seen() == want


class Sweep(Run):
    """Scores that are computed beside those of other prompts differ in the last digits."""

    def seen(self) -> list[dict]:
        shown = list(self.places[0].glob("[!.]*"))
        return load_records(shown) if shown else []

    def half(self, before, want) -> bool:
        return len(self.seen()) not in (len(before), len(want))

    def same(self, want) -> bool:
        return len(list(self.places[0].iterdir())) == 1 and shards.apart(self.seen(), want) < 1e-4


@dataclass
class Book(Run):
    """The earlier pages stay whole until all of the new ones take their place, and tracked files are only read."""

    def __post_init__(self) -> None:
        self.tracked = hashed(self.checkout / "notebooks", self.checkout / "book")

    def seen(self) -> dict:
        untouched = hashed(self.checkout / "notebooks", self.checkout / "book") == self.tracked
        return super().seen() | {"untouched": untouched}

    def half(self, before, want) -> bool:
        return self.seen() not in (before, want)


def toy(here: Path) -> Run:
    """Two chapters without a model."""
    checkout = make_checkout(here / "toy", n01_first=notebook(COMPUTE), n02_second=notebook(COMPUTE))
    return Run(here, checkout, [checkout / "notebooks", checkout / "results"])


def chapter(here: Path) -> Run:
    return Run(here, ROOT, [here / "out", here / "scores"], [*REAL, "--out", str(here / "out")])


def sweep(here: Path) -> Run:
    return Sweep(here, ROOT, [here / "records"], [*SWEEP, "--out", str(here / "records")], "sweep")


def book(here: Path) -> Run:
    """Two chapters and what their pages need, pages of an earlier book, and notes how long an undisturbed run took."""
    checkout, pages = _site(here)
    noted = here.parent / "whole" / "toy" / "_build" / "staging" / "results"  # pages tell it, and a book keeps it
    if noted.is_dir():
        shutil.copytree(noted, checkout / "results")
    return Book(here, checkout, [pages], command="book")


def _site(here: Path) -> tuple[Path, Path]:
    """A checkout with two chapters and what their pages need; the folder with pages of an earlier book."""
    checkout = make_checkout(here / "toy", n01_first=notebook("print(model, n)"), n02_second=notebook("n"))
    shutil.copy(ROOT / "_config.yml", checkout)
    shutil.copytree(ROOT / "book" / "assets", checkout / "book" / "assets")
    shutil.copy(ROOT / "book" / "references.bib", checkout / "book")
    disk.write(checkout / "book" / "index.md", "# Toy\n\nA book.\n")
    files = "[{file: notebooks/01-first}, {file: notebooks/02-second}]"
    toc = f"format: jb-book\nroot: book/index\nparts: [{{caption: Claims, chapters: {files}}}]\n"
    disk.write(checkout / "_toc.yml", toc)
    return checkout, disk.write(checkout / "_build" / "html" / "index.html", "earlier").parent


def finished(process: subprocess.Popen) -> tuple[int, str]:
    """Exit code and what was said on stderr."""
    said = process.communicate()[1]
    return process.returncode, said.strip()


def undisturbed(run: Run) -> tuple[float, object]:
    """How long the run takes, and its results."""
    took, (code, said) = report.timed(lambda: finished(run.start()))
    if code:
        raise RuntimeError(f"the undisturbed run failed: {said}")
    return took, run.seen()


def again(tally: Tally, run: Run, want) -> None:
    """Count a plain rerun, compared."""
    code, said = finished(run.start())
    same = run.same(want)
    tally.again += code == 0
    tally.same += same
    if code or not same:
        tally.wrong.append(said or "another result")


def together(tally: Tally, *processes: subprocess.Popen) -> None:
    """Count runs that are to finish beside one another."""
    ends = [finished(process) for process in processes]
    tally.tried += 1
    tally.said += all(code == 0 for code, _ in ends)
    tally.wrong += [said for code, said in ends if code]


def processes(run: Run) -> list[psutil.Process]:
    """What the run began that has not ended, and all that this began."""
    stores, found = str(run.here / "scores"), psutil.process_iter(["environ", "cmdline"])
    return [p for p in found if (p.info["environ"] or {}).get("KNCORE_SCORES") == stores]


def ended(run: Run, seconds: float) -> bool:
    """Whether all of these end by themselves, soon; those that do not are killed."""
    until = time.monotonic() + seconds
    while (left := processes(run)) and time.monotonic() < until:
        time.sleep(0.1)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return not left


KILLS = {toy: 14, chapter: 6, sweep: 5, book: 3}


def killed(make: Callable[[Path], Run], folder: Path, seed: int, alone: bool = True, first: float = 0) -> Tally:
    """Kill a run at a random moment of each equal part of its time from the share `first` on, and run it again.

    With `alone` every other run is killed without what it started.
    """
    tally, draw, times = Tally(said=None), random.Random(seed), KILLS[make]
    took, want = undisturbed(make(folder / "whole"))
    for i in range(times):
        run = make(folder / f"killed-{i}")
        before, process = run.seen(), run.start()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(took * (first + (1 - first) * draw.uniform(i, i + 1) / times))
        with contextlib.suppress(ProcessLookupError):
            process.kill() if alone and i % 2 == 0 else os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        ended(run, 10)  # a kernel ends by itself when its parent is gone
        tally.tried += 1
        tally.half += run.half(before, want)
        again(tally, run, want)
    return tally


@trial("SIGKILL at a random moment of `python -m kncore run`, two chapters without a model")
def kills_of_a_toy(folder: Path, seed: int = 0) -> Tally:
    return killed(toy, folder, seed)


@trial(f"SIGKILL at a random moment of `python -m kncore run {' '.join(REAL)}`, an empty store")
def kills_of_a_chapter(folder: Path, seed: int = 0) -> Tally:
    return killed(chapter, folder, seed)


@trial("SIGKILL at a random moment of `python -m kncore sweep`, facts on a small model")
def kills_of_a_sweep(folder: Path, seed: int = 0) -> Tally:
    return killed(sweep, folder, seed, alone=False, first=0.25)  # before that it reads its modules


@trial("SIGKILL in each third of `python -m kncore book`, chapters without a model")
def kills_of_a_book(folder: Path, seed: int = 0) -> Tally:
    return killed(book, folder, seed, alone=False)


@trial("SIGKILL, and SIGTERM, of `python -m kncore book` and of nothing that it started")
def ends_of_a_book_alone(folder: Path, seed: int = 0) -> Tally:
    """What it started ends with it, and the next book, of other chapters, is made of nothing that it left."""
    tally = Tally()
    _, want = undisturbed(book(folder / "whole"))
    for end in (signal.SIGKILL, signal.SIGTERM):
        run = book(folder / end.name)
        first = run.checkout / "notebooks" / "01-first.ipynb"
        new = first.read_bytes()
        first.write_bytes(new.replace(b"print(model, n)", b"import time; time.sleep(6); print('old')"))
        process = run.start()
        while process.poll() is None and not any("ipykernel" in str(p.info["cmdline"]) for p in processes(run)):
            time.sleep(0.1)
        process.send_signal(end)
        process.communicate()
        tally.tried += 1
        tally.said += ended(run, 600)
        tally.half += (run.places[0] / "index.html").read_text() != "earlier"
        first.write_bytes(new)
        again(tally, run, want)
    return tally


@trial("two runs at once on one output")
def two_runs_on_one_output(folder: Path, seed: int = 0) -> Tally:
    tally = Tally()
    _, want = undisturbed(toy(folder / "whole"))
    for i in range(3):
        run = toy(folder / f"two-{i}")
        together(tally, run.start(), run.start())
        tally.half += not run.same(want)
        again(tally, run, want)
    return tally


@trial("two runs of unlike results at once on one output, a slow disk without locks")
def two_runs_of_unlike_results(folder: Path, seed: int = 0) -> Tally:
    """What stands there is of one of them: its record says what its notebook shows. No lock keeps one of them out."""
    tally = Tally(again=None, same=None)
    for i in range(3):
        run = toy(folder / f"unlike-{i}")
        numbers, out = (2 + i, 12 + i), run.here / "out"
        together(tally, *(run.start("--only", "01", "-p", f"n={n}", "--out", str(out), late=1) for n in numbers))
        outputs = json.loads((out / "01-first.ipynb").read_text(encoding="utf-8"))["cells"][-1]["outputs"]
        shown = sum(len("".join(output["text"]).splitlines()) for output in outputs)
        recorded = json.loads((out / "results" / "tiny" / "claim.json").read_text(encoding="utf-8"))["n"]
        tally.half += recorded != shown or recorded not in numbers
    return tally


@trial("a run beside one that began long ago, a disk without locks")
def a_run_beside_an_old_one(folder: Path, seed: int = 0) -> Tally:
    """A run that has lasted for days finishes beside a new one, though no lock keeps its scratch folder."""
    tally = Tally(half=None)
    _, want = undisturbed(toy(folder / "whole"))
    run = toy(folder / "old")
    first = run.start(late=0)
    while first.poll() is None and not any(run.checkout.glob("_build/run-*/results")):
        time.sleep(0.02)
    for path in run.checkout.glob("_build/run-*"):
        os.utime(path, (1, 1))
    together(tally, first, run.start(late=0))
    again(tally, run, want)
    return tally


@trial("a disk with room for so many bytes a file: 0, and three numbers up to 4,000")
def a_disk_that_fills_up(folder: Path, seed: int = 0) -> Tally:
    """No file may grow beyond so many bytes, as on a disk with that much room left."""
    tally = Tally()
    _, want = undisturbed(toy(folder / "whole"))
    for i, limit in enumerate((0, *random.Random(seed).sample(range(100, 4000), 3))):
        run = toy(folder / f"full-{i}")
        before = run.seen()
        code, said = finished(run.start(limit=limit))
        tally.tried += 1
        if code == 0 or "kncore: " in said:
            tally.said += 1
        else:
            tally.wrong.append(said[-300:])
        tally.half += run.half(before, want)
        again(tally, run, want)
    return tally


# ------------------------------------------------------------------------------------------- what is stored


@contextlib.contextmanager
def quiet(folder: Path) -> Iterator[io.StringIO]:
    """Own stores, nothing said before, and what is said on stderr."""
    own = {"KNCORE_SCORES": str(folder / "scores"), "KNCORE_CACHE": str(folder / "cache")}
    with mock.patch.dict(os.environ, own), contextlib.redirect_stderr(io.StringIO()) as heard:
        disk._said.clear()
        disk._elsewhere.clear()
        yield heard


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
    lm, prompts = tiny.lm("gpt2"), (("the capital of France is", "Paris"), ("Anna saw the", "cat"))
    found = [attribute(lm, [Query(prompt, target)]) for prompt, target in prompts]
    return tuple(value for result in found for value in (result.scores, result.gap, result.probability, result.rank))


def equal(found: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> bool:
    return all(map(torch.equal, found, wanted))


def full(*_) -> None:
    raise OSError(28, "No space left on device")


def full_when_opened(descriptor: int, *_) -> None:
    """As on a full disk: files can be made, and hold nothing."""
    os.close(descriptor)
    full()


@contextlib.contextmanager
def file_in_place(place: Path) -> Iterator[None]:
    place.write_text("")
    yield
    assert place.read_text() == ""
    place.unlink()


@trial("a store that is no folder, or without room for the file or for its name")
def a_store_that_cannot_be_written(folder: Path, seed: int = 0) -> Tally:
    """A file in the place of the folder, and a disk without room: results are computed, said once, nothing is left."""
    tally = Tally()
    with quiet(folder / "whole"):
        want = attributed()
    for i in range(3):
        here = folder / f"spoilt-{i}"
        here.mkdir()
        spoils = (
            file_in_place(here / "scores"),
            mock.patch.object(os, "fdopen", full_when_opened),
            mock.patch.object(os, "replace", full),
        )
        with quiet(here) as heard:
            with spoils[i]:
                found = attributed()
            tally.tried += 1
            tally.same += equal(found, want)
            tally.said += heard.getvalue().count("cannot be written") == 1
            tally.half += any(path.is_file() for path in (here / "scores").rglob("*"))
            tally.again += equal(attributed(), want) and len(list(here.glob("scores/**/[!.]*.safetensors"))) == 2
    return tally


@trial("a stored notebook or record of the output cut short")
def damaged_outputs(folder: Path, seed: int = 0) -> Tally:
    """A stored notebook of another run and a record, cut short or with a bit turned: the next run replaces them."""
    tally, draw = Tally(half=None, said=None), random.Random(seed)
    run = toy(folder)
    run.arguments, run.places = ["--out", str(folder / "out")], [folder / "out"]
    _, want = undisturbed(run)
    for path in sorted(folder.glob("out/**/[!.]*.*")):
        if path.suffix in (".ipynb", ".json"):
            raw = path.read_bytes()
            path.write_bytes(raw[: draw.randrange(len(raw))])
            tally.tried += 1
            again(tally, run, want)
    return tally


@trial("a chapter cut short")
def cut_notebooks(folder: Path, seed: int = 0) -> Tally:
    """A chapter that is cut short is named before anything runs."""
    tally, draw = Tally(half=None, again=None, same=None), random.Random(seed)
    checkout = toy(folder).checkout
    for _ in range(50):
        path = draw.choice(sorted((checkout / "notebooks").glob("*.ipynb")))
        raw = path.read_bytes()
        path.write_bytes(raw[: draw.randrange(len(raw) - 1)])
        tally.tried += 1
        try:
            chapters(checkout)
        except UsageError as error:
            tally.said += str(path) in str(error)
        path.write_bytes(raw)
    return tally


@trial("one bit of a stored score turned")
def bits_of_stored_scores(folder: Path, seed: int = 0) -> Tally:
    tally, draw = Tally(half=None), random.Random(seed)
    with quiet(folder):
        want = attributed()
        files = sorted(cache.scores_folder().rglob("*.safetensors"))
    for _ in range(100):
        with quiet(folder) as heard:
            path = draw.choice(files)
            raw = flip(path, draw)
            tally.tried += 1
            tally.same += equal(attributed(), want)
            tally.said += f"{path} is damaged" in heard.getvalue()
            tally.again += path.read_bytes() == raw
    return tally


@trial("one bit of a converted model turned")
def bits_of_a_converted_model(folder: Path, seed: int = 0) -> Tally:
    tally, draw = Tally(), random.Random(seed)
    target = folder / "cache" / "models" / "tiny-0"

    def made() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in disk.folder(target, make).iterdir()}

    def make(staged: Path) -> None:
        staged.mkdir()
        weights = {name: value.contiguous() for name, value in tiny.model("llama").state_dict().items()}
        save_file(weights, staged / "model.safetensors")
        (staged / "config.json").write_text("{}")

    want = made()
    for _ in range(30):
        with quiet(folder) as heard:
            flip(draw.choice(sorted(target.iterdir())), draw)
            tally.tried += 1
            tally.same += made() == want
            tally.said += f"{target} is damaged" in heard.getvalue()
            tally.again += disk.damage(target) == ""
            tally.half += len(list(target.parent.iterdir())) > 1
    return tally


@trial("one bit of a record turned")
def bits_of_a_record(folder: Path, seed: int = 0) -> Tally:
    """A record with a bit turned is refused, or stale; one that reads the same all the same is as good as it was."""
    tally, draw = Tally(half=None, again=None, same=None), random.Random(seed)
    place = folder / "results" / "controlled-gpt2"
    shutil.copytree(ROOT / "results" / "controlled-gpt2", place)
    records = sorted(place.glob("*.json"))
    for _ in range(100):
        path = draw.choice(records)
        raw = flip(path, draw)
        tally.tried += 1
        try:
            now = next(record for record in read_records(folder / "results") if record["claim"] == path.stem)
            harmed = {"edited after it was recorded", "it has no checksum"}
            tally.said += now == json.loads(raw) or bool(harmed.intersection(stale(now)))
        except ValueError as error:
            tally.said += str(path) in str(error)
        disk.write(path, raw)
    return tally


def table(tallies: dict[str, Tally]) -> str:
    header = ["What was done", "times", "half-written files seen", "found and said, or harmless"]
    header += ["a plain rerun finished", "with the undisturbed result"]
    columns = ("tried", "half", "said", "again", "same")
    counts = {what: [getattr(tally, name) for name in columns] for what, tally in tallies.items()}
    counts["**all**"] = [sum(n or 0 for n in column) for column in zip(*counts.values(), strict=True)]
    rows = [[what, *("–" if n is None else f"{n:,}" for n in row)] for what, row in counts.items()]
    kills = [tallies[what] for harm, what in TRIALS.items() if harm.__name__.startswith("kills")]
    back = stats.share([i < tally.same for tally in kills for i in range(tally.tried)])
    share = f"Share of kills after which the undisturbed result came back: {back} (Wilson's interval).\n"
    return f"{report.table(header, rows)}\n{share}"


def main() -> int:
    options = report.parser(__doc__, seed=(0, "of the moments and bits")).parse_args()
    tallies = {}
    for harm, what in TRIALS.items():
        with tempfile.TemporaryDirectory() as folder:
            seconds, tallies[what] = report.timed(harm, Path(folder), options.seed)
        print(f"{harm.__name__}: {tallies[what]} {seconds:.0f} s", flush=True)
    report.show(table(tallies), options.out)
    return 0 if all(tally.sound for tally in tallies.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
