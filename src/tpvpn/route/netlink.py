"""Reading the kernel's routing: the whole view, and its answers for single addresses.

It decides nothing and changes nothing; no privilege is needed. The only door to pyroute2: rules, links and
addresses come through its asyncio API. That turns every attribute into Python objects, 55 µs a message: too slow for
tables of 100,000 routes, which are therefore taken apart here, the few attributes that matter, in a thread (the event
loop carries packets).
"""

import asyncio
import contextlib
import errno
import socket
import struct
import sys
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from pyroute2 import AsyncIPRoute  # pyright: ignore[reportMissingTypeStubs]

from tpvpn.dns.system import nameservers
from tpvpn.errors import TpvpnError
from tpvpn.netlink import Message, NetlinkError, NetlinkSocket, attribute, parse_attributes
from tpvpn.route.fib import Address, Link, Nexthop, Route, RouteKind, Rule, RuleAction, View
from tpvpn.route.prefix import FAMILIES, Prefix

T = TypeVar("T")

# linux/rtnetlink.h
_RTM_GETROUTE, _RTM_GETNEXTHOP = 26, 106
_RTMSG = struct.Struct("=BBBBBBBBI")
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_PREFSRC = 1, 4, 5, 6, 7
_RTA_MULTIPATH, _RTA_TABLE, _RTA_VIA, _RTA_NH_ID = 9, 15, 18, 30
_RTM_F_LOOKUP_TABLE = 0x1000
_RTNEXTHOP = struct.Struct("=HBBI")
_DST_AT = _RTMSG.size + 8
"""Where RTA_DST is: behind RTA_TABLE, in what fib_dump_info (net/ipv4/fib_semantics.c) and rt6_fill_node write."""
_TABLE_HEADER = struct.pack("=HH", 8, _RTA_TABLE)
_DST_HEADERS = (struct.pack("=HH", 8, _RTA_DST), struct.pack("=HH", 20, _RTA_DST))
_KINDS: Mapping[int, RouteKind] = {
    1: "unicast", 2: "local", 3: "broadcast", 4: "anycast", 5: "multicast",
    6: "blackhole", 7: "unreachable", 8: "prohibit", 9: "throw", 10: "nat",
}  # fmt: skip
_LAST_KIND_WITH_NEXTHOP = 5
"""What comes after only refuses; IPv6 names lo as its device all the same."""
_REFUSALS: Mapping[int, RouteKind] = {
    errno.EINVAL: "blackhole", errno.EHOSTUNREACH: "unreachable", errno.EACCES: "prohibit",
}  # fmt: skip
"""fib_props in net/ipv4/fib_semantics.c: the error a lookup ends with when such a route was chosen."""

# linux/nexthop.h
_NHMSG = struct.Struct("=BBBxI")
_NHA_ID, _NHA_GROUP, _NHA_OIF, _NHA_GATEWAY = 1, 2, 5, 6
_NEXTHOP_GROUP = struct.Struct("=IBBxx")

# linux/fib_rules.h
_ACTIONS: Mapping[int, RuleAction] = {
    1: "lookup", 2: "goto", 3: "nop", 6: "blackhole", 7: "unreachable", 8: "prohibit",
}  # fmt: skip
_FIB_RULE_INVERT = 0x2
_NARROWING = {"FRA_TUN_ID", "FRA_L3MDEV", "FRA_IP_PROTO", "FRA_SPORT_RANGE", "FRA_DPORT_RANGE", "UNKNOWN"}
"""Selectors that are not values of a Rule; what pyroute2 does not know (FRA_DSCP, FRA_FLOWLABEL) selects too."""

_IFF_UP, _IFF_LOOPBACK = 0x1, 0x8
_RTEXT_FILTER_SKIP_STATS = 8

Devices = Mapping[int, str]
_IPV6_SWITCH = Path("/proc/sys/net/ipv6/conf/default/disable_ipv6")
"""What a device yet to be made will have; the file is missing where IPv6 is not built in or off since boot."""


async def read_view() -> View:
    """All that the kernel would look at, in this network namespace. OSError when there is no rtnetlink at all."""
    return await asyncio.to_thread(_run, _read_view)


