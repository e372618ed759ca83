"""A session in the background, and what is kept of every session: `--detach`, -v and the log file."""

import contextlib
import json
import logging
import os
import signal
import socket
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from laptop import ALLOWED, CLUSTER, TPVPN, Laptop

from peers import NODE, eventually
from pod import inside
from terminal import terminal
from tpvpn.cli.log import LARGEST, SessionLog
from user import PASSWORD, WITH_PASSWORD, ordinary_user

WANTED = ("--service-cidr", "10.130.0.0/16", "--pod-cidr", "10.132.0.0/16")


@pytest.fixture(autouse=True)
def at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Logs are of this test alone."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "tpvpn"


def session(laptop: Laptop) -> dict[str, object]:
    (one,) = json.loads(laptop.tpvpn("status", "--output", "json").stdout)["sessions"]
    return one


# -- in the background -------------------------------------------------------------------------------------------------


def test_it_goes_on_when_whoever_started_it_has_gone(laptop: Laptop, at_home: Path) -> None:
    """It holds nothing of the caller's, or this would wait for the end of its output."""
    before = laptop.state()
    done = laptop.connect(*ALLOWED, "--detach")
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "tpvpn: ready"
    try:
        shown = session(laptop)
        process = Path(f"/proc/{shown['pid']}")
        assert [os.readlink(process / "fd" / str(standard)) for standard in range(3)] == ["/dev/null"] * 3
        assert os.getsid(int(str(shown["pid"]))) == shown["pid"]
        laptop.reaches("cluster", CLUSTER)
        os.kill(int(str(shown["pid"])), signal.SIGHUP)
        laptop.reaches("cluster", CLUSTER[:1])
        again = laptop.connect(*ALLOWED, "--detach")
        assert again.returncode == 2, again.stderr
    finally:
        assert laptop.tpvpn("quit").returncode == 0
    laptop.is_as(before)
    text = (at_home / "default.log").read_text()
    assert "INFO tpvpn.told: ready" in text and "DEBUG" not in text


def test_it_outlives_its_terminal(laptop: Laptop) -> None:
    ours, theirs = os.openpty()
    command = ("setsid", "--ctty", *laptop.connect_command(*ALLOWED, "--detach"))
    with subprocess.Popen(laptop.command(command), stdin=theirs, stdout=theirs, stderr=theirs) as caller:
        os.close(theirs)
        printed = b""
        with contextlib.suppress(OSError):  # EIO: nobody has the other side any more
            while more := os.read(ours, 4096):
                printed += more
    os.close(ours)
    assert caller.returncode == 0 and b"ready" in printed, printed
    laptop.reaches("cluster", CLUSTER[:1])
    assert laptop.tpvpn("quit").returncode == 0


def test_sudo_asks_for_a_password_at_the_terminal(laptop: Laptop) -> None:
    """A user without root's rights: the session leaves the terminal only when it has what it asked for."""
    before = laptop.state()
    with ordinary_user() as user:
        link = user.link(laptop.lab.manager, laptop.lab.token_file.read_text())
        argv = user.shell([*TPVPN, "connect", *link, *WANTED, *ALLOWED, "--detach"])
        with terminal(laptop.command(user.host(argv, WITH_PASSWORD)), columns=200) as shown:
            shown.shows("[sudo] password for")
            shown.type("wrong\n")
            eventually(lambda: shown.text.count("[sudo] password for") == 2, 10, "it asks again, without an echo")
            shown.type(f"{PASSWORD}\n")
            assert shown.wait() == 0
            assert "ready" in shown.text and PASSWORD not in shown.text
        laptop.reaches("cluster", CLUSTER[:1])
        assert laptop.run(*user.host(user.shell([*TPVPN, "quit"]))).returncode == 0
    laptop.is_as(before)


