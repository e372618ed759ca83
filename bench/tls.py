"""The client's TLS: ours in memory, a non-blocking SSLSocket and asyncio's own, bulk both ways over loopback, in turns.

`python -m bench.tls` prints, for each of them, the medians of Gb/s and of CPU seconds a GB of the client's process. The
other end is a process with a blocking SSLSocket, the same for all. Each moves what a link moves: up to a batch of
packets a send, up to half a mebibyte a receive.
"""

import argparse
import asyncio
import contextlib
import multiprocessing
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import uvloop

from bench.bare import Mover
from bench.pod import MEBIBYTE, sink, source
from bench.summary import median
from tpvpn.link import RECEIVE_SIZE
from tpvpn.pump import BATCH_BYTES
from tpvpn.transport.inner_tls import InnerTlsStream
from tpvpn.transport.stream import Stream

Moved = Coroutine[None, None, int]


def trusting() -> ssl.SSLContext:
    """The client's context; the certificate is of this run."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


class SslSocketStream(Stream):
    """A stream on a non-blocking SSLSocket: what tpvpn had before."""

    def __init__(self, wrapped: ssl.SSLSocket) -> None:
        super().__init__(wrapped)
        self.pending, self._recv_record = wrapped.pending, wrapped.recv_into
        self.recv_into = self._recv_records

    def _recv_records(self, buffer: memoryview) -> int:
        """As many records as are here."""
        have = 0
        while have < len(buffer):
            try:
                count = self._recv_record(buffer[have:])
            except OSError:
                if have:
                    break
                raise
            if not count:
                break
            have += count
        return have


async def ssl_socket(port: int, up: bool, seconds: float) -> int:
    """Bytes that arrived with an SSLSocket."""
    with socket.create_connection(("127.0.0.1", port)) as connected:
        wrapped = trusting().wrap_socket(connected)
    return await move(SslSocketStream(wrapped), up, seconds)


async def ours(port: int, up: bool, seconds: float) -> int:
    """Bytes that arrived with the stream that tpvpn has."""
    stream = InnerTlsStream(Stream(socket.create_connection(("127.0.0.1", port))), trusting())
    await stream.handshake()
    return await move(stream, up, seconds)


async def move(stream: Stream, up: bool, seconds: float) -> int:
    """Move bytes; how many arrived."""
    mover = Mover(stream, up)
    await asyncio.wait([mover.ended], timeout=seconds)
    mover.close()
    return mover.arrived


class Theirs(asyncio.BufferedProtocol):
    """The same as a protocol of asyncio's, which has TLS below it."""

    def __init__(self, up: bool) -> None:
        self._unit = MEBIBYTE if up else 1
        self._buffer, self._batch = memoryview(bytearray(RECEIVE_SIZE)), bytes(BATCH_BYTES)
        self._up, self._open = up, True
        self.arrived = 0

    def connection_made(self, transport: Any) -> None:
        """Begin; what waits unsent in user space is one batch, as with a link."""
        self._transport = transport
        transport.set_write_buffer_limits(high=BATCH_BYTES)
        if self._up:
            self._write()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where to receive into."""
        return self._buffer

    def buffer_updated(self, count: int) -> None:
        """Count it."""
        self.arrived += count * self._unit

    def pause_writing(self) -> None:
        """Write no more for now."""
        self._open = False

    def resume_writing(self) -> None:
        """Write again."""
        self._open = True
        self._write()

    def _write(self) -> None:
        """One batch a turn of the loop."""
        if self._open and not self._transport.is_closing():
            self._transport.write(self._batch)
            asyncio.get_running_loop().call_soon(self._write)


async def theirs(port: int, up: bool, seconds: float) -> int:
    """Bytes that arrived with asyncio's."""
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.create_connection(lambda: Theirs(up), "127.0.0.1", port, ssl=trusting())
    await asyncio.sleep(seconds)
    transport.abort()
    return protocol.arrived


def server(listener: socket.socket, directory: Path, up: bool) -> None:
    """The other end, one connection after the other."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "crt", directory / "key")
    while True:
        with contextlib.suppress(OSError), context.wrap_socket(listener.accept()[0], server_side=True) as connection:
            (sink if up else source)(connection)


WAYS: dict[str, tuple[Callable[[int, bool, float], Moved], Callable[[], asyncio.AbstractEventLoop]]] = {
    "SSLSocket, uvloop": (ssl_socket, uvloop.new_event_loop),
    "ours, uvloop": (ours, uvloop.new_event_loop),
    "asyncio's, uvloop": (theirs, uvloop.new_event_loop),
    "asyncio's, asyncio": (theirs, asyncio.new_event_loop),
}


def measure(name: str, port: int, up: bool, seconds: float) -> tuple[float, float]:
    """Gb/s, and CPU seconds a GB of this process."""
    move, loop = WAYS[name]
    with asyncio.Runner(loop_factory=loop) as runner:
        used, began = time.process_time(), time.perf_counter()
        moved = runner.run(move(port, up, seconds))
        return moved * 8e-9 / (time.perf_counter() - began), (time.process_time() - used) / (moved / 1e9)


def main() -> None:
    """The command described above."""
    parser = argparse.ArgumentParser(prog="bench.tls", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    words = parser.parse_args()
    with tempfile.TemporaryDirectory() as made, contextlib.ExitStack() as stack:
        files = ["-keyout", f"{made}/key", "-out", f"{made}/crt"]
        subject = ["-subj", "/CN=bench", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
        subprocess.run(["openssl", "req", "-x509", "-nodes", *subject, *files], check=True, capture_output=True)
        ports: dict[bool, int] = {}
        for up in (True, False):
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            ports[up] = listener.getsockname()[1]
            process = multiprocessing.Process(target=server, args=(listener, Path(made), up), daemon=True)
            process.start()
            stack.callback(process.terminate)
        runs: dict[tuple[str, bool], list[tuple[float, float]]] = {(name, up): [] for name in WAYS for up in ports}
        for _ in range(words.rounds):
            for (name, up), found in runs.items():
                found.append(measure(name, ports[up], up, words.seconds))
        for (name, up), found in runs.items():
            rate, cost = (median([one[part] for one in found]) for part in (0, 1))
            print(f"{name:18} {'up' if up else 'down':5} {rate:6.2f} Gb/s {cost:6.2f} CPU s/GB")


if __name__ == "__main__":
    main()
