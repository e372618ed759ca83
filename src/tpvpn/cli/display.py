"""How `connect` shows what happens: lines, steps with their times and then a live view, or objects for programs.

Each display is a listener of the session's events. While the session runs, the one of a terminal has the screen.
"""

import asyncio
import contextlib
import json
import signal
import sys
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from datetime import datetime
from typing import Any, Protocol

from tpvpn.cli import say
from tpvpn.cli.screen import Screen, is_terminal, open_screen, size, style
from tpvpn.cli.view import FAINT, GREEN, YELLOW, Piece, Rates, screen
from tpvpn.events import SCHEMA, Event

Describe = Callable[[], dict[str, Any]]
PERIOD = 1.0
"""Seconds between two drawings, and between two events of traffic."""
MESSAGES = 20
"""How many are shown, and printed again when the screen is left."""


class Display(Protocol):
    """One way to show it."""

    def on_event(self, event: Event) -> None:
        """Something happened."""
        ...

    def running(self, describe: Describe) -> "contextlib.AbstractAsyncContextManager[None]":
        """The session is ready, and lasts as long as the context; `describe` gives its status."""
        ...


def chosen(output: str, quiet: bool, around_command: bool) -> Display:
    """The display that the options and the terminal call for; a command has the terminal for itself."""
    if output == "json":
        return Objects()
    if quiet:
        return Warnings()
    return (Steps() if around_command else Live()) if is_terminal(sys.stderr) else Lines()


class Lines:
    """A line a sentence."""

    def on_event(self, event: Event) -> None:
        """Print it, if it is for people."""
        if event.text:
            say(_sentence(event))

    @contextlib.asynccontextmanager
    async def running(self, describe: Describe) -> AsyncGenerator[None]:
        """Go on as before."""
        yield


class Warnings(Lines):
    """Only what may want something to be done."""

    def on_event(self, event: Event) -> None:
        """Print it, if it is a warning or the route of a subnet has changed."""
        if event.kind in ("warning", "verdict"):
            super().on_event(event)


class Objects:
    """A JSON object a line on standard output: `tpvpn.events/1`."""

    def on_event(self, event: Event) -> None:
        """Print it."""
        at = datetime.now().astimezone().isoformat(timespec="milliseconds")
        shown = {"schema": SCHEMA, "event": event.kind, "at": at, **event.facts}
        with contextlib.suppress(OSError):
            print(json.dumps(shown | ({"text": event.text} if event.text else {})), flush=True)

    @contextlib.asynccontextmanager
    async def running(self, describe: Describe) -> AsyncGenerator[None]:
        """Tell of the traffic too, whenever there was some."""
        telling = asyncio.create_task(self._tell(describe))
        try:
            yield
        finally:
            telling.cancel()

    async def _tell(self, describe: Describe) -> None:
        before: dict[str, int] = {}
        while True:
            await asyncio.sleep(PERIOD)
            status = describe()
            if status["traffic"] != before:
                before = dict(status["traffic"])
                self.on_event(Event("traffic", facts={"traffic": before, "rtt": status["rtt"]}))


class Steps(Lines):
    """A line a step, with the time that it took; one that is going on is shown too."""

    def __init__(self) -> None:
        self._style = style(sys.stderr)
        self._pending = ""

    def on_event(self, event: Event) -> None:
        """Print it; what it says is in the step's line already."""
        if event.kind == "step":
            self._on_step(event)
        elif event.text:
            self._erase()
            super().on_event(event)
            self._write(self._pending)

    def _on_step(self, event: Event) -> None:
        step, state = event.facts["step"], event.facts["state"]
        width, _ = size(sys.stderr.fileno())
        self._erase()
        self._pending = ""
        if state == "begun":
            if step != "helper":  # sudo may ask for a password in that line
                self._pending = self._style.render([Piece("  "), Piece(f"{step:<10}  …", FAINT)], width)
                self._write(self._pending)
            return
        seconds = f"{event.facts['seconds']:.2f} s"
        mark = {"done": Piece("✓ " if self._style.unicode else "+ ", GREEN), "failed": Piece("! ", YELLOW)}[state]
        room = max(10, min(width, 100) - 25)
        shown = self._style.cut(event.facts["detail"], room)
        line = [mark, Piece(f"{step:<10}  {shown:<{room}}"), Piece(f"{seconds:>9}", FAINT)]
        self._write(self._style.render(line, width) + "\n")

    def _erase(self) -> None:
        if self._pending:
            self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.write(text)
            sys.stderr.flush()


class Live(Steps):
    """The steps, then the whole screen."""

    def __init__(self) -> None:
        super().__init__()
        self._messages: deque[str] = deque(maxlen=MESSAGES)
        self._changed: asyncio.Event | None = None

    def on_event(self, event: Event) -> None:
        """Print it, or keep it for the screen."""
        if self._changed is None:
            super().on_event(event)
        elif event.text:
            self._messages.append(f"{datetime.now():%H:%M:%S} {_sentence(event)}")
            self._changed.set()

    @contextlib.asynccontextmanager
    async def running(self, describe: Describe) -> AsyncGenerator[None]:
        """Have the screen; what was said meanwhile is printed when it is left."""
        with open_screen(sys.stderr) as opened:
            if not opened:
                yield
                return
            self._changed = asyncio.Event()
            drawing = asyncio.create_task(self._draw(opened, describe, self._changed))
            _handle_signals(opened, self._changed)
            try:
                yield
            finally:
                self._changed = None
                drawing.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await drawing
        for message in self._messages:
            say(message)

    async def _draw(self, opened: Screen, describe: Describe, changed: asyncio.Event) -> None:
        rates = Rates()
        while True:
            status = describe()
            rates.add(time.monotonic(), status["traffic"])
            hint = self._style.render([Piece("Ctrl-C ends the session", FAINT)], opened.size[0])
            while True:
                width, height = opened.size
                lines = screen(status, rates, self._messages, width, height - 2, self._style)
                opened.draw([*lines, "", hint])
                changed.clear()
                try:
                    async with asyncio.timeout(PERIOD):
                        await changed.wait()
                except TimeoutError:
                    break


def _handle_signals(opened: Screen, changed: asyncio.Event) -> None:
    """Draw anew at another size; give the terminal back while the process is stopped by Ctrl-Z."""

    def stop() -> None:
        opened.suspend()
        changed.set()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGWINCH, changed.set)
    loop.add_signal_handler(signal.SIGTSTP, stop)


def _sentence(event: Event) -> str:
    return f"warning: {event.text}" if event.kind == "warning" else event.text
