"""What /metrics of real managers says: in Prometheus' format, all that the page lists and nothing else, and truly."""

import contextlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from scapy.layers.inet import IP, UDP

from peers import POD, ROOT, Client, Manager, ended, eventually, lab, running_manager
from tpvpn import __version__
from tpvpn.errors import ManagerError
from tpvpn.kube.helm import CHART
from tpvpn.lab import Lab
from tpvpn.proto.session import Offer

__all__ = ["lab"]
EXITS = ("kernel", "socket")


@pytest.fixture(scope="module")
def managers(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Manager]]:
    with (
        running_manager(lab, tmp_path_factory.mktemp("kernel"), "--linger", "30") as kernel,
        running_manager(lab, tmp_path_factory.mktemp("socket"), "--exit", "socket", "--linger", "30") as sockets,
    ):
        yield {"kernel": kernel, "socket": sockets}


def families(manager: Manager) -> dict[str, Metric]:
    """By the name of their samples, but for a histogram's."""
    found = list(text_string_to_metric_families(manager.get("/metrics")[2]))
    return {one.name + ("_total" if one.type == "counter" else ""): one for one in found}


def documented(section: str) -> dict[str, str]:
    """The kind of each metric that a section of the page names."""
    page = (ROOT / "docs" / "reference" / "metrics.md").read_text()
    rows = page.split(f"## {section}\n")[1].split("\n## ")[0].splitlines()
    cells = [row.split(" | ") for row in rows if row.startswith("| `")]
    return {name: kind for names, kind, *_ in cells for name in re.findall("`([a-z_]+)`", names)}


def value(manager: Manager, name: str, **labels: str) -> float:
    (found,) = (one.value for one in families(manager)[name].samples if one.labels == labels)
    return found


def test_all_that_the_page_lists_is_there_and_nothing_else(managers: dict[str, Manager]) -> None:
    found = {exit: families(managers[exit]) for exit in EXITS}
    listed = documented("Of the manager")
    limit = {"tpvpn_manager_memory_limit_bytes"}  # where the machine that tests has one
    assert set(found["socket"]) | limit == set(listed)
    assert {name for name in listed if re.search("flows|buffer", name)} == set(found["socket"]) - set(found["kernel"])
    for families_ in found.values():
        for name, one in families_.items():
            assert (one.type, bool(one.documentation)) == (listed[name], True)
            assert one.samples
            assert not re.search("_(ms|kb|milliseconds|megabytes)(_|$)", name), "base units"


def expressions() -> dict[str, str]:
    """Those of the chart's alerts and dashboard, by where they stand."""
    alerts = yaml.safe_load((CHART / "monitoring" / "alerts.yaml").read_text())
    board = json.loads((CHART / "monitoring" / "dashboard.json").read_text())
    found = {one["alert"]: one["expr"] for one in alerts}
    for panel in board["panels"]:
        found |= {f"{panel['title']} {target['refId']}": target["expr"] for target in panel["targets"]}
    found |= {one["name"]: one["definition"] for one in board["templating"]["list"] if "definition" in one}
    return found


def test_dashboard_and_alerts_ask_for_what_is_there(managers: dict[str, Manager]) -> None:
    labels: dict[str, set[str]] = {"up": set()}
    for exit in EXITS:
        for sample in (sample for one in families(managers[exit]).values() for sample in one.samples):
            labels.setdefault(sample.name, set()).update(sample.labels)
    labels["tpvpn_manager_memory_limit_bytes"] = set()
    asked = set[str]()
    for where, expression in expressions().items():
        for name, selector in METRIC.findall(expression):
            assert name in labels, f"{where}: {name}"
            wanted = set(re.findall(r"(\w+)=", selector or ""))
            assert wanted <= labels[name] | {"namespace", "pod"}, f"{where}: {name}{selector}"
            asked.add(name)
    missing = {name for name in labels if name.startswith("tpvpn_")} - asked
    assert missing <= {"tpvpn_manager_exit_info"} | {name for name in labels if re.search("_(sum|count)$", name)}


