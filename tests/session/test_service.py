"""The systemd unit: what it starts, run as it says by hand (systemd is not pid 1 everywhere), and what systemd thinks.

The user has no sudo, and nothing but the ambient CAP_NET_ADMIN.
"""

import configparser
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from laptop import ALLOWED, CLUSTER, PATIENCE, TPVPN, WANTED, Laptop

from tpvpn import rundir
from tpvpn.helper.protocol import encode_operation
from tpvpn.route.fib import Nexthop, Route
from tpvpn.route.operations import Operation
from tpvpn.route.prefix import Prefix
from user import NAME, UID, User, ordinary_user

UNIT = Path(__file__).parent.parent.parent / "packaging" / "systemd" / "tpvpn@.service"
NONE, NET_ADMIN = f"{0:016x}", f"{1 << 12:016x}"
NO_LEGACY = "tables of iptables-legacy were not looked at, which needs root: see `sudo iptables-legacy-save`"
"""Said where the kernel has any."""
EXPOSURE = 2.5
"""What `systemd-analyze security` may say at most: below 4 is "OK"."""


def unit() -> dict[str, str]:
    """The settings of the unit's service for our user."""
    parser = configparser.RawConfigParser(strict=False, delimiters="=", comment_prefixes="#")
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(UNIT.read_text().replace("%i", NAME))
    return dict(parser["Service"])


class Service:
    """What systemd would do, on a laptop."""

    def __init__(self, laptop: Laptop, user: User) -> None:
        self._laptop, self.user, self._unit = laptop, user, unit()
        self.directory = Path("/run") / self._unit["RuntimeDirectory"]
        self._token = user.write("token", laptop.lab.token_file.read_text())
        self.said = user.home / "said"

    def command(self, setting: str, **environment: str) -> list[str]:
        """The command of ExecStart or ExecStopPost, with the conditions of the unit."""
        words = shlex.split(self._unit[setting])
        assert words.pop(0) == "tpvpn"
        options = (
            "--manager",
            f"tcp://{self._laptop.lab.manager}",
            "--token-file",
            str(self._token),
            *WANTED,
            *ALLOWED,
        )
        argv = [one for word in words for one in (options if word == "$TPVPN_OPTIONS" else (word,))]
        name, _, value = self._unit["Environment"].partition("=")
        (ambient,), (bounding,) = self._capabilities("Ambient"), self._capabilities("Bounding")
        assert self._unit["User"] == NAME and self._unit["NoNewPrivileges"] == "yes"
        become = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--init-groups", "--no-new-privs"]
        become += [f"--bounding-set=-all,+{bounding}", f"--inh-caps=-all,+{ambient}", f"--ambient-caps=-all,+{ambient}"]
        own = {"HOME": str(self.user.home), "USER": NAME, name: value, "PATH": "/usr/bin:/usr/sbin"} | environment
        started = ["env", "-i", *(f"{name}={value}" for name, value in own.items()), *TPVPN, *argv]
        return self._laptop.command(self.user.host([*become, *started]))

    def _capabilities(self, kind: str) -> list[str]:
        key = {"Ambient": "AmbientCapabilities", "Bounding": "CapabilityBoundingSet"}[kind]
        return [word.removeprefix("CAP_").lower() for word in self._unit[key].split()]

    @contextlib.contextmanager
    def started(self) -> Iterator[subprocess.Popen[bytes]]:
        """The service, once it has said that it is ready; at the end it is not there any more."""
        path = self.user.home / "notify"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, self.said.open("wb") as said:
            notify.bind(str(path))
            path.chmod(0o777)
            notify.settimeout(PATIENCE)
            process = subprocess.Popen(self.command("ExecStart", NOTIFY_SOCKET=str(path)), stderr=said)
            try:
                try:
                    assert notify.recv(100) == b"READY=1"
                except TimeoutError:
                    pytest.fail(self.said.read_text())
                yield process
            finally:
                path.unlink()
                process.kill()
                process.wait()

    def stopped(self) -> str:
        """What is done when the service has ended, however it did."""
        done = subprocess.run(self.command("ExecStopPost"), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def asks(self, *words: str) -> str:
        """What `tpvpn`, typed by the user in a shell, prints."""
        command = self._laptop.command(self.user.host(self.user.shell([*TPVPN, *words])))
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture
def service(laptop: Laptop) -> Iterator[Service]:
    with ordinary_user() as user:
        service = Service(laptop, user)
        service.directory.mkdir(mode=0o755, parents=True)
        os.chown(service.directory, UID, UID)
        try:
            yield service
        finally:
            shutil.rmtree(service.directory)


def status(pid: int) -> dict[str, str]:
    return dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())


