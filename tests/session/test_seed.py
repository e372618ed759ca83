"""The seed: a VPN's 10.0.0.0/8 covers the cluster. Refused, allowed, skipped; and how a session begins and ends."""

import json
import re
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
from laptop import ALLOWED, CLUSTER4, EXIT, VPN, WANTED4, Laptop

from tpvpn.lab.topology import POD_CIDR, PODS, SERVICE_CIDR, SERVICES, TWINS, VPN_HOSTS

ALLOW = "--allow-conflicting-subnets"
EXACT = (ALLOW, SERVICE_CIDR, ALLOW, POD_CIDR)
TWIN_CIDR = "203.0.113.80/32"
FREE = "172.20.0.0/24"


@pytest.fixture(autouse=True)
def unchanged(laptop: Laptop) -> Iterator[None]:
    """Each test leaves the laptop as it was."""
    before = laptop.state()
    yield
    laptop.is_as(before)


def plan(laptop: Laptop, *options: str) -> tuple[int, dict[str, Any]]:
    done = laptop.tpvpn("plan", *WANTED4, *options, "--output", "json")
    return done.returncode, json.loads(done.stdout)


def status(laptop: Laptop) -> dict[str, Any]:
    answer = json.loads(laptop.tpvpn("status", "--output", "json").stdout)
    assert answer["schema"] == "tpvpn.status/1"
    (session,) = answer["sessions"]
    return session


def device(laptop: Laptop, address: str) -> str:
    """The device by which the kernel would send."""
    found = re.search(r" dev (\S+)", laptop.sh(f"ip route get {address}"))
    assert found
    return found[1]


# -- the scenario ------------------------------------------------------------------------------------------------------


def test_refused_and_nothing_changed(laptop: Laptop) -> None:
    before = laptop.state()
    refused = laptop.connect(wanted=WANTED4)
    assert laptop.state() == before
    assert (refused.returncode, refused.stdout) == (3, "")
    (sentence,) = (line for line in refused.stderr.splitlines() if line.startswith("tpvpn: "))
    command = f"tpvpn connect {ALLOW} {SERVICE_CIDR} {ALLOW} {POD_CIDR}"
    for named in (SERVICE_CIDR, POD_CIDR, "10.0.0.0/8", "tun0", command):
        assert named in sentence, sentence
    # The report above it says the same at more length.
    report = re.sub(r"\\\n\s+", "", refused.stderr.replace(sentence, ""))
    for named in (SERVICE_CIDR, POD_CIDR, "10.0.0.0/8", "tun0", command, "--on-conflict skip"):
        assert named in report, report


def test_a_command_does_not_run_when_refused(laptop: Laptop) -> None:
    refused = laptop.connect("--", "echo", "run", wanted=WANTED4)
    assert (refused.returncode, refused.stdout) == (3, "")


@pytest.mark.parametrize("allow", [(ALLOW, "10.128.0.0/9"), EXACT], ids=["the half", "the exact two"])
def test_allowed(laptop: Laptop, allow: tuple[str, ...]) -> None:
    with laptop.connected(*allow, wanted=WANTED4):
        laptop.reaches("cluster", CLUSTER4)
        laptop.reaches("vpn", VPN)
        routes = laptop.sh("ip route show table all proto 116").splitlines()
        assert [line.split()[:3] for line in routes] == [[SERVICE_CIDR, "dev", "tpvpn0"], [POD_CIDR, "dev", "tpvpn0"]]
        assert laptop.sh("ip -6 route show table all proto 116") == ""
    assert laptop.probe(CLUSTER4, 0.5) == dict.fromkeys(CLUSTER4)


def test_one_allowed_of_two_is_refused(laptop: Laptop) -> None:
    refused = laptop.connect(ALLOW, SERVICE_CIDR, wanted=WANTED4)
    assert refused.returncode == 3
    assert POD_CIDR in refused.stderr


def test_skip_routes_what_conflicts_with_nothing(laptop: Laptop) -> None:
    options = ("--on-conflict", "skip", "--also-proxy", TWIN_CIDR, "--also-proxy", FREE)
    # The twins have a route of their own, the LAN's: in conflict too. The free network has none.
    with laptop.connected(*options, wanted=WANTED4) as session:
        verdicts = {one["cidr"]: one["verdict"] for one in status(laptop)["plan"]["subnets"]}
        assert verdicts == {SERVICE_CIDR: "conflict", POD_CIDR: "conflict", TWIN_CIDR: "conflict", FREE: "routed"}
        assert laptop.sh("ip route show table all proto 116").split()[0] == FREE
        assert device(laptop, SERVICES[1]) == device(laptop, PODS[0]) == "tun0"
        assert device(laptop, "172.20.0.9") == "tpvpn0"
        laptop.reaches("vpn", VPN)
        assert session.signal(signal.SIGTERM) == 0


