"""Netlink by hand: messages and attributes as bytes, a socket that asks and waits, the rtnetlink calls a manager needs.

It knows nothing of tpvpn's addresses or policy, and imports the standard library only, so that the manager runs on any
stock Python image (the laptop's richer view of the routes is `route/netlink`, on pyroute2). Every call is synchronous:
the kernel answers within the send. Errors are `NetlinkError`s: OSErrors with the kernel's own words where it gave some
(extended ACK).

Layout (linux/netlink.h; host byte order, everything padded to 4 bytes): a message is length u32, type u16, flags u16,
sequence u32, port u32, payload; an attribute is length u16, type u16, value.
"""

import errno
import ipaddress
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

# linux/netlink.h
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP = 0x01, 0x04, 0x300
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE, NLM_F_APPEND = 0x100, 0x200, 0x400, 0x800
NLA_F_NESTED = 0x8000
_NLM_F_DUMP_INTERRUPTED, _NLM_F_CAPPED, _NLM_F_ACK_TLVS = 0x10, 0x100, 0x200
_NLA_TYPE_MASK = 0x3FFF
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NLMSGERR_ATTR_MSG = 1
_SOL_NETLINK, _NETLINK_CAP_ACK, _NETLINK_EXT_ACK, _NETLINK_GET_STRICT_CHK = 270, 10, 11, 12

_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_RECEIVE_SIZE = 1 << 17
_READINGS = 4
"""How often a dump that was interrupted is begun; a VPN that flaps beside 100,000 routes interrupts every one."""
_PATIENCE = 5.0
"""Seconds after which a kernel that does not answer is an error; it answers at once."""


class NetlinkError(OSError):
    """The kernel refused a message; `position` says which of the messages sent together, from 0."""

    def __init__(self, number: int, text: str = "", position: int = 0) -> None:
        super().__init__(number, text or os.strerror(number))
        self.position = position


class Message(NamedTuple):
    """One netlink message; `sequence` is filled in by the socket."""

    kind: int
    flags: int
    payload: bytes
    sequence: int = 0


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute, padded."""
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4)


def nest(kind: int, *attributes: bytes) -> bytes:
    """An attribute whose value is other attributes."""
    return attribute(kind | NLA_F_NESTED, b"".join(attributes))


def attribute_u32(kind: int, value: int) -> bytes:
    """An attribute that holds a u32 in host order, as rtnetlink has them."""
    return attribute(kind, struct.pack("=I", value))


def attribute_text(kind: int, text: str) -> bytes:
    """An attribute that holds a string with its NUL."""
    return attribute(kind, text.encode() + b"\0")


def parse_attributes(data: bytes) -> dict[int, bytes]:
    """The attributes in `data` by type, without flags; of a repeated type the last. ValueError when malformed."""
    found: dict[int, bytes] = {}
    offset = 0
    while offset + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if not _ATTRIBUTE.size <= length <= len(data) - offset:
            raise ValueError(f"netlink attribute of {length} bytes where {len(data) - offset} are left")
        found[kind & _NLA_TYPE_MASK] = data[offset + _ATTRIBUTE.size : offset + length]
        offset += length + -length % 4
    return found


def pack_message(message: Message) -> bytes:
    """The message's bytes, padded."""
    length = _HEADER.size + len(message.payload)
    header = _HEADER.pack(length, message.kind, message.flags, message.sequence, 0)
    return header + message.payload + bytes(-length % 4)


def parse_messages(data: bytes) -> Iterator[Message]:
    """The messages of one datagram. ValueError when they are malformed."""
    offset = 0
    while offset + _HEADER.size <= len(data):
        length, kind, flags, sequence, _port = _HEADER.unpack_from(data, offset)
        if not _HEADER.size <= length <= len(data) - offset:
            raise ValueError(f"netlink message of {length} bytes where {len(data) - offset} are left")
        yield Message(kind, flags, data[offset + _HEADER.size : offset + length], sequence)
        offset += length + -length % 4


def parse_error(message: Message, position: int = 0) -> NetlinkError | None:
    """What an NLMSG_ERROR says: None when it is an acknowledgement, else the error with the kernel's words."""
    number, length = struct.unpack_from("=iI", message.payload)
    if number == 0:
        return None
    text = ""
    if message.flags & _NLM_F_ACK_TLVS:
        # The request is quoted before the attributes, its header alone when capped.
        quoted = _HEADER.size if message.flags & _NLM_F_CAPPED else length + -length % 4
        words = parse_attributes(message.payload[4 + quoted :]).get(_NLMSGERR_ATTR_MSG, b"")
        text = words.rstrip(b"\0").decode(errors="replace")
    return NetlinkError(-number, text, position)


