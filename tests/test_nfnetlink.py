"""Tables made by hand, as nft(8) reads them; and the laptop's guard against what a hostile manager would send."""

import contextlib
import ipaddress
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6
from scapy.packet import Packet, Raw

from pod import inside, namespace, readable, run, sysctl, udp_server
from tpvpn import nfnetlink as nft
from tpvpn.errors import PrivilegeError, UsageError
from tpvpn.tun import Tun, open_tun

OWN4, OWN6 = "246.0.1.2", "fd74:7076:706e::2"
LAN4, CONTAINER4 = "192.168.7.1", "172.17.0.2"
SERVICE4, SERVICE6 = "10.130.0.1", "fd00:130::1"


def ruleset(name: str) -> str:
    """What nft(8) lists, without the comment that names the owner."""
    return re.sub(r" # progname .*", "", run("ip", "netns", "exec", name, "nft", "list", "ruleset"))


GUARD = """\
table inet tpvpn-tun7 {
	flags owner

	counter foreign_address {
		packets 0 bytes 0
	}

	counter new_flow {
		packets 0 bytes 0
	}

	chain prerouting {
		type filter hook prerouting priority raw; policy accept;
		iifname "tun7" ip daddr != 246.0.1.2 counter name "foreign_address" drop
		iifname "tun7" {ipv6} counter name "foreign_address" drop
	}

	chain input {
		type filter hook input priority filter; policy accept;
		iifname "tun7" ct state established,related accept
		iifname "tun7" counter name "new_flow" drop
	}

	chain forward {
		type filter hook forward priority filter; policy accept;
		iifname "tun7" ct state established,related accept
		iifname "tun7" counter name "new_flow" drop
	}

	chain postrouting {
		type nat hook postrouting priority srcnat; policy accept;
		oifname "tun7" ip saddr != 246.0.1.2 masquerade
{masquerade6}	}
}
"""


@pytest.mark.parametrize(
    ("ipv6", "match", "masquerade6"),
    [
        (OWN6, f"ip6 daddr != {OWN6}", f'\t\toifname "tun7" ip6 saddr != {OWN6} masquerade\n'),
        (None, "meta nfproto ipv6", ""),
    ],
    ids=["both", "ipv4"],
)
def test_nft_reads_the_guard(ipv6: str | None, match: str, masquerade6: str) -> None:
    expected = GUARD.replace("{ipv6}", match).replace("{masquerade6}", masquerade6)
    with namespace("nft") as name:
        with inside(name):
            guard = nft.install_laptop_guard("tun7", OWN4, ipv6)
        assert ruleset(name) == expected
        guard.close()
        assert ruleset(name) == ""


def test_nft_reads_every_expression() -> None:
    network = ipaddress.ip_network
    rules = {
        'iifname "a*" oifname "b" accept': (nft.iifname("a*"), nft.oifname("b"), nft.ACCEPT),
        'iifname != "a" oifname != "b*" drop': (
            *(nft.iifname("a", unequal=True), nft.oifname("b*", unequal=True)),
            nft.DROP,
        ),
        "ip saddr 246.0.0.0/12 accept": (nft.saddr(network("246.0.0.0/12")), nft.ACCEPT),
        "ip daddr != 10.0.0.1 drop": (nft.daddr(network("10.0.0.1"), unequal=True), nft.DROP),
        "ip6 saddr fd00:1::/33 drop": (nft.saddr(network("fd00:1::/33")), nft.DROP),
        "ip6 daddr != fd00::/8 accept": (nft.daddr(network("fd00::/8"), unequal=True), nft.ACCEPT),
        "meta nfproto ipv4 accept": (nft.family(4), nft.ACCEPT),
        "ct state invalid,new drop": (nft.ct_state("invalid", "new"), nft.DROP),
        'counter name "seen"': (nft.counter("seen"),),
    }
    with namespace("nft") as name:
        with inside(name):
            table = nft.Table("all", (nft.Chain("output", tuple(rules.values())),), ("seen",))
        listed = [line.strip() for line in ruleset(name).splitlines()]
        begin = listed.index("chain output {") + 2
        assert listed[begin : begin + len(rules)] == list(rules)
        assert table.counters() == {"seen": 0}
        table.close()


MAPPING = """\
table inet tpvpn-s1 {
	flags owner

	chain prerouting {
		type nat hook prerouting priority dstnat; policy accept;
{rules}	}
}
"""


def mapping(*pairs: tuple[str, str]) -> tuple[nft.Chain, ...]:
    networks = [(ipaddress.ip_network(virtual), ipaddress.ip_network(real)) for virtual, real in pairs]
    rules = tuple((nft.iifname("tpvpn-s1"), nft.daddr(virtual), nft.netmap(real)) for virtual, real in networks)
    return (nft.Chain("prerouting", rules, kind="nat", priority=nft.DSTNAT),)


