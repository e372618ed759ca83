"""Several clusters at once: sessions of one laptop to two managers, whose subnets differ, or are the same; the names of
each below a suffix of its own, both by systemd-resolved and by /etc/resolv.conf."""

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from laptop import CLUSTER4, PATIENCE, TPVPN, WANTED4, Laptop, lab_with_manager

from peers import eventually
from pod import run
from resolved_lab import Resolved
from tpvpn.lab import Lab
from tpvpn.lab.topology import NODE, POD_CIDR, SERVICE_CIDR, SERVICES

MANAGER = "198.51.100.10"
OTHER_CIDR, OTHER = "10.140.0.0/16", "10.140.0.80"
"""What the other cluster has that this one has not."""
BESIDE = """
ip -n "$3" link add eth2 type veth peer name eth2 netns "$1"
ip -n "$3" link set eth2 up
ip -n "$3" address add 198.51.100.2/24 dev eth2
ip -n "$1" link set eth2 up
ip -n "$1" address add 198.51.100.10/24 dev eth2
ip -n "$1" route add 10.140.0.0/16 dev cni0
ip -n "$2" address add 10.140.0.80/32 dev eth0
"""
STAGING = ("--name", "staging")


@pytest.fixture(scope="module")
def laptop() -> Iterator[Laptop]:
    """A laptop on no VPN, with a manager of the first cluster in reach."""
    with lab_with_manager("none") as laptop:
        yield laptop


@pytest.fixture(scope="module")
def other(laptop: Laptop) -> Iterator[Laptop]:
    """The same laptop, as it connects to another cluster, which has all of the first one's addresses, and some more."""
    with Lab(f"tvo{os.getpid()}", vpn="none", cluster="staging") as lab:
        namespaces = (lab.namespace("node"), lab.namespace("cluster"), laptop.namespace)
        run("sh", "-ec", BESIDE, "sh", *namespaces)
        lab.popen("cluster", [TPVPN[0], "-m", "tpvpn.lab.servers", "staging", OTHER])
        lab.start_manager(listen=f"{MANAGER}:7070")
        other = Laptop(laptop.lab)
        other.link = ("--manager", f"tcp://{MANAGER}:7070", "--token-file", str(lab.token_file))
        other.settle()
        yield other


def sessions(laptop: Laptop) -> dict[str, dict[str, Any]]:
    """What `tpvpn status` tells of each."""
    done = laptop.tpvpn("status", "--output", "json")
    assert done.returncode == 0, done.stderr
    return {one["name"]: one for one in json.loads(done.stdout)["sessions"]}


def verdicts(laptop: Laptop, name: str) -> list[str]:
    return [one["verdict"] for one in sessions(laptop)[name]["plan"]["subnets"]]


def get(laptop: Laptop, name: str) -> str:
    """Who answers HTTP at a name."""
    return laptop.run("curl", "--silent", "--max-time", "3", f"http://{name}/").stdout


def test_other_subnets(laptop: Laptop, other: Laptop) -> None:
    """Both clusters at once; each session has what is its own alone, and takes nothing else with it."""
    before = laptop.state()
    with laptop.connected("--on-conflict", "fail", wanted=WANTED4) as one:
        alone = laptop.state()
        with other.connected(*STAGING, wanted=("--service-cidr", OTHER_CIDR)) as two:
            laptop.reaches("cluster", CLUSTER4)
            laptop.reaches("staging", [OTHER])
            told = sessions(laptop)
            assert list(told) == ["default", "staging"]
            for what in ("device", "table", "addresses"):
                assert told["default"][what] != told["staging"][what]
            assert not set(told["default"]["addresses"]) & set(told["staging"]["addresses"])
            for target, whose in ((SERVICES[1], "default"), (OTHER, "staging"), ("10.140.9.9", "staging")):
                assert f"session {whose}, which runs" in laptop.tpvpn("why", target).stdout
            for command in ("quit", "doctor"):
                done = laptop.tpvpn(command)
                assert done.returncode == 2 and "--name (default, staging)" in done.stderr, done
            assert two.signal(signal.SIGTERM) == 0
        laptop.is_as(alone)
        laptop.reaches("cluster", CLUSTER4)
        with other.connected(*STAGING, wanted=("--service-cidr", OTHER_CIDR)) as two:
            assert one.signal(signal.SIGKILL)
            laptop.reaches("staging", [OTHER])
            eventually(lambda: list(sessions(laptop)) == ["staging"], 3, "the other one goes on")
            assert laptop.sh("ip route show table all proto 116").split()[:3] == [OTHER_CIDR, "dev", "tpvpn-staging"]
            assert two.process.poll() is None
    laptop.is_as(before)


