"""`python -m moesaic`, the same as `moesaic`."""

import sys

from moesaic.cli import main

sys.exit(main())