def capabilities(pid: int) -> list[str]:
    return [status(pid)[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Amb")]


def helper_of(laptop: Laptop) -> int:
    return laptop.process("laptop", "tpvpn.helper.root")


def test_the_service_has_a_session_and_no_right(laptop: Laptop, service: Service) -> None:
    before = laptop.state()
    with service.started() as process:
        helper = helper_of(laptop)
        assert capabilities(process.pid) == [NONE] * 4
        assert capabilities(helper)[1:] == [NET_ADMIN] * 3
        for pid in (process.pid, helper):
            assert status(pid)["Uid"].split() == [str(UID)] * 4
            assert status(pid)["NoNewPrivs"] == "1"
            assert status(pid)["CapBnd"] == NET_ADMIN
        threads = [one.name for one in Path(f"/proc/{process.pid}/task").iterdir()]
        assert {tuple(capabilities(int(thread))) for thread in threads} == {(NONE,) * 4}
        laptop.reaches("cluster", CLUSTER)
        (shown,) = json.loads(service.asks("status", "--output", "json"))["sessions"]
        assert shown["pid"] == process.pid
        assert shown["plan"]["warnings"] in ([], [NO_LEGACY])
        service.asks("quit")
        assert process.wait(PATIENCE) == 0
    laptop.is_as(before)
    assert list(service.directory.glob("*/*")) == []
    assert service.stopped() == "nothing was left behind\n"


def test_the_helper_sees_firewalls_with_its_one_right(laptop: Laptop, service: Service) -> None:
    laptop.sh("nft 'table inet t { chain o { type filter hook output priority 0; ip daddr 10.130.0.0/16 drop; }; }'")
    try:
        with service.started():
            (shown,) = json.loads(service.asks("status", "--output", "json"))["sessions"]
            assert [one for one in shown["plan"]["warnings"] if "dropped by chain o of nft table inet t" in one]
    finally:
        laptop.sh("nft delete table inet t")


def test_the_end_by_systemd(laptop: Laptop, service: Service) -> None:
    """SIGTERM to all of the service's processes, as `systemctl stop` sends it."""
    before = laptop.state()
    with service.started() as process:
        os.kill(helper_of(laptop), signal.SIGTERM)
        process.terminate()
        assert process.wait(PATIENCE) == 0
    laptop.is_as(before)


def test_what_a_kill_leaves_is_removed_when_the_service_has_stopped(laptop: Laptop, service: Service) -> None:
    before = laptop.state()
    with service.started() as process:
        os.kill(helper_of(laptop), signal.SIGKILL)
        process.kill()
        process.wait()
    assert laptop.state() != before
    assert "removed session default" in service.stopped()
    laptop.is_as(before)


def test_a_journal_is_no_way_to_the_helpers_right(laptop: Laptop, service: Service) -> None:
    """The user may write to the service's directory: what stands there must not make the helper touch other routes."""
    with service.started() as process:
        (journal,) = service.directory.glob("*/default/journal")
        mine = json.loads(journal.read_text().splitlines()[0])
        os.kill(helper_of(laptop), signal.SIGKILL)
        process.kill()
        process.wait()
    laptop.sh("ip route add 10.77.0.0/16 dev lo proto static")
    try:
        victim = Route(Prefix.parse("10.77.0.0/16"), 254, nexthops=(Nexthop("lo"),), protocol=4, scope=253)
        line = json.dumps(encode_operation(Operation("add", victim)))
        journal.write_text(json.dumps(mine) + "\n" + line + "\n")
        service.stopped()
        assert "10.77.0.0/16" in laptop.sh("ip route")
    finally:
        laptop.sh("ip route del 10.77.0.0/16")


def test_without_the_right_the_service_says_what_is_missing(laptop: Laptop, service: Service) -> None:
    command = [word for word in service.command("ExecStart") if not word.startswith("--ambient-caps")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 5
    assert "tpvpn: sudo did not start the root helper" in done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unit, which finds a program."""
    file = tmp_path_factory.mktemp("unit") / UNIT.name
    file.write_text(UNIT.read_text().replace("=tpvpn ", f"={sys.executable} -m tpvpn "))
    return file


def test_systemd_understands_the_unit(installed: Path) -> None:
    done = subprocess.run(["systemd-analyze", "verify", str(installed)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_service_is_as_closed_as_can_be(installed: Path) -> None:
    shown = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", str(installed)], capture_output=True, text=True
    )
    level = re.search(r"Overall exposure level for \S+: ([0-9.]+)", shown.stdout)
    assert level and float(level[1]) <= EXPOSURE, shown.stdout + shown.stderr


def test_the_run_directory_is_where_the_user_looks() -> None:
    assert rundir.base() / NAME == Path("/run") / unit()["RuntimeDirectory"]
