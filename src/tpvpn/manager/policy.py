"""The destination policy, one for every exit: which addresses sessions may reach.

Pure, but for the answer to whether an address is the manager's own, which is an argument. With destinations only those
are allowed; without, everything but `NEVER`. The kernel exit writes it as rules, the socket exit asks `refused()`.
"""

import ipaddress
from collections.abc import Sequence

from tpvpn.errors import ManagerError, UsageError
from tpvpn.proto.config import Pair
from tpvpn.proto.session import SPACE4, SPACE6, VIRTUAL4, VIRTUAL6

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

NEVER: tuple[Network, ...] = tuple(
    ipaddress.ip_network(text)
    for text in (
        # This network, loopback, link-local with the cloud's metadata service, multicast, broadcast.
        *("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "255.255.255.255/32"),
        *("::/128", "::1/128", "::ffff:0:0/96", "fe80::/10", "ff00::/8"),
        # The metadata services that EC2 and Google Cloud have on IPv6.
        *("fd00:ec2::254/128", "fd20:ce::254/128"),
        # Ours: other sessions, and virtual subnets that are not mapped.
        *(str(space) for space in (SPACE4, SPACE6, VIRTUAL4, VIRTUAL6)),
    )
)
"""What no session may reach unless a --destination names it."""


def destination(text: str) -> Network:
    """The subnet of a --destination; UsageError when it is none."""
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        raise UsageError(f"--destination {text}: {error}; write it as 10.130.0.0/16") from error


def refused(address: bytes, destinations: Sequence[Network]) -> bool:
    """Whether the policy keeps sessions from this address, given as its 4 or 16 bytes."""
    host = ipaddress.ip_address(address)
    named = any(host in network for network in destinations)
    return not named if destinations else any(host in network for network in NEVER)


def check_carried(pairs: Sequence[Pair], carried: Sequence[int]) -> None:
    """ManagerError when a virtual subnet is of a family that a session does not have."""
    for virtual, _ in pairs:
        if virtual.version not in carried:
            raise ManagerError(f"{virtual} cannot be mapped: this manager carries no IPv{virtual.version}")