def test_the_same_subnets(laptop: Laptop, other: Laptop) -> None:
    """A conflict as any other, with the session that has them; where that ends, they are the other's."""
    before = laptop.state()
    with laptop.connected("--on-conflict", "fail", wanted=WANTED4) as one:
        alone = laptop.state()
        refused = other.connect(*STAGING, wanted=WANTED4)
        assert refused.returncode == 3
        assert f"{SERVICE_CIDR} dev tpvpn0 (tpvpn session default, table" in refused.stderr
        assert "tpvpn quit --name default" in refused.stderr
        laptop.is_as(alone)
        with other.connected(*STAGING, "--on-conflict", "skip", wanted=WANTED4) as two:
            assert verdicts(laptop, "staging") == ["conflict", "conflict"]
            laptop.reaches("cluster", CLUSTER4)
            (conflict,) = sessions(laptop)["staging"]["plan"]["subnets"][1]["conflicts"]
            assert (conflict["owner"], conflict["session"]) == ("tpvpn", "default")
            text = laptop.tpvpn("why", SERVICES[1], *STAGING).stdout.replace("\n", " ")
            assert f"withheld: {SERVICE_CIDR} on tpvpn0 (tpvpn session default)" in text
            assert one.signal(signal.SIGTERM) == 0
            two.says(f"{POD_CIDR} is now routed: nothing private is in the way any more")
            laptop.reaches("staging", CLUSTER4)
            allowed = ("--allow-conflicting-subnets", SERVICE_CIDR, "--allow-conflicting-subnets", POD_CIDR)
            with laptop.connected(*allowed, wanted=WANTED4):
                laptop.reaches("cluster", CLUSTER4)
            laptop.reaches("staging", CLUSTER4)
            assert laptop.tpvpn("quit", "--all").returncode == 0
            assert two.wait() == 0
    laptop.is_as(before)
    done = laptop.tpvpn("quit", "--all")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "no session runs here\n")


# -- names -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def resolver(laptop: Laptop, mode: str) -> Iterator[None]:
    """While this holds, names are had in this way."""
    if mode == "file":
        yield
        return
    with Resolved(laptop.lab) as resolved:
        resolved.uplink("eth0", NODE)
        yield


@pytest.mark.parametrize("mode", ["file", "resolved"])
def test_names(laptop: Laptop, other: Laptop, mode: str) -> None:
    """The same subnets at virtual addresses, and the same domain: each cluster's names below a suffix of its own."""
    ours = ("web", "web.default", "web.default.svc", "web.default.svc.cluster.local", "web.default.svc.default.tpvpn")
    theirs = ("web.staging", "web.default.staging", "web.default.svc.staging", "web.default.svc.cluster.local.staging")
    with resolver(laptop, mode):
        before = laptop.state()
        with (
            laptop.connected("--on-conflict", "fail", wanted=WANTED4) as one,
            other.connected(*STAGING, "--on-conflict", "virtual", wanted=WANTED4) as two,
        ):
            assert verdicts(laptop, "staging") == ["virtual", "virtual"]
            told = {name: session["dns"] for name, session in sessions(laptop).items()}
            assert [(dns["suffix"], dns["first"]) for dns in told.values()] == [
                ("default.tpvpn", None),
                ("staging", "default"),
            ]
            assert told["staging"]["mode"] == mode
            for name in ours:
                assert get(laptop, name) == f"cluster {SERVICES[1]}\n", name
            for name in theirs:
                assert get(laptop, name) == f"staging {SERVICES[1]}\n", name
            assert get(laptop, "www.example.com").startswith("cluster ")
            targets = laptop.sh("dig +short SRV _sql._tcp.db.default.svc.staging").split()[3::4]
            assert sorted(targets) == [f"db-{number}.db.default.svc.staging." for number in (0, 1)]
            assert laptop.run("curl", "-s", "http://none.staging/").returncode == 6
            for name, whose in (("web.default", "default"), ("web.default.svc.staging", "staging")):
                said = laptop.tpvpn("why", name).stdout.replace("\n", " ")
                assert f"in the cluster of session {whose} as web.default.svc.cluster.local" in said
            assert "are session default's, those of this session are below staging" in two.said
            for name in ("default", "staging"):
                done = laptop.tpvpn("doctor", "--name", name)
                assert done.returncode == 0, done.stdout
            # The first one goes, and the other has all that was both's.
            assert one.signal(signal.SIGTERM) == 0
            eventually(lambda: get(laptop, "web.default") == f"staging {SERVICES[1]}\n", PATIENCE, two.said)
            assert get(laptop, "web.default.svc.staging") == f"staging {SERVICES[1]}\n"
            with laptop.connected("--on-conflict", "virtual", wanted=WANTED4):
                assert get(laptop, "web.default") == f"staging {SERVICES[1]}\n"
                assert get(laptop, ours[-1]) == f"cluster {SERVICES[1]}\n"
        laptop.is_as(before)


def test_both_are_killed(laptop: Laptop, other: Laptop) -> None:
    """With their helpers: what is left is repaired by whoever cleans up."""
    before = laptop.state()
    with contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(laptop.connected("--on-conflict", "fail", wanted=WANTED4)),
            stack.enter_context(other.connected(*STAGING, "--on-conflict", "virtual", wanted=WANTED4)),
        ]
        found = laptop.sh("pgrep --full [t]pvpn.helper.root --nslist net --ns $$").split()
        assert len(found) == 2
        for pid in (*map(int, found), *(one.process.pid for one in started)):
            os.kill(pid, signal.SIGKILL)
        for one in started:
            one.wait()
        removed = laptop.tpvpn("cleanup").stdout
        assert "session default" in removed and "session staging" in removed
    laptop.is_as(before)
