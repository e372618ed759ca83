"""Reading: what it costs, what it leaves alone, what it says without the right."""

import errno
import subprocess
import sys
import time

import pytest
from oracle import DEVICE, OWN, SUBNETS, Laptop, laptop

from pod import inside, namespace
from tpvpn.firewall import nftables
from tpvpn.firewall.model import Firewall
from tpvpn.firewall.obstacles import obstacles
from tpvpn.firewall.read import read
from tpvpn.route.prefix import Prefix


def test_nothing_is_read_of_an_empty_namespace_and_no_module_is_asked_for() -> None:
    with namespace("fw") as name, inside(name):
        firewall = read()
        assert firewall == Firewall((), {"lo": 1})
        assert obstacles(firewall, DEVICE, OWN, SUBNETS) == []
        with open("/proc/thread-self/net/ip_tables_names") as names:
            assert names.read() == ""


def test_ten_thousand_rules_are_read_in_a_moment() -> None:
    lines = ["table inet big {", "chain out { type filter hook output priority 0; policy drop;"]
    for i in range(5000):
        lines.append(f"ip daddr 11.{i >> 8}.{i & 255}.0/24 tcp dport {i + 1} counter accept")
        lines.append(f'oifname "wg{i}" ct state new,established counter accept')
    with laptop() as host:
        host.install("nft", "\n".join((*lines, "}", "}")))
        start = time.process_time()
        firewall = host.read()
        between = time.process_time()
        said = obstacles(firewall, DEVICE, OWN, SUBNETS)
        end = time.process_time()
    print(f"10,000 rules read in {1000 * (between - start):.0f} ms, walked in {1000 * (end - between):.0f} ms")
    assert len(said) == 1 and "policy" in said[0]
    assert end - start < 1.5


def test_a_set_is_read_only_where_a_rule_on_the_way_looks_into_it() -> None:
    elements = ",".join(f"20.{i >> 8}.{i & 255}.0/25" for i in range(20000))
    rules = (
        f"table inet lists {{ set long {{ type ipv4_addr; flags interval; elements = {{ {elements} }}; }}\n"
        "chain aside { ip daddr @long drop\n}\n chain way { type filter hook HOOK priority 0; jump aside; }; }"
    )
    costs: dict[str, float] = {}
    for hook in ("forward", "output"):
        with laptop() as host:
            host.install("nft", rules.replace("HOOK", hook))
            start = time.process_time()
            tables = host.read().tables
            costs[hook] = time.process_time() - start
            assert [table.name for table in tables] == (["lists"] if hook == "output" else [])
    print(f"a set of 20,000: {costs['output'] * 1000:.0f} ms, left alone: {costs['forward'] * 1000:.0f} ms")
    assert costs["forward"] < costs["output"] / 4


def test_tables_of_ours_are_not_looked_at() -> None:
    with laptop() as host:
        host.install("nft", "table inet tpvpn-tpvpn0 { chain o { type filter hook output priority 0; policy drop; }; }")
        assert host.read().tables == ()


def test_the_device_need_not_be_there_yet() -> None:
    with namespace("fw") as name:
        host = Laptop.__new__(Laptop)
        host.namespace = name
        host.install("nft", "table ip t { chain o { type filter hook output priority 0; oif != lo drop; }; }")
        (said,) = obstacles(host.read(), DEVICE, (), [Prefix.parse("10.130.0.0/16")])
    assert said.startswith("packets to 10.130.0.0/16 are dropped by chain o of nft table ip t (handle 2)")


def test_nobody_may_read() -> None:
    leave = "os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)"
    program = f"import os; from tpvpn.firewall.read import read; {leave}; read()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr.strip().splitlines()[-1].startswith(f"tpvpn.netlink.NetlinkError: [Errno {errno.EPERM}]"), (
        done.stderr
    )


def test_a_kernel_without_nf_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nftables, "_NETLINK_NETFILTER", 31)  # a protocol that no kernel has
    assert nftables.read_nftables() == []


def test_a_kernel_whose_netfilter_lacks_nf_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nftables, "_GETTABLE", 99 << 8)  # a subsystem that no kernel has
    assert nftables.read_nftables() == []
