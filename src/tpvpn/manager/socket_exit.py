"""The socket exit: a manager without any privilege turns its clients' packets into sockets of its own.

It holds what all sessions share: addresses, the policy, the limits. A session's packets are `socket_carrier`'s. Packets
between session and client are as at the kernel exit, so a client sees no difference, but for protocols other than TCP,
UDP and ping, and for ping where the pod may not (`facts`). Nothing of it outlives the process.
"""

import socket
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence

from tpvpn.bundle import Bundle
from tpvpn.errors import PrivilegeError
from tpvpn.manager.addresses import AddressPool
from tpvpn.manager.forwarding import ways_out
from tpvpn.manager.metrics import Load
from tpvpn.manager.policy import check_carried, destination
from tpvpn.manager.reach import Reach, SessionReach
from tpvpn.manager.socket_carrier import SocketCarrier
from tpvpn.manager.socket_icmp import EchoFlow, ping_permitted
from tpvpn.manager.socket_tcp import TcpFlow
from tpvpn.manager.socket_udp import UdpFlow
from tpvpn.netlink import RouteSocket
from tpvpn.proto.config import Pair
from tpvpn.proto.flow import Pool
from tpvpn.proto.session import SPACE4, SPACE6
from tpvpn.wire.vnet import Offload

OFFLOADS = Offload.CHECKSUM | Offload.TSO4 | Offload.TSO6 | Offload.ECN
MAX_FLOWS = 40_000
"""Of all sessions; fewer where the process may not have so many descriptors."""
MAX_MEMORY = 256 << 20
"""Bytes in the buffers of all flows; fewer where the process may not use so much."""
KEPT_DESCRIPTORS = 1100
"""For links and whatever else the manager opens."""
_LEAST_MTU6 = 1280  # RFC 8200 section 5
_COUNTERS = ("between_sessions", "manager", "destination", "flows", "flow_rate", "half_open", "socket", "ports",
             "fragments", "queue", "unanswered")  # fmt: skip


class SocketPlace:
    """A session's place at the exit: the addresses from which its packets come (None: the family is not carried)."""

    def __init__(
        self, exit: "SocketExit", ipv4: str | None, ipv6: str | None, reach: SessionReach, *, offload: bool
    ) -> None:
        self.ipv4, self.ipv6 = ipv4, ipv6
        self._exit, self._reach, self._offload = exit, reach, offload
        self._carrier: SocketCarrier | None = None

    def agree(self, offloads: Offload) -> Offload:
        """Keep to those of these offloads that the exit has too; which they are."""
        return offloads & OFFLOADS

    def attach(self, bundle: Bundle, on_frame: Callable[[int, bytes], None]) -> SocketCarrier:
        """What turns the session's packets into sockets."""
        own = _packed(self.ipv4), _packed(self.ipv6)
        self._carrier = SocketCarrier(
            bundle,
            on_frame,
            own,
            self._reach,
            self._exit.pool,
            offload=self._offload,
            mtu=self._exit.mtu,
            clock=self._exit.clock,
        )
        self._exit.watch(self._carrier)
        return self._carrier

    def set_virtual(self, pairs: Sequence[Pair]) -> None:
        """Map these virtual subnets and no others, 1:1; flows that are open keep what they began with.

        ManagerError, with nothing changed, for a family that is not carried.
        """
        check_carried(pairs, [version for version, own in ((4, self.ipv4), (6, self.ipv6)) if own])
        self._reach.set_virtual(pairs)

    def close(self) -> None:
        """End the session's flows; its addresses are free again."""
        if self._carrier:
            self._carrier.stop()
            self._exit.finish(self._carrier)
        self._exit.give_back(self.ipv4, self.ipv6)


