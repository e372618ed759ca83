"""The lab's drawing as `ip` commands: who has which device, address and route.

                 192.0.2.0/24                      10.132.0.0/16, 10.130.0.0/16
   laptop eth0 ================= eth0 node cni0 ========================= eth0 cluster
     | |   .2                     .10       10.132.0.1                     pods 10.132.0.10 …, services 10.130.0.80 …
     | |                                                                   direct twins 203.0.113.10 …
     | | eth1 198.51.100.2   beside a real VPN: the internet, for the VPN's own packets
     | |
     | | tun0 10.8.0.2       wg0 with WireGuard, ipsec0 with strongSwan; private route 10.0.0.0/8
     | |
    vpn  hosts 10.0.0.1, 10.1.2.3, … ; it knows no other network and says so (ICMP unreachable)

The laptop's default route leads to a router that is not there, so a cluster address is reached through a tunnel or not
at all. The direct twins are further addresses of the same servers outside the VPN's route: the laptop reaches them
through the node by plain forwarding and masquerade, the yardstick of the benchmark. IPv6 mirrors it: fd10::/16 is the
VPN's private route and covers the cluster's fd10:130::/112 and fd10:132::/64.

With a full tunnel the laptop is elsewhere, and the node is reached through the VPN alone, which forwards to it:

            198.51.100.0/30                        192.0.2.0/24
   laptop eth1 ========= eth1 vpn eth0 ========================= eth0 node cni0 === …
     | .2                  .1  |   .1                              .10
     | tun0 10.8.0.2, default  | tun0 10.8.0.1
     +-------------------------+      what comes by eth1 gets no further

It knows nothing of processes; each text is a batch for `ip -batch`.
"""

from typing import Literal, get_args

Where = Literal["laptop", "vpn", "node", "cluster"]
Exit = Literal["kernel", "socket"]
Vpn = Literal["routes", "openvpn", "openvpn-full", "wireguard", "wireguard-full", "strongswan", "none"]

WHERE: tuple[Where, ...] = get_args(Where)
VPNS: tuple[Vpn, ...] = get_args(Vpn)
EXITS: tuple[Exit, ...] = get_args(Exit)

NODE = "192.0.2.10"
VPN_SERVER, VPN_CLIENT = "198.51.100.1", "198.51.100.2"
TUNNEL_SERVER, TUNNEL_CLIENT = "10.8.0.1", "10.8.0.2"
TUNNEL_SERVER6, TUNNEL_CLIENT6 = "fd10:8::1", "fd10:8::2"
SERVICE_CIDR, POD_CIDR = "10.130.0.0/16", "10.132.0.0/16"
SERVICE_CIDR6, POD_CIDR6 = "fd10:130::/112", "fd10:132::/64"

VPN_HOSTS = ("10.0.0.1", "10.1.2.3", "10.20.0.5", "10.129.0.7", "10.200.0.9")
VPN_HOSTS6 = ("fd10:1::3", "fd10:129::7", "fd10:200::9")
SERVICES = ("10.130.0.1", "10.130.0.80", "10.130.200.7", "10.130.0.10")
SERVICES6 = ("fd10:130::80", "fd10:130::10")
PODS = ("10.132.0.10", "10.132.0.11", "10.132.200.20")
PODS6 = ("fd10:132::10", "fd10:132::11")
TWINS = ("203.0.113.10", "203.0.113.11", "203.0.113.12", "203.0.113.80")
TWINS6 = ("2001:db8:133::10",)

# iperf3 answers UDP from the address it was bound to, so each of these has a server of its own.
IPERF = (*PODS[:2], SERVICES[1], *TWINS[:3])
IPERF6 = (PODS6[0], SERVICES6[0], TWINS6[0])

Stage = dict[Where, str]

