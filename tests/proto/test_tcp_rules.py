"""The TCP terminator rule by rule: one end, and a peer that says exactly what the case is about."""

from collections.abc import Callable

import pytest
from joined import MSS

from tpvpn.proto.tcp import (
    CLOSED,
    ESTABLISHED,
    KEEPALIVE,
    PEER_CLOSED,
    READABLE,
    RESET,
    WRITABLE,
    Connection,
    Limits,
    State,
    reset_for,
)
from tpvpn.wire.tcp import ACK, FIN, PSH, RST, SYN, Segment

IRS, ISS = 0xFFFFFFF0, 0xFFFFFF00
"""So close to the wrap that every case crosses it."""
WINDOW = 60_000
MASK = 0xFFFFFFFF


class Peer:
    """The laptop's side by hand: numbers are offsets from the first byte of each direction."""

    def __init__(
        self, *, limits: Limits | None = None, scale: int | None = None, stamps: bool = False, sack: bool = False
    ) -> None:
        self.now = 50.0
        self.stamps = stamps
        self.connection = Connection(limits or Limits(MSS))
        self.syn = Segment(IRS, 0, SYN, WINDOW, b"", 1000 if stamps else None)
        self.syn.mss, self.syn.window_scale, self.syn.sack_permitted = MSS, scale, sack

    def established(self) -> "Peer":
        self.connection.receive_segment(self.syn, self.now)
        self.connection.accept(self.now, ISS)
        self.sent()
        self.say()
        assert self.connection.take_events() == ESTABLISHED
        assert self.sent() == []
        return self

    def segment(
        self,
        seq: int = 0,
        ack: int = 0,
        payload: bytes = b"",
        flags: int = ACK,
        window: int = WINDOW,
        stamp: int = 1000,
    ) -> Segment:
        numbers = (IRS + 1 + seq) & MASK, (ISS + 1 + ack) & MASK
        return Segment(*numbers, flags, window, payload, stamp if self.stamps else None, 0)

    def say(self, *arguments: object, **named: object) -> None:
        self.connection.receive_segment(self.segment(*arguments, **named), self.now)  # type: ignore[arg-type]

    def sent(self) -> list[tuple[int, int, int, bytes]]:
        """What the connection sends now: (flags but PSH, seq, ack, payload), as offsets."""
        return [
            (one.flags & ~PSH, off(one.seq, ISS), off(one.ack, IRS) if one.flags & ACK else 0, bytes(one.payload))
            for one in self.connection.segments_to_send(self.now)
        ]

    def later(self, seconds: float) -> None:
        """Time passes, and with it whatever timers are due."""
        self.now += seconds
        self.connection.handle_timeout(self.now)

    def until_timeout(self) -> float:
        """Go to the next timer; how long that took."""
        at = self.connection.next_timeout()
        assert at is not None
        began, self.now = self.now, at
        self.connection.handle_timeout(at)
        return at - began

    @property
    def state(self) -> State:
        return self.connection.state


def off(number: int, start: int) -> int:
    """Offset from the first byte, which is one behind SYN; negative before it."""
    return ((number - start - 1 + 0x80000000) & MASK) - 0x80000000


@pytest.fixture
def peer() -> Peer:
    return Peer().established()


# -- opening -----------------------------------------------------------------------------------------------------------


def test_a_syn_is_not_answered_before_the_real_connection_stands() -> None:
    peer = Peer()
    for _ in range(3):
        peer.connection.receive_segment(peer.syn, peer.now)
        assert peer.connection.is_requested
        assert peer.sent() == []
        assert peer.connection.next_timeout() is None
    peer.connection.accept(peer.now, ISS)
    assert peer.sent() == [(SYN | ACK, -1, 0, b"")]
    assert peer.state is State.SYN_RECEIVED


def test_a_refused_syn_is_reset() -> None:
    peer = Peer()
    peer.connection.receive_segment(peer.syn, peer.now)
    peer.connection.refuse()
    (reset,) = peer.connection.segments_to_send(peer.now)
    assert (reset.flags, reset.seq, reset.ack) == (RST | ACK, 0, (IRS + 1) & MASK)
    assert peer.connection.is_closed


def test_a_client_that_gives_up_before_the_answer() -> None:
    peer = Peer()
    peer.connection.receive_segment(peer.syn, peer.now)
    peer.say(5, flags=RST)
    assert not peer.connection.is_closed
    peer.say(flags=RST)
    assert peer.connection.is_closed
    assert peer.connection.take_events() & RESET


