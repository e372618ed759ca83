"""The real systemd-resolved on a lab's laptop, with a system bus of its own.

    with Lab("name") as lab, Resolved(lab) as resolved:
        resolved.uplink("eth0", "192.0.2.1")   # what DHCP would say
        resolved.link("uplink")                # /etc/resolv.conf leads past its stub, as it does not at first
        lab.run("laptop", ["resolvectl", "status"])

Its programs are Debian's packages, unpacked and never installed (scripts/tools): they are laid over the laptop's /usr
and seen in its mount namespace alone, as are its /run/dbus, /run/systemd and /etc.
"""

import contextlib
import os
import pwd
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from peers import eventually

PACKAGES = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tpvpn-tools" / "resolved"
PROGRAM = next(PACKAGES.glob("**/systemd/systemd-resolved"), PACKAGES / "lib/systemd/systemd-resolved")
FILES = {"stub": "/run/systemd/resolve/stub-resolv.conf", "uplink": "/run/systemd/resolve/resolv.conf"}
SOCKET = "/run/dbus/system_bus_socket"
USER = "systemd-resolve"

NAME, BUS_NAME = "org.freedesktop.resolve1", "org.freedesktop.DBus"
HAS_OWNER = ("busctl", "call", BUS_NAME, "/", BUS_NAME, "NameHasOwner", "s", NAME)

BUS = """
<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:path=/run/dbus/system_bus_socket</listen>
  <auth>EXTERNAL</auth>
  <servicedir>{packages}/usr/share/dbus-1/system-services</servicedir>
  <policy context="default">
    <allow user="*"/>
    <deny own="*"/>
    <deny send_type="method_call"/>
    <allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
    <allow receive_type="signal"/>
    <allow send_destination="org.freedesktop.DBus"/>
  </policy>
  <policy user="root">
    <allow own="*"/>
    <allow send_type="method_call"/>
  </policy>
  <include>{packages}/usr/share/dbus-1/system.d/org.freedesktop.resolve1.conf</include>
</busconfig>
"""
"""As dbus's own system.conf, with the policy of resolved; root may own any name, so that tests play programs."""

# $1 the unpacked packages, $2 the directory of the nss module below them, and then what they are laid over.
MOUNTS = """
set -e
for own in /run/dbus /run/systemd; do
    mkdir -p "$own"
    mountpoint -q "$own" || mount -t tmpfs -o mode=755 tmpfs "$own"
done
for over in /usr/bin "$2"; do mount -t overlay -o "lowerdir=$1$over:$over" tpvpn-resolved "$over"; done
"""


class Place(Protocol):
    """A lab, or another place with a laptop whose mounts and `run_directory`/etc are its own."""

    run_directory: Path

    def run(self, where: Literal["laptop"], argv: Sequence[str], *, check: bool = True) -> Any: ...
    def popen(self, where: Literal["laptop"], argv: Sequence[str], **options: Any) -> subprocess.Popen[Any]: ...


