"""`python -m shardline`: the same as the command `shardline`."""

import sys

from shardline.cli import main

if __name__ == "__main__":
    sys.exit(main())
