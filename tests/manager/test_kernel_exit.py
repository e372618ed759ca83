"""The kernel exit in a real pod: packets are written into sessions' devices, TUNs or veth pairs; a cluster answers."""

import socket
import time
from collections.abc import Iterator

import pytest
from exits import ask, exit_in, place, receive, send, silent
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6EchoReply, ICMPv6EchoRequest, ICMPv6TimeExceeded, IPv6
from scapy.packet import Raw

from pod import CLUSTER4, CLUSTER6, POD4, POD6, SERVICE4, inside, readable, run, sysctl, udp_server, without_tun
from tpvpn.errors import UsageError
from tpvpn.manager.kernel_exit import KernelExit

__all__ = ["place"]


@pytest.fixture(params=["tun", "veth"], autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """What sessions have."""
    if request.param == "tun":
        yield "tun"
    else:
        with without_tun():
            yield "veth"


def test_a_session_has_addresses_of_ours_and_a_device_with_routes(place) -> None:
    pod, _ = place
    with exit_in(pod, ("246.1.2.3", "fd74:7076:706e:1::3"), queue_length=77) as (way_out, [session]):
        assert way_out.families == {4: True, 6: True}
        assert way_out.mtu == 1500
        assert (session.ipv4, session.ipv6) == ("246.1.2.3", "fd74:7076:706e:1::3")
        device = run("ip", "-n", pod, "link", "show", session.tun.name)
        assert ",UP," in device
        assert "mtu 1500" in device
        assert "qlen 77" in device
        assert f"dev {session.tun.name} proto 116" in run("ip", "-n", pod, "route", "show", "246.1.2.3")
        assert session.tun.name in run("ip", "-n", pod, "-6", "route", "show", "fd74:7076:706e:1::3")


@pytest.mark.parametrize("address", [CLUSTER4, SERVICE4])
def test_udp_is_masqueraded_and_answered(place, address: str) -> None:
    pod, cluster = place
    with exit_in(pod, (None, None)) as (_, [session]), udp_server(cluster, address, 5300) as server:
        send(session, IP(src=session.ipv4, dst=address) / UDP(sport=4000, dport=5300) / Raw(b"ping"))
        asked, sender = server.recvfrom(100)
        assert (asked, sender) == (b"ping", (POD4, 4000))
        server.sendto(b"pong", sender)
        answer = receive(session)
        assert answer is not None
        assert (answer.src, answer.dst) == (address, session.ipv4)
        assert (answer[UDP].sport, answer[UDP].dport, bytes(answer[UDP].payload)) == (5300, 4000, b"pong")


def test_udp_over_ipv6_is_masqueraded_and_answered(place) -> None:
    pod, cluster = place
    with exit_in(pod, (None, None)) as (_, [session]), udp_server(cluster, CLUSTER6, 5300) as server:
        send(session, IPv6(src=session.ipv6, dst=CLUSTER6) / UDP(sport=4000, dport=5300) / Raw(b"ping"))
        asked, sender = server.recvfrom(100)
        assert (asked, sender[:2]) == (b"ping", (POD6, 4000))
        server.sendto(b"pong", sender)
        answer = receive(session)
        assert answer is not None
        assert (answer.src, answer[UDP].dport, bytes(answer[UDP].payload)) == (CLUSTER6, 4000, b"pong")


@pytest.mark.parametrize("version", [4, 6])
def test_tcp_connects_and_is_refused_truthfully(place, version: int) -> None:
    pod, cluster = place
    family, address = (socket.AF_INET, CLUSTER4) if version == 4 else (socket.AF_INET6, CLUSTER6)
    with inside(cluster):
        server = socket.create_server((address, 8080), family=family)
    with server, exit_in(pod, (None, None)) as (_, [session]):
        ip = IP(src=session.ipv4, dst=address) if version == 4 else IPv6(src=session.ipv6, dst=address)
        assert ask(session, ip / TCP(sport=4001, dport=8080, flags="S"))[TCP].flags == "SA"
        assert ask(session, ip / TCP(sport=4002, dport=8081, flags="S"))[TCP].flags == "RA"


def test_icmp_is_answered_and_its_errors_come_back(place) -> None:
    pod, _ = place
    with exit_in(pod, (None, None)) as (_, [session]):
        four, six = IP(src=session.ipv4, dst=CLUSTER4), IPv6(src=session.ipv6, dst=CLUSTER6)
        reply = ask(session, four / ICMP(id=9, seq=1) / Raw(b"hello"))
        assert (reply.src, reply[ICMP].type, reply[ICMP].id, bytes(reply[ICMP].payload)) == (CLUSTER4, 0, 9, b"hello")
        assert ask(session, six / ICMPv6EchoRequest(id=9, data=b"hello"))[ICMPv6EchoReply].data == b"hello"
        unreachable = ask(session, four / UDP(sport=4003, dport=9) / Raw(b"x"))
        assert (unreachable.src, unreachable[ICMP].type, unreachable[ICMP].code) == (CLUSTER4, 3, 3)
        # Its quotation is translated back too, else no socket would believe it.
        assert unreachable[ICMP].payload.src == session.ipv4
        assert ask(session, six / UDP(sport=4003, dport=9))[ICMPv6DestUnreach].code == 4


def test_traceroute_shows_the_manager_as_a_hop(place) -> None:
    pod, _ = place
    with exit_in(pod, (None, None)) as (_, [session]):
        expired = ask(session, IP(src=session.ipv4, dst=CLUSTER4, ttl=1) / UDP(sport=4004, dport=33434))
        assert (expired.src, expired[ICMP].type) == (POD4, 11)
        expired = ask(session, IPv6(src=session.ipv6, dst=CLUSTER6, hlim=1) / UDP(sport=4004, dport=33434))
        assert (expired.src, ICMPv6TimeExceeded in expired) == (POD6, True)


def test_sessions_do_not_reach_each_other(place) -> None:
    pod, _ = place
    with exit_in(pod, (None, None), (None, None)) as (way_out, [one, other]):
        assert one.ipv4 != other.ipv4
        send(one, IP(src=one.ipv4, dst=other.ipv4) / UDP(sport=1, dport=2))
        send(one, IPv6(src=one.ipv6, dst=other.ipv6) / UDP(sport=1, dport=2))
        assert receive(other, 0.2) is None
        assert way_out.dropped()["between_sessions"] == 2


def test_sessions_do_not_reach_the_manager_itself(place) -> None:
    pod, _ = place
    with udp_server(pod, POD4, 5300) as server, exit_in(pod, (None, None)) as (way_out, [session]):
        send(session, IP(src=session.ipv4, dst=POD4) / UDP(sport=1, dport=5300))
        assert silent(session, IP(src=session.ipv4, dst=POD4) / ICMP())
        assert silent(session, IPv6(src=session.ipv6, dst=POD6) / ICMPv6EchoRequest())
        assert readable([server.fileno()], 0) == []
        assert way_out.dropped()["manager"] == 3


def test_nobody_in_the_cluster_opens_a_flow_to_a_session(place) -> None:
    pod, cluster = place
    with exit_in(pod, ("246.1.2.3", None)) as (way_out, [session]):
        run("ip", "-n", cluster, "route", "add", "246.0.0.0/12", "via", POD4)
        try:
            with udp_server(cluster, CLUSTER4, 5300) as server:
                server.sendto(b"new", ("246.1.2.3", 7))
                assert receive(session, 0.2) is None
        finally:
            run("ip", "-n", cluster, "route", "del", "246.0.0.0/12")
        assert way_out.dropped()["inbound"] == 1


def test_without_destinations_what_no_session_may_reach_is_dropped(place) -> None:
    pod, cluster = place
    run("ip", "-n", cluster, "addr", "replace", "169.254.169.254/32", "dev", "lo")
    with exit_in(pod, (None, None)) as (way_out, [session]):
        assert silent(session, IP(src=session.ipv4, dst="169.254.169.254") / ICMP())
        assert silent(session, IP(src=session.ipv4, dst="246.15.0.1") / ICMP())
        assert silent(session, IPv6(src=session.ipv6, dst="fd00:ec2::254") / ICMPv6EchoRequest())
        assert way_out.dropped()["destination"] == 3
        assert ask(session, IP(src=session.ipv4, dst=CLUSTER4) / ICMP())[ICMP].type == 0


def test_with_destinations_only_these_are_reached(place) -> None:
    pod, _ = place
    options = {"destinations": ["10.130.0.0/16", "fd00:130::/64"]}
    with exit_in(pod, (None, None), **options) as (way_out, [session]):
        assert ask(session, IP(src=session.ipv4, dst=SERVICE4) / ICMP())[ICMP].type == 0
        # Identifiers of their own: a flow that is open already stays open.
        assert silent(session, IP(src=session.ipv4, dst=CLUSTER4) / ICMP(id=77))
        assert silent(session, IPv6(src=session.ipv6, dst=CLUSTER6) / ICMPv6EchoRequest(id=77))
        assert way_out.dropped()["destination"] == 2


def test_what_connection_tracking_cannot_place_does_not_leak_the_sessions_address(place) -> None:
    pod, _ = place
    with exit_in(pod, (None, None)) as (way_out, [session]):
        assert silent(session, IP(src=session.ipv4, dst=CLUSTER4) / TCP(sport=1, dport=2, flags="SFR"))
        assert way_out.dropped()["invalid"] == 1


def test_forwarding_is_switched_on_for_sessions_alone_and_put_back(place) -> None:
    pod, cluster = place
    keys = ["ipv4/ip_forward", "ipv4/conf/eth0/forwarding", "ipv6/conf/all/forwarding", "ipv6/conf/eth0/forwarding"]
    assert [sysctl(pod, key) for key in keys] == ["0"] * 4
    with exit_in(pod) as (way_out, _):
        assert [sysctl(pod, key) for key in keys] == ["0", "1", "1", "1"]
        # The pod does not become a router for its neighbours.
        run("ip", "-n", cluster, "route", "replace", "10.140.0.1", "via", POD4)
        run("ip", "-n", cluster, "-6", "route", "replace", "fd00:140::1", "via", POD6)
        with udp_server(cluster, CLUSTER4, 5300) as four, udp_server(cluster, CLUSTER6, 5300) as six:
            four.sendto(b"x", ("10.140.0.1", 7))
            six.sendto(b"x", ("fd00:140::1", 7))
            wait_for(lambda: way_out.dropped()["transit"] == 2)
    assert [sysctl(pod, key) for key in keys] == ["0"] * 4


def test_forwarding_that_was_on_stays_on(place) -> None:
    pod, _ = place
    keys = ["ipv4/ip_forward", "ipv6/conf/all/forwarding"]
    try:
        for key in keys:
            sysctl(pod, key, "1")
        with exit_in(pod, (None, None)) as (_, [session]):
            assert ask(session, IP(src=session.ipv4, dst=CLUSTER4) / ICMP())[ICMP].type == 0
        assert [sysctl(pod, key) for key in keys] == ["1", "1"]
    finally:
        for key in keys:
            sysctl(pod, key, "0")


def test_strict_reverse_path_filtering_is_no_obstacle(place) -> None:
    pod, _ = place
    sysctl(pod, "ipv4/conf/all/rp_filter", "1")
    try:
        with exit_in(pod, (None, None)) as (_, [session]):
            assert ask(session, IP(src=session.ipv4, dst=CLUSTER4) / ICMP())[ICMP].type == 0
    finally:
        sysctl(pod, "ipv4/conf/all/rp_filter", "0")


def test_a_way_out_with_a_smaller_mtu_decides(place) -> None:
    pod, _ = place
    run("ip", "-n", pod, "route", "change", "default", "via", CLUSTER4, "mtu", "1400")
    try:
        with exit_in(pod, (None, None)) as (way_out, [session]):
            assert way_out.mtu == 1400
            assert "mtu 1400" in run("ip", "-n", pod, "link", "show", session.tun.name)
    finally:
        run("ip", "-n", pod, "route", "change", "default", "via", CLUSTER4)


def test_a_closed_session_leaves_no_device_and_frees_its_addresses(place) -> None:
    pod, _ = place
    before = run("ip", "-n", pod, "route", "show", "table", "all"), run("ip", "-n", pod, "link")
    with exit_in(pod) as (way_out, _):
        with inside(pod):
            first = way_out.add_session(None, None, offload=False)
        first.close()
        with inside(pod):
            second = way_out.add_session(first.ipv4, first.ipv6, offload=True)
        assert (second.ipv4, second.ipv6) == (first.ipv4, first.ipv6)
        second.close()
    assert (run("ip", "-n", pod, "route", "show", "table", "all"), run("ip", "-n", pod, "link")) == before
    assert run("ip", "netns", "exec", pod, "nft", "list", "ruleset") == ""


def test_a_second_manager_in_the_same_namespace_is_told_so(place) -> None:
    pod, _ = place
    with exit_in(pod), inside(pod), pytest.raises(UsageError, match="table tpvpn belongs to a running program"):
        KernelExit().open()


def test_a_malformed_destination_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"10\.130\.0\.1/16.*host bits"):
        KernelExit(destinations=["10.130.0.1/16"])


def wait_for(condition, seconds: float = 2) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)
