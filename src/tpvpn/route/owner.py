"""Whose a route is: the program that most likely installed it, by what can be seen without asking anybody.

It knows names, numbers and kinds, in tables, and no processes. The most telling sign wins: the table or mark a VPN
reserves for itself, then the name of the device, then its kind, then what any LAN looks like.
"""

import re

from tpvpn.route.fib import MAIN_TABLE, TPVPN_PROTOCOL, Link, Nexthop, Route, Rule

UNKNOWN = "unknown"

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
        (r"tun\d+|tap\d+|tun|ovpn.*", "openvpn"),
    )
)

KINDS = {"wireguard": "wireguard", "ovpn": "openvpn", "ovpn-dco": "openvpn", "xfrm": "strongswan", "vti": "strongswan"}

LAN_KINDS = {None, "veth", "vlan", "bond", "team", "bridge", "macvlan", "ipvlan"}
LAN_NAME = re.compile(r"(eth|en|wl|ww|usb|bond|team|br|vlan)[^-]*")
ROUTERS = {11: "frr", 12: "bird", 186: "frr", 187: "frr", 188: "frr", 189: "frr", 192: "frr"}
"""Routing daemons, by protocol number (/etc/iproute2/rt_protos)."""
KERNEL_PROTOCOL = 2
"""RTPROT_KERNEL: what came with an address of the device."""


def owner_of(route: Route, hop: Nexthop, rule: Rule | None = None, link: Link | None = None) -> str:
    """Who owns this way out of a route: "openvpn", "tailscale", "lan", …, or "unknown"."""
    if route.protocol == TPVPN_PROTOCOL:
        return "tpvpn"
    name = hop.device or ""
    kind = link.kind if link is not None else None
    found = (
        TABLES.get(route.table)
        or (MARKS.get(rule.mark or 0) if rule is not None and route.table != MAIN_TABLE else None)
        or next((owner for pattern, owner in NAMES if pattern.fullmatch(name)), None)
        or KINDS.get(kind or "")
        or ROUTERS.get(route.protocol)
    )
    if found is not None:
        return found
    connected = link is not None and kind in LAN_KINDS and route.protocol == KERNEL_PROTOCOL and hop.gateway is None
    return "lan" if connected or LAN_NAME.fullmatch(name) else UNKNOWN
