"""Where a session's packets may go at the socket exit: the policy, the manager's own addresses, virtual subnets.

It opens no connection. Whether an address is the manager's own it asks the kernel, by binding a socket to it, since
addresses come and go; answers are kept for some seconds. A connection to one of its own addresses would reach what
listens on the manager's loopback, so no policy can allow that, as at the kernel exit.
"""

import errno
import socket
import time
from collections.abc import Callable, Sequence
from ipaddress import ip_address

from tpvpn.manager.policy import Network, refused
from tpvpn.manager.socket_flow import family_of, only_family, text_of
from tpvpn.proto.config import Pair

_KEPT = 10.0
_MOST_KEPT = 4096
_MULTICAST4, _MULTICAST6 = 224, 0xFF
_DISCARD = 9


class Reach:
    """For all sessions of an exit; `taken(address)` says whether it is another session's, `own` are this host's."""

    def __init__(
        self,
        destinations: Sequence[Network],
        taken: Callable[[bytes], bool],
        ping: dict[int, bool],
        own: Sequence[bytes],
    ) -> None:
        self.ping = ping
        """Which families have ping sockets."""
        self._own = {len(address): address for address in reversed(own)}
        self._destinations, self._taken = destinations, taken
        self._known: dict[bytes, str | None] = {}
        self._hops: dict[bytes, bytes | None] = {}
        self._until = 0.0

    def refusal(self, address: bytes) -> str | None:
        """Why sessions may not reach this address (the name of a counter), None when they may.

        OSError when that cannot be found out now, for want of a descriptor.
        """
        self._forget()
        if address not in self._known:
            self._known[address] = self._judge(address)
        return self._known[address]

    def hop(self, address: bytes) -> bytes | None:
        """This host's address on the way there, which is how a router names itself; else any of its own."""
        self._forget()
        if address not in self._hops:
            try:
                self._hops[address] = _way(address) or self._own.get(len(address))
            except OSError:  # no descriptor is left: nobody speaks, and that is not remembered
                return None
        return self._hops[address]

    def _forget(self) -> None:
        now = time.monotonic()
        if now > self._until or len(self._known) + len(self._hops) > _MOST_KEPT:
            self._known.clear()
            self._hops.clear()
            self._until = now + _KEPT

    def _judge(self, address: bytes) -> str | None:
        if self._taken(address):
            return "between_sessions"
        if _is_own(address):
            return "manager"
        # What many hosts would hear is never forwarded, whatever the policy says.
        many = address[0] == _MULTICAST6 if len(address) == 16 else address[0] >= _MULTICAST4 and address[0] < 240
        return "destination" if many or refused(address, self._destinations) else None


class SessionReach:
    """For one session, whose virtual subnets are `pairs`."""

    def __init__(self, reach: Reach) -> None:
        self.ping = reach.ping
        self._reach = reach
        self._mapping: list[tuple[int, int, int, int]] = []

    def set_virtual(self, pairs: Sequence[Pair]) -> None:
        """Map these virtual subnets and no others, for new flows."""
        self._mapping = [
            (
                virtual.max_prefixlen // 8,
                int(virtual.netmask),
                int(virtual.network_address),
                int(real.network_address),
            )
            for virtual, real in pairs
        ]

    def translated(self, address: bytes) -> bytes:
        """The cluster's own address behind a virtual one; any other is itself."""
        length, number = len(address), int.from_bytes(address, "big")
        for size, mask, virtual, real in self._mapping:
            if size == length and number & mask == virtual:
                return (number - virtual + real).to_bytes(length, "big")
        return address

    def real(self, address: bytes, drop: Callable[[str], None]) -> bytes | None:
        """Where a flow to this address goes; None when it may not, and then `drop(reason)` was called."""
        real = self.translated(address) if self._mapping else address
        reason = self._reach.refusal(real)
        if reason:
            drop(reason)
            return None
        return real

    def hop(self, address: bytes) -> bytes | None:
        """This host's address on the way to a destination that a session names."""
        return self._reach.hop(self.translated(address))


def _is_own(address: bytes) -> bool:
    with socket.socket(family_of(address), socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((text_of(address), 0))
        except OSError as error:
            # EINVAL: a link-local address that names no link. Any other error, as that no port is left, is no proof.
            return error.errno not in (errno.EADDRNOTAVAIL, errno.EINVAL)
    return True


def _way(address: bytes) -> bytes | None:
    with socket.socket(family_of(address), socket.SOCK_DGRAM) as probe:
        try:
            only_family(probe)
            probe.connect((text_of(address), _DISCARD))  # sends nothing
            found = ip_address(probe.getsockname()[0])
        except OSError:
            return None
    return None if found.is_loopback else found.packed