def test_options_are_those_of_both() -> None:
    peer = Peer(scale=3, stamps=True, sack=True)
    peer.connection.receive_segment(peer.syn, peer.now)
    peer.connection.accept(peer.now, ISS)
    (answer,) = peer.connection.segments_to_send(peer.now)
    assert (answer.mss, answer.window_scale, answer.sack_permitted) == (MSS, 5, True)
    assert (answer.timestamp, answer.timestamp_echo) == (50_000, 1000)
    assert peer.connection.send_mss == MSS - 12


def test_options_that_the_peer_has_not_are_not_used() -> None:
    peer = Peer()
    peer.syn.mss = None
    peer.connection.receive_segment(peer.syn, peer.now)
    peer.connection.accept(peer.now, ISS)
    (answer,) = peer.connection.segments_to_send(peer.now)
    assert (answer.window_scale, answer.sack_permitted, answer.timestamp) == (None, False, None)
    assert answer.window == 65_535
    assert peer.connection.send_mss == 536


def test_an_absurd_mss_is_raised() -> None:
    peer = Peer()
    peer.syn.mss = 1
    peer.connection.receive_segment(peer.syn, peer.now)
    assert peer.connection.send_mss == 48


def test_syn_ack_comes_again_when_it_was_lost() -> None:
    peer = Peer()
    peer.connection.receive_segment(peer.syn, peer.now)
    peer.connection.accept(peer.now, ISS)
    assert peer.sent() == [(SYN | ACK, -1, 0, b"")]
    assert peer.until_timeout() == pytest.approx(1)
    assert peer.sent() == [(SYN | ACK, -1, 0, b"")]
    assert peer.until_timeout() == pytest.approx(2)
    assert peer.sent() == [(SYN | ACK, -1, 0, b"")]
    peer.connection.receive_segment(peer.syn, peer.now)
    assert peer.sent() == [(SYN | ACK, -1, 0, b"")]


def test_a_client_that_never_completes_the_handshake_is_forgotten() -> None:
    peer = Peer()
    peer.connection.receive_segment(peer.syn, peer.now)
    peer.connection.accept(peer.now, ISS)
    began = peer.now
    while not peer.connection.is_closed:
        peer.sent()
        peer.until_timeout()
    assert 60 < peer.now - began < 130


@pytest.mark.parametrize("ack", [-1, 1, 70_000])
def test_a_bad_ack_in_syn_received_is_reset(ack: int) -> None:
    peer = Peer()
    peer.connection.receive_segment(peer.syn, peer.now)
    peer.connection.accept(peer.now, ISS)
    peer.sent()
    peer.say(ack=ack)
    assert peer.sent() == [(RST, ack, 0, b"")]
    assert peer.state is State.SYN_RECEIVED


def test_bad_acks_in_syn_received_are_not_gathered() -> None:
    """Nothing is sent while the link is congested: a flood of them must not grow what is to be sent."""
    peer = Peer()
    peer.connection.receive_segment(peer.syn, peer.now)
    peer.connection.accept(peer.now, ISS)
    peer.sent()
    for ack in range(1, 1000):
        peer.say(ack=ack)
    assert peer.sent() == [(RST, 999, 0, b"")]


def test_an_old_duplicate_syn_is_undone_by_the_clients_reset() -> None:
    """RFC 9293 section 3.5, figure 9: the client resets the answer to what it did not ask."""
    peer = Peer()
    peer.connection.receive_segment(peer.syn, peer.now)
    peer.connection.accept(peer.now, ISS)
    peer.sent()
    peer.say(flags=RST)
    assert peer.connection.is_closed
    assert peer.connection.take_events() & RESET


def test_data_with_the_last_part_of_the_handshake() -> None:
    peer = Peer()
    peer.connection.receive_segment(peer.syn, peer.now)
    peer.connection.accept(peer.now, ISS)
    peer.sent()
    peer.say(payload=b"hello", flags=ACK | FIN)
    assert peer.connection.take_events() == ESTABLISHED | READABLE | PEER_CLOSED
    assert b"".join(peer.connection.peek()) == b"hello"
    assert peer.sent() == [(ACK, 0, 6, b"")]


# -- acknowledgments ---------------------------------------------------------------------------------------------------


def test_an_ack_beyond_what_was_sent_is_challenged(peer: Peer) -> None:
    peer.connection.write(b"abc")
    peer.sent()
    peer.say(ack=4, payload=b"not to be taken")
    assert peer.sent() == [(ACK, 3, 0, b"")]
    assert peer.connection.readable == 0
    assert peer.connection.dropped == 1