def test_what_fails_is_said_as_ever(laptop: Laptop) -> None:
    before = laptop.state()
    conflict = laptop.connect("--detach")
    assert conflict.returncode == 3
    assert "tpvpn connect --allow-conflicting-subnets" in conflict.stderr
    with_command = laptop.connect("--detach", "--", "true")
    assert with_command.returncode == 2
    assert with_command.stderr == "tpvpn: --detach is for a session without a command: leave out one of them\n"
    laptop.is_as(before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_while_it_is_waited_for(laptop: Laptop, number: signal.Signals) -> None:
    """Of a terminal's Ctrl-C both processes hear; of a signal to the one that waits, that one alone."""
    before = laptop.state()
    with inside(laptop.lab.namespace("node")), socket.create_server((NODE, 0)) as silent:
        silent.settimeout(10)
        url = f"tcp://{NODE}:{silent.getsockname()[1]}"
        command = laptop.command((*TPVPN, "connect", "--detach", "--manager", url, *WANTED, *ALLOWED))
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as waiting:
            silent.accept()[0].detach()
            waiting.send_signal(number)
            assert waiting.wait(5) == 130
            assert waiting.stderr and "Traceback" not in waiting.stderr.read()
    laptop.is_as(before)


def test_nobody_waits_any_more(laptop: Laptop) -> None:
    """Whoever waited was killed: the session that is not ready ends."""
    before = laptop.state()
    with inside(laptop.lab.namespace("node")), socket.create_server((NODE, 0)) as silent:
        silent.settimeout(10)
        url = f"tcp://{NODE}:{silent.getsockname()[1]}"
        command = laptop.command((*TPVPN, "connect", "--detach", "--manager", url, *WANTED, *ALLOWED))
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as waiting:
            silent.accept()[0].detach()
            waiting.kill()
    laptop.is_as(before, 3)


# -- the log -----------------------------------------------------------------------------------------------------------


def test_the_log_has_what_was_done_and_no_secret(laptop: Laptop, at_home: Path) -> None:
    with laptop.connected(*ALLOWED, "-vv") as running:
        assert laptop.tpvpn("why", "web.default").returncode == 0
        shown = session(laptop)
        assert f"the log is {at_home}/default.log" in running.said
        assert "tpvpn.helper.client: Claim(name='default')" in running.said
        assert running.said.count("took us in by") == 1
    log = at_home / "default.log"
    assert shown["log"] == str(log)
    text, status = log.read_text(), log.stat()
    assert stat.S_IMODE(status.st_mode) == 0o600 and stat.S_IMODE(at_home.stat().st_mode) == 0o700
    for said in ("INFO tpvpn.told: ready", "DEBUG tpvpn.router: add ", "DEBUG tpvpn.dns.server: web.default "):
        assert said in text
    token = laptop.lab.token_file.read_text().partition(":")[2].strip()
    assert token and token not in text


SMALL_DISK = 'mount -t tmpfs -o size=8k none "$0"; head -c 8192 /dev/zero >"$0/all" || true; exec "$@"'


@pytest.mark.parametrize("trouble", ["full", "FIFO"])
def test_a_log_that_cannot_be_written_hurts_nobody(laptop: Laptop, at_home: Path, trouble: str) -> None:
    at_home.parent.mkdir()
    under: tuple[str, ...] = ()
    if trouble == "FIFO":
        at_home.mkdir()
        os.mkfifo(at_home / "default.log")
    else:
        under = ("unshare", "--mount", "sh", "-ec", SMALL_DISK, str(at_home.parent))
    with laptop.start(*ALLOWED, "-vv", under=under) as running:
        running.wait_ready()
        laptop.reaches("cluster", CLUSTER[:1])
        if trouble != "full":
            assert session(laptop)["log"] is None
            assert "no log is kept" in running.said


@pytest.fixture
def handlers() -> Iterator[None]:
    program = logging.getLogger("tpvpn")
    level = program.level
    yield
    for handler in program.handlers[:]:
        handler.close()
        program.removeHandler(handler)
    program.setLevel(level)


def test_three_files_of_a_megabyte(handlers: None, at_home: Path) -> None:
    log = SessionLog("work")
    assert log.path == at_home / "work.log"
    told = logging.getLogger("tpvpn.told")
    for number in range(4000):
        told.info("%d %s", number, "x" * 1000)
    files = sorted(at_home.iterdir())
    assert [file.name for file in files] == ["work.log", "work.log.1", "work.log.2"]
    assert all(file.stat().st_size <= LARGEST and stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)
    assert " 3999 x" in files[0].read_text() and " 0 x" not in files[2].read_text()
