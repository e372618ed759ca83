"""Two terminators joined by a path that loses, repeats and reorders: every byte arrives, once and in order.

The table of throughput against loss is stored beside this file; `python tests/proto/test_tcp_joined.py` prints it.
"""

import random
from pathlib import Path as File

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from joined import MSS, Joined, Path

from tpvpn.proto.tcp import Limits, State

LARGEST = 65_483
TABLE = File(__file__).with_name("tcp_throughput.txt")
LOSSES = (0.0, 0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3)
AMOUNT = 4 << 20
CAPACITY = 1 << 20


def said(seed: int, length: int) -> bytes:
    return random.Random(seed).randbytes(length)


def exchange(joined: Joined, there: bytes, back: bytes, seconds: float = 4000) -> None:
    """Say both at once; all is heard, and both ends close."""
    joined.applications[0].to_say, joined.applications[1].to_say = there, back
    joined.run(seconds)
    assert bytes(joined.applications[1].heard) == there
    assert bytes(joined.applications[0].heard) == back
    assert [end.state for end in joined.ends] == [State.CLOSED] * 2


def path(**changed: float) -> tuple[Path, Path]:
    return Path(**changed), Path(**changed)  # type: ignore[arg-type]


# -- every byte, whatever the path does --------------------------------------------------------------------------------


@pytest.mark.parametrize("largest", [0, LARGEST], ids=["segments", "super"])
@pytest.mark.parametrize(("repeat", "late"), [(0, 0), (0.1, 0), (0, 0.3), (0.1, 0.3)])
@pytest.mark.parametrize("loss", [0, 0.01, 0.1, 0.3])
def test_every_byte_arrives(loss: float, repeat: float, late: float, largest: int) -> None:
    there, back = path(loss=loss, repeat=repeat, late=late)
    limits = Limits(MSS, largest)
    for seed in range(3):
        joined = Joined(seed=seed, there=there, back=back, limits=(limits, limits))
        exchange(joined, said(1, 300_000), said(2, 200_001))


@pytest.mark.parametrize(
    "isns", [(0, 0), (0xFFFFFFFF, 0xFFFFFFFE), (0x7FFFFFFF, 0x80000000), (2**32 - 150_000, 2**32 - 99_999)]
)
def test_sequence_numbers_wrap(isns: tuple[int, int]) -> None:
    there, back = path(loss=0.05, late=0.2)
    exchange(Joined(isns=isns, there=there, back=back), said(1, 300_000), said(2, 300_000))


@given(
    st.integers(0, 2**32),
    st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)),
    st.tuples(st.integers(0, 30_000), st.integers(0, 30_000)),
    st.tuples(st.sampled_from([0.0, 0.02, 0.3]), st.sampled_from([0.0, 0.2]), st.sampled_from([0.0, 0.5])),
    st.tuples(st.sampled_from([100, 536, 1460]), st.sampled_from([0, 3000, LARGEST])),
    st.tuples(st.integers(2000, 70_000), st.integers(2000, 70_000)),
    st.sampled_from([1 << 30, 700]),
)
@settings(max_examples=60, deadline=None)
def test_any_two_ends(
    seed: int,
    isns: tuple[int, int],
    lengths: tuple[int, int],
    faults: tuple[float, float, float],
    sizes: tuple[int, int],
    buffers: tuple[int, int],
    greed: int,
) -> None:
    there, back = path(loss=faults[0], repeat=faults[1], late=faults[2])
    limits = Limits(sizes[0], sizes[1], *buffers), Limits(MSS, 0, *reversed(buffers))
    joined = Joined(seed=seed, isns=isns, there=there, back=back, limits=limits)
    joined.applications[1].greed = greed
    exchange(joined, said(1, lengths[0]), said(2, lengths[1]), 50_000)


