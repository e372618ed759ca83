"""The laptop's end of a bare stream: `python -m bench.bare upgrade|portforward NAMESPACE POD up|down --seconds S`.

It opens the stream as tpvpn does, and moves bytes as a link does: as many at once as a batch of packets has, without
frames or packets. The result, on stdout, is a JSON object: Gb/s that arrived.
"""

import argparse
import asyncio
import json
import time

import uvloop

from bench.pod import MEBIBYTE, SINK, SOURCE
from tpvpn.kube.access import Access
from tpvpn.kube.api import opened
from tpvpn.link import RECEIVE_SIZE
from tpvpn.pump import BATCH_BYTES
from tpvpn.transport.apiserver import PortForward, Target, ThroughApiServer, Upgrade
from tpvpn.transport.stream import WOULD_BLOCK, Stream

TRANSPORTS: dict[str, type[ThroughApiServer]] = {kind.word: kind for kind in (Upgrade, PortForward)}


class Mover:
    """Moves bytes one way; `arrived` counts those that have reached the other end."""

    def __init__(self, stream: Stream, up: bool) -> None:
        self._stream = stream
        self._buffer = memoryview(bytearray(RECEIVE_SIZE))
        self._batch = memoryview(bytes(BATCH_BYTES))
        self._rest = self._batch
        self._unit = MEBIBYTE if up else 1
        self._closed = False
        self.arrived = 0
        loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = loop.create_future()
        loop.add_reader(stream.fd, self._on_readable)
        if up:
            loop.add_writer(stream.fd, self._on_writable)

    def close(self) -> None:
        """Close the stream."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._stream.fd)
        loop.remove_writer(self._stream.fd)
        self._stream.close()
        self._closed = True

    def _on_readable(self) -> None:
        """One receive a turn of the loop, and again at once for what is not announced any more."""
        if self._closed:
            return
        try:
            count = self._stream.recv_into(self._buffer)
        except WOULD_BLOCK:
            return
        if not count:
            self.ended.set_exception(ConnectionError("the stream has ended"))
            self.close()
            return
        self.arrived += count * self._unit
        if self._stream.pending():
            asyncio.get_running_loop().call_soon(self._on_readable)

    def _on_writable(self) -> None:
        """One batch a turn of the loop."""
        try:
            while self._rest:
                self._rest = self._rest[self._stream.send(self._rest) :]
        except WOULD_BLOCK:
            return
        self._rest = self._batch


async def measure(transport: type[ThroughApiServer], target: tuple[str, str], up: bool, seconds: float) -> float:
    """Gb/s that arrived in `seconds`."""
    namespace, pod = target
    async with opened(Access()) as cluster:
        way = transport(cluster, Target(namespace, "pods", pod, SINK if up else SOURCE), b"")
        stream, early = await way.dial(await way.resolve())
        began = time.perf_counter()
        mover = Mover(stream, up)
        mover.arrived += len(early)
        await asyncio.wait([mover.ended], timeout=seconds)
        took = time.perf_counter() - began
        if mover.ended.done():
            mover.ended.result()
        mover.close()
        return mover.arrived * 8 / took / 1e9


def main() -> None:
    """The command described above."""
    parser = argparse.ArgumentParser()
    parser.add_argument("transport", choices=TRANSPORTS)
    parser.add_argument("namespace")
    parser.add_argument("pod")
    parser.add_argument("direction", choices=["up", "down"])
    parser.add_argument("--seconds", type=float, required=True)
    words = parser.parse_args()
    transport, target = TRANSPORTS[words.transport], (words.namespace, words.pod)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        print(json.dumps(runner.run(measure(transport, target, words.direction == "up", words.seconds))))


if __name__ == "__main__":
    main()
