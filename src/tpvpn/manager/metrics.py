"""What the manager counts, and the text of its /metrics (docs/reference/metrics.md)."""

import asyncio
import os
import platform
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

import tpvpn
from tpvpn.exposition import Histogram, by, family, histogram, single
from tpvpn.manager import memory, resolver
from tpvpn.manager.session import Session
from tpvpn.pump import Counters

_STARTED = time.time()
_PAGE = os.sysconf("SC_PAGE_SIZE")
_LOOK = 0.5
"""Seconds between two looks at the event loop's lag."""
_LAGS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
REFUSALS = ("token", "protocol", "timeout", "crowded", "capacity", "connection")
"""Why a connection did not become a link."""


@dataclass(slots=True)
class Counted:
    """Events of the manager's port since it started."""

    sessions: int = 0
    resumed: int = 0
    """Sessions that had no link, and were taken up again."""
    links: int = 0
    refused: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(REFUSALS, 0)))
    finished: Counters = field(default_factory=Counters)
    """Packets and bytes of the sessions that have ended."""
    names: resolver.Counters = field(default_factory=resolver.Counters)
    lag: Histogram = field(default_factory=lambda: Histogram(_LAGS))
    """How late the event loop is for a timer."""

    def finish(self, counters: Counters) -> None:
        """Add what a session counted that has ended."""
        self.finished = _sum(self.finished, counters)


@dataclass(frozen=True, slots=True)
class Load:
    """What the socket exit has open, and may have."""

    flows: Mapping[str, int]
    """By protocol."""
    most_flows: int
    buffers: int
    """Bytes."""
    most_buffers: int


async def look_at_lag(lag: Histogram) -> None:
    """See for ever how late the loop is: meanwhile others wait for it too."""
    while True:
        due = time.monotonic() + _LOOK
        await asyncio.sleep(_LOOK)
        lag.observe(max(0.0, time.monotonic() - due))


def render(
    counted: Counted,
    sessions: Collection[Session],
    kinds: Mapping[int, str | None],
    dropped: Mapping[str, int],
    load: Load | None,
    most_sessions: int,
) -> str:
    """The text; `kinds`, `dropped` and `load` are the exit's."""
    parts = [*_about(kinds), *_sessions(counted, sessions, most_sessions), *_traffic(counted, sessions, dropped)]
    parts += [*_names(counted.names), *(_load(load) if load else ()), *_process(counted)]
    return "".join(parts)


def _about(kinds: Mapping[int, str | None]) -> Iterator[str]:
    built = {"version": tpvpn.__version__, "python": platform.python_version()}
    yield family("gauge", "tpvpn_manager_build_info", "What runs here; 1.", [(built, 1)])
    exits = [({"family": f"ipv{version}", "kind": kind or "none"}, 1) for version, kind in kinds.items()]
    yield family("gauge", "tpvpn_manager_exit_info", "How packets of each family leave; 1.", exits)


def _sessions(counted: Counted, sessions: Collection[Session], most: int) -> Iterator[str]:
    linked = sum(one.links > 0 for one in sessions)
    states = {"linked": linked, "lingering": len(sessions) - linked}
    yield family("gauge", "tpvpn_manager_sessions", "Sessions, by whether they have a link.", by("state", states))
    yield single("gauge", "tpvpn_manager_sessions_limit", "Sessions that there may be.", most)
    yield single("gauge", "tpvpn_manager_links", "Connections of all sessions.", sum(one.links for one in sessions))
    yield single("counter", "tpvpn_manager_sessions_opened_total", "Sessions that were begun.", counted.sessions)
    yield single(
        "counter",
        "tpvpn_manager_sessions_resumed_total",
        "Sessions without a link that were taken up again.",
        counted.resumed,
    )
    yield single("counter", "tpvpn_manager_links_opened_total", "Connections that became a link.", counted.links)
    help = "Connections that became no link, by reason."
    yield family("counter", "tpvpn_manager_refusals_total", help, by("reason", counted.refused))


def _traffic(counted: Counted, sessions: Collection[Session], dropped: Mapping[str, int]) -> Iterator[str]:
    total = counted.finished
    for one in sessions:
        total = _sum(total, one.counters)
    volume = {"from_client": total.received_bytes, "to_client": total.sent_bytes}
    packets = {"from_client": total.received_packets, "to_client": total.sent_packets}
    yield family("counter", "tpvpn_manager_bytes_total", "Bytes carried, with frames.", by("direction", volume))
    yield family("counter", "tpvpn_manager_packets_total", "Packets carried.", by("direction", packets))
    reasons = {"foreign": total.foreign_packets, "malformed": total.invalid_packets, **dropped}
    yield family("counter", "tpvpn_manager_dropped_packets_total", "Packets dropped, by reason.", by("reason", reasons))


def _names(names: resolver.Counters) -> Iterator[str]:
    yield single("counter", "tpvpn_manager_dns_questions_total", "Questions for names.", names.questions)
    yield single("counter", "tpvpn_manager_dns_failures_total", "Questions that nobody answered.", names.failed)
    yield single(
        "counter",
        "tpvpn_manager_dns_dropped_total",
        "Frames that were no question, and answers that the client did not take.",
        names.dropped,
    )
    yield histogram("tpvpn_manager_dns_duration_seconds", "Time from a question to its end.", names.durations)


def _load(load: Load) -> Iterator[str]:
    yield family("gauge", "tpvpn_manager_flows", "Flows of the socket exit.", by("protocol", load.flows))
    yield single("gauge", "tpvpn_manager_flows_limit", "Flows that there may be.", load.most_flows)
    yield single("gauge", "tpvpn_manager_buffer_bytes", "Bytes in buffers of flows.", load.buffers)
    yield single("gauge", "tpvpn_manager_buffer_limit_bytes", "Bytes that may be there.", load.most_buffers)


def _process(counted: Counted) -> Iterator[str]:
    lag = "How late the event loop was for a timer, twice a second."
    yield histogram("tpvpn_manager_event_loop_lag_seconds", lag, counted.lag)
    if limit := memory.limit():
        yield single("gauge", "tpvpn_manager_memory_limit_bytes", "Memory that the process may use.", limit)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE
    # As Prometheus' own client libraries name them.
    yield single("gauge", "process_resident_memory_bytes", "Resident memory.", resident)
    yield single("counter", "process_cpu_seconds_total", "CPU time.", time.process_time())
    yield single("gauge", "process_start_time_seconds", "Start of the process, by Unix time.", _STARTED)


def _sum(one: Counters, other: Counters) -> Counters:
    return Counters(*(getattr(one, each.name) + getattr(other, each.name) for each in fields(Counters)))
