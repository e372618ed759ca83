"""The benchmark on the test cluster: the bare streams through the API server, and tpvpn by each of them, in turns.

It needs the cluster of tests/cluster/up, which it leaves as it was.
"""

import argparse
import signal
import sys
from functools import partial

from bench.kubernetes import Direct, PortForward, Site, Upgrade
from bench.main import beginning, names, run_rounds, write
from bench.measure import MEASUREMENTS, Measurement
from bench.summary import DIRECT
from bench.ways import Way

WAYS: dict[str, type[Direct]] = {kind.name: kind for kind in (Direct, Upgrade, PortForward)}
KNOWN: dict[str, Measurement] = {
    "bare": lambda way, effort: way.bare(effort),
    **{name: MEASUREMENTS[name] for name in ("tcp", "http", "ping", "cost")},
    "ephemeral": lambda way, effort: way.ephemeral(),
}
SETTING = (
    "A real Kubernetes of two nodes runs on these cores too, in network namespaces; its LAN is a bridge without a "
    "wire. The laptop reaches a pod on another node than the manager's; the manager is the user's own, with the socket "
    "exit, and a session keeps it. direct is plain routing from the laptop through the pod's node. A bare stream goes "
    "from tpvpn's own client of the transport to a program on the manager's node, through the same API server."
)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench/cluster", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="rounds, each with every measurement of every way (3)")
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds of load a measurement (2)")
    parser.add_argument("--pings", type=int, default=200, help="round trips a measurement (200)")
    ways = f"measured beside {DIRECT} (all)"
    parser.add_argument("--ways", type=partial(names, WAYS), default=list(WAYS), metavar=",".join(WAYS), help=ways)
    only = {"type": partial(names, KNOWN), "default": list(KNOWN), "metavar": ",".join(KNOWN)}
    parser.add_argument("--only", **only, help="measurements (all)")
    parser.add_argument("--quick", action="store_true", help="one round of 1 s and 100 round trips, to see it work")
    parser.add_argument("--name", default="cluster", help="of the files in bench/results (cluster)")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.rounds, arguments.seconds, arguments.pings = 1, 1.0, 100
    return arguments


def main() -> int:
    """Run it; 0, 1 when a measurement failed or the cluster is not there, 130 when interrupted."""
    arguments = parse(sys.argv[1:])
    results = beginning(arguments, SETTING)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with Site() as site:
            ways: list[Way] = [kind(site) for name, kind in WAYS.items() if name in (DIRECT, *arguments.ways)]
            results["ways"] = [way.name for way in ways]
            run_rounds(ways, KNOWN, arguments, results)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    write(results, arguments.name)
    return 1 if results["failures"] else 0
