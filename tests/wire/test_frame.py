"""Frames: what is encoded comes out again wherever the stream is cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpvpn.errors import ProtocolError
from tpvpn.wire import frame

FRAMES = st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=40)), max_size=8)


@given(FRAMES, st.data())
def test_cut_anywhere(frames: list[tuple[int, bytes]], data: st.DataObject) -> None:
    stream = b"".join(frame.encode(kind, payload) for kind, payload in frames)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=10)))
    decoder, out = frame.Decoder(), []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        decoder.receive(stream[start:end])
        out += decoder.frames()
    assert out == frames
    assert decoder.remainder() == b""


def test_the_header_is_kind_and_length_in_network_order() -> None:
    assert frame.encode(frame.DNS, b"abc") == b"\x02\x00\x00\x03abc"


def test_a_frame_too_long_is_named_before_it_is_read() -> None:
    decoder = frame.Decoder(limit=4096)
    decoder.receive(bytes([1, 0, 0x10, 1]))
    with pytest.raises(ProtocolError, match="kind 1 with 4097 bytes"):
        list(decoder.frames())
    with pytest.raises(ValueError, match="does not fit"):
        frame.encode(1, bytes(frame.MAX_PAYLOAD + 1))


def test_a_truncated_frame_stays_and_can_be_handed_over() -> None:
    decoder = frame.Decoder()
    decoder.receive(frame.encode(1, b"whole") + b"\x01\x00\x00\x09half")
    assert list(decoder.frames()) == [(1, b"whole")]
    assert decoder.remainder() == b"\x01\x00\x00\x09half"
