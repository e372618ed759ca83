"""What the helper does to the kernel's routing: our rules and routes, our device.

It knows nothing of sessions and asks nobody whether it may. Doing twice what was done once is no error, so that a
journal can be undone without knowing how much of it had been done. On rtnetlink by hand (`netlink`), since a process
with root's rights had better be small.
"""

import errno
import socket
import struct
from collections.abc import Iterable, Iterator, Set
from contextlib import closing
from typing import Literal

from tpvpn.errors import PrivilegeError, TpvpnError
from tpvpn.helper.protocol import describe
from tpvpn.netlink import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    NetlinkError,
    RouteSocket,
    attribute,
    attribute_text,
    attribute_u32,
    parse_attributes,
)
from tpvpn.route.fib import TPVPN_PROTOCOL, Route, Rule
from tpvpn.route.operations import Operation
from tpvpn.route.prefix import BITS, FAMILIES, Prefix

TABLES = range(0x7470, 0x7570)
"""The routing tables of sessions, one each ("tp" in ASCII is the first); other programs' habits are elsewhere."""

# linux/rtnetlink.h, linux/if_addr.h
_RTM_NEWADDR = 20
_RTM_NEWROUTE, _RTM_DELROUTE, _RTM_GETROUTE = 24, 25, 26
_RTM_NEWRULE, _RTM_DELRULE, _RTM_GETRULE = 32, 33, 34
_RTMSG = struct.Struct("=BBBBBBBBI")
_VERSIONS: dict[int, Literal[4, 6]] = {socket.AF_INET: 4, socket.AF_INET6: 6}
_KIND_OFFSET = 7
_RTA_DST, _RTA_OIF, _RTA_PRIORITY, _RTA_PREFSRC, _RTA_TABLE = 1, 4, 6, 7, 15
_RTN = {"unicast": 1, "throw": 9}
_IFADDRMSG = struct.Struct("=BBBBI")
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_IFA_F_NODAD = 0x02

# linux/fib_rules.h; struct fib_rule_hdr has the layout of struct rtmsg
_FRA_DST, _FRA_SRC, _FRA_IIFNAME, _FRA_PRIORITY, _FRA_FWMARK, _FRA_TABLE = 1, 2, 3, 6, 10, 15
_FRA_FWMASK, _FRA_OIFNAME, _FRA_UID_RANGE, _FRA_PROTOCOL = 16, 17, 20, 21
_FR_ACT_TO_TBL = 1
_FIB_RULE_INVERT = 0x2

_FORBIDDEN = "changing routes needs CAP_NET_ADMIN: run as root, or give the container `--cap-add NET_ADMIN`"
_THERE = {errno.EEXIST}
_GONE = {errno.ENOENT, errno.ESRCH, errno.ENODEV, errno.EAFNOSUPPORT, errno.EOPNOTSUPP}
"""What is to be removed is not there, nor perhaps its device or its whole family."""


def apply(operation: Operation) -> bool:
    """Do the operation; whether there was anything to do.

    Only what `protocol.check` allows can be expressed. TpvpnError naming the object, PrivilegeError without the right.
    """
    try:
        with closing(RouteSocket()) as kernel:
            return _apply(kernel, operation)
    except OSError as error:
        raise _explained(operation, error) from error


def _apply(kernel: RouteSocket, operation: Operation) -> bool:
    target, add = operation.target, operation.verb == "add"
    try:
        if isinstance(target, Rule):
            flags = NLM_F_CREATE | NLM_F_EXCL if add else 0
            kernel.request(_RTM_NEWRULE if add else _RTM_DELRULE, flags, _rule(target))
        else:
            flags = NLM_F_CREATE | NLM_F_REPLACE if add else 0
            kernel.request(_RTM_NEWROUTE if add else _RTM_DELROUTE, flags, _route(target))
    except OSError as error:
        if error.errno not in (_THERE if add else _GONE):
            raise
        return False
    return True


def _explained(operation: Operation, error: OSError) -> TpvpnError:
    if error.errno == errno.EPERM:
        return PrivilegeError(_FORBIDDEN)
    return TpvpnError(f"cannot {operation.verb} {describe(operation.target)}: {error.strerror}")


