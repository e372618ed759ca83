"""Why an address goes where it goes: the sentence, the ways now and without us, and what changes it."""

from dataclasses import replace

import pytest
from textview import DEVICE, TABLE, apply, plan_of, read_view, sections

from tpvpn.errors import UsageError
from tpvpn.report import as_json
from tpvpn.route.fib import IpsecPolicy
from tpvpn.route.operations import operations
from tpvpn.route.prefix import Prefix
from tpvpn.route.why import Why, explain

LAPTOP = read_view(
    sections(
        """
[links]
2: eth0: <BROADCAST,MULTICAST,UP,LOWER_UP> mtu 1500
3: tun0: <POINTOPOINT,UP,LOWER_UP> mtu 1500 kind tun
[routes]
default via 192.0.2.1 dev eth0
10.0.0.0/8 via 10.8.0.1 dev tun0
"""
    )
)
CLUSTER = "--service-cidr 10.130.0.0/16 --pod-cidr 172.20.0.0/16 --never-proxy 172.20.9.9"


def why(address: str, flags: str = "", session: bool = True) -> Why:
    """The answer on a laptop with a session of these flags, or with none."""
    plan = plan_of(LAPTOP, f"{CLUSTER} {flags}")
    view = apply(LAPTOP, operations(plan, LAPTOP, TABLE, DEVICE)) if session else LAPTOP
    return explain(view, address, as_json(plan), DEVICE)


@pytest.mark.parametrize(
    ("address", "flags", "sentence", "device", "commands"),
    [
        ("172.20.0.1", "", "is of the pod subnet 172.20.0.0/16 (from --pod-cidr), and goes into the tunnel", DEVICE,
         ["tpvpn connect --never-proxy 172.20.0.1"]),
        ("172.20.9.9", "", "never proxied (172.20.9.9/32, --never-proxy): it keeps the way", "eth0", []),
        ("10.130.0.1", "--on-conflict skip", "withheld: 10.0.0.0/8 on tun0 (openvpn) is in conflict with it", "tun0",
         ["tpvpn connect --allow-conflicting-subnets 10.130.0.0/16",
          "tpvpn connect --on-conflict hosts --host 10.130.0.1",
          "tpvpn connect --on-conflict virtual"]),
        ("127.0.0.1", "", "stays with the host", "eth0", []),
        ("172.20.130.1", "--never-proxy 172.20.130.0/24 --also-proxy 172.20.130.0/28", "goes into the tunnel", DEVICE,
         ["tpvpn connect --never-proxy 172.20.130.1"]),
        ("172.20.130.99", "--never-proxy 172.20.130.0/24 --also-proxy 172.20.130.0/28", "never proxied", "eth0", []),
        ("8.8.8.8", "", "belongs to no subnet of the cluster", "eth0", ["tpvpn connect --also-proxy 8.8.8.8"]),
        ("10.130.0.1", "--allow-conflicting-subnets 10.130.0.0/16", "goes into the tunnel", DEVICE,
         ["tpvpn connect --never-proxy 10.130.0.1"]),
    ],
)  # fmt: skip
def test_sentence(address: str, flags: str, sentence: str, device: str, commands: list[str]) -> None:
    answer = why(address, flags)
    assert sentence in answer.sentence and answer.sentence.startswith(address)
    assert answer.now.device == device
    assert [fix.command for fix in answer.changes] == commands


def test_now_and_without_us() -> None:
    answer = why("10.130.0.1", "--allow-conflicting-subnets 10.130.0.0/16")
    assert (answer.now.table, answer.now.rule, answer.now.owner) == (TABLE, 16383, "tpvpn")
    assert (answer.without.table, answer.without.rule, answer.without.owner) == (254, 32766, "openvpn")
    assert answer.without.known_by == "device name tun0"
    assert why("10.130.0.1", "--on-conflict skip", session=False).now == answer.without


def test_both_sides_of_a_virtual_subnet() -> None:
    there = why("10.130.7.9", "--on-conflict virtual")
    assert there.virtual is not None and there.virtual.endswith(".7.9") and there.now.device == "tun0"
    assert "which is reached by virtual addresses" in there.sentence
    back = why(there.virtual, "--on-conflict virtual")
    assert back.virtual == "10.130.7.9" and back.now.device == DEVICE
    assert f"{there.virtual} is virtual and stands for 10.130.7.9" in back.sentence


def test_what_has_no_way_in_is_offered_none() -> None:
    answer = why("10.130.0.1", "--never-proxy 10.130.0.0/16")
    assert answer.subnet and answer.subnet["verdict"] == "excluded" and not answer.changes
    policy = IpsecPolicy(Prefix.parse("0.0.0.0/0"), Prefix.parse("172.20.0.0/24"))
    plan = as_json(plan_of(LAPTOP, CLUSTER))
    assert (
        "the IPsec policy for 172.20.0.0/24"
        in explain(replace(LAPTOP, policies=(policy,)), "172.20.0.1", plan, DEVICE).sentence
    )


def test_json_is_plain() -> None:
    answer = why("172.20.0.1").as_json()
    assert answer["schema"] == "tpvpn.why/1" and answer["subnet"]["verdict"] == "routed"
    assert answer["now"]["device"] == DEVICE and answer["changes"][0]["command"].startswith("tpvpn connect ")


def test_no_address() -> None:
    with pytest.raises(UsageError):
        why("10.130.0.0/16")
