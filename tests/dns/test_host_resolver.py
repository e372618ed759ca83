"""What is done with the host's resolver, and what becomes of it when others change theirs."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from host_resolver_session import DOMAINS, OURS

from peers import eventually, lab  # noqa: F401
from resolved_lab import FILES, Resolved
from tpvpn.dns.resolved import LOOK_AGAIN
from tpvpn.host_resolver import (
    BURST,
    SLOWLY,
    Limit,
    is_the_machines,
    keeper_of,
    leads_to_stub,
    wants_file,
)
from tpvpn.lab import Lab

NODE = "192.0.2.10"
DEVICE = "tpvpn0"
PROGRAM = Path(__file__).with_name("host_resolver_session.py")


class Session:
    """A running one; what it told so far is in its log."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process, self._log = process, log

    def told(self, what: str) -> list[Any]:
        """All that it told of a kind."""
        lines = [json.loads(line) for line in self._log.read_text().splitlines() if line.startswith("{")]
        return [line[what] for line in lines if what in line]

    def status(self) -> dict[str, Any]:
        """Its status as it is now."""
        return self.update("")

    def update(self, domains: str) -> dict[str, Any]:
        """Its status after an update."""
        before = len(self.told("status"))
        assert self.process.stdin is not None
        self.process.stdin.write(f"{domains}\n")
        self.process.stdin.flush()
        eventually(lambda: len(self.told("status")) > before, 5, self._log.read_text())
        return self.told("status")[-1]


class Host:
    """The laptop, with systemd-resolved."""

    def __init__(self, resolved: Resolved, directory: Path) -> None:
        self.resolved, self.lab, self._directory = resolved, resolved.lab, directory
        self.file = resolved.etc / "resolv.conf"

    @contextlib.contextmanager
    def session(self, mode: str = "auto", *who: str, fails: bool = False) -> Iterator[Session]:
        """A session of this mode, and perhaps of a name and an address, that has started."""
        log = self._directory / "-".join(("log", *who))
        command = self.lab.command("laptop", [sys.executable, str(PROGRAM), mode, *who])
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=output, text=True)
        session = Session(process, log)
        try:
            eventually(lambda: bool(session.told("status") + session.told("error")), 10, log.read_text())
            assert bool(session.told("error")) == fails, log.read_text()
            yield session
        finally:
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait(10) in (0, -signal.SIGKILL), log.read_text()
            assert "Traceback" not in log.read_text(), log.read_text()

    def plain(self, text: str) -> None:
        """/etc/resolv.conf is a file with this text."""
        self.file.unlink(missing_ok=True)
        self.file.write_text(text)

    def text(self) -> str:
        """What a program reads as /etc/resolv.conf."""
        return self.lab.run("laptop", ["cat", "/etc/resolv.conf"]).stdout

    def is_ours(self, address: str = OURS) -> bool:
        """Whether programs that read the file ask us, and nobody else."""
        lines = [line for line in self.text().splitlines() if line.startswith("nameserver")]
        return lines == [f"nameserver {address}"]

    def knows_us(self) -> bool:
        """Whether systemd-resolved asks us for our domains."""
        return OURS in self.resolved.resolvectl("dns", DEVICE) and f"~{DOMAINS[0]}" in self.resolved.resolvectl(
            "domain"
        )


@pytest.fixture(scope="module")
def running(lab: Lab) -> Iterator[Resolved]:  # noqa: F811
    with Resolved(lab) as resolved:
        resolved.uplink("eth0", NODE)
        yield resolved


@pytest.fixture
def host(running: Resolved, tmp_path: Path) -> Host:
    running.link("stub")
    running.restart()  # else it goes on asking whom a plain file named in the test before
    return Host(running, tmp_path)


def test_behind_the_stub_only_resolved_is_told(host: Host) -> None:
    with host.session() as session:
        status = session.status()
        assert (status["mode"], status["file"], status["warnings"]) == ("resolved", None, [])
        assert status["because"] == "systemd-resolved answers for this host"
        assert status["servers"] == [NODE]
        assert host.knows_us()
        assert host.file.readlink() == Path(FILES["stub"])
        assert not session.told("said")


def test_past_the_stub_the_file_is_taken_too(host: Host) -> None:
    """The file that names the servers themselves names us as well, as soon as resolved is told: that is no server."""
    host.resolved.link("uplink")
    with host.session() as session:
        status = session.status()
        assert status["mode"] == "resolved and file"
        assert "which systemd-resolved writes, leads past it" in status["because"]
        assert status["servers"] == [NODE]
        assert host.knows_us()
        assert host.is_ours()
    assert host.file.readlink() == Path(FILES["uplink"])
    eventually(lambda: OURS not in host.text(), 2, "with the device its server goes")


