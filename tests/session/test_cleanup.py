"""`tpvpn cleanup`: what a session left that was killed together with its helper, and nothing of one that lives."""

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from laptop import POD_CIDR, PODS, SERVICE_CIDR, SERVICES, TPVPN, VPN, Laptop, Session

from peers import eventually
from tpvpn.helper.kernel import TABLES

SERVICE = ("--service-cidr", SERVICE_CIDR)
POD = ("--pod-cidr", POD_CIDR)
ALLOW = ("--allow-conflicting-subnets", "10.128.0.0/9")
NEVER = ("--never-proxy", "10.132.9.9/32")


@pytest.fixture
def living(laptop: Laptop) -> Iterator[str]:
    """A session that lives; gives the laptop's state with it alone."""
    with laptop.connected(*ALLOW, wanted=SERVICE):
        laptop.reaches("cluster", SERVICES)
        yield laptop.state()
        laptop.reaches("cluster", SERVICES)
        laptop.reaches("vpn", VPN)


def helper_of(laptop: Laptop, name: str) -> int:
    """The process that has the session's journal open."""
    journal = laptop.directory / name / "journal"
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if link.readlink() == journal:
                return int(link.parts[2])
    raise AssertionError(f"nobody has {journal} open")


def die(laptop: Laptop, name: str, session: Session) -> None:
    """SIGKILL of the helper and the user's process at once."""
    for pid in (helper_of(laptop, name), session.process.pid):
        os.kill(pid, signal.SIGKILL)
    session.wait()
    eventually(lambda: "tpvpn-dead" not in laptop.sh("ip link"), 1, "the device is gone")


def left_by_a_dead_session(laptop: Laptop) -> list[str]:
    """Let a session die beside the one that lives; what it left, in words."""
    with laptop.connected(*ALLOW, *NEVER, "--name", "dead", wanted=POD) as session:
        laptop.reaches("cluster", PODS)
        die(laptop, "dead", session)
    (rule,) = (line for line in laptop.sh("ip rule").splitlines() if f"lookup {TABLES[1]}" in line)
    preference = rule.partition(":")[0]
    return [
        "session dead",
        f"IPv4 rule {preference} lookup {TABLES[1]}",
        f"route throw 10.132.9.9/32 table {TABLES[1]}",
        "/etc/resolv.conf of session dead",
    ]


def test_what_a_dead_session_left_is_removed_beside_one_that_lives(laptop: Laptop, living: str) -> None:
    left = left_by_a_dead_session(laptop)
    assert laptop.state() != living
    done = laptop.tpvpn("cleanup")
    assert (done.returncode, done.stdout) == (0, "".join(f"removed {words}\n" for words in left))
    assert laptop.state() == living
    done = laptop.tpvpn("cleanup")
    assert (done.returncode, done.stdout) == (0, "nothing was left behind\n")
    assert laptop.state() == living


def test_json(laptop: Laptop, living: str) -> None:
    for left in (left_by_a_dead_session(laptop), []):
        done = laptop.tpvpn("cleanup", "--output", "json")
        assert done.returncode == 0
        assert json.loads(done.stdout) == {"schema": "tpvpn.cleanup/1", "removed": left}
    assert laptop.state() == living


def damaged(journal: bytes) -> dict[str, bytes]:
    """What a power cut may make of a journal, by what it is."""
    lines = journal.splitlines(keepends=True)
    some = b"".join(lines[:3])
    return {
        "empty": b"",
        "within the session": lines[0][:40],
        "within an operation": some + lines[3][:40],
        "within the last line": journal[:-2],
        "a hole behind": some + bytes(4096),
        "nothing but a hole": bytes(len(journal)),
        "nothing but brackets": b"[" * 10_000 + b"\n",
        "a hole for the session": bytes(len(lines[0]) - 1) + b"\n" + b"".join(lines[1:]),
        "garbage behind": some + os.urandom(64).replace(b"\n", b"") + b"\n[[]]\n" + lines[3],
        "brackets behind": some + b"[" * 10_000 + b"\n" + lines[3],
    }


@pytest.mark.parametrize("repair", [("cleanup",), ("connect", "--name", "dead"), ("connect", "--name", "other")])
def test_a_journal_that_is_damaged(laptop: Laptop, living: str, repair: tuple[str, ...]) -> None:
    """It is read as far as it goes, by whoever comes next; the rest is known by its table and the file's marker."""
    journal = laptop.directory / "dead" / "journal"
    for kind in damaged(b"\n" * 4):
        with laptop.connected(*ALLOW, *NEVER, "--name", "dead", wanted=POD) as session:
            die(laptop, "dead", session)
        journal.write_bytes(damaged(journal.read_bytes())[kind])
        if repair == ("cleanup",):
            done = laptop.tpvpn("cleanup")
            assert "removed session dead\n" in done.stdout, kind
        else:
            done = laptop.connect(*repair[1:], *ALLOW, *NEVER, "--", "true", wanted=POD)
        assert (done.returncode, "Traceback" in done.stderr) == (0, False), f"{kind}\n{done.stderr}"
        assert laptop.state() == living, kind


@pytest.mark.parametrize("content", [b"", bytes(100), b"\xff\xfe{\n", b"{}", b"[" * 10_000], ids=range(5))
def test_a_session_file_that_is_damaged(laptop: Laptop, content: bytes) -> None:
    before = laptop.state()
    with laptop.connected(*ALLOW, "--name", "dead", wanted=POD) as session:
        die(laptop, "dead", session)
    (laptop.directory / "dead" / "session").write_bytes(content)
    for word in ("status", "cleanup"):
        done = laptop.tpvpn(word)
        assert (done.returncode, done.stderr) == (0, ""), word
    assert laptop.state() == before


def test_without_the_right(laptop: Laptop) -> None:
    before = laptop.state()
    nobody = ("setsid", "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    done = laptop.run(*nobody, *TPVPN, "cleanup")
    assert done.returncode == 5
    assert done.stderr.splitlines()[-1].startswith("tpvpn: ")
    assert laptop.state() == before