def listed(*rules: str) -> str:
    return MAPPING.replace("{rules}", "".join(f'\t\tiifname "tpvpn-s1" {rule}\n' for rule in rules))


def test_nft_reads_a_mapping_and_its_replacement() -> None:
    with namespace("nft") as name:
        with inside(name):
            table = nft.Table(
                "tpvpn-s1",
                mapping(
                    ("246.130.0.0/16", "10.130.0.0/16"),
                    ("246.128.0.1/32", "10.0.0.9/32"),
                    ("fd74:7077:1::/48", "fd00:130::/48"),
                    ("fd74:7077::/33", "2001:db8:8000::/33"),
                ),
            )
        assert ruleset(name) == listed(
            "ip daddr 246.130.0.0/16 dnat ip prefix to 10.130.0.0/16",
            "ip daddr 246.128.0.1 dnat ip prefix to 10.0.0.9/32",
            "ip6 daddr fd74:7077:1::/48 dnat ip6 prefix to fd00:130::/48",
            "ip6 daddr fd74:7077::/33 dnat ip6 prefix to 2001:db8:8000::/33",
        )
        table.replace_rules(mapping(("246.132.0.0/17", "10.132.128.0/17")))
        assert ruleset(name) == listed("ip daddr 246.132.0.0/17 dnat ip prefix to 10.132.128.0/17")
        table.replace_rules(mapping())
        assert ruleset(name) == listed()
        table.close()
        assert ruleset(name) == ""


def test_a_replacement_that_fails_changes_nothing_and_the_next_one_succeeds() -> None:
    with namespace("nft") as name:
        with inside(name):
            table = nft.Table("tpvpn-s1", mapping(("246.130.0.0/16", "10.130.0.0/16")))
        before = ruleset(name)
        [chain] = mapping(("246.132.0.0/16", "10.132.0.0/16"))
        bad = nft.Chain("prerouting", (*chain.rules, (nft.counter("not made"),), *chain.rules), kind="nat")
        with pytest.raises(PrivilegeError, match="nft_nat"):
            table.replace_rules((bad,))
        assert ruleset(name) == before
        table.replace_rules((chain,))
        assert ruleset(name) == listed("ip daddr 246.132.0.0/16 dnat ip prefix to 10.132.0.0/16")
        table.close()


