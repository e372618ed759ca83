"""The kernel exit in a real pod: packets are written into sessions' TUNs, a cluster answers."""

import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from exits import ask, exit_in, place, receive, send, silent
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6EchoReply, ICMPv6EchoRequest, ICMPv6TimeExceeded, IPv6
from scapy.packet import Raw

from pod import CLUSTER4, CLUSTER6, POD4, POD6, SERVICE4, inside, readable, run, sysctl, udp_server
from tpvpn.errors import UsageError
from tpvpn.manager.kernel_exit import KernelExit

__all__ = ["place"]


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
        assert way_out.counters()["dropped_between_sessions"] == 2


def test_sessions_do_not_reach_the_manager_itself(place) -> None:
    pod, _ = place
    with udp_server(pod, POD4, 5300) as server, exit_in(pod, (None, None)) as (way_out, [session]):
        send(session, IP(src=session.ipv4, dst=POD4) / UDP(sport=1, dport=5300))
        assert silent(session, IP(src=session.ipv4, dst=POD4) / ICMP())
        assert silent(session, IPv6(src=session.ipv6, dst=POD6) / ICMPv6EchoRequest())
        assert readable([server.fileno()], 0) == []
        assert way_out.counters()["dropped_manager"] == 3


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
        assert way_out.counters()["dropped_inbound"] == 1


def test_without_destinations_what_no_session_may_reach_is_dropped(place) -> None:
    pod, cluster = place
    run("ip", "-n", cluster, "addr", "add", "169.254.169.254/32", "dev", "lo")
    with exit_in(pod, (None, None)) as (way_out, [session]):
        assert silent(session, IP(src=session.ipv4, dst="169.254.169.254") / ICMP())
        assert silent(session, IP(src=session.ipv4, dst="246.15.0.1") / ICMP())
        assert silent(session, IPv6(src=session.ipv6, dst="fd00:ec2::254") / ICMPv6EchoRequest())
        assert way_out.counters()["dropped_destination"] == 3
        assert ask(session, IP(src=session.ipv4, dst=CLUSTER4) / ICMP())[ICMP].type == 0


def test_with_destinations_only_these_are_reached(place) -> None:
    pod, _ = place
    options = {"destinations": ["10.130.0.0/16", "fd00:130::/64"]}
    with exit_in(pod, (None, None), **options) as (way_out, [session]):
        assert ask(session, IP(src=session.ipv4, dst=SERVICE4) / ICMP())[ICMP].type == 0
        # Identifiers of their own: a flow that is open already stays open.
        assert silent(session, IP(src=session.ipv4, dst=CLUSTER4) / ICMP(id=77))
        assert silent(session, IPv6(src=session.ipv6, dst=CLUSTER6) / ICMPv6EchoRequest(id=77))
        assert way_out.counters()["dropped_destination"] == 2


def test_what_connection_tracking_cannot_place_does_not_leak_the_sessions_address(place) -> None:
    pod, _ = place
    with exit_in(pod, (None, None)) as (way_out, [session]):
        assert silent(session, IP(src=session.ipv4, dst=CLUSTER4) / TCP(sport=1, dport=2, flags="SFR"))
        assert way_out.counters()["dropped_invalid"] == 1


def test_forwarding_is_switched_on_for_sessions_alone_and_put_back(place) -> None:
    pod, cluster = place
    keys = ["ipv4/ip_forward", "ipv4/conf/eth0/forwarding", "ipv6/conf/all/forwarding", "ipv6/conf/eth0/forwarding"]
    assert [sysctl(pod, key) for key in keys] == ["0"] * 4
    with exit_in(pod) as (way_out, _):
        assert [sysctl(pod, key) for key in keys] == ["0", "1", "1", "1"]
        # The pod does not become a router for its neighbours.
        run("ip", "-n", cluster, "route", "add", "10.140.0.1", "via", POD4)
        run("ip", "-n", cluster, "-6", "route", "add", "fd00:140::1", "via", POD6)
        with udp_server(cluster, CLUSTER4, 5300) as four, udp_server(cluster, CLUSTER6, 5300) as six:
            four.sendto(b"x", ("10.140.0.1", 7))
            six.sendto(b"x", ("fd00:140::1", 7))
            wait_for(lambda: way_out.counters()["dropped_transit"] == 2)
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


