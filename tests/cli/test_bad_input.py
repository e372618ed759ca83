"""What is typed wrong, asked of what is not there, or ended by Ctrl-C: one sentence and the exit code, no traceback."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from laptop import Laptop, lab_with_manager

from peers import eventually
from pod import namespace
from tpvpn.cli import main

TPVPN = (sys.executable, "-m", "tpvpn")
NOBODY = ("setpriv", "--reuid=65534", "--clear-groups")


def refused(code: int, done: subprocess.CompletedProcess[str]) -> str:
    """The one sentence with which it ended."""
    assert (done.returncode, done.stdout) == (code, ""), done
    (line,) = done.stderr.splitlines()
    return line.removeprefix("tpvpn: ")


# -- what is typed -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("", "missing: COMMAND; see `tpvpn --help`"),
        ("conect", "unknown command 'conect': did you mean connect? See `tpvpn --help`"),
        ("frobnicate", "unknown command 'frobnicate'; see `tpvpn --help`"),
        ("--verison", "unknown flag --verison: did you mean --version? See `tpvpn --help`"),
        ("--context x connect", "--context stands behind the command: `tpvpn COMMAND --context …`; see `tpvpn --help`"),
        ("connect --nmae x", "unknown flag --nmae: did you mean --name? See `tpvpn connect --help`"),
        ("connect --nmae=x", "unknown flag --nmae: did you mean --name? See `tpvpn connect --help`"),
        ("connect --nmae x -- sh --flag", "unknown flag --nmae: did you mean --name? See `tpvpn connect --help`"),
        ("plan --allow 10.0.0.0/8", "unknown flag --allow: did you mean --allow-conflicting-subnets? See `tpvpn plan"),
        (
            "plan --on-conflict skpi",
            "--on-conflict: 'skpi' is none of fail, skip, hosts, virtual: did you mean skip? S",
        ),
        ("plan --on-conflict=pray", "--on-conflict: 'pray' is none of fail, skip, hosts, virtual; see `tpvpn plan"),
        ("plan --request-timeout 0", "--request-timeout: '0' is no number of seconds above 0; see"),
        ("plan --name", "unknown flag --name: did you mean --namespace? See `tpvpn plan --help`"),
        ("connect --name", "--name: expected one argument; see `tpvpn connect --help`"),
        ("connect --links x", "--links: invalid int value: 'x'; see"),
        ("connect curl", "unknown argument 'curl'; a command to run stands behind `--`"),
        ("plan 10.0.0.0/8", "unknown argument '10.0.0.0/8'; see `tpvpn plan --help`"),
        ("plan -x", "unknown flag -x; see"),
        ("why", "missing: ADDRESS|NAME; see `tpvpn why --help`"),
        ("why --servce-cidr=10.0.0.0/8", "unknown flag --servce-cidr: did you mean --service-cidr? See `tpvpn why"),
        ("config veiw", "unknown command 'veiw': did you mean view? See `tpvpn config --help`"),
        ("manager sessions --ned x", "unknown flag --ned: did you mean --end? See `tpvpn manager sessions --help`"),
        ("helm instal", "did you mean install? See `tpvpn helm --help`"),
        ("lab shel", "unknown command 'shel': did you mean shell? See `tpvpn lab --help`"),
    ],
)
def test_what_is_typed_wrong(
    typed: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["tpvpn", *typed.split()])
    assert main() == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert said in line and line.startswith("tpvpn: ")


def test_what_is_passed_on_is_nobody_elses() -> None:
    """Behind `--`, and behind helm's verb, there are flags of others."""
    done = subprocess.run([*TPVPN, "helm", "install", "--frobnicate"], capture_output=True, text=True, env={"PATH": ""})
    assert "there is no helm on PATH" in refused(2, done)


# -- what is not there, or another's -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def laptop() -> Iterator[Laptop]:
    with lab_with_manager() as laptop:
        yield laptop


def test_sessions_that_do_not_run_or_are_anothers(laptop: Laptop) -> None:
    def nobody(*words: str) -> subprocess.CompletedProcess[str]:
        return laptop.run(*NOBODY, *TPVPN, *words)

    anothers = "this session is another user's: ask as that user, or as root"
    assert refused(2, laptop.tpvpn("status", "--name", "work")) == "no session work runs here"
    assert refused(2, laptop.tpvpn("quit")) == "no session runs here"
    with laptop.connected() as session:
        for command in (["status"], ["quit"], ["why", "1.2.3.4"]):
            there = refused(2, laptop.tpvpn(*command, "--name", "work"))
            assert there == "no session work runs here: those that run are default"
            assert "'Work!' is no session name" in refused(2, laptop.tpvpn(*command, "--name", "Work!"))
        assert refused(5, nobody("quit")) == refused(5, nobody("status", "--name", "default")) == anothers
        assert refused(5, nobody("why", "10.130.0.80")) == anothers
        all_of_them = nobody("status")
        assert all_of_them.returncode == 0 and anothers in all_of_them.stderr
        assert "there is no such name (NXDOMAIN)" in laptop.tpvpn("why", "nosuch.default").stdout
        assert laptop.tpvpn("quit").returncode == 0
        assert session.wait() == 0
        assert refused(2, laptop.tpvpn("quit")) == "no session runs here"