# Devices first: an IPv6 route wants its device to have a carrier.
LINKS: Stage = {
    "laptop": """
        link set lo up
    """,
    "vpn": """
        link set lo up
    """,
    "node": """
        link set lo up
        link add cni0 type veth peer name eth0 netns {cluster}
        link set cni0 up
    """,
    "cluster": """
        link set lo up
        link set eth0 up
    """,
}

# The node's LAN has the laptop on it, or, with a full tunnel, the VPN's far end.
LAN = """
    link add eth0 type veth peer name eth0 netns {node}
    link set eth0 up
"""
LAN_NODE = """
    link set eth0 up
"""
NEAR: Stage = {"laptop": LAN, "node": LAN_NODE}
FAR: Stage = {"vpn": LAN, "node": LAN_NODE}

# The way that a real VPN's own packets go: the internet between the laptop and the VPN's server.
INTERNET: Stage = {
    "laptop": f"""
        link add eth1 type veth peer name eth1 netns {{vpn}}
        link set eth1 up
        address add {VPN_CLIENT}/30 dev eth1
    """,
    "vpn": f"""
        link set eth1 up
        address add {VPN_SERVER}/30 dev eth1
    """,
}


def _addresses(addresses: tuple[str, ...], device: str, length: int) -> str:
    option = " nodad" if length == 128 else ""
    return "\n".join(f"address add {address}/{length} dev {device}{option}" for address in addresses)


ADDRESSES: Stage = {
    "vpn": f"""
        {_addresses(VPN_HOSTS, "lo", 32)}
        route add unreachable default
    """,
    "node": f"""
        address add {NODE}/24 dev eth0
        address add 10.132.0.1/16 dev cni0
        route add {SERVICE_CIDR} dev cni0
        route add 203.0.113.0/24 dev cni0
    """,
    "cluster": f"""
        {_addresses(PODS + SERVICES + TWINS, "eth0", 32)}
        route add {POD_CIDR} dev eth0
        route add default via 10.132.0.1
    """,
}

ADDRESSES6: Stage = {
    "vpn": f"""
        {_addresses(VPN_HOSTS6, "lo", 128)}
        route add unreachable ::/0
    """,
    "node": f"""
        address add 2001:db8:2::10/64 dev eth0 nodad
        address add fd10:132::1/64 dev cni0 nodad
        route add {SERVICE_CIDR6} dev cni0
        route add 2001:db8:133::/64 dev cni0
    """,
    "cluster": f"""
        {_addresses(PODS6 + SERVICES6 + TWINS6, "eth0", 128)}
        route add {POD_CIDR6} dev eth0
        route add default via fd10:132::1
    """,
}

NEAR_ADDRESSES: Stage = {
    "laptop": f"""
        address add 192.0.2.2/24 dev eth0
        route add default via 192.0.2.1
        route add 203.0.113.0/24 via {NODE}
    """,
}
NEAR_ADDRESSES6: Stage = {
    "laptop": """
        address add 2001:db8:2::2/64 dev eth0 nodad
        route add default via 2001:db8:2::1
        route add 2001:db8:133::/64 via 2001:db8:2::10
    """,
}

# The node knows the way back: the VPN's far end translates nothing.
FAR_ADDRESSES: Stage = {
    "laptop": f"""
        route add default via {VPN_SERVER}
    """,
    "vpn": f"""
        address add 192.0.2.1/24 dev eth0
        route add 203.0.113.0/24 via {NODE}
    """,
    "node": """
        route add 10.8.0.0/24 via 192.0.2.1
    """,
}
FAR_ADDRESSES6: Stage = {
    "laptop": """
        address add 2001:db8:51::2/64 dev eth1 nodad
        route add default via 2001:db8:51::1
    """,
    "vpn": """
        address add 2001:db8:51::1/64 dev eth1 nodad
        address add 2001:db8:2::1/64 dev eth0 nodad
        route add 2001:db8:133::/64 via 2001:db8:2::10
    """,
    "node": """
        route add fd10:8::/64 via 2001:db8:2::1
    """,
}