def test_a_plain_file_is_taken_too(host: Host) -> None:
    host.plain("# Generated by NetworkManager\nnameserver 192.0.2.53\n")
    with host.session() as session:
        status = session.status()
        assert status["mode"] == "resolved and file"
        assert "which NetworkManager writes, leads past it" in status["because"]
        assert status["servers"] == ["192.0.2.53"]
        assert host.is_ours()
    assert "nameserver 192.0.2.53" in host.text()


def test_modes_that_were_asked_for(host: Host) -> None:
    with host.session("off") as session:
        assert session.status()["mode"] == "off"
        assert not host.is_ours()
        assert OURS not in host.resolved.resolvectl("dns")
    with host.session("file") as session:
        assert session.status()["mode"] == "file"
        assert session.status()["servers"] == [NODE]
        assert host.is_ours()
        assert OURS not in host.resolved.resolvectl("dns", DEVICE)
    host.plain("nameserver 192.0.2.53\n")
    with host.session("resolved") as session:
        assert session.status()["mode"] == "resolved"
        assert host.knows_us()
        assert not host.is_ours()


def test_resolved_that_was_asked_for_and_is_not_there(host: Host) -> None:
    host.resolved.stop()
    try:
        with host.session("resolved", fails=True) as session:
            (error,) = session.told("error")
    finally:
        host.resolved.start()
    assert error == (
        "PrivilegeError: names cannot be had by systemd-resolved: systemd-resolved does not run; try `--dns auto`"
    )


def test_without_resolved_the_file_alone(host: Host) -> None:
    host.resolved.stop()
    host.plain("nameserver 192.0.2.53\n")
    try:
        with host.session() as session:
            status = session.status()
            assert (status["mode"], status["warnings"]) == ("file", [])
            assert status["because"] == (
                "systemd-resolved does not run, and nobody that is known writes /etc/resolv.conf"
            )
            assert host.is_ours()
            host.resolved.start()
            eventually(host.knows_us, 2, "resolved, which came later, is told")
            assert session.status()["mode"] == "resolved and file"
    finally:
        host.resolved.restart()


def test_one_that_hangs_costs_a_second_and_the_file_does_its_part(host: Host) -> None:
    os.kill(host.resolved.pid, signal.SIGSTOP)
    try:
        with host.session() as session:
            assert session.told("status")[0]["took"] < 2
            status = session.status()
            assert status["mode"] == "file"
            (warning,) = status["warnings"]
            assert warning.startswith("systemd-resolved does not answer within 1 s: /etc/resolv.conf, which led to it")
            assert host.is_ours()
    finally:
        os.kill(host.resolved.pid, signal.SIGCONT)


@pytest.mark.parametrize("forgetful", [True, False])
def test_a_restarted_one_is_told_again(host: Host, forgetful: bool) -> None:
    with host.session() as session:
        began = time.monotonic()
        host.resolved.restart(forgetful=forgetful)
        eventually(host.knows_us, 2, "told again")
        assert time.monotonic() - began < 2
        eventually(lambda: session.status()["mode"] == "resolved", 2, "and that is known")
        assert host.file.is_symlink(), "a restart is too short for the file to be taken"


def test_one_that_ended_leaves_its_part_to_the_file(host: Host) -> None:
    with host.session() as session:
        host.resolved.stop()
        try:
            eventually(host.is_ours, 5, "the file is taken")
            status = session.status()
            assert status["mode"] == "file"
            assert status["warnings"][0].startswith("systemd-resolved does not run: /etc/resolv.conf, which led to it")
        finally:
            host.resolved.restart()
        eventually(host.knows_us, 2, "told again")
        eventually(lambda: session.status()["warnings"] == [], 2, "no warning holds")


def test_what_another_program_took_is_told_again(host: Host) -> None:
    with host.session():
        host.resolved.resolvectl("revert", DEVICE)
        eventually(host.knows_us, 2, "told again")


def test_a_fight_is_fought_slowly_and_named(host: Host) -> None:
    with host.session() as session:
        for _ in range(BURST + 1):
            eventually(host.knows_us, 2, "told again")
            host.resolved.resolvectl("revert", DEVICE)
            if session.told("said"):
                break
        eventually(lambda: bool(session.told("said")), 2, "the fight is named")
        assert session.told("said") == [
            "another program takes the cluster's domains from systemd-resolved again and again"
        ]
        eventually(host.knows_us, SLOWLY + 2, "and is not given up")


def test_other_domains(host: Host) -> None:
    with host.session() as session:
        session.update("cluster.local other.example")
        assert "~other.example" in host.resolved.resolvectl("domain", DEVICE)
        assert "~svc" not in host.resolved.resolvectl("domain", DEVICE)