def _run(reading: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run it on a stock event loop, in a thread: uvloop, which carries the packets, takes no netlink sockets."""
    with asyncio.Runner(loop_factory=_StockLoop) as runner:
        runner.get_loop()  # OSError without descriptors, before there is a coroutine that nobody awaits
        return runner.run(reading())


class _StockLoop(asyncio.SelectorEventLoop):
    """One that could not be made for lack of descriptors says nothing more of it on standard error."""

    def __del__(self) -> None:
        if hasattr(self, "_ssock"):
            super().__del__()


async def _read_view() -> View:
    async with _iproute() as ipr:
        rules = [_rule(message) for message in await _dump(ipr.get_rules())]
        links = [_link(message) for message in await _dump(ipr.get_links(ext_mask=_RTEXT_FILTER_SKIP_STATS))]
        devices = {link.index: link.name for link in links}
        addresses = [_address(message, devices) for message in await _dump(ipr.get_addr())]
    return View(
        rules=tuple(rule for rule in rules if rule is not None),
        routes=await _read_routes(devices),
        links=tuple(links),
        addresses=tuple(address for address in addresses if address is not None),
        resolvers=nameservers(),
        ipv6=has_ipv6(),
    )


def has_ipv6() -> bool:
    """Whether a new device of this network namespace will carry IPv6."""
    try:
        return _IPV6_SWITCH.read_text().strip() == "0"
    except OSError:
        return False


async def ask(hosts: Sequence[Prefix]) -> list[Route | None]:
    """The kernel's answers where a packet of ours to each of these hosts would go; None where it has no route.

    The prefix of each is the host itself; the table is the one that answered.
    """
    # The socket belongs to this thread's network namespace, whatever the worker's is.
    kernel, devices = NetlinkSocket(socket.NETLINK_ROUTE), dict(socket.if_nameindex())
    try:
        return await asyncio.to_thread(lambda: [_ask(kernel, devices, host) for host in hosts])
    finally:
        kernel.close()


def _ask(kernel: NetlinkSocket, devices: Devices, host: Prefix) -> Route | None:
    # IPv6 names the table that answered unasked, and refuses the flag (inet6_rtm_valid_getroute_req, net/ipv6/route.c).
    flags = _RTM_F_LOOKUP_TABLE if host.version == 4 else 0
    header = _RTMSG.pack(FAMILIES[host.version], host.length, 0, 0, 0, 0, 0, 0, flags)
    address = host.network.to_bytes(host.length // 8)
    try:
        answer = kernel.get(_RTM_GETROUTE, header + attribute(_RTA_DST, address))
    except NetlinkError as error:
        return _refusal(host, error)
    return _route(answer.payload, devices, {})


def _refusal(host: Prefix, error: NetlinkError) -> Route | None:
    """A lookup that ends in an error: a route of that kind, or no route at all."""
    kind = _REFUSALS.get(error.errno or 0)
    if kind is not None:
        return Route(host, table=0, kind=kind)
    if error.errno in (errno.ENETUNREACH, errno.EAFNOSUPPORT, errno.EOPNOTSUPP, errno.ESRCH):
        return None
    raise TpvpnError(f"the kernel does not say where {host.address()} goes: {error.strerror}")


@contextlib.asynccontextmanager
async def _iproute() -> AsyncGenerator[Any]:
    """pyroute2's asyncio socket, untyped as it is."""
    ipr: Any = AsyncIPRoute()
    async with ipr:
        yield ipr


async def _dump(request: Any) -> list[Any]:
    return [message async for message in await request]


def _rule(message: Any) -> Rule | None:
    """A rule from pyroute2's fibmsg; None for other families (multicast routing) and actions."""
    attributes: dict[str, Any] = dict(message["attrs"])
    action = _ACTIONS.get(message["action"])
    if action is None or message["family"] not in (socket.AF_INET, socket.AF_INET6):
        return None
    version: Literal[4, 6] = 4 if message["family"] == socket.AF_INET else 6
    mark, mask = attributes.get("FRA_FWMARK"), attributes.get("FRA_FWMASK")
    suppress = attributes.get("FRA_SUPPRESS_PREFIXLEN", 0xFFFFFFFF)
    uids = attributes.get("FRA_UID_RANGE")
    low, _, high = uids.partition(":") if uids else ("", "", "")
    return Rule(
        version=version,
        preference=attributes.get("FRA_PRIORITY", 0),
        action=action,
        table=attributes.get("FRA_TABLE", message["table"]) if action == "lookup" else 0,
        source=_prefix(attributes.get("FRA_SRC"), message["src_len"]),
        destination=_prefix(attributes.get("FRA_DST"), message["dst_len"]),
        iif=attributes.get("FRA_IIFNAME"),
        oif=attributes.get("FRA_OIFNAME"),
        # The kernel leaves out a mark of 0, but not its mask.
        mark=None if mask is None else mark or 0,
        mark_mask=0xFFFFFFFF if mask is None else mask,
        uids=(int(low), int(high)) if uids else None,
        protocols_ports=bool(message["tos"] or _NARROWING & attributes.keys()),
        inverted=bool(message["flags"] & _FIB_RULE_INVERT),
        suppress_prefixlength=None if suppress == 0xFFFFFFFF else suppress,
        goto=attributes.get("FRA_GOTO"),
        protocol=attributes.get("FRA_PROTOCOL", 0),
    )


def _prefix(address: str | None, length: int) -> Prefix | None:
    if address is None:
        return None
    host = Prefix.host(address)
    return Prefix.around(host.version, host.network, length)


def _link(message: Any) -> Link:
    info: Any = message.get_attr("IFLA_LINKINFO")
    name: str = message.get_attr("IFLA_IFNAME")
    carrier = bool(message.get_attr("IFLA_CARRIER"))
    return Link(
        index=message["index"],
        name=name,
        kind=info.get_attr("IFLA_INFO_KIND") if info else None,
        up=bool(message["flags"] & _IFF_UP),
        carrier=carrier,
        ignored=() if carrier else tuple(version for version in FAMILIES if _ignores(name, version)),
        loopback=bool(message["flags"] & _IFF_LOOPBACK),
    )


def _ignores(device: str, version: int) -> bool:
    """Whether routes of this version by a device without carrier are passed over (ip-sysctl.rst)."""
    try:
        return Path(f"/proc/sys/net/ipv{version}/conf/{device}/ignore_routes_with_linkdown").read_text().strip() == "1"
    except OSError:
        return False


def _address(message: Any, devices: Devices) -> Address | None:
    given = message.get_attr("IFA_ADDRESS")
    own = message.get_attr("IFA_LOCAL") or given
    prefix = _prefix(given, message["prefixlen"])
    if prefix is None or message["index"] not in devices:
        return None
    return Address(devices[message["index"]], own, prefix, message["scope"])


async def _read_routes(devices: Devices) -> tuple[Route, ...]:
    # The socket belongs to this thread's network namespace, whatever the worker's is.
    kernel = NetlinkSocket(socket.NETLINK_ROUTE)
    try:
        return await asyncio.to_thread(_dump_routes, kernel, devices)
    finally:
        kernel.close()


def _dump_routes(kernel: NetlinkSocket, devices: Devices) -> tuple[Route, ...]:
    objects = _nexthop_objects(kernel.dump(_RTM_GETNEXTHOP, _NHMSG.pack(socket.AF_UNSPEC, 0, 0, 0)), devices)
    # The socket's strict checking leaves out cached routes (ip_valid_fib_dump_req in net/ipv4/fib_frontend.c).
    messages = kernel.dump(_RTM_GETROUTE, _RTMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0, 0, 0, 0, 0))
    return tuple(route for route in _routes(messages, devices, objects) if route is not None)


