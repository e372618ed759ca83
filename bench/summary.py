"""From rounds of figures to medians, relations to the direct path, and verdicts. Pure: values in, values out.

A round holds, for each way, one figure a metric, all measured within the same minutes. The machine's load changes from
round to round, so a way is set against the direct path of its own round (or against the bare stream that carries it),
and the median of these relations is what counts.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Figures = dict[str, float]
Round = dict[str, Figures]
Relation = Literal["itself", "of direct", "over direct", "of bare"]

DIRECT = "direct"


@dataclass(frozen=True)
class Metric:
    """One figure: its name in the results, and how it is shown."""

    name: str
    title: str
    unit: str
    digits: int = 2


METRICS = (
    Metric("bare_up", "bare stream up", "Gb/s", 3),
    Metric("bare_down", "bare stream down", "Gb/s", 3),
    Metric("tcp1_up", "TCP, 1 flow up", "Gb/s", 3),
    Metric("tcp1_down", "TCP, 1 flow down", "Gb/s", 3),
    Metric("tcp8_up", "TCP, 8 flows up", "Gb/s", 3),
    Metric("tcp8_down", "TCP, 8 flows down", "Gb/s", 3),
    Metric("udp_up", "UDP 64 B up", "packets/s", 0),
    Metric("udp_down", "UDP 64 B down", "packets/s", 0),
    Metric("connections", "new connections", "1/s", 0),
    Metric("connections_p50_ms", "a new connection, median", "ms"),
    Metric("connections_p99_ms", "a new connection, p99", "ms"),
    Metric("requests", "keep-alive requests", "1/s", 0),
    Metric("requests_p50_ms", "a request, median", "ms"),
    Metric("requests_p99_ms", "a request, p99", "ms"),
    Metric("ping_idle", "ping idle, median", "ms", 3),
    Metric("ping_idle_p99", "ping idle, p99", "ms", 3),
    Metric("ping_up", "ping beside 8 flows up, median", "ms"),
    Metric("ping_up_p99", "ping beside 8 flows up, p99", "ms"),
    Metric("ping_down", "ping beside 8 flows down, median", "ms"),
    Metric("ping_down_p99", "ping beside 8 flows down, p99", "ms"),
    Metric("cpu_laptop", "CPU of the laptop's end", "s/GB"),
    Metric("cpu_node", "CPU of the node's end", "s/GB"),
    Metric("rss_laptop", "RSS of the laptop's end", "MiB", 1),
    Metric("rss_node", "RSS of the node's end", "MiB", 1),
    Metric("pss_laptop", "PSS of the laptop's end", "MiB", 1),
    Metric("pss_node", "PSS of the node's end", "MiB", 1),
    Metric("idle_laptop", "idle CPU of the laptop's end", "%"),
    Metric("idle_node", "idle CPU of the node's end", "%"),
    Metric("connect_s", "connect to ready", "s"),
    Metric("ephemeral_s", "connect to ready without a manager", "s"),
    Metric("help_s", "tpvpn --help", "s"),
    Metric("plan_s", "tpvpn plan", "s"),
)


@dataclass(frozen=True)
class Bar:
    """What a way must reach: a metric, itself or in relation to another figure, at least or at most a limit."""

    metric: str
    relation: Relation
    side: Literal["at least", "at most"]
    limit: float

    def passes(self, value: float) -> bool:
        """Whether a value is on the right side."""
        return value >= self.limit if self.side == "at least" else value <= self.limit


def _bulk(relation: Relation, share: float) -> tuple[Bar, ...]:
    return tuple(Bar(f"tcp{flows}_{way}", relation, "at least", share) for flows in (1, 8) for way in ("up", "down"))


_KERNEL = (
    *_bulk("of direct", 0.30),
    Bar("connections", "of direct", "at least", 0.6),
    Bar("requests", "of direct", "at least", 0.4),
    Bar("udp_up", "itself", "at least", 50_000),
    Bar("udp_down", "itself", "at least", 50_000),
    Bar("ping_idle", "over direct", "at most", 0.5),
    Bar("ping_up", "itself", "at most", 6),
    Bar("ping_up_p99", "itself", "at most", 15),
    Bar("ping_down", "itself", "at most", 6),
    Bar("ping_down_p99", "itself", "at most", 15),
    Bar("rss_laptop", "itself", "at most", 60),
    Bar("rss_node", "itself", "at most", 60),
    Bar("idle_laptop", "itself", "at most", 0.5),
    Bar("idle_node", "itself", "at most", 0.5),
    Bar("connect_s", "itself", "at most", 2),
    Bar("help_s", "itself", "at most", 0.25),
    Bar("plan_s", "itself", "at most", 0.8),
)
_SOCKET = (
    *_bulk("of direct", 0.18),
    Bar("connections", "itself", "at least", 2_000),
    Bar("requests", "itself", "at least", 10_000),
    Bar("ping_up_p99", "itself", "at most", 20),
    Bar("ping_down_p99", "itself", "at most", 20),
    Bar("rss_node", "itself", "at most", 150),
    Bar("idle_node", "itself", "at most", 1),
)


def _through_api_server(share: float) -> tuple[Bar, ...]:
    return (
        *_bulk("of bare", share),
        Bar("ping_idle", "over direct", "at most", 1),
        Bar("rss_laptop", "itself", "at most", 130),
        Bar("rss_node", "itself", "at most", 130),
        Bar("connect_s", "itself", "at most", 4),
        Bar("ephemeral_s", "itself", "at most", 12),
    )


BARS = {
    "tpvpn": _KERNEL,
    "tpvpn-socket": _SOCKET,
    "tpvpn-run": _bulk("of direct", 0.25),
    "upgrade": _through_api_server(0.6),
    "portforward": _through_api_server(0.7),
}
"""What each way must reach."""

_RELATIONS: dict[Relation, Callable[[float, float], float]] = {
    "itself": lambda value, other: value,
    "of direct": lambda value, other: value / other if other else math.nan,
    "over direct": lambda value, other: value - other,
    "of bare": lambda value, other: value / other if other else math.nan,
}


def percentile(values: Iterable[float], percent: float) -> float:
    """The smallest value that at least `percent` of all values do not exceed (nearest rank); of no values: nan."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)] if ordered else math.nan


