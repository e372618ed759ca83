"""`tpvpn manager sessions`: who sees and ends which sessions of a real manager, and the lines that it logs of them."""

import contextlib
import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from peers import Client, Laptop, Manager, ended, eventually, lab, laptop, running_manager, self_signed
from tpvpn.lab import Lab
from tpvpn.proto import message
from tpvpn.wire import frame

__all__ = ["lab", "laptop"]
TOKENS = {"ann": b"token-of-ann", "bob": b"token-of-bob", "admin": b"token-of-admin"}


@pytest.fixture(scope="module")
def manager(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Manager]:
    directory = tmp_path_factory.mktemp("sessions")
    (directory / "tokens").write_bytes(b"".join(b"%s: %s\n" % (name.encode(), one) for name, one in TOKENS.items()))
    with running_manager(lab, directory, "--token-file", str(directory / "tokens")) as manager:
        yield manager


@dataclass
class Asked:
    """What the command gave."""

    code: int
    out: str
    said: str

    @property
    def sessions(self) -> list[dict[str, Any]]:
        return json.loads(self.out)["sessions"]

    @property
    def clients(self) -> list[str]:
        return sorted(one["client"] for one in self.sessions)


def ask(laptop: Laptop, manager: Manager, user: str, *words: str, url: str = "", token: bytes = b"") -> Asked:
    (laptop.directory / user).write_bytes(b"%s: %s\n" % (user.encode(), token or TOKENS[user]))
    where = ("--manager", url or f"tcp://{manager.authority}", "--token-file", str(laptop.directory / user))
    done = subprocess.run(
        laptop.command("manager", "sessions", *where, *words), capture_output=True, text=True, timeout=20
    )
    assert "Traceback" not in done.stderr
    return Asked(done.returncode, done.stdout, done.stderr)


def test_a_user_sees_his_own_and_the_admin_all(laptop: Laptop, manager: Manager) -> None:
    with manager.session(name="one") as one, manager.session(TOKENS["bob"], "other"):
        assert one.echo()
        shown = ask(laptop, manager, "ann", "--output", "json")
        assert shown.code == 0, shown.said
        assert json.loads(shown.out)["schema"] == "tpvpn.manager-sessions/1"
        (mine,) = shown.sessions
        assert (mine["user"], mine["client"], mine["security"], mine["version"]) == ("ann", "one", "plain", 1)
        assert (mine["ipv4"], mine["ipv6"], mine["exit"]["ipv4"]) == (one.terms.ipv4, one.terms.ipv6, "kernel")
        assert mine["session"] == one.terms.session
        assert mine["peer"].startswith("192.0.2.2:")
        assert min(mine["from_client"], mine["to_client"]) >= 28
        assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", mine["since"])
        assert ask(laptop, manager, "bob", "--output", "json").clients == ["other"]
        assert ask(laptop, manager, "admin", "--output", "json").clients == ["one", "other"]
        lines = ask(laptop, manager, "admin").out.splitlines()
        assert len(lines) == 3
        assert lines[0].split()[:3] == ["SESSION", "USER", "CLIENT"]
        assert {line.split()[2] for line in lines[1:]} == {"one", "other"}


def test_asking_makes_no_session(laptop: Laptop, manager: Manager) -> None:
    before = manager.metrics()
    assert ask(laptop, manager, "admin").out == "no session that admin may see\n"
    after = manager.metrics()
    for name in ("tpvpn_manager_sessions", "tpvpn_manager_sessions_opened_total", "tpvpn_manager_refusals_total"):
        assert after[name] == before[name]


def hears_goodbye(client: Client, reason: str) -> None:
    while (heard := client.hear())["type"] == "pong":
        pass
    assert heard == {"type": "goodbye", "reason": reason, "again": False}
    ended(client.socket, 2)