METRIC = re.compile(r"\b(up|tpvpn_\w+|process_\w+)\b(\{[^}]*\})?")


def test_expressions_are_whole_and_bound_to_one_manager() -> None:
    for where, expression in expressions().items():
        bare = re.sub(r'"[^"]*"', "", expression)
        for opening, closing in ("()", "[]", "{}"):
            assert bare.count(opening) == bare.count(closing), where
        assert expression.count('"') % 2 == 0, where
        if not expression.startswith("label_values"):
            assert 'namespace="' in expression, where


def test_of_the_process(managers: dict[str, Manager]) -> None:
    manager = managers["kernel"]
    (build,) = families(manager)["tpvpn_manager_build_info"].samples
    assert (build.labels["version"], build.value) == (__version__, 1)
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - started_at(manager.process.pid)
    assert value(manager, "process_start_time_seconds") == pytest.approx(time.time() - age, abs=3)
    assert value(manager, "process_resident_memory_bytes") == pytest.approx(manager.rss() << 10, rel=0.2)
    assert 0 < value(manager, "process_cpu_seconds_total") < age + 1
    eventually(lambda: manager.metrics()["tpvpn_manager_event_loop_lag_seconds_count"] > 1, 5, "two looks")


def started_at(pid: int) -> float:
    """Seconds after the machine's start (proc(5))."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("exit", EXITS)
def test_what_happens_is_counted(managers: dict[str, Manager], exit: str) -> None:
    manager = managers[exit]
    before = manager.metrics()
    with pytest.raises(ManagerError), manager.session(b"wrong"):
        pass
    with manager.dial() as stranger:
        stranger.sendall(b"hello\r\n\r\n")
        ended(stranger, 3)
    with manager.session() as client:
        client.packet(IP(src=client.terms.ipv4, dst=POD) / UDP(sport=9, dport=7) / b"echo")
        assert client.next_packet()
        client.packet(IP(src="10.1.2.3", dst=POD) / UDP(sport=9, dport=7))
        assert client.answers()
        during, held = difference(manager, before), client.held
    eventually(lambda: difference(manager, before)['tpvpn_manager_sessions{state="lingering"}'] == 1, 3, "it lingers")
    with contextlib.closing(Client(manager.dial())) as client:
        client.shake_hands(manager.token, held.wanted(Offer("laptop"), 0), secret=held.secret)
        assert client.answers()
        after = difference(manager, before)
    assert {name: during[name] for name in DURING} == DURING
    assert {name: after[name] for name in AFTER} == AFTER
    for direction in ("from_client", "to_client"):  # a kernel speaks of itself too (RFC 4861)
        packets = during[f'tpvpn_manager_packets_total{{direction="{direction}"}}']
        assert 1 <= packets < 10
        assert 32 * packets < during[f'tpvpn_manager_bytes_total{{direction="{direction}"}}'] < 200 * packets
    assert during['tpvpn_manager_flows{protocol="udp"}'] == (1 if exit == "socket" else 0)


DURING = {
    'tpvpn_manager_sessions{state="linked"}': 1,
    "tpvpn_manager_links": 1,
    "tpvpn_manager_sessions_opened_total": 1,
    "tpvpn_manager_links_opened_total": 1,
    'tpvpn_manager_refusals_total{reason="token"}': 1,
    'tpvpn_manager_refusals_total{reason="protocol"}': 1,
    "tpvpn_manager_refusals_total": 2,
    'tpvpn_manager_dropped_packets_total{reason="foreign"}': 1,
    "tpvpn_manager_dropped_packets_total": 1,
}
AFTER = {
    "tpvpn_manager_sessions": 1,
    "tpvpn_manager_sessions_opened_total": 1,
    "tpvpn_manager_sessions_resumed_total": 1,
    "tpvpn_manager_links_opened_total": 2,
}


def difference(manager: Manager, before: Counter[str]) -> Counter[str]:
    now = manager.metrics()
    now.subtract(before)
    return now
