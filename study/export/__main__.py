"""`python -m study.export`."""

import sys

from study.export.command import main

sys.exit(main())