def test_an_ack_from_long_ago_is_challenged(peer: Peer) -> None:
    """RFC 5961 section 5: older than the largest window seen."""
    peer.say(ack=-WINDOW - 1, payload=b"forged")
    assert peer.sent() == [(ACK, 0, 0, b"")]
    assert peer.connection.readable == 0


def test_a_segment_without_ack_is_dropped(peer: Peer) -> None:
    peer.say(payload=b"abc", flags=PSH)
    assert peer.sent() == []
    assert (peer.connection.readable, peer.connection.dropped) == (0, 1)


def test_every_second_segment_at_least_is_acknowledged_at_once(peer: Peer) -> None:
    peer.say(payload=bytes(MSS))
    peer.say(MSS, payload=bytes(MSS))
    assert peer.sent() == [(ACK, 0, 2 * MSS, b"")]


def test_in_a_conversation_the_answer_carries_the_acknowledgment(peer: Peer) -> None:
    peer.say(payload=b"question")
    assert peer.sent() == [(ACK, 0, 8, b"")]
    peer.connection.write(b"answer")
    assert peer.sent() == [(ACK, 0, 8, b"answer")]
    peer.say(8, 6, b"question")
    assert peer.sent() == []  # one round of it was seen: an answer is expected
    peer.connection.write(b"answer")
    assert peer.sent() == [(ACK, 6, 16, b"answer")]
    peer.say(16, 12, b"question")
    assert peer.sent() == []
    assert peer.until_timeout() == pytest.approx(0.02)
    assert peer.sent() == [(ACK, 12, 24, b"")]
    peer.say(24, 12, b"statement")
    assert peer.sent() == [(ACK, 12, 33, b"")]  # it is none any more


def test_out_of_order_data_is_acknowledged_at_once_and_named() -> None:
    peer = Peer(sack=True).established()
    peer.say(10, payload=b"x" * 10)
    (answer,) = peer.connection.segments_to_send(peer.now)
    assert off(answer.ack, IRS) == 0
    assert [(off(a, IRS), off(b, IRS)) for a, b in answer.sack_blocks] == [(10, 20)]
    peer.say(30, payload=b"y" * 10)
    (answer,) = peer.connection.segments_to_send(peer.now)
    assert [(off(a, IRS), off(b, IRS)) for a, b in answer.sack_blocks] == [(30, 40), (10, 20)]
    peer.say(0, payload=b"w" * 10)
    peer.say(15, payload=b"z" * 15)
    assert peer.sent() == [(ACK, 0, 40, b"")]
    assert b"".join(peer.connection.peek()) == b"w" * 10 + b"x" * 10 + b"z" * 10 + b"y" * 10


def test_an_old_duplicate_is_acknowledged_and_dropped(peer: Peer) -> None:
    peer.say(payload=b"abc")
    peer.sent()
    peer.say(payload=b"abc")
    assert peer.sent() == [(ACK, 0, 3, b"")]
    peer.say(1, payload=b"bcde")
    assert b"".join(peer.connection.peek()) == b"abcde"


@pytest.mark.parametrize("seq", [-1])
def test_a_keepalive_is_answered(peer: Peer, seq: int) -> None:
    for payload in (b"", b"\0"):
        peer.say(seq, payload=payload)
        assert peer.sent() == [(ACK, 0, 0, b"")]
    assert peer.connection.readable == 0


def test_a_keepalive_is_told_and_a_window_probe_is_not() -> None:
    peer = Peer(limits=Limits(MSS, receive_buffer=MSS)).established()
    peer.say(-1)
    assert peer.connection.take_events() == KEEPALIVE
    for seq in (-2, MSS + 1):
        peer.say(seq)
        assert peer.connection.take_events() == 0
    peer.say(payload=b"x" * MSS)
    assert peer.connection.take_events() == READABLE
    peer.sent()
    peer.say(MSS - 1)
    assert peer.connection.take_events() == 0


# -- loss --------------------------------------------------------------------------------------------------------------


def test_what_is_not_acknowledged_is_sent_again_ever_more_slowly(peer: Peer) -> None:
    peer.connection.write(b"abc")
    assert peer.sent() == [(ACK, 0, 0, b"abc")]
    waits = []
    for _ in range(8):
        waits.append(round(peer.until_timeout(), 3))
        assert peer.sent() == [(ACK, 0, 0, b"abc")]
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]