class NetlinkSocket:
    """One netlink socket of the calling thread's network namespace; not for several threads at once.

    Errors: OSError when the kernel lacks the protocol.
    """

    def __init__(self, protocol: int) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        self._sequence = 0
        try:
            for option in (_NETLINK_CAP_ACK, _NETLINK_EXT_ACK, _NETLINK_GET_STRICT_CHK):
                self._socket.setsockopt(_SOL_NETLINK, option, 1)
            self._socket.settimeout(_PATIENCE)
            self._socket.bind((0, 0))
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        """Close the socket; what the kernel tied to it goes too."""
        self._socket.close()

    def request(self, kind: int, flags: int, payload: bytes) -> None:
        """Ask for one change and wait until it is done. NetlinkError when it is refused."""
        self.send([Message(kind, flags | NLM_F_REQUEST | NLM_F_ACK, payload)])

    def send(self, messages: Iterable[Message]) -> None:
        """Send messages as one datagram and wait for the first answer: one of them must ask for an ACK.

        NetlinkError for the first that is refused.
        """
        first = self._sequence + 1
        numbered = [message._replace(sequence=first + position) for position, message in enumerate(messages)]
        self._sequence += len(numbered)
        self._socket.send(b"".join(pack_message(message) for message in numbered))
        while True:
            for answer in self._receive():
                # An earlier batch that failed may have left answers for its later messages.
                if answer.kind == _NLMSG_ERROR and answer.sequence >= first:
                    if error := parse_error(answer, answer.sequence - first):
                        raise error
                    return

    def get(self, kind: int, payload: bytes) -> Message:
        """The one object that is asked for. NetlinkError when there is none or it is refused."""
        self._sequence += 1
        self._socket.send(pack_message(Message(kind, NLM_F_REQUEST, payload, self._sequence)))
        while True:
            for answer in self._receive():
                if answer.sequence == self._sequence:
                    if answer.kind == _NLMSG_ERROR and (error := parse_error(answer)):
                        raise error
                    return answer

    def dump(self, kind: int, payload: bytes) -> list[Message]:
        """Every object of a kind; read again when it changed meanwhile. NetlinkError when it is refused.

        Where it changes each time, the last reading is taken as it is: whoever follows changes reads again anyway.
        """
        found: list[Message] = []
        for _ in range(_READINGS):
            whole, found = self._dump_once(kind, payload)
            if whole:
                break
        return found

    def _dump_once(self, kind: int, payload: bytes) -> tuple[bool, list[Message]]:
        self._sequence += 1
        self._socket.send(pack_message(Message(kind, NLM_F_REQUEST | NLM_F_DUMP, payload, self._sequence)))
        found: list[Message] = []
        whole = True
        while True:
            for answer in self._receive():
                if answer.sequence != self._sequence:
                    continue
                whole = whole and not answer.flags & _NLM_F_DUMP_INTERRUPTED
                if answer.kind == _NLMSG_ERROR and (error := parse_error(answer)):
                    raise error
                if answer.kind == _NLMSG_DONE:
                    if number := struct.unpack_from("=i", answer.payload)[0]:
                        raise NetlinkError(-number)
                    return whole, found
                found.append(answer)

    def _receive(self) -> Iterator[Message]:
        data, _ancillary, flags, _address = self._socket.recvmsg(_RECEIVE_SIZE)
        if flags & socket.MSG_TRUNC:
            raise NetlinkError(errno.EMSGSIZE, f"the kernel's answer is longer than {_RECEIVE_SIZE} bytes")
        return parse_messages(data)


