"""The ways to root's rights, with a real sudo: in a mount namespace that has its own sudoers and /run."""

import os
import pwd
import select
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_helper import eventually, laptop, network

__all__ = ["laptop"]

NOBODY = pwd.getpwnam("nobody")

SETUP = """
mount --make-rprivate /
mount --bind "$SUDOERS" /etc/sudoers
mount -t tmpfs none /run
exec "$@"
"""

BECOME = """
import os, pwd
nobody = pwd.getpwnam("nobody")
os.initgroups("nobody", nobody.pw_gid)
os.setresgid(*[nobody.pw_gid] * 3)
os.setresuid(*[nobody.pw_uid] * 3)
os.environ.pop("TPVPN_RUN_DIR")
"""

SESSION = """
import asyncio, os, sys
from test_helper import opened, session, alive, helper_of
from tpvpn import rundir
from tpvpn.helper.client import start_helper
# {become}
async def main():
    client = await start_helper()
    claimed = await opened(client)
    await client.apply(session(claimed))
    status = open("/proc/self/status").read().splitlines()
    print(*[line.split()[1] for line in status if line.startswith(("CapPrm", "CapEff", "CapAmb"))], end=" ")
    print(*os.getresuid(), *os.getresgid(), os.environ["HOME"], end=" ")
    (found,) = rundir.sessions()
    control = os.stat(found.control)
    print(found.uid, found.pid == os.getpid(), control.st_uid, oct(control.st_mode & 0o777), flush=True)
    try:
        await client.closed
    except asyncio.CancelledError:
        print("interrupted", flush=True)
        raise
try:
    asyncio.run(main())
except KeyboardInterrupt:
    pass
"""
EXPECTED = f"{'0' * 16} {'0' * 16} {'0' * 16} " + " ".join(
    map(str, [NOBODY.pw_uid] * 3 + [NOBODY.pw_gid] * 3 + [NOBODY.pw_dir, NOBODY.pw_uid, True, NOBODY.pw_uid, "0o700"])
)


def script(become: str) -> list[str]:
    paths = f"import sys; sys.path[:0] = [{os.path.dirname(__file__)!r}]\n"
    return [sys.executable, "-c", paths + SESSION.replace("# {become}", become)]


@pytest.fixture
def sudoers(tmp_path: Path) -> Iterator[Path]:
    file = tmp_path / "sudoers"
    file.touch()
    file.chmod(0o440)
    yield file


def in_mount_namespace(sudoers: Path, rule: str, *argv: str) -> tuple[list[str], dict[str, str]]:
    sudoers.write_text(f"Defaults env_reset, use_pty\n{rule}\n")
    environment = {**os.environ, "SUDOERS": str(sudoers), "HOME": NOBODY.pw_dir}
    return ["unshare", "-m", "sh", "-ec", SETUP, "sh", *argv], environment


ALLOWED = "nobody ALL=(root) NOPASSWD: ALL"


def test_a_user_gets_the_helper_from_sudo(laptop: Path, sudoers: Path) -> None:
    before = network()
    argv, environment = in_mount_namespace(sudoers, ALLOWED, "setsid", *script(BECOME))
    with subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().strip() == EXPECTED
        assert network() != before
        process.kill()
    eventually(lambda: network() == before, 1)


def test_started_by_sudo_the_process_becomes_the_user(laptop: Path, sudoers: Path) -> None:
    before = network()
    nobody = ["setpriv", f"--reuid={NOBODY.pw_uid}", f"--regid={NOBODY.pw_gid}", "--init-groups"]
    argv, environment = in_mount_namespace(sudoers, ALLOWED, *nobody, "sudo", "-n", *script(""))
    with subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().strip() == EXPECTED
        assert network() != before
        process.terminate()
    eventually(lambda: network() == before, 1)


@pytest.mark.parametrize("given", [{"SUDO_UID": "4294967294", "SUDO_GID": "1"}, {"SUDO_UID": "ann"}, {"SUDO_UID": "1"}])
def test_a_caller_of_sudo_who_is_none(laptop: Path, given: dict[str, str]) -> None:
    before = network()
    environment = {name: value for name, value in os.environ.items() if name != "SUDO_GID"} | given
    done = subprocess.run(script(""), env=environment, stderr=subprocess.PIPE, text=True)
    assert "SUDO_UID and SUDO_GID name no user of this host" in done.stderr.splitlines()[-1]
    eventually(lambda: network() == before, 1)


@pytest.mark.parametrize("rule", ["nobody ALL=(root) ALL", "root ALL=(ALL) ALL", "nobody ALL=(root) NOPASSWD: /bin/ls"])
def test_a_sudo_that_refuses(laptop: Path, sudoers: Path, rule: str) -> None:
    before = network()
    argv, environment = in_mount_namespace(sudoers, rule, "setsid", *script(BECOME))
    done = subprocess.run(argv, env=environment, stderr=subprocess.PIPE, text=True)
    assert "PrivilegeError: sudo did not start the root helper" in done.stderr.splitlines()[-1]
    assert network() == before


def test_no_sudo_at_all(laptop: Path, sudoers: Path) -> None:
    without = BECOME + 'os.environ["PATH"] = "/nonexistent"'
    argv, environment = in_mount_namespace(sudoers, ALLOWED, "setsid", *script(without))
    done = subprocess.run(argv, env=environment, stderr=subprocess.PIPE, text=True)
    assert "sudo is not installed" in done.stderr.splitlines()[-1]


def test_the_terminal_stays_the_users(laptop: Path, sudoers: Path) -> None:
    """sudo, which runs what it starts on a terminal of its own (use_pty), is gone when the session runs."""
    before = network()
    master, slave = os.openpty()
    settings = termios.tcgetattr(slave)
    argv, environment = in_mount_namespace(sudoers, ALLOWED, "setsid", "--ctty", *script(BECOME))
    with (
        subprocess.Popen(
            argv, env=environment, stdin=slave, stderr=slave, stdout=subprocess.PIPE, text=True
        ) as process,
        os.fdopen(master, "wb", buffering=0) as keyboard,
    ):
        assert process.stdout.readline().strip() == EXPECTED
        assert termios.tcgetattr(slave) == settings
        for _ in range(20):  # sudo, as it goes, may throw away what was typed
            keyboard.write(b"\x03")
            if select.select([process.stdout], [], [], 0.5)[0]:
                break
        else:
            process.kill()
        assert process.stdout.readline() == "interrupted\n"
        os.close(slave)
    eventually(lambda: network() == before, 1)