def test_a_link_that_is_cut_at_any_moment_and_comes_back() -> None:
    """A minute without a path, begun at each of many moments; with `resume` the rest takes a moment."""
    for moment in range(40):
        joined = Joined(there=Path(), back=Path())
        joined.applications[0].to_say, joined.applications[1].to_say = said(1, 2_000_000), said(2, 1_000_000)
        joined.run(moment / 1000)
        for one in joined.paths:
            one.cut = True
        joined.run(60)
        for one in joined.paths:
            one.cut = False
        for end in joined.ends:
            end.resume(joined.now)
        began = joined.now
        joined.run(100)
        assert [len(one.heard) for one in joined.applications] == [1_000_000, 2_000_000]
        assert max(at for at, *_ in joined.log) - began < 4


def test_a_slow_reader_holds_the_writer_back() -> None:
    limits = Limits(MSS, LARGEST, 100_000, 100_000)
    joined = Joined(limits=(limits, limits))
    joined.open()
    joined.applications[1].greed = 0
    joined.applications[0].to_say = said(1, 2_000_000)
    joined.run(600, until=lambda: joined.ends[1].readable > 100_000)
    assert 99_998 <= joined.ends[1].readable <= 100_000  # the window's unit is two bytes
    assert joined.applications[0].said <= 200_000
    probes = joined.sent[0]
    joined.run(600)
    assert joined.sent[0] - probes < 20  # one a minute
    joined.applications[1].greed = 10_000
    joined.run(100)
    assert bytes(joined.applications[1].heard) == joined.applications[0].to_say


def test_an_idle_connection_sends_nothing_and_lives() -> None:
    joined = Joined()
    joined.open()
    joined.run(1)
    sent = list(joined.sent)
    assert [end.next_timeout() for end in joined.ends] == [None, None]
    joined.run(30 * 86_400)
    assert joined.sent == sent
    joined.applications[0].to_say = b"still there?"
    joined.run(1)
    assert joined.applications[1].heard == b"still there?"


def test_both_ends_close_in_the_same_moment() -> None:
    joined = Joined()
    exchange(joined, b"abc", b"def")


def test_few_segments_are_sent_for_nothing() -> None:
    joined = Joined(limits=(Limits(MSS, LARGEST), Limits(MSS, LARGEST)))
    joined.applications[0].to_say = said(1, AMOUNT)
    joined.run(100)
    assert joined.payload_sent == [AMOUNT, 0]
    assert joined.sent[0] < AMOUNT / LARGEST + 20
    assert joined.sent[1] < AMOUNT / LARGEST + 20


# -- throughput against loss -------------------------------------------------------------------------------------------


def transfer(loss: float, largest: int, sack: bool) -> tuple[float, float]:
    """Seconds (virtual) until all was heard, and bytes sent for each byte heard: means of five runs."""
    seconds = sent = 0.0
    for seed in range(5):
        there, back = path(loss=loss)
        limits = Limits(MSS, largest)
        joined = Joined(seed=seed, there=there, back=back, limits=(limits, limits))
        if not sack:
            for end in joined.ends:
                end._options.sack = False
        joined.open()
        began = joined.now
        joined.applications[0].to_say = said(1, AMOUNT)
        joined.run(4000, until=lambda j=joined: len(j.applications[1].heard) == AMOUNT)
        assert bytes(joined.applications[1].heard) == joined.applications[0].to_say
        seconds += joined.now - began
        sent += joined.payload_sent[0] / AMOUNT
    return seconds / 5, sent / 5


def table() -> str:
    lines = [
        "4 MiB over a path of 10 ms there and back; Mb/s, and bytes sent for each that arrived (means of 5 seeds)",
        "",
        "         with SACK                      without SACK",
        "loss     1460 B         64 KiB          1460 B         64 KiB",
    ]
    for loss in LOSSES:
        cells = []
        for sack in (True, False):
            for largest in (0, LARGEST):
                seconds, sent = transfer(loss, largest, sack)
                cells.append(f"{AMOUNT * 8 / seconds / 1e6:6.1f}  {sent:5.2f}")
        lines.append(f"{loss * 100:4.1f} %  " + "  ".join(cells))
    return "\n".join(lines) + "\n"


def test_throughput_against_loss_is_as_stored() -> None:
    assert table() == TABLE.read_text()


if __name__ == "__main__":
    print(table(), end="")
