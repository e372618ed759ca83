"""Whatever comes, and in whatever order: no error, no growth, and time goes on."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tpvpn.errors import ProtocolError
from tpvpn.proto.tcp import Connection, Limits, State, reset_for
from tpvpn.wire import ip, tcp
from tpvpn.wire.tcp import ACK, SYN, Segment

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
        self.now = 10.0
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