def test_a_user_ends_his_own_and_nobody_elses(laptop: Laptop, manager: Manager) -> None:
    with manager.session(name="one") as one, manager.session(name="two") as two, manager.session(TOKENS["bob"]) as bob:
        for words in (("--end", bob.terms.session), ("--end-user", "bob"), ("--end-user", "nobody")):
            refused = ask(laptop, manager, "ann", *words)
            assert refused.code == 6
            assert "may not end" in refused.said
            assert "only its own user or the token named admin may" in refused.said
            assert len(refused.said.splitlines()) == 1
        assert bob.answers()
        done = ask(laptop, manager, "ann", "--end", one.terms.session, "--output", "json")
        assert (json.loads(done.out)["ended"], done.clients) == ([one.terms.session], ["two"])
        hears_goodbye(one, "ended by ann")
        manager.says(f'event=session-end session={one.terms.session} .* reason="ended by ann"')
        missing = ask(laptop, manager, "ann", "--end", one.terms.session)
        assert missing.code == 6
        assert f"there is no session '{one.terms.session}' here" in missing.said
        assert two.answers()
        assert ask(laptop, manager, "ann", "--end-user", "ann").out.splitlines() == [
            f"session {two.terms.session} has ended",
            "no session that ann may see",
        ]
        hears_goodbye(two, "ended by ann")
        assert bob.answers()


def test_the_admin_ends_anybodys(laptop: Laptop, manager: Manager) -> None:
    with manager.session(name="one") as one, manager.session(TOKENS["bob"]) as bob:
        assert ask(laptop, manager, "admin", "--end-user", "bob").code == 0
        hears_goodbye(bob, "ended by admin")
        assert ask(laptop, manager, "admin", "--end", one.terms.session).code == 0
        hears_goodbye(one, "ended by admin")
        nobody = ask(laptop, manager, "admin", "--end-user", "carol")
        assert (nobody.code, "there is no session of 'carol' here" in nobody.said) == (6, True)


def test_a_client_that_does_not_listen_is_ended_all_the_same(laptop: Laptop, manager: Manager) -> None:
    ping = frame.encode(frame.CONTROL, message.encode("ping", id=10**4000))
    with manager.session(name="deaf") as deaf:
        for _ in range(1000):
            deaf.socket.sendall(ping)
        assert ask(laptop, manager, "ann", "--end", deaf.terms.session).code == 0
        eventually(lambda: manager.metrics()["tpvpn_manager_sessions"] == 0, 3, "it has ended")


def test_who_has_no_token_is_told_nothing(laptop: Laptop, manager: Manager) -> None:
    refused = ask(laptop, manager, "ann", token=b"wrong")
    assert (refused.code, refused.out) == (6, "")
    assert "the token is not one of this manager's: check --token-file" in refused.said
    both = laptop.command("manager", "sessions", "--end", "x", "--end-user", "y")
    assert subprocess.run(both, capture_output=True).returncode == 2
    unnamed = subprocess.run(laptop.command("manager", "sessions"), capture_output=True, text=True)
    assert unnamed.returncode == 4, "neither a manager nor a kubeconfig"


def test_over_tls_and_to_a_client_that_is_told_why(laptop: Laptop, lab: Lab, tmp_path: Path) -> None:
    made = self_signed(tmp_path, "manager")
    with running_manager(lab, tmp_path, *made.options, "--exit", "socket") as manager:
        url = f"tls://{manager.authority}"
        client = laptop.connect(url, "--tls-pin", made.pin)
        with contextlib.closing(client.stderr):
            pin = ("--tls-pin", made.pin, "--output", "json")
            eventually(lambda: len(ask(laptop, manager, "ann", *pin, url=url).sessions) == 1, 10, "it is connected")
            (shown,) = ask(laptop, manager, "ann", *pin, url=url).sessions
            assert shown["security"] == "tls"
            assert ask(laptop, manager, "ann", *pin, "--end", shown["session"], url=url).code == 0
            end = laptop.ended(client)
        assert (end.code, "the manager ended the session: ended by ann" in end.sentence) == (7, True), end.said


def test_the_audit_has_a_line_for_each(manager: Manager) -> None:
    manager.logged.write_text("")
    with manager.session(name='my "laptop" user=bob') as client:
        assert client.echo()
        client.say("goodbye", reason="")
        ended(client.socket, 2)
        number, terms = client.terms.session, client.terms
    manager.says("event=session-end")
    who = rf'session={number} user=ann client="my \\"laptop\\" user=bob" peer=192\.0\.2\.2:\d+'
    opened, closed = manager.log().splitlines()
    assert re.fullmatch(
        rf".* INFO event=session-open {who} ipv4={terms.ipv4} ipv6={terms.ipv6} security=plain version=1", opened
    )
    said = 'reason="the client said goodbye"'
    assert re.fullmatch(
        rf".* INFO event=session-end {who} duration=\d+\.\d from_client=\d{{2,}} to_client=\d{{2,}} {said}", closed
    )
