"""Addresses that the manager gives its sessions: which are ours, which block is this manager's, which are free.

Pure. A session's addresses come from spaces that clusters and VPNs do not use: 246.0.0.0/12 (class E, RFC 1112 section
4: reserved, yet Linux routes it) and a ULA (RFC 4193). Each manager draws from a block chosen by a hash of its name, so
that a session that moves to another manager, and says what it had, can mostly keep the addresses of its open flows.
"""

import hashlib
import ipaddress

from tpvpn.errors import ManagerError

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_BLOCK_LENGTH = {4: 24, 6: 64}
_HOSTS = 254


def block_of(space: Network, identity: str) -> Network:
    """The part of the space that a manager of this name draws from: a /24 or a /64."""
    length = _BLOCK_LENGTH[space.version]
    digest = int.from_bytes(hashlib.sha256(identity.encode()).digest(), "big")
    index = digest % (1 << (length - space.prefixlen))
    network = int(space.network_address) + (index << (space.max_prefixlen - length))
    return ipaddress.ip_network((network, length))


class AddressPool:
    """The addresses of one family; each is taken by at most one session."""

    def __init__(self, space: Network, identity: str) -> None:
        self._space = space
        self._block = block_of(space, identity)
        self._taken: set[str] = set()
        self._next = 0

    def take(self, wanted: str | None) -> str:
        """The address that is wanted, if it is of our space and free, else the next free one of the block.

        `wanted` comes from outside and may be any text. ManagerError when the block is used up.
        """
        address = self._honoured(wanted) or self._next_free()
        self._taken.add(address)
        return address

    def give_back(self, address: str) -> None:
        """The address is free again."""
        self._taken.discard(address)

    def _honoured(self, wanted: str | None) -> str | None:
        try:
            address = ipaddress.ip_address(wanted or "")
        except ValueError:
            return None
        # Nothing outside our own space: a client could otherwise draw another host's traffic to itself.
        return str(address) if address in self._space and str(address) not in self._taken else None

    def _next_free(self) -> str:
        # Round the block, so that the flows of a session that ended are forgotten before another has its address.
        for _ in range(_HOSTS):
            address = str(self._block[1 + self._next])
            self._next = (self._next + 1) % _HOSTS
            if address not in self._taken:
                return address
        raise ManagerError(f"the manager is full: all addresses of {self._block} are taken")
