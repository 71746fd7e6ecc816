"""Execute a notebook by papermill: in a scratch folder, in a kernel of this interpreter and package."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path

import nbformat

from knbook import runs
from knbook.checkout import Scalar
from knbook.errors import RunError
from kncore.store.disk import full, warn, write
from knpaper import stored

EPOCH = "1714694400"  # the day the paper appeared; figures and pages carry it instead of the time of the run
CELLS = "KNCORE_CELLS"  # where it is set, a line is printed for each cell that ran, see `knbook.jobs`
START = 600  # seconds in which a kernel must answer, on a busy machine, too


def execute(notebook: Path, parameters: Mapping[str, Scalar], scratch: Path, timeout: int) -> nbformat.NotebookNode:
    """Return the executed notebook; it ran as scratch/notebooks/NN-....ipynb and its records are in scratch/results/.

    Raises RunError where a cell fails or takes longer than `timeout` seconds, and where the kernel ends.
    """
    import papermill  # which takes a second

    source, target = scratch / "notebooks" / notebook.name, scratch / notebook.name
    source.parent.mkdir()
    shutil.copy(notebook, source)
    environment = kernel_environment(scratch, scratch / "results") | {"PYTHONPATH": runs.python_path()}
    if "model" not in parameters:
        environment["HF_HUB_OFFLINE"] = "1"
    for name in ("papermill", "asyncio"):  # asyncio has words of its own for a kernel that ends with this process
        logging.getLogger(name).setLevel(logging.CRITICAL)
    terminal = sys.stderr.isatty()
    hooks = _hooks(source, parameters) if os.environ.get(CELLS) else {}
    print(f"{notebook.stem} ...", end="\n" if terminal or hooks else " ", flush=True)
    start = time.monotonic()  # papermill's own duration follows the clock of the day, which may be set
    try:
        if find_spec("ipykernel_launcher") is None:
            raise RuntimeError("Kernel did not start: install ipykernel beside kncore")
        papermill.execute_notebook(
            str(source),
            str(target),
            parameters=dict(parameters),
            kernel_name="python3",
            language="python",
            kernel_manager_class=_manager(scratch, environment),
            progress_bar=terminal,
            cwd=str(source.parent),
            start_timeout=START,
            execution_timeout=timeout,
            extra_arguments=["--log-level=CRITICAL"],
            **hooks,
        )
    except Exception as error:
        print("failed", flush=True)
        if not (reason := _reason(error, target, timeout)):
            raise
        raise RunError(f"{notebook.name}, {reason}\nThe stored notebook is as it was.") from error
    else:
        seconds = time.monotonic() - start
        print(f"{seconds:.0f} s", flush=True)
    finally:  # on a line of its own
        with contextlib.suppress(ValueError):  # there may be nothing yet
            for line in _warnings(stored.read(target)):
                warn(line)
    executed = nbformat.read(target, as_version=4)
    executed.metadata.papermill.duration = seconds
    return executed


def _manager(scratch: Path, environment: Mapping[str, str]) -> type:
    """Return a manager whose kernel is of this interpreter, whatever is called python3, and ends with this process."""
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec
    from traitlets import Unicode

    command = runs.bound("ipykernel_launcher", "-f", "{connection_file}")
    settings = {name: value.replace("$", "$$") for name, value in environment.items()}  # which are templates there

    class Manager(AsyncKernelManager):
        connection_file = Unicode(str(scratch / "kernel.json"))
        kernel_spec = KernelSpec(argv=command, display_name="Python 3", language="python", env=settings)

    return Manager


def _hooks(notebook: Path, parameters: Mapping[str, Scalar]) -> dict[str, Callable[..., None]]:
    """Return what papermill is to do after each cell: print its number, as `RunError` counts, of how many."""
    total = len(stored.read(notebook).cells) + bool(parameters)  # which papermill puts into a cell of their own

    def executed(cell_index: int, **_: object) -> None:
        print(f"{notebook.stem}: cell {cell_index + 1} of {total}", flush=True)

    return {"on_cell_executed": executed}


def _reason(error: Exception, notebook: Path, timeout: int) -> str:
    """Return why the run of a notebook failed; "" for what has nothing to do with its cells and its kernel."""
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    if isinstance(error, PapermillExecutionError):
        last = (str(error.evalue).strip().splitlines() or [""])[-1]
        reason = f"cell {error.cell_index + 1} (In [{error.exec_count}]): {error.ename}: {last}"
        where = f" (in {notebook.parent.parent}, or where the cell writes: free some space there)"
        return reason + where if full(OSError(last)) else reason
    if isinstance(error, CellTimeoutError):
        return f"cell {_running(notebook)} took longer than {timeout} s; allow more with --timeout"
    if isinstance(error, DeadKernelError):
        return f"cell {_running(notebook)} ended the kernel: most often memory ran out; take a smaller n or model"
    if isinstance(error, RuntimeError) and str(error).startswith("Kernel di"):  # it died, or it did not respond
        return f"its kernel did not start ({error}): {sys.executable} -m ipykernel_launcher says why"
    return ""


def _running(notebook: Path) -> int:
    cells = nbformat.read(notebook, as_version=4).cells if notebook.exists() else []
    return sum(bool(cell.metadata.get("papermill", {}).get("start_time")) for cell in cells)


def _warnings(executed: nbformat.NotebookNode) -> list[str]:
    """Return what the package said on stderr in a notebook (`disk.warn`), which a stored notebook does not show."""
    text = ""
    for cell in executed.cells:
        text += "".join(output.text for output in cell.get("outputs", []) if output.get("name") == "stderr") + "\n"
    return re.findall(r"(?:^|[\r\n])kncore: ([^\r\n]+)", text)


def kernel_environment(scratch: Path, results: Path) -> dict[str, str]:
    """Return what a notebook's process gets on top of the caller's environment.

    A stored notebook must not depend on sample data that only some machines have, nor on the caller's settings of
    Matplotlib and IPython, whose kernels run a PYTHONSTARTUP file too. The number of threads is the caller's to choose.
    """
    settings = write(scratch / "matplotlibrc", "svg.hashsalt: kncore\n", sync=False)
    return {
        "KNCORE_DATA": "",
        "KNCORE_RESULTS": str(results),
        "MATPLOTLIBRC": str(settings),
        "IPYTHONDIR": str(scratch / "ipython"),
        "JUPYTER_PLATFORM_DIRS": "1",
        "JUPYTER_PREFER_ENV_PATH": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count() or 1)),
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        "PYTHONHASHSEED": "0",
        "PYTHONSTARTUP": "",
        "SOURCE_DATE_EPOCH": EPOCH,
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
    }
