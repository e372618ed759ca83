"""route/netlink against iproute2, in namespaces with one of everything that VPNs and routing daemons leave behind."""

import asyncio
import ipaddress
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tpvpn.route.changes import Changes
from tpvpn.route.fib import Link, Nexthop, Route, Rule, View

ZOO = """
ip link set lo up
ip link add v0 type veth peer name v1
ip link add idle type veth peer name down
ip link add br0 type bridge
for device in v0 v1 br0 idle; do ip link set $device up; done
ip addr add 192.0.2.1/24 dev v0
ip addr add 10.9.9.1 peer 10.9.9.2 dev v1
ip -6 addr add 2001:db8::1/64 dev v0 nodad
ip route add default via 192.0.2.254
ip route add 10.0.0.0/8 via 192.0.2.7 dev v0 metric 50 src 192.0.2.1
ip route add 10.1.0.0/16 via inet6 2001:db8::7 dev v0
ip route add 10.2.0.0/16 nexthop via 192.0.2.8 weight 3 nexthop via 192.0.2.9 weight 1
ip route add 10.3.0.0/16 dev br0 proto 99
ip route add throw 10.4.0.0/16 table 1000000
ip route add unreachable 10.5.0.0/16
ip route add blackhole 10.6.0.0/16 table 52
ip route add prohibit 10.7.0.0/16
ip route add 10.8.0.0/16 dev v0 scope link table 116000 proto 116
ip nexthop add id 7 via 192.0.2.70 dev v0
ip nexthop add id 8 via 192.0.2.80 dev v0
ip nexthop add id 9 group 7,2/8,5
ip route add 10.10.0.0/16 nhid 7
ip route add 10.11.0.0/16 nhid 9
ip -6 route add default via 2001:db8::fe dev v0
ip -6 route add fd00::/8 via 2001:db8::7 dev v0 metric 9
ip -6 route add fd01::/16 nexthop via 2001:db8::8 dev v0 weight 2 nexthop via 2001:db8::9 dev v0
ip -6 route add throw fd02::/16 table 77
ip -6 route add unreachable fd03::/16
ip rule add pref 100 from 10.0.0.0/8 to 192.0.2.0/24 lookup 52
ip rule add pref 101 not fwmark 0xca6c lookup 51820
ip rule add pref 102 lookup main suppress_prefixlength 0
ip rule add pref 103 fwmark 0x80000/0xff0000 lookup main
ip rule add pref 104 fwmark 0/0xff lookup main
ip rule add pref 105 iif v0 lookup 52
ip rule add pref 106 oif lo lookup 53
ip rule add pref 107 uidrange 1000-1999 lookup 54
ip rule add pref 108 ipproto tcp dport 53 lookup 55
ip rule add pref 109 goto 32766
ip rule add pref 110 unreachable
ip rule add pref 111 blackhole
ip rule add pref 112 prohibit
ip rule add pref 113 lookup 1000000 protocol 116
ip rule add pref 113 lookup 1000001
ip rule add pref 114 tos 0x10 lookup 56
ip rule add pref 115 iif nosuch0 nop
ip -6 rule add pref 200 from fd00::/8 lookup 60
ip -6 rule add pref 201 not fwmark 0xca6c lookup 51820
"""

READ = """
import asyncio, pickle, sys
from tpvpn.route import netlink
from tpvpn.route.prefix import Prefix
async def main():
    return await netlink.read_view(), [*await netlink.ask([Prefix.host(address) for address in sys.argv[1:]])]
sys.stdout.buffer.write(pickle.dumps(asyncio.run(main())))
"""

WATCH = """
import asyncio, sys
from tpvpn.route.changes import Changes
async def main():
    with Changes() as changes:
        print("ready", flush=True)
        async for _ in changes:
            print("changed", flush=True)
asyncio.run(main())
"""


