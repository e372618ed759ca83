"""The kernel exit: each session has a device of its own, and the kernel forwards between it and the cluster, with NAT.

It never sees a packet. The kernel routes a session's addresses to its device: nothing is looked up in Python. A table
of nf_tables keeps sessions from each other, from the manager's own addresses and from what the destination policy
excludes, and masquerades what leaves. A session's virtual subnets are a table of its own, which translates before all
that is judged. TUNs, routes and tables vanish with the process, pairs with the next one; `close()` restores forwarding.
The device is a TUN or, where /dev/net/tun can neither be had nor made, a `veth` pair. Needs CAP_NET_ADMIN and nf_tables
and, for a pair, CAP_NET_RAW; it starts no program.
"""

import contextlib
import errno
import itertools
import os
import socket
import stat
from collections.abc import Callable, Generator, Sequence

from tpvpn.bundle import Bundle
from tpvpn.errors import PrivilegeError, TpvpnError
from tpvpn.manager.addresses import AddressPool
from tpvpn.manager.forwarding import Forwarding, ipv6_present, ways_out
from tpvpn.manager.policy import NEVER, check_carried, destination
from tpvpn.manager.veth import Veth, remove_pairs
from tpvpn.netlink import RouteSocket
from tpvpn.nfnetlink import (
    ACCEPT,
    DROP,
    DSTNAT,
    MASQUERADE,
    SRCNAT,
    Chain,
    Expression,
    Network,
    Table,
    counter,
    ct_state,
    daddr,
    family,
    iifname,
    netmap,
    oifname,
    saddr,
)
from tpvpn.proto.config import Pair
from tpvpn.proto.session import SPACE4, SPACE6
from tpvpn.pump import OwnAddress, Pump
from tpvpn.tun import CLONE_DEVICE, Tun, open_tun
from tpvpn.wire.vnet import Offload

_NAME = "tpvpn-s"
_PROTOCOL = 116  # rtm_protocol of every route of ours, as in route/fib
_QUEUE_LENGTH = 500
_REMEDY = (
    "in Docker: --cap-add NET_ADMIN --device /dev/net/tun; in Kubernetes: securityContext with runAsUser: 0 and "
    "capabilities.add: [NET_ADMIN, NET_RAW, MKNOD]"
)

_COUNTERS = ("between_sessions", "inbound", "invalid", "destination", "manager", "transit")


class ExitSession:
    """A session's place at the exit: its device, and the addresses that lead to it (None: a family is not carried)."""

    def __init__(
        self, tun: Tun | Veth, ipv4: str | None, ipv6: str | None, release: Callable[[], None], *, offload: bool
    ) -> None:
        self.tun, self.ipv4, self.ipv6, self._release = tun, ipv4, ipv6, release
        self._offload = offload
        self._virtual: Table | None = None

    def agree(self, offloads: Offload) -> Offload:
        """Keep to those of these offloads that the kernel has; which they are. OSError when it refuses."""
        self.tun.set_offloads(self.tun.offloads & offloads)
        return self.tun.offloads

    def attach(self, bundle: Bundle, on_frame: Callable[[int, bytes], None]) -> Pump:
        """What carries packets between the session's device and its links."""
        return Pump(self.tun, bundle, OwnAddress("source", self.ipv4, self.ipv6), on_frame, offload=self._offload)

    def set_virtual(self, pairs: Sequence[Pair]) -> None:
        """Map these virtual subnets and no others, 1:1; flows that are open keep what they began with.

        Errors, with nothing changed: ManagerError for a family that is not carried, TpvpnError when the kernel refuses.
        """
        check_carried(pairs, [version for version, own in ((4, self.ipv4), (6, self.ipv6)) if own])
        device = iifname(self.tun.name)
        rules = tuple((device, daddr(virtual), netmap(real)) for virtual, real in pairs)
        # The policy's hook, forward, comes after this one and judges the real address.
        chains = (Chain("prerouting", rules, kind="nat", priority=DSTNAT),)
        with _explained("mapping virtual subnets"):
            if not rules:
                self._unmap()
            elif self._virtual:
                self._virtual.replace_rules(chains)
            else:
                self._virtual = Table(self.tun.name, chains)

    def close(self) -> None:
        """Close the device, and with it its routes and its mapping; the addresses are free again."""
        self._unmap()
        self.tun.close()
        self._release()

    def _unmap(self) -> None:
        if self._virtual:
            self._virtual.close()
            self._virtual = None


