"""Whether the other end of a link is still there: when to ask it for a sign of life, and when to stop believing in it.

Pure: `now` is an argument. What is heard proves life, whatever it is, so a link that carries traffic both ways is never
asked. One that carries packets one way only is asked after UNANSWERED seconds, an idle one after `idle`.
"""

TICK = 0.25
"""Seconds between two looks."""
IDLE = 5.0
UNANSWERED = 1.0
PATIENCE, URGED = 3.0, 1.0
"""Seconds until a link that was asked is silent; the second when there is reason to think that it is lost."""
DEAD = 15.0
_SLEPT = 2.0


class Liveness:
    """One link's; `look` at it every TICK."""

    __slots__ = ("_asked_at", "_dead", "_heard_at", "_idle", "_looked_at", "_patience", "_spoke_at")

    def __init__(self, now: float, idle: float = IDLE, dead: float = DEAD) -> None:
        self._idle, self._dead, self._patience = idle, dead, PATIENCE
        self._heard_at = self._looked_at = now
        self._asked_at: float | None = None
        self._spoke_at: float | None = None

    def look(self, now: float, *, heard: bool, spoke: bool) -> bool:
        """What happened since the last look; whether to ask now.

        A look that comes late does so because this process, or the whole laptop, has slept: what the other end did
        meanwhile is not known, and it is asked.
        """
        slept = now - self._looked_at > _SLEPT
        self._looked_at = now
        if heard or slept:
            self._heard_at, self._asked_at, self._spoke_at = now, None, None
        if spoke and self._spoke_at is None:
            self._spoke_at = now
        if slept:
            return self.urge(now)
        if self._asked_at is not None:
            return False
        unanswered = self._spoke_at is not None and now - self._spoke_at >= UNANSWERED
        if unanswered or now - self._heard_at >= self._idle:
            self._asked_at, self._patience = now, PATIENCE
            return True
        return False

    def urge(self, now: float) -> bool:
        """Something says that the link may be lost: whether to ask now, since it was not asked yet."""
        asks, self._patience = self._asked_at is None, URGED
        self._asked_at = now if self._asked_at is None else self._asked_at
        return asks

    def is_silent(self, now: float) -> bool:
        """It was asked, and has said nothing."""
        return self._asked_at is not None and now - self._asked_at >= self._patience

    def is_dead(self, now: float) -> bool:
        """Nothing was heard for so long that nothing ever will be."""
        return self._asked_at is not None and now - self._heard_at >= self._dead
