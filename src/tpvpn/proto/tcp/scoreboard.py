"""What the peer says it has beyond the acknowledgment (RFC 2018): ranges of positions, merged and sorted.

It is advice, forgotten when a retransmission timer expires (RFC 2018 section 8), and bounded: a peer that names more
ranges than any needs is not listened to.
"""

_MAX_RANGES = 256


class Scoreboard:
    """Disjoint ranges [start, end)."""

    __slots__ = ("ranges",)

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []

    def __bool__(self) -> bool:
        return bool(self.ranges)

    @property
    def highest(self) -> int:
        """Where the last range begins: all before it that is in no range is missing."""
        return self.ranges[-1][0]

    @property
    def size(self) -> int:
        """Bytes the peer has."""
        return sum(end - start for start, end in self.ranges)

    def add(self, start: int, end: int) -> bool:
        """Note a range; whether that was news."""
        merged: list[tuple[int, int]] = []
        for have_start, have_end in self.ranges:
            if have_start <= start and end <= have_end:
                return False
            if have_end < start or have_start > end:
                merged.append((have_start, have_end))
            else:
                start, end = min(start, have_start), max(end, have_end)
        if len(merged) >= _MAX_RANGES:
            return False
        merged.append((start, end))
        merged.sort()
        self.ranges = merged
        return True

    def drop(self, until: int) -> None:
        """Forget what is acknowledged."""
        self.ranges = [(max(start, until), end) for start, end in self.ranges if end > until]

    def clear(self) -> None:
        """Forget everything."""
        self.ranges = []

    def hole(self, position: int, limit: int) -> tuple[int, int]:
        """The first missing piece from a position up to `limit`, as (start, end); empty when there is none."""
        for start, end in self.ranges:
            if position < start:
                return position, min(start, limit)
            position = max(position, end)
        return min(position, limit), limit
