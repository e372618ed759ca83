"""The benchmark of names: dnsperf against the stub resolver alone, with answers from its cache and without."""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bench.main import RESULTS, beginning
from bench.stub import TTLS
from bench.summary import median
from tpvpn.errors import UsageError

ADDRESS = "127.77.53.1"
NAMES = 1_000
RATE, LONGEST_ADDED = 5_000, 1.0
"""What must be reached: questions a second, and ms that half of them may take longer than without the stub."""
Figures = dict[str, float]


def main() -> int:
    """Run it; 0, or 1 when a bar was not reached."""
    parser = argparse.ArgumentParser(prog="bench/names", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="rounds, each with every measurement (3)")
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds of load a measurement (2)")
    arguments = parser.parse_args()
    setting = "dnsperf, the stub and a cluster that answers at once are on loopback; there is no tunnel between."
    results = beginning(arguments, setting)
    with tempfile.NamedTemporaryFile("w", suffix=".names") as names:
        names.writelines(f"db{number}.shop.svc.cluster.local A\n" for number in range(NAMES))
        names.flush()
        for _ in range(arguments.rounds):
            results["rounds"].append({mode: measure(mode, names.name, arguments.seconds) for mode in TTLS})
    (RESULTS / "names.json").write_text(json.dumps(results, indent=1) + "\n")
    page, reached = markdown(results)
    (RESULTS / "names.md").write_text(page)
    print(page)
    return 0 if reached else 1


def measure(mode: str, names: str, seconds: float) -> Figures:
    """One server: at the rate that must be reached, then at the highest."""
    with running(mode):
        even, flat = dnsperf(names, seconds, "-Q", str(RATE)), dnsperf(names, seconds)
    return {"rate": even["rate"], "lost": even["lost"], "p50": even["p50"], "p99": even["p99"], "most": flat["rate"]}


@contextmanager
def running(mode: str) -> Iterator[None]:
    """A server that answers."""
    command = [sys.executable, "-m", "bench.stub", mode, ADDRESS]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        if process.stdout.readline() != "ready\n":
            raise UsageError("the stub did not start: run this as root, since port 53 is its")
        yield
    finally:
        process.kill()
        process.communicate()


def dnsperf(names: str, seconds: float, *options: str) -> Figures:
    """Questions answered a second, those lost, and ms of half and of 99 % of them."""
    command = ["dnsperf", "-s", ADDRESS, "-d", names, "-l", str(max(1, round(seconds))), "-v", *options]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    taken = sorted(float(line.split()[-1]) * 1000 for line in said if line.startswith("> NOERROR"))
    told = dict(line.strip().split(":", 1) for line in said if ":" in line and not line.startswith(">"))
    return {
        "rate": float(told["Queries per second"]),
        "lost": float(told["Queries lost"].split()[0]),
        "p50": taken[len(taken) // 2],
        "p99": taken[len(taken) * 99 // 100],
    }


def markdown(results: dict[str, Any]) -> tuple[str, bool]:
    """The page, and whether all bars are reached."""
    rounds: list[dict[str, Figures]] = results["rounds"]
    machine, reached, lines = results["machine"], True, list[str]()
    for mode in TTLS:
        figures = {name: median([one[mode][name] for one in rounds]) for name in rounds[0][mode]}
        added = median([one[mode]["p50"] - one["bare"]["p50"] for one in rounds])
        fine = figures["rate"] > 0.99 * RATE and not figures["lost"] and added < LONGEST_ADDED
        reached &= fine
        row = f"| {mode} | {figures['rate']:,.0f} | {figures['lost']:.0f} | {figures['p50']:.3f} | {added:.3f} |"
        lines.append(f"{row} {figures['p99']:.3f} | {figures['most']:,.0f} | {'pass' if fine else '**fail**'} |")
    page = (
        f"# Benchmark of names, {results['when']}\n\n"
        f"All of it shares {machine['cpus']} cores ({machine['cpu']}, Linux {machine['kernel']}); load average "
        f"{machine['load']:.2f} before the start. {results['setting']} Medians of {len(rounds)} round(s), "
        f"{results['seconds']:g} s a measurement. `bare` is the cluster itself; must be: {RATE:,} questions a second, "
        f"none lost, with less than {LONGEST_ADDED:g} ms more than `bare` in the median.\n\n"
        "| | answers/s | lost | median, ms | more than bare, ms | p99, ms | answers/s at most | |\n"
        "|---|---:|---:|---:|---:|---:|---:|---|\n"
    )
    return page + "\n".join(lines) + "\n", reached
