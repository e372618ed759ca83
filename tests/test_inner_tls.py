"""TLS inside any stream: cut and blocked anywhere, big both ways, against OpenSSL's own socket, and ill-meant ends."""

import asyncio
import contextlib
import os
import random
import socket
import ssl
from collections.abc import AsyncIterator, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peers import Certificate, self_signed
from tpvpn.errors import ManagerError, TpvpnError
from tpvpn.link import Link, Memory
from tpvpn.transport.inner_tls import InnerTlsStream, encrypted
from tpvpn.transport.stream import WOULD_BLOCK, Stream
from tpvpn.wire import frame


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return self_signed(tmp_path_factory.mktemp("tls"), "manager")


def server_context(made: Certificate, newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made.certificate, made.key)
    context.maximum_version = newest
    return context


class Choppy(Stream):
    """A connection that gives and takes a few bytes at a time, and often none."""

    def __init__(self, connected: socket.socket, chance: random.Random) -> None:
        super().__init__(connected)
        self._chance = chance
        self.recv_into = self._some
        self.send = self._take

    def _some(self, buffer: memoryview | bytearray) -> int:
        return self.socket.recv_into(memoryview(buffer)[: self._size()])

    def _take(self, data: memoryview | bytes) -> int:
        return self.socket.send(memoryview(data)[: self._size()])

    def _size(self) -> int:
        if self._chance.random() < 0.3:
            raise BlockingIOError
        return self._chance.choice((1, 4, 5, 6, 100, 16_406, 100_000))


@contextlib.asynccontextmanager
async def pair(made: Certificate, near: Stream, far: Stream) -> AsyncIterator[tuple[InnerTlsStream, InnerTlsStream]]:
    """Both ends, with their handshake done: the client's and the manager's."""
    manager = InnerTlsStream(
        far, server_context(made), certificate=ssl.PEM_cert_to_DER_cert(made.certificate.read_text())
    )
    client, _ = await asyncio.gather(encrypted(near, b"", made.digest, "the manager"), manager.handshake())
    assert client.certificate_hash == manager.certificate_hash == made.digest
    try:
        yield client, manager
    finally:
        client.close()
        manager.close()


class Half:
    """What one end sends, and what it has received."""

    def __init__(self, stream: Stream, data: bytes, chance: random.Random) -> None:
        self.stream, self.data, self.received = stream, memoryview(data), bytearray()
        self._chance = chance
        self._piece = 0

    def turn(self) -> None:
        """Send a piece, again the same when it was not taken; receive something."""
        if self.data:
            self._piece = self._piece or self._chance.choice((1, 1000, 16_384, 16_385, 300_000))
            with contextlib.suppress(*WOULD_BLOCK):
                self.data = self.data[self.stream.send(self.data[: self._piece]) :]
                self._piece = 0
        buffer = bytearray(self._chance.choice((1, 16, 20_000, 1 << 19)))
        with contextlib.suppress(*WOULD_BLOCK):
            self.received += buffer[: self.stream.recv_into(buffer)]


@given(st.integers(0, 1 << 32))
def test_all_bytes_pass_wherever_they_are_cut_and_blocked(made: Certificate, seed: int) -> None:
    chance = random.Random(seed)

    async def scenario() -> None:
        near, far = (Choppy(one, chance) for one in socket.socketpair())
        async with pair(made, near, far) as (client, manager):
            up, down = (chance.randbytes(chance.choice((1, 16_384, 200_000))) for _ in range(2))
            one, other = Half(client, up, chance), Half(manager, down, chance)
            while len(one.received) < len(down) or len(other.received) < len(up):
                one.turn()
                other.turn()
            assert (one.received, other.received) == (down, up)

    asyncio.run(scenario())


class Flood:
    """A link's end that sends so many batches as fast as it may, and counts what comes, in order."""

    def __init__(self, stream: Stream, batches: int) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._left, self._expected, self._next = batches, batches * 8, 0
        self.link = Link(stream, self._lost)
        self.link.receive = self._receive
        self.link.on_drained = self.send
        self._sent = 0

    def send(self) -> None:
        while self._left and not self.link.congested:
            self._left -= 1
            numbers = range(self._sent, self._sent + 8)
            self._sent += 8
            batch = b"".join(frame.encode(frame.PACKET, number.to_bytes(4, "big") * 16_000) for number in numbers)
            self.link.send_batch(memoryview(batch))

    def _receive(self, buffer: Memory, start: int, end: int) -> int:
        while end - start >= 4 and end - start >= 4 + (length := frame.HEADER.unpack_from(buffer, start)[0] & 0xFFFFFF):
            assert buffer[start + 4 : start + 4 + length] == self._next.to_bytes(4, "big") * 16_000
            self._next += 1
            start += 4 + length
        if self._next == self._expected and not self.done.done():
            self.done.set_result(None)
        return start

    def _lost(self, error: TpvpnError) -> None:
        if not self.done.done():
            self.done.set_exception(error)


