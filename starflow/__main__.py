"""Run the command line as `python -m starflow`."""

import sys

from .cli import main

sys.exit(main())
