"""The WebSocket of a port-forward: frames cut anywhere, both ways, and what the other end may say between them."""

import asyncio
import contextlib
import random
import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpvpn.transport.stream import WOULD_BLOCK, Stream
from tpvpn.transport.websocket import WebSocketStream

PORTS = b"\x82\x03\x00\x9e\x1b" + b"\x82\x03\x01\x9e\x1b"
"""How each channel begins: its number and the port, 7070."""


def framed(payload: bytes, opcode: int = 2, fin: bool = True) -> bytes:
    """As a server sends it: not masked."""
    first = (0x80 if fin else 0) | opcode
    if len(payload) < 126:
        return struct.pack(">BB", first, len(payload)) + payload
    if len(payload) < 1 << 16:
        return struct.pack(">BBH", first, 126, len(payload)) + payload
    return struct.pack(">BBQ", first, 127, len(payload)) + payload


def unframed(stream: bytes) -> tuple[bytes, list[tuple[int, bytes]]]:
    """What a client sent: its data, and its control frames; every frame must be masked, and whole."""
    data, control, at = b"", [], 0
    while at < len(stream):
        first, length = stream[at], stream[at + 1]
        assert first & 0x80
        assert length & 0x80
        at += 2
        length &= 0x7F
        if length >= 126:
            size = {126: 2, 127: 8}[length]
            length = int.from_bytes(stream[at : at + size], "big")
            at += size
        mask, at = stream[at : at + 4], at + 4
        payload = bytes(byte ^ mask[index % 4] for index, byte in enumerate(stream[at : at + length]))
        assert len(payload) == length
        at += length
        if first & 0x0F == 2:
            assert payload[0] == 0
            data += payload[1:]
        else:
            control.append((first & 0x0F, payload))
    return data, control


@contextlib.contextmanager
def ends(early: bytes = b""):
    """The stream, and the socket of the other end."""

    async def made() -> WebSocketStream:
        return WebSocketStream(Stream(ours), early)

    ours, theirs = socket.socketpair()
    with theirs:
        theirs.settimeout(5)
        stream = asyncio.run(made())
        yield stream, theirs
        stream.close()


def received(stream: WebSocketStream, size: int = 1 << 16) -> bytes:
    """Everything that is here; b"" at the end."""
    data, buffer = b"", bytearray(size)
    while True:
        try:
            count = stream.recv_into(buffer)
        except WOULD_BLOCK:
            return data
        if not count:
            return data
        data += buffer[:count]


@given(st.data())
def test_what_comes_is_the_same_wherever_it_is_cut(data: st.DataObject) -> None:
    chance = random.Random(data.draw(st.integers(0, 1 << 32)))
    parts = [chance.randbytes(chance.choice((1, 125, 126, 5000, 70_000))) for _ in range(chance.randint(1, 4))]
    sent = PORTS
    for part in parts:
        cut = chance.randint(0, len(part))
        sent += framed(b"\x00" + part[:cut], fin=False) + framed(b"ping?", opcode=9) + framed(part[cut:], opcode=0)
    early = chance.randint(0, min(len(sent), 20))
    with ends(sent[:early]) as (stream, theirs):
        got, at = b"", early
        while at < len(sent):
            piece = sent[at : at + chance.choice((1, 2, 9, 1000, 60_000))]
            theirs.sendall(piece)
            at += len(piece)
            got += received(stream, chance.choice((1, 100, 1 << 16)))
        assert got + received(stream) == b"".join(parts)
        assert stream.pending() == 0


@given(st.lists(st.sampled_from([1, 124, 125, 126, 65_535, 65_536, 200_000]), min_size=1, max_size=4))
def test_what_is_sent_arrives_in_masked_frames(sizes: list[int]) -> None:
    with ends(PORTS) as (stream, theirs):
        data, got, at = random.Random(1).randbytes(sum(sizes)), b"", 0
        theirs.setblocking(False)
        while at < len(data):
            with contextlib.suppress(*WOULD_BLOCK):
                at += stream.send(memoryview(data)[at : at + 100_000])
                continue
            got += theirs.recv(1 << 20)
        with contextlib.suppress(BlockingIOError):
            while True:
                got += theirs.recv(1 << 20)
        assert unframed(got) == (data, [])


def test_a_ping_is_answered_with_its_words() -> None:
    with ends(PORTS + framed(b"are you there", opcode=9)) as (stream, theirs):
        assert received(stream) == b""
        assert stream.send(b"data") == 4
        assert unframed(theirs.recv(100)) == (b"data", [(10, b"are you there")])


def test_pings_between_the_pieces_of_a_frame_are_answered_behind_it() -> None:
    with ends(PORTS) as (stream, theirs):
        data, sent, got = random.Random(2).randbytes(3_000_000), 0, b""
        theirs.setblocking(False)
        theirs.sendall(framed(b"first", opcode=9) + framed(b"second", opcode=9))
        while sent < len(data):
            received(stream)
            with contextlib.suppress(*WOULD_BLOCK):
                sent += stream.send(memoryview(data)[sent:])
                continue
            with contextlib.suppress(BlockingIOError):
                theirs.sendall(framed(b"third", opcode=9))
            got += theirs.recv(1 << 20)
        with contextlib.suppress(BlockingIOError):
            while more := theirs.recv(1 << 20):
                got += more
        arrived, control = unframed(got)
        assert arrived == data
        assert control[0] == (10, b"second")  # RFC 6455 section 5.5.3: the last of several may do
        assert set(control[1:]) == {(10, b"third")}


def test_a_control_frame_longer_than_any_is_the_end() -> None:
    for length in (126, 1 << 40):
        header = struct.pack(">BBQ", 0x89, 127, length)
        with ends(PORTS + header) as (stream, _), pytest.raises(OSError, match="no WebSocket frame"):
            received(stream)


def test_a_close_and_an_end_are_the_end() -> None:
    for last in (framed(struct.pack(">H", 1000), opcode=8), b""):
        with ends(PORTS + framed(b"\x00bye") + last) as (stream, theirs):
            theirs.shutdown(socket.SHUT_WR)
            buffer = bytearray(100)
            assert stream.recv_into(buffer) == 3
            assert stream.recv_into(buffer) == 0


def test_an_error_of_the_other_end_is_told_in_its_words() -> None:
    words = b"\x01error forwarding port 7070: connection refused\x1b[2J"
    with ends(PORTS + framed(words)) as (stream, _), pytest.raises(OSError, match=r"connection refused\?\[2J"):
        received(stream)
