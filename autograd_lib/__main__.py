"""`python -m autograd_lib`."""

import sys

from autograd_lib.command.main import main

if __name__ == "__main__":
    sys.exit(main())