# linux/rtnetlink.h, linux/if_link.h, linux/if_addr.h
_RTM_NEWLINK, _RTM_DELLINK, _RTM_GETLINK, _RTM_SETLINK, _RTM_NEWROUTE, _RTM_GETROUTE = 16, 17, 18, 19, 24, 26
_IFINFO = struct.Struct("=BxHiII")
_RTMSG = struct.Struct("=BBBBBBBBI")
_IFADDR = struct.Struct("=BBBBI")
_RTM_GETADDR, _IFA_ADDRESS, _IFA_LOCAL, _RT_SCOPE_UNIVERSE = 22, 1, 2, 0
_RTM_NEWQDISC, _TC_H_ROOT, _TCA_KIND = 36, 0xFFFFFFFF, 1
_TCMSG = struct.Struct("=BxxxiIII")
_IFF_UP, _IFF_LOOPBACK, _IFF_NOARP = 0x1, 0x8, 0x80
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_TXQLEN, _IFLA_LINKINFO, _IFLA_AF_SPEC = 1, 3, 4, 13, 18, 26
_IFLA_INFO_KIND, _IFLA_INFO_DATA, _VETH_INFO_PEER = 1, 2, 1
_IFLA_INET_CONF, _IFLA_INET6_ADDR_GEN_MODE = 1, 8
_IPV4_DEVCONF_FORWARDING = 1
_IN6_ADDR_GEN_MODE_NONE = 1
_RTA_DST, _RTA_OIF, _RTA_METRICS, _RTA_MULTIPATH = 1, 4, 8, 9
_RTAX_MTU = 2
_RT_SCOPE_LINK, _RT_TABLE_MAIN, _RTN_UNICAST = 253, 254, 1
RTPROT_RA = 9


@dataclass(frozen=True, slots=True)
class Device:
    """A network device; `forwarding` is IPv4's, None where the device has no IPv4."""

    index: int
    name: str
    up: bool
    loopback: bool
    mtu: int
    forwarding: bool | None


@dataclass(frozen=True, slots=True)
class DeviceRoute:
    """A unicast route of the main table, as far as the way out matters; `mtu` is its own, 0 when it has none."""

    version: int
    devices: tuple[int, ...]
    default: bool
    protocol: int
    mtu: int


class RouteSocket(NetlinkSocket):
    """The rtnetlink calls of a manager: which ways out there are, and a device with host routes for each session."""

    def __init__(self) -> None:
        super().__init__(socket.NETLINK_ROUTE)

    def devices(self) -> list[Device]:
        """Every network device."""
        payload = _IFINFO.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
        return [_device(message.payload) for message in self.dump(_RTM_GETLINK, payload)]

    def main_routes(self) -> list[DeviceRoute]:
        """The unicast routes of the main table, both families, but for IPv6's link-local ones: they lead nowhere."""
        payload = _RTMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0, 0, 0, 0, 0)
        routes = (_route(message.payload) for message in self.dump(_RTM_GETROUTE, payload))
        return [route for route in routes if route is not None]

    def addresses(self) -> list[bytes]:
        """Every address that is known beyond this host and its links, both families."""
        found = (message.payload for message in self.dump(_RTM_GETADDR, _IFADDR.pack(socket.AF_UNSPEC, 0, 0, 0, 0)))
        own = [parse_attributes(payload[_IFADDR.size :]) for payload in found if payload[3] == _RT_SCOPE_UNIVERSE]
        return [attributes.get(_IFA_LOCAL) or attributes[_IFA_ADDRESS] for attributes in own]

    def add_veth(self, name: str, peer: str, address: bytes) -> None:
        """Make a pair of devices; `name` has this link address and no ARP. NetlinkError EEXIST when one is there."""
        other = attribute(_VETH_INFO_PEER | NLA_F_NESTED, bytes(_IFINFO.size) + attribute_text(_IFLA_IFNAME, peer))
        kind = nest(_IFLA_LINKINFO, attribute_text(_IFLA_INFO_KIND, "veth"), nest(_IFLA_INFO_DATA, other))
        header = _IFINFO.pack(socket.AF_UNSPEC, 0, 0, _IFF_NOARP, _IFF_NOARP)
        attributes = attribute_text(_IFLA_IFNAME, name) + attribute(_IFLA_ADDRESS, address) + kind
        self.request(_RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, header + attributes)

    def remove_device(self, index: int) -> None:
        """Remove a device, a veth's other end with it. NetlinkError ENODEV when it is gone."""
        self.request(_RTM_DELLINK, 0, _IFINFO.pack(socket.AF_UNSPEC, 0, index, 0, 0))

    def bring_up(self, index: int, *, mtu: int, queue_length: int, ipv6: bool) -> None:
        """Bring a device up; with `ipv6` it first learns not to give itself a link-local address."""
        if ipv6:
            mode = attribute(_IFLA_INET6_ADDR_GEN_MODE, bytes([_IN6_ADDR_GEN_MODE_NONE]))
            self._set_link(index, 0, nest(_IFLA_AF_SPEC, nest(socket.AF_INET6, mode)))
        sizes = attribute_u32(_IFLA_MTU, mtu) + attribute_u32(_IFLA_TXQLEN, queue_length)
        self._set_link(index, _IFF_UP, sizes)
        self.queue_fairly(index)

    def set_up(self, index: int) -> None:
        """Bring a device up as it is."""
        self._set_link(index, _IFF_UP, b"")

    def queue_fairly(self, index: int, discipline: str = "fq_codel") -> bool:
        """Give the device this queueing discipline (tc-fq_codel(8)) where the kernel has it; whether it has."""
        payload = _TCMSG.pack(socket.AF_UNSPEC, index, 0, _TC_H_ROOT, 0) + attribute_text(_TCA_KIND, discipline)
        try:
            self.request(_RTM_NEWQDISC, NLM_F_CREATE | NLM_F_REPLACE, payload)
        except NetlinkError as error:
            if error.errno in (errno.ENOENT, errno.EOPNOTSUPP):
                return False
            raise
        return True

    def set_forwarding(self, index: int, on: bool) -> None:
        """Switch IPv4 forwarding of what one device receives.

        The same flag as /proc/sys/net/ipv4/conf/DEVICE/forwarding, which a container may not write; here CAP_NET_ADMIN
        suffices (inet_set_link_af in net/ipv4/devinet.c).
        """
        configuration = nest(_IFLA_INET_CONF, attribute_u32(_IPV4_DEVCONF_FORWARDING, on))
        self._set_link(index, 0, nest(_IFLA_AF_SPEC, nest(socket.AF_INET, configuration)))

    def add_host_route(self, address: str, index: int, protocol: int) -> None:
        """Route one address to a device, in the main table. NetlinkError EEXIST when it is routed already."""
        ip = ipaddress.ip_address(address)
        family = socket.AF_INET if ip.version == 4 else socket.AF_INET6
        header = _RTMSG.pack(family, ip.max_prefixlen, 0, 0, _RT_TABLE_MAIN, protocol, _RT_SCOPE_LINK, _RTN_UNICAST, 0)
        attributes = attribute(_RTA_DST, ip.packed) + attribute_u32(_RTA_OIF, index)
        self.request(_RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL, header + attributes)

    def _set_link(self, index: int, flags: int, attributes: bytes) -> None:
        self.request(_RTM_SETLINK, 0, _IFINFO.pack(socket.AF_UNSPEC, 0, index, flags, flags) + attributes)