def test_links_carry_much_both_ways_at_once(made: Certificate) -> None:
    """61 MB each way: the connection is full in both directions, and neither end waits for the other."""

    async def scenario() -> None:
        near, far = socket.socketpair()
        async with pair(made, Stream(near), Stream(far)) as ends, asyncio.timeout(30):
            floods = [Flood(end, 120) for end in ends]
            for flood in floods:
                flood.send()
            await asyncio.gather(*(flood.done for flood in floods))
            for flood in floods:
                flood.link.close()

    asyncio.run(scenario())


def test_what_was_not_flushed_is_owed_and_not_sent_twice(made: Certificate) -> None:
    async def scenario() -> None:
        near, far = socket.socketpair()
        async with pair(made, Stream(near), Stream(far)) as (client, manager):
            data = os.urandom(1 << 22)
            at = 0
            with pytest.raises(BlockingIOError):
                while True:
                    at += client.send(memoryview(data)[at:])
            with pytest.raises(BlockingIOError):
                client.send(memoryview(data)[at:])
            received = bytearray()
            while len(received) < len(data):
                with contextlib.suppress(BlockingIOError):
                    while at < len(data):
                        at += client.send(memoryview(data)[at:])
                received += await manager.receive(1 << 19)
            assert received == data
            with pytest.raises(WOULD_BLOCK):
                manager.recv_into(bytearray(1))
            assert manager.pending() == 0

    asyncio.run(scenario())


def test_what_the_descriptor_does_not_announce_is_pending(made: Certificate) -> None:
    async def scenario() -> None:
        near, far = socket.socketpair()
        async with pair(made, Stream(near), Stream(far)) as (client, manager):
            for _ in range(3):
                await manager.send_all(bytes(1000))
            await client.readable()
            for _ in range(6):
                assert client.recv_into(bytearray(500)) == 500
                assert client.pending()
            with pytest.raises(WOULD_BLOCK):
                client.recv_into(bytearray(500))
            assert not client.pending()

    asyncio.run(scenario())


# -- ends that are not as they should be -------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def against(behave: Callable[[socket.socket], object]) -> AsyncIterator[Stream]:
    """A stream to a blocking socket that another thread plays."""
    near, far = socket.socketpair()
    far.settimeout(5)

    def play() -> None:
        with far, contextlib.suppress(OSError):
            behave(far)

    playing = asyncio.create_task(asyncio.to_thread(play))
    try:
        yield Stream(near)
    finally:
        near.close()
        await playing


def refused(behave: Callable[[socket.socket], object], pin: bytes) -> str:
    async def scenario() -> None:
        async with against(behave) as below, asyncio.timeout(5):
            await encrypted(below, b"", pin, "the manager pods/x/y:7070")

    with pytest.raises((ManagerError, OSError)) as caught:
        asyncio.run(scenario())
    return str(caught.value)


def test_a_wrong_pin_and_servers_that_are_not_it(made: Certificate) -> None:
    def over_tls(newest: ssl.TLSVersion) -> Callable[[socket.socket], object]:
        def behave(far: socket.socket) -> None:
            with server_context(made, newest).wrap_socket(far, server_side=True) as tls:
                tls.recv(1)

        return behave

    wrong = refused(over_tls(ssl.TLSVersion.TLSv1_3), bytes(32))
    assert wrong == f"the certificate of the manager pods/x/y:7070 is not the pinned one: it has {made.pin}"
    assert "does not speak TLS as expected" in refused(over_tls(ssl.TLSVersion.TLSv1_2), made.digest)
    said = refused(lambda far: (far.recv(1000), far.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")), made.digest)
    assert "does not speak TLS as expected" in said
    assert "closed in the middle of the TLS handshake" in refused(lambda far: far.recv(1000), made.digest)


@pytest.mark.parametrize(
    "last", [b"\x17\x03\x03\x00\x20" + bytes(32), b"\x17\x03\x03", b""], ids=["forged", "cut", "end"]
)
def test_what_was_decrypted_before_an_error_or_the_end_is_not_lost(made: Certificate, last: bytes) -> None:
    def behave(far: socket.socket) -> None:
        with server_context(made).wrap_socket(far, server_side=True) as tls:
            tls.sendall(b"goodbye")
            with socket.socket(fileno=os.dup(tls.fileno())) as raw:
                raw.sendall(last)

    async def scenario() -> None:
        async with against(behave) as below, asyncio.timeout(5):
            stream = await encrypted(below, b"", made.digest, "the manager")
            lost: asyncio.Future[TpvpnError] = asyncio.get_running_loop().create_future()
            heard = bytearray()

            def receive(buffer: Memory, start: int, end: int) -> int:
                heard.extend(buffer[start:end])
                return end

            link = Link(stream, lost.set_result)
            link.receive = receive
            assert "closed" in str(await lost) or "broke" in str(await asyncio.shield(lost))
            assert heard == b"goodbye"

    asyncio.run(scenario())
