"""What a sender has taken and the peer has not acknowledged: bytes by their position in the stream.

It knows nothing of segments. What is written in large pieces is kept as it came and read as views: no byte is copied.
Small pieces are merged, so that the number of pieces stays in proportion to the bytes.
"""

_SMALL = 2048
"""Bytes; a piece this small joins one before it that is not twice as large."""


class SendBuffer:
    """Bytes from position `start` to `end`."""

    __slots__ = ("_first", "_pieces", "end", "start")

    def __init__(self, start: int) -> None:
        self.start = self.end = start
        self._first = start  # of the first piece, whose beginning may be gone already
        self._pieces: list[bytes] = []

    def __len__(self) -> int:
        return self.end - self.start

    def append(self, data: bytes) -> None:
        """Add bytes at the end."""
        pieces = self._pieces
        if pieces and len(data) < _SMALL and len(pieces[-1]) < 2 * _SMALL:
            pieces[-1] += data  # a new object: views of the old one stay valid
        else:
            pieces.append(data)
        self.end += len(data)

    def drop(self, until: int) -> None:
        """Forget what is before a position."""
        self.start = until
        gone = 0
        for piece in self._pieces:
            if self._first + len(piece) > until:
                break
            self._first += len(piece)
            gone += 1
        del self._pieces[:gone]

    def read(self, position: int, length: int) -> memoryview:
        """The bytes from a position: a view when they are in one piece, else a copy."""
        pieces = self._pieces
        at, index = self.end - len(pieces[-1]), len(pieces) - 1
        if position < at:  # new data is in the last piece
            at, index = self._first, 0
            while position >= at + len(pieces[index]):
                at += len(pieces[index])
                index += 1
        begin = position - at
        piece = pieces[index]
        if begin + length <= len(piece):
            return memoryview(piece)[begin : begin + length]
        parts = [memoryview(piece)[begin:]]
        missing = length - len(parts[0])
        while missing:
            index += 1
            parts.append(memoryview(pieces[index])[:missing])
            missing -= len(parts[-1])
        return memoryview(b"".join(parts))
