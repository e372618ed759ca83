"""Virtual subnets: where a wanted subnet is mapped to, 1:1, when its own addresses stay with a VPN.

Pure. The place is chosen by a hash of the cluster and the subnet, so that it is the same each time, and the next free
one is taken where that is occupied. Until clusters tell who they are, one is known by its service and pod subnets.
"""

import hashlib
from collections.abc import Iterable, Sequence

from tpvpn.route.conflict import Found
from tpvpn.route.prefix import Prefix, Space
from tpvpn.route.verdict import Wanted

POOLS = {4: Prefix.parse("246.128.0.0/9"), 6: Prefix.parse("fd74:7077::/32")}
"""Class E and a ULA, which neither clusters nor VPNs use; beside where clients' addresses are (proto/session)."""
TRIES = 4096
MOST = 64
"""Subnets that a manager maps for one client (proto/config)."""


class Mapper:
    """Gives each subnet a place of its own in the pool; `exhausted` are those for which there was none."""

    def __init__(self, wanted: Sequence[Wanted], found: Iterable[Found]) -> None:
        self._cluster = " ".join(sorted({str(one.prefix) for one in wanted if one.kind != "also"}))
        taken = [one.prefix for one in found] + [one.prefix for one in wanted]
        self._occupied = Space(prefix for prefix in taken if prefix.overlaps(POOLS[prefix.version]))
        self._placed = 0
        self.exhausted: list[Prefix] = []

    def place(self, prefix: Prefix) -> Prefix | None:
        """The virtual subnet of this one; None when no place is free."""
        pool = POOLS[prefix.version]
        count = 1 << (prefix.length - pool.length) if prefix.length >= pool.length else 0
        digest = hashlib.sha256(f"{self._cluster} {prefix}".encode()).digest()
        first = int.from_bytes(digest[:8], "big")
        for number in range(min(count, TRIES) if self._placed < MOST else 0):
            network = pool.network + ((first + number) % count) * prefix.size
            virtual = Prefix(prefix.version, network, prefix.length)
            if not self._occupied.overlaps(virtual):
                self._occupied |= Space([virtual])
                self._placed += 1
                return virtual
        self.exhausted.append(prefix)
        return None

    def warnings(self) -> list[str]:
        """A word on each subnet without a place."""
        return [
            f"{prefix} has no virtual subnet: there are {MOST} at most, in {POOLS[prefix.version]}, where private "
            "routes leave no room for it; allow the subnet, or give --on-conflict skip or hosts"
            for prefix in self.exhausted
        ]
