"""Whose a route is: the program that most likely installed it, and by what sign that is known.

It knows names, numbers and kinds, in tables, and asks nobody. The most telling sign wins: the table, mark or preference
that a VPN reserves for itself, then the program that has the device open, then the device's name and kind, the routing
daemon's protocol number, and last what any LAN looks like.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from tpvpn.route.fib import MAIN_TABLE, TPVPN_PROTOCOL, Link, Nexthop, Route, Rule


class Owner(NamedTuple):
    """A program, and how that is known, in words that follow "known by"."""

    name: str
    evidence: str


TABLES = {
    52: "tailscale",
    220: "strongswan",
    2022: "sing-box",
    0x1BD0: "netbird",
    51820: "wireguard",
    65743: "warp",
    1836018789: "mullvad",
}

MARKS = {0x80000: "tailscale", 0x1BD00: "netbird", 0xCA6C: "wireguard", 0x100CF: "warp", 0x6D6F6C65: "mullvad"}
"""By firewall mark of the rule that leads to the table: the VPN's own packets carry it."""

PREFERENCES = {
    **dict.fromkeys(range(5210, 5271), "tailscale"),
    **dict.fromkeys((105, 110), "netbird"),
    **dict.fromkeys(range(9000, 9010), "sing-box"),
    220: "strongswan",
    5199: "mullvad",
}
"""By preference of the rule that leads to a table other than main."""

PROGRAMS = {
    "openvpn": "openvpn",
    "openvpn3-service": "openvpn",
    "openconnect": "openconnect",
    "vpnagentd": "anyconnect",
    "PanGPS": "globalprotect",
    "gpservice": "globalprotect",
    "gpclient": "globalprotect",
    "wireguard-go": "wireguard",
    "boringtun": "wireguard",
    "tailscaled": "tailscale",
    "netbird": "netbird",
    "warp-svc": "warp",
    "mullvad-daemon": "mullvad",
    "charon": "strongswan",
    "charon-systemd": "strongswan",
    "openfortivpn": "forticlient",
    "fortivpn": "forticlient",
    "vpnc": "vpnc",
    "nordvpnd": "nordvpn",
    "zerotier-one": "zerotier",
    "sing-box": "sing-box",
    "clash": "clash",
    "mihomo": "clash",
    "tpvpn": "tpvpn",
}
"""By the name (comm, at most 15 characters) of the process that has the TUN open."""

NAMES = tuple(
    (re.compile(pattern), owner)
    for pattern, owner in (
        (r"tailscale\d*|ts\d+", "tailscale"),
        (r"wt\d+|netbird.*", "netbird"),
        (r"CloudflareWARP|warp\d*", "warp"),
        (r"wg\d*-mullvad|mullvad.*", "mullvad"),
        (r"nordlynx|nordtun", "nordvpn"),
        (r"proton\d+|pvpn.*", "protonvpn"),
        (r"zt[a-z0-9]{8,}", "zerotier"),
        (r"gpd\d+", "globalprotect"),
        (r"cscotun\d+", "anyconnect"),
        (r"fctvpn.*|fortissl.*", "forticlient"),
        (r"ipsec\d*|xfrm\d+|vti\d+", "strongswan"),
        (r"docker\d*|docker_gwbridge|br-[0-9a-f]{12}", "docker"),
        (r"podman\d*|cni-podman\d*", "podman"),
        (r"virbr\d+|vnet\d+", "libvirt"),
        (r"lxcbr\d+|lxdbr\d+|incusbr\d+", "lxd"),
        (r"cni\d+|cali.*|flannel.*|cilium.*|kube-.*", "kubernetes"),
        (r"wg.*", "wireguard"),
        (r"ovpn.*", "openvpn"),
    )
)
ANY_TUN = re.compile(r"(tun|tap)\d*")
"""What the kernel itself calls such devices: OpenVPN's mostly, unless another program is seen to hold it."""

KINDS = {"wireguard": "wireguard", "ovpn": "openvpn", "ovpn-dco": "openvpn", "xfrm": "strongswan", "vti": "strongswan"}

LAN_KINDS = {None, "veth", "vlan", "bond", "team", "bridge", "macvlan", "ipvlan"}
LAN_NAME = re.compile(r"(eth|en|wl|ww|usb|bond|team|br|vlan)[^-]*")
ROUTERS = {11: "frr", 12: "bird", 186: "frr", 187: "frr", 188: "frr", 189: "frr", 192: "frr"}
"""Routing daemons, by protocol number (/etc/iproute2/rt_protos)."""
KERNEL_PROTOCOL = 2
"""RTPROT_KERNEL: what came with an address of the device."""


def whose(owner: str, session: str | None) -> str:
    """The owner in words: of tpvpn also which of its sessions."""
    return f"{owner} session {session}" if session else owner


def owner_of(route: Route, hop: Nexthop, rule: Rule | None = None, link: Link | None = None) -> Owner:
    """Who owns this way out of a route: "openvpn", "tailscale", "lan", …, or "unknown"."""
    return next(signs(route, hop, rule, link))


def signs(route: Route, hop: Nexthop, rule: Rule | None, link: Link | None) -> Iterator[Owner]:
    """What can be seen of the owner, the most telling first; the last is "unknown"."""
    name = hop.device or ""
    kind = link.kind if link is not None else None
    holder = link.holder if link is not None else None
    if route.protocol == TPVPN_PROTOCOL:
        yield Owner("tpvpn", f"protocol number {TPVPN_PROTOCOL}")
    if route.table in TABLES:
        yield Owner(TABLES[route.table], f"routing table {route.table}")
    if rule is not None and route.table != MAIN_TABLE:
        yield from rule_signs(rule)
    if holder in PROGRAMS:
        yield Owner(PROGRAMS[holder], f"process {holder}, which has {name} open")
    for pattern, owner in NAMES:
        if pattern.fullmatch(name):
            yield Owner(owner, f"device name {name}")
    if kind in KINDS:
        yield Owner(KINDS[kind], f"device kind {kind}")
    if route.protocol in ROUTERS:
        yield Owner(ROUTERS[route.protocol], f"protocol number {route.protocol}")
    if holder is not None:
        yield Owner("unknown", f"process {holder}, which has {name} open")
    yield from last_signs(route, hop, link)


def last_signs(route: Route, hop: Nexthop, link: Link | None) -> Iterator[Owner]:
    """What many programs' devices and routes look like."""
    name = hop.device or ""
    if ANY_TUN.fullmatch(name):
        yield Owner("openvpn", f"device name {name}")
    if link is not None and link.kind in LAN_KINDS and route.protocol == KERNEL_PROTOCOL and hop.gateway is None:
        yield Owner("lan", f"an address of {name} itself")
    if LAN_NAME.fullmatch(name):
        yield Owner("lan", f"device name {name}")
    yield Owner("unknown", "no sign of any program")


def rule_signs(rule: Rule) -> Iterator[Owner]:
    """What the rule that leads to a table of its own says."""
    if rule.mark in MARKS:
        yield Owner(MARKS[rule.mark], f"firewall mark {rule.mark:#x} of rule {rule.preference}")
    if rule.inverted and rule.mark is not None and rule.mark == rule.table:
        # wg-quick(8): the next free number from 51820 on, for both.
        yield Owner("wireguard", f"rule {rule.preference}, as wg-quick writes it")
    if rule.preference in PREFERENCES:
        yield Owner(PREFERENCES[rule.preference], f"rule preference {rule.preference}")
