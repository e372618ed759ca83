"""Whose a route is, sign by sign."""

import pytest

from tpvpn.route.fib import Link, Nexthop, Route, Rule
from tpvpn.route.owner import owner_of
from tpvpn.route.prefix import Prefix

TEN = Prefix.parse("10.0.0.0/8")


@pytest.mark.parametrize(
    ("device", "kind", "table", "mark", "protocol", "owner"),
    [
        ("tun0", "tun", 254, None, 3, "openvpn"),
        ("corp", "ovpn", 254, None, 3, "openvpn"),
        ("wg0", "wireguard", 254, None, 3, "wireguard"),
        ("office", "wireguard", 254, None, 3, "wireguard"),
        ("office", "tun", 51820, 0xCA6C, 3, "wireguard"),
        ("utun", "tun", 300, 0xCA6C, 3, "wireguard"),
        ("tailscale0", "tun", 52, None, 3, "tailscale"),
        ("tun7", "tun", 52, None, 3, "tailscale"),
        ("wt0", "wireguard", 7120, 0x1BD00, 3, "netbird"),
        ("CloudflareWARP", "tun", 65743, 0x100CF, 3, "warp"),
        ("wg0-mullvad", "wireguard", 1836018789, 0x6D6F6C65, 3, "mullvad"),
        ("eth0", None, 220, None, 4, "strongswan"),
        ("ipsec0", "xfrm", 254, None, 4, "strongswan"),
        ("docker0", "bridge", 254, None, 2, "docker"),
        ("br-0123456789ab", "bridge", 254, None, 2, "docker"),
        ("podman0", "bridge", 254, None, 2, "podman"),
        ("virbr0", "bridge", 254, None, 2, "libvirt"),
        ("eth0", "veth", 254, None, 2, "lan"),
        ("wlp3s0", None, 254, None, 2, "lan"),
        ("home", None, 254, None, 2, "lan"),
        ("eth0", "veth", 254, None, 4, "lan"),
        ("home", None, 254, None, 4, "unknown"),
        ("corp", "tun", 254, None, 2, "unknown"),
        ("corp", "tun", 254, None, 186, "frr"),
        ("tpvpn0", "tun", 254, None, 116, "tpvpn"),
        (None, None, 254, None, 3, "unknown"),
    ],
)  # fmt: skip
def test_owner(device: str | None, kind: str | None, table: int, mark: int | None, protocol: int, owner: str) -> None:
    hop = Nexthop(device)
    rule = Rule(4, 100, table=table, mark=mark, inverted=mark is not None)
    link = Link(2, device, kind) if device else None
    assert owner_of(Route(TEN, table, nexthops=(hop,), protocol=protocol), hop, rule, link).name == owner
