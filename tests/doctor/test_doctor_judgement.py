"""What the doctor makes of what was seen: values in, checks out."""

import errno
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpvpn.doctor.advice import cluster, host, rights
from tpvpn.doctor.advice import session as of_session
from tpvpn.doctor.advice.certificate import validity
from tpvpn.doctor.advice.host import Left, Sudo
from tpvpn.doctor.check import Check
from tpvpn.route.why import Way

NAMESPACES: dict[rights.Scope, str] = {"own": "shop", "manager": "tpvpn", "kube-system": "kube-system"}


@pytest.mark.parametrize(
    ("seconds", "state", "words"),
    [
        (0.9, "ok", "agree"),
        (-45, "warning", "45 s behind"),
        (299, "warning", "5 minutes ahead of"),
        (-3600, "failure", "60 minutes behind"),
        (86400 * 3, "failure", "3 days ahead of"),
    ],
)
def test_clocks(seconds: float, state: str, words: str) -> None:
    found = host.of_clock(seconds)
    assert found.state == state and words in found.sentence


@pytest.mark.parametrize(
    ("answer", "state", "words"),
    [
        ({"up": 5e6, "down": 1.25e8}, "ok", "at least 40.0 Mb/s up and 1.00 Gb/s down"),
        ({"error": "the manager does not answer now"}, "warning", "was not measured: the manager does not answer now"),
    ],
)
def test_speeds(answer: dict[str, Any], state: str, words: str) -> None:
    found = of_session.of_speed(answer)
    assert found.state == state and words in found.sentence


@pytest.mark.parametrize(
    ("sudo", "state"),
    [
        (Sudo(None), "failure"),
        (Sudo(0), "ok"),
        (Sudo(1, "sudo: a password is required"), "warning"),
        (Sudo(1, 'sudo: The "no new privileges" flag is set'), "failure"),
    ],
)
def test_sudo(sudo: Sudo, state: str) -> None:
    assert host.of_privileges("", sudo, "helper").state == state
    assert host.of_privileges("root", sudo, "helper").state == "ok"


def test_the_tun_device() -> None:
    assert host.of_tun(None, elsewhere=False).ok
    assert host.of_tun(errno.ENODEV, elsewhere=True).state == "failure"
    assert host.of_tun(errno.EACCES, elsewhere=True).state == "warning"
    assert host.of_tun(errno.EPERM, elsewhere=True).state == "failure"
    assert "not of UDP" in host.of_offloads(True, True, "5.15.0-91-generic").sentence
    assert host.of_offloads(True, False, "6.18").state == "warning" and not host.of_offloads(False, True, "6.18").ok


def test_a_path_that_is_narrow() -> None:
    assert host.of_mtu("the API server", "eth0", 1500, 1400).sentence.endswith("whose MTU is 1500, the path 1400")
    assert "the path by eth0 carries 600" in host.of_mtu("the API server", "eth0", 1500, 600).sentence


def test_firewalls() -> None:
    surely = "packets to 10.1.0.0/16 are dropped by chain o: let device tpvpn0 pass there; `nft` shows it"
    perhaps = "packets to 10.1.0.0/16 may be dropped by chain o, depending on marks: see that it may pass"
    assert [one.state for one in host.of_firewalls([surely, perhaps])] == ["failure", "warning"]
    assert [one.state for one in host.of_firewalls([])] == ["ok"]


def test_leftovers() -> None:
    assert [one.state for one in host.of_leftovers(Left())] == ["ok"]
    assert [one.state for one in host.of_leftovers(Left(("a",), 1, 2, "a"))] == ["failure", "warning", "warning"]


# -- the cluster -------------------------------------------------------------------------------------------------------


