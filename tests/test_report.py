"""The plan's JSON contract, its text and the sentence of a refusal."""

import json
import shlex
import subprocess

import pytest

from tpvpn.report import as_json, as_text, refusal
from tpvpn.route.advice import percent
from tpvpn.route.fib import Link, Nexthop, Route, Rule, View
from tpvpn.route.plan import make_plan
from tpvpn.route.prefix import Prefix
from tpvpn.route.verdict import Plan, Policy, Wanted

VIEW = View(
    (Rule(4, 0, table=255), Rule(4, 32766, table=254)),
    (
        Route(Prefix.parse("0.0.0.0/0"), nexthops=(Nexthop("eth0", "192.0.2.1"),)),
        Route(Prefix.parse("10.0.0.0/8"), nexthops=(Nexthop("tun0", "10.8.0.1"),)),
        Route(Prefix.parse("172.17.0.0/16"), nexthops=(Nexthop("docker0"),), protocol=2),
    ),
    (Link(2, "eth0"), Link(3, "tun0", "tun"), Link(4, "docker0", "bridge", carrier=False)),
)


def plan(*allow: str, wanted: str = "10.130.0.0/16 10.132.0.0/16", skip: bool = False) -> Plan:
    asked = [Wanted(Prefix.parse(text), "service", "ServiceCIDR API") for text in wanted.split()]
    never = ((Prefix.parse("10.130.9.9"), "API server"),)
    policy = Policy(tuple(map(Prefix.parse, allow)), never, "skip" if skip else "fail")
    return make_plan(VIEW, asked, policy)


def test_json_is_the_contract() -> None:
    value = as_json(plan("10.132.0.0/16"))
    assert value == json.loads(json.dumps(value))
    conflict = {"route": "10.0.0.0/8", "device": "tun0", "owner": "openvpn", "gateway": "10.8.0.1", "table": 254}
    subnet = {"kind": "service", "source": "ServiceCIDR API", "virtual": None}
    assert value == {
        "schema": "tpvpn.plan/1",
        "ok": False,
        "subnets": [
            {
                **subnet,
                "cidr": "10.130.0.0/16",
                "verdict": "conflict",
                "routes": [],
                "withheld": ["10.130.0.0/16"],
                "conflicts": [{**conflict, "relation": "covers", "allowed": False}],
            },
            {
                **subnet,
                "cidr": "10.132.0.0/16",
                "verdict": "routed",
                "routes": ["10.132.0.0/16"],
                "withheld": [],
                "conflicts": [{**conflict, "relation": "covers", "allowed": True}],
            },
        ],
        "never_proxy": [{"cidr": "10.130.9.9/32", "reason": "API server", "route": "10.0.0.0/8 via 10.8.0.1 dev tun0"}],
        "warnings": [],
        "fixes": value["fixes"],
    }
    assert all(set(fix) == {"description", "command"} for fix in value["fixes"])


