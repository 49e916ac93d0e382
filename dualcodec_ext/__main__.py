"""`python -m dualcodec_ext` is the command `dualcodec-ext`."""

import sys

from dualcodec_ext.cli import main

if __name__ == "__main__":
    sys.exit(main())
