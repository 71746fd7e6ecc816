"""How nbval compares the stored notebooks with a fresh run: numbers within a tolerance, text exactly, images not.

Nothing that was computed before may stand in for the run: unless they are set, the attribution store and the records
go to a new folder below _build/.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from nbval.kernel import RunningKernel
from nbval.plugin import IPyNbCell, NbCellError

from knbook import jobs
from knbook.checkout import chapters
from knbook.kernel import kernel_environment
from knpaper import looking, stored

ROOT = Path(__file__).resolve().parent.parent
FRESH = ROOT / "_build" / "nbval"
PLACES = {str(ROOT): ".", str(Path.home()): "~"}
SKIPPED = (
    "image/svg+xml",
    "image/png",
    looking.MIME,
    "stderr",
    "application/papermill.record/image/svg+xml",
    "application/papermill.record/image/png",
    f"application/papermill.record/{looking.MIME}",
)


class Loose(str):
    """Text that equals another where `stored.agree` says so."""

    __hash__ = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and stored.agree(str(self), str(other))

    def __ne__(self, other: object) -> bool:
        return not self == other


def pytest_configure(config):
    if not config.option.nbval:
        return
    worker = os.environ.get(
        "PYTEST_XDIST_WORKER"
    )  # one of several processes that share the notebooks out
    if not worker:
        shutil.rmtree(FRESH, ignore_errors=True)
    results = Path(os.environ.get("KNCORE_RESULTS", FRESH / "results"))
    results.mkdir(parents=True, exist_ok=True)
    PLACES[str(results.parent)] = "."
    os.environ.setdefault("KNCORE_SCORES", str(FRESH / "scores"))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.update(kernel_environment(FRESH / (worker or "alone"), results))


def pytest_collection_modifyitems(items):
    for file in {item.parent for item in items if isinstance(item, IPyNbCell)}:
        file.skip_compare += SKIPPED
    # The longest first, so that processes which share the notebooks end at about the same time.
    seconds = {
        chapter.path: jobs.job(ROOT, chapter, ()).seconds
        for chapter in chapters(ROOT)
    }
    items.sort(key=lambda item: -seconds.get(item.path, 0))


def _sanitize(self, text):
    return Loose(stored.stable(text, PLACES)) if isinstance(text, str) else text


def _runtest(self):
    if self.cell.source.strip() and self.cell.execution_count is None:
        raise NbCellError(
            self.cell_num,
            "The stored cell was never run: there is nothing to compare",
            self.cell.source,
        )
    run_and_compare(self)


def _execute_cell_input(self, source, allow_stdin=None):
    # nbval keeps cells out of the history, where IPython looks for the semicolon that silences a cell's last value.
    return self.kc.execute(
        source, store_history=True, allow_stdin=allow_stdin, stop_on_error=False
    )


run_and_compare = IPyNbCell.runtest
IPyNbCell.sanitize = _sanitize
IPyNbCell.runtest = _runtest
RunningKernel.execute_cell_input = _execute_cell_input
