"""A byte stream inside a WebSocket (RFC 6455), on the data channel of `v4.channel.k8s.io`: the client's half.

What it carries is a sequence of binary messages whose first byte names the channel: 0 is data, 1 an error's words.
A frame goes out as one piece, header and all: a TLS record and a packet of its own for each header cost more than the
copy. The mask, which must be there, is all zeros (section 5.3 wants it unpredictable for the sake of caches that would
take frames for HTTP; inside TLS there are none), so that nothing has to be masked.
"""

import errno
import ssl
import struct

from tpvpn.proto.message import printable
from tpvpn.transport.stream import Stream

DATA, ERROR = 0, 1
_CONTINUATION, _TEXT, _BINARY, _CLOSE, _PING, _PONG = 0, 1, 2, 8, 9, 10
_FIN, _MASKED = 0x80, 0x80
_BUFFER = 1 << 18
_LARGEST = 1 << 16
"""Bytes of a frame that we send: whoever passes it on reads it whole."""
_MOST_CONTROL = 125  # section 5.5
_MOST_BEFORE = 256
"""Bytes of a pong and of a frame's header."""
_PORT_LENGTH = 2  # each channel begins with the port, little-endian
_MOST_WORDS = 4096


class WebSocketStream(Stream):
    """The stream over a connection whose upgrade was answered; `early` came behind that."""

    def __init__(self, connected: Stream, early: bytes) -> None:
        super().__init__(connected.socket)
        self._under = connected
        self.recv_into = self._receive
        self.send = self._send
        self._raw = memoryview(bytearray(_BUFFER + len(early)))
        self._raw[: len(early)] = early
        self._at, self._end = 0, len(early)
        self._left = 0  # of the frame that is being received
        self._opcode = self._channel = -1
        self._skip = {DATA: _PORT_LENGTH, ERROR: _PORT_LENGTH}
        self._words = bytearray()
        self._control = bytearray()
        self._pong = b""  # goes out before the next frame
        self._frame = memoryview(bytearray(_LARGEST + _MOST_BEFORE))
        self._unsent = self._frame[:0]  # what the stream below has not taken yet
        self._owed = 0  # of the caller's bytes: what that stands for
        self._closed = False

    def pending(self) -> int:
        """Bytes that are here already but not announced by the descriptor."""
        return self._end - self._at if self._is_ready() else self._under.pending()

    # -- receiving -----------------------------------------------------------------------------------------------------

    def _receive(self, buffer: memoryview | bytearray) -> int:
        """Data into the buffer; 0 at the end. One of WOULD_BLOCK, or OSError, with what was said."""
        view, have = memoryview(buffer), 0
        while have < len(view) and not self._closed:
            if self._is_ready():
                have += self._take(view[have:]) if self._left else self._begin_frame()
            elif have:
                break
            elif not self._fill():
                return 0
        return have

    def _fill(self) -> bool:
        """Read more; False at the end."""
        if self._at:
            rest = self._end - self._at
            self._raw[:rest] = self._raw[self._at : self._end]
            self._at, self._end = 0, rest
        count = self._under.recv_into(self._raw[self._end :])
        self._end += count
        return count > 0

    def _is_ready(self) -> bool:
        """Something of a frame's payload is here, or the whole header of the next frame."""
        there = self._end - self._at
        if self._left:
            return there > 0
        return there >= 2 and there >= 2 + {126: 2, 127: 8}.get(self._raw[self._at + 1] & 0x7F, 0)

    def _begin_frame(self) -> int:
        """Read the next frame's header; 0, since it is no data."""
        first, length = self._raw[self._at], self._raw[self._at + 1] & 0x7F
        self._at += 2
        if length == 126:
            (length,) = struct.unpack_from(">H", self._raw, self._at)
            self._at += 2
        elif length == 127:
            (length,) = struct.unpack_from(">Q", self._raw, self._at)
            self._at += 8
        opcode = first & 0x0F
        if opcode in (_TEXT, _BINARY):
            self._channel = -1
        if opcode >= _CLOSE and length > _MOST_CONTROL:
            raise ConnectionResetError(errno.ECONNRESET, "the API server sent what is no WebSocket frame")
        self._opcode, self._left = opcode, length
        if not length:
            self._end_frame()
        return 0

    def _take(self, view: memoryview) -> int:
        """Some of the frame's payload; how many bytes of it are data."""
        count = min(self._left, self._end - self._at)
        if self._opcode >= _CLOSE:
            self._control += self._raw[self._at : self._at + count]
            self._pass(count)
            return 0
        if self._channel < 0:
            self._channel = self._raw[self._at]
            self._pass(1)
            return 0
        if skipped := min(count, self._skip.get(self._channel, 0)):
            self._skip[self._channel] -= skipped
            self._pass(skipped)
            return 0
        if self._channel != DATA:
            self._words += self._raw[self._at : self._at + count][: _MOST_WORDS - len(self._words)]
            self._pass(count)
            return 0
        count = min(count, len(view))
        view[:count] = self._raw[self._at : self._at + count]
        self._pass(count)
        return count

    def _pass(self, count: int) -> None:
        self._at += count
        self._left -= count
        if not self._left:
            self._end_frame()

    def _end_frame(self) -> None:
        if self._opcode == _CLOSE:
            self._closed = True
        elif self._opcode == _PING:
            self._pong = bytes((_FIN | _PONG, _MASKED | len(self._control))) + bytes(4) + bytes(self._control)
        elif self._words:
            words = printable(self._words.decode(errors="replace"), 300)
            raise ConnectionResetError(errno.ECONNRESET, f"the API server forwards no more: {words}")
        self._control.clear()

    # -- sending -------------------------------------------------------------------------------------------------------

    def _send(self, data: memoryview | bytes) -> int:
        """Send some of the data; how much. One of WOULD_BLOCK, after which the same data must come; or OSError."""
        if not self._owed:
            self._owed = min(len(data), _LARGEST)
            header = self._pong + _frame_header(self._owed + 1) + bytes((DATA,))
            end = len(header) + self._owed
            self._frame[: len(header)] = header
            self._frame[len(header) : end] = memoryview(data)[: self._owed]
            self._unsent, self._pong = self._frame[:end], b""
        while self._unsent:
            try:
                self._unsent = self._unsent[self._under.send(self._unsent) :]
            except ssl.SSLWantReadError as error:  # a TLS renegotiation; to a link it is no different
                raise BlockingIOError from error
        sent, self._owed = self._owed, 0
        return sent


def _frame_header(length: int) -> bytes:
    """Of one whole binary message, masked by zeros."""
    if length < 126:
        return struct.pack(">BBI", _FIN | _BINARY, _MASKED | length, 0)
    if length < 1 << 16:
        return struct.pack(">BBHI", _FIN | _BINARY, _MASKED | 126, length, 0)
    return struct.pack(">BBQI", _FIN | _BINARY, _MASKED | 127, length, 0)
