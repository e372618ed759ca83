"""The processes of one lab, recorded in files so that any later process can end exactly these and no others.

A record is a file named by the process id that holds the process's start time (proc_pid_stat(5), field 22): an id that
the kernel has given to somebody else since has another start time and is left alone.
"""

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

GRACE = 3.0  # seconds between asking a process to end and ending it


class Processes:
    """Processes started for a lab and recorded in `directory`, which exists while the lab does."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._children: list[subprocess.Popen[Any]] = []

    def start(self, argv: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start `argv` (options as for subprocess.Popen) and record it."""
        process = subprocess.Popen(argv, **options)
        self._children.append(process)
        self._directory.mkdir(parents=True, exist_ok=True)
        (self._directory / str(process.pid)).write_text(start_time(process.pid) or "")
        return process

    def runs(self, pid: int) -> bool:
        """Whether a process is recorded and has not ended."""
        record = self._directory / str(pid)
        return record.exists() and start_time(pid) == record.read_text()

    def end(self, pid: int | None = None) -> None:
        """End the recorded process, or all, that still run: SIGTERM, and SIGKILL after a few seconds."""
        records = sorted(self._directory.glob("*" if pid is None else str(pid)))
        running = [fd for record in records if (fd := _open(int(record.name), record.read_text())) is not None]
        for fd in running:
            _signal(fd, signal.SIGTERM)
        deadline = time.monotonic() + GRACE
        for fd in running:
            if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
                _signal(fd, signal.SIGKILL)
                select.select([fd], [], [])
            os.close(fd)
        for child in self._children:
            if pid in (None, child.pid):
                child.wait()
        self._children = [child for child in self._children if child.returncode is None]
        for record in records:
            record.unlink(missing_ok=True)


def start_time(pid: int) -> str | None:
    """When a process started, in clock ticks since boot; None when there is none or it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return None if state == "Z" else fields[18]


def _signal(fd: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(fd, number)


def _open(pid: int, started: str) -> int | None:
    """A pidfd of the process if it is still the recorded one. Once open, the fd cannot come to mean another."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    if start_time(pid) == started:
        return fd
    os.close(fd)
    return None
