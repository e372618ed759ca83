"""The heartbeat of a link, over real connections: what it asks, what it tells, and what it costs."""

import asyncio
import contextlib
import json
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Iterator

import pytest
import uvloop

from tpvpn.bundle import Bundle
from tpvpn.errors import TpvpnError
from tpvpn.heartbeat import Heartbeat
from tpvpn.link import Link
from tpvpn.proto import liveness
from tpvpn.transport.stream import Stream
from tpvpn.wire import frame


@contextlib.contextmanager
def connection() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a TCP connection over loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        near = socket.create_connection(listening.getsockname())
        far, _ = listening.accept()
    with near, far:
        yield near, far


class Watched:
    """A link that a heartbeat watches, and its other end."""

    def __init__(self, near: socket.socket, far: socket.socket, **times: float) -> None:
        self.far, self.lost = far, asyncio.get_running_loop().create_future()
        far.setblocking(False)
        self.bundle = Bundle(offload=False)
        self.bundle.receive = lambda buffer, start, end: end
        self.link = Link(Stream(near), self._on_lost)
        self.bundle.join(0, self.link)
        self.beat = Heartbeat(self.link, self.bundle, **times)

    def _on_lost(self, error: TpvpnError) -> None:
        self.beat.stop()
        self.lost.set_result(str(error))

    def close(self) -> None:
        self.beat.stop()
        self.link.close()

    async def asked(self) -> dict[str, object]:
        """The next frame, which is a ping."""
        data = await asyncio.get_running_loop().sock_recv(self.far, 1 << 16)
        decoder = frame.Decoder()
        decoder.receive(data)
        ((kind, payload),) = decoder.frames()
        assert kind == frame.CONTROL
        return json.loads(payload)


def play(scenario: Callable[[Watched], Awaitable[None]], **times: float) -> None:
    async def playing() -> None:
        with connection() as (near, far), contextlib.closing(Watched(near, far, **times)) as watched:
            async with asyncio.timeout(10):
                await scenario(watched)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(playing())


def test_an_error_behind_the_last_bytes_is_noticed() -> None:
    """The loop tells of it once, and then there was something to read."""

    async def scenario(watched: Watched) -> None:
        watched.far.send(b"the last words")
        watched.far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        watched.far.close()
        time.sleep(0.05)  # noqa: ASYNC251  both are there when the loop looks
        assert "reset by peer" in await asyncio.wait_for(watched.lost, 1)

    play(scenario)


def test_one_that_is_idle_is_asked_and_told_silent_and_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "PATIENCE", 0.5)

    async def scenario(watched: Watched) -> None:
        began = time.monotonic()
        assert await watched.asked() == {"type": "ping", "id": 1}
        assert 0.5 <= time.monotonic() - began < 1.5
        await watched.beat.changed.wait()
        assert watched.beat.is_silent
        assert not watched.bundle.is_linked
        assert await watched.lost == "the other end did not answer for 2 s"
        assert 2 <= time.monotonic() - began < 3

    play(scenario, idle=0.5, dead=2.0)


def test_one_that_answers_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "PATIENCE", 0.5)

    async def scenario(watched: Watched) -> None:
        for number in (1, 2):
            assert await watched.asked() == {"type": "ping", "id": number}
            watched.far.send(frame.encode(frame.CONTROL, b'{"type":"pong"}'))
        assert not watched.beat.is_silent
        await watched.asked()
        await watched.beat.changed.wait()
        watched.beat.changed.clear()
        watched.far.send(frame.encode(frame.CONTROL, b'{"type":"pong"}'))
        await watched.beat.changed.wait()
        assert not watched.beat.is_silent
        assert watched.bundle.is_linked

    play(scenario, idle=0.3)


def test_it_costs_less_than_100_bytes_a_second() -> None:
    """Of an idle link, with the answer and all headers of IPv4, TCP and TLS around both, and their acknowledgments."""
    ping = len(frame.encode(frame.CONTROL, b'{"type":"ping","id":99999999}'))
    around = 20 + 32 + 22 + 14
    assert 2 * (ping + around + 20 + 32 + 14) / liveness.IDLE < 100


def test_when_it_is_urged_it_asks_at_once() -> None:
    async def scenario(watched: Watched) -> None:
        began = time.monotonic()
        watched.beat.urge()
        assert await watched.asked() == {"type": "ping", "id": 1}
        assert time.monotonic() - began < 0.5
        await watched.beat.changed.wait()
        assert 1 <= time.monotonic() - began < 2
        assert watched.beat.is_silent

    play(scenario)