def _device(payload: bytes) -> Device:
    _family, _kind, index, flags, _change = _IFINFO.unpack_from(payload)
    attributes = parse_attributes(payload[_IFINFO.size :])
    inet = parse_attributes(parse_attributes(attributes.get(_IFLA_AF_SPEC, b"")).get(socket.AF_INET, b""))
    # A dump gives the whole array of values, the first of which is IPV4_DEVCONF 1.
    configuration = inet.get(_IFLA_INET_CONF)
    return Device(
        index=index,
        name=attributes[_IFLA_IFNAME].rstrip(b"\0").decode(),
        up=bool(flags & _IFF_UP),
        loopback=bool(flags & _IFF_LOOPBACK),
        mtu=_u32(attributes[_IFLA_MTU]),
        forwarding=None if configuration is None else bool(_u32(configuration)),
    )


def _route(payload: bytes) -> DeviceRoute | None:
    family, length, _source, _tos, table, protocol, _scope, kind, _flags = _RTMSG.unpack_from(payload)
    if table != _RT_TABLE_MAIN or kind != _RTN_UNICAST or family not in (socket.AF_INET, socket.AF_INET6):
        return None
    attributes = parse_attributes(payload[_RTMSG.size :])
    destination = attributes.get(_RTA_DST, b"")
    if family == socket.AF_INET6 and destination and ipaddress.IPv6Address(destination).is_link_local:
        return None
    devices = [_u32(attributes[_RTA_OIF])] if _RTA_OIF in attributes else []
    nexthops = attributes.get(_RTA_MULTIPATH, b"")
    while len(nexthops) >= 8:  # struct rtnexthop: length u16, flags u8, hops u8, device i32, attributes
        size, device = struct.unpack_from("=HxxI", nexthops)
        devices.append(device)
        nexthops = nexthops[max(size, 8) :]
    mtu = parse_attributes(attributes.get(_RTA_METRICS, b"")).get(_RTAX_MTU)
    version = 4 if family == socket.AF_INET else 6
    return DeviceRoute(version, tuple(devices), length == 0, protocol, 0 if mtu is None else _u32(mtu))


def _u32(value: bytes) -> int:
    return struct.unpack_from("=I", value)[0]
