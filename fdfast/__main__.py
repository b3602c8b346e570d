"""`python -m fdfast`, and `torchrun -m fdfast`: the command line."""

import sys

from fdfast.cli import main

if __name__ == "__main__":
    sys.exit(main())