def test_text_names_everything() -> None:
    text = as_text(plan(wanted="10.130.0.0/16 10.132.0.0/16 172.17.0.0/24"))
    assert text == (
        "connect would refuse: 2 of 3 subnets in conflict with private routes.\n"
        "\n"
        "10.130.0.0/16  conflict  service, from ServiceCIDR API\n"
        "    conflict  inside 10.0.0.0/8 via 10.8.0.1 dev tun0 (openvpn, table main)\n"
        "              10.130.0.0/16 is 0.4 % of tun0's 10.0.0.0/8; hosts of openvpn in it would\n"
        "              become unreachable\n"
        "10.132.0.0/16  conflict  service, from ServiceCIDR API\n"
        "    conflict  inside 10.0.0.0/8 via 10.8.0.1 dev tun0 (openvpn, table main)\n"
        "              10.132.0.0/16 is 0.4 % of tun0's 10.0.0.0/8; hosts of openvpn in it would\n"
        "              become unreachable\n"
        "172.17.0.0/24  routed    service, from ServiceCIDR API\n"
        "\n"
        "Never proxied\n"
        "  10.130.9.9/32 (API server) goes by: 10.0.0.0/8 via 10.8.0.1 dev tun0\n"
        "\n"
        "Warnings\n"
        "  - 172.17.0.0/16 dev docker0 (docker) overlaps 172.17.0.0/24, but docker0 has no\n"
        "    carrier: it is no conflict now, and becomes one when the device is used\n"
        "\n"
        "If no host that you reach by tun0 (openvpn, known by device name tun0) is in\n"
        "10.130.0.0/16 or 10.132.0.0/16, allow it (for good: allowConflictingSubnets:\n"
        "[10.130.0.0/16, 10.132.0.0/16] under client.routing in ~/.config/tpvpn/config.yaml):\n"
        "  tpvpn connect --allow-conflicting-subnets 10.130.0.0/16 \\\n"
        "    --allow-conflicting-subnets 10.132.0.0/16\n"
        "\n"
        "The same for everyone, by the cluster's admin:\n"
        "  tpvpn helm upgrade \\\n"
        "    --set 'client.routing.allowConflictingSubnets={10.130.0.0/16,10.132.0.0/16}'\n"
        "\n"
        "Connect without what conflicts, which stays as it is:\n"
        "  tpvpn connect --on-conflict skip\n"
        "\n"
        "Route nothing of it but single hosts, 10.130.0.1 for example:\n"
        "  tpvpn connect --on-conflict hosts --host 10.130.0.1\n"
        "\n"
        "Keep both: reach what conflicts by other addresses, as `tpvpn plan` shows them:\n"
        "  tpvpn connect --on-conflict virtual\n"
    )


def test_partial_and_allowed() -> None:
    text = as_text(plan("10.130.0.0/17", "10.132.0.0/16", skip=True))
    assert text.startswith("connect would go ahead: of 2 subnets, 1 routed, 1 partial.\n")
    assert "    routed    10.130.0.0/17\n    withheld  10.130.128.0/17\n" in text
    assert "    allowed   inside 10.0.0.0/8" in text and "openvpn in it are hidden" in " ".join(text.split())


def test_commands_survive_the_shell() -> None:
    printed = as_text(plan()).split("config.yaml):\n")[1].split("\n\n")
    for fix, shown in zip(plan().fixes, [printed[0], *(part.split(":\n")[1] for part in printed[1:])], strict=True):
        pasted = subprocess.run(["bash", "-c", f"printf '%s\\n' {shown}"], capture_output=True, text=True, check=True)
        assert pasted.stdout.splitlines() == shlex.split(fix.command)


def test_colour_only_when_asked() -> None:
    assert "\x1b" not in as_text(plan())
    assert "\x1b[31mconflict\x1b[0m" in as_text(plan(), colour=True)


def test_width() -> None:
    many = " ".join(f"10.{number}.0.0/24" for number in range(40))
    for skip in (False, True):
        lines = as_text(plan("10.1.0.0/25", wanted=many, skip=skip)).splitlines()
        assert max(len(line) for line in lines if "--set" not in line) <= 88


def test_refusal_names_all() -> None:
    error = refusal(plan("10.130.0.0/17"))
    assert error.exit_code == 3
    assert str(error) == (
        "10.130.0.0/16 (service) with 10.0.0.0/8 via 10.8.0.1 dev tun0 (openvpn, table main); "
        "10.132.0.0/16 (service) with 10.0.0.0/8 via 10.8.0.1 dev tun0 (openvpn, table main): mapping this could make "
        "hosts there unreachable; allow it with `tpvpn connect --allow-conflicting-subnets 10.130.0.0/17 "
        "--allow-conflicting-subnets 10.130.128.0/17 --allow-conflicting-subnets 10.132.0.0/16`, or see `tpvpn plan`"
    )


@pytest.mark.parametrize(
    ("ratio", "text"),
    [
        (0.5, "50 %"),
        (1 / 256, "0.4 %"),
        (1 / 3, "33.3 %"),
        (1 / 16, "6.2 %"),
        (0.001, "0.1 %"),
        (2**-24, "less than 0.1 %"),
    ],
)
def test_percent(ratio: float, text: str) -> None:
    assert percent(ratio) == text
