"""Run a module in a process that ends when the process that started it does, however that one ended.

    python -P bound.py PARENT MODULE[:FUNCTION] [ARGUMENT ...]

PARENT is the process id of the one that starts it. This file is run by its path, before and without the package, whose
import takes seconds; `knbook.runs.bound` makes the command line.
"""

import importlib
import os
import runpy
import signal
import sys
import threading
import time

GRACE = 20  # seconds in which a process that was asked to end may end what it started itself


def watch(parent: int) -> None:
    """Wait until the parent of this process is another one, then end this process. It does not return."""
    while os.getppid() == parent:
        time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(1)


if __name__ == "__main__":
    parent, wanted = sys.argv[1:3]
    module, _, function = wanted.partition(":")
    sys.argv = [module, *sys.argv[3:]]
    threading.Thread(target=watch, args=(int(parent),), daemon=True).start()
    if function:
        sys.exit(getattr(importlib.import_module(module), function)())
    runpy.run_module(module, run_name="__main__", alter_sys=True)
