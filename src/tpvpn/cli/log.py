"""The file in which a session's doings are kept, of whoever runs it: one more listener of its events.

It is $XDG_STATE_HOME/tpvpn/NAME.log, ~/.local/state/tpvpn/NAME.log by default, for its owner alone; three of a megabyte
are kept. What people are told is there with its time, with -vv also all that is done. A log that cannot be written
hurts nobody.
"""

import contextlib
import io
import logging
import os
from collections.abc import Callable
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from tpvpn import __version__, rundir
from tpvpn.cli.config import state_directory
from tpvpn.cli.verbosity import PROGRAM, TOLD
from tpvpn.events import Event

LARGEST, OLD = 1_000_000, 2
"""Bytes of a file; how many are kept beside the one that is written."""
_log = logging.getLogger(__name__)


class SessionLog:
    """The log of one session, open from now on; to be made with the rights of whoever the session is of."""

    def __init__(self, name: str) -> None:
        """UsageError when the name is no session's."""
        self.path: Path | None = state_directory() / f"{rundir.directory(name).name}.log"
        if PROGRAM.level == logging.NOTSET:
            PROGRAM.setLevel(logging.INFO)
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            PROGRAM.addHandler(_File(self.path))
            _log.info("tpvpn %s, session %s, process %d; the log is %s", __version__, name, os.getpid(), self.path)
        except OSError as error:
            _log.info("no log is kept: %s: %s", self.path, error.strerror)
            self.path = None

    def on_event(self, event: Event) -> None:
        """Keep what it says."""
        facts = event.facts
        if event.text:
            TOLD.log(logging.WARNING if event.kind == "warning" else logging.INFO, "%s", event.text)
        elif event.kind == "ended":
            TOLD.info(
                "ended with exit code %d%s", facts["exit_code"], f": {facts['error']}" if "error" in facts else ""
            )
        elif event.kind == "step" and facts["state"] != "begun":
            _log.info("%s %s in %.3f s: %s", facts["step"], facts["state"], facts["seconds"], facts["detail"])

    def beside(self, describe: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
        """What `describe` gives, and where the log is."""
        return lambda: {**describe(), "log": str(self.path) if self.path else None}


class _File(RotatingFileHandler):
    """A file that only its owner reads, and whose troubles are nobody's."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, maxBytes=LARGEST, backupCount=OLD, encoding="utf-8", errors="backslashreplace")
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))

    def _open(self) -> io.TextIOWrapper:
        raw = io.FileIO(self.baseFilename, "ab", opener=_private)
        return io.TextIOWrapper(io.BufferedWriter(raw), self.encoding, self.errors)

    def handleError(self, record: logging.LogRecord) -> None:
        """A full disk, or one that may only be read."""


def _private(path: str, flags: int) -> int:
    """Open for the owner alone, and without blocking: a FIFO in the file's place must not hold us."""
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW, 0o600)
    with contextlib.suppress(OSError):
        os.fchmod(descriptor, 0o600)
    return descriptor
