"""The screen of a session: never wider or higher than the terminal, what matters most on top."""

import copy
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpvpn.cli.view import Rates, Style, duration, screen
from tpvpn.dns.policy import as_written
from tpvpn.report import bits, size
from tpvpn.sockdiag import Flow
from tpvpn.talkers import busiest

SUBNET = {"cidr": "10.130.0.0/16", "kind": "service", "verdict": "routed", "routes": ["10.130.0.0/16"], "virtual": None}
CONFLICT = {"route": "10.0.0.0/8", "device": "tun0", "owner": "openvpn", "allowed": False}
TALKER = {
    "address": "10.130.0.80",
    "port": 80,
    "name": "web.default",
    "connections": 2,
    "sent_rate": 8,
    "received_rate": 9,
}
STATUS = {
    "name": "default",
    "state": "ready",
    "since": "2026-01-01T09:00:00+00:00",
    "manager": {"endpoint": "https://192.0.2.1:6443", "exit": {"ipv4": "kernel", "ipv6": "socket"}},
    "rtt": 0.0123,
    "links": 1,
    "reconnects": 0,
    "traffic": {"sent_bytes": 12_300, "received_bytes": 4},
    "talkers": [TALKER],
    "shadowed": {},
    "plan": {"subnets": [{**SUBNET, "conflicts": []}], "warnings": []},
    "dns": {"warnings": []},
}
PLAIN, RICH = Style(colour=False, unicode=False), Style(colour=True, unicode=True)


def status(**change) -> dict:
    return copy.deepcopy(STATUS) | change


def seen(lines: list[str]) -> list[str]:
    """Without the colours."""
    return [re.sub(r"\x1b\[\d+m", "", line) for line in lines]


def test_what_is_shown() -> None:
    rates = Rates()
    rates.add(1.0, {"sent_bytes": 0, "received_bytes": 0})
    rates.add(3.0, {"sent_bytes": 250_000, "received_bytes": 1_000})
    lines = screen(status(), rates, ["09:30:00 hello"], 80, 24, PLAIN)
    assert lines[0].startswith("tpvpn default  ready ")
    assert lines[1] == "https://192.0.2.1:6443, kernel and socket exit, 1 link, RTT 12.3 ms"
    assert lines[3].split() == ["up", "1.00", "Mb/s", "@", "12.3", "kB"]
    assert lines[4].split() == ["down", "4.00", "kb/s", ".", "4", "B"]
    assert "  10.130.0.0/16  routed    service" in lines
    assert lines[lines.index("messages") + 1] == "  09:30:00 hello"
    assert lines[-1].split() == ["web.default:80", "(2)", "64", "b/s", "up", "72", "b/s", "down"]


def test_verdicts_say_why() -> None:
    subnets = [
        {**SUBNET, "verdict": "conflict", "routes": [], "conflicts": [CONFLICT]},
        {**SUBNET, "cidr": "10.132.0.0/16", "routes": [], "conflicts": [{**CONFLICT, "allowed": True}]},
        {
            **SUBNET,
            "cidr": "10.133.0.0/16",
            "verdict": "virtual",
            "routes": [],
            "virtual": "246.1.0.0/16",
            "conflicts": [],
        },
    ]
    changed = status(plan={"subnets": subnets, "warnings": ["careful"]}, shadowed={"10.130.0.0/16": "shadowed by eth0"})
    lines = screen(changed, Rates(), [], 120, 30, PLAIN)
    assert "  10.130.0.0/16  conflict  service  against 10.0.0.0/8 on tun0 (openvpn)" in lines
    assert "  10.132.0.0/16  routed    service  before 10.0.0.0/8 on tun0 (openvpn)" in lines
    assert "  10.133.0.0/16  virtual   service  at 246.1.0.0/16" in lines
    assert "  warning: careful" in lines


def test_what_others_say_moves_nothing() -> None:
    """A name that the cluster gives, for example."""
    talkers = [{**TALKER, "name": "\x1b[2Jweb\r\n\u202e\u4e2d\u0301"}]
    assert "  ?[2Jweb?????:80 (2)" in screen(status(talkers=talkers), Rates(), [], 80, 24, RICH)[-1]


@given(
    st.integers(1, 200),
    st.integers(1, 60),
    st.integers(0, 40),
    st.integers(0, 40),
    st.lists(st.text(max_size=120), max_size=20),
    st.sampled_from([PLAIN, RICH]),
)
def test_it_fits(width: int, height: int, subnets: int, talkers: int, messages: list[str], style: Style) -> None:
    changed = status(
        plan={"subnets": [{**SUBNET, "conflicts": [CONFLICT]}] * subnets, "warnings": ["w" * 90] * (subnets % 3)},
        talkers=[{**TALKER, "name": "n" * talkers or None, "address": "fd00:130::80"}] * talkers,
    )
    lines = screen(changed, Rates(), messages, width, height, style)
    assert len(lines) <= height
    assert all(len(line) <= max(width, 20) for line in seen(lines))
    assert lines[0] and all(line.isprintable() for line in seen(lines))
    if style is PLAIN:
        assert "".join(lines).isascii() and "\x1b" not in "".join(lines)


@pytest.mark.parametrize(
    ("rate", "shown"),
    [
        (0, "0 b/s"),
        (1, "8 b/s"),
        (124.9, "999 b/s"),
        (125, "1.00 kb/s"),
        (1_540_000, "12.3 Mb/s"),
        (1.2e9, "9.60 Gb/s"),
    ],
)
def test_rates(rate: float, shown: str) -> None:
    assert bits(rate) == shown


@pytest.mark.parametrize(
    ("count", "shown"), [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (99_960, "100 kB"), (2e15, "2000 TB")]
)
def test_sizes(count: float, shown: str) -> None:
    assert size(count) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(-1, "0 s"), (59.9, "59 s"), (60, "1 min 0 s"), (3_725, "1 h 2 min"), (90_000, "1 d 1 h"), (864_000, "10 d 0 h")],
)
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_the_busiest_come_first_by_destination() -> None:
    before = {b"1": Flow(b"1", "10.0.0.1", 80, 0, 100), b"3": Flow(b"3", "10.0.0.2", 80, 5000, 0)}
    found = [
        Flow(b"1", "10.0.0.1", 80, 0, 300),
        Flow(b"2", "10.0.0.1", 80, 10, 50),
        Flow(b"3", "10.0.0.2", 80, 5000, 0),
    ]
    first, second = busiest(found, before, 2.0)
    assert (first.address, first.connections, first.received_bytes, first.received_rate) == ("10.0.0.1", 2, 350, 125)
    assert (second.address, second.sent_bytes, second.sent_rate) == ("10.0.0.2", 5000, 0)
    assert all(one.sent_rate == one.received_rate == 0 for one in busiest(found, {}, 2.0)), "nothing to compare with"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("web.default.svc.cluster.local.", "web.default"),
        ("db-0.db.default.svc.cluster.local.", "db-0.db.default"),
        ("10-132-0-10.default.pod.cluster.local.", "10-132-0-10.default.pod"),
        ("host.example.com.", "host.example.com"),
    ],
)
def test_names_as_people_write_them(name: str, shown: str) -> None:
    assert as_written(name, "cluster.local") == shown
