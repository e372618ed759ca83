"""The kernel as the oracle: what `ip route get` says in a namespace of random rules and routes, `View.lookup` says too.

And `tpvpn plan` in such a namespace: exit codes, output, and that it changes nothing.
"""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from textview import read_route, read_rule, sections
from views import ordered

from tpvpn.route.fib import Link, Nexthop, Route, Rule, View
from tpvpn.route.prefix import Prefix

DEVICES = ("eth0", "tun0", "wg0")


def ip(name: str, *words: str, text: str | None = None) -> str:
    command = ["ip", "-n", name, *words]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


@pytest.fixture
def laptop() -> Iterator[str]:
    """A namespace with three devices that are up and have carrier, 192.0.2.10 on the first, and a default route."""
    name = f"tv{os.getpid()}route"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        ip(name, "link", "set", "lo", "up")
        for device in DEVICES:
            ip(name, "link", "add", device, "type", "veth", "peer", "name", f"{device}-peer")
            for end in (device, f"{device}-peer"):
                ip(name, "link", "set", end, "addrgenmode", "none")  # no address that comes up later
                ip(name, "link", "set", end, "up")
        ip(name, "addr", "add", "192.0.2.10/24", "dev", "eth0")
        ip(name, "route", "add", "default", "via", "192.0.2.1", "dev", "eth0")
        yield name
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


def random_route(source: random.Random) -> Route:
    length = source.choice((8, 9, 10, 11, 32))
    prefix = Prefix.around(4, 10 << 24 | source.getrandbits(3) << 21 | source.getrandbits(1), length)
    kind = source.choice((*["unicast"] * 9, "throw", "throw", "blackhole", "unreachable", "prohibit"))
    hops = (Nexthop(source.choice(DEVICES)),) if kind == "unicast" else ()
    return Route(prefix, source.choice((254, 52, 100)), kind, hops, metric=source.choice((0, 50, 100)))


def random_rule(source: random.Random) -> Rule:
    destination = random_route(source).prefix if source.random() < 0.3 else None
    selectors = {
        "destination": destination,
        "mark": source.choice((None, None, 5)),
        "iif": source.choice((None, None, "lo", "tun0")),
        "inverted": source.random() < 0.3,
    }
    preference = source.randrange(100, 30000)
    if source.random() < 0.2:
        return Rule(4, preference, "goto", goto=32766, **selectors)
    if source.random() < 0.05:
        return Rule(4, preference, source.choice(("blackhole", "unreachable", "prohibit")), **selectors)
    suppress = source.choice((None, None, 0, 8, 10))
    return Rule(4, preference, table=source.choice((52, 100)), suppress_prefixlength=suppress, **selectors)


def rule_words(rule: Rule) -> str:
    words = ["rule add", "not" if rule.inverted else "", f"pref {rule.preference} from all"]
    words += [f"to {rule.destination}"] if rule.destination else []
    words += [f"fwmark {rule.mark}"] if rule.mark else []
    words += [f"iif {rule.iif}"] if rule.iif else []
    words += {"lookup": [f"lookup {rule.table}"], "goto": [f"goto {rule.goto}"]}.get(
        rule.action, [f"type {rule.action}"]
    )
    words += [] if rule.suppress_prefixlength is None else [f"suppress_prefixlength {rule.suppress_prefixlength}"]
    return " ".join(words)


def outcome(name: str, address: str, mark: int) -> str:
    """The device of the kernel's answer, or "none"."""
    words = ["ip", "-n", name, "route", "get", address, *(["mark", str(mark)] if mark else [])]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    return done.stdout.split(" dev ")[1].split()[0] if done.returncode == 0 else "none"


@pytest.mark.parametrize("seed", (0, 1, 3, 4, 5, 6))
def test_lookup_is_the_kernels(laptop: str, seed: int) -> None:
    source = random.Random(seed)
    routes = {(r.prefix, r.table, r.metric): r for r in (random_route(source) for _ in range(20))}.values()
    rules = ordered([random_rule(source) for _ in range(6)])
    batch = [f"route add {route} table {route.table} metric {route.metric}" for route in routes]
    batch += [rule_words(rule) for rule in rules if 0 < rule.preference < 32766]
    ip(laptop, "-batch", "-", text="\n".join(batch))
    default = read_route("default via 192.0.2.1 dev eth0", 4)
    view = View(rules, (*routes, default), tuple(Link(i, d) for i, d in enumerate(DEVICES, 2)))
    printed = sections("[rules]\n" + ip(laptop, "rule"))["rules"]
    assert [replace(read_rule(line, 4), protocol=0) for line in printed] == [
        rule for rule in rules if rule.version == 4
    ]
    seen = set[str]()
    for _ in range(25):
        host = Prefix(4, 10 << 24 | source.getrandbits(3) << 21 | source.getrandbits(1), 32)
        for mark in (0, 5):
            answer = view.lookup(host, mark=mark)
            expected = answer.route.device if answer.delivers and answer.route else "none"
            assert outcome(laptop, host.address(), mark) == expected, f"{host} mark {mark}: {answer}"
            seen.add(expected or "")
    assert len(seen) > 1


def tpvpn_plan(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [
        "ip",
        "netns",
        "exec",
        name,
        sys.executable,
        "-c",
        "from tpvpn.cli import main; raise SystemExit(main())",
    ]
    return subprocess.run([*command, "plan", *words], capture_output=True, text=True, timeout=30)


def state(name: str) -> list[str]:
    return [
        ip(name, *words.split()) for words in ("rule", "-6 rule", "route show table all", "-6 route show table all")
    ]


def test_plan_command(laptop: str) -> None:
    ip(laptop, "addr", "add", "10.8.0.2/24", "dev", "tun0")
    ip(laptop, "route", "add", "10.0.0.0/8", "via", "10.8.0.1", "dev", "tun0")
    before = state(laptop)
    cidrs = ("--service-cidr", "10.130.0.0/16", "--pod-cidr", "10.132.0.0/16")
    begin = time.monotonic()
    refused = tpvpn_plan(laptop, *cidrs, "--output", "json")
    assert time.monotonic() - begin < 5
    assert refused.returncode == 3 and refused.stderr == ""
    value = json.loads(refused.stdout)
    assert [subnet["conflicts"][0]["route"] for subnet in value["subnets"]] == ["10.0.0.0/8"] * 2
    allowed = tpvpn_plan(laptop, *cidrs, "--allow-conflicting-subnets", "10.128.0.0/9")
    assert allowed.returncode == 0 and "2 routed" in allowed.stdout
    assert tpvpn_plan(laptop, *cidrs, "--on-conflict", "skip").returncode == 0
    wrong = tpvpn_plan(laptop, "--service-cidr", "10.130.0.1/16")
    assert wrong.returncode == 2 and wrong.stdout == ""
    assert wrong.stderr == (
        "tpvpn: --service-cidr: 10.130.0.1/16 has host bits set; the network is 10.130.0.0/16, give that instead\n"
    )
    assert tpvpn_plan(laptop).returncode == 4, "neither subnets nor a kubeconfig"
    assert state(laptop) == before
