"""A terminal with a program in it: what is typed and what is seen, as a person has it (a pty, read by pyte)."""

import contextlib
import fcntl
import os
import pty
import struct
import subprocess
import termios
import threading
from collections.abc import Generator, Mapping, Sequence
from html import escape

import pyte

from peers import eventually

_OTHER, _BACK = b"\x1b[?1049h", b"\x1b[?1049l"
"""xterm's other buffer, which pyte does not have."""
_COLOURS = {"red": "#f66", "green": "#6c6", "brown": "#db4", "default": "#ddd"}


class Terminal:
    """A running command and its terminal; `screen` is what is seen."""

    def __init__(self, command: Sequence[str], columns: int, lines: int, environment: Mapping[str, str]) -> None:
        self._master, theirs = pty.openpty()
        self.size = columns, lines
        self._set_size()
        self._normal, self._other = pyte.Screen(columns, lines), pyte.Screen(columns, lines)
        self._shown, self._changing = self._normal, threading.Lock()
        self._stream = pyte.ByteStream(self._normal)
        self.raw = b""
        """All that was written."""
        self.process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "TERM": "xterm-256color", "LANG": "C.UTF-8", "PYTHONUTF8": "1", **environment},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(theirs, termios.TIOCSCTTY, 0),
        )
        os.close(theirs)
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def _read(self) -> None:
        data = b""
        with contextlib.suppress(OSError):  # EIO: nobody has the other side any more
            while more := os.read(self._master, 1 << 16):
                self.raw += more
                data = self._feed(data + more)

    def _feed(self, data: bytes) -> bytes:
        """Show it; the beginning of what may become a switch of buffers is kept."""
        with self._changing:
            while data:
                found = [(data.find(mark), mark) for mark in (_OTHER, _BACK) if mark in data]
                if not found:
                    break
                at, mark = min(found)
                self._stream.feed(data[:at])
                data = data[at + len(mark) :]
                self._shown = self._other if mark == _OTHER else self._normal
                self._stream = pyte.ByteStream(self._shown)
                if mark == _OTHER:
                    self._other.reset()
            keep = next((n for n in range(len(_OTHER) - 1, 0, -1) if data.endswith(_OTHER[:n])), 0)
            self._stream.feed(data[: len(data) - keep])
            return data[len(data) - keep :]

    def _set_size(self) -> None:
        columns, lines = self.size
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("4H", lines, columns, 0, 0))

    def resize(self, columns: int, lines: int) -> None:
        """Have another size; the program is told (SIGWINCH)."""
        with self._changing:
            self.size = columns, lines
            for screen in (self._normal, self._other):
                screen.resize(lines, columns)
        self._set_size()

    def type(self, text: str) -> None:
        """Type it; "\\x03" is Ctrl-C."""
        os.write(self._master, text.encode())

    @property
    def lines(self) -> list[str]:
        """What is seen."""
        with self._changing:
            return [line.rstrip() for line in self._shown.display]

    @property
    def text(self) -> str:
        """What is seen, without the empty lines at the end."""
        return "\n".join(self.lines).rstrip()

    @property
    def is_other(self) -> bool:
        """The screen beside the one with the scrollback is shown."""
        return self._shown is self._other

    def shows(self, *texts: str, seconds: float = 10) -> None:
        """Wait until all of these are seen."""
        eventually(lambda: all(text in self.text for text in texts), seconds, f"{texts} in\n{self.text}")

    def wait(self, seconds: float = 10) -> int:
        """The exit code, when all was read."""
        code = self.process.wait(seconds)
        self._reading.join(2)
        return code

    def screenshot(self) -> str:
        """What is seen, as an SVG."""
        columns, lines = self.size[0], len(self.text.splitlines())
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {8.4 * columns + 24:.0f} {18 * lines + 24}" '
            'font-family="ui-monospace, Menlo, Consolas, monospace" font-size="14" xml:space="preserve">'
        )
        rows = ['<rect width="100%" height="100%" rx="8" fill="#1c1c1c"/>']
        with self._changing:
            for row in range(lines):
                rows += [
                    f'<text x="{12 + 8.4 * at:.1f}" y="{26 + 18 * row}" textLength="{8.4 * len(text):.1f}" '
                    f'fill="{colour}" font-weight="{"bold" if bold else "normal"}">{escape(text)}</text>'
                    for at, text, colour, bold in self._runs(row)
                ]
        return "\n".join([head, *rows, "</svg>"]) + "\n"

    def _runs(self, row: int) -> list[tuple[int, str, str, bool]]:
        """The parts of a line that look the same."""
        runs, line = list[tuple[int, str, str, bool]](), self._shown.buffer[row]
        for at in range(self.size[0]):
            cell = line[at]
            look = _COLOURS.get(cell.fg, "#ddd"), cell.bold
            if runs and runs[-1][2:] == look:
                runs[-1] = (runs[-1][0], runs[-1][1] + cell.data, *look)
            else:
                runs.append((at, cell.data, *look))
        return [run for run in runs if run[1].strip()]

    def close(self) -> None:
        """Take the terminal away."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._reading.join(2)
        os.close(self._master)


@contextlib.contextmanager
def terminal(command: Sequence[str], columns: int = 80, lines: int = 24, **environment: str) -> Generator[Terminal]:
    """A command in a terminal of its own."""
    opened = Terminal(command, columns, lines, environment)
    try:
        yield opened
    finally:
        opened.close()
