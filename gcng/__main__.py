"""``python -m gcng`` is the command ``gcng``."""

import sys

from gcng.cli import main

if __name__ == "__main__":
    sys.exit(main())