def _route(route: Route) -> bytes:
    """struct rtmsg with attributes. OSError ENODEV when its device is gone."""
    version, _, length = route.prefix
    table = 0  # RTA_TABLE holds it: it may be larger than a byte
    scope, kind = route.scope, _RTN[route.kind]
    payload = _RTMSG.pack(FAMILIES[version], length, 0, 0, table, route.protocol, scope, kind, 0)
    payload += attribute(_RTA_DST, _packed(route.prefix)) + attribute_u32(_RTA_TABLE, route.table)
    if route.device:
        payload += attribute_u32(_RTA_OIF, _index(route.device))
    if route.metric:
        payload += attribute_u32(_RTA_PRIORITY, route.metric)
    if route.source:
        payload += attribute(_RTA_PREFSRC, _packed(Prefix.host(route.source)))
    return payload


def _rule(rule: Rule) -> bytes:
    """struct fib_rule_hdr with attributes."""
    source, destination = (0 if prefix is None else prefix.length for prefix in (rule.source, rule.destination))
    flags = _FIB_RULE_INVERT if rule.inverted else 0
    payload = _RTMSG.pack(FAMILIES[rule.version], destination, source, 0, 0, 0, 0, _FR_ACT_TO_TBL, flags)
    payload += attribute_u32(_FRA_PRIORITY, rule.preference) + attribute_u32(_FRA_TABLE, rule.table)
    payload += attribute(_FRA_PROTOCOL, bytes([rule.protocol]))
    for kind, prefix in ((_FRA_SRC, rule.source), (_FRA_DST, rule.destination)):
        if prefix is not None:
            payload += attribute(kind, _packed(prefix))
    for kind, device in ((_FRA_IIFNAME, rule.iif), (_FRA_OIFNAME, rule.oif)):
        if device is not None:
            payload += attribute_text(kind, device)
    if rule.mark is not None:
        payload += attribute_u32(_FRA_FWMARK, rule.mark) + attribute_u32(_FRA_FWMASK, rule.mark_mask)
    if rule.uids is not None:
        payload += attribute(_FRA_UID_RANGE, struct.pack("=II", *rule.uids))
    return payload


def configure_tun(device: str, mtu: int, addresses: Iterable[str], txqueuelen: int) -> tuple[str, ...]:
    """Bring the device up with these addresses, each alone in its prefix; gives back those that it now has.

    Where IPv6 is switched off its address is left out. TpvpnError when the kernel refuses.
    """
    with closing(RouteSocket()) as kernel:
        try:
            index = _index(device)
            kernel.bring_up(index, mtu=mtu, queue_length=txqueuelen, ipv6=_has_ipv6(device))
            return tuple(address for address in addresses if _add_address(kernel, index, Prefix.host(address)))
        except OSError as error:
            raise TpvpnError(f"cannot configure {device}: {error.strerror}") from error


def _add_address(kernel: RouteSocket, index: int, host: Prefix) -> bool:
    packed = _packed(host)
    # Nobody else is on the link: an IPv6 address need not wait for duplicate detection.
    payload = _IFADDRMSG.pack(FAMILIES[host.version], host.length, _IFA_F_NODAD, 0, index)
    payload += attribute(_IFA_LOCAL, packed) + attribute(_IFA_ADDRESS, packed)
    try:
        kernel.request(_RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, payload)
    except NetlinkError as error:
        if host.version == 6 and error.errno in (errno.EACCES, errno.EPERM, errno.EAFNOSUPPORT, errno.EOPNOTSUPP):
            return False
        raise
    return True


def table_is_free(table: int) -> bool:
    """Whether no rule leads to the table and no route is in it."""
    with closing(RouteSocket()) as kernel:
        ruled = any(found == table for found, _, _ in _rules(kernel))
        return not ruled and not any(_routes(kernel, family, table=table) for family in FAMILIES.values())