class KernelExit:
    """The way out for all sessions of this manager.

    `destinations`: CIDRs that sessions may reach; none means everything but `policy.NEVER`. `queue_length`: packets
    that wait in a session's TUN. `identity`: what the block of addresses is chosen by; the host's name by default.
    UsageError for a malformed CIDR.
    """

    def __init__(
        self, *, destinations: Sequence[str] = (), queue_length: int = _QUEUE_LENGTH, identity: str | None = None
    ) -> None:
        self._destinations = [destination(text) for text in destinations]
        self._queue_length = queue_length
        identity = identity or socket.gethostname()
        self._pools = {4: AddressPool(SPACE4, identity), 6: AddressPool(SPACE6, identity)}
        self._numbers = itertools.count(1)
        self._open = contextlib.ExitStack()
        self.families: dict[int, bool] = {4: False, 6: False}
        self.reasons: dict[int, str] = {}
        """Why a family is not carried, in words."""
        self.mtu = 0
        self.without_tun = ""
        """Why sessions have no TUN but a veth pair, in words."""

    def open(self) -> None:
        """Switch forwarding on and install the table.

        Errors: PrivilegeError without CAP_NET_ADMIN, a device or nf_tables, or where nothing can be forwarded;
        UsageError when another manager runs in this network namespace.
        """
        try:
            with contextlib.ExitStack() as stack, _explained("preparing the exit"):
                self._prepare(stack)
                self._open = stack.pop_all()
        except PrivilegeError as error:
            raise PrivilegeError(f"the kernel exit cannot be used: {error} ({_REMEDY})") from error

    def _prepare(self, stack: contextlib.ExitStack) -> None:
        self._netlink = RouteSocket()
        stack.callback(self._netlink.close)
        forwarding = Forwarding(self._netlink, ways_out(self._netlink.devices(), self._netlink.main_routes()))
        self.mtu = forwarding.ways.mtu
        stack.callback(forwarding.restore)
        verdicts = {4: forwarding.switch_on4(), 6: forwarding.switch_on6()}
        self.reasons = {version: reason for version, reason in verdicts.items() if reason is not None}
        self.families = {version: version not in self.reasons for version in verdicts}
        if not any(self.families.values()):
            raise PrivilegeError(f"nothing can be forwarded: {'; '.join(self.reasons.values())}")
        transit: list[tuple[Expression, ...]] = [(iifname(device.name), family(4)) for device in forwarding.switched4]
        if forwarding.switched6:
            transit.append((family(6),))
        self._table = Table("tpvpn", _chains(self._destinations, transit), _COUNTERS)
        stack.callback(self._table.close)
        remove_pairs(self._netlink, _NAME)  # the table is ours alone: so were they of a manager that was killed
        self._choose_device()

    def _choose_device(self) -> None:
        """Have a TUN for each session or, where there cannot be any, a veth pair; PrivilegeError for neither."""
        _make_clone_device()
        try:
            open_tun(f"{_NAME}0", offload=True).close()
        except PrivilegeError as error:
            self.without_tun = str(error)
            try:
                self._open_device(f"{_NAME}0", offload=True).close()
            except OSError as refused:
                needs = "needs CAP_NET_RAW" if refused.errno == errno.EPERM else f"fails: {refused.strerror}"
                raise PrivilegeError(f"{error}; a veth pair in its place {needs}") from refused

    def _open_device(self, name: str, *, offload: bool) -> Tun | Veth:
        return Veth(name, self._netlink, offload=offload) if self.without_tun else open_tun(name, offload=offload)

    def close(self) -> None:
        """Remove the table and put forwarding back; sessions are closed by those who hold them."""
        self._open.close()

    @property
    def kinds(self) -> dict[int, str | None]:
        """How each family leaves; None: it is not carried."""
        return {version: "kernel" if carried else None for version, carried in self.families.items()}

    def facts(self) -> dict[str, object]:
        """Nothing that a client must know: what the kernel carries is all there is."""
        return {}

    def dropped(self) -> dict[str, int]:
        """Packets dropped so far, by reason."""
        return self._table.counters()

    def load(self) -> None:
        """Nothing: the kernel keeps what is open."""

    def add_session(self, wanted4: str | None, wanted6: str | None, *, offload: bool) -> ExitSession:
        """A device that the kernel forwards to and from, with addresses: those wanted, if they are ours and free.

        Errors: ManagerError when all addresses are taken, TpvpnError when the kernel refuses.
        """
        with contextlib.ExitStack() as undo:
            addresses: dict[int, str | None] = {4: None, 6: None}
            for version, wanted in ((4, wanted4), (6, wanted6)):
                if self.families[version]:
                    taken = addresses[version] = self._pools[version].take(wanted)
                    undo.callback(self._pools[version].give_back, taken)
            name = f"{_NAME}{next(self._numbers)}"
            with contextlib.ExitStack() as undo_tun, _explained(f"setting up {name}"):
                tun = self._open_device(name, offload=offload)
                undo_tun.callback(tun.close)
                self._connect(name, [address for address in addresses.values() if address])
                undo_tun.pop_all()
            return ExitSession(tun, addresses[4], addresses[6], undo.pop_all().close, offload=offload)

    def _connect(self, name: str, addresses: list[str]) -> None:
        index = socket.if_nametoindex(name)
        self._netlink.bring_up(index, mtu=self.mtu, queue_length=self._queue_length, ipv6=ipv6_present())
        if self.families[4]:
            self._netlink.set_forwarding(index, True)
        for address in addresses:
            self._netlink.add_host_route(address, index, _PROTOCOL)


