"""The command of `scripts/fuzz`: runs of `packet_fuzz` and of the terminator's fuzzer, each with a seed of its own."""

import secrets
import sys
import time

from packet_fuzz import allow_descriptors, run
from test_tcp_fuzz import lead

from pod import inside, pod_and_cluster, sysctl

PACKETS = 200_000
"""Of one run, from fresh sessions to none."""
CONNECTIONS = 500
"""Of the terminator, after each run."""


def main() -> int:
    """0, or what went wrong is raised, after the command that repeats it."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else secrets.randbits(32)
    allow_descriptors()
    end = time.monotonic() + seconds
    with pod_and_cluster() as (pod, cluster), inside(pod):
        sysctl(pod, "ipv4/ping_group_range", "0 2147483647")
        while True:
            try:
                report = run(cluster, seed, offload=bool(seed & 1), packets=PACKETS)
                steps = lead(seed, CONNECTIONS).total()
            except Exception:
                print(f"repeat it with: scripts/fuzz 0 {seed}", flush=True)
                raise
            print(
                f"seed {report.seed}: {report.packets:,} packets, {report.packets / report.seconds:,.0f} a second, "
                f"{report.answers:,} answers, up to {report.flows:,} flows, {report.congested:,} times congested, "
                f"{report.growth:+,} KiB, slowest ping "
                f"{1000 * report.slowest:.1f} ms; {steps:,} steps of connections; "
                f"{', '.join(f'{k} {v:,}' for k, v in report.counters.items())}",
                flush=True,
            )
            if time.monotonic() > end:
                return 0
            seed += 1


if __name__ == "__main__":
    sys.exit(main())