def test_skip_takes_what_is_allowed(laptop: Laptop) -> None:
    with laptop.connected("--on-conflict", "skip", ALLOW, SERVICE_CIDR, wanted=WANTED4):
        laptop.reaches("cluster", SERVICES)
        assert laptop.probe(PODS, 0.5) == dict.fromkeys(PODS)


def test_never_proxy_keeps_the_way_it_had(laptop: Laptop) -> None:
    """10.200.0.9 is a host of the VPN inside of what is routed."""
    kept = "10.200.0.9"
    also = ("--also-proxy", "10.200.0.0/16", ALLOW, "10.200.0.0/16", "--never-proxy", f"{kept}/32")
    with laptop.connected(*EXACT, *also, "--never-proxy", f"{PODS[1]}/32", wanted=WANTED4):
        assert laptop.sh(f"ip route show table all proto 116 type throw {kept}").startswith(f"throw {kept} ")
        laptop.reaches("vpn", VPN_HOSTS)
        assert (device(laptop, kept), device(laptop, "10.200.0.8")) == ("tun0", "tpvpn0")
        assert laptop.probe([PODS[1]], 0.5) == {PODS[1]: None}
        laptop.reaches("cluster", [one for one in CLUSTER4 if one != PODS[1]])


def test_also_proxy_takes_a_host_through_the_tunnel(laptop: Laptop) -> None:
    also = ("--also-proxy", TWIN_CIDR, ALLOW, TWIN_CIDR)
    assert device(laptop, TWINS[3]) == "eth0"
    with laptop.connected(*EXACT, *also, wanted=WANTED4):
        assert device(laptop, TWINS[3]) == "tpvpn0"
        assert device(laptop, TWINS[0]) == "eth0"
        laptop.reaches("cluster", TWINS)


# -- plan --------------------------------------------------------------------------------------------------------------


def conflict(allowed: bool) -> dict[str, Any]:
    return {
        "route": "10.0.0.0/8",
        "device": "tun0",
        "owner": "openvpn",
        "gateway": "10.8.0.1",
        "table": 254,
        "relation": "covers",
        "allowed": allowed,
    }


def test_plan_of_a_refusal(laptop: Laptop) -> None:
    code, shown = plan(laptop, "--never-proxy", "10.130.9.9/32")
    fixes = shown.pop("fixes")
    assert (code, shown) == (
        3,
        {
            "schema": "tpvpn.plan/1",
            "ok": False,
            "subnets": [
                {
                    "cidr": cidr,
                    "kind": kind,
                    "source": f"--{kind}-cidr",
                    "verdict": "conflict",
                    "routes": [],
                    "withheld": [cidr],
                    "virtual": None,
                    "conflicts": [conflict(False)],
                }
                for cidr, kind in ((SERVICE_CIDR, "service"), (POD_CIDR, "pod"))
            ],
            "never_proxy": [
                {"cidr": "10.130.9.9/32", "reason": "--never-proxy", "route": "10.0.0.0/8 via 10.8.0.1 dev tun0"}
            ],
            "warnings": shown["warnings"],
        },
    )
    assert fixes[0]["command"] == f"tpvpn connect {ALLOW} {SERVICE_CIDR} {ALLOW} {POD_CIDR}"
    assert all(fix.keys() == {"description", "command"} and fix["description"] for fix in fixes)


def test_plan_of_what_is_allowed(laptop: Laptop) -> None:
    code, shown = plan(laptop, ALLOW, "10.128.0.0/9", "--also-proxy", FREE)
    assert (code, shown["ok"], shown["fixes"]) == (0, True, [])
    routed: dict[str, Any] = {"verdict": "routed", "withheld": [], "virtual": None}
    assert shown["subnets"] == [
        {"cidr": SERVICE_CIDR, "kind": "service", "source": "--service-cidr"}
        | routed
        | {"routes": [SERVICE_CIDR], "conflicts": [conflict(True)]},
        {"cidr": POD_CIDR, "kind": "pod", "source": "--pod-cidr"}
        | routed
        | {"routes": [POD_CIDR], "conflicts": [conflict(True)]},
        {"cidr": FREE, "kind": "also", "source": "--also-proxy"} | routed | {"routes": [FREE], "conflicts": []},
    ]


def test_plan_of_parts(laptop: Laptop) -> None:
    """Half of a subnet allowed is `partial` with skip, and all withheld with fail."""
    half, rest = "10.132.0.0/17", "10.132.128.0/17"
    options = (ALLOW, SERVICE_CIDR, ALLOW, half)
    code, shown = plan(laptop, *options)
    assert (code, [one["verdict"] for one in shown["subnets"]]) == (3, ["routed", "conflict"])
    code, shown = plan(laptop, *options, "--on-conflict", "skip")
    pods = shown["subnets"][1]
    assert (code, shown["ok"], pods["verdict"]) == (0, True, "partial")
    assert (pods["routes"], pods["withheld"], pods["conflicts"]) == ([half], [rest], [conflict(False)])
    code, shown = plan(laptop, *EXACT, "--never-proxy", "10.132.0.0/15")
    assert (code, [one["verdict"] for one in shown["subnets"]]) == (0, ["routed", "excluded"])