def test_a_peer_that_never_answers_is_given_up(peer: Peer) -> None:
    peer.connection.write(b"abc")
    began = peer.now
    while not peer.connection.is_closed:
        peer.sent()
        peer.until_timeout()
    assert 900 < peer.now - began < 970
    assert peer.connection.take_events() & RESET
    assert peer.sent() == [(RST | ACK, 3, 0, b"")]


def test_resume_does_not_wait_for_a_timer_that_grew_long(peer: Peer) -> None:
    peer.connection.write(b"abc")
    peer.sent()
    for _ in range(6):
        peer.until_timeout()
        peer.sent()
    peer.connection.resume(peer.now)
    assert peer.sent() == [(ACK, 0, 0, b"abc")]


def test_three_duplicates_bring_the_missing_segment(peer: Peer) -> None:
    peer.connection.write(bytes(5 * MSS))
    assert len(peer.sent()) == 5
    for _ in range(2):
        peer.say()
        assert peer.sent() == []
    peer.say()
    assert peer.sent() == [(ACK, 0, 0, bytes(MSS))]
    for _ in range(5):
        peer.say()
    assert peer.sent() == []
    peer.say(ack=2 * MSS)  # partial (RFC 6582): the third was lost too
    assert peer.sent() == [(ACK, 2 * MSS, 0, bytes(MSS))]
    peer.say(ack=5 * MSS)
    assert peer.sent() == []
    assert peer.connection.next_timeout() is None


