"""What the benchmark concludes from its figures, and the link that it emulates."""

import math
import random

import pytest
from bench.main import WAYS, parse
from bench.measure import MEASUREMENTS
from bench.report import markdown
from bench.summary import BARS, METRICS, Bar, Round, median, percentile, related, values, verdicts
from bench.wan import BUFFER, Direction, Wan
from hypothesis import given
from hypothesis import strategies as st

from tpvpn.lab import Lab
from tpvpn.lab.topology import iperf_addresses, served

some = st.lists(st.floats(-1e6, 1e6), min_size=1)


@given(some)
def test_percentile_is_a_value_that_enough_others_do_not_exceed(measured: list[float]) -> None:
    for percent in (0, 50, 99, 100):
        found = percentile(measured, percent)
        assert found in measured
        assert sum(value <= found for value in measured) >= len(measured) * percent / 100
    assert (percentile(measured, 0), percentile(measured, 100)) == (min(measured), max(measured))


@given(some, st.randoms())
def test_median_splits_the_values_and_ignores_their_order(measured: list[float], chance: random.Random) -> None:
    found = median(measured)
    assert sum(value < found for value in measured) <= len(measured) / 2
    assert sum(value > found for value in measured) <= len(measured) / 2
    assert median(chance.sample(measured, len(measured))) == found


@pytest.mark.parametrize(("measured", "middle"), [([3.0], 3.0), ([1.0, 4.0], 2.5), ([9.0, 1.0, 2.0], 2.0)])
def test_median_of_few(measured: list[float], middle: float) -> None:
    assert median(measured) == middle


def test_nothing_measured_is_not_a_number() -> None:
    assert math.isnan(median([]))
    assert math.isnan(percentile([], 99))


ROUNDS: list[Round] = [
    {"direct": {"tcp1_up": 10.0, "ping_idle": 0.1}, "tpvpn": {"tcp1_up": 4.0, "ping_idle": 0.3}},
    {"direct": {"tcp1_up": 20.0, "ping_idle": 0.1}, "tpvpn": {"tcp1_up": 5.0, "ping_idle": 0.9}},
    {"direct": {"tcp1_up": 10.0}, "tpvpn": {"tcp1_up": 3.0}, "tpvpn-socket": {"tcp1_up": 3.0}},
    {"direct": {"tcp1_up": 10.0}, "tpvpn": {}},
]


def test_relations_are_within_a_round() -> None:
    assert related(ROUNDS, "tpvpn", "tcp1_up", "of direct") == pytest.approx(0.3)
    assert related(ROUNDS, "tpvpn", "tcp1_up", "itself") == 4.0
    assert related(ROUNDS, "tpvpn", "ping_idle", "over direct") == pytest.approx(0.5)
    assert math.isnan(related(ROUNDS, "tpvpn", "udp_up", "of direct"))
    assert values(ROUNDS, "tpvpn", "tcp1_up") == [4.0, 5.0, 3.0]


def test_a_tunnel_is_set_against_its_own_bare_stream() -> None:
    rounds: list[Round] = [
        {"direct": {"tcp8_down": 20.0}, "upgrade": {"bare_down": bare, "bare_up": 100.0, "tcp8_down": 2.0}}
        for bare in (2.5, 4.0, 5.0)
    ]
    assert related(rounds, "upgrade", "tcp8_down", "of bare") == pytest.approx(0.5)
    judged = {bar.metric: (value, verdict) for bar, value, verdict in verdicts(rounds, "upgrade")}
    assert judged["tcp8_down"] == (pytest.approx(0.5), False)
    assert judged["tcp8_up"][1] is None


@pytest.mark.parametrize(
    ("side", "value", "passes"),
    [("at least", 5.0, True), ("at least", 4.9, False), ("at most", 5.0, True), ("at most", 5.1, False)],
)
def test_a_bar_includes_its_limit(side: str, value: float, passes: bool) -> None:
    assert Bar("tcp1_up", "itself", side, 5.0).passes(value) is passes  # pyright: ignore[reportArgumentType]


