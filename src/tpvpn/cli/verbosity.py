"""-v and -vv: what is decided, or all that is done, on stderr while it happens.

Modules log by the logger of their own name: decisions and events as INFO, each operation as DEBUG, and never a packet,
a token or what a cluster answers. What people are told anyway has a logger of its own, TOLD.
"""

import argparse
import logging

PROGRAM = logging.getLogger("tpvpn")
TOLD = logging.getLogger("tpvpn.told")


def add_verbosity(parser: argparse.ArgumentParser) -> None:
    """Add -v."""
    parser.add_argument(
        "--verbose", "-v", action="count", default=0, help="show what is decided on the way; -vv: all that is done"
    )


def show(verbosity: int) -> None:
    """Show on stderr what is logged."""
    handler = _Shown()
    handler.setFormatter(logging.Formatter("%(asctime)s.%(msecs)03d %(name)s: %(message)s", "%H:%M:%S"))
    PROGRAM.addHandler(handler)
    PROGRAM.setLevel(logging.DEBUG if verbosity > 1 else logging.INFO)


class _Shown(logging.StreamHandler):  # pyright: ignore[reportMissingTypeArgument, reportUntypedBaseClass]
    """Standard error, without what is shown there anyway."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.name != TOLD.name

    def handleError(self, record: logging.LogRecord) -> None:
        """Nobody reads it."""
