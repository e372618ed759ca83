"""What the manager counts, in Prometheus' text format (exposition format 0.0.4)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields

from tpvpn.manager import resolver
from tpvpn.pump import Counters


@dataclass(slots=True)
class Counted:
    """Events of the manager's port since it started."""

    sessions: int = 0
    refused: int = 0
    """Connections that ended before they were a session."""
    unauthenticated: int = 0
    """Those of them that had no token of ours."""
    finished: Counters = field(default_factory=Counters)
    """Packets and bytes of the sessions that have ended."""
    names: resolver.Counters = field(default_factory=resolver.Counters)

    def finish(self, counters: Counters) -> None:
        """Add what a session counted that has ended."""
        for one in fields(Counters):
            setattr(self.finished, one.name, getattr(self.finished, one.name) + getattr(counters, one.name))


def render(counted: Counted, running: Iterable[Counters], exit: Mapping[str, int]) -> str:
    """The text of /metrics; `sent` and `received` are as the manager sees them."""
    running = list(running)
    lines = ["# TYPE tpvpn_sessions gauge", f"tpvpn_sessions {len(running)}"]
    totals = {
        "sessions_opened": counted.sessions,
        "connections_refused": counted.refused,
        "connections_unauthenticated": counted.unauthenticated,
    }
    for one in fields(Counters):
        totals[one.name] = getattr(counted.finished, one.name) + sum(getattr(each, one.name) for each in running)
    totals |= {f"dns_{one.name}": getattr(counted.names, one.name) for one in fields(resolver.Counters)}
    totals |= {f"exit_{name}": count for name, count in exit.items()}
    for name, count in totals.items():
        lines += [f"# TYPE tpvpn_{name}_total counter", f"tpvpn_{name}_total {count}"]
    return "\n".join(lines) + "\n"
