"""python -m starflow.cli"""

import sys

from . import main

sys.exit(main())
