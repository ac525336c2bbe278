"""The command line: `sparsifai --help` and `python -m sparsifai --help`."""

import sys

from .command_line.main import main as main

if __name__ == "__main__":
    sys.exit(main())