class Namespace:
    def __init__(self, name: str) -> None:
        self.name = name

    def argv(self, *argv: str) -> list[str]:
        return ["ip", "netns", "exec", self.name, *argv]

    def sh(self, script: str) -> str:
        return subprocess.run(self.argv("sh", "-ec", script), check=True, stdout=subprocess.PIPE, text=True).stdout

    def ip(self, *argv: str) -> list[dict]:
        return json.loads(self.sh("ip -N -j " + " ".join(argv)) or "[]")

    def read(self, *asked: str) -> tuple[View, list[Route | None]]:
        done = subprocess.run(self.argv(sys.executable, "-c", READ, *asked), check=True, stdout=subprocess.PIPE)
        return pickle.loads(done.stdout)


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    name = f"tv{os.getpid()}n"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        yield Namespace(name)
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


def text(prefix) -> str:
    kind = ipaddress.IPv4Network if prefix.version == 4 else ipaddress.IPv6Network
    return str(kind((prefix.network, prefix.length)))


KINDS = {
    "1": "unicast", "2": "local", "3": "broadcast", "5": "multicast",
    "6": "blackhole", "7": "unreachable", "8": "prohibit", "9": "throw",
}  # fmt: skip
"""Of routes and, from 6 on, of rules."""


def rule_as_iproute(rule: Rule) -> dict:
    """The rule as `ip -N -j rule` writes it, but for what a Rule does not hold."""
    entry: dict = {"priority": rule.preference, "protocol": str(rule.protocol)}
    if rule.source:
        entry |= {"src": text(rule.source)}
    if rule.destination:
        entry |= {"dst": text(rule.destination)}
    if rule.action == "lookup":
        entry["table"] = str(rule.table)
    elif rule.action != "goto":
        entry["action"] = rule.action
    if rule.mark is not None:
        entry |= {"fwmark": rule.mark, "fwmask": rule.mark_mask}
    if rule.uids:
        entry |= {"uid_start": rule.uids[0], "uid_end": rule.uids[1]}
    entry |= {"narrow": True} if rule.protocols_ports else {}
    entry |= {"not": None} if rule.inverted else {}
    named = {"iif": rule.iif, "oif": rule.oif, "goto": rule.goto, "suppress_prefixlen": rule.suppress_prefixlength}
    return entry | {key: value for key, value in named.items() if value is not None}


def iproute_rule(entry: dict) -> dict:
    """The same subset from iproute2's side."""
    same = {key: entry[key] for key in ("priority", "protocol", "not", "iif", "oif", "goto", "table") if key in entry}
    same |= {key: entry[key] for key in ("uid_start", "uid_end", "suppress_prefixlen", "action") if key in entry}
    for key in ("src", "dst"):
        if entry.get(key, "all") != "all":
            same[key] = f"{entry[key]}/{entry[f'{key}len']}"
    if "fwmark" in entry:
        same |= {"fwmark": int(entry["fwmark"], 0), "fwmask": int(entry.get("fwmask", "0xffffffff"), 0)}
    if "action" in entry:
        same["action"] = KINDS[entry["action"]]
    same |= {"action": "nop"} if "nop" in entry else {}
    same |= {"narrow": True} if entry.keys() & {"ipproto", "dport", "sport", "tos"} else {}
    return same


def route_as_iproute(route: Route) -> dict:
    hops = [(hop.gateway, hop.device, hop.weight) for hop in route.nexthops]
    known = (route.kind, text(route.prefix), route.table, route.protocol, route.metric, route.scope, route.source)
    return {"known": known, "hops": hops}


def iproute_route(entry: dict, version: int) -> dict:
    default = "0.0.0.0/0" if version == 4 else "::/0"
    network = ipaddress.ip_network(default if entry["dst"] == "default" else entry["dst"])
    kind = KINDS[entry.get("type", "1")]
    gateway = entry.get("gateway") or entry.get("via", {}).get("host")
    hops = [(hop.get("gateway"), hop["dev"], hop["weight"]) for hop in entry.get("nexthops", [])]
    refuses = kind in ("throw", "unreachable", "blackhole", "prohibit")
    if not hops and "dev" in entry and not refuses:
        hops = [(gateway, entry["dev"], 1)]
    numbers = (int(entry.get("table", 254)), int(entry.get("protocol", 3)), entry.get("metric", 0))
    return {"known": (kind, str(network), *numbers, int(entry.get("scope", 0)), entry.get("prefsrc")), "hops": hops}


