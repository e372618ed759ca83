"""Filters in tcpdump's words: a table, and random filters of random packets with scapy as the oracle."""

from collections.abc import Callable
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)

from tpvpn.errors import UsageError
from tpvpn.packet_filter import headers, parse

WEB = IP(src="10.0.0.1", dst="10.9.0.2") / TCP(sport=5000, dport=80)
NAME = IPv6(src="fd00::1", dst="fd09::2") / UDP(sport=5000, dport=53)
PING = IP(src="10.0.0.1", dst="10.9.0.2", options=b"\1\1\1\1") / ICMP()
PING6 = IPv6(src="fd00::1", dst="fd09::2") / IPv6ExtHdrHopByHop() / ICMPv6EchoRequest()
LATER = IP(src="10.0.0.1", dst="10.9.0.2", frag=100, proto=17) / (b"\x00\x50\x00\x50" * 3)
LATER6 = IPv6(src="fd00::1", dst="fd09::2") / IPv6ExtHdrFragment(offset=9, nh=6) / (b"\x00\x50\x00\x50" * 3)
ALL = {"web": WEB, "name": NAME, "ping": PING, "ping6": PING6, "later": LATER, "later6": LATER6}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("tcp", "web later6"),
        ("udp", "name later"),
        ("icmp", "ping"),
        ("icmp6", "ping6"),
        ("ip", "web ping later"),
        ("ip6", "name ping6 later6"),
        ("host 10.9.0.2", "web ping later"),
        ("src host 10.9.0.2", ""),
        ("dst host fd09:0::2", "name ping6 later6"),
        ("net 10.9.0.0/16", "web ping later"),
        ("src net fd00::/16 or port 80", "web name ping6 later6"),
        ("port 80", "web"),
        ("src port 80", ""),
        ("dst port 53", "name"),
        ("not port 80", "name ping ping6 later later6"),
        ("not tcp and not udp", "ping ping6"),
        ("not (tcp or udp)", "ping ping6"),
        ("tcp or udp and port 53", "name"),  # from left to right, as in pcap-filter(7)
        ("tcp or (udp and port 53)", "web name later6"),
        ("((icmp6))", "ping6"),
        ("not not icmp", "ping"),
    ],
)
def test_what_a_filter_wants(text: str, names: str) -> None:
    wanted = parse(text)
    assert [name for name, packet in ALL.items() if wanted(memoryview(bytes(packet)))] == names.split()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "cannot have 'its end' there"),
        ("htt", "cannot have 'htt' there; its words are: host A"),
        ("tcp udp", "has 'udp' where `and` or `or` should be"),
        ("tcp and", "cannot have 'its end' there"),
        ("(tcp", "a parenthesis of the filter is not closed"),
        ("tcp)", "has ')' where"),
        ("port http", "`port` of a filter wants a number up to 65535, not 'http'"),
        ("port 65536", "wants a number"),
        ("src", "cannot have 'its end' there"),
        ("src tcp", "cannot have 'tcp' there"),
        ("host db.example", "`host` of a filter wants an address, not 'db.example'"),
        ("host 10.0.0.0/8", "`host` of a filter wants an address, not '10.0.0.0/8': that is a network"),
        ("net 10.0.0.1/8", "`net` of a filter wants a network such as 10.0.0.0/8, not '10.0.0.1/8'"),
        ("host", "wants an address, not ''"),
    ],
)
def test_what_is_no_filter_is_refused_in_a_sentence(text: str, said: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse(text)
    assert said in str(refused.value)


HOSTS = {4: ["10.0.0.1", "10.0.0.2", "10.1.0.1"], 6: ["fd00::1", "fd00::2", "fd01::1"]}
PORTS = st.sampled_from([53, 80, 443])
Predicate = Callable[[Any], bool]


@st.composite
def packets(draw: st.DrawFn) -> Any:
    version = draw(st.sampled_from([4, 6]))
    source, destination = draw(st.sampled_from(HOSTS[version])), draw(st.sampled_from(HOSTS[version]))
    inner = draw(st.sampled_from(["tcp", "udp", "ping"]))
    ping = ICMP() if version == 4 else ICMPv6EchoRequest()
    payload = ping if inner == "ping" else {"tcp": TCP, "udp": UDP}[inner](sport=draw(PORTS), dport=draw(PORTS))
    if version == 4:
        return IP(src=source, dst=destination, options=draw(st.sampled_from([[], b"\1\1\1\1"]))) / payload
    packet = IPv6(src=source, dst=destination)
    kinds = [IPv6ExtHdrHopByHop, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment, IPv6ExtHdrRouting]
    for extension in draw(st.lists(st.sampled_from(kinds), max_size=2, unique=True)):
        packet /= extension()
    return packet / payload


def _layer(packet: Any) -> Any:
    return packet[IP] if IP in packet else packet[IPv6]


def _primitive(draw: st.DrawFn) -> tuple[str, Predicate]:
    word = draw(st.sampled_from(["tcp", "udp", "icmp", "icmp6", "ip", "ip6", "host", "net", "port"]))
    layers = {"tcp": TCP, "udp": UDP, "icmp": ICMP, "icmp6": ICMPv6EchoRequest, "ip": IP, "ip6": IPv6}
    if word in layers:
        return word, lambda packet: layers[word] in packet
    end = draw(st.sampled_from(["", "src ", "dst "]))
    ends = {"": ("src", "dst"), "src ": ("src",), "dst ": ("dst",)}[end]
    if word == "port":
        port = draw(PORTS)
        fields = ["sport" if one == "src" else "dport" for one in ends]
        return f"{end}port {port}", lambda packet: any(
            kind in packet and getattr(packet[kind], field) == port for kind in (TCP, UDP) for field in fields
        )
    host = draw(st.sampled_from(HOSTS[4] + HOSTS[6]))
    network = ip_network(host) if word == "host" else ip_network((host, draw(st.integers(0, 32))), strict=False)
    shown = host if word == "host" else str(network)
    return f"{end}{word} {shown}", lambda packet: any(
        ip_address(getattr(_layer(packet), one)) in network for one in ends
    )


@st.composite
def filters(draw: st.DrawFn, depth: int = 3) -> tuple[str, Predicate]:
    kind = draw(st.sampled_from(["one", "not", "and", "or"])) if depth else "one"
    if kind == "one":
        return _primitive(draw)
    text, test = draw(filters(depth=depth - 1))
    if kind == "not":
        return f"not ({text})", lambda packet: not test(packet)
    other_text, other = draw(filters(depth=depth - 1))
    join = all if kind == "and" else any
    return f"({text}) {kind} ({other_text})", lambda packet: join([test(packet), other(packet)])


@given(filters(), st.lists(packets(), min_size=1, max_size=4))
def test_filters_want_what_scapy_sees(one: tuple[str, Predicate], some: list[Any]) -> None:
    text, test = one
    wanted = parse(text)
    for packet in some:
        assert wanted(memoryview(bytes(packet))) == test(packet), text


@given(st.binary(max_size=60) | packets().flatmap(lambda one: st.integers(0, 80).map(lambda n: bytes(one)[:n])))
def test_bytes_that_are_no_packet_are_not_wanted_and_no_error(data: bytes) -> None:
    wanted = parse("port 80 or not port 80")
    assert wanted(memoryview(data)) is (headers(memoryview(data)) is not None)
