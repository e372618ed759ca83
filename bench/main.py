"""The benchmark's command: builds a lab of its own, brings all ways up, measures them in turns, writes the results."""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

from bench import report
from bench.measure import MEASUREMENTS, Effort, Measurement
from bench.peers import PEERS
from bench.summary import DIRECT, Round, verdicts, with_bars
from bench.wan import DEVICE, Wan
from bench.ways import Tpvpn, TpvpnRun, TpvpnSocket, Way
from tpvpn.errors import TpvpnError
from tpvpn.lab import Lab, Where
from tpvpn.lab.topology import NODE

RESULTS = Path(__file__).parent / "results"
WAN_ADDRESSES = ("198.19.0.1", "198.19.0.2")
WAYS: dict[str, type[Way]] = {kind.name: kind for kind in (Way, Tpvpn, TpvpnSocket, TpvpnRun, *PEERS)}
WAN_WAYS, WAN_MEASUREMENTS = (Tpvpn.name, TpvpnSocket.name), ("tcp", "ping", "load")
SETTING = (
    "The links are veth pairs without a wire: the direct path is forwarding and masquerade at memory speed, so real "
    "networks show smaller differences."
)
FAILURES = (TpvpnError, RuntimeError, OSError, ValueError, KeyError, subprocess.SubprocessError)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench/run", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="rounds, each with every measurement of every way (3)")
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds of load a measurement (2)")
    parser.add_argument("--pings", type=int, default=400, help="round trips a measurement (400)")
    ways = f"measured beside {DIRECT} (all that are installed; with --wan {','.join(WAN_WAYS)})"
    parser.add_argument("--ways", type=partial(names, WAYS), metavar=",".join(WAYS), help=ways)
    only = f"measurements (all; with --wan {','.join(WAN_MEASUREMENTS)})"
    parser.add_argument("--only", type=partial(names, MEASUREMENTS), metavar=",".join(MEASUREMENTS), help=only)
    parser.add_argument("--quick", action="store_true", help="one round of 1 s and 200 round trips, to see it work")
    parser.add_argument("--wan", metavar="DELAY,LOSS,RATE", help="over an emulated link: ms one way, %%, Mb/s")
    parser.add_argument("--name", help="of the files in bench/results (bench, or wan-DELAY-LOSS-RATE)")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.rounds, arguments.seconds, arguments.pings = 1, 1.0, 200
    if arguments.wan:
        Wan.parse(arguments.wan)
    arguments.ways = arguments.ways or list(WAN_WAYS if arguments.wan else WAYS)
    arguments.only = arguments.only or list(WAN_MEASUREMENTS if arguments.wan else MEASUREMENTS)
    default = f"wan-{arguments.wan.replace(',', '-')}" if arguments.wan else "bench"
    arguments.name = arguments.name or default
    return arguments


def names(known: Collection[str], text: str) -> list[str]:
    """Names with commas between, each of which must be known."""
    chosen = text.split(",")
    if unknown := sorted(set(chosen) - set(known)):
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose from {', '.join(known)}")
    return chosen


def main() -> int:
    """Run it; 0, 1 when a measurement failed, or the exit code of what prevented it."""
    arguments = parse(sys.argv[1:])
    results = beginning(arguments, SETTING)
    results["wan"] = arguments.wan
    if arguments.wan:
        results["setting"] += f" The link is emulated in user space: {arguments.wan} (ms one way, %, Mb/s)."
    try:
        with Lab(f"bench{os.getpid()}") as lab:
            measure(lab, arguments, results)
    except TpvpnError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    write(results, arguments.name)
    return 1 if results["failures"] else 0


def beginning(arguments: argparse.Namespace, setting: str) -> dict[str, Any]:
    """Results without figures; `setting` is what to know of where they are measured."""
    return {
        "when": time.strftime("%Y-%m-%d %H:%M %Z"),
        "machine": machine(),
        "setting": setting,
        "seconds": arguments.seconds,
        "wan": None,
        "absent": [],
        "failures": [],
        "rounds": [],
    }


