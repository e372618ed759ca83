"""The client's end of virtual subnets: what it makes of a manager's answers, and real flows through a real manager."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field

import pytest

from peers import Manager, lab, running_manager
from pod import inside, run
from tpvpn import tunnel as module
from tpvpn.errors import LinkLostError, ManagerError, ProtocolError, TpvpnError
from tpvpn.lab import Lab
from tpvpn.lab.topology import PODS, PODS6, SERVICES
from tpvpn.proto import message
from tpvpn.proto.session import Offer, Terms
from tpvpn.transport.stream import Stream
from tpvpn.transport.tcp import Direct, parse_endpoint
from tpvpn.tun import Tun, open_tun
from tpvpn.tunnel import Tunnel, shake_hands
from tpvpn.wire import frame, vnet
from tpvpn.wire.vnet import Offload

__all__ = ["lab"]

TERMS = Terms("s1", "246.0.0.7", None, 1500, [], {"ipv4": "kernel", "ipv6": None}, "pod-0")
FOUR = [("246.130.0.0/16", "10.130.0.0/16")]


@dataclass
class Played:
    """A manager at the other end of a tunnel, played by the test."""

    tunnel: Tunnel
    far: socket.socket
    ends: list[TpvpnError]
    answers: list[tuple[int, bytes]]
    decoder: frame.Decoder = field(default_factory=frame.Decoder)

    async def hear(self) -> message.Message:
        """The next control message."""
        while True:
            for _kind, payload in self.decoder.frames():
                return json.loads(payload)
            self.decoder.receive(await asyncio.get_running_loop().sock_recv(self.far, 1 << 16))

    def say(self, kind: str, **members: object) -> None:
        self.far.sendall(frame.encode(frame.CONTROL, message.encode(kind, **members)))


@contextlib.asynccontextmanager
async def played() -> AsyncIterator[Played]:
    (near, far), queues = socket.socketpair(), [socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(2)]
    for one in (near, far, *(side for pair in queues for side in pair)):
        one.setblocking(False)
    ends: list[TpvpnError] = []
    answers: list[tuple[int, bytes]] = []
    tun = Tun(queues[0][0].fileno(), queues[1][0].fileno(), "test", Offload(0))
    tunnel = Tunnel(tun, TERMS, lambda *answer: answers.append(answer))
    link = tunnel.join(0, Stream(near), b"")
    link.lost.add_done_callback(lambda lost: ends.append(lost.result()))
    try:
        yield Played(tunnel, far, ends, answers)
    finally:
        tunnel.close()
        for one in (near, far, *(side for pair in queues for side in pair)):
            one.close()


def play(scenario: Callable[[Played], Awaitable[None]]) -> None:
    async def playing() -> None:
        async with asyncio.timeout(5), played() as manager:
            await scenario(manager)

    asyncio.run(playing())


def test_a_mapping_is_in_force_when_the_manager_says_so() -> None:
    async def scenario(manager: Played) -> None:
        changing = asyncio.create_task(manager.tunnel.set_virtual(FOUR))
        asked = await manager.hear()
        assert asked == {"type": "config", "id": 1, "virtual": [["246.130.0.0/16", "10.130.0.0/16"]]}
        assert not changing.done()
        manager.say("config", id=1)
        await changing
        changing = asyncio.create_task(manager.tunnel.set_virtual([]))
        assert await manager.hear() == {"type": "config", "id": 2, "virtual": []}
        manager.say("config", id=2)
        await changing

    play(scenario)


def test_what_a_later_version_may_send_is_skipped() -> None:
    async def scenario(manager: Played) -> None:
        manager.say("weather", rain=True)
        for kind in (frame.DNS, 3, 99, 255):
            manager.far.sendall(frame.encode(kind, b"from the future") + frame.encode(kind, b""))
        manager.say("ping", id=7, colour="blue", wanted=100)  # which a client does not give
        assert await manager.hear() == {"type": "pong", "id": 7}
        assert manager.ends == []

    play(scenario)


def test_questions_travel_and_answers_come_back() -> None:
    async def scenario(manager: Played) -> None:
        manager.tunnel.ask(0xBEEF, b"a question")
        while not (came := list(manager.decoder.frames())):
            manager.decoder.receive(await asyncio.get_running_loop().sock_recv(manager.far, 1 << 16))
        assert came == [(frame.DNS, b"\xbe\xefa question")]
        manager.far.sendall(frame.encode(frame.DNS, b"\xbe\xefan answer") + frame.encode(frame.DNS, b"\x07"))
        manager.say("ping", id=1)
        await manager.hear()
        assert manager.answers == [(0xBEEF, b"an answer"), (7, b"")]
        manager.tunnel.close()
        manager.tunnel.ask(1, b"too late")

    play(scenario)


def test_a_refusal_has_the_managers_words() -> None:
    async def scenario(manager: Played) -> None:
        changing = asyncio.create_task(manager.tunnel.set_virtual(FOUR))
        await manager.hear()
        manager.say("config", id=1, error="no room\x1b[2J" + "x" * 1000)
        with pytest.raises(ManagerError, match=r"the manager refuses the virtual subnets: no room\?\[2Jxxx") as caught:
            await changing
        assert len(str(caught.value)) < 400
        assert manager.ends == []

    play(scenario)


def test_a_manager_that_says_nothing_is_to_be_upgraded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONFIG_TIMEOUT", 0.1)

    async def scenario(manager: Played) -> None:
        with pytest.raises(
            ManagerError, match=r"the manager did not confirm the virtual subnets within .*: upgrade it"
        ):
            await manager.tunnel.set_virtual(FOUR)
        # What it says too late is not the answer to the next change.
        await manager.hear()
        changing = asyncio.create_task(manager.tunnel.set_virtual([]))
        assert (await manager.hear())["id"] == 2
        manager.say("config", id=1, error="late")
        manager.say("config", id=2)
        await changing

    play(scenario)


def test_answers_to_no_question_are_skipped() -> None:
    async def scenario(manager: Played) -> None:
        manager.say("config", id=1)
        manager.say("config", id=0, error=[])
        manager.say("config")
        changing = asyncio.create_task(manager.tunnel.set_virtual(FOUR))
        await manager.hear()
        for number in (0, 2, "1", None, [1]):
            manager.say("config", id=number, error="not yours")
        manager.say("config", id=1)
        manager.say("config", id=1, error="once more")
        await changing
        assert manager.ends == []

    play(scenario)


def test_an_answer_that_is_none_ends_the_link() -> None:
    async def scenario(manager: Played) -> None:
        changing = asyncio.create_task(manager.tunnel.set_virtual(FOUR))
        await manager.hear()
        manager.say("config", id=1, error={"text": "no"})
        with pytest.raises(ProtocolError, match="no proper error"):
            await changing
        assert [type(error) for error in manager.ends] == [ProtocolError]

    play(scenario)


ENDINGS: dict[str, tuple[Callable[[Played], None], str]] = {
    "closed": (lambda manager: manager.far.shutdown(socket.SHUT_RDWR), "the connection was closed by the other end"),
    "goodbye": (lambda manager: manager.say("goodbye", reason="bye"), "the manager ended the session: bye"),
    "by us": (lambda manager: manager.tunnel.close(), "the session was closed"),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_end_of_the_link_is_the_end_of_waiting(ending: str) -> None:
    end, said = ENDINGS[ending]

    async def scenario(manager: Played) -> None:
        changes = [asyncio.create_task(manager.tunnel.set_virtual(FOUR)) for _ in range(3)]
        await manager.hear()
        end(manager)
        for change in changes:
            with pytest.raises(LinkLostError, match=said):
                await change
        with pytest.raises(LinkLostError, match=said):
            await manager.tunnel.set_virtual([])

    play(scenario)


def test_changes_are_asked_for_one_after_the_other_and_can_be_given_up() -> None:
    async def scenario(manager: Played) -> None:
        first, second = (asyncio.create_task(manager.tunnel.set_virtual(pairs)) for pairs in (FOUR, []))
        assert (await manager.hear())["virtual"] == [list(FOUR[0])]
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        manager.say("config", id=1, error="nobody hears it")
        assert (await manager.hear())["virtual"] == []
        manager.say("config", id=2)
        await second

    play(scenario)


def test_a_goodbye_is_waited_for_until_the_manager_has_heard_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PARTING", 4.0)

    async def scenario(manager: Played) -> None:
        for _ in range(50):  # it waits behind more than the socket takes
            manager.tunnel.ask(1, bytes(60_000))
        leaving = asyncio.create_task(manager.tunnel.leave())
        await asyncio.sleep(0)
        manager.say("ping", id=1)  # unread bytes
        while True:
            manager.decoder.receive(await asyncio.get_running_loop().sock_recv(manager.far, 1 << 16))
            controls = [json.loads(payload) for kind, payload in manager.decoder.frames() if kind == frame.CONTROL]
            if any(one["type"] == "goodbye" for one in controls):
                break
            assert not leaving.done()
        manager.far.close()
        await leaving

    play(scenario)


def test_or_until_it_seems_not_to_hear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PARTING", 0.05)
    play(lambda manager: manager.tunnel.leave())


def test_a_speed_that_cannot_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SPEED_TIMEOUT", 0.05)

    async def scenario(manager: Played) -> None:
        with pytest.raises(LinkLostError, match="very slow, or silent"):
            await manager.tunnel.measure_speed()
        (first := await manager.hear()).pop("padding")
        assert first == {"type": "ping", "id": -1}
        manager.far.shutdown(socket.SHUT_RDWR)
        while not manager.ends:
            await asyncio.sleep(0.001)
        with pytest.raises(LinkLostError, match="closed by the other end"):
            await manager.tunnel.measure_speed()

    play(scenario)


def test_a_speed_is_of_its_own_answers() -> None:
    """Late ones of a measurement that was given up are of no other."""

    async def scenario(manager: Played) -> None:
        given_up = asyncio.create_task(manager.tunnel.measure_speed())
        late = (await manager.hear())["id"]
        given_up.cancel()
        measured = asyncio.create_task(manager.tunnel.measure_speed())
        for _ in range(100):
            manager.say("pong", id=late)
        asked = await manager.hear()
        assert asked["id"] < late
        manager.say("pong", id=asked["id"])
        assert await manager.hear()
        measured.cancel()

    play(scenario)


def test_a_link_that_is_lost_meanwhile_ends_the_measurement() -> None:
    async def scenario(manager: Played) -> None:
        measured = asyncio.create_task(manager.tunnel.measure_speed())
        await manager.hear()
        manager.far.shutdown(socket.SHUT_RDWR)
        with pytest.raises(LinkLostError, match="closed by the other end"):
            await measured

    play(scenario)


def test_nothing_follows_a_goodbye() -> None:
    async def scenario(manager: Played) -> None:
        measured = asyncio.create_task(manager.tunnel.measure_speed())
        asked = await manager.hear()
        leaving = asyncio.create_task(manager.tunnel.leave())
        assert (await manager.hear())["type"] == "goodbye"
        manager.say("pong", id=asked["id"])
        with pytest.raises(LinkLostError, match="the session was closed"):
            await measured
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.1):
                raise AssertionError(await manager.hear())
        manager.far.close()
        await leaving

    play(scenario)


# -- through a real manager --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def manager(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Manager]:
    with running_manager(lab, tmp_path_factory.mktemp("manager")) as manager:
        yield manager


@contextlib.asynccontextmanager
async def connected(manager: Manager, laptop: str) -> AsyncIterator[Tunnel]:
    """A tunnel from the laptop, with both pools of virtual subnets routed into it."""
    endpoint = parse_endpoint(f"tcp://{manager.authority}")
    stream, early = await Direct(endpoint).dial([manager.address[0]])
    offer = Offer("laptop", offloads=vnet.names(Offload.ALL))
    held, early = await shake_hands(stream, early, manager.token, offer)
    terms = held.terms
    with contextlib.closing(open_tun("tun7", offload=True)) as tun:
        tun.set_offloads(tun.offloads & vnet.from_names(terms.offloads))
        for words in (
            f"address add {terms.ipv4}/32 dev tun7",
            f"address add {terms.ipv6}/128 dev tun7 nodad",
            f"link set tun7 mtu {terms.mtu} up",
            "route add 246.128.0.0/9 dev tun7",
            f"route add fd74:7077::/32 dev tun7 src {terms.ipv6}",
        ):
            run("ip", "-n", laptop, *words.split())
        with contextlib.closing(Tunnel(tun, terms)) as tunnel:
            link = tunnel.join(0, stream, early)
            yield tunnel
            assert link.is_well


def virtual(address: str) -> str:
    """Where the tests put an address of the cluster."""
    return address.replace("10.", "246.", 1) if "." in address else address.replace("fd10:", "fd74:7077:", 1)


REAL = [("246.130.0.0/16", "10.130.0.0/16"), ("246.132.0.0/16", "10.132.0.0/16")]
REAL6 = [("fd74:7077:132::/64", "fd10:132::/64")]


async def pinged(laptop: str, address: str) -> bool:
    ping = ["ip", "netns", "exec", laptop, "ping", "-c1", "-W1", address]
    process = await asyncio.create_subprocess_exec(*ping, stdout=asyncio.subprocess.DEVNULL)
    return await process.wait() == 0


def test_real_flows_through_virtual_subnets(manager: Manager, lab: Lab) -> None:
    laptop = lab.namespace("laptop")

    async def scenario() -> None:
        async with asyncio.timeout(20), connected(manager, laptop) as tunnel:
            assert not await pinged(laptop, virtual(PODS[0]))
            await tunnel.set_virtual(REAL + REAL6)
            for address in (PODS[0], SERVICES[0], PODS6[0]):
                assert await pinged(laptop, virtual(address)), address
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection(virtual(PODS[0]), 9)
            with pytest.raises(ManagerError, match=r"the manager refuses the virtual subnets: .* overlap"):
                await tunnel.set_virtual([*REAL, REAL[0]])
            assert await pinged(laptop, virtual(PODS[0]))
            await tunnel.set_virtual([])
            assert not await pinged(laptop, virtual(PODS[0]))

    with inside(laptop):
        asyncio.run(scenario())


@pytest.mark.parametrize("address", [PODS[0], PODS6[0]], ids=["ipv4", "ipv6"])
def test_a_bulk_transfer_lives_through_replacements(manager: Manager, lab: Lab, address: str) -> None:
    """Megabytes go forth and back through the kernel's own TCP while the mapping is replaced again and again."""
    laptop = lab.namespace("laptop")
    with inside(lab.namespace("cluster")):
        listening = socket.create_server((address, 7007), family=socket.AF_INET6 if ":" in address else socket.AF_INET)

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def scenario() -> None:
        async with (
            asyncio.timeout(30),
            connected(manager, laptop) as tunnel,
            await asyncio.start_server(echo, sock=listening),
        ):
            await tunnel.set_virtual(REAL + REAL6)
            reader, writer = await asyncio.open_connection(virtual(address), 7007)
            sent = bytes(range(256)) * (1 << 16)
            writer.write(sent)
            writer.write_eof()
            received = asyncio.create_task(reader.read())
            replaced = 0
            while not received.done() or replaced < 5:
                await tunnel.set_virtual((REAL + REAL6)[:: -1 if replaced % 2 else 1])
                replaced += 1
            assert await received == sent
            writer.close()

    with inside(laptop):
        asyncio.run(scenario())
