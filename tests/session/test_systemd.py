"""The systemd unit under a real systemd, with all of its hardening in force."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from laptop import ALLOWED, CLUSTER, TPVPN, WANTED, Laptop
from systemd import PROGRAM, Systemd, booted
from test_service import NET_ADMIN, NONE, UNIT

from peers import eventually
from user import NAME, UID, User, ordinary_user

ROOT = UNIT.parent.parent.parent
SERVICE = f"tpvpn@{NAME}.service"
# Where this checkout and the user's home are may be a place that the unit hides.
DROP_IN = """[Service]
BindReadOnlyPaths={root} {prefix}
BindPaths={home}
StandardError=append:{home}/said
"""

pytestmark = pytest.mark.skipif(not PROGRAM.exists(), reason="systemd is not installed")


@pytest.fixture
def user() -> Iterator[User]:
    with ordinary_user() as user:
        yield user


@pytest.fixture
def systemd(laptop: Laptop, user: User, tmp_path: Path) -> Iterator[Systemd]:
    """One that knows the unit, whose user needs only to say which manager."""
    (tmp_path / UNIT.name).write_text(UNIT.read_text().replace("=tpvpn ", f"={sys.executable} -m tpvpn "))
    own = tmp_path / f"{SERVICE}.d"
    own.mkdir()
    (own / "test.conf").write_text(DROP_IN.format(root=ROOT, prefix=sys.prefix, home=user.home))
    configure(laptop, user, own, *ALLOWED)
    with booted(laptop, user, tmp_path) as systemd:
        yield systemd


def configure(laptop: Laptop, user: User, own: Path, *options: str) -> None:
    token = user.write("token", laptop.lab.token_file.read_text())
    words = ("--manager", f"tcp://{laptop.lab.manager}", "--token-file", str(token), *WANTED, *options)
    (own / "options.conf").write_text(f'[Service]\nEnvironment="TPVPN_OPTIONS={" ".join(words)}"\n')


def said(user: User) -> str:
    return (user.home / "said").read_text()


def status(systemd: Systemd, pid: str) -> dict[str, str]:
    shown = systemd.run("cat", f"/proc/{pid}/status").stdout
    return dict(line.split(":\t", 1) for line in shown.splitlines())


def test_start_and_stop(laptop: Laptop, user: User, systemd: Systemd) -> None:
    before = laptop.state()
    started = systemd.run("systemctl", "start", SERVICE)
    assert started.returncode == 0, started.stderr + said(user)
    main = systemd.property(SERVICE, "MainPID")
    ours = systemd.run("cat", f"/sys/fs/cgroup{cgroup(systemd)}/cgroup.procs").stdout.split()
    (helper,) = set(ours) - {main}
    for pid, rights in ((main, NONE), (helper, NET_ADMIN)):
        shown = status(systemd, pid)
        assert [shown[f"Cap{kind}"] for kind in ("Prm", "Eff", "Amb")] == [rights] * 3
        assert (shown["CapBnd"], shown["NoNewPrivs"], shown["Seccomp"]) == (NET_ADMIN, "1", "2")
        assert shown["Uid"].split() == [str(UID)] * 4
    laptop.reaches("cluster", CLUSTER)
    (session,) = json.loads(systemd.run(*user.shell([*TPVPN, "status", "--output", "json"])).stdout)["sessions"]
    assert session["state"] == "ready"
    stopped = systemd.run("systemctl", "stop", SERVICE)
    assert stopped.returncode == 0, stopped.stderr
    assert systemd.property(SERVICE, "Result") == "success", said(user)
    laptop.is_as(before)
    assert systemd.run("ls", "/run/tpvpn").stdout == ""


def cgroup(systemd: Systemd) -> str:
    """The service's cgroup, by its path from where systemd's own hierarchy is mounted."""
    group = systemd.property(SERVICE, "ControlGroup")
    hybrid = systemd.run("test", "-d", "/sys/fs/cgroup/unified").returncode == 0
    return f"/unified{group}" if hybrid else group


def test_after_a_kill_nothing_is_left_and_it_starts_again(laptop: Laptop, user: User, systemd: Systemd) -> None:
    before = laptop.state()
    assert systemd.run("systemctl", "start", SERVICE).returncode == 0, said(user)
    systemd.run("systemctl", "kill", "--signal=SIGKILL", SERVICE)
    eventually(lambda: systemd.property(SERVICE, "SubState") == "auto-restart", 10, "it is to start again")
    laptop.is_as(before)
    assert systemd.run("systemctl", "stop", SERVICE).returncode == 0


def test_it_starts_again_when_it_has_said_that_it_ends(laptop: Laptop, user: User, systemd: Systemd) -> None:
    """It ends in order, with an error: its helper was killed."""
    before = laptop.state()
    assert systemd.run("systemctl", "start", SERVICE).returncode == 0, said(user)
    os.kill(laptop.process("laptop", "tpvpn.helper.root"), signal.SIGKILL)
    eventually(lambda: systemd.property(SERVICE, "SubState") == "auto-restart", 10, "it is to start again")
    assert systemd.property(SERVICE, "ExecMainStatus") == "7", said(user)
    laptop.is_as(before)
    assert systemd.run("systemctl", "stop", SERVICE).returncode == 0


def test_a_conflict_ends_it_for_good(laptop: Laptop, user: User, systemd: Systemd, tmp_path: Path) -> None:
    before = laptop.state()
    configure(laptop, user, tmp_path / f"{SERVICE}.d")
    systemd.run("systemctl", "daemon-reload")
    assert systemd.run("systemctl", "start", SERVICE).returncode != 0
    eventually(lambda: systemd.property(SERVICE, "ActiveState") == "failed", 10, "it has ended")
    assert systemd.property(SERVICE, "ExecMainStatus") == "3", said(user)
    laptop.is_as(before)


def test_one_that_hangs_is_ended_and_begins_anew(laptop: Laptop, user: User, systemd: Systemd, tmp_path: Path) -> None:
    """SIGSTOP stands in for a loop that turns no more."""
    before = laptop.state()
    (tmp_path / f"{SERVICE}.d" / "watchdog.conf").write_text(
        "[Service]\nWatchdogSec=2\nTimeoutAbortSec=1\nRestartSec=1\n"
    )
    assert systemd.run("systemctl", "daemon-reload").returncode == 0
    started = systemd.run("systemctl", "start", SERVICE)
    assert started.returncode == 0, started.stderr + said(user)
    main, begun = systemd.property(SERVICE, "MainPID"), heard_of(systemd)
    eventually(lambda: heard_of(systemd) > begun + 3, 10, "it lives for longer than its watchdog waits")
    assert systemd.run("kill", "-STOP", main).returncode == 0
    eventually(lambda: systemd.property(SERVICE, "Result") == "watchdog", 10, "systemd has ended it")
    eventually(lambda: systemd.property(SERVICE, "SubState") == "running", 15, "it runs again")
    assert systemd.property(SERVICE, "MainPID") not in (main, "0")
    laptop.reaches("cluster", CLUSTER)
    assert systemd.run("systemctl", "stop", SERVICE).returncode == 0
    laptop.is_as(before, 3)


def heard_of(systemd: Systemd) -> float:
    """When systemd heard last that the session lives, in seconds of its clock."""
    return int(systemd.property(SERVICE, "WatchdogTimestampMonotonic")) / 1e6