def test_a_vpn_s_servers_and_domains_are_told(host: Host) -> None:
    with host.session() as session:
        before = len(session.told("status"))
        host.resolved.uplink("eth0", NODE, "192.0.2.11")
        host.resolved.resolvectl("domain", "eth0", "~corp.example")
        eventually(lambda: session.told("status")[before:] != [], 2, "changed")
        assert session.status()["servers"] == [NODE, "192.0.2.11"]
        # resolved tells nobody of domains: they are looked at behind a change of servers, and now and then.
        eventually(lambda: session.status()["claimed"] == ["corp.example"], LOOK_AGAIN + 2, "claimed")
        host.resolved.resolvectl("domain", "eth0", "")
        host.resolved.uplink("eth0", NODE)
        eventually(lambda: session.status()["servers"] == [NODE], 2, "they went")
        eventually(lambda: session.status()["claimed"] == [], LOOK_AGAIN + 2, "it went")


@pytest.mark.alone
def test_a_file_that_others_write_is_taken_again(host: Host) -> None:
    host.plain("nameserver 192.0.2.53\n")
    with host.session() as session:
        host.plain("# Generated by NetworkManager\nnameserver 192.0.2.54\n")
        eventually(host.is_ours, 2, "taken again")
        eventually(lambda: session.status()["servers"] == ["192.0.2.54"], 2, "and the new server is asked")
        for number in range(BURST):
            host.plain(f"# Generated by NetworkManager\nnameserver 192.0.2.{60 + number}\n")
            eventually(lambda: host.is_ours() or bool(session.told("said")), 2, "taken again, or a fight")
        assert session.told("said") == [
            "NetworkManager writes /etc/resolv.conf again and again: have it leave the file alone"
        ]
        eventually(host.is_ours, SLOWLY + 2, "and is not given up")
        assert len(session.told("said")) == 1


SECOND = "246.0.0.6"
LOWER, UPPER = ("lower", OURS), ("upper", SECOND)


@pytest.mark.parametrize("order", [(LOWER, UPPER), (UPPER, LOWER)], ids=["the lower first", "the upper first"])
def test_two_sessions_have_the_file_without_a_fight(host: Host, order: tuple[tuple[str, str], ...]) -> None:
    """The upper one asks the lower one, whatever other programs write meanwhile, until either ends."""
    host.resolved.stop()
    host.plain("nameserver 192.0.2.53\n")
    try:
        with contextlib.ExitStack() as ended:
            stacks = {who: ended.enter_context(contextlib.ExitStack()) for who in (LOWER, UPPER)}
            lower, upper = (stacks[who].enter_context(host.session("auto", *who)) for who in (LOWER, UPPER))
            assert host.is_ours(SECOND)
            assert (lower.status()["servers"], upper.status()["servers"]) == (
                ["192.0.2.53"],
                [OURS, "192.0.2.53"],
            )
            lower.update("cluster.local other.example")
            assert host.is_ours(SECOND)
            for server in ("192.0.2.54", "192.0.2.55"):
                host.plain(f"nameserver {server}\n")

                def both_have_it(server: str = server) -> bool:
                    one, other = (
                        (session.status()["servers"], address)
                        for session, (_, address) in ((lower, LOWER), (upper, UPPER))
                    )
                    below, above = (one, other) if one[0] == [server] else (other, one)
                    return below[0] == [server] and above[0] == [below[1], server] and host.is_ours(above[1])

                eventually(both_have_it, 5, "one stands above the other, and both know who was written")
            first, last = order
            stacks[first].close()
            left = {LOWER: lower, UPPER: upper}[last]
            eventually(lambda: left.status()["servers"] == ["192.0.2.55"], 2, "it asks whom the other asked")
            assert host.is_ours(last[1])
            assert not lower.told("said") + upper.told("said")
        assert host.text() == "nameserver 192.0.2.55\n"
    finally:
        host.resolved.restart()


@pytest.mark.parametrize("kind", ["stub", "uplink"])
def test_sigkill_of_both_and_what_the_next_helper_repairs(host: Host, kind: Any) -> None:
    """Its own file leads programs past it, and must not go on to name a session that is dead."""
    host.resolved.link(kind)
    with host.session("auto" if kind == "uplink" else "file") as session:
        assert host.is_ours()
        eventually(lambda: session.status()["servers"] == [NODE], 2, "whom it asked before")
        pids = host.lab.run("laptop", ["pgrep", "--full", "tpvpn.helper.root"]).stdout.split()
        ours = [int(pid) for pid in pids if os.stat(f"/proc/{pid}/ns/net").st_ino == netns_of(host.resolved.pid)]
        for pid in (*ours, session.process.pid):
            os.kill(pid, signal.SIGKILL)
    assert host.is_ours()
    said = host.lab.run("laptop", [sys.executable, "-m", "tpvpn", "cleanup"])
    assert "/etc/resolv.conf" in said.stdout + said.stderr
    assert host.file.readlink() == Path(FILES[kind])
    eventually(lambda: OURS not in host.text() + host.resolved.resolvectl("dns"), 2, "resolved has forgotten us")
    if kind == "uplink":
        assert f"nameserver {NODE}" in host.text()


