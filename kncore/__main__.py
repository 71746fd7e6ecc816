"""`python -m kncore`: the command line of the book, `knbook`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("knbook", run_name="__main__", alter_sys=True)
