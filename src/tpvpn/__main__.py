"""`python -m tpvpn`: the same as the console script."""

import sys

from tpvpn.cli import main

sys.exit(main())