def _chains(destinations: Sequence[Network], transit: Sequence[tuple[Expression, ...]]) -> tuple[Chain, ...]:
    """The manager's rules; `transit`: packets whose forwarding we switched on, which it is for sessions alone."""
    from_session, to_session = iifname(f"{_NAME}*"), oifname(f"{_NAME}*")
    answers = ct_state("established", "related")
    excluded = (from_session, counter("destination"), DROP)
    if destinations:
        policy = [*((from_session, daddr(network), ACCEPT) for network in destinations), excluded]
    else:
        policy = [*((from_session, daddr(network), *excluded[1:]) for network in NEVER), (from_session, ACCEPT)]
    forward = (
        (from_session, to_session, counter("between_sessions"), DROP),
        (from_session, answers, ACCEPT),
        (to_session, answers, ACCEPT),
        (to_session, counter("inbound"), DROP),
        # Connection tracking translates no invalid packet: it would leave with the session's own address.
        (from_session, ct_state("invalid"), counter("invalid"), DROP),
        *policy,
        *((*packets, counter("transit"), DROP) for packets in transit),
    )
    own = ((from_session, answers, ACCEPT), (from_session, counter("manager"), DROP))
    leaving = oifname(f"{_NAME}*", unequal=True)
    masquerade = tuple((saddr(space), leaving, MASQUERADE) for space in (SPACE4, SPACE6))
    return (
        Chain("input", own),
        Chain("forward", forward),
        Chain("postrouting", masquerade, kind="nat", priority=SRCNAT),
    )


def _make_clone_device() -> None:
    """Make /dev/net/tun where a container has the right but not the node; else opening it says what is missing."""
    if not CLONE_DEVICE.exists():
        with contextlib.suppress(OSError):
            CLONE_DEVICE.parent.mkdir(parents=True, exist_ok=True)
            os.mknod(CLONE_DEVICE, stat.S_IFCHR | 0o600, os.makedev(10, 200))


@contextlib.contextmanager
def _explained(doing: str) -> Generator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EACCES):
            raise PrivilegeError(f"{doing} needs CAP_NET_ADMIN") from error
        raise TpvpnError(f"{doing}: {error.strerror}") from error
