from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from toy import make_checkout, notebook

import kncore
from knbook import cli, kernel, runner
from knbook.errors import RunError
from kncore.store import disk
from knpaper import stored


@pytest.mark.kind("orphans-and-scratch")
def test_a_run_that_is_asked_to_end_takes_its_kernel_and_its_scratch_folder_along(tmp_path):
    slow = "import os, time, pathlib; pathlib.Path('../../../pid').write_text(str(os.getpid())); time.sleep(10_000)"
    toy = make_checkout(tmp_path / "slow", n01_toy=notebook(slow))
    command = [sys.executable, "-m", "kncore", "run"]
    with subprocess.Popen(command, cwd=toy, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (toy / "pid").exists():
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        error = process.communicate()[1]
    assert process.returncode == 143 and "stopped by SIGTERM" in error and "Traceback" not in error
    kernel = Path("/proc") / (toy / "pid").read_text() / "stat"
    with contextlib.suppress(OSError):
        assert kernel.read_text().rpartition(")")[2].split()[0] == "Z"
    assert list((toy / "_build").iterdir()) == []


@pytest.mark.kind("orphans-and-scratch")
def test_what_the_package_warns_of_in_a_kernel_is_said_once(tmp_path, monkeypatch, capsys):
    said = "import sys; print('kncore: the store is full', file=sys.stderr); print('other', file=sys.stderr)"
    toy = make_checkout(tmp_path / "toy", n01_toy=notebook(said, said))
    monkeypatch.setattr(disk, "_said", set())
    (path,) = runner.run(toy)
    assert (
        capsys.readouterr().err == "kncore: the store is full\n" and "store" not in path.read_text().split("print")[0]
    )


# ------------------------------------------------------------------------------- the kernel


@pytest.mark.kind("another-kernel")
def test_the_kernel_is_of_this_interpreter_whatever_is_called_python3(tmp_path, monkeypatch):
    toy = make_checkout(
        tmp_path / "toy", n01_toy=notebook("import sys, kncore; print(sys.executable, kncore.__file__)")
    )
    for setting in ("JUPYTER_PATH", "JUPYTER_DATA_DIR"):
        other = {"argv": ["false"], "display_name": "Python 3", "language": "python"}
        disk.write(tmp_path / setting / "kernels" / "python3" / "kernel.json", json.dumps(other))
        monkeypatch.setenv(setting, str(tmp_path / setting))
    monkeypatch.setattr(stored, "stable", lambda text, replace: text)
    (path,) = runner.run(toy)
    nb = nbformat.read(path, as_version=4)
    assert nb.cells[-1].outputs[0].text == f"{sys.executable} {kncore.__file__}\n"
    assert nb.metadata.kernelspec == stored.KERNEL


@pytest.mark.kind("another-kernel", own=True)
def test_what_a_user_has_run_at_the_start_of_each_python_is_not_run(tmp_path, monkeypatch):
    toy = make_checkout(tmp_path / "toy", n01_toy=notebook("print(globals().get('theirs', 'none'))"))
    monkeypatch.setenv("PYTHONSTARTUP", str(disk.write(tmp_path / "start.py", "theirs = 1\n")))
    (path,) = runner.run(toy)
    assert nbformat.read(path, as_version=4).cells[-1].outputs[0].text == "none\n"


@pytest.mark.kind("another-kernel", own=True)
def test_a_kernel_that_is_not_installed_is_named(toy, monkeypatch):
    monkeypatch.setattr(kernel, "find_spec", lambda name: None)
    with pytest.raises(RunError, match="install ipykernel beside kncore"):
        runner.run(toy)


@pytest.mark.kind("raw-errors", own=True)
@pytest.mark.parametrize("said", ["died before replying to kernel_info", "didn't respond in 600 seconds"])
def test_a_kernel_that_does_not_start_is_no_fault_of_ours(toy, monkeypatch, capsys, said):
    import papermill

    def execute(*_, **__):
        raise RuntimeError(f"Kernel {said}")

    monkeypatch.chdir(toy)
    monkeypatch.setattr(papermill, "execute_notebook", execute)
    assert cli.main(["run"]) == 1
    error = capsys.readouterr().err
    assert f"its kernel did not start (Kernel {said})" in error and "fault of kncore" not in error


@pytest.mark.kind("raw-errors", own=True)
def test_a_disk_without_room_for_a_kernel_is_named_before_one_starts(toy, monkeypatch):
    usage = shutil.disk_usage(toy)
    monkeypatch.setattr(runner.shutil, "disk_usage", lambda _: usage._replace(free=20_000))
    monkeypatch.setattr(kernel, "execute", lambda *_: pytest.fail("something ran"))
    with pytest.raises(RunError, match=re.escape(f"{toy / '_build'} cannot be written (20,000 bytes are left")):
        runner.run(toy)