# What follows needs a process of its own: other rights, other mounts, or an end by SIGKILL.

SCRIPT = textwrap.dedent("""
    import ipaddress, sys
    from tpvpn.errors import TpvpnError
    from tpvpn.manager.kernel_exit import KernelExit
    way_out = KernelExit()
    try:
        way_out.open()
        session = way_out.add_session(None, None, offload=True)
        session.set_virtual([tuple(map(ipaddress.ip_network, ("246.130.0.0/16", "10.130.0.0/16")))])
    except TpvpnError as error:
        print(type(error).__name__, error.exit_code, error)
        sys.exit()
    print(way_out.families, way_out.reasons, flush=True)
    sys.stdin.read()
    session.close()
    way_out.close()
""")


def python_in(pod: str, shell: str) -> list[str]:
    """A command line that runs SCRIPT in the pod, after the shell's lines in a mount namespace of its own."""
    return ["unshare", "-m", "nsenter", f"--net=/run/netns/{pod}", "sh", "-ec", shell, sys.executable, SCRIPT]


def said(pod: str, shell: str) -> str:
    return subprocess.run(
        python_in(pod, shell), input="", capture_output=True, text=True, timeout=30, check=True
    ).stdout


def test_a_read_only_proc_sys_leaves_ipv4_and_says_why_ipv6_is_not_carried(place) -> None:
    pod, _ = place
    shell = 'mount --bind /proc/sys /proc/sys; mount -o remount,ro,bind /proc/sys; exec "$0" -c "$1"'
    words = said(pod, shell)
    assert words.startswith("{4: True, 6: False}")
    assert "set net.ipv6.conf.all.forwarding=1" in words


def test_a_missing_device_node_is_made(place) -> None:
    pod, _ = place
    words = said(pod, 'mount -t tmpfs tmpfs /dev/net; test ! -e /dev/net/tun; exec "$0" -c "$1"')
    assert words.startswith("{4: True, 6: True}")


def test_a_device_node_that_cannot_be_had_is_named(place) -> None:
    pod, _ = place
    shell = 'mount -t tmpfs tmpfs /dev/net; mount -o remount,ro /dev/net; exec "$0" -c "$1"'
    words = said(pod, shell)
    assert words.startswith("PrivilegeError 5")
    assert "/dev/net/tun is missing" in words
    assert "securityContext.capabilities.add: [NET_ADMIN]" in words


def test_without_the_capability_it_is_named_with_how_to_give_it(place) -> None:
    pod, _ = place
    words = said(pod, 'exec setpriv --bounding-set -net_admin --inh-caps -net_admin "$0" -c "$1"')
    assert words.startswith("PrivilegeError 5")
    assert "CAP_NET_ADMIN" in words
    assert "--cap-add NET_ADMIN" in words


def test_nothing_is_left_after_sigkill(place) -> None:
    pod, _ = place
    with subprocess.Popen(
        python_in(pod, 'exec "$0" -c "$1"'), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline().startswith("{4: True")
        tables = run("ip", "netns", "exec", pod, "nft", "list", "tables")
        assert tables == "table inet tpvpn\ntable inet tpvpn-s1\n"
        process.send_signal(signal.SIGKILL)
        process.wait(5)
    wait_for(lambda: run("ip", "netns", "exec", pod, "nft", "list", "tables") == "", 1)
    assert "tpvpn-s" not in run("ip", "-n", pod, "link") + run("ip", "-n", pod, "route", "show", "table", "all")
    # The flags of forwarding are the one thing that a killed manager leaves.
    with inside(pod):
        for path in ("ipv4/conf/eth0", "ipv6/conf/all"):
            (Path("/proc/sys/net") / path / "forwarding").write_text("0")


def wait_for(condition, seconds: float = 2) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)
