"""SIGKILL at each step of connect: at every line of the journal, before it is written and before it is carried out.

strace stops or kills the helper when it writes a line; nothing of that is in the product. However many steps there
are, each has its turn: nothing is left a second later that alters routes or names, and the next connect works, which
the next step's is.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from laptop import ALLOWED, Laptop, at_the_kernel_exit

from peers import eventually
from tpvpn.control import ask
from tpvpn.errors import TpvpnError
from tpvpn.helper.kernel import TABLES

pytestmark = at_the_kernel_exit  # what is killed is the laptop's
MODES = ("the helper before it is written", "the helper before it is done", "the user's process", "both")
MOST_STEPS = 100
HELPER = "tpvpn.helper.root"


class Traced:
    """`tpvpn connect` under strace, which sends the helper a signal as it writes line `step` of the journal."""

    def __init__(self, laptop: Laptop, step: int, number: str) -> None:
        self.laptop = laptop
        self._step, self._journal = step, laptop.directory / "default" / "journal"
        strace = ["strace", "-f", "-qq", "-o", "/dev/null", "-P", str(self._journal), "-e", "trace=write"]
        strace += ["-e", f"inject=write:signal={number}:when={step}", "--"]
        command = laptop.command([*strace, *laptop.connect_command(*ALLOWED)])
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def pid(self, word: str) -> int | None:
        """The process of this session with that word among its arguments."""
        with_it = (one for one in Path("/proc").iterdir() if one.name.isdecimal() and self._is(one, word))
        return next((int(one.name) for one in with_it), None)

    def _is(self, process: Path, word: str) -> bool:
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            is_python = words[0].endswith(Path(sys.executable).name.encode()) and word.encode() in words
            return is_python and (process / "ns" / "net").stat().st_ino == self.laptop.inode
        except OSError:
            return False

    def has_stopped(self) -> bool:
        """Whether the helper stands at its step, whose line it has written."""
        pid = self.pid(HELPER)
        try:
            written = self._journal.read_text().count("\n") >= self._step
            return written and bool(pid) and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "tT"
        except OSError:
            return False

    def end(self) -> str:
        """All that it said, when it has ended."""
        return self.process.communicate(timeout=15)[1]


@pytest.fixture
def before(laptop: Laptop) -> Iterator[str]:
    """The laptop's state without a session, which it has again in the end."""
    before = laptop.state()
    yield before
    with laptop.connected():
        pass
    laptop.is_as(before)


def is_harmless(laptop: Laptop, before: str) -> bool:
    """Rules that lead to tables of ours may be left, where throw routes lead back out, and files."""
    now, old = (state.partition("files\n") for state in (laptop.state(), before))
    left = set(now[0].splitlines()) - set(old[0].splitlines())
    ours = tuple(f"lookup {table} proto 116" for table in TABLES)
    routing = all(line.endswith(ours) or line.startswith("throw ") for line in left)
    return routing and set(old[0].splitlines()) <= set(now[0].splitlines())


def names(laptop: Laptop) -> str:
    return laptop.sh("cat /etc/resolv.conf")


@pytest.mark.parametrize("mode", MODES)
def test_every_step(laptop: Laptop, before: str, mode: str) -> None:
    names_before, steps = names(laptop), 0
    for step in range(1, MOST_STEPS):
        if not killed(laptop, mode, step):
            steps = step - 1
            break
        eventually(lambda: is_harmless(laptop, before), 1, f"{mode}, step {step}: nothing that alters routing")
        if mode != "both":  # nobody is left then who could: the next start does, and cleanup
            eventually(lambda: names(laptop) == names_before, 2, f"{mode}, step {step}: names are as before")
    assert steps >= 8, "a session, its routes and rules of both families, its names"
    assert laptop.tpvpn("cleanup").returncode == 0
    assert names(laptop) == names_before


def killed(laptop: Laptop, mode: str, step: int) -> bool:
    """Kill at that step; False when connect has not so many, and became ready."""
    traced = Traced(laptop, step, "SIGKILL" if mode == MODES[0] else "SIGSTOP")
    try:
        return _killed(traced, mode, step)
    finally:
        for word in ("connect", HELPER):
            if pid := traced.pid(word):
                os.kill(pid, signal.SIGKILL)
        traced.process.wait(10)
        assert traced.process.stderr
        traced.process.stderr.close()


def _killed(traced: Traced, mode: str, step: int) -> bool:
    laptop = traced.laptop

    def arrived() -> bool:
        ended = mode == MODES[0] and traced.process.poll() is not None
        return ended or traced.has_stopped() or is_ready(laptop)

    eventually(arrived, 15, f"step {step}")
    if is_ready(laptop) and not traced.has_stopped() and traced.process.poll() is None:
        assert laptop.tpvpn("quit").returncode == 0
        return False
    if mode == MODES[0]:
        return True
    helper, user = traced.pid(HELPER), traced.pid("connect")
    assert helper
    assert user
    victims = {MODES[1]: (helper,), MODES[2]: (user,), MODES[3]: (helper, user)}[mode]
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    if mode == MODES[2]:
        os.kill(helper, signal.SIGCONT)
    traced.process.wait(10)
    return True


def is_ready(laptop: Laptop) -> bool:
    try:
        return ask(laptop.directory / "default", "status")["state"] == "ready"
    except TpvpnError:
        return False
