"""The command behind `--`, which runs while its session does."""

import asyncio
import contextlib
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from tpvpn.cli import say


class Command:
    """The command behind `--`: its end is the session's, its exit code too. `options` say how it is started."""

    GRACE = 2.0
    """Seconds between SIGTERM and SIGKILL when the session ends first."""

    def __init__(
        self, argv: list[str], stopped: "asyncio.Future[int]", options: Mapping[str, Any] | None = None
    ) -> None:
        self.argv, self.stopped, self._options = argv, stopped, options or {}
        self._process: asyncio.subprocess.Process | None = None
        self._running: asyncio.Task[None] | None = None
        self._told: int | None = None

    def start(self) -> None:
        """Start it, if there is one."""
        if self.argv:
            self._running = asyncio.create_task(self._run())

    async def _run(self) -> None:
        try:
            self._process = await asyncio.create_subprocess_exec(*self.argv, **self._options)
            if self._told:  # it was running before this loop knew
                self._pass_on(self._told)
            code = await self._process.wait()
        except OSError as error:  # as a shell does: 127 not found, 126 not to be run
            say(f"cannot run {self.argv[0]}: {error.strerror}")
            code = 127 if isinstance(error, FileNotFoundError) else 126
        except subprocess.SubprocessError as error:  # what it does before it is executed failed
            say(f"cannot run {self.argv[0]}: {error}")
            code = 126
        if not self.stopped.done():
            self.stopped.set_result(code if code >= 0 else 128 - code)

    def signal(self, number: int) -> bool:
        """Pass a signal on, as soon as the command runs; False when there is none, or it was told before."""
        if not self._running or self._running.done() or self._told:
            return False
        self._told = number
        self._pass_on(number)
        return True

    def _pass_on(self, number: int) -> None:
        # Ctrl-C in a terminal reaches the command by itself.
        if self._process and (number != signal.SIGINT or not sys.stdin.isatty()):
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def end(self) -> None:
        """End it when the session has ended before it."""
        if self._running and not self._running.done():
            self._told = signal.SIGTERM
            self._pass_on(self._told)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.GRACE):
                    await asyncio.shield(self._running)
            if self._process and self._process.returncode is None:
                self._process.kill()
            await self._running