class SocketExit:
    """The way out for all sessions of this manager; the arguments are as the kernel exit's, `versions` those of IP."""

    def __init__(
        self,
        *,
        destinations: Sequence[str] = (),
        identity: str | None = None,
        max_flows: int = MAX_FLOWS,
        max_memory: int = MAX_MEMORY,
        versions: Sequence[int] = (4, 6),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._versions, self.clock = versions, clock
        self._destinations = [destination(text) for text in destinations]
        identity = identity or socket.gethostname()
        self._pools = {4: AddressPool(SPACE4, identity), 6: AddressPool(SPACE6, identity)}
        self._taken: set[bytes] = set()
        self._running: weakref.WeakSet[SocketCarrier] = weakref.WeakSet()
        self._finished: Counter[str] = Counter(dict.fromkeys(_COUNTERS, 0))
        self.pool = Pool(max_flows, max_memory)
        self.families: dict[int, bool] = {4: False, 6: False}
        self.reasons: dict[int, str] = {}
        """Why a family is not carried, in words."""
        self.mtu = 0

    def open(self) -> None:
        """See which ways lead out; PrivilegeError when none does."""
        netlink = RouteSocket()
        try:
            ways = ways_out(netlink.devices(), netlink.main_routes())
            own = netlink.addresses()
        finally:
            netlink.close()
        self.mtu = ways.mtu
        wanted = self._versions
        self.reasons = {version: f"no IPv{version} route leads out" for version in wanted if not ways.devices[version]}
        if 6 in wanted and ways.mtu < _LEAST_MTU6 and 6 not in self.reasons:
            self.reasons[6] = f"the MTU is {ways.mtu}, IPv6 needs {_LEAST_MTU6}"
        self.families = {version: version in wanted and version not in self.reasons for version in (4, 6)}
        if not any(self.families.values()):
            raise PrivilegeError(f"the socket exit cannot be used: {'; '.join(self.reasons.values())}")
        ping = {4: ping_permitted(4), 6: ping_permitted(16)}
        self._reach = Reach(self._destinations, self._taken.__contains__, ping, own)

    def close(self) -> None:
        """Nothing: sessions are closed by those who hold them."""

    @property
    def kinds(self) -> dict[int, str | None]:
        """How each family leaves; None: it is not carried."""
        return {version: "socket" if carried else None for version, carried in self.families.items()}

    def facts(self) -> dict[str, object]:
        """Whether a client's ping can be answered: not where the pod's net.ipv4.ping_group_range leaves it out."""
        carried = [version for version in (4, 6) if self.families[version]]
        return {"ping": {f"ipv{version}": self._reach.ping[version] for version in carried}}

    def dropped(self) -> dict[str, int]:
        """Packets dropped so far, by reason."""
        total = Counter(self._finished)
        for carrier in self._running:
            total.update(carrier.dropped)
        return dict(total)

    def load(self) -> Load:
        """What is open for all sessions."""
        kinds = Counter(type(flow) for carrier in self._running for flow in carrier.table.flows.values())
        flows = {"tcp": kinds[TcpFlow], "udp": kinds[UdpFlow], "icmp": kinds[EchoFlow]}
        return Load(flows, self.pool.most_flows, self.pool.used, self.pool.most_memory)

    def add_session(self, wanted4: str | None, wanted6: str | None, *, offload: bool) -> SocketPlace:
        """Addresses for a session: those wanted, if they are ours and free. ManagerError when all are taken."""
        four = self._pools[4].take(wanted4) if self.families[4] else None
        try:
            six = self._pools[6].take(wanted6) if self.families[6] else None
        except BaseException:
            self.give_back(four, None)
            raise
        self._taken.update(_packed(address) or b"" for address in (four, six) if address)
        return SocketPlace(self, four, six, SessionReach(self._reach), offload=offload)

    def give_back(self, ipv4: str | None, ipv6: str | None) -> None:
        """These addresses of a session are free."""
        for version, address in ((4, ipv4), (6, ipv6)):
            if address:
                self._pools[version].give_back(address)
                self._taken.discard(_packed(address) or b"")

    def watch(self, carrier: SocketCarrier) -> None:
        """Count what a session drops."""
        self._running.add(carrier)

    def finish(self, carrier: SocketCarrier) -> None:
        """It has ended: keep what it counted."""
        self._running.discard(carrier)
        self._finished.update(carrier.dropped)


def _packed(address: str | None) -> bytes | None:
    if address is None:
        return None
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)
