"""`tpvpn lab` as it is typed: what it prints, what it runs, and its errors."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tpvpn.cli import lab as command
from tpvpn.errors import PrivilegeError, UsageError
from tpvpn.lab import Lab

PREFIX = f"tv{os.getpid()}-cli"

PROGRAM = """
import argparse
from tpvpn.cli import lab
parser = argparse.ArgumentParser()
lab.add_parser(parser.add_subparsers())
arguments = parser.parse_args()
raise SystemExit(arguments.run(arguments))
"""


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", PROGRAM, "lab", *words], capture_output=True, text=True)


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    return parser.parse_args(["lab", *words])


def test_up_shell_down() -> None:
    try:
        up = run("up", "--no-manager", "--no-ipv6", "--prefix", PREFIX)
        assert up.returncode == 0, up.stderr
        assert f"lab shell --prefix {PREFIX} -- " in up.stdout
        assert f"--token-file {Lab(PREFIX).token_file}" in up.stdout
        assert run("up", "--no-manager", "--no-ipv6", "--prefix", PREFIX).stdout == up.stdout
        shell = ("shell", "--prefix", PREFIX)
        address = ("ip", "-4", "-oneline", "address", "show", "dev", "eth0")
        assert "192.0.2.2/24" in run(*shell, "--", *address).stdout
        assert "192.0.2.10/24" in run(*shell, "node", "--", *address).stdout
        assert "10.132.0.10/32" in run(*shell, "cluster", *address).stdout
        assert run(*shell, "--", "sh", "-c", "exit 7").returncode == 7
    finally:
        down = run("down", "--prefix", PREFIX)
    assert (down.returncode, down.stdout, down.stderr) == (0, "", "")
    assert not Lab(PREFIX).run_directory.exists()


def test_the_vpn_leaves_and_returns() -> None:
    option = ("--prefix", f"{PREFIX}-vpn")
    show = ("shell", *option, "--", "ip", "route", "show", "10.0.0.0/8")
    try:
        assert run("up", "--vpn", "openvpn", "--no-manager", *option).returncode == 0
        for turn, shown in (("down", False), ("down", False), ("up", True), ("up", True)):
            done = run("vpn", turn, *option)
            assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
            assert ("dev tun0" in run(*show).stdout) is shown
    finally:
        run("down", *option)


@pytest.mark.parametrize("exit", ["kernel", "socket"])
def test_a_manager_with_either_exit(exit: str) -> None:
    option = ("--prefix", f"{PREFIX}-{exit}")
    try:
        assert run("up", "--exit", exit, *option).returncode == 0
        assert f"exit {exit} " in Lab(option[1]).log("manager").read_text()
    finally:
        run("down", *option)


def test_a_shell_without_a_lab() -> None:
    arguments = parse("shell", "--prefix", f"{PREFIX}-none")
    with pytest.raises(UsageError, match="lab up"):
        arguments.run(arguments)


def test_a_missing_program_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    arguments = parse("up", "--vpn", "openvpn", "--prefix", f"{PREFIX}-none")
    with pytest.raises(PrivilegeError, match=r"iperf3.*openvpn.*apt-get install .*iproute2.*openvpn"):
        arguments.run(arguments)
