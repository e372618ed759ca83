"""Frames on the byte stream between client and manager.

A frame is a 4-byte header in network order, kind in the top 8 bits and payload length in the low 24, then the payload
(docs/reference/wire.md). A packet frame's header is therefore just its length. It knows nothing of what payloads mean.
"""

import struct
from collections.abc import Iterator

from tpvpn.errors import ProtocolError

HEADER_LENGTH = 4
MAX_PAYLOAD = 1 << 20
"""Bytes; a longer frame ends the link."""
MAX_PAYLOAD_BEFORE_WELCOME = 4096
"""Bytes; until the other end has proved itself."""

PACKET, CONTROL, DNS = 0, 1, 2

HEADER = struct.Struct(">I")


def encode(kind: int, payload: bytes) -> bytes:
    """One frame; ValueError when the payload is longer than any receiver takes."""
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"a payload of {len(payload)} bytes does not fit a frame")
    return HEADER.pack(kind << 24 | len(payload)) + payload


def check_length(kind: int, length: int, limit: int = MAX_PAYLOAD) -> None:
    """ProtocolError when a frame announces more than `limit` bytes."""
    if length > limit:
        raise ProtocolError(
            f"the other end sent a frame of kind {kind} with {length} bytes, more than the {limit} allowed; "
            "is it a tpvpn manager of this version?"
        )


class Decoder:
    """Cuts a byte stream into frames; for control traffic (the packet path has its own loop in `pump`)."""

    def __init__(self, limit: int = MAX_PAYLOAD) -> None:
        self.limit = limit
        self._data = bytearray()

    def receive(self, data: bytes) -> None:
        """Take bytes as they came, cut anywhere."""
        self._data += data

    def frames(self) -> Iterator[tuple[int, bytes]]:
        """The whole frames received so far, as (kind, payload); ProtocolError on one that is too long."""
        while len(self._data) >= HEADER_LENGTH:
            (word,) = HEADER.unpack_from(self._data)
            kind, length = word >> 24, word & 0xFFFFFF
            check_length(kind, length, self.limit)
            end = HEADER_LENGTH + length
            if len(self._data) < end:
                return
            payload = bytes(self._data[HEADER_LENGTH:end])
            del self._data[:end]
            yield kind, payload

    def remainder(self) -> bytes:
        """The bytes of a frame that is not whole yet, handed over to the next reader."""
        rest = bytes(self._data)
        self._data.clear()
        return rest