def _routes(messages: Iterable[Message], devices: Devices, objects: "NexthopObjects") -> Iterator[Route | None]:
    """The routes of a dump. Most differ from an earlier one in their destination alone: such are not parsed again."""
    known: dict[bytes, Route | None] = {}
    for message in messages:
        payload = message.payload
        if not payload.startswith(_TABLE_HEADER, _RTMSG.size) or not payload.startswith(_DST_HEADERS, _DST_AT):
            yield _route(payload, devices, objects)
            continue
        end = _DST_AT + payload[_DST_AT]
        rest = payload[:_DST_AT] + payload[end:]
        like = known.get(rest)
        if like is None:
            yield known.setdefault(rest, _route(payload, devices, objects))
            continue
        version, _, length = like.prefix
        prefix = Prefix(version, int.from_bytes(payload[_DST_AT + 4 : end], "big"), length)
        yield Route(prefix, like.table, like.kind, like.nexthops, like.metric, like.protocol, like.scope, like.source)


NexthopObjects = Mapping[int, tuple[Nexthop, ...]]
"""What the nexthop objects (ip-nexthop(8)) with each id stand for; a blackhole has no way out."""


def _route(payload: bytes, devices: Devices, objects: NexthopObjects) -> Route | None:
    """A route from struct rtmsg and its attributes; None for other families (MPLS, multicast routing) and kinds."""
    family, length, _, _, table, protocol, scope, number, _ = _RTMSG.unpack_from(payload)
    kind = _KINDS.get(number)
    if kind is None or family not in (socket.AF_INET, socket.AF_INET6):
        return None
    attributes = parse_attributes(payload[_RTMSG.size :])
    source = attributes.get(_RTA_PREFSRC)
    return Route(
        prefix=Prefix(
            4 if family == socket.AF_INET else 6, int.from_bytes(attributes.get(_RTA_DST, b""), "big"), length
        ),
        table=_u32(attributes[_RTA_TABLE]) if _RTA_TABLE in attributes else table,
        kind=kind,
        nexthops=_nexthops(attributes, devices, objects) if number <= _LAST_KIND_WITH_NEXTHOP else (),
        metric=_u32(attributes[_RTA_PRIORITY]) if _RTA_PRIORITY in attributes else 0,
        protocol=protocol,
        scope=scope,
        source=None if source is None else socket.inet_ntop(family, source),
    )


