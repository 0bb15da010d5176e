"""`python -m trl_flow` is the same as the command `trl-flow`."""

import sys

from trl_flow.cli import main


if __name__ == "__main__":
    sys.exit(main())