def test_the_way_to_the_api_server() -> None:
    def state(way: Way, trouble: cluster.Trouble = "") -> tuple[str, str]:
        reached = cluster.Reached(trouble, "x", "c", "https://x:1", "", ["10.1.2.3"], 0.01)
        *_, found = cluster.of_api_server(reached, [("10.1.2.3", way)])
        return found.state, found.sentence

    vpn = Way("10.0.0.0/8 dev tun0", "tun0", owner="openvpn", known_by="device name tun0")
    assert state(vpn)[0] == "ok" and "as long as that VPN is up" in state(vpn)[1]
    assert state(vpn, "unreachable")[0] == "warning"
    assert state(Way("default dev eth0", "eth0", owner="lan", known_by="x"), "unreachable")[0] == "ok"
    assert state(Way("10.1.0.0/16 dev tpvpn0", "tpvpn0", owner="tpvpn", known_by="x"))[0] == "failure"
    assert state(Way("no route"))[0] == "failure"


def judged(lacking: set[tuple[str, str, str]], *, installed: bool) -> dict[str, Check]:
    answers = {one: (one.scope, one.verb, one.resource) not in lacking for one in rights.RIGHTS}
    return {one.id: one for one in rights.of_rights(answers, NAMESPACES, installed=installed)}


def test_rights_that_cost_nothing_are_not_missed() -> None:
    everything = {(one.scope, one.verb, one.resource) for one in rights.RIGHTS}
    own = {one for one in everything if one[0] == "own" and one[2] != "services"}
    assert all(one.state == "ok" for one in judged(own, installed=True).values())
    assert all(
        one.state == "ok"
        for one in judged({one for one in everything if one[0] == "manager"}, installed=False).values()
    )
    assert judged(own, installed=False)["rbac"].state == "failure"


def test_a_right_that_is_missing_says_what_it_costs_and_who_gives_it() -> None:
    found = judged({("cluster", "list", "servicecidrs")}, installed=False)["rbac-cluster-list-servicecidrs"]
    assert found.state == "warning" and "the service subnet is learned from an error" in found.sentence
    assert "--verb list --resource servicecidrs.networking.k8s.io" in (found.remedy or "")
    ways = {("manager", "get", "services/proxy"), ("manager", "create", "pods/portforward")}
    assert judged({min(ways)}, installed=True)["rbac"].ok and not judged(ways, installed=True)["rbac"].ok
    assert not judged({("manager", "get", "secrets")}, installed=True)["rbac"].ok


def test_what_cannot_be_asked() -> None:
    answers = dict.fromkeys(rights.RIGHTS)
    found = list(rights.of_rights(answers, NAMESPACES, installed=False))
    assert found[-1].ok and {one.state for one in found[:-1]} == {"warning"}


# -- certificates ------------------------------------------------------------------------------------------------------


def test_a_certificate_as_openssl_has_it(tmp_path: Path) -> None:
    file = str(tmp_path / "c.pem")
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", str(tmp_path / "k"))
    subprocess.run(["openssl", "req", "-x509", *curve, "-days", "20000", "-subj", "/CN=me", "-out", file],
                   check=True, capture_output=True)  # fmt: skip
    shown = subprocess.run(
        ["openssl", "x509", "-noout", "-dates", "-in", file], check=True, capture_output=True, text=True
    )
    since, until = (
        datetime.strptime(line.partition("=")[2], "%b %d %H:%M:%S %Y GMT").replace(tzinfo=UTC)
        for line in shown.stdout.splitlines()
    )
    valid = validity(Path(file).read_text())
    assert valid == (since, until) and until.year > 2049, "of both forms of time"
    assert cluster.of_certificate(valid, since + timedelta(days=1)).state == "ok"
    assert cluster.of_certificate(valid, until - timedelta(hours=1)).state == "warning"
    assert cluster.of_certificate(valid, until + timedelta(hours=1)).state == "failure"
    assert "not valid before" in cluster.of_certificate(valid, since - timedelta(hours=1)).sentence


@given(
    st.text()
    | st.binary(max_size=60).map(lambda data: f"-----BEGIN CERTIFICATE-----\n{data.hex()}\n-----END CERTIFICATE-----")
)
def test_what_is_no_certificate(text: str) -> None:
    with pytest.raises(ValueError):
        validity(text)
