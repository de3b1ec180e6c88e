"""``python -m minimagen_fast`` is the command line, also where the console script is not on the path."""

import sys

from minimagen_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