def test_a_bar_without_figures_has_no_verdict() -> None:
    found = {bar.metric: verdict for bar, _, verdict in verdicts(ROUNDS, "tpvpn")}
    assert found["tcp1_up"] is True
    assert found["requests"] is None


def test_each_way_has_an_address_for_itself() -> None:
    addresses = [kind(Lab("bench")).address for kind in WAYS.values()]
    assert len(set(addresses)) == len(addresses)
    assert set(addresses) <= set(iperf_addresses(ipv6=False)) & set(served("cluster", ipv6=False))


def test_what_is_measured_by_default_and_over_a_link() -> None:
    whole, link = parse([]), parse(["--wan", "20,0,100"])
    assert whole.ways == list(WAYS)
    assert whole.only == list(MEASUREMENTS)
    assert link.ways == ["tpvpn", "tpvpn-socket"]
    assert link.only == ["tcp", "ping", "load"]
    assert parse(["--ways", "tpvpn", "--wan", "20,0,100"]).ways == ["tpvpn"]
    with pytest.raises(SystemExit):
        parse(["--ways", "pigeon"])


def test_every_bar_is_about_a_metric() -> None:
    assert {bar.metric for bars in BARS.values() for bar in bars} <= {metric.name for metric in METRICS}


def test_the_page_shows_verdicts_and_failures() -> None:
    machine = {"cpus": 2, "cpu": "a CPU", "kernel": "6.1", "load": 0.5}
    results = {
        "when": "today",
        "machine": machine,
        "seconds": 1.0,
        "wan": None,
        "setting": "Here.",
        "absent": ["a peer"],
    }
    page = markdown(
        results | {"rounds": ROUNDS, "ways": ["direct", "tpvpn", "tpvpn-socket"], "failures": ["udp: it broke"]},
        "plot.svg",
    )
    assert "| TCP, 1 flow up, Gb/s | 10.000 | 4.000 | 0.30 × | at least 0.3 of direct | pass |" in page
    assert "| TCP, 1 flow up, Gb/s | 10.000 | 3.000 | 0.30 × | at least 0.18 of direct | pass |" in page
    assert page.index("## What tpvpn must reach") < page.index("## What tpvpn-socket must reach")
    assert "not measured" in page
    assert "- udp: it broke" in page
    assert "Not installed here: a peer." in page
    assert page.index("shares 2 cores") < page.index("Gb/s")


@pytest.mark.parametrize("text", ["", "1,2", "1,2,3,4", "a,b,c", "-1,0,10", "1,100,10", "1,0,0"])
def test_a_link_that_is_none(text: str) -> None:
    with pytest.raises(ValueError):
        Wan.parse(text)


def test_a_link_in_its_units() -> None:
    assert Wan.parse("20,0.5,200") == Wan(0.020, 0.005, 25e6)


def test_packets_leave_at_the_rate_and_arrive_a_delay_later() -> None:
    direction = Direction(Wan(delay=0.1, loss=0.0, rate=1000.0), random.Random(1))
    assert direction.next_arrival() is None
    direction.receive(b"a" * 10, now=5.0)
    direction.receive(b"b" * 20, now=5.0)
    assert direction.next_arrival() == pytest.approx(5.11)
    assert direction.arrived(5.1099) == []
    assert direction.arrived(5.1101) == [b"a" * 10]
    assert direction.arrived(9.0) == [b"b" * 20]


def test_a_queue_holds_what_leaves_within_the_buffers_time() -> None:
    direction = Direction(Wan(delay=0.0, loss=0.0, rate=1000.0), random.Random(1))
    for _ in range(200):
        direction.receive(b"x", now=0.0)
    assert len(direction.arrived(10.0)) == pytest.approx(BUFFER * 1000, abs=2)
    direction.receive(b"later", now=20.0)
    assert direction.arrived(20.1) == [b"later"]


def test_as_many_are_lost_as_is_said() -> None:
    direction = Direction(Wan(delay=0.0, loss=0.1, rate=1e9), random.Random(1))
    for index in range(10_000):
        direction.receive(b"x", now=float(index))
    assert 8_800 < len(direction.arrived(1e6)) < 9_200
