"""The terminal as a screen that is drawn anew, beside the one with the scrollback; it is left as it was found.

The terminal is opened once more for it, without blocking: one that is held (Ctrl-S) must not hold the packets. A
process in the background draws nothing. `open_screen()` gives None where there is no such terminal.
"""

import contextlib
import os
import select
import signal
from collections.abc import Generator, Sequence
from typing import TextIO

from tpvpn.cli.view import Style

# xterm's ctlseqs: another buffer and back, the cursor away and back, home, erase to the line's and to the screen's end.
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_HOME, _TO_LINE_END, _TO_END = "\x1b[H", "\x1b[K", "\x1b[J"
_PATIENCE = 0.5
LEAST = (20, 6)
"""Columns and lines that are drawn."""


def has_colours(stream: TextIO) -> bool:
    """Whether what is printed there may have colours; https://no-color.org."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def style(stream: TextIO) -> Style:
    """What the terminal can show."""
    unicode = (stream.encoding or "").lower().replace("-", "") == "utf8"
    return Style(colour=has_colours(stream), unicode=unicode)


def size(fd: int) -> tuple[int, int]:
    """Columns and lines of a terminal; of one that says it has none, and of what is none, 80 and 24."""
    try:
        columns, lines = os.get_terminal_size(fd)
    except OSError:
        columns, lines = 0, 0
    return (columns, lines) if columns and lines else (80, 24)


def is_terminal(stream: TextIO) -> bool:
    """Whether that is a terminal which can be drawn on."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


@contextlib.contextmanager
def open_screen(stream: TextIO) -> "Generator[Screen | None]":
    """The screen of a stream's terminal while the context lasts; None where there is none."""
    fd = _opened(stream) if is_terminal(stream) else None
    if fd is None:
        yield None
        return
    screen = Screen(fd)
    try:
        screen.enter()
        yield screen
    finally:
        screen.leave()
        os.close(fd)


def _opened(stream: TextIO) -> int | None:
    try:
        return os.open(os.ttyname(stream.fileno()), os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return None


class Screen:
    """A terminal's other screen."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @property
    def size(self) -> tuple[int, int]:
        """Columns and lines, as there are at least."""
        columns, lines = size(self._fd)
        return max(columns, LEAST[0]), max(lines, LEAST[1])

    def enter(self) -> None:
        """Show it."""
        self._write(_ENTER)

    def leave(self) -> None:
        """Show what was there before; a terminal that is held has a moment to go on."""
        select.select([], [self._fd], [], _PATIENCE)
        self._write(_LEAVE)

    def suspend(self) -> None:
        """What Ctrl-Z is for: the shell has the terminal until this process goes on."""
        self.leave()
        os.kill(os.getpid(), signal.SIGSTOP)
        self.enter()

    def draw(self, lines: Sequence[str]) -> None:
        """Show these lines, unless the terminal is another job's now."""
        with contextlib.suppress(OSError):
            if os.tcgetpgrp(self._fd) != os.getpgrp():
                return
        self._write(_HOME + "\r\n".join(line + _TO_LINE_END for line in lines) + _TO_END)

    def _write(self, text: str) -> None:
        """As much as the terminal takes: the next drawing is a whole one again."""
        with contextlib.suppress(OSError):
            os.write(self._fd, text.encode(errors="replace"))
