"""The benchmark's command: builds a lab of its own, brings all ways up, measures them in turns, writes the results."""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench import report
from bench.measure import MEASUREMENTS, Effort, Measurement
from bench.peers import PEERS
from bench.summary import BARS, DIRECT, Round, verdicts
from bench.wan import DEVICE, Wan
from bench.ways import Tpvpn, TpvpnSocket, Way
from tpvpn.errors import TpvpnError
from tpvpn.lab import Lab, Where
from tpvpn.lab.topology import NODE

RESULTS = Path(__file__).parent / "results"
WAN_ADDRESSES = ("198.19.0.1", "198.19.0.2")
FAILURES = (TpvpnError, RuntimeError, OSError, ValueError, KeyError, subprocess.SubprocessError)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench/run", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="rounds, each with every measurement of every way (5)")
    parser.add_argument("--seconds", type=float, default=3.0, help="seconds of load a measurement (3)")
    parser.add_argument("--pings", type=int, default=500, help="round trips a measurement (500)")
    parser.add_argument("--only", type=_names, default=list(MEASUREMENTS), metavar=",".join(MEASUREMENTS))
    parser.add_argument("--quick", action="store_true", help="one round of 1 s and 200 round trips, to see it work")
    parser.add_argument(
        "--no-peers", action="store_true", help="measure the direct path and tpvpn alone, with either exit"
    )
    wan = "over an emulated link (ms one way, %%, Mb/s): TCP, and ping beside it"
    parser.add_argument("--wan", metavar="DELAY,LOSS,RATE", help=wan)
    parser.add_argument("--name", help="of the files in bench/results (bench, or wan-DELAY-LOSS-RATE)")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.rounds, arguments.seconds, arguments.pings = 1, 1.0, 200
    if arguments.wan:
        Wan.parse(arguments.wan)
    default = f"wan-{arguments.wan.replace(',', '-')}" if arguments.wan else "bench"
    arguments.name = arguments.name or default
    return arguments


def _names(text: str) -> list[str]:
    chosen = text.split(",")
    if unknown := sorted(set(chosen) - set(MEASUREMENTS)):
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose from {', '.join(MEASUREMENTS)}")
    return chosen


def main() -> int:
    """Run it; 0, 1 when a measurement failed, or the exit code of what prevented it."""
    arguments = parse(sys.argv[1:])
    results: dict[str, Any] = {
        "when": time.strftime("%Y-%m-%d %H:%M %Z"),
        "machine": machine(),
        "seconds": arguments.seconds,
        "wan": arguments.wan,
        "absent": [],
        "failures": [],
        "rounds": [],
    }
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


def measure(lab: Lab, arguments: argparse.Namespace, results: dict[str, Any]) -> None:
    """Bring the ways up and fill in the rounds."""
    prepare(lab)
    peers = () if arguments.no_peers or arguments.wan else PEERS
    results["absent"] = [peer.name for peer in peers if peer.missing()]
    ways: list[Way] = [Way(lab), Tpvpn(lab), TpvpnSocket(lab), *(peer(lab) for peer in peers if not peer.missing())]
    results["ways"] = [way.name for way in ways]
    effort = Effort(arguments.seconds, arguments.pings)
    chosen: dict[str, Measurement] = {name: MEASUREMENTS[name] for name in arguments.only}
    if arguments.wan:
        emulate(lab, arguments.wan)
        chosen = {name: MEASUREMENTS[name] for name in ("tcp", "ping", "load")}
    for number in range(1, arguments.rounds + 1):
        print(f"round {number} of {arguments.rounds}", file=sys.stderr)
        results["rounds"].append(one_round(ways, chosen, effort, results["failures"]))


def one_round(ways: list[Way], chosen: dict[str, Measurement], effort: Effort, failures: list[str]) -> Round:
    """Every measurement of every way once. What fails is told and left out; the rest goes on."""
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
        for way in BARS:
            reached = [verdict is True for _, _, verdict in verdicts(results["rounds"], way)]
            print(f"{way}: {sum(reached)} of {len(reached)} bars reached")
        print(f"{DIRECT} is plain routing through the node")
