"""Prometheus' text format, version 0.0.4: counts to the text of /metrics.

Pure, and of the standard library alone: manager and client write it. A family is all samples of one name; its samples
differ by their labels. Names, kinds and units are as Prometheus' naming conventions want them.
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Literal

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Labels = Mapping[str, str]
Sample = tuple[Labels, float]
Kind = Literal["counter", "gauge"]


class Histogram:
    """Counts of values by upper bounds, and their sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds, self.total = tuple(bounds), 0.0
        self._counts = [0] * (len(bounds) + 1)

    def observe(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulative(self) -> list[int]:
        """For each bound, and then for all, how many values were not above it."""
        return list(accumulate(self._counts))


def family(kind: Kind, name: str, help: str, samples: Iterable[Sample]) -> str:
    """A family's lines."""
    lines = [f"{name}{_labels(labels)} {_number(value)}\n" for labels, value in samples]
    return "".join([*_head(kind, name, help), *lines])


def single(kind: Kind, name: str, help: str, value: float) -> str:
    """A family of one sample without labels."""
    return family(kind, name, help, [({}, value)])


def by(label: str, values: Mapping[str, float]) -> list[Sample]:
    """A sample for each value of one label."""
    return [({label: one}, value) for one, value in values.items()]


def histogram(name: str, help: str, counted: Histogram) -> str:
    """A histogram's lines."""
    bounds = [*map(_number, counted.bounds), "+Inf"]
    lines = [
        f"{name}_bucket{_labels({'le': bound})} {count}\n"
        for bound, count in zip(bounds, counted.cumulative(), strict=True)
    ]
    ends = [f"{name}_sum {_number(counted.total)}\n", f"{name}_count {counted.cumulative()[-1]}\n"]
    return "".join([*_head("histogram", name, help), *lines, *ends])


def _head(kind: str, name: str, help: str) -> list[str]:
    escaped = help.replace("\\", r"\\").replace("\n", r"\n")
    return [f"# HELP {name} {escaped}\n", f"# TYPE {name} {kind}\n"]


def _labels(labels: Labels) -> str:
    pairs = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())
    return f"{{{pairs}}}" if pairs else ""


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(float(value))