def median(values: Sequence[float]) -> float:
    """The middle value, or the mean of the two in the middle; of no values: nan."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    if not ordered:
        return math.nan
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def values(rounds: Sequence[Round], way: str, metric: str) -> list[float]:
    """A way's figures of a metric, of the rounds that have one."""
    return [figures[metric] for each in rounds if metric in (figures := each.get(way, {}))]


def reference(way: str, metric: str, relation: Relation) -> tuple[str, str]:
    """Whose figure, and which, stands beside a way's: the same of the direct path, or its own bare stream's."""
    return (way, f"bare_{metric.rpartition('_')[2]}") if relation == "of bare" else (DIRECT, metric)


def related(rounds: Sequence[Round], way: str, metric: str, relation: Relation) -> float:
    """The median over the rounds of a way's figure, itself or in relation to another one of its own round."""
    relate = _RELATIONS[relation]
    beside, that = reference(way, metric, relation)
    pairs = [(each.get(way, {}).get(metric), each.get(beside, {}).get(that)) for each in rounds]
    if relation == "itself":
        return median([value for value, _ in pairs if value is not None])
    return median([relate(value, other) for value, other in pairs if value is not None and other is not None])


def with_bars(ways: Iterable[str]) -> list[str]:
    """Those of the ways that must reach something."""
    return [way for way in ways if way in BARS]


def verdicts(rounds: Sequence[Round], way: str) -> list[tuple[Bar, float, bool | None]]:
    """Each bar of a way with the value reached and whether that is enough; None where nothing was measured."""
    reached = [(bar, related(rounds, way, bar.metric, bar.relation)) for bar in BARS[way]]
    return [(bar, value, None if math.isnan(value) else bar.passes(value)) for bar, value in reached]
