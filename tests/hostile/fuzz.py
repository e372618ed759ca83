"""The command of `scripts/fuzz`: runs of `packet_fuzz`, each with a seed of its own, until the time is over."""

import secrets
import sys
import time

from packet_fuzz import Failure, allow_descriptors, run

from pod import inside, pod_and_cluster, sysctl

PACKETS = 200_000
"""Of one run, from fresh sessions to none."""


def main() -> int:
    """0, or 1 after a failure."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else secrets.randbits(32)
    allow_descriptors()
    end = time.monotonic() + seconds
    with pod_and_cluster() as (pod, cluster), inside(pod):
        sysctl(pod, "ipv4/ping_group_range", "0 2147483647")
        while True:
            try:
                report = run(cluster, seed, offload=bool(seed & 1), packets=PACKETS)
            except Failure as failure:
                print(f"{failure}\nrepeat it with: scripts/fuzz 0 {seed}")
                return 1
            print(
                f"seed {report.seed}: {report.packets:,} packets, {report.packets / report.seconds:,.0f} a second, "
                f"{report.answers:,} answers, up to {report.flows:,} flows, {report.congested:,} times congested, "
                f"{report.growth:+,} KiB, slowest ping "
                f"{1000 * report.slowest:.1f} ms; {', '.join(f'{k} {v:,}' for k, v in report.counters.items())}",
                flush=True,
            )
            if time.monotonic() > end:
                return 0
            seed += 1


if __name__ == "__main__":
    sys.exit(main())
