"""A link whose other end asks much and reads late: frames stay whole and in order."""

import asyncio
import contextlib
import socket

import pytest

from tpvpn.link import Link, Memory
from tpvpn.transport.stream import Stream
from tpvpn.wire import frame


async def everything(late: socket.socket) -> list[tuple[int, bytes]]:
    """All frames up to a moment of silence."""
    decoder, frames = frame.Decoder(), list[tuple[int, bytes]]()
    with contextlib.suppress(TimeoutError):
        while True:
            data = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(late, 1 << 16), 0.2)
            decoder.receive(data)
            frames += decoder.frames()
    assert decoder.remainder() == b""
    return frames


def test_packets_wait_for_the_rest_of_a_control_frame() -> None:
    """A pong did not fit the connection; the TUN, which nobody paused, then gives a batch."""

    async def scenario() -> None:
        ours, late = socket.socketpair()
        late.setblocking(False)
        link = Link(Stream(ours), lambda error: pytest.fail(str(error)))
        stack.callback(link.close)
        stack.enter_context(late)
        sent: list[tuple[int, bytes]] = []
        while not link.congested:
            sent.append((frame.CONTROL, bytes([len(sent) % 256]) * 5000))
            link.send(*sent[-1])
        sent.append((frame.PACKET, b"p" * 1000))
        link.send_batch(memoryview(frame.encode(*sent[-1])))
        sent.append((frame.CONTROL, b"last"))
        link.send(*sent[-1])
        assert link.congested
        received = await everything(late)
        assert sorted(received) == sorted(sent)
        assert [one for one in received if one[0]] == [one for one in sent if one[0]]

    with contextlib.ExitStack() as stack:
        asyncio.run(scenario())


def test_frames_that_are_left_come_before_all_later_ones() -> None:
    """A receiver that takes two frames a turn has all of them, in order, also those behind which the stream ended."""

    async def scenario() -> None:
        ours, sender = socket.socketpair()
        ended = asyncio.get_running_loop().create_future()
        link = Link(Stream(ours), ended.set_result)
        stack.callback(link.close)
        received: list[bytes] = []

        def receive(buffer: Memory, start: int, end: int) -> int:
            at = start
            for _ in range(2):
                header = frame.HEADER.unpack_from(buffer, at)[0] if end - at >= 4 else 1 << 30
                following = at + 4 + (header & 0xFFFFFF)
                if following > end:
                    return at
                received.append(bytes(buffer[at + 4 : following]))
                at = following
            link.leave()
            return at

        link.receive = receive
        sent = [bytes([number]) * number for number in range(1, 251)]
        with sender:
            for first in (0, 100):
                sender.sendall(b"".join(frame.encode(frame.PACKET, one) for one in sent[first : first + 100]))
                await asyncio.sleep(0)
            sender.sendall(b"".join(frame.encode(frame.PACKET, one) for one in sent[200:]))
        await asyncio.wait_for(ended, 2)
        assert received == sent

    with contextlib.ExitStack() as stack:
        asyncio.run(scenario())
