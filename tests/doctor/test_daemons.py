"""What the doctor makes of NetworkManager, firewalld and ufw; the texts are those of 1.42, 1.3 and 0.36."""

import pytest

from tpvpn.doctor.advice.daemons import Firewalls, NetworkManager, of_firewall_programs, of_network_manager

KEEP_OUT = "match-device=interface-name:tpvpn*"


@pytest.mark.parametrize(
    ("seen", "state", "said", "remedy"),
    [
        (None, "ok", "NetworkManager does not run", ""),
        (NetworkManager(True, ""), "ok", "leaves tpvpn0 alone", ""),
        (NetworkManager(True, "10 (unmanaged)"), "ok", "leaves tpvpn0 alone", ""),
        (NetworkManager(True, "100 (connected (externally))"), "warning", "until `nmcli networking off`", KEEP_OUT),
        (NetworkManager(True, "30 (disconnected)"), "failure", "has taken tpvpn0, which is disconnected", KEEP_OUT),
        (NetworkManager(False, "10 (unmanaged)"), "failure", "networking switched off", "`nmcli networking on`"),
    ],
)
def test_network_manager(seen: NetworkManager | None, state: str, said: str, remedy: str) -> None:
    check = of_network_manager("tpvpn0", seen)
    assert check.state == state and said in check.sentence and remedy in (check.remedy or "")


UFW = "packets to 10.130.0.0/16 are dropped by chain OUTPUT of nft table ip filter (its policy)"
LEGACY = "packets to 10.130.0.0/16 are dropped by chain OUTPUT of iptables table filter (its policy)"
FIREWALLD = "packets to 10.130.0.0/16 are rejected by chain filter_OUTPUT of nft table inet firewalld (handle 7)"


@pytest.mark.parametrize(
    ("obstacles", "seen", "found"),
    [
        ([], Firewalls(False, False), {}),
        ([], Firewalls(True, True), {"firewalld": "ok", "ufw": "ok"}),
        ([UFW], Firewalls(True, True), {"firewalld": "ok", "ufw": "failure"}),
        ([LEGACY], Firewalls(False, True), {"ufw": "failure"}),
        ([FIREWALLD], Firewalls(True, False), {"firewalld": "failure"}),
    ],
)
def test_firewall_programs(obstacles: list[str], seen: Firewalls, found: dict[str, str]) -> None:
    checks = list(of_firewall_programs("tpvpn0", obstacles, seen))
    assert {one.id: one.state for one in checks} == found
    assert all("tpvpn0" in (one.remedy or "tpvpn0") for one in checks)
