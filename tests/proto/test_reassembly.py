"""Fragments put together again: whatever way a packet was cut and shuffled, and what is not a packet."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpvpn.proto.reassembly import MAX_BYTES, MAX_PACKETS, MAX_PIECES, TIMEOUT, Reassembler
from tpvpn.wire import ip

FOUR = bytes((246, 0, 0, 1)), bytes((10, 0, 0, 1))
SIX = b"\xfd" + bytes(14) + b"\1", b"\xfd" + bytes(14) + b"\2"


def piece(addresses: tuple[bytes, bytes], data: bytes, start: int, end: int, *, identification: int = 7) -> ip.Packet:
    return ip.parse(
        ip.build(
            *addresses,
            ip.UDP,
            data[start:end],
            identification=identification,
            dont_fragment=False,
            fragment_offset=start,
            more_fragments=end < len(data),
        )
    )


def cut(addresses: tuple[bytes, bytes], data: bytes, edges: list[int], **fields: int) -> list[ip.Packet]:
    bounds = sorted({0, len(data), *(edge * 8 for edge in edges if 0 < edge * 8 < len(data))})
    return [piece(addresses, data, *pair, **fields) for pair in itertools.pairwise(bounds)]


@pytest.mark.parametrize("addresses", [FOUR, SIX])
@given(st.integers(9, 3000), st.lists(st.integers(1, 374), min_size=1, max_size=20), st.randoms())
def test_any_cut_in_any_order_gives_the_packet(
    addresses: tuple[bytes, bytes], length: int, edges: list[int], chance: random.Random
) -> None:
    data = chance.randbytes(length)
    pieces = cut(addresses, data, [1, *edges])
    chance.shuffle(pieces)
    pieces[1:1] = pieces[:1]  # a repetition is harmless
    reassembler = Reassembler()
    found = [reassembler.add(one, 0) for one in pieces]
    assert found[:-1] == [None] * (len(pieces) - 1)
    assert found[-1] is not None
    whole = ip.parse(found[-1])
    assert (whole.source, whole.destination, whole.protocol, bytes(whole.payload)) == (*addresses, ip.UDP, data)
    assert not whole.is_fragment
    assert (reassembler.size, reassembler.dropped) == (0, 0)


OVERLAPS = {
    "a part again": [(0, 16), (8, 24)],
    "the same place, longer": [(0, 16), (0, 24)],
    "around another": [(8, 16), (0, 24)],
    "a second end": [(24, 40), (16, 32)],
    "beyond the end": [(24, 40), (40, 48)],
    "an end before what is there": [(16, 32), (8, 16)],
}


@pytest.mark.parametrize("name", OVERLAPS)
def test_what_does_not_fit_ends_its_packet(name: str) -> None:
    reassembler = Reassembler()
    lengths = {"a second end": (40, 32), "beyond the end": (40, 100), "an end before what is there": (100, 16)}
    for (start, end), length in zip(OVERLAPS[name], lengths.get(name, (100, 100)), strict=True):
        assert reassembler.add(piece(FOUR, bytes(length), start, end), 0) is None
    assert (reassembler.size, reassembler.dropped) == (0, 1)


def test_a_middle_that_becomes_the_end_does_not_hide_what_is_missing() -> None:
    """Its size and that of the piece beyond it are together where it ends."""
    reassembler, data = Reassembler(), bytes(100)
    assert reassembler.add(piece(FOUR, data, 8, 16), 0) is None
    assert reassembler.add(piece(FOUR, data, 16, 24), 0) is None
    assert reassembler.add(piece(FOUR, data[:16], 8, 16), 0) is None
    assert (reassembler.size, reassembler.dropped) == (0, 1)


def test_packets_are_told_apart() -> None:
    reassembler = Reassembler()
    ones, others = (cut(FOUR, text * 16, [1], identification=number) for number, text in ((1, b"a"), (2, b"b")))
    assert reassembler.add(ones[0], 0) is None
    assert reassembler.add(others[1], 0) is None
    whole = reassembler.add(others[0], 0)
    assert whole is not None
    assert bytes(ip.parse(whole).payload) == b"b" * 16


def test_it_never_holds_more_than_its_limits() -> None:
    reassembler = Reassembler()
    for number in range(1000):
        assert reassembler.add(piece(FOUR, bytes(60_008), 0, 60_000, identification=number), 0) is None
        assert reassembler.size <= MAX_BYTES
    assert reassembler.dropped >= 1000 - MAX_BYTES // 60_000 - 1
    small = Reassembler()
    for number in range(1000):
        small.add(piece(FOUR, bytes(16), 0, 8, identification=number), 0)
    assert small.dropped == 1000 - MAX_PACKETS


def test_crumbs_are_not_compared_for_ever() -> None:
    reassembler = Reassembler()
    for at in range(MAX_PIECES + 1):
        reassembler.add(piece(FOUR, bytes(60_000), at * 16, at * 16 + 8), 0)
    assert reassembler.dropped == 1


def test_what_is_not_whole_in_time_is_given_up() -> None:
    reassembler = Reassembler()
    first, second = cut(FOUR, bytes(16), [1])
    reassembler.add(first, 0)
    reassembler.expire(TIMEOUT - 0.1)
    assert reassembler.dropped == 0
    assert reassembler.add(second, TIMEOUT) is None
    assert reassembler.dropped == 1


def test_a_packet_larger_than_any_is_dropped() -> None:
    reassembler = Reassembler()
    data = bytes(65_528)
    assert reassembler.add(piece(FOUR, data, 0, 40_000), 0) is None
    with_end = ip.parse(
        ip.build(*FOUR, ip.UDP, data[40_000:65_520], dont_fragment=False, fragment_offset=40_000, identification=7)
    )
    assert reassembler.add(with_end, 0) is None
    assert (reassembler.size, reassembler.dropped) == (0, 1)