def test_with_sack_only_the_holes_are_sent_again() -> None:
    peer = Peer(sack=True).established()
    peer.connection.write(bytes(10 * MSS))
    peer.sent()
    answer = peer.segment()
    first = (ISS + 1) & MASK
    answer.sack_blocks = tuple(((first + a * MSS) & MASK, (first + b * MSS) & MASK) for a, b in ((1, 3), (5, 8)))
    peer.connection.receive_segment(answer, peer.now)
    assert [(seq // MSS, len(data) // MSS) for _, seq, _, data in peer.sent()] == [(0, 1), (3, 1), (4, 1)]
    peer.connection.receive_segment(answer, peer.now)
    assert peer.sent() == []


@pytest.mark.parametrize("blocks", [((5, 3),), ((-100, -50),), ((0, 99 * MSS),), ((0, 0),)])
def test_sack_blocks_that_make_no_sense_are_ignored(blocks: tuple[tuple[int, int], ...]) -> None:
    peer = Peer(sack=True).established()
    peer.connection.write(bytes(10 * MSS))
    peer.sent()
    answer = peer.segment()
    answer.sack_blocks = tuple(((ISS + 1 + a) & MASK, (ISS + 1 + b) & MASK) for a, b in blocks)
    peer.connection.receive_segment(answer, peer.now)
    assert peer.sent() == []


def test_rto_by_rfc_6298() -> None:
    """0.5 s of round trip: SRTT 0.5, RTTVAR 0.25, RTO 1.5; a second equal sample brings RTTVAR to 3/4 of it."""
    peer = Peer().established()
    at = 0
    for expected in (1.5, 1.25, 1.0625):
        peer.connection.write(b"abc")
        peer.sent()
        peer.later(0.5)
        at += 3
        peer.say(ack=at)
        peer.connection.write(b"def")
        peer.sent()
        timeout = peer.connection.next_timeout()
        assert timeout is not None
        assert timeout - peer.now == pytest.approx(expected)
        at += 3
        peer.connection.handle_timeout(timeout)  # Karn: what was sent twice gives no sample
        peer.sent()
        peer.say(ack=at)


# -- windows -----------------------------------------------------------------------------------------------------------


def test_a_smaller_buffer_takes_nothing_back_that_was_offered(peer: Peer) -> None:
    peer.connection.resize(2 * MSS)
    peer.say(payload=bytes(4 * MSS))  # the window that was offered before
    assert peer.connection.readable == 4 * MSS
    peer.connection.consume(4 * MSS)
    (answer,) = peer.connection.segments_to_send(peer.now)
    offered = answer.window << 5
    assert offered >= WINDOW - 4 * MSS - (1 << 5)
    assert peer.connection.writable == 2 * MSS
    peer.connection.resize(1 << 20)
    assert peer.connection.writable > 2 * MSS


def test_no_more_is_sent_than_the_window_takes(peer: Peer) -> None:
    peer.say(window=3 * MSS)
    peer.connection.write(bytes(20_000))
    assert sum(len(data) for *_, data in peer.sent()) == 3 * MSS
    peer.say(ack=MSS, window=3 * MSS)
    assert sum(len(data) for *_, data in peer.sent()) == MSS


def test_a_window_that_shrinks_takes_nothing_back(peer: Peer) -> None:
    peer.connection.write(bytes(20_000))
    assert sum(len(data) for *_, data in peer.sent()) == 20_000
    peer.say(ack=MSS, window=1000)
    assert peer.sent() == []
    peer.until_timeout()
    assert [(seq, len(data)) for _, seq, _, data in peer.sent()] == [(MSS, 1000)]  # no further than it reaches now
    peer.say(ack=20_000, window=1000)  # it had taken all the same
    assert peer.connection.next_timeout() is None


def test_a_zero_window_is_probed_until_it_opens(peer: Peer) -> None:
    peer.say(window=0)
    peer.connection.write(b"abc")
    assert peer.sent() == []
    for _ in range(100):  # days, if need be: it answers
        peer.until_timeout()
        assert peer.sent() == [(ACK, -1, 0, b"")]
        peer.say(window=0)
        assert peer.sent() == []
    assert not peer.connection.is_closed
    peer.say(window=100)
    assert peer.sent() == [(ACK, 0, 0, b"abc")]


def test_a_zero_window_over_data_on_the_way(peer: Peer) -> None:
    peer.connection.write(b"abc")
    peer.sent()
    peer.say(window=0)
    peer.until_timeout()
    assert peer.sent() == [(ACK, -1, 0, b"")]
    peer.say(window=0)
    peer.say(window=WINDOW)
    assert peer.sent() == [(ACK, 0, 0, b"abc")]


def test_a_silly_window_is_not_filled_before_the_timer(peer: Peer) -> None:
    peer.say(window=100)
    peer.connection.write(bytes(5000))
    assert peer.sent() == []
    peer.until_timeout()
    assert [(seq, len(data)) for _, seq, _, data in peer.sent()] == [(0, 100)]


def test_an_old_window_is_not_news(peer: Peer) -> None:
    """SND.WL1, SND.WL2: what was sent earlier and comes later says nothing of the window."""
    peer.say(100, payload=b"later", window=30_000)
    peer.say(50, payload=b"earlier", window=0)
    peer.connection.write(b"abc")
    assert b"abc" in [data for *_, data in peer.sent()]


def test_the_window_is_what_the_application_has_room_for() -> None:
    peer = Peer(limits=Limits(MSS, receive_buffer=10_000)).established()
    peer.say(payload=bytes(6000))
    (answer,) = peer.connection.segments_to_send(peer.now)
    assert answer.window == 4000
    peer.say(6000, payload=bytes(6000))  # 2,000 beyond it
    (answer,) = peer.connection.segments_to_send(peer.now)
    assert (answer.window, off(answer.ack, IRS)) == (0, 10_000)
    assert peer.connection.readable == 10_000
    peer.say(10_000, payload=b"x")
    assert peer.sent() == [(ACK, 0, 10_000, b"")]
    assert peer.connection.readable == 10_000


def test_a_window_opens_in_worthwhile_steps() -> None:
    peer = Peer(limits=Limits(MSS, receive_buffer=10_000)).established()
    peer.say(payload=bytes(10_000))
    peer.sent()
    peer.connection.consume(1000)
    assert peer.sent() == []
    peer.say(9_999, payload=b"x")  # a probe
    (answer,) = peer.connection.segments_to_send(peer.now)
    assert answer.window == 0
    peer.connection.consume(1000)
    (answer,) = peer.connection.segments_to_send(peer.now)
    assert answer.window == 2000


def test_out_of_order_data_never_exceeds_the_window() -> None:
    peer = Peer(limits=Limits(MSS, receive_buffer=10_000)).established()
    peer.say(9_000, payload=bytes(5_000))
    peer.say(10_000, payload=b"x")
    peer.say(0, payload=bytes(9_000))
    assert peer.connection.readable == 10_000


def test_writable_stops_and_tells_when_there_is_room_again() -> None:
    peer = Peer(limits=Limits(MSS, send_buffer=10_000)).established()
    peer.connection.write(bytes(9_500))
    assert peer.connection.writable == 0
    peer.sent()
    peer.say(ack=2 * MSS)
    assert not peer.connection.take_events() & WRITABLE
    peer.say(ack=4 * MSS)
    assert peer.connection.take_events() & WRITABLE
    assert peer.connection.writable == 10_000 - 9_500 + 4 * MSS
    with pytest.raises(ValueError, match="can be written"):
        peer.connection.write(bytes(10_001))


# -- reset (RFC 5961) --------------------------------------------------------------------------------------------------


def test_a_reset_exactly_at_the_next_byte_ends_the_connection(peer: Peer) -> None:
    peer.say(payload=b"abc")
    peer.say(3, flags=RST)
    assert peer.connection.is_closed
    assert peer.connection.take_events() & RESET
    assert peer.connection.next_timeout() is None


@pytest.mark.parametrize(("seq", "answers"), [(1, 1), (65_000, 1), (70_000, 0), (-1, 0)])
def test_a_reset_elsewhere_is_challenged_within_the_window_and_dropped_outside(
    peer: Peer, seq: int, answers: int
) -> None:
    peer.say(seq, flags=RST)
    assert peer.sent() == [(ACK, 0, 0, b"")] * answers
    assert peer.state is State.ESTABLISHED
    assert peer.connection.dropped == 1


@pytest.mark.parametrize("seq", [-1, 0, 5, 80_000])
def test_a_syn_in_a_connection_is_challenged(peer: Peer, seq: int) -> None:
    peer.say(seq, flags=SYN)
    assert peer.sent() == [(ACK, 0, 0, b"")]
    assert peer.state is State.ESTABLISHED


def test_challenges_are_limited(peer: Peer) -> None:
    def flood() -> int:
        answers = 0
        for _ in range(100):
            peer.say(5, flags=RST)
            answers += len(peer.sent())
            peer.say(-1)
            answers += len(peer.sent())
        return answers

    assert flood() == 10
    peer.later(1)
    assert flood() == 10
    assert peer.connection.dropped == 400


def test_abort_resets_the_peer(peer: Peer) -> None:
    peer.connection.write(b"abc")
    peer.sent()
    peer.connection.abort()
    assert peer.sent() == [(RST | ACK, 3, 0, b"")]
    assert peer.connection.take_events() & CLOSED
    peer.say(payload=b"too late")
    assert peer.sent() == []
    assert peer.connection.writable == 0


def test_what_no_connection_knows_is_reset() -> None:
    peer = Peer()
    answer = reset_for(peer.segment(5, 7, b"abc"))
    assert answer is not None
    assert (answer.flags, off(answer.seq, ISS)) == (RST, 7)
    answer = reset_for(peer.segment(5, payload=b"abc", flags=SYN | FIN))
    assert answer is not None
    assert (answer.flags, answer.seq, off(answer.ack, IRS)) == (RST | ACK, 0, 10)
    assert reset_for(peer.segment(flags=RST)) is None


# -- timestamps --------------------------------------------------------------------------------------------------------


def test_paws_drops_what_is_older(peer: Peer) -> None:
    peer = Peer(stamps=True).established()
    peer.say(payload=b"abc", stamp=1005)
    peer.sent()
    peer.say(3, payload=b"old", stamp=1004)
    assert peer.sent() == [(ACK, 0, 3, b"")]
    assert (peer.connection.readable, peer.connection.dropped) == (3, 1)
    peer.now += 25 * 86_400  # by then it may have wrapped
    peer.say(3, payload=b"new", stamp=4)
    assert peer.connection.readable == 6


def test_timestamps_wrap() -> None:
    peer = Peer(stamps=True)
    peer.syn.timestamp = 0xFFFFFFFE
    peer.connection.receive_segment(peer.syn, peer.now)
    peer.connection.accept(peer.now, ISS)
    peer.sent()
    peer.say(payload=b"abc", stamp=3)
    (answer,) = peer.connection.segments_to_send(peer.now)
    assert (peer.connection.readable, answer.timestamp_echo) == (3, 3)


def test_a_segment_without_the_agreed_timestamp_is_dropped() -> None:
    peer = Peer(stamps=True).established()
    peer.stamps = False
    peer.say(payload=b"abc")
    assert (peer.connection.readable, peer.connection.dropped) == (0, 1)
    peer.say(flags=RST)  # which may come without
    assert peer.connection.is_closed


def test_the_echo_is_of_the_segment_that_the_acknowledgment_waits_for() -> None:
    """RFC 7323 section 4.3, case (B): what is out of order does not move TS.Recent."""
    peer = Peer(stamps=True).established()
    peer.say(100, payload=b"later", stamp=2000)
    assert peer.connection.segments_to_send(peer.now)[0].timestamp_echo == 1000
    peer.say(0, payload=bytes(100), stamp=1500)
    assert peer.connection.segments_to_send(peer.now)[0].timestamp_echo == 1500


# -- FIN ---------------------------------------------------------------------------------------------------------------


def fin_wait_1(peer: Peer) -> None:
    peer.connection.shutdown_write()
    assert peer.sent() == [(ACK | FIN, 0, 0, b"")]


def fin_wait_2(peer: Peer) -> None:
    fin_wait_1(peer)
    peer.say(ack=1)


def close_wait(peer: Peer) -> None:
    peer.say(flags=ACK | FIN)
    assert peer.sent() == [(ACK, 0, 1, b"")]


def closing(peer: Peer) -> None:
    fin_wait_1(peer)
    peer.say(flags=ACK | FIN)
    assert peer.sent() == [(ACK, 1, 1, b"")]


def last_ack(peer: Peer) -> None:
    close_wait(peer)
    peer.connection.shutdown_write()
    assert peer.sent() == [(ACK | FIN, 0, 1, b"")]


def time_wait(peer: Peer) -> None:
    fin_wait_2(peer)
    peer.say(0, 1, flags=ACK | FIN)
    assert peer.sent() == [(ACK, 1, 1, b"")]


STATES: list[tuple[Callable[[Peer], None], State]] = [
    (fin_wait_1, State.FIN_WAIT_1),
    (fin_wait_2, State.FIN_WAIT_2),
    (close_wait, State.CLOSE_WAIT),
    (closing, State.CLOSING),
    (last_ack, State.LAST_ACK),
    (time_wait, State.TIME_WAIT),
]


@pytest.mark.parametrize(("reach", "state"), STATES)
def test_fin_again_in_every_state(peer: Peer, reach: Callable[[Peer], None], state: State) -> None:
    reach(peer)
    assert peer.state is state
    ours = state not in (State.CLOSE_WAIT,)
    acknowledged = state in (State.FIN_WAIT_2, State.TIME_WAIT)
    peer.say(ack=int(acknowledged), flags=ACK | FIN)
    assert peer.sent() == [(ACK, int(ours), 1, b"")]
    expected = {State.FIN_WAIT_1: State.CLOSING, State.FIN_WAIT_2: State.TIME_WAIT}.get(state, state)
    assert peer.state is expected


@pytest.mark.parametrize(("reach", "state"), STATES)
def test_reset_in_every_state(peer: Peer, reach: Callable[[Peer], None], state: State) -> None:
    reach(peer)
    peer.say(int(state not in (State.FIN_WAIT_1, State.FIN_WAIT_2)), flags=RST)
    assert peer.connection.is_closed


@pytest.mark.parametrize(("reach", "state"), STATES)
def test_abort_in_every_state(peer: Peer, reach: Callable[[Peer], None], state: State) -> None:
    reach(peer)
    peer.connection.abort()
    peer.connection.abort()
    assert [flags for flags, *_ in peer.sent()] == ([] if state is State.TIME_WAIT else [RST | ACK])
    assert peer.connection.is_closed


def test_half_closed_by_the_peer(peer: Peer) -> None:
    peer.say(payload=b"question", flags=ACK | FIN)
    assert peer.connection.take_events() == READABLE | PEER_CLOSED
    assert peer.sent() == [(ACK, 0, 9, b"")]
    peer.connection.write(b"a long answer")
    assert peer.sent() == [(ACK, 0, 9, b"a long answer")]
    peer.say(9, 13)
    peer.connection.shutdown_write()
    assert peer.sent() == [(ACK | FIN, 13, 9, b"")]
    peer.say(9, 14)
    assert peer.connection.is_closed
    assert peer.connection.take_events() & CLOSED


def test_half_closed_by_us(peer: Peer) -> None:
    peer.connection.write(b"bye")
    peer.connection.shutdown_write()
    assert peer.sent() == [(ACK | FIN, 0, 0, b"bye")]
    peer.say(ack=4)
    assert peer.state is State.FIN_WAIT_2
    for number in range(3):
        peer.say(number * 3, 4, b"abc")
        assert peer.sent() == [(ACK, 4, number * 3 + 3, b"")]
    assert peer.connection.next_timeout() is None  # for as long as it likes
    peer.say(9, 4, flags=ACK | FIN)
    assert peer.state is State.TIME_WAIT
    assert peer.until_timeout() == pytest.approx(2)
    assert peer.connection.is_closed


def test_both_close_at_once(peer: Peer) -> None:
    closing(peer)
    peer.say(1, 1)
    assert peer.state is State.TIME_WAIT


def test_a_lost_fin_is_sent_again(peer: Peer) -> None:
    peer.connection.write(b"abc")
    peer.connection.shutdown_write()
    peer.sent()
    peer.say(ack=3)
    peer.until_timeout()
    assert peer.sent() == [(ACK | FIN, 3, 0, b"")]


def test_fin_waits_for_the_window(peer: Peer) -> None:
    peer.say(window=3)
    peer.connection.write(b"abc")
    peer.connection.shutdown_write()
    assert peer.sent() == [(ACK, 0, 0, b"abc")]
    peer.say(ack=3, window=0)
    assert peer.sent() == []
    peer.until_timeout()
    assert peer.sent() == [(ACK, 2, 0, b"")]
    peer.say(ack=3, window=1)
    assert peer.sent() == [(ACK | FIN, 3, 0, b"")]


def test_fin_out_of_order(peer: Peer) -> None:
    peer.say(3, payload=b"def", flags=ACK | FIN)
    assert peer.connection.take_events() == 0
    peer.say(0, payload=b"abc")
    assert peer.connection.take_events() == READABLE | PEER_CLOSED
    assert peer.sent() == [(ACK, 0, 7, b"")]


def test_nothing_comes_behind_fin(peer: Peer) -> None:
    close_wait(peer)
    peer.say(1, payload=b"more")
    assert peer.connection.readable == 0
    peer.say(2, flags=ACK | FIN)
    assert peer.state is State.CLOSE_WAIT


def test_shutdown_before_the_handshake_ends() -> None:
    peer = Peer()
    peer.connection.receive_segment(peer.syn, peer.now)
    peer.connection.accept(peer.now, ISS)
    peer.sent()
    peer.connection.write(b"abc")
    peer.connection.shutdown_write()
    peer.say()
    assert peer.sent() == [(ACK | FIN, 0, 0, b"abc")]
    assert peer.state is State.FIN_WAIT_1


@pytest.mark.parametrize(
    ("seq", "stamp", "gives_way"), [(-1, None, False), (1, None, True), (-5, 1001, True), (5, 999, False)]
)
def test_time_wait_gives_way_to_a_new_connection(seq: int, stamp: int | None, gives_way: bool) -> None:
    peer = Peer(stamps=stamp is not None).established()
    time_wait(peer)
    assert peer.connection.gives_way_to(peer.segment(seq, flags=SYN, stamp=stamp or 0)) is gives_way
    assert not peer.connection.gives_way_to(peer.segment(seq, flags=ACK, stamp=stamp or 0))


# -- memory ------------------------------------------------------------------------------------------------------------


def test_views_are_the_segments_own_memory_until_kept(peer: Peer) -> None:
    memory = bytearray(b"abc")
    segment = peer.segment()
    segment.payload = memoryview(memory)
    peer.connection.receive_segment(segment, peer.now)
    assert peer.connection.peek()[0].obj is memory
    peer.connection.keep()
    memory[:] = b"xyz"
    assert b"".join(peer.connection.peek()) == b"abc"


def test_timers_go_on_while_the_link_takes_nothing() -> None:
    peer = Peer()
    peer.connection.receive_segment(peer.syn, peer.now)
    peer.connection.accept(peer.now, ISS)
    peer.sent()
    for _ in range(3):
        assert peer.until_timeout() > 0
    assert peer.sent() == [(SYN | ACK, -1, 0, b"")]


def test_what_may_be_followed_by_more_comes_last() -> None:
    """Whoever sends a piece at a time sees by the last segment that there may be more."""
    peer = Peer(sack=True).established()
    peer.connection.write(bytes(3 * MSS))
    peer.say(10, payload=b"out of order")
    first, second = peer.connection.segments_to_send(peer.now, 1)
    assert (first.payload, bool(first.sack_blocks), len(second.payload)) == (b"", True, MSS)
    assert first.seq == second.seq


def test_many_small_pieces_stay_few(peer: Peer) -> None:
    for at in range(20_000):
        peer.say(at, payload=b"x")
        peer.connection.keep()
        peer.connection.write(b"y")
    assert len(peer.connection.peek()) <= 20
    assert peer.connection.readable == 20_000
    assert len(peer.connection._sender.buffer._pieces) <= 20
    assert b"".join(data for *_, data in peer.sent()) == b"y" * 20_000


def test_large_writes_are_sent_as_they_came() -> None:
    peer = Peer(limits=Limits(MSS, largest=65_483), scale=8).established()
    data = bytes(65_483)
    peer.connection.write(data)
    (segment,) = peer.connection.segments_to_send(peer.now)
    assert isinstance(segment.payload, memoryview)
    assert segment.payload.obj is data
