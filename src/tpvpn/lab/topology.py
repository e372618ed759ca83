"""The lab's drawing as `ip` commands: who has which device, address and route.

                 192.0.2.0/24                      10.132.0.0/16, 10.130.0.0/16
   laptop eth0 ================= eth0 node cni0 ========================= eth0 cluster
     |     .2                     .10       10.132.0.1                     pods 10.132.0.10 …, services 10.130.0.80 …
     |                                                                     direct twins 203.0.113.10 …
     | tun0 10.8.0.2, private route 10.0.0.0/8
     |
     | tun0 10.8.0.1
    vpn  hosts 10.0.0.1, 10.1.2.3, … ; it knows no other network and says so (ICMP unreachable)

The laptop's default route leads to a router that is not there, so a cluster address is reached through a tunnel or not
at all. The direct twins are further addresses of the same servers outside the VPN's route: the laptop reaches them
through the node by plain forwarding and masquerade, the yardstick of the benchmark. IPv6 mirrors it: fd10::/16 is the
VPN's private route and covers the cluster's fd10:130::/112 and fd10:132::/64.

It knows nothing of processes; each text is a batch for `ip -batch`.
"""

from typing import Literal, get_args

Where = Literal["laptop", "vpn", "node", "cluster"]
Vpn = Literal["routes", "openvpn", "none"]

WHERE: tuple[Where, ...] = get_args(Where)
VPNS: tuple[Vpn, ...] = get_args(Vpn)

NODE = "192.0.2.10"
VPN_SERVER = "198.51.100.1"
SERVICE_CIDR, POD_CIDR = "10.130.0.0/16", "10.132.0.0/16"
SERVICE_CIDR6, POD_CIDR6 = "fd10:130::/112", "fd10:132::/64"

VPN_HOSTS = ("10.0.0.1", "10.1.2.3", "10.20.0.5", "10.129.0.7", "10.200.0.9")
VPN_HOSTS6 = ("fd10:1::3", "fd10:129::7", "fd10:200::9")
SERVICES = ("10.130.0.1", "10.130.0.80", "10.130.200.7")
SERVICES6 = ("fd10:130::80",)
PODS = ("10.132.0.10", "10.132.0.11", "10.132.200.20")
PODS6 = ("fd10:132::10", "fd10:132::11")
TWINS = ("203.0.113.10", "203.0.113.11", "203.0.113.12", "203.0.113.80")
TWINS6 = ("2001:db8:133::10",)

# iperf3 answers UDP from the address it was bound to, so each of these has a server of its own.
IPERF = (PODS[0], SERVICES[1], *TWINS[:3])
IPERF6 = (PODS6[0], SERVICES6[0], TWINS6[0])

# Devices first: an IPv6 route wants its device to have a carrier.
LINKS: dict[Where, str] = {
    "laptop": """
        link set lo up
        link add eth0 type veth peer name eth0 netns {node}
        link set eth0 up
    """,
    "vpn": """
        link set lo up
    """,
    "node": """
        link set lo up
        link set eth0 up
        link add cni0 type veth peer name eth0 netns {cluster}
        link set cni0 up
    """,
    "cluster": """
        link set lo up
        link set eth0 up
    """,
}

# How the laptop and the VPN's far end are joined, by kind of VPN.
TUNNELS: dict[Vpn, dict[Where, str]] = {
    "none": {},
    "routes": {
        "laptop": """
            link add tun0 type veth peer name tun0 netns {vpn}
            link set tun0 up
        """,
        "vpn": """
            link set tun0 up
        """,
    },
    # The way that OpenVPN's own packets go: the internet between the laptop and the VPN's server.
    "openvpn": {
        "laptop": """
            link add eth1 type veth peer name eth1 netns {vpn}
            link set eth1 up
            address add 198.51.100.2/30 dev eth1
        """,
        "vpn": f"""
            link set eth1 up
            address add {VPN_SERVER}/30 dev eth1
        """,
    },
}


def _addresses(addresses: tuple[str, ...], device: str, length: int) -> str:
    option = " nodad" if length == 128 else ""
    return "\n".join(f"address add {address}/{length} dev {device}{option}" for address in addresses)


ADDRESSES: dict[Where, str] = {
    "laptop": f"""
        address add 192.0.2.2/24 dev eth0
        route add default via 192.0.2.1
        route add 203.0.113.0/24 via {NODE}
    """,
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

ADDRESSES6: dict[Where, str] = {
    "laptop": """
        address add 2001:db8:2::2/64 dev eth0 nodad
        route add default via 2001:db8:2::1
        route add 2001:db8:133::/64 via 2001:db8:2::10
    """,
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

# What a VPN of plain routes brings; OpenVPN brings the same by its own means.
PRIVATE_ROUTES: dict[Where, str] = {
    "laptop": """
        address add 10.8.0.2/24 dev tun0
        route add 10.0.0.0/8 via 10.8.0.1
    """,
    "vpn": """
        address add 10.8.0.1/24 dev tun0
    """,
}
PRIVATE_ROUTES6: dict[Where, str] = {
    "laptop": """
        address add fd10:8::2/64 dev tun0 nodad
        route add fd10::/16 via fd10:8::1
    """,
    "vpn": """
        address add fd10:8::1/64 dev tun0 nodad
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


def batches(vpn: Vpn, ipv6: bool) -> list[tuple[Where, str]]:
    """The `ip` batches that build the lab, in order, each with the namespace it is for."""
    stages = [LINKS, TUNNELS[vpn], ADDRESSES]
    if ipv6:
        stages.append(ADDRESSES6)
    if vpn == "routes":
        stages += [PRIVATE_ROUTES, PRIVATE_ROUTES6] if ipv6 else [PRIVATE_ROUTES]
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
