"""The stub resolver for real: sockets in a namespace, dig as client, dnsmasq in the cluster and elsewhere."""

import asyncio
import contextlib
import random
import re
import socket
import struct
import time
from collections.abc import Iterator

import dns.message
import dns.rcode
import pytest

import stub as helper
from stub import HEADLESS, LOOPS, Stub, ask, dig, network, play, stub
from tpvpn.dns import tcp
from tpvpn.dns.policy import Decision
from tpvpn.dns.server import LOOP
from tpvpn.route.prefix import Prefix
from tpvpn.wire.dns import MalformedError

__all__ = ["network"]

DB = "db.shop.svc.cluster.local"


@pytest.fixture(params=LOOPS)
def loop(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param


def short(said: str) -> list[str]:
    return sorted(line for line in said.splitlines() if line)


def answers_of(said: str) -> list[str]:
    """The answer section's records, without TTLs."""
    section = said.partition(";; ANSWER SECTION:\n")[2].partition("\n\n")[0]
    return [" ".join(word for place, word in enumerate(line.split()) if place != 1) for line in section.splitlines()]


def test_all_types_of_records_as_they_are(network: str, loop: str) -> None:
    expected = {
        (DB, "A"): ["10.130.0.7"],
        (DB, "AAAA"): ["fd00:130::7"],
        (f"_http._tcp.{DB}", "SRV"): [f"0 10 80 {DB}."],
        ("7.0.130.10.in-addr.arpa", "PTR"): [f"{DB}."],
        ("one.shop.svc.cluster.local", "A"): ["10.130.0.7", f"{DB}."],
        ("shop.svc.cluster.local", "MX"): [f"5 {DB}."],
        ("txt.shop.svc.cluster.local", "TXT"): ['"hello" "world"'],
        ("shop.svc.cluster.local", "CAA"): ['0 issue "ca.example"'],
        ("odd.shop.svc.cluster.local", "TYPE65280"): [r"\# 4 C00CC00C"],
        ("host.lan.example", "A"): ["192.0.2.7"],
        ("outside", "A"): ["192.0.2.7", "host.lan.example."],
        ("mapped", "A"): ["10.130.0.9"],
        ("mapped", "AAAA"): [],
        ("wpad", "A"): [],
        ("db.shop", "A"): ["10.130.0.7", f"{DB}."],
        ("_http._tcp.db.shop", "SRV"): [f"0 10 80 {DB}.", f"_http._tcp.{DB}."],
    }

    async def scenario() -> None:
        async with stub():
            for how in ((), ("+tcp",), ("+noedns",), ("+bufsize=4096", "+dnssec"), ("+nocookie", "+noad")):
                for (name, kind), records in expected.items():
                    assert short(await dig("+short", *how, name, kind)) == records, (how, name, kind)
            for (name, kind), records in expected.items():
                assert short(await dig("+short", name, kind, server="::1")) == records
            assert "status: NXDOMAIN" in await dig("wpad", "A")
            assert "status: NXDOMAIN" in await dig("no.such.svc.cluster.local", "A")

    play(network, loop, scenario)


def test_an_alias_and_the_flags_of_an_answer(network: str, loop: str) -> None:
    async def scenario() -> None:
        async with stub():
            for said in [await dig("Db.Shop", "A") for _ in range(2)]:
                assert re.search(r";; flags: qr( aa)? rd ra[ ;]", said), said
                assert answers_of(said) == [f"Db.Shop. IN CNAME {DB}.", f"{DB}. IN A 10.130.0.7"]
                assert "OPT PSEUDOSECTION" in said and "COOKIE" not in said
            assert "OPT PSEUDOSECTION" not in await dig("+noedns", "db.shop", "A")
            assert re.search(r";; flags: qr( aa)? ra;", await dig("+norecurse", "+noedns", DB, "A"))

    play(network, loop, scenario)


def test_four_thousand_bytes_come_over_tcp(network: str, loop: str) -> None:
    async def scenario() -> None:
        async with stub():
            name = "long.shop.svc.cluster.local"
            for how in (("+noedns",), ()):
                assert " tc " in await dig("+ignore", *how, name, "TXT")
                for _ in range(2):
                    said = await dig(*how, name, "TXT")
                    assert "(TCP)" in said and len(answers_of(said)) == 17
            assert (
                len(answers_of(await dig("+bufsize=8192", "+notcp", "+ignore", "txt.shop.svc.cluster.local", "TXT")))
                == 1
            )

    play(network, loop, scenario)


def test_a_headless_service_of_a_thousand_pods(network: str, loop: str) -> None:
    async def scenario() -> None:
        async with stub() as made:
            for name in (HEADLESS, "web.shop"):
                cut = await dig("+ignore", name, "A")
                assert " tc " in cut and not answers_of(cut)
                whole = await dig(name, "A")
                assert sum(" A 10.132." in one for one in answers_of(whole)) == 1000
                assert "(TCP)" in whole
            assert made.server.counters.cluster == 2

    play(network, loop, scenario)


def test_what_is_asked_again_is_known(network: str, loop: str) -> None:
    cluster = far_side(ttl=30)

    async def scenario() -> None:
        async with stub() as made:
            made.exchange.attach(lambda identity, message: cluster(made, identity, message))
            for letters in ("a.cluster.local.", "A.cluster.LOCAL."):
                read = await ask(dns.message.make_query(letters, "A"))
                assert read.question[0].name.to_text() == read.answer[0].name.to_text() == letters
            assert (made.server.counters.cluster, made.server.counters.cached) == (1, 1)
            assert len(made.asked) == 1
            await ask(dns.message.make_query("a.cluster.local.", "A", use_edns=0))
            assert len(made.asked) == 2
            made.server.changed()
            await ask(dns.message.make_query("a.cluster.local.", "A"))
            assert len(made.asked) == 3

    play(network, loop, scenario)


def far_side(ttl: int):
    """A cluster whose every name has one address."""

    def answer(made: Stub, identity: int, message: bytes) -> None:
        made.asked.append((identity, message))
        end = message.index(b"\0", 12) + 5
        record = b"\xc0\x0c\0\1\0\1" + struct.pack(">IH", ttl, 4) + bytes([10, 130, 0, 7])
        made.exchange.receive(identity, message[:2] + b"\x85\0\0\1\0\1\0\0\0\0" + message[12:end] + record)

    return answer


def test_the_same_question_is_asked_once(network: str, loop: str) -> None:
    async def scenario() -> None:
        async with stub() as made:
            held: list[tuple[int, bytes]] = []
            made.exchange.attach(lambda identity, message: held.append((identity, message)))
            names = ["one.cluster.local.", "ONE.cluster.local.", "oNe.Cluster.local."] * 20
            queries = [dns.message.make_query(name, "A") for name in names]
            asking = [asyncio.create_task(ask(query)) for query in queries]
            while made.server.counters.joined < len(names) - 1:
                await asyncio.sleep(0.001)
            assert len(held) == 1
            far_side(30)(made, *held[0])
            for query, answer in zip(queries, await asyncio.gather(*asking), strict=True):
                assert query.is_response(answer)
                assert answer.question[0].name.to_text() == query.question[0].name.to_text()

    play(network, loop, scenario)


def test_what_was_asked_before_a_change_is_not_kept(network: str, loop: str) -> None:
    async def scenario() -> None:
        async with stub() as made:
            held: list[tuple[int, bytes]] = []
            made.exchange.attach(lambda identity, message: held.append((identity, message)))
            first = asyncio.create_task(ask(dns.message.make_query("a.cluster.local.", "A")))
            while len(held) < 1:
                await asyncio.sleep(0.001)
            made.server.changed()
            second = asyncio.create_task(ask(dns.message.make_query("a.cluster.local.", "A")))
            while len(held) < 2:
                await asyncio.sleep(0.001)
            far_side(30)(made, *held[0])
            assert (await first).answer
            third = asyncio.create_task(ask(dns.message.make_query("a.cluster.local.", "A")))
            while made.server.counters.joined < 1:
                await asyncio.sleep(0.001)
            far_side(30)(made, *held[1])
            assert (await second).answer and (await third).answer
            assert len(held) == 2

    play(network, loop, scenario)


def test_a_dead_cluster_resolver_is_a_failure_within_three_seconds(network: str, loop: str) -> None:
    async def scenario() -> None:
        async with stub() as made:
            made.exchange.attach(lambda identity, message: None)
            made.upstream.set(["192.0.2.200"])  # no route: at once
            began = time.monotonic()
            gone = await ask(dns.message.make_query("host.lan.example", "A"))
            assert gone.rcode() == dns.rcode.SERVFAIL and time.monotonic() - began < 0.5
            queries = [dns.message.make_query(name, "A") for name in (DB, "db.shop", "x.cluster.local")]
            for answer in await asyncio.gather(*map(ask, queries)):
                assert answer.rcode() == dns.rcode.SERVFAIL
            assert 2.5 < time.monotonic() - began < 3.0
            assert made.server.counters.failed == 4

    play(network, loop, scenario)


def test_a_resolver_that_answers_garbage_is_a_failure(network: str, loop: str) -> None:
    async def scenario() -> None:
        async with stub() as made:
            end = len(dns.message.make_query(DB, "A").to_wire())

            def answer(identity: int, message: bytes) -> None:
                head = message[:2] + b"\x81\x80\0\1\0\1\0\0\0\0"
                made.exchange.receive(identity, b"")
                made.exchange.receive(identity, head)
                made.exchange.receive(identity ^ 1, head + message[12:end] + b"\xc0\xff")
                made.exchange.receive(identity, head + message[12:end] + b"\xc0\xff")

            made.exchange.attach(answer)
            for name in (DB, "db.shop"):
                end = len(dns.message.make_query(DB, "A").to_wire())
                assert (await ask(dns.message.make_query(name, "A"), 1)).rcode() == dns.rcode.SERVFAIL

    play(network, loop, scenario)


def test_virtual_addresses_are_in_answers(network: str, loop: str) -> None:
    async def scenario() -> None:
        async with stub() as made:
            made.server.virtual = ((Prefix.parse("246.130.0.0/16"), Prefix.parse("10.130.0.0/16")),)
            made.server.changed()
            assert short(await dig("+short", "db.shop", "A")) == ["246.130.0.7", f"{DB}."]

    play(network, loop, scenario)


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (("+opcode=STATUS", DB), "NOTIMP"),
        (("+opcode=UPDATE", DB), "NOTIMP"),
        (("CH", "TXT", "version.bind"), "REFUSED"),
        (("HS", "TXT", DB), "REFUSED"),
        (("+tcp", "AXFR", "cluster.local", "+onesoa"), "REFUSED"),
        (("+edns=1", "+noednsneg", DB), "BADVERS"),
        (("+header-only",), "FORMERR"),
    ],
)
def test_what_cannot_be_asked_is_refused(network: str, words: tuple[str, ...], status: str) -> None:
    async def scenario() -> None:
        async with stub() as made:
            said = await dig("+qr", "+comments", *words)
            if "AXFR" in words:
                assert "Transfer failed" in said
            else:
                assert f"status: {status}" in said.partition("Got answer")[2], said
            assert made.server.counters.refused == 1

    play(network, "asyncio", scenario)