def _nexthops(attributes: Mapping[int, bytes], devices: Devices, objects: NexthopObjects) -> tuple[Nexthop, ...]:
    if _RTA_MULTIPATH in attributes:
        return tuple(_multipath(attributes[_RTA_MULTIPATH], devices))
    if _RTA_OIF in attributes:
        return (Nexthop(_device(_u32(attributes[_RTA_OIF]), devices), _gateway(attributes)),)
    if _RTA_NH_ID in attributes:  # alone only where nexthop_compat_mode is 0
        return objects.get(_u32(attributes[_RTA_NH_ID]), ())
    return ()


def _multipath(data: bytes, devices: Devices) -> Iterator[Nexthop]:
    """struct rtnexthop: length, flags, hops (weight - 1), device; then attributes."""
    while len(data) >= _RTNEXTHOP.size:
        length, _, hops, index = _RTNEXTHOP.unpack_from(data)
        length = max(length, _RTNEXTHOP.size)
        gateway = _gateway(parse_attributes(data[_RTNEXTHOP.size : length]))
        yield Nexthop(_device(index, devices), gateway, hops + 1)
        data = data[length + -length % 4 :]


def _gateway(attributes: Mapping[int, bytes]) -> str | None:
    if _RTA_GATEWAY in attributes:
        return _text(attributes[_RTA_GATEWAY])
    if _RTA_VIA in attributes:  # an IPv6 gateway of an IPv4 route: family u16, address
        return _text(attributes[_RTA_VIA][2:])
    return None


def _nexthop_objects(messages: list[Message], devices: Devices) -> NexthopObjects:
    single: dict[int, tuple[Nexthop, ...]] = {}
    groups: dict[int, bytes] = {}
    for message in messages:
        attributes = parse_attributes(message.payload[_NHMSG.size :])
        identity = _u32(attributes[_NHA_ID])
        if _NHA_GROUP in attributes:
            groups[identity] = attributes[_NHA_GROUP]
        elif _NHA_OIF in attributes:
            gateway = _text(attributes[_NHA_GATEWAY]) if _NHA_GATEWAY in attributes else None
            single[identity] = (Nexthop(_device(_u32(attributes[_NHA_OIF]), devices), gateway),)
    members = {identity: _NEXTHOP_GROUP.iter_unpack(data) for identity, data in groups.items()}
    return single | {
        group: tuple(replace(hop, weight=weight + 1) for member, weight, _ in found for hop in single.get(member, ()))
        for group, found in members.items()
    }


def _device(index: int, devices: Devices) -> str:
    """The device's name; one that came after the links were read is called as ip-route(8) would."""
    return devices.get(index) or f"if{index}"


def _text(address: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET if len(address) == 4 else socket.AF_INET6, address)


def _u32(value: bytes) -> int:
    return int.from_bytes(value, sys.byteorder)
