"""The results for people: a Markdown page (caveats first, then the bars, then everything) and a plot of it."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot

from bench.summary import (
    BARS,
    DIRECT,
    METRICS,
    Bar,
    Metric,
    Round,
    median,
    reference,
    related,
    values,
    verdicts,
    with_bars,
)

COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52")
BY_NAME = {metric.name: metric for metric in METRICS}


def number(value: float, digits: int) -> str:
    """A figure for a table; a dash where there is none."""
    return "–" if math.isnan(value) else f"{value:,.{digits}f}"


def markdown(results: dict[str, Any], plot: str) -> str:
    """The whole page."""
    rounds: list[Round] = results["rounds"]
    parts = [f"# Benchmark, {results['when']}", caveats(results)]
    if results["failures"]:
        parts.append("Failed:\n\n" + "\n".join(f"- {failure}" for failure in results["failures"]))
    if results["wan"] is None:
        for way in with_bars(results["ways"]):
            parts += [f"## What {way} must reach", bars_table(rounds, way)]
    parts += ["## All figures", figures_table(rounds, results["ways"]), f"![Relation to the direct path]({plot})"]
    return "\n\n".join(parts) + "\n"


def caveats(results: dict[str, Any]) -> str:
    """What to know before believing a figure."""
    machine = results["machine"]
    absent = f" Not installed here: {', '.join(results['absent'])}." if results["absent"] else ""
    return (
        f"All of it, both ends, servers and load generators, shares {machine['cpus']} cores ({machine['cpu']}, Linux "
        f"{machine['kernel']}); load average {machine['load']:.2f} before the start. {results['setting']} Medians of "
        f"{len(results['rounds'])} round(s), {results['seconds']:g} s a measurement; in each round every way is "
        "measured in turn, and relations are to figures of the same round. CPU and memory are those of the tunnel's "
        f"own processes; packets are also handled in the kernel.{absent}"
    )


def bars_table(rounds: Sequence[Round], way: str) -> str:
    """Every bar of a way, the value reached, and the verdict."""
    judged = verdicts(rounds, way)
    beside = "direct, or bare" if any(bar.relation == "of bare" for bar, _, _ in judged) else "direct"
    lines = [f"| | {beside} | {way} | relation | must be | |", "|---|---:|---:|---:|---:|---|"]
    for bar, value, passed in judged:
        metric = BY_NAME[bar.metric]
        figures = (reference(way, bar.metric, bar.relation), (way, bar.metric))
        direct, own = (number(median(values(rounds, *figure)), metric.digits) for figure in figures)
        share = f"{number(value, 2)} ×"
        reached = {"itself": "", "of direct": share, "of bare": share, "over direct": f"{number(value, 3)} more"}
        limit = f"{bar.side} {bar.limit:,g}{'' if bar.relation == 'itself' else ' ' + bar.relation}"
        verdict = {True: "pass", False: "**fail**", None: "not measured"}[passed]
        lines.append(
            f"| {metric.title}, {metric.unit} | {direct} | {own} | {reached[bar.relation]} | {limit} | {verdict} |"
        )
    return "\n".join(lines)


def figures_table(rounds: Sequence[Round], ways: Sequence[str]) -> str:
    """Every metric that was measured: the median of each way, its least and greatest, and its relation to direct."""
    lines = [f"| | {' | '.join(ways)} |", "|---" + "|---:" * len(ways) + "|"]
    for metric in METRICS:
        cells = [_cell(rounds, way, metric) for way in ways]
        if any(cell != "–" for cell in cells):
            lines.append(f"| {metric.title}, {metric.unit} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(rounds: Sequence[Round], way: str, metric: Metric) -> str:
    measured = values(rounds, way, metric.name)
    if not measured:
        return "–"
    text = number(median(measured), metric.digits)
    if len(measured) > 1:
        text += f" ({number(min(measured), metric.digits)}–{number(max(measured), metric.digits)})"
    ratio = related(rounds, way, metric.name, "of direct")
    return text if way == DIRECT or math.isnan(ratio) else f"{text}, {ratio:.3g} ×"


def _share(rounds: Sequence[Round], way: str, bar: Bar) -> float:
    """The share of the direct path's rate that is a bar's limit."""
    if bar.relation == "of direct":
        return bar.limit
    bare = median(values(rounds, *reference(way, bar.metric, "of bare"))) if bar.relation == "of bare" else 1.0
    return bar.limit * bare / median(values(rounds, DIRECT, bar.metric))


def plot(results: dict[str, Any], path: Path) -> None:
    """Rates as a share of the direct path's, a row a way, with what each must reach as marks."""
    rounds: list[Round] = results["rounds"]
    rates = [metric for metric in METRICS if metric.unit in ("Gb/s", "packets/s", "1/s")]
    shown = [metric for metric in rates if values(rounds, DIRECT, metric.name)]
    ways = [way for way in results["ways"] if way != DIRECT]
    mpl.rcParams["svg.hashsalt"] = "tpvpn"  # the same figures give the same file
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.22 * (len(ways) + 1) * len(shown)), layout="constrained")
    height = 0.8 / max(1, len(ways))
    marks: list[tuple[float, float]] = []
    for place, way in enumerate(ways):
        bars = {bar.metric: bar for bar in BARS.get(way, ())}
        shares = [related(rounds, way, metric.name, "of direct") for metric in shown]
        rows = [row + (place - (len(ways) - 1) / 2) * height for row in range(len(shown))]
        drawn = axes.barh(rows, shares, height * 0.9, label=way, color=COLOURS[place % len(COLOURS)])
        barred = [(bars[metric.name], at) for metric, at in zip(shown, rows, strict=True) if metric.name in bars]
        marks += [(_share(rounds, way, bar), at) for bar, at in barred]
        axes.bar_label(drawn, ["" if math.isnan(share) else f"{share:.2f}" for share in shares], padding=3, fontsize=8)
    if marks and results["wan"] is None:
        axes.vlines(
            [limit for limit, _ in marks],
            [row - height / 2 for _, row in marks],
            [row + height / 2 for _, row in marks],
            colors="black",
            linestyles="dashed",
            label="must be reached",
        )
    axes.set_yticks(range(len(shown)), [metric.title for metric in shown])
    axes.invert_yaxis()
    axes.set_xlabel("share of the direct path in the same round (median)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
