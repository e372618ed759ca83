"""How often what may be forged is answered (RFC 5961 section 7), so that a flood of it brings no flood of answers."""

_A_SECOND = 10


class Challenges:
    """One connection's."""

    __slots__ = ("_count", "_since")

    def __init__(self) -> None:
        self._count, self._since = 0, 0.0

    def may_answer(self, now: float) -> bool:
        """Whether one more acknowledgment may be sent; it counts."""
        if now - self._since >= 1:
            self._count, self._since = 0, now
        self._count += 1
        return self._count <= _A_SECOND