def test_view_is_what_iproute2_sees(namespace: Namespace) -> None:
    namespace.sh(ZOO)
    view, _ = namespace.read()

    for version, family in ((4, "-4"), (6, "-6")):
        rules = [rule_as_iproute(rule) for rule in view.rules if rule.version == version]
        assert rules == [iproute_rule(entry) for entry in namespace.ip(family, "-d rule")]
        routes = [route_as_iproute(route) for route in view.routes if route.prefix.version == version]
        entries = namespace.ip(family, "-d route show table all")
        expected = [iproute_route(entry, version) for entry in entries]
        assert sorted(routes, key=repr) == sorted(expected, key=repr)
    assert len(view.rules) > 20 and len(view.routes) > 30

    links = {link.name: link for link in view.links}
    assert links.keys() == {entry["ifname"] for entry in namespace.ip("link")}
    assert links["lo"].loopback and not links["v0"].loopback
    assert links["v0"] == Link(links["v0"].index, "v0", "veth")
    assert links["idle"].up and not links["idle"].carrier
    assert not links["down"].up
    assert links["br0"].kind == "bridge"
    found = {(address.device, address.address, text(address.prefix)) for address in view.addresses}
    assert {
        ("v0", "192.0.2.1", "192.0.2.0/24"),
        ("v1", "10.9.9.1", "10.9.9.2/32"),
        ("v0", "2001:db8::1", "2001:db8::/64"),
        ("lo", "::1", "::1/128"),
    } <= found
    assert view.ipv6


def test_nexthop_objects_are_resolved_where_the_kernel_gives_their_number_alone(namespace: Namespace) -> None:
    namespace.sh(ZOO + "sysctl -qw net.ipv4.nexthop_compat_mode=0")
    routes = {text(route.prefix): route for route in namespace.read()[0].routes}
    assert routes["10.10.0.0/16"].nexthops == (Nexthop("v0", "192.0.2.70"),)
    assert routes["10.11.0.0/16"].nexthops == (Nexthop("v0", "192.0.2.70", 2), Nexthop("v0", "192.0.2.80", 5))


def test_routes_by_a_device_without_carrier(namespace: Namespace) -> None:
    """The kernel chooses them or not, as it was told; `lookup` says the same."""
    namespace.sh(
        "ip link set lo up; ip link add v0 type veth peer name v1; ip link set v0 up\n"
        "ip address add 192.0.2.1/24 dev v0; ip route add 10.0.0.0/8 dev v0; ip route add 10.0.0.0/7 dev lo"
    )
    for ignored, device in ((0, "v0"), (1, "lo")):
        namespace.sh(f"sysctl -qw net.ipv4.conf.v0.ignore_routes_with_linkdown={ignored}")
        view, (answer,) = namespace.read("10.1.2.3")
        route = view.lookup("10.1.2.3").route
        assert answer and route and answer.device == route.device == device


def test_ipv6_switched_off(namespace: Namespace) -> None:
    namespace.sh("ip link set lo up; sysctl -qw net.ipv6.conf.all.disable_ipv6=1")
    view, (answer,) = namespace.read("fd00::1")
    assert not view.ipv6
    assert answer is None
    assert not [address for address in view.addresses if address.prefix.version == 6]


def test_the_kernels_answer(namespace: Namespace) -> None:
    namespace.sh(ZOO + "ip rule add pref 50 lookup 116000; ip route add throw 10.8.1.0/24 table 116000")
    asked = ["10.8.0.1", "10.8.1.1", "10.5.0.1", "10.7.0.1", "203.0.113.1", "fd00::1", "192.0.2.1", "fd03::1"]
    answers = dict(zip(asked, namespace.read(*asked)[1], strict=True))
    assert (answers["10.8.0.1"].table, answers["10.8.0.1"].device) == (116000, "v0")
    assert (answers["10.8.1.1"].table, answers["10.8.1.1"].gateway) == (254, "192.0.2.7")
    assert answers["10.5.0.1"].kind == answers["fd03::1"].kind == "unreachable"
    assert answers["10.7.0.1"].kind == "prohibit"
    assert answers["203.0.113.1"].gateway == "192.0.2.254"
    assert answers["fd00::1"].gateway == "2001:db8::7"
    assert answers["192.0.2.1"].kind == "local"