def test_a_loop_is_known_and_ends(network: str, loop: str) -> None:
    """The cluster asks this host for what it does not know: that is us."""

    async def scenario() -> None:
        async with stub() as made:

            def forward(identity: int, message: bytes) -> None:
                asked.append(message)
                loop_back.ask(message, lambda answer: answer and made.exchange.receive(identity, answer))

            asked: list[bytes] = []
            loop_back = helper.Upstream()
            loop_back.set(["127.0.0.1"])
            assert not await made.server.probe()
            assert not made.server.looping
            made.exchange.attach(forward)
            assert await made.server.probe()
            began = time.monotonic()
            answer = await ask(dns.message.make_query("a.include", "A"))
            assert answer.rcode() == dns.rcode.NXDOMAIN
            answer = await ask(dns.message.make_query("b.include", "A", use_edns=0, want_dnssec=True))
            assert answer.rcode() == dns.rcode.NXDOMAIN
            assert time.monotonic() - began < 1.0
            assert len(asked) == 3
            made.exchange.attach(made.to_cluster)
            assert not await made.server.probe()
            assert (await ask(dns.message.make_query(f"x.{LOOP}", "A"))).rcode() == dns.rcode.NXDOMAIN
            loop_back.close()

    play(network, loop, scenario)


def test_a_loop_that_is_not_known_ends_too(network: str) -> None:
    async def scenario() -> None:
        async with stub() as made:
            made.upstream.set(["127.0.0.1"])
            began = time.monotonic()
            assert (await ask(dns.message.make_query("a.example", "A"))).rcode() == dns.rcode.SERVFAIL
            assert time.monotonic() - began < 3.0
            assert made.server.counters.elsewhere < 10

    play(network, "asyncio", scenario)