def test_plan_while_connected_says_what_connect_would(laptop: Laptop) -> None:
    """Our own device is no conflict."""
    before = plan(laptop, *EXACT)
    with laptop.connected(*EXACT, wanted=WANTED4):
        assert plan(laptop, *EXACT) == before


@pytest.mark.parametrize("flag", [("--pod-cidr", "10.132.0.1/16"), ("--also-proxy", "nonsense"), ("--frob",)])
def test_bad_input(laptop: Laptop, flag: tuple[str, ...]) -> None:
    for done in (laptop.tpvpn("plan", *WANTED4, *flag), laptop.connect(*EXACT, *flag, wanted=WANTED4)):
        assert (done.returncode, done.stdout) == (2, ""), done
        assert flag[-1] in done.stderr


# -- beginnings and ends -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["true"], 0),
        (["sh", "-c", "exit 7"], 7),
        (["sh", "-c", "kill -KILL $$"], 128 + 9),
        (["sh", "-c", "kill -TERM $$"], 128 + 15),
        (["no-such-command"], 127),
        (["/etc/passwd"], 126),
    ],
    ids=["0", "7", "SIGKILL", "SIGTERM", "not found", "not executable"],
)
def test_the_exit_code_is_the_commands_own(laptop: Laptop, command: list[str], code: int) -> None:
    assert laptop.connect(*EXACT, "--", *command, wanted=WANTED4).returncode == code


def test_the_command_has_the_cluster_and_standard_output_to_itself(laptop: Laptop) -> None:
    curl = ["curl", "--silent", "--fail", f"http://{SERVICES[1]}/", f"http://{PODS[0]}/", f"http://{VPN_HOSTS[1]}/"]
    done = laptop.connect(*EXACT, "--", *curl, wanted=WANTED4)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"cluster {SERVICES[1]}\ncluster {PODS[0]}\nvpn {VPN_HOSTS[1]}\n"


def test_the_command_hears_the_signal(laptop: Laptop) -> None:
    """Also one that comes in the moment in which it starts: here it sends it itself."""
    trap = ["sh", "-c", "trap 'exit 9' TERM; kill -TERM $PPID; while :; do sleep 0.05; done"]
    assert laptop.connect(*EXACT, "--", *trap, wanted=WANTED4).returncode == 9


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0), (signal.SIGHUP, 0)])
def test_signals_end_it(laptop: Laptop, number: signal.Signals, code: int) -> None:
    before = laptop.state()
    with laptop.connected() as session:
        assert session.signal(number) == code
        assert laptop.state() == before  # not even a moment later


def test_status_and_quit(laptop: Laptop) -> None:
    before = laptop.state()
    assert json.loads(laptop.tpvpn("status", "--output", "json").stdout)["sessions"] == []
    assert laptop.tpvpn("quit").returncode == 2
    with laptop.connected() as session:
        shown = status(laptop)
        assert (shown["name"], shown["state"], shown["pid"]) == ("default", "ready", session.process.pid)
        assert (shown["device"], shown["shadowed"]) == ("tpvpn0", {})
        assert shown["manager"]["endpoint"] == f"tcp://{laptop.lab.manager}"
        assert shown["manager"]["exit"] == {"ipv4": EXIT, "ipv6": EXIT}
        assert shown["manager"]["ping"] == {"ipv4": True, "ipv6": True}
        for address in shown["addresses"]:
            assert address in laptop.sh("ip address show dev tpvpn0")
        assert shown["plan"]["schema"] == "tpvpn.plan/1"
        assert {one["verdict"] for one in shown["plan"]["subnets"]} == {"routed"}
        laptop.reaches("cluster", CLUSTER4)
        assert status(laptop)["traffic"]["received_packets"] > shown["traffic"]["received_packets"]
        assert "10.130.0.0/16" in laptop.tpvpn("status").stdout
        assert laptop.tpvpn("quit", "--name", "another").returncode == 2
        assert laptop.tpvpn("quit").returncode == 0
        assert laptop.state() == before
        assert session.wait() == 0


def test_ready_within_two_seconds(laptop: Laptop) -> None:
    """The bar is 2 s; twice that here, since a machine that runs tests may be busy. The best of three counts."""
    took: list[float] = []
    for _ in range(3):
        began = time.monotonic()
        with laptop.start(*ALLOWED) as session:
            session.wait_ready()
            took.append(time.monotonic() - began)
            laptop.reaches("cluster", [SERVICES[0]])
    assert min(took) < 4, took
