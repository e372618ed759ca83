"""The measurements: each takes a way and gives figures by name; the names are those of `summary.METRICS`.

Load comes from iperf3, ping and `load.py`, all on the laptop, against the servers of the lab's cluster.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.summary import Figures, median, percentile
from bench.ways import Way

ATTEMPTS = 20  # to find iperf3's server free: it ends a client's test only when it hears that the client has left
NOT_YET = ("busy", "refused")  # of a server that ends a test, or opens its port anew after one
CLIENTS = 32  # HTTP requests under way at once
PING_INTERVAL = 0.01
# The flows use what most systems do, whatever this one is set to; a tunnel's own connection is the tunnel's affair.
CONGESTION = ["--congestion", "cubic"]
DIRECTIONS: dict[str, list[str]] = {"up": [], "down": ["--reverse"]}  # from the laptop, to the laptop
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Effort:
    """How long a measurement runs: seconds of load, number of pings."""

    seconds: float
    pings: int


def iperf(way: Way, *options: str, seconds: float) -> dict[str, Any]:
    """The `end` part of iperf3's report; a server not yet done with the last client is asked again."""
    argv = ["iperf3", "--client", way.address, "--json", "--time", f"{seconds:g}", *options]
    report: dict[str, Any] = {"error": "not run"}
    for _ in range(ATTEMPTS):
        done = way.lab.run("laptop", argv, check=False, timeout=seconds + 30)
        report = json.loads(done.stdout)
        if not any(word in report.get("error", "") for word in NOT_YET):
            break
        time.sleep(0.2)
    if "error" in report:
        raise RuntimeError(f"iperf3 {' '.join(options)}: {report['error']}")
    return report["end"]


def tcp(way: Way, effort: Effort) -> Figures:
    """Gb/s of one and eight flows, from and to the laptop, and the CPU time of the tunnel's processes for it."""
    figures: Figures = {}
    moved, before = 0, cpu_seconds(way)
    for count in (1, 8):
        for direction, options in DIRECTIONS.items():
            parallel = ["--parallel", str(count), *CONGESTION]
            received = iperf(way, *parallel, *options, seconds=effort.seconds)["sum_received"]
            figures[f"tcp{count}_{direction}"] = received["bits_per_second"] / 1e9
            moved += received["bytes"]
    for end, seconds in cpu_seconds(way).items():
        figures[f"cpu_{end}"] = (seconds - before[end]) / (moved / 1e9)
    return figures


def udp(way: Way, effort: Effort) -> Figures:
    """Packets of 64 B a second that arrive when as many are sent as the sender can."""
    figures: Figures = {}
    for direction, options in DIRECTIONS.items():
        total = iperf(way, "--udp", "--length", "64", "--bitrate", "0", *options, seconds=effort.seconds)["sum"]
        figures[f"udp_{direction}"] = (total["packets"] - total["lost_packets"]) / total["seconds"]
    return figures


def http(way: Way, effort: Effort) -> Figures:
    """New connections and keep-alive requests a second."""
    figures: Figures = {}
    for kind in ("connections", "requests"):
        program = [sys.executable, str(Path(__file__).with_name("load.py")), kind, way.address]
        options = ["--seconds", str(effort.seconds), "--clients", str(CLIENTS)]
        result = json.loads(way.lab.run("laptop", [*program, *options]).stdout)
        figures[kind] = result["rate"]
        figures |= {f"{kind}_{key}": result[key] for key in ("p50_ms", "p99_ms")}
    return figures


def ping(way: Way, effort: Effort) -> Figures:
    """Round trips on an idle path."""
    times = round_trips(way, effort.pings)
    return {"ping_idle": median(times), "ping_idle_p99": percentile(times, 99)}


