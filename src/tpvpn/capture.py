"""A capture of the tunnel: what passes between the kernel and the pump, as pcapng files of a bounded size.

It knows nothing of sessions. Whoever wants one gives the pump `tap(device)` in the place of the device, so that a
session without a capture pays nothing.

How it works. A packet becomes a block in memory; every WAIT seconds, or when there is much, a thread writes what there
is. The tunnel never waits for a disk: what comes while too much waits for it is missing in the capture, and counted.
The files are a ring: FILE is the one that is written, FILE.1 the one before it, and so on. A write that fails ends the
capture at the last whole block, with one warning; the session goes on.
"""

import asyncio
import contextlib
import io
import os
import stat
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tpvpn import __version__
from tpvpn.errors import UsageError
from tpvpn.packet_filter import Filter
from tpvpn.tun import Device
from tpvpn.wire import pcapng, vnet

FILES = 4
"""Of a ring."""
WAIT = 0.2
"""Seconds for which a packet stays in memory at most, where the disk is quick."""
_BATCH, _BACKLOG = 1 << 18, 1 << 25
"""Bytes: as much is written at once, and as much may wait for the disk."""


@contextlib.asynccontextmanager
async def capturing(
    path: Path, say: Callable[[str], None], *, size: int, snap_length: int = 0, wanted: Filter | None = None
) -> AsyncGenerator["Capture"]:
    """A capture of at most `size` bytes while the context lasts; UsageError when the file cannot be written."""
    capture = Capture(
        _Ring(path, size // FILES, pcapng.header(f"tpvpn {__version__}", "tpvpn", snap_length)),
        say,
        snap_length,
        wanted,
    )
    try:
        yield capture
    finally:
        await capture.close()


class Capture:
    """Records packets until `close()`, or until a write fails."""

    def __init__(
        self, ring: "_Ring", say: Callable[[str], None], snap_length: int = 0, wanted: Filter | None = None
    ) -> None:
        self._ring, self._say, self._wanted = ring, say, wanted
        self._most = snap_length or 1 << 17
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, "capture")
        self._waiting = bytearray()
        self._timer: asyncio.TimerHandle | None = None
        self._writing: asyncio.Future[None] | None = None
        self._packets = self._missing = 0
        self._ended = False

    def tap(self, device: Device, *, offload: bool) -> "Tap":
        """A device whose packets are recorded; with `offload` a virtio-net header is before each."""
        return Tap(device, self.record, vnet.HEADER_LENGTH if offload else 0)

    def record(self, packet: memoryview, direction: int) -> None:
        """Note a packet that passes now."""
        if self._ended or (self._wanted and not self._wanted(packet)):
            return
        self._packets += 1
        if len(self._waiting) > _BACKLOG:
            self._missing += 1
            return
        pcapng.append_packet(self._waiting, packet[: self._most], len(packet), time.time_ns(), direction)
        if len(self._waiting) >= _BATCH:
            self._write()
        elif not self._timer:
            self._timer = self._loop.call_later(WAIT, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._write()

    def _write(self) -> None:
        """Have the thread write what waits, unless it is at work still."""
        if self._waiting and not self._writing and not self._ended:
            data, self._waiting = self._waiting, bytearray()
            self._writing = self._loop.run_in_executor(self._thread, self._ring.write, data)
            self._writing.add_done_callback(self._on_written)

    def _on_written(self, done: "asyncio.Future[None]") -> None:
        self._writing = None
        if error := done.exception():
            self._ended = True
            self._waiting.clear()
            self._say(f"warning: the capture ends here, the session goes on: {self._ring.path}: {_reason(error)}")
        elif not self._timer:
            self._write()

    async def close(self) -> None:
        """Write what waits and close the file."""
        if self._timer:
            self._timer.cancel()
        while self._writing:
            await asyncio.wait([self._writing])
        if not self._ended:
            self._waiting += pcapng.statistics(time.time_ns(), self._packets, self._missing)
            self._write()
            self._ended = True
            assert self._writing
            await asyncio.wait([self._writing])
        self._thread.shutdown()
        self._ring.close()
        if self._missing:
            self._say(f"warning: {self._missing} packets are missing in the capture: the disk was too slow")


class Tap:
    """A device that another one stands behind, whose packets are told of as they pass."""

    def __init__(self, device: Device, record: Callable[[memoryview, int], None], before: int) -> None:
        self._device, self._record, self._before = device, record, before
        self.fd, self.prompt_fd = device.fd, device.prompt_fd

    def reader(self, queue: int) -> Callable[[memoryview], int | None]:
        """What reads the next packet of a queue, and says None when it is empty."""
        readinto, record, before = self._device.reader(queue), self._record, self._before

        def read(view: memoryview) -> int | None:
            length = readinto(view)
            if length:
                record(view[before:length], pcapng.OUTBOUND)
            return length

        return read

    def write(self, queue: int, packet: memoryview) -> int:
        """Hand the kernel a packet; OSError when it refuses, and then it is in no capture."""
        written = self._device.write(queue, packet)
        self._record(packet[self._before :], pcapng.INBOUND)
        return written


class _Ring:
    """FILES files of at most `most` bytes, each with its header; those that are there are written over."""

    def __init__(self, path: Path, most: int, header: bytes) -> None:
        self.path, self._most, self._header = path, most, header
        try:
            if path.exists() and not stat.S_ISREG(path.stat().st_mode):
                raise UsageError(f"cannot capture to {path}: it is no regular file")
            self._open()
            for number in range(1, FILES):
                self._named(number).unlink(missing_ok=True)
        except OSError as error:
            raise UsageError(f"cannot capture to {path}: {_reason(error)}; name another file") from error

    def _named(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}") if number else self.path

    def _open(self) -> None:
        self._file = io.FileIO(self.path, "wb")
        self._size = 0
        self._append(memoryview(self._header))

    def write(self, data: bytearray) -> None:
        """Append whole blocks, and go on in another file where this one is full. OSError."""
        rest = memoryview(data)
        while rest:
            fits = pcapng.whole_blocks(rest, self._most - self._size)
            if fits:
                self._append(rest[:fits])
                rest = rest[fits:]
            if rest:
                self._turn()

    def _append(self, data: memoryview) -> None:
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file.fileno(), self._size)
            raise
        self._size = self._file.tell()

    def _turn(self) -> None:
        self._file.close()
        for number in reversed(range(FILES - 1)):
            with contextlib.suppress(FileNotFoundError):
                self._named(number).rename(self._named(number + 1))
        self._open()

    def close(self) -> None:
        """Close the file; what is written stays."""
        self._file.close()


def _reason(error: BaseException) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
