"""macOS, Windows and WSL1: one clear sentence and exit code 5; what needs no Linux works; no traceback."""

import subprocess
import sys

import pytest

from tpvpn.cli.system import unfit

VIRTUAL_MACHINE = "run it in a Linux virtual machine"
WSL2 = "run it in WSL2 (`wsl --install`"
CONVERT = "`wsl --set-version NAME 2`"


@pytest.mark.parametrize(
    ("system", "release", "said"),
    [
        ("Linux", "6.12.0-amd64", None),
        ("Linux", "5.15.90.1-microsoft-standard-WSL2", None),
        ("Linux", "6.6.87.2-microsoft-standard-WSL2+", None),
        ("Linux", "5.10.16.3-Microsoft-custom-WSL2", None),
        ("Linux", "4.4.0-19041-Microsoft", CONVERT),
        ("Linux", "4.4.0-43-Microsoft", CONVERT),
        ("Darwin", "24.5.0", VIRTUAL_MACHINE),
        ("Windows", "11", WSL2),
        ("CYGWIN_NT-10.0-19045", "3.5.3-1.x86_64", WSL2),
        ("MINGW64_NT-10.0-22631", "3.4.10", WSL2),
        ("FreeBSD", "14.2-RELEASE", "FreeBSD has none: run it on Linux"),
    ],
)
def test_systems(system: str, release: str, said: str | None) -> None:
    reason = unfit(system, release)
    assert reason is None if said is None else reason and said in reason and "tpvpn needs Linux's TUN" in reason


# What other systems have not, and what is not there to be installed.
ELSEWHERE = """
import os, platform, signal, socket, sys
system, gone = sys.argv[1], sys.argv[2].split()
absent = ["pyroute2", "uvloop", "asyncinotify", "dbus_fast", *filter(str.islower, gone)]
sys.modules |= dict.fromkeys(absent)
for module in (os, signal, socket):
    for name in gone + [name for name in dir(socket) if "NETLINK" in name] + ["AF_PACKET", "setns", "recv_fds"]:
        if hasattr(module, name):
            delattr(module, name)
platform.system = lambda: system
from tpvpn.cli import main
sys.argv[:] = ["tpvpn", *sys.argv[3:]]
sys.exit(main())
"""
LACKING = {
    "Darwin": "",
    "Windows": "fcntl pwd grp termios resource geteuid getuid uname fork O_NONBLOCK O_NOFOLLOW SIGHUP SIGKILL AF_UNIX",
}


@pytest.mark.parametrize("system", LACKING)
def test_what_works_there(system: str) -> None:
    def tpvpn(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", ELSEWHERE, system, LACKING[system], *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=20)

    for word in ("--help", "version"):
        done = tpvpn(word)
        assert (done.returncode, done.stderr) == (0, "") and "tpvpn" in done.stdout
    assert tpvpn("conect").returncode == 2
    for words in (["plan"], ["connect"], ["status"], ["lab", "up"]):
        done = tpvpn(*words)
        assert (done.returncode, done.stdout) == (5, "")
        (line,) = done.stderr.splitlines()
        assert line == f"tpvpn: {unfit(system, '')}"
