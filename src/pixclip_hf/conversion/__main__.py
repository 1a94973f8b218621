"""`python -m pixclip_hf.conversion` does what `pixclip-hf convert` does."""

import sys

from .command import main

if __name__ == "__main__":
    sys.exit(main())