def sweep(spared: Set[int]) -> list[str]:
    """Remove what sessions that died left behind: rules and routes of ours in our tables but the spared; in words.

    A table that leads to a device is spared too: a device dies with its session, so that one lives, perhaps with its
    state in another directory.
    """
    with closing(RouteSocket()) as kernel:
        routes = [found for family in FAMILIES.values() for found in _routes(kernel, family, protocol=TPVPN_PROTOCOL)]
        living = spared | {_table(route) for route in routes if route[_KIND_OFFSET] == _RTN["unicast"]}
        left = [
            (_RTM_DELRULE, payload, _described_rule(table, payload))
            for table, protocol, payload in _rules(kernel)
            if table in TABLES and table not in living and protocol == TPVPN_PROTOCOL
        ]
        left += [
            (_RTM_DELROUTE, route, _described_route(route))
            for route in routes
            if _table(route) in TABLES and _table(route) not in living
        ]
        return [words for kind, payload, words in left if _remove(kernel, kind, payload)]


def _table(route: bytes) -> int:
    return _u32(parse_attributes(route[_RTMSG.size :])[_RTA_TABLE])


def _described_rule(table: int, payload: bytes) -> str:
    preference = _u32(parse_attributes(payload[_RTMSG.size :]).get(_FRA_PRIORITY, bytes(4)))
    return describe(Rule(_VERSIONS[payload[0]], preference, table=table))


def _described_route(payload: bytes) -> str:
    version, length, attributes = _VERSIONS[payload[0]], payload[1], parse_attributes(payload[_RTMSG.size :])
    prefix = Prefix.around(version, int.from_bytes(attributes.get(_RTA_DST, b"")), length)
    return describe(Route(prefix, _u32(attributes[_RTA_TABLE]), "throw"))


def _remove(kernel: RouteSocket, kind: int, payload: bytes) -> bool:
    """Ask for the removal of an object in the words in which the kernel described it; whether it was there."""
    try:
        kernel.request(kind, 0, payload)
    except NetlinkError as error:
        if error.errno == errno.EPERM:
            raise PrivilegeError(_FORBIDDEN) from error
        if error.errno not in _GONE:
            raise TpvpnError(f"cannot remove what an earlier session left: {error.strerror}") from error
        return False
    return True


def _rules(kernel: RouteSocket) -> Iterator[tuple[int, int, bytes]]:
    """Table, protocol and message of every rule."""
    for message in kernel.dump(_RTM_GETRULE, _RTMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0, 0, 0, 0, 0)):
        attributes = parse_attributes(message.payload[_RTMSG.size :])
        if message.payload[0] in FAMILIES.values():
            protocol = attributes.get(_FRA_PROTOCOL, b"\0")[0]
            yield _u32(attributes.get(_FRA_TABLE, bytes(4))), protocol, message.payload


def _routes(kernel: RouteSocket, family: int, *, table: int = 0, protocol: int = 0) -> list[bytes]:
    """The routes of a family, filtered by the kernel (strict checking), as messages."""
    payload = _RTMSG.pack(family, 0, 0, 0, 0, protocol, 0, 0, 0)
    try:
        messages = kernel.dump(_RTM_GETROUTE, payload + (attribute_u32(_RTA_TABLE, table) if table else b""))
    except NetlinkError as error:
        if error.errno == errno.ENOENT:  # there is no such table
            return []
        raise
    # A family that is not built in is answered with every family's routes.
    return [message.payload for message in messages if message.payload[0] == family]


def _has_ipv6(device: str) -> bool:
    """Whether the device carries IPv6 (where it does not, its IPv6 settings cannot be named)."""
    try:
        with open(f"/proc/sys/net/ipv6/conf/{device}/disable_ipv6") as switch:
            return switch.read(1) == "0"
    except FileNotFoundError:
        return False


def _index(device: str) -> int:
    try:
        return socket.if_nametoindex(device)
    except OSError as error:
        raise OSError(errno.ENODEV, f"there is no device {device}") from error


def _packed(prefix: Prefix) -> bytes:
    return prefix.network.to_bytes(BITS[prefix.version] // 8)


def _u32(value: bytes) -> int:
    return struct.unpack_from("=I", value)[0]
