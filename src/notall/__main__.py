"""`python -m notall`."""

import os
import sys

if sys.path[0] in (
    "",
    os.getcwd(),
):  # where -m puts it, so that a file json.py in it would be run for the library
    del sys.path[0]

from .cli import main

if __name__ == "__main__":
    main()