def test_no_route(namespace: Namespace) -> None:
    assert namespace.read("203.0.113.1", "fd00::1")[1] == [None, None]


MEASURE = """
import asyncio, resource, time
from tpvpn.route import netlink
from tpvpn.route.prefix import Prefix
start = time.perf_counter()
view = asyncio.run(netlink.read_view())
seconds = time.perf_counter() - start
print(len(view.routes), seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.alone
def test_a_table_of_100_000_routes(namespace: Namespace) -> None:
    lines = (f"route add {20 + (i >> 16)}.{i >> 8 & 255}.{i & 255}.0/32 dev lo" for i in range(100_000))
    namespace.sh("ip link set lo up")
    subprocess.run(namespace.argv("ip", "-batch", "-"), input="\n".join(lines), check=True, text=True)
    count, seconds, kibibytes = namespace.sh(f"{sys.executable} -c '{MEASURE}'").split()
    assert int(count) >= 100_000
    assert float(seconds) < 4, "about 1.1 s on an idle machine"
    assert int(kibibytes) < 150 * 1024


@pytest.fixture
def watcher(namespace: Namespace) -> Iterator[subprocess.Popen]:
    namespace.sh("ip link set lo up")
    argv = namespace.argv(sys.executable, "-uc", WATCH)
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(
    "change",
    [
        "ip rule add pref 5 lookup 7",
        "ip -6 rule add pref 5 lookup 7",
        "ip route add 10.0.0.0/8 dev lo",
        "ip -6 route add fd00::/8 dev lo",
        "ip addr add 10.0.0.1/32 dev lo",
        "ip -6 addr add fd00::1/128 dev lo",
        "ip link add v0 type veth peer name v1",
    ],
)
def test_every_change_is_told(namespace: Namespace, watcher: subprocess.Popen, change: str) -> None:
    start = time.monotonic()
    namespace.sh(change)
    assert watcher.stdout.readline() == "changed\n"
    assert 0.15 < time.monotonic() - start < 2


def test_a_storm_of_changes_is_told_twice_a_second(namespace: Namespace, watcher: subprocess.Popen) -> None:
    """20,000 routes overflow the queue of a process that was stopped meanwhile; then one event every 50 ms for 2 s."""
    lines = "\n".join(f"route add 20.{i >> 8}.{i & 255}.0/32 dev lo" for i in range(20_000))
    watcher.send_signal(19)
    subprocess.run(namespace.argv("ip", "-batch", "-"), input=lines, check=True, text=True)
    watcher.send_signal(18)
    assert watcher.stdout.readline() == "changed\n"
    script = "for i in $(seq 40); do ip route replace 10.0.0.0/8 dev lo metric $i; sleep 0.05; done"
    start = time.monotonic()
    with subprocess.Popen(namespace.argv("sh", "-c", script)) as storm:
        assert watcher.stdout.readline() == "changed\n"
        assert 0.4 < time.monotonic() - start < 1.1
        assert storm.poll() is None
    namespace.sh("ip rule add pref 5 lookup 7")
    assert watcher.stdout.readline() == "changed\n"


@pytest.mark.parametrize("later", range(6))
def test_who_waits_for_changes_can_be_cancelled_as_one_comes(later: int) -> None:
    """A session that is ended while another's routes go: at whatever step of the loop, it does not wait for more."""

    async def main() -> bool:
        with Changes() as changes:
            waiting = asyncio.ensure_future(anext(changes))
            changes.tell()
            await steps(10)  # now the burst is waited for
            changes.tell()
            await steps(later)
            waiting.cancel()
            await asyncio.wait([waiting], timeout=5)
            return waiting.cancelled()

    assert asyncio.run(main())


async def steps(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)
