"""Whatever comes, and in whatever order: no error, no growth, and time goes on."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpvpn.errors import ProtocolError
from tpvpn.proto.tcp import Connection, Limits, State, reset_for
from tpvpn.wire import ip, tcp
from tpvpn.wire.tcp import ACK, FIN, SYN, Segment

BUFFER = 5000
IRS, ISS = 0xFFFFF000, 0xFFFFFF00
MASK = 0xFFFFFFFF

NUMBERS = st.one_of(  # from where the connection is: most of what is anywhere else is not taken at all
    st.just(0),
    st.sampled_from([-1, 0, 1, 2, 999, 1000, 1001, BUFFER - 1, BUFFER, BUFFER + 1, 65_535]),
    st.integers(-70_000, 70_000),
    st.integers(-(2**31), 2**31),
)
FLAGS = st.one_of(st.sampled_from([16, 16, 16, 24, 17, 4, 20, 2, 18]), st.integers(0, 255))
STAMPS = st.one_of(st.none(), st.integers(990, 1010), st.integers(0, MASK))
BLOCKS = st.lists(st.tuples(NUMBERS, NUMBERS), max_size=4)
SEGMENTS = st.tuples(
    st.just("segment"), NUMBERS, NUMBERS, FLAGS, st.integers(0, 0xFFFF), st.integers(0, 3000), STAMPS, BLOCKS
)
STEPS = st.one_of(
    SEGMENTS,
    SEGMENTS,
    SEGMENTS,
    st.tuples(st.sampled_from(["accept", "resume", "send", "timeout"])),
    st.tuples(st.just("call"), st.sampled_from(["refuse", "shutdown_write", "abort", "keep", "take_events"])),
    st.tuples(st.sampled_from(["write", "consume"]), st.integers(0, 3000)),
    st.tuples(st.just("wait"), st.floats(0, 100)),
)


class Driven:
    """A connection that is led through steps and measured after each."""

    def __init__(self, *, stamps: bool, opened: bool) -> None:
        self.now, self.stamps = 10.0, stamps
        self.connection = Connection(Limits(1000, 0, BUFFER, BUFFER))
        if opened:
            syn = Segment(IRS, 0, SYN, 0xFFFF, b"", 1000 if stamps else None)
            syn.mss, syn.window_scale, syn.sack_permitted = 1000, 2, True
            self.connection.receive_segment(syn, self.now)
            self.connection.accept(self.now, ISS)
            self.connection.segments_to_send(self.now)
            last = Segment(IRS + 1, ISS + 1, ACK, 0xFFFF, b"", 1000 if stamps else None)
            self.connection.receive_segment(last, self.now)
            assert self.connection.state is State.ESTABLISHED

    def take(self, step: tuple) -> None:  # type: ignore[type-arg]
        getattr(self, step[0])(*step[1:])

    def segment(
        self, seq: int, ack: int, flags: int, window: int, length: int, stamp: int | None, blocks: list
    ) -> None:  # type: ignore[type-arg]
        nxt, una = self.connection._receiver.nxt, self.connection._sender.una
        segment = Segment((nxt + seq) & MASK, (una + ack) & MASK, flags, window, bytes(length), stamp, 5)
        segment.sack_blocks = tuple(((una + a) & MASK, (una + b) & MASK) for a, b in blocks)
        self.connection.receive_segment(segment, self.now)
        reset_for(segment)
        self.connection.gives_way_to(segment)

    def accept(self) -> None:
        self.connection.accept(self.now, ISS)

    def write(self, length: int) -> None:
        self.connection.write(bytes(min(length, self.connection.writable)))

    def consume(self, length: int) -> None:
        self.connection.consume(min(length, self.connection.readable))

    def call(self, name: str) -> None:
        getattr(self.connection, name)()

    def resume(self) -> None:
        self.connection.resume(self.now)

    def send(self) -> None:
        assert len(self.connection.segments_to_send(self.now)) <= 400

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.connection.handle_timeout(self.now)

    def timeout(self) -> None:
        at = self.connection.next_timeout()
        if at is not None:
            self.now = max(self.now, at)
            self.connection.handle_timeout(self.now)
            self.connection.segments_to_send(self.now)
            later = self.connection.next_timeout()
            assert later is None or later > self.now, "time goes on"

    def measure(self) -> None:
        connection = self.connection
        sender, receiver = connection._sender, connection._receiver
        assert connection.readable == sum(len(view) for view in connection.peek()) <= BUFFER
        assert connection.readable + sum(len(data) for _, data in receiver._parts) <= 2 * BUFFER
        assert len(sender.buffer) <= BUFFER
        assert sender.una <= sender.nxt <= sender.buffer.end + 1
        assert len(sender._sacked.ranges) <= 257
        assert len(connection._immediate) <= 50


def likely(driven: Driven, chance: random.Random) -> tuple:  # type: ignore[type-arg]
    """A step of a peer and an application that are honest mostly, so that the connection comes far."""
    sender, odd = driven.connection._sender, chance.choice((-1, 1, 999, BUFFER, chance.randint(-70_000, 70_000)))
    kind = chance.randrange(20)
    if kind < 11:
        seq = 0 if chance.random() < 0.8 else odd
        ack = chance.choice((0, sender.nxt - sender.una, sender.nxt - sender.una, odd if chance.random() < 0.3 else 0))
        flags = chance.choices((ACK, ACK | FIN, chance.getrandbits(8)), (92, 4, 4))[0]
        window = chance.choice((0, 1, 300, 2000, 0xFFFF))
        stamp = int(driven.now * 1000) - chance.choice((0, 0, 0, 0, 0, 9000)) if driven.stamps else None
        blocks = [
            (at, at + chance.randint(1, 2000)) for at in chance.choices(range(0, 4000, 500), k=chance.randrange(3))
        ]
        return "segment", seq, ack, flags, window, chance.choice((0, 1, 500, 1000, 3000)), stamp, blocks
    if kind < 15:
        return chance.choice(("write", "consume")), chance.choice((1, 500, 3000, 5000))
    if kind < 18:
        return (chance.choice(("send", "send", "send", "timeout", "accept", "resume")),)
    if kind < 19:
        return "wait", chance.choice((0.001, 0.01, 0.3, 2.0, 70.0))
    calls = ("keep", "take_events", "shutdown_write", "refuse", "abort")
    return "call", chance.choices(calls, (50, 30, 15, 4, 1))[0]


def lead(seed: int, connections: int) -> Counter[str]:
    """Through likely steps until each connection has ended, or for long; how often which state was seen."""
    chance, seen = random.Random(seed), Counter[str]()
    for _ in range(connections):
        driven = Driven(stamps=chance.random() < 0.5, opened=chance.random() < 0.9)
        for _ in range(400):
            driven.take(likely(driven, chance))
            driven.measure()
            seen[driven.connection.state.name] += 1
            if driven.connection.is_closed:
                break
    return seen


@pytest.mark.parametrize("seed", range(4))
def test_likely_steps_lead_through_all_states(seed: int) -> None:
    seen = lead(seed, 150)
    assert {state.name for state in State} - {"SYN_SENT"} == set(seen), seen


@given(st.booleans(), st.booleans(), st.lists(STEPS, max_size=50))
@settings(max_examples=1000, deadline=None)
def test_any_steps(stamps: bool, opened: bool, steps: list[tuple]) -> None:  # type: ignore[type-arg]
    driven = Driven(stamps=stamps, opened=opened)
    for step in steps:
        driven.take(step)
        driven.measure()


@given(st.lists(st.binary(min_size=20, max_size=80), max_size=20))
@settings(deadline=None)
def test_any_bytes(payloads: list[bytes]) -> None:
    driven = Driven(stamps=True, opened=True)
    for payload in payloads:
        packet = ip.parse(ip.build(bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2]), ip.TCP, payload))
        try:
            segment = tcp.parse(packet, checked=True)
        except ProtocolError:
            continue
        driven.connection.receive_segment(segment, driven.now)
        driven.connection.segments_to_send(driven.now)
        driven.measure()


def test_a_flood_of_single_bytes_out_of_order_is_bounded() -> None:
    driven = Driven(stamps=False, opened=True)
    for at in range(4998, 0, -2):
        driven.take(("segment", at, 0, ACK, 0xFFFF, 1, None, []))
    assert len(driven.connection._receiver._parts) <= 1024
    driven.measure()


def test_a_flood_of_sack_ranges_is_bounded() -> None:
    driven = Driven(stamps=False, opened=True)
    driven.take(("write", 5000))
    driven.take(("send",))
    for at in range(1, 4900, 2):
        driven.take(("segment", 0, 0, ACK, 0xFFFF, 0, None, [(at, at + 1)]))
    driven.measure()
