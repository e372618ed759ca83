"""Netlink's bytes: what is packed is parsed, what is malformed is refused, and iproute2 agrees."""

import contextlib
import errno
import json
import os
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from pod import inside, namespace, run
from tpvpn.netlink import (
    Message,
    NetlinkError,
    RouteSocket,
    attribute,
    attribute_text,
    attribute_u32,
    nest,
    pack_message,
    parse_attributes,
    parse_error,
    parse_messages,
)

KINDS = st.integers(1, 0x3FFF)
U16, U32 = st.integers(0, 0xFFFF), st.integers(0, 0xFFFFFFFF)


@given(st.dictionaries(KINDS, st.binary(max_size=40), max_size=8))
def test_attributes_survive_packing(wanted: dict[int, bytes]) -> None:
    packed = b"".join(attribute(kind, value) for kind, value in wanted.items())
    assert len(packed) % 4 == 0
    assert parse_attributes(packed) == wanted


@given(st.lists(st.builds(Message, U16, U16, st.binary(max_size=40), U32), max_size=5))
def test_messages_survive_packing(wanted: list[Message]) -> None:
    assert list(parse_messages(b"".join(map(pack_message, wanted)))) == wanted


@given(st.binary(max_size=200))
def test_any_bytes_are_parsed_or_refused_with_value_error(data: bytes) -> None:
    for parse in (parse_attributes, lambda data: list(parse_messages(data))):
        try:
            parse(data)
        except ValueError as error:
            assert "netlink" in str(error)


@pytest.mark.parametrize("data", [b"\x03\x00\x01\x00", b"\x00\x00\x01\x00", b"\x09\x00\x01\x00abcd"])
def test_a_length_that_cannot_be_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="netlink attribute"):
        parse_attributes(data)


def test_pyroute2_reads_what_is_packed() -> None:
    header = struct.pack("=BBBBBBBBI", 2, 32, 0, 0, 254, 116, 253, 1, 0)
    metrics = nest(8, attribute_u32(2, 1400))
    payload = header + attribute(1, bytes([246, 0, 0, 1])) + attribute_u32(4, 7) + metrics
    decoded = rtmsg(pack_message(Message(24, 0x605, payload, 3)))
    decoded.decode()
    assert decoded["header"]["type"] == 24
    assert (decoded["dst_len"], decoded["table"], decoded["proto"]) == (32, 254, 116)
    assert decoded.get_attr("RTA_DST") == "246.0.0.1"
    assert decoded.get_attr("RTA_OIF") == 7
    assert decoded.get_attr("RTA_METRICS").get_attr("RTAX_MTU") == 1400


def test_an_acknowledgement_is_no_error() -> None:
    assert parse_error(Message(2, 0x100, struct.pack("=iIHHII", 0, 16, 24, 5, 1, 0))) is None


@pytest.mark.parametrize("capped", [True, False])
def test_the_kernels_own_words_are_in_the_error(capped: bool) -> None:
    request = pack_message(Message(24, 5, b"payload"))
    quoted = request[:16] if capped else request
    flags = 0x200 | (0x100 if capped else 0)
    payload = struct.pack("=i", -errno.EINVAL) + quoted + attribute_text(1, "Nexthop has invalid gateway")
    error = parse_error(Message(2, flags, payload), 3)
    assert isinstance(error, NetlinkError)
    assert (error.errno, error.strerror, error.position) == (errno.EINVAL, "Nexthop has invalid gateway", 3)


def test_an_error_without_words_has_the_systems() -> None:
    error = parse_error(Message(2, 0x100, struct.pack("=iIHHII", -errno.EPERM, 16, 24, 5, 1, 0)))
    assert error is not None
    assert error.strerror == os.strerror(errno.EPERM)


@pytest.fixture
def host() -> Iterator[str]:
    with namespace("host") as name:
        run("ip", "-n", name, "link", "add", "one", "mtu", "1400", "type", "veth", "peer", "name", "two")
        for device, host in (("one", 1), ("two", 2)):
            run("ip", "-n", name, "addr", "add", f"10.0.{host}.1/24", "dev", device)
            run("ip", "-n", name, "link", "set", device, "up")
        yield name