class Resolved:
    """systemd-resolved and its bus on the laptop of a lab; a context manager, after which both are gone.

    /etc/resolv.conf and nsswitch.conf are then as they were.
    """

    def __init__(self, lab: Place) -> None:
        self.lab = lab
        self.etc = lab.run_directory / "etc"
        self._log = lab.run_directory / "resolved.log"
        self._bus: subprocess.Popen[Any] | None = None
        self._process: subprocess.Popen[Any] | None = None
        self._uplinks: dict[str, tuple[str, ...]] = {}
        self._rest = contextlib.ExitStack()

    def __enter__(self) -> Self:
        assert PROGRAM.exists(), "systemd-resolved is not there: run scripts/tools"
        with self._rest:
            for name in ("passwd", "group", "nsswitch.conf", "resolv.conf"):
                self._rest.callback(_restorer(self.etc / name))
            self._add_user()
            self.link("stub")
            module = next((PACKAGES / "usr/lib").glob("*/libnss_resolve.so.2")).parent
            directory = f"/{module.relative_to(PACKAGES)}"
            self.lab.run("laptop", ["sh", "-c", MOUNTS, "mounts", str(PACKAGES), directory])
            self._rest.callback(self.lab.run, "laptop", ["umount", "--lazy", "/usr/bin", directory])
            self.start_bus()
            self._rest.callback(self.stop_bus)
            self.start()
            self._rest.callback(self.lab.run, "laptop", ["rm", "-rf", "/run/systemd/resolve"])
            self._rest.callback(self.stop)
            self._rest = self._rest.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._rest.close()

    # -- running -------------------------------------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        """The running systemd-resolved's."""
        assert self._process is not None, "it does not run"
        return self._process.pid

    @property
    def bus_pid(self) -> int:
        """The running bus's."""
        assert self._bus is not None, "it does not run"
        return self._bus.pid

    def start(self) -> None:
        """Start it, and wait until it has its name on the bus; it asks no neighbours, who would take seconds."""
        assert self._process is None
        own = self.lab.run_directory / "etc" / "systemd" / "resolved.conf.d" / "lab.conf"
        own.parent.mkdir(parents=True, exist_ok=True)
        own.write_text("[Resolve]\nLLMNR=no\nMulticastDNS=no\n")
        with self._log.open("ab") as log:
            self._process = self.lab.popen("laptop", [str(PROGRAM)], stdout=log, stderr=log, env=_environment())
        eventually(self._is_up, 5, f"systemd-resolved is up; it said\n{self._log.read_text()}")

    def stop(self) -> None:
        """End it; nothing to do when it does not run."""
        _end(self._process)
        self._process = None

    def restart(self, *, forgetful: bool = True) -> None:
        """Restart it; `forgetful`: nothing is kept of what it was told, but whoever does DHCP tells it again."""
        self.stop()
        if forgetful:
            self.lab.run("laptop", ["rm", "-rf", "/run/systemd/resolve/netif"])
        self.start()
        for device, servers in self._uplinks.items():
            self.uplink(device, *servers)

    def start_bus(self) -> None:
        """Start the system bus."""
        configuration = self.lab.run_directory / "bus.conf"
        configuration.write_text(BUS.format(packages=PACKAGES))
        command = ["dbus-daemon", f"--config-file={configuration}", "--nofork", "--nopidfile", "--nosyslog"]
        with self._log.open("ab") as log:
            self._bus = bus = self.lab.popen("laptop", command, stdout=log, stderr=log)
        eventually(lambda: bus.poll() is not None or self._succeeds("test", "-S", SOCKET), 5, "the system bus is there")
        assert bus.poll() is None, self._log.read_text()

    def stop_bus(self) -> None:
        """End the bus; nothing to do when it does not run."""
        _end(self._bus)
        self._bus = None
        self.lab.run("laptop", ["rm", "-f", SOCKET])

    def _is_up(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self._log.read_text()
        return "b true" in self.lab.run("laptop", HAS_OWNER, check=False).stdout and self._succeeds(
            "test", "-s", FILES["stub"]
        )

    def _succeeds(self, *argv: str) -> bool:
        return self.lab.run("laptop", argv, check=False).returncode == 0

    # -- what it is told -----------------------------------------------------------------------------------------------

    def uplink(self, device: str, *servers: str) -> None:
        """Tell it what DHCP would: the device's servers, which it asks by default."""
        self._uplinks[device] = servers
        self.resolvectl("dns", device, *servers)
        self.resolvectl("default-route", device, "true")

    def link(self, kind: Literal["stub", "uplink"]) -> None:
        """Make /etc/resolv.conf a link to its stub's file, or to the one that names the servers themselves."""
        file = self.etc / "resolv.conf"
        file.unlink(missing_ok=True)
        file.symlink_to(FILES[kind])

    def resolvectl(self, *words: str) -> str:
        """What `resolvectl` prints, as root on the laptop."""
        return self.lab.run("laptop", ["resolvectl", "--no-pager", *words]).stdout

    def use_nss(self, hosts: str = "files resolve [!UNAVAIL=return] dns") -> None:
        """Have programs on the laptop ask it by nss-resolve(8), as the line `hosts:` of nsswitch.conf says."""
        file = self.etc / "nsswitch.conf"
        lines = [line for line in file.read_text().splitlines() if not line.startswith("hosts:")]
        file.write_text("\n".join([*lines, f"hosts: {hosts}", ""]))

    def _add_user(self) -> None:
        """The laptop knows whom it becomes, whether or not this machine does."""
        with contextlib.suppress(KeyError):
            pwd.getpwnam(USER)
            return
        for name, line in ("group", f"{USER}:x:995:\n"), ("passwd", f"{USER}:x:995:995::/:/usr/sbin/nologin\n"):
            with (self.etc / name).open("a") as file:
                file.write(line)


def _environment() -> dict[str, str]:
    return {**os.environ, "SYSTEMD_LOG_TARGET": "console", "SYSTEMD_LOG_LEVEL": "info"}


def _end(process: subprocess.Popen[Any] | None) -> None:
    if process is not None and process.poll() is None:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _restorer(file: Path) -> Callable[[], None]:
    """What puts a file, or a link, back as it is now."""
    link = file.readlink() if file.is_symlink() else None
    text = None if link else file.read_bytes()

    def restore() -> None:
        file.unlink(missing_ok=True)
        if link is not None:
            file.symlink_to(link)
        elif text is not None:
            file.write_bytes(text)

    return restore