def test_why_can_be_asked(network: str, loop: str) -> None:
    async def scenario() -> None:
        async with stub() as made:
            decision, answer = await made.server.resolve("db.shop", 1)
            assert decision.asked == DB and answer
            assert len(dns.message.from_wire(answer).answer) == 2
            with pytest.raises(MalformedError):
                await made.server.resolve("a..b", 1)
            made.exchange.attach(lambda identity, message: None)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.01):
                    await made.server.resolve("gone.shop", 1)
            assert (await made.server.resolve("gone.shop", 1))[1]  # the first one's answer has nobody to go to

    play(network, loop, scenario)


def test_a_mapping_to_no_name_is_a_failure(network: str) -> None:
    async def scenario() -> None:
        async with stub(lambda name, _: Decision("cluster" if name == "a" else "elsewhere", "test", asked="x..y")):
            for name in ("a", "b"):
                assert (await ask(dns.message.make_query(name, "A"))).rcode() == dns.rcode.SERVFAIL

    play(network, "asyncio", scenario)


# -- TCP ---------------------------------------------------------------------------------------------------------------


async def connect(address: str = "127.0.0.1") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection(address, 53)


async def leave(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


async def heard(reader: asyncio.StreamReader) -> dns.message.Message:
    return dns.message.from_wire(await reader.readexactly(int.from_bytes(await reader.readexactly(2))))


def framed(query: dns.message.Message | bytes) -> bytes:
    message = query if isinstance(query, bytes) else query.to_wire()
    return len(message).to_bytes(2) + message


def test_many_questions_on_one_connection_cut_anywhere(network: str, loop: str) -> None:
    async def scenario() -> None:
        async with stub() as made:
            made.exchange.attach(lambda identity, message: far_side(0)(made, identity, message))
            reader, writer = await connect("::1")
            queries = {n: dns.message.make_query(f"n{n}.cluster.local", "A", id=n) for n in range(200)}
            stream = b"".join(map(framed, queries.values()))
            for at in range(0, len(stream), 37):
                writer.write(stream[at : at + 37])
                await asyncio.sleep(0)
            writer.write_eof()
            while queries:
                answer = await heard(reader)
                assert queries.pop(answer.id).is_response(answer)
            assert await reader.read() == b""
            await leave(writer)

    play(network, loop, scenario)


def test_answers_come_as_they_are_there(network: str, loop: str) -> None:
    async def scenario() -> None:
        async with stub() as made:
            held: list[tuple[int, bytes]] = []
            made.exchange.attach(lambda identity, message: held.append((identity, message)))
            reader, writer = await connect()
            count = tcp.QUESTIONS + 10
            for n in range(count):
                writer.write(framed(dns.message.make_query(f"n{n}.cluster.local", "A", id=n)))
            while len(held) < tcp.QUESTIONS:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.02)
            assert len(held) == tcp.QUESTIONS  # the others wait in the socket
            seen = []
            while len(seen) < count:
                far_side(0)(made, *held.pop())
                seen.append((await heard(reader)).id)
                while not held and len(seen) < count:
                    await asyncio.sleep(0.001)
            assert seen != sorted(seen) and sorted(seen) == list(range(count))
            await leave(writer)

    play(network, loop, scenario)