def measure(lab: Lab, arguments: argparse.Namespace, results: dict[str, Any]) -> None:
    """Bring the ways up and fill in the rounds."""
    prepare(lab)
    kinds = [kind for name, kind in WAYS.items() if name in (DIRECT, *arguments.ways)]  # all else is set against it
    results["absent"] = [kind.name for kind in kinds if kind.missing()]
    ways = [kind(lab) for kind in kinds if not kind.missing()]
    results["ways"] = [way.name for way in ways]
    if arguments.wan:
        emulate(lab, arguments.wan)
    run_rounds(ways, MEASUREMENTS, arguments, results)


def run_rounds(
    ways: list[Way], known: dict[str, Measurement], arguments: argparse.Namespace, results: dict[str, Any]
) -> None:
    """Fill in the rounds, with those of the known measurements that are asked for."""
    chosen = {name: known[name] for name in arguments.only}
    effort = Effort(arguments.seconds, arguments.pings)
    for number in range(1, arguments.rounds + 1):
        print(f"round {number} of {arguments.rounds}", file=sys.stderr)
        results["rounds"].append(one_round(ways, chosen, effort, results["failures"]))


def one_round(ways: list[Way], chosen: dict[str, Measurement], effort: Effort, failures: list[str]) -> Round:
    """Every chosen measurement of every way once. What fails is told and left out; the rest goes on."""
    figures: Round = {way.name: {} for way in ways}
    up: list[Way] = []
    for way in ways:
        try:
            figures[way.name] |= way.start()
            up.append(way)
        except FAILURES as error:
            _failed(failures, f"{way.name} did not start: {error}")
    for name, measurement in chosen.items():
        for way in up:
            try:
                figures[way.name] |= measurement(way, effort)
            except FAILURES as error:
                _failed(failures, f"{way.name}, {name}: {error}")
    return figures


def _failed(failures: list[str], what: str) -> None:
    print(what, file=sys.stderr)
    failures.append(what)


def prepare(lab: Lab) -> None:
    """Let thousands of short connections a second neither use up the ports nor fill the tables of connections."""
    lab.sysctl("laptop", "net/ipv4/ip_local_port_range", "1024 65535")
    lab.sysctl("laptop", "net/ipv4/tcp_tw_reuse", 1)
    for where in ("laptop", "node"):
        lab.sysctl(where, "net/netfilter/nf_conntrack_tcp_timeout_time_wait", 1)


def emulate(lab: Lab, link: str) -> None:
    """Put an emulated link between laptop and node, and the way to the node and to the direct twins over it."""
    program = [sys.executable, "-m", "bench.wan", str(lab.netns("laptop")), str(lab.netns("node")), link]
    with lab.log("wan").open("wb") as log:
        process = lab.popen("node", program, stdout=log, stderr=log)
    lab.wait(lambda: "ready" in lab.log("wan").read_text(), process, "wan")
    one, other = WAN_ADDRESSES
    ends: tuple[tuple[Where, str, str], ...] = (("laptop", one, other), ("node", other, one))
    for where, own, peer in ends:
        lab.run(where, ["ip", "address", "add", own, "peer", peer, "dev", DEVICE])
        lab.run(where, ["ip", "link", "set", DEVICE, "up", "txqueuelen", "2000"])
    for destination in (f"{NODE}/32", "203.0.113.0/24"):
        lab.run("laptop", ["ip", "route", "replace", destination, "dev", DEVICE, "src", WAN_ADDRESSES[0]])


def machine() -> dict[str, Any]:
    """Where the figures were measured."""
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    model = found[1] if found else platform.machine()
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "cpu": model,
        "kernel": platform.release(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
    }


def write(results: dict[str, Any], name: str) -> None:
    """Write NAME.json, NAME.md and NAME.svg, and show what must be reached."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    report.plot(results, RESULTS / f"{name}.svg")
    page = report.markdown(results, f"{name}.svg")
    (RESULTS / f"{name}.md").write_text(page)
    print(page)
    if results["wan"] is None:
        for way in with_bars(results["ways"]):
            reached = [verdict is True for _, _, verdict in verdicts(results["rounds"], way)]
            print(f"{way}: {sum(reached)} of {len(reached)} bars reached")
        print(f"{DIRECT} is plain routing through the node")
