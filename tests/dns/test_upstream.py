"""The servers of before for real: sockets on loopback, in a namespace of the test's own; the servers are the test's."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator

import pytest

from pod import namespace
from stub import LOOPS, play
from tpvpn.dns.upstream import LIMIT, USES, Upstream
from tpvpn.wire import dns
from tpvpn.wire.dns import Rcode

FIRST, SECOND, THIRD = "127.0.0.11", "127.0.0.12", "::1"
QUERY = dns.query(dns.labels("Host.example"), dns.A, 0x1234)
Answer = Callable[[bytes], bytes | None]


@pytest.fixture(scope="module")
def network() -> Iterator[str]:
    with namespace("upstream") as name:
        yield name


@pytest.fixture(params=LOOPS)
def loop(request: pytest.FixtureRequest) -> str:
    return request.param


class Played(asyncio.DatagramProtocol):
    """A server, over UDP and TCP; `heard` are the questions, with where they came from."""

    def __init__(self, address: str, answer: Answer) -> None:
        self.address, self.answer = address, answer
        self.heard: list[tuple[tuple[str, int], bytes]] = []
        self.over_tcp = 0

    async def __aenter__(self) -> "Played":
        loop = asyncio.get_running_loop()
        self.transport, _ = await loop.create_datagram_endpoint(lambda: self, (self.address, 53))
        self.server = await asyncio.start_server(self.converse, self.address, 53)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.transport.close()
        self.server.close()
        await asyncio.sleep(0.01)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.heard.append((addr, data))
        if answer := self.answer(data):
            self.transport.sendto(answer, addr)

    async def converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.over_tcp += 1
        message = await reader.readexactly(int.from_bytes(await reader.readexactly(2)))
        if answer := self.answer(message):
            writer.write(len(answer).to_bytes(2) + answer)
        await reader.read()
        writer.close()


def saying(rcode: Rcode) -> Answer:
    return lambda message: dns.reply(message, rcode)


def silent(_: bytes) -> None:
    return None


async def ask(upstream: Upstream, message: bytes = QUERY, tcp: bool = False) -> tuple[bytes | None, float]:
    """The answer, and the seconds it took."""
    answer: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
    began = time.monotonic()
    upstream.ask(message, answer.set_result, tcp=tcp)
    return await answer, time.monotonic() - began


def servers(network: str, loop: str, answers: dict[str, Answer], scenario: Callable[..., Awaitable[None]]) -> None:
    """Play with the servers given, all of which are asked; those without an answer do not exist."""

    async def playing() -> None:
        upstream = Upstream()
        played = [Played(address, answer) for address, answer in answers.items()]
        for one in played:
            await one.__aenter__()
        try:
            await scenario(upstream, *played)
        finally:
            upstream.close()
            for one in played:
                await one.__aexit__()

    play(network, loop, playing)


@pytest.mark.parametrize("tcp", [False, True])
def test_an_answer_is_passed_on_as_it_came(network: str, loop: str, tcp: bool) -> None:
    async def scenario(upstream: Upstream, first: Played, third: Played) -> None:
        for server in (FIRST, THIRD):
            upstream.set([server])
            answer, took = await ask(upstream, QUERY + b"whatever", tcp)
            assert answer == dns.reply(QUERY, Rcode.NXDOMAIN) and took < 0.5
        assert (first.over_tcp, third.over_tcp) == (tcp, tcp)
        if not tcp:
            assert first.heard[0][1][2:] == (QUERY + b"whatever")[2:]

    servers(network, loop, {FIRST: saying(Rcode.NXDOMAIN), THIRD: saying(Rcode.NXDOMAIN)}, scenario)


def test_nobody_to_ask_is_no_answer(network: str, loop: str) -> None:
    async def scenario(upstream: Upstream) -> None:
        for there in ([], ["127.0.0.99"], ["192.0.2.1", "2001:db8::1", "127.0.0.99", "no address"]):
            upstream.set(there)
            for tcp in (False, True):
                answer, took = await ask(upstream, tcp=tcp)
                assert answer is None and took < 0.5, (there, tcp)

    servers(network, loop, {}, scenario)


@pytest.mark.parametrize("tcp", [False, True])
def test_the_next_is_asked_at_once_when_one_cannot_be_reached(network: str, loop: str, tcp: bool) -> None:
    async def scenario(upstream: Upstream, second: Played) -> None:
        upstream.set(["192.0.2.1", "127.0.0.99", SECOND])
        for _ in range(2):
            answer, took = await ask(upstream, tcp=tcp)
            assert answer == dns.reply(QUERY, Rcode.NOERROR) and took < 0.5

    servers(network, loop, {SECOND: saying(Rcode.NOERROR)}, scenario)


@pytest.mark.parametrize("tcp", [False, True])
def test_the_next_is_asked_after_a_second_of_silence(network: str, loop: str, tcp: bool) -> None:
    async def scenario(upstream: Upstream, first: Played, second: Played) -> None:
        upstream.set([FIRST, SECOND])
        answer, took = await ask(upstream, tcp=tcp)
        assert answer == dns.reply(QUERY, Rcode.NOERROR) and 0.9 < took < 1.5
        assert bool(first.heard) != tcp

    servers(network, loop, {FIRST: silent, SECOND: saying(Rcode.NOERROR)}, scenario)


@pytest.mark.parametrize("tcp", [False, True])
def test_silence_ends_in_time(network: str, loop: str, tcp: bool) -> None:
    async def scenario(upstream: Upstream, first: Played) -> None:
        upstream.set([FIRST])
        answer, took = await ask(upstream, tcp=tcp)
        assert answer is None and 2.5 < took < 3
        if not tcp:
            assert len(first.heard) == 3  # once a second: a datagram may be lost

    servers(network, loop, {FIRST: silent}, scenario)


def test_a_late_answer_is_welcome(network: str, loop: str) -> None:
    async def scenario(upstream: Upstream, first: Played, second: Played) -> None:
        upstream.set([FIRST, SECOND])
        asking = asyncio.create_task(ask(upstream))
        while not second.heard:
            await asyncio.sleep(0.01)
        first.transport.sendto(dns.reply(first.heard[0][1], Rcode.NOERROR), first.heard[0][0])
        assert (await asking)[0] == dns.reply(QUERY, Rcode.NOERROR)

    servers(network, loop, {FIRST: silent, SECOND: silent}, scenario)


@pytest.mark.parametrize("tcp", [False, True])
def test_one_that_could_not_find_out_is_followed_by_the_next(network: str, loop: str, tcp: bool) -> None:
    async def scenario(upstream: Upstream, first: Played, second: Played) -> None:
        upstream.set([FIRST, SECOND])
        assert (await ask(upstream, tcp=tcp))[0] == dns.reply(QUERY, Rcode.NOERROR)
        upstream.set([FIRST])
        answer, took = await ask(upstream, tcp=tcp)
        assert answer == dns.reply(QUERY, Rcode.REFUSED) and took < 0.5

    servers(network, loop, {FIRST: saying(Rcode.REFUSED), SECOND: saying(Rcode.NOERROR)}, scenario)


def test_what_is_truncated_is_passed_on(network: str, loop: str) -> None:
    def truncated(message: bytes) -> bytes:
        return dns.reply(message, Rcode.NOERROR, dns.RA | dns.TC)

    async def scenario(upstream: Upstream, first: Played) -> None:
        upstream.set([FIRST])
        answer, _ = await ask(upstream)
        assert answer and dns.is_truncated(answer) and not first.over_tcp

    servers(network, loop, {FIRST: truncated}, scenario)


def test_a_forged_answer_is_dropped(network: str, loop: str) -> None:
    def forged(message: bytes) -> bytes:
        return dns.reply(dns.with_identity(message, int.from_bytes(message[:2]) ^ 1), Rcode.NOERROR)

    async def scenario(upstream: Upstream, first: Played, second: Played) -> None:
        upstream.set([FIRST, SECOND])
        answer, took = await ask(upstream)
        assert answer == dns.reply(QUERY, Rcode.NXDOMAIN) and took > 0.9

    servers(network, loop, {FIRST: forged, SECOND: saying(Rcode.NXDOMAIN)}, scenario)


def test_ports_and_ids_are_random(network: str, loop: str) -> None:
    async def scenario(upstream: Upstream, first: Played) -> None:
        upstream.set([FIRST])
        for _ in range(3 * USES):
            await ask(upstream)
        ports = [sender[1] for sender, _ in first.heard]
        assert len(set(ports)) == 3
        identities = [message[:2] for _, message in first.heard]
        assert len(set(identities)) > 2.9 * USES and identities != sorted(identities)

    servers(network, loop, {FIRST: saying(Rcode.NOERROR)}, scenario)


def test_questions_are_bounded_and_sockets_go(network: str, loop: str) -> None:
    async def scenario(upstream: Upstream, first: Played) -> None:
        upstream.set([FIRST])
        got: list[bytes | None] = []
        for _ in range(LIMIT):
            upstream.ask(QUERY, got.append)
        assert not got
        upstream.ask(QUERY, got.append)
        assert got == [None]
        while len(got) < LIMIT + 1:
            await asyncio.sleep(0.05)
        assert set(got) == {None}
        upstream.set([])
        assert not [one for one in sockets() if one == 53]

    servers(network, loop, {FIRST: silent}, scenario)


def sockets() -> list[int]:
    """The ports to which this process's UDP sockets are connected."""
    found = list[int]()
    with open("/proc/thread-self/net/udp") as table:
        for line in list(table)[1:]:
            found.append(int(line.split()[2].rpartition(":")[2], 16))
    return found


def test_closing_forgets_all(network: str, loop: str) -> None:
    async def scenario(upstream: Upstream, first: Played) -> None:
        upstream.set([FIRST])
        got: list[bytes | None] = []
        upstream.ask(QUERY, got.append)
        upstream.ask(QUERY, got.append, tcp=True)
        await asyncio.sleep(0.05)
        upstream.close()
        await asyncio.sleep(0.05)
        assert not got and not [one for one in sockets() if one == 53]

    servers(network, loop, {FIRST: silent}, scenario)
