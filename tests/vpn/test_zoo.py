"""VPNs that cannot run here, as the kernel sees them: their rules, routes and firewalls, in tests/vpn/zoo.

A file has sections: [device] the VPN's device, a pair whose other end is the VPN's far end with its hosts; [ip] and
[ip6] lines for `ip -batch` on the laptop, [far end] at the other end, [nft] for `nft -f`; [expect] whether `plan` is ok
or refused, and a line for each IPv4 subnet, or each conflict of it. To add one, paste what the VPN's laptop shows.
"""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from laptop import ALLOWED, CLUSTER4, WANTED4, Laptop, lab_with_manager
from textview import sections

from tpvpn.lab import Lab, Where
from tpvpn.lab.topology import VPN_HOSTS

ZOO = sorted((Path(__file__).parent / "zoo").glob("*.txt"))


class Zoo:
    """A laptop with one of them on it, and what is expected."""

    def __init__(self, laptop: Laptop, case: dict[str, list[str]]) -> None:
        self.laptop, self.expected = laptop, case["expect"]
        lab = laptop.lab
        (device,) = case["device"]
        laptop.sh('ip link add "$1" type veth peer name "$1" netns "$2"', device, lab.namespace("vpn"))
        for where in ("laptop", "vpn"):
            lab.run(where, ["ip", "link", "set", device, "up"])
        batch(lab, "vpn", "-4", case.get("far end", []))
        batch(lab, "laptop", "-4", case.get("ip", []))
        batch(lab, "laptop", "-6", case.get("ip6", []))
        lab.run("laptop", ["nft", "-f", "-"], input="\n".join(case.get("nft", [])))
        laptop.settle()
        laptop.reaches("vpn", VPN_HOSTS)


def batch(lab: Lab, where: Where, family: str, lines: list[str]) -> None:
    """Run `ip` commands, each of which must succeed."""
    done = lab.run(where, ["ip", family, "-batch", "-"], input="\n".join(lines) + "\n", check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module", params=ZOO, ids=lambda path: path.stem)
def zoo(request: pytest.FixtureRequest) -> Iterator[Zoo]:
    with lab_with_manager("none") as laptop:
        yield Zoo(laptop, sections(request.param.read_text()))


def plan(laptop: Laptop, *options: str) -> subprocess.CompletedProcess[str]:
    return laptop.tpvpn("plan", "--output", "json", *WANTED4, *options)


def test_the_plan_names_every_conflict(zoo: Zoo) -> None:
    before = zoo.laptop.state()
    done = plan(zoo.laptop)
    assert done.returncode in (0, 3), done.stderr
    found = ["refused" if done.returncode == 3 else "ok"]
    for subnet in json.loads(done.stdout)["subnets"]:
        found += [
            "{cidr} {verdict} {relation} {route} dev {device} table {table} {owner}".format(**subnet | one)
            for one in subnet["conflicts"]
        ] or ["{cidr} {verdict}".format(**subnet)]
    assert found == zoo.expected
    assert zoo.laptop.state() == before


def test_what_is_refused_changes_nothing(zoo: Zoo) -> None:
    before = zoo.laptop.state()
    done = zoo.laptop.connect("--", "true", wanted=WANTED4)
    assert done.returncode == (3 if zoo.expected[0] == "refused" else 0), done.stderr
    zoo.laptop.is_as(before)


def test_allowed_both_are_reached(zoo: Zoo) -> None:
    laptop = zoo.laptop
    before, theirs = laptop.state(), laptop.theirs()
    with laptop.connected(*ALLOWED, wanted=WANTED4) as session:
        laptop.reaches("cluster", CLUSTER4)
        laptop.reaches("vpn", VPN_HOSTS)
        assert "shadowed" not in session.said
        assert laptop.theirs() == theirs
    assert laptop.probe(CLUSTER4, 0.5) == dict.fromkeys(CLUSTER4)
    laptop.reaches("vpn", VPN_HOSTS)
    laptop.is_as(before)
