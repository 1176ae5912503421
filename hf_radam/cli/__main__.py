"""`python -m hf_radam.cli` is the command `hf-radam`."""

import sys

from hf_radam.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