def test_without_descriptors_the_error_says_so() -> None:
    script = (
        "import resource; from tpvpn.nfnetlink import Chain, Table; "
        "resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3)); Table('t', ())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert "TpvpnError: cannot make nft table t: Too many open files" in done.stderr


def test_a_table_belongs_to_its_maker_alone() -> None:
    with namespace("nft") as name, inside(name):
        guard = nft.install_laptop_guard("tun7", OWN4, None)
        with pytest.raises(UsageError, match="tpvpn-tun7 belongs to a running program"):
            nft.install_laptop_guard("tun7", OWN4, None)
        assert subprocess.run(["nft", "delete", "table", "inet", "tpvpn-tun7"], capture_output=True).returncode != 0
        run("nft", "flush", "ruleset")
        assert "tpvpn-tun7" in ruleset(name)
        guard.close()


def test_a_table_that_cannot_be_made_leaves_nothing() -> None:
    with namespace("nft") as name, inside(name):
        bad = nft.Chain("forward", ((nft.counter("not made"),),))
        with pytest.raises(PrivilegeError):
            nft.Table("half", (nft.Chain("input", ((nft.ACCEPT,),)), bad))
        assert ruleset(name) == ""
        nft.Table("half", (nft.Chain("input", ((nft.ACCEPT,),)),)).close()


def test_without_the_capability_the_error_names_it() -> None:
    script = "from tpvpn.nfnetlink import install_laptop_guard as guard; guard('tun7', '246.0.1.2', None)"
    dropped = ["setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin"]
    done = subprocess.run([*dropped, sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert "PrivilegeError: changing nf_tables needs CAP_NET_ADMIN" in done.stderr


class Laptop(NamedTuple):
    name: str
    container: str
    tun: Tun
    guard: nft.Table


@pytest.fixture
def laptop() -> Iterator[Laptop]:
    """A laptop with a LAN, a container behind it and a guarded tunnel; the test is the manager at its other end."""
    with namespace("laptop") as name, namespace("container") as container:
        sysctl(name, "ipv4/ip_forward", "1")
        with inside(name):
            tun = open_tun("tun7", offload=False)
        with contextlib.closing(tun):
            run("ip", "-n", name, "link", "add", "docker0", "type", "veth", "peer", "name", "eth0", "netns", container)
            run("ip", "-n", name, "addr", "add", "172.17.0.1/16", "dev", "docker0")
            run("ip", "-n", name, "addr", "add", f"{LAN4}/32", "dev", "lo")
            run("ip", "-n", container, "addr", "add", f"{CONTAINER4}/16", "dev", "eth0")
            for address in (f"{OWN4}/32", f"{OWN6}/128"):
                run("ip", "-n", name, "addr", "add", address, "dev", "tun7")
            for space, device in ((name, "docker0"), (name, "tun7"), (container, "eth0")):
                run("ip", "-n", space, "link", "set", device, "up")
            run("ip", "-n", name, "route", "add", "10.130.0.0/16", "dev", "tun7")
            run("ip", "-n", name, "-6", "route", "add", "fd00:130::/64", "dev", "tun7")
            run("ip", "-n", container, "route", "add", "default", "via", "172.17.0.1")
            with inside(name):
                guard = nft.install_laptop_guard("tun7", OWN4, OWN6)
            yield Laptop(name, container, tun, guard)
            guard.close()


def inject(laptop: Laptop, *packets: Packet) -> None:
    for packet in packets:
        os.write(laptop.tun.fd, bytes(packet))


def sent(laptop: Laptop, version: int = 4) -> Packet:
    """The next packet of the version that goes into the tunnel; the kernel's own chatter (MLD, RS) is passed over."""
    while ready := readable([laptop.tun.fd, laptop.tun.prompt_fd], 2):
        data = os.read(ready[0], 65536)
        packet = IP(data) if data[0] >> 4 == 4 else IPv6(data)
        if packet.version == version and UDP in packet:
            return packet
    raise AssertionError("the laptop sends nothing")


def got(server: socket.socket) -> bytes:
    return server.recv(100)


@pytest.mark.parametrize(("own", "service"), [(OWN4, SERVICE4), (OWN6, SERVICE6)], ids=["ipv4", "ipv6"])
def test_the_answer_to_our_own_flow_comes_in(laptop: Laptop, own: str, service: str) -> None:
    with udp_server(laptop.name, own, 4000) as client:
        client.sendto(b"ask", (service, 53))
        asked = sent(laptop, 6 if ":" in own else 4)
        assert (asked.src, asked.dst) == (own, service)
        ip = (IPv6 if ":" in own else IP)(src=service, dst=own)
        inject(laptop, ip / UDP(sport=53, dport=4000) / Raw(b"answer"))
        assert got(client) == b"answer"
    assert laptop.guard.counters() == {"foreign_address": 0, "new_flow": 0}


def test_a_new_flow_does_not_come_in(laptop: Laptop) -> None:
    with udp_server(laptop.name, OWN4, 4000) as server:
        inject(
            laptop,
            IP(src=SERVICE4, dst=OWN4) / UDP(sport=53, dport=4000) / Raw(b"new"),
            IP(src=SERVICE4, dst=OWN4) / ICMP(),
            IPv6(src=SERVICE6, dst=OWN6) / ICMPv6EchoRequest(),
        )
        assert readable([server.fileno()], 0.1) == []
    assert laptop.guard.counters() == {"foreign_address": 0, "new_flow": 3}


def test_a_packet_for_another_address_does_not_come_in(laptop: Laptop) -> None:
    with udp_server(laptop.name, LAN4, 4000) as server, udp_server(laptop.container, CONTAINER4, 4000) as inner:
        for address in (LAN4, CONTAINER4):
            inject(laptop, IP(src=SERVICE4, dst=address) / UDP(sport=53, dport=4000) / Raw(b"x"))
        inject(laptop, IPv6(src=SERVICE6, dst="ff02::1") / ICMPv6EchoRequest())
        assert readable([server.fileno(), inner.fileno()], 0.1) == []
    assert laptop.guard.counters() == {"foreign_address": 3, "new_flow": 0}


def test_a_container_behind_the_laptop_uses_the_tunnel_as_us(laptop: Laptop) -> None:
    with udp_server(laptop.container, CONTAINER4, 4000) as client:
        client.sendto(b"ask", (SERVICE4, 53))
        asked = sent(laptop)
        assert (asked.src, asked[UDP].sport) == (OWN4, 4000)
        inject(laptop, IP(src=SERVICE4, dst=OWN4) / UDP(sport=53, dport=4000) / Raw(b"answer"))
        assert got(client) == b"answer"
        # The same flow, addressed past the translation: a guess at what is behind us.
        inject(laptop, IP(src=SERVICE4, dst=CONTAINER4) / UDP(sport=53, dport=4000) / Raw(b"forged"))
        assert readable([client.fileno()], 0.1) == []
    assert laptop.guard.counters() == {"foreign_address": 1, "new_flow": 0}


def test_a_socket_bound_to_another_address_leaves_as_us(laptop: Laptop) -> None:
    with udp_server(laptop.name, LAN4, 4000) as client:
        client.sendto(b"ask", (SERVICE4, 53))
        assert sent(laptop).src == OWN4
        inject(laptop, IP(src=SERVICE4, dst=OWN4) / UDP(sport=53, dport=4000) / Raw(b"answer"))
        assert got(client) == b"answer"