@pytest.mark.parametrize("kind", ["plain", "uplink"])
def test_sigkill_of_the_users_process(host: Host, kind: Any) -> None:
    if kind == "plain":
        host.plain("nameserver 192.0.2.53\n")
    else:
        host.resolved.link(kind)

    def restored() -> bool:
        if kind == "uplink":
            return host.file.is_symlink() and f"nameserver {NODE}" in host.text() and OURS not in host.text()
        return host.text() == "nameserver 192.0.2.53\n"

    with host.session() as session:
        assert session.status()["mode"] == "resolved and file"
        session.process.kill()
        began = time.monotonic()
        eventually(restored, 1, "the file is there again")
        print(f"restored after {time.monotonic() - began:.2f} s")
    host.lab.run("laptop", ["resolvectl", "query", "any.example"], check=False)  # it reads the file when it is asked
    assert OURS not in host.resolved.resolvectl("dns")


def netns_of(pid: int) -> int:
    return os.stat(f"/proc/{pid}/ns/net").st_ino


# -- pure --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "resolved", "stub", "expected"),
    [
        ("auto", True, True, False),
        ("auto", True, False, True),
        ("auto", False, True, True),
        ("auto", False, False, True),
        ("file", True, True, True),
        ("file", False, False, True),
        ("resolved", True, False, False),
        ("resolved", True, True, False),
        ("off", False, False, False),
    ],
)
def test_when_the_file_is_to_be_ours(mode: Any, resolved: bool, stub: bool, expected: bool) -> None:
    assert wants_file(mode, resolved=resolved, stub=stub) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nameserver 127.0.0.53\n", True),
        ("# a comment\nsearch lan\nnameserver\t127.0.0.54\n", True),
        ("nameserver 127.0.0.53\nnameserver 192.0.2.1\n", True),
        ("nameserver 192.0.2.1\nnameserver 127.0.0.53\n", False),
        ("#nameserver 127.0.0.53\nnameserver 127.0.0.1\n", False),
        ("nameserver\n", False),
        ("", False),
    ],
)
def test_what_leads_to_the_stub(text: str, expected: bool) -> None:
    assert leads_to_stub(text) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# Generated by NetworkManager\nnameserver 192.0.2.1\n", "NetworkManager"),
        ("# Generated by resolvconf\n", "resolvconf"),
        ("# Dynamic resolv.conf(5) file for glibc resolver(3) generated by resolvconf(8)\n", "resolvconf"),
        ("# This is /run/systemd/resolve/resolv.conf managed by man:systemd-resolved(8).\n", "systemd-resolved"),
        ("search resolvconf\nnameserver 192.0.2.1\n", None),
        ("", None),
    ],
)
def test_who_writes_a_file(text: str, expected: str | None) -> None:
    assert keeper_of(text) == expected


def test_a_fight_slows_down() -> None:
    limit = Limit()
    assert [limit.wait(second) for second in range(100, 100 + BURST)] == [0] * BURST
    last = 99 + BURST
    assert limit.wait(last + 1) == SLOWLY - 1
    assert limit.wait(last + SLOWLY) == 0
    assert limit.wait(last + SLOWLY + 1) == SLOWLY - 1, "it goes on, slowly"
    assert [limit.wait(last + 4 * SLOWLY + second) for second in range(BURST)] == [0] * BURST, "it was over"


def test_the_machine_s_file_in_a_network_namespace_that_is_not() -> None:
    """Seen from processes in each combination; the parent stands for process 1."""
    code = "import sys; from pathlib import Path; from tpvpn.host_resolver import is_the_machines as it; "
    code += f"print(it(Path('/proc/{os.getpid()}')))"

    def seen(*under: str) -> str:
        return subprocess.check_output([*under, sys.executable, "-c", code], text=True).strip()

    assert seen() == "False"
    assert seen("unshare", "--net") == "True"
    assert seen("unshare", "--net", "--mount") == "False"
    assert seen("unshare", "--mount") == "False"
    assert seen("unshare", "--net", "setpriv", "--reuid=65534", "--clear-groups") == "True"
    assert not is_the_machines(Path("/proc/0"))
