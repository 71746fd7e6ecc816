"""`python -m knbook`: the command line."""

import sys

from knbook.cli import main

if __name__ == "__main__":
    sys.exit(main())