def load(way: Way, effort: Effort) -> Figures:
    """Round trips while eight bulk flows run, from and to the laptop."""
    figures: Figures = {}
    for direction, options in DIRECTIONS.items():
        with bulk_flows(way, options):
            times = round_trips(way, effort.pings)
        figures |= {f"ping_{direction}": median(times), f"ping_{direction}_p99": percentile(times, 99)}
    return figures


@contextmanager
def bulk_flows(way: Way, options: list[str]) -> Generator[None, None, None]:
    """Eight flows that run until the end of the block, which begins when they are past slow start."""
    argv = ["iperf3", "--client", way.address, "--parallel", "8", "--time", "600", *CONGESTION, *options]
    running, attempts = _start_bulk(way, argv), 1
    while running.poll() is not None and attempts < ATTEMPTS:
        running, attempts = _start_bulk(way, argv), attempts + 1
    try:
        yield
        if running.poll() is not None:
            raise RuntimeError(f"iperf3, the load, ended: {way.lab.log('bulk').read_text().strip()[-200:]}")
    finally:
        running.terminate()
        running.wait(10)


def _start_bulk(way: Way, argv: list[str]) -> subprocess.Popen[Any]:
    with way.lab.log("bulk").open("wb") as log:
        running = way.lab.popen("laptop", argv, stdout=log, stderr=log)
    time.sleep(1.0)
    return running


def cost(way: Way, effort: Effort) -> Figures:
    """Memory of each end (MiB, all its processes), and its CPU time while idle, in percent of one core."""
    figures: Figures = {}
    before, began = cpu_seconds(way), time.monotonic()
    if before:
        time.sleep(effort.seconds * 2)
    for end, pids in way.ends().items():
        figures[f"rss_{end}"] = sum(_kib(pid, "status", "VmRSS") for pid in pids) / 1024
        figures[f"pss_{end}"] = sum(_kib(pid, "smaps_rollup", "Pss") for pid in pids) / 1024
        idle = cpu_seconds(way)[end] - before[end]
        figures[f"idle_{end}"] = 100 * idle / (time.monotonic() - began)
    return figures


def commands(way: Way, effort: Effort) -> Figures:
    """How long `tpvpn --help` and `tpvpn plan` take."""
    if way.name != "tpvpn":
        return {}
    figures: Figures = {}
    plan = ["plan", "--service-cidr", "10.130.0.0/16", "--pod-cidr", "10.132.0.0/16", "--on-conflict", "skip"]
    for name, argv in (("help_s", ["--help"]), ("plan_s", plan)):
        began = time.perf_counter()
        way.lab.run("laptop", [str(Path(sys.executable).with_name("tpvpn")), *argv])
        figures[name] = time.perf_counter() - began
    return figures


Measurement = Callable[[Way, Effort], Figures]
MEASUREMENTS: dict[str, Measurement] = {
    "tcp": tcp,
    "udp": udp,
    "http": http,
    "ping": ping,
    "load": load,
    "cost": cost,
    "commands": commands,
}


def round_trips(way: Way, count: int) -> list[float]:
    """Round-trip times in ms. A lost packet counts as the second that was waited for it; an error when all are lost."""
    argv = ["ping", "-n", "-i", str(PING_INTERVAL), "-c", str(count), "-W", "1", way.address]
    done = way.lab.run("laptop", argv, check=False, timeout=count * PING_INTERVAL * 10 + 30)
    times = [float(found) for found in re.findall(r"time=([0-9.]+) ms", done.stdout)]
    if not times:
        raise RuntimeError(f"no ping was answered: {done.stdout[-200:]}")
    return times + [1e3] * (count - len(times))


def cpu_seconds(way: Way) -> dict[str, float]:
    """User and system time that the processes of each end have used so far."""
    return {end: sum(map(_ticks, pids)) / TICKS for end, pids in way.ends().items()}


def _ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def _kib(pid: int, file: str, key: str) -> int:
    text = Path(f"/proc/{pid}/{file}").read_text()
    found = re.search(rf"^{key}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) if found else 0