@pytest.fixture
def netlink(host: str) -> Iterator[RouteSocket]:
    with inside(host):
        netlink = RouteSocket()
    with contextlib.closing(netlink):
        yield netlink


def test_the_view_agrees_with_iproute2(host: str, netlink: RouteSocket) -> None:
    run("ip", "-n", host, "route", "add", "default", "via", "10.0.1.9", "mtu", "1350")
    hops = ["nexthop", "via", "10.0.1.9", "nexthop", "via", "10.0.2.9"]
    run("ip", "-n", host, "route", "add", "10.9.0.0/16", *hops)
    run("ip", "-n", host, "route", "add", "blackhole", "10.8.0.0/16")
    run("ip", "-n", host, "-6", "route", "add", "default", "dev", "one", "proto", "ra")
    devices, routes = netlink.devices(), netlink.main_routes()
    listed = json.loads(run("ip", "-n", host, "-j", "link"))
    assert [(one["ifindex"], one["ifname"], one["mtu"], "UP" in one["flags"]) for one in listed] == [
        (one.index, one.name, one.mtu, one.up) for one in devices
    ]
    index = {one.name: one.index for one in devices}
    assert [one.loopback for one in devices] == [one.name == "lo" for one in devices]
    four = [route for route in routes if route.version == 4]
    assert sorted(route.devices for route in four) == sorted(
        [(index["one"],), (index["one"],), (index["two"],), (index["one"], index["two"])]
    )
    assert [(route.mtu, route.devices) for route in four if route.default] == [(1350, (index["one"],))]
    assert [(route.protocol, route.default) for route in routes if route.version == 6] == [(9, True)]


def test_a_device_is_brought_up_and_forwards_without_proc_sys(host: str, netlink: RouteSocket) -> None:
    run("ip", "-n", host, "link", "add", "three", "type", "bridge")
    index = {one.name: one.index for one in netlink.devices()}["three"]
    netlink.bring_up(index, mtu=1300, queue_length=77, ipv6=True)
    netlink.add_host_route("246.0.0.1", index, 116)
    netlink.add_host_route("fd74::1", index, 116)
    netlink.set_forwarding(index, True)
    assert {one.name: one.forwarding for one in netlink.devices()}["three"] is True
    netlink.set_forwarding(index, False)
    assert {one.name: one.forwarding for one in netlink.devices()}["three"] is False
    with pytest.raises(NetlinkError) as caught:
        netlink.add_host_route("246.0.0.1", index, 116)
    assert caught.value.errno == errno.EEXIST
    shown = run("ip", "-n", host, "-d", "link", "show", "three")
    assert "mtu 1300" in shown
    assert "qlen 77" in shown
    assert "addrgenmode none" in shown
    assert "246.0.0.1 dev three proto 116" in run("ip", "-n", host, "route")
    assert "fd74::1 dev three proto 116" in run("ip", "-n", host, "-6", "route")


def test_a_device_queues_fairly_where_the_kernel_can(host: str, netlink: RouteSocket) -> None:
    run("ip", "-n", host, "tuntap", "add", "four", "mode", "tun", "multi_queue")
    index = {one.name: one.index for one in netlink.devices()}["four"]
    assert netlink.queue_fairly(index, "pfifo") is True
    assert "qdisc pfifo " in run("tc", "-n", host, "qdisc", "show", "dev", "four")
    assert netlink.queue_fairly(index, "no-such") is False
    has_it = netlink.queue_fairly(index)
    assert ("qdisc fq_codel " in run("tc", "-n", host, "qdisc", "show", "dev", "four")) is has_it


def test_what_the_kernel_refuses_is_raised_with_its_words(host: str, netlink: RouteSocket) -> None:
    with pytest.raises(NetlinkError) as caught:
        netlink.bring_up(9999, mtu=1500, queue_length=1, ipv6=False)
    assert caught.value.errno == errno.ENODEV
    lo = netlink.devices()[0].index
    run("ip", "-n", host, "link", "set", "lo", "down")
    with pytest.raises(NetlinkError, match="Device for nexthop is not up"):
        netlink.add_host_route("246.0.0.1", lo, 116)
