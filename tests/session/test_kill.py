"""Nothing stays behind, whoever is killed: what alters routing is gone within a second, and the next start repairs."""

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from laptop import CLUSTER, EXIT, VPN, Laptop, Session, at_the_kernel_exit

from peers import eventually
from tpvpn.control import ask
from tpvpn.errors import UsageError
from tpvpn.helper.kernel import TABLES

NEVER = ("--never-proxy", "10.130.9.9/32", "--never-proxy", "fd10:130::99/128")
ALLOW = ("--allow-conflicting-subnets", "10.128.0.0/9", "--allow-conflicting-subnets", "fd10:100::/24")
CYCLES = 50


@pytest.fixture
def before(laptop: Laptop) -> Iterator[str]:
    """The laptop's state without a session, which it must have again when the test ends; and then a session works."""
    before = laptop.state()
    yield before
    works(laptop)
    laptop.is_as(before)


def works(laptop: Laptop) -> None:
    with laptop.connected(*ALLOW, *NEVER):
        laptop.reaches("cluster", CLUSTER)
        laptop.reaches("vpn", VPN)


def kill(*pids: int) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def test_the_users_process(laptop: Laptop, before: str) -> None:
    with laptop.connected(*ALLOW, *NEVER) as session:
        kill(session.process.pid)
        laptop.is_as(before, 1)
        assert session.wait() == -signal.SIGKILL
    laptop.reaches("vpn", VPN)


def test_the_helper(laptop: Laptop, before: str) -> None:
    with laptop.connected(*ALLOW, *NEVER) as session:
        kill(laptop.process("laptop", "tpvpn.helper.root"))
        eventually(lambda: harmless(laptop, before), 1, "nothing that alters routing")
        assert session.wait() == 7
        assert "helper" in session.said
    laptop.reaches("vpn", VPN)


def test_both(laptop: Laptop, before: str) -> None:
    with laptop.connected(*ALLOW, *NEVER) as session:
        kill(laptop.process("laptop", "tpvpn.helper.root"), session.process.pid)
        eventually(lambda: harmless(laptop, before), 1, "nothing that alters routing")
        session.wait()
    laptop.reaches("vpn", VPN)
    assert laptop.tpvpn("status").stdout == "no session runs here\n"


def harmless(laptop: Laptop, before: str) -> bool:
    """Nothing is left but rules that lead to our tables, and there throw routes, which lead back out; and files."""
    now, old = (set(state.partition("files\n")[0].splitlines()) for state in (laptop.state(), before))
    assert old <= now
    ours = tuple(f"lookup {table} proto 116" for table in TABLES)
    return all(line.endswith(ours) or line.startswith("throw ") for line in now - old)


def test_both_while_it_begins(laptop: Laptop, before: str) -> None:
    """At whatever moment: here each time the helper has written down another part of what it is about to do."""
    for lines in range(1, 9):
        journal = laptop.directory / f"part{lines}" / "journal"
        with laptop.start(*ALLOW, *NEVER, "--name", f"part{lines}") as session:
            wait_for_lines(journal, lines)
            kill(laptop.process("laptop", "tpvpn.helper.root"), session.process.pid)
            session.wait()
        eventually(lambda: harmless(laptop, before), 1, "nothing that alters routing")
        laptop.reaches("vpn", VPN[:1])


def wait_for_lines(file: Path, count: int) -> None:
    eventually(lambda: file.exists() and file.read_text().count("\n") >= count, 10, f"{count} lines in {file}")


def test_the_users_process_with_a_command(laptop: Laptop, before: str) -> None:
    """The command, which nobody ends, holds nothing of the session open."""
    script = ["sh", "-c", "echo started >&2; exec sleep 30"]
    with laptop.start(*ALLOW, "--", *script) as session:
        session.says("started", 10)
        (command,) = children(session)
        try:
            kill(session.process.pid)
            laptop.is_as(before, 1)
        finally:
            kill(command)


def children(session: Session) -> list[int]:
    pid = session.process.pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_the_manager(laptop: Laptop, before: str) -> None:
    node = "ip -n {0} link; ip -n {0} rule; ip -n {0} route show table all; ip netns exec {0} nft list ruleset"
    node = node.format(laptop.lab.namespace("node"))
    with laptop.connected(*ALLOW, "--give-up-after", "0") as session:
        assert EXIT != "kernel" or {"tpvpn", "116"} <= set(re.split(r"\W", laptop.sh(node)))
        kill(laptop.process("node", "manager"))
        try:
            assert session.wait(2) == 7
            laptop.is_as(before, 1)
            assert "manager" in session.said
            assert not {"tpvpn", "116"} & set(re.split(r"\W", laptop.sh(node)))
            assert laptop.connect(*ALLOW, "--", "true").returncode == 6
            assert laptop.state() == before
            laptop.reaches("vpn", VPN)
        finally:
            laptop.lab.start_manager()


@at_the_kernel_exit  # it is about the laptop
def test_fifty_sessions_leave_the_laptop_as_it_was(laptop: Laptop) -> None:
    """Byte by byte, after each, however it was ended."""
    before = laptop.state()
    endings = (quit, quit, terminate, interrupt)
    for cycle in range(CYCLES):
        with laptop.connected(*ALLOW, *NEVER) as session:
            endings[cycle % len(endings)](laptop, session)
        assert laptop.state() == before, f"cycle {cycle}"
    works(laptop)


def quit(laptop: Laptop, session: Session) -> None:
    """As `tpvpn quit` does it."""
    eventually(lambda: is_asked(laptop), 5, "the control socket")
    assert session.wait() == 0


def is_asked(laptop: Laptop) -> bool:
    try:
        return ask(laptop.directory / "default", "quit") == {"quitting": True}
    except UsageError:
        return False


def terminate(_: Laptop, session: Session) -> None:
    assert session.signal(signal.SIGTERM) == 0


def interrupt(_: Laptop, session: Session) -> None:
    assert session.signal(signal.SIGINT) == 130