# A VPN of plain routes brings what the real ones bring by their own means.
ROUTES_UP: Stage = {
    "laptop": f"""
        link add tun0 type veth peer name tun0 netns {{vpn}}
        link set tun0 up
        address add {TUNNEL_CLIENT}/24 dev tun0
    """,
    "vpn": f"""
        link set tun0 up
        address add {TUNNEL_SERVER}/24 dev tun0
    """,
}
ROUTES_UP6: Stage = {
    "laptop": f"""
        address add {TUNNEL_CLIENT6}/64 dev tun0 nodad
        route add fd10::/16 via {TUNNEL_SERVER6}
    """,
    "vpn": f"""
        address add {TUNNEL_SERVER6}/64 dev tun0 nodad
    """,
}
ROUTES_LAST: Stage = {
    "laptop": f"""
        route add 10.0.0.0/8 via {TUNNEL_SERVER}
    """,
}
ROUTES_DOWN: Stage = {
    "laptop": """
        link delete tun0
    """,
}

# A node masquerades what it forwards into the pod network for its LAN and for the benchmark's networks (RFC 2544).
MASQUERADE = """
table inet lab {
    chain postrouting {
        type nat hook postrouting priority srcnat
        oifname "cni0" ip saddr { 192.0.2.0/24, 198.18.0.0/15 } masquerade
        oifname "cni0" ip6 saddr 2001:db8:2::/64 masquerade
    }
}
"""


# The far end of a full tunnel lets nobody to the node or its hosts who did not come through the tunnel.
TUNNEL_ONLY = """
table inet lab {
    chain input {
        type filter hook input priority filter
        iifname "eth1" ip daddr 10.0.0.0/8 reject
        iifname "eth1" ip6 daddr fd10::/16 reject
    }
    chain forward {
        type filter hook forward priority filter
        iifname "eth1" reject
    }
}
"""


def is_full(vpn: Vpn) -> bool:
    """Whether the VPN takes the laptop's whole traffic."""
    return vpn.endswith("-full")


def batches(vpn: Vpn, ipv6: bool) -> list[tuple[Where, str]]:
    """The `ip` batches that build the lab, in order, each with the namespace it is for; the VPN is yet to start."""
    stages = [LINKS, FAR if is_full(vpn) else NEAR]
    if vpn not in ("none", "routes"):
        stages.append(INTERNET)
    stages += [ADDRESSES, FAR_ADDRESSES if is_full(vpn) else NEAR_ADDRESSES]
    if ipv6:
        stages += [ADDRESSES6, FAR_ADDRESSES6 if is_full(vpn) else NEAR_ADDRESSES6]
    return _in_order(stages)


def routes_up(ipv6: bool) -> list[tuple[Where, str]]:
    """The batches that start a VPN of plain routes."""
    return _in_order([ROUTES_UP, ROUTES_UP6, ROUTES_LAST] if ipv6 else [ROUTES_UP, ROUTES_LAST])


def routes_down() -> list[tuple[Where, str]]:
    """The batches that end it."""
    return _in_order([ROUTES_DOWN])


def _in_order(stages: list[Stage]) -> list[tuple[Where, str]]:
    return [(where, stage[where]) for stage in stages for where in WHERE if where in stage]


def iperf_addresses(ipv6: bool) -> list[str]:
    """The addresses of the cluster where iperf3 listens on its usual port."""
    return [*IPERF, *IPERF6] if ipv6 else [*IPERF]


def served(where: Where, ipv6: bool) -> list[str]:
    """The addresses of a namespace where a server answers."""
    of = {
        "vpn": (VPN_HOSTS, VPN_HOSTS6),
        "cluster": (PODS + SERVICES + TWINS, PODS6 + SERVICES6 + TWINS6),
    }
    v4, v6 = of.get(where, ((), ()))
    return [*v4, *v6] if ipv6 else [*v4]
