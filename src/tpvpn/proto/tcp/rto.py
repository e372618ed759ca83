"""The retransmission timeout by RFC 6298: from samples of the round-trip time, doubled at each expiry.

The lower bound is 0.2 s, as Linux has it, instead of the RFC's 1 s: the path to the laptop is a tunnel that loses next
to nothing, and a lost tail would stall its flow. All times are in seconds.
"""

INITIAL = 1.0
LEAST, MOST = 0.2, 60.0
_GRANULARITY = 0.001


class RetransmissionTimeout:
    """`value` is the RTO, backed off; SRTT and RTTVAR come from samples of segments that were sent once."""

    __slots__ = ("_backoff", "_rto", "rttvar", "srtt")

    def __init__(self) -> None:
        self.srtt: float | None = None
        self.rttvar = 0.0
        self._rto = INITIAL
        self._backoff = 1

    @property
    def value(self) -> float:
        """How long to wait for the next acknowledgment."""
        return min(self._rto * self._backoff, MOST)

    def sample(self, rtt: float) -> None:
        """Take a round-trip time; the path answers, so the backoff is over."""
        if self.srtt is None:
            self.srtt, self.rttvar = rtt, rtt / 2
        else:
            self.rttvar += (abs(self.srtt - rtt) - self.rttvar) / 4
            self.srtt += (rtt - self.srtt) / 8
        self._rto = min(max(self.srtt + max(_GRANULARITY, 4 * self.rttvar), LEAST), MOST)
        self._backoff = 1

    def back_off(self) -> None:
        """The timer expired: wait twice as long next time."""
        if self._rto * self._backoff < MOST:
            self._backoff *= 2

    def reset_backoff(self) -> None:
        """What made the timer expire is known to be over."""
        self._backoff = 1
