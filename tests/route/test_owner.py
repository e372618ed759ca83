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


@pytest.mark.parametrize(
    ("device", "holder", "owner", "evidence"),
    [
        ("tun0", "openvpn", "openvpn", "process openvpn, which has tun0 open"),
        ("tun0", "openconnect", "openconnect", "process openconnect, which has tun0 open"),
        ("tun0", "vpnagentd", "anyconnect", "process vpnagentd, which has tun0 open"),
        ("tun0", "wireguard-go", "wireguard", "process wireguard-go, which has tun0 open"),
        ("gpd0", "PanGPS", "globalprotect", "process PanGPS, which has gpd0 open"),
        ("wg7", "homemade", "wireguard", "device name wg7"),
        ("tun0", "homemade", "unknown", "process homemade, which has tun0 open"),
        ("tun0", None, "openvpn", "device name tun0"),
        ("corp", None, "unknown", "no sign of any program"),
    ],
)
def test_the_program_that_has_the_device_open(device: str, holder: str | None, owner: str, evidence: str) -> None:
    hop, link = Nexthop(device), Link(2, device, "tun", holder=holder)
    assert owner_of(Route(TEN, nexthops=(hop,), protocol=3), hop, Rule(4, 32766, table=254), link) == (owner, evidence)


@pytest.mark.parametrize(
    ("rule", "owner", "evidence"),
    [
        (Rule(4, 5270, table=77), "tailscale", "rule preference 5270"),
        (Rule(4, 105, table=77), "netbird", "rule preference 105"),
        (Rule(4, 220, table=77), "strongswan", "rule preference 220"),
        (Rule(4, 9001, table=77), "sing-box", "rule preference 9001"),
        (Rule(4, 300, table=77, mark=0xCA6C, inverted=True), "wireguard", "firewall mark 0xca6c of rule 300"),
        (Rule(4, 300, table=51821, mark=51821, inverted=True), "wireguard", "rule 300, as wg-quick writes it"),
        (Rule(4, 300, table=77), "unknown", "no sign of any program"),
    ],
)
def test_the_rule_that_leads_there(rule: Rule, owner: str, evidence: str) -> None:
    hop = Nexthop("corp")
    assert owner_of(Route(TEN, rule.table, nexthops=(hop,)), hop, rule, Link(2, "corp", "tun")) == (owner, evidence)
