"""`python -m moesaic`, the same as `moesaic`."""

import sys

from moesaic.cli.main import main

sys.exit(main())
