"""`python -m bn_c` is `bn-c`."""

import sys

from bn_c.cli import main

sys.exit(main())