# -- Ctrl-C, and servers that are silent -------------------------------------------------------------------------------


KUBECONFIG = """apiVersion: v1
kind: Config
current-context: test
contexts: [{{name: test, context: {{cluster: test, user: ann}}}}]
clusters: [{{name: test, cluster: {{server: "{server}"}}}}]
users: [{{name: ann, user: {user}}}]
"""
PLUGIN = "{exec: {apiVersion: client.authentication.k8s.io/v1, interactiveMode: Never, command: ./plugin}}"
# A host whose one resolver takes questions and answers none.
NAMELESS = """
ip link set lo up
printf 'nameserver 127.0.0.1\\noptions timeout:30\\n' >"$0"
mount --bind "$0" /etc/resolv.conf
exec "$@"
"""
ASKED = """
import os, socket, subprocess, sys
asked = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
asked.bind(("127.0.0.1", 53))
process = subprocess.Popen(sys.argv[1:], start_new_session=True)
asked.recv(512)
print(process.pid, flush=True)
sys.exit(process.wait())
"""


class Silent:
    """A server that takes connections and says nothing, and kubeconfigs that lead to it."""

    def __init__(self, listening: socket.socket, directory: Path) -> None:
        self.listening, self.directory = listening, directory
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        plugin = directory / "plugin"
        plugin.write_text(f"#!/bin/sh\necho >{directory}/asked\nexec sleep 60\n")
        plugin.chmod(0o755)

    def environment(self, server: str, user: str = "{token: very-secret}") -> dict[str, str]:
        file = self.directory / "kubeconfig"
        file.write_text(KUBECONFIG.format(server=server, user=user.replace("./", f"{self.directory}/")))
        return {**os.environ, "KUBECONFIG": str(file)}

    def was_asked(self) -> bool:
        """Whether a client, or its plugin, is there."""
        if (self.directory / "asked").exists():
            return True
        with contextlib.suppress(BlockingIOError):
            self.listening.accept()[0].detach()
            return True
        return False


@pytest.fixture
def silent(tmp_path: Path) -> Iterator[Silent]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        yield Silent(listening, tmp_path)


@pytest.mark.parametrize("words", ["plan", "connect", "manager sessions"])
@pytest.mark.parametrize("user", ["{token: very-secret}", PLUGIN], ids=["API server", "plugin"])
def test_ctrl_c_while_a_server_is_silent(silent: Silent, words: str, user: str) -> None:
    environment = silent.environment(silent.url, user)
    client = subprocess.Popen([*TPVPN, *words.split()], env=environment, stderr=subprocess.PIPE, text=True)
    with client:
        eventually(silent.was_asked, 10)
        client.send_signal(signal.SIGINT)
        assert client.wait(3) == 130
        assert client.stderr and client.stderr.read() == ""


@pytest.mark.parametrize("words", ["plan", "connect", "why x.example.com --service-cidr 10.130.0.0/16"])
def test_ctrl_c_while_no_resolver_answers(silent: Silent, words: str) -> None:
    """A lookup cannot be cancelled: it is left behind."""
    environment = silent.environment("https://api.example.com")
    with namespace("nameless") as netns:
        inside = ["ip", "netns", "exec", netns, "sh", "-ec", NAMELESS, str(silent.directory / "resolv.conf")]
        command = [*inside, sys.executable, "-c", ASKED, *TPVPN, *words.split()]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, env=environment, **pipes) as host:
            os.kill(int(host.stdout.readline()), signal.SIGINT)
            assert host.wait(3) == 130
            assert host.stderr.read() == ""


@pytest.mark.parametrize("words", ["plan", "connect", "manager sessions"])
def test_the_request_timeout_is_kept(silent: Silent, words: str) -> None:
    command = [*TPVPN, *words.split(), "--request-timeout", "0.2s"]
    done = subprocess.run(command, env=silent.environment(silent.url), capture_output=True, text=True, timeout=8)
    assert refused(4, done) == f"{silent.url} did not answer within 0.2 s: is the VPN up that leads to it?"