def test_connections_are_bounded(network: str, loop: str) -> None:
    async def scenario() -> None:
        async with stub() as made:
            held: list[tuple[int, bytes]] = []
            made.exchange.attach(lambda identity, message: held.append((identity, message)))
            busy = await connect()
            busy[1].write(framed(dns.message.make_query("busy.cluster.local", "A")))
            while not held:
                await asyncio.sleep(0.001)
            idle = [await connect() for _ in range(tcp.CONNECTIONS)]
            assert await idle[0][0].read() == b""  # made room for the last
            far_side(30)(made, *held[0])
            assert (await heard(busy[0])).answer
            for reader, writer in idle[1:]:
                writer.write(framed(dns.message.make_query("busy.cluster.local", "A")))
                assert (await heard(reader)).answer
            for _, writer in (*idle, busy):
                await leave(writer)

    play(network, loop, scenario)


def test_an_idle_connection_ends(network: str, loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "IDLE", 0.3)

    async def dribble(writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(b"\1")
                await writer.drain()
                await asyncio.sleep(0.01)

    async def scenario() -> None:
        async with stub() as made:
            made.exchange.attach(lambda identity, message: None)
            waits, dribbles, began = await connect(), await connect(), time.monotonic()
            waits[1].write(framed(dns.message.make_query("x.cluster.local", "A")))
            async with asyncio.timeout(1):
                await dribble(dribbles[1])  # a byte now and then is no question
            assert (await heard(waits[0])).rcode() == dns.rcode.SERVFAIL
            assert await waits[0].read() == b""
            assert 2.5 + 0.3 < time.monotonic() - began < 4
            for _, writer in (waits, dribbles):
                await leave(writer)

    play(network, loop, scenario)


def test_who_takes_no_answers_is_left(network: str, loop: str) -> None:
    async def scenario() -> None:
        async with stub():
            _, writer = await connect()
            with contextlib.suppress(ConnectionError):
                for _ in range(100):
                    writer.write(framed(dns.message.make_query(HEADLESS, "A")) * 20)
                    async with asyncio.timeout(0.2):
                        await writer.drain()
                    await asyncio.sleep(0.005)
            assert "10.130.0.7" in await dig("+short", DB, "A")
            await leave(writer)

    play(network, loop, scenario)


# -- what no client sends ----------------------------------------------------------------------------------------------


def garbage(random: random.Random) -> bytes:
    """A message, more or less."""
    good = dns.message.make_query(random.choice((DB, "db.shop", "x.example", ".")), "A", use_edns=0).to_wire()
    match random.randrange(6):
        case 0:
            return random.randbytes(random.randrange(600))
        case 1:
            return good[: random.randrange(len(good))]
        case 2:
            return good[:12] + random.randbytes(random.randrange(300))
        case 3:
            return good[:2] + random.randbytes(10) + good[12:]
        case 4:
            return good + random.randbytes(random.randrange(4096))
        case _:
            bad = bytearray(good)
            for _ in range(random.randrange(1, 5)):
                bad[random.randrange(2, len(bad))] = random.randrange(256)
            return bytes(bad)


def test_garbage_is_answered_by_its_code_or_dropped(network: str, loop: str) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    source = random.Random(seed)

    async def scenario() -> None:
        async with stub() as made:
            made.exchange.attach(lambda identity, message: None)
            until = time.monotonic() + 2
            while time.monotonic() < until:
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                    client.connect(("127.0.0.1", 53))
                    for _ in range(100):
                        client.send(garbage(source))
                _, writer = await connect()
                writer.write(b"".join(framed(garbage(source)) for _ in range(20)) + source.randbytes(50))
                await asyncio.sleep(0)
                await leave(writer)
            counters = made.server.counters
            assert counters.refused > 1000 and counters.dropped > 100
            made.exchange.attach(made.to_cluster)
            assert "10.130.0.7" in await dig("+short", DB, "A")
            assert "192.0.2.7" in await dig("+short", "+tcp", "host.lan.example", "A")

    play(network, loop, scenario)


def test_a_flood_is_bounded(network: str, loop: str) -> None:
    async def scenario() -> None:
        async with stub() as made:
            made.exchange.attach(lambda identity, message: None)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                client.connect(("127.0.0.1", 53))
                for n in range(5000):
                    client.send(dns.message.make_query(f"n{n}.cluster.local", "A").to_wire())
                    if n % 50 == 0:
                        await asyncio.sleep(0)
            assert made.server.counters.failed >= 500  # at once: as many as may be are on the way
            assert short(await dig("+short", "host.lan.example", "A")) == ["192.0.2.7"]
            while made.server.counters.failed < made.server.counters.cluster:
                await asyncio.sleep(0.05)
            made.exchange.attach(made.to_cluster)
            assert "10.130.0.7" in await dig("+short", DB, "A")

    play(network, loop, scenario)
