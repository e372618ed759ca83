"""Which packets are wanted, in tcpdump's words (pcap-filter(7)): a text to a predicate of IP packets.

Pure. `[src|dst] host A`, `[src|dst] net P`, `[src|dst] port N`, `ip`, `ip6`, `tcp`, `udp`, `icmp`, `icmp6`, joined by
`and`, `or`, `not` and parentheses. As there, `not` binds first, `and` and `or` bind alike, from left to right, and a
packet too short to be told is not wanted. The protocol of IPv6 is the one behind its extension headers.
"""

import re
import struct
from collections.abc import Callable
from functools import partial
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import NamedTuple, TypeAlias

from tpvpn.errors import UsageError
from tpvpn.wire import ip

_ADDRESSES4, _ADDRESSES6, _PORTS = struct.Struct(">II"), struct.Struct(">16s16s"), struct.Struct(">HH")
_EXTENSIONS = (ip.HOP_BY_HOP, ip.ROUTING, ip.DESTINATION_OPTIONS)
_PROTOCOLS = {"tcp": (4, 6, ip.TCP), "udp": (4, 6, ip.UDP), "icmp": (4, ip.ICMP4), "icmp6": (6, ip.ICMP6)}
_ENDS = {"src": (0,), "dst": (1,)}
_GRAMMAR = "host A, net P, port N (each behind src or dst), ip, ip6, tcp, udp, icmp, icmp6, and, or, not, ( )"


class Headers(NamedTuple):
    """What a filter knows of a packet; ends are source and destination."""

    version: int
    protocol: int
    addresses: tuple[int, int]
    ports: tuple[int, ...]
    """None of a protocol without, or of a fragment that is not the first."""


Test: TypeAlias = Callable[[Headers], bool]
Filter: TypeAlias = Callable[[memoryview], bool]


def parse(text: str) -> Filter:
    """The predicate that the text means; UsageError with what is wrong."""
    words = re.findall(r"[()]|[^\s()]+", text)
    test = _expression(words)
    if words:
        raise UsageError(f"the filter {text!r} has {words[0]!r} where `and` or `or` should be")

    def wanted(packet: memoryview) -> bool:
        found = headers(packet)
        return found is not None and test(found)

    return wanted


def _expression(words: list[str]) -> Test:
    """Consume terms that `and` and `or` join."""
    test = _term(words)
    while words and words[0] in ("and", "or"):
        both = words.pop(0) == "and"
        test = partial(_both if both else _either, test, _term(words))
    return test


def _term(words: list[str]) -> Test:
    word = words.pop(0) if words else "its end"
    if word == "not":
        return partial(_negated, _term(words))
    if word == "(":
        test = _expression(words)
        if not words or words.pop(0) != ")":
            raise UsageError("a parenthesis of the filter is not closed")
        return test
    if word in _PROTOCOLS:
        *versions, protocol = _PROTOCOLS[word]
        return lambda packet: packet.protocol == protocol and packet.version in versions
    if word in ("ip", "ip6"):
        version = 4 if word == "ip" else 6
        return lambda packet: packet.version == version
    ends = _ENDS.get(word, (0, 1))
    kind = (words.pop(0) if words else "its end") if word in _ENDS else word
    if kind not in ("host", "net", "port"):
        raise UsageError(f"a filter cannot have {kind!r} there; its words are: {_GRAMMAR}")
    value = words.pop(0) if words else ""
    return _port(ends, value) if kind == "port" else _address(ends, kind, value)


def _port(ends: tuple[int, ...], value: str) -> Test:
    if not re.fullmatch("[0-9]{1,5}", value) or int(value) > 0xFFFF:
        raise UsageError(f"`port` of a filter wants a number up to 65535, not {value!r}")
    port = int(value)
    return lambda packet: bool(packet.ports) and any(packet.ports[end] == port for end in ends)


def _address(ends: tuple[int, ...], kind: str, value: str) -> Test:
    try:
        if kind == "host" and "/" in value:
            raise ValueError("that is a network")
        network: IPv4Network | IPv6Network = ip_network(value)
    except ValueError as error:
        wanted = "an address" if kind == "host" else "a network such as 10.0.0.0/8"
        raise UsageError(f"`{kind}` of a filter wants {wanted}, not {value!r}: {error}") from error
    version, first, mask = network.version, int(network.network_address), int(network.netmask)
    return lambda packet: packet.version == version and any(packet.addresses[end] & mask == first for end in ends)


def _both(one: Test, other: Test, packet: Headers) -> bool:
    return one(packet) and other(packet)


def _either(one: Test, other: Test, packet: Headers) -> bool:
    return one(packet) or other(packet)


def _negated(test: Test, packet: Headers) -> bool:
    return not test(packet)


def headers(packet: memoryview) -> Headers | None:
    """What can be told of an IP packet; None when it is cut short or none."""
    version = packet[0] >> 4 if packet else 0
    try:
        if version == 4:
            protocol, at = packet[9], (packet[0] & 15) * 4
            source, destination = _ADDRESSES4.unpack_from(packet, 12)
            is_first = not (packet[6] & 0x1F or packet[7])  # RFC 791 section 3.1: the fragment's offset
        elif version == 6:
            source, destination = map(int.from_bytes, _ADDRESSES6.unpack_from(packet, 8))
            protocol, at, is_first = _behind_extensions(packet)
        else:
            return None
        has_ports = is_first and protocol in (ip.TCP, ip.UDP)
        ports = _PORTS.unpack_from(packet, at) if has_ports else ()
    except (IndexError, struct.error):
        return None
    return Headers(version, protocol, (source, destination), ports)


def _behind_extensions(packet: memoryview) -> tuple[int, int, bool]:
    """What IPv6 carries, where that begins, and whether it does so here (RFC 8200 section 4)."""
    protocol, at, is_first = packet[6], ip.HEADER_LENGTH6, True
    while protocol in _EXTENSIONS or protocol == ip.FRAGMENT:
        if protocol == ip.FRAGMENT:
            is_first = not (packet[at + 2] or packet[at + 3] & 0xF8)
            protocol, at = packet[at], at + 8
            if not is_first:
                break
        else:
            protocol, at = packet[at], at + 8 * (packet[at + 1] + 1)
    return protocol, at, is_first
