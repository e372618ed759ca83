"""TAB in bash, zsh and fish: commands, options, and what there is now; fast, and silent when anything fails."""

import json
import os
import pty
import re
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from peers import eventually
from tpvpn import rundir
from tpvpn.cli import command_line
from tpvpn.cli.completion import SHELLS, Candidate, candidates
from tpvpn.cli.grammar import command

BIN = Path(sys.executable).parent
EKS = "arn:aws:eks:eu-west-1:123:cluster/blue"
PROGRAM = command(command_line("tpvpn"), ("tpvpn",))


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A home with two contexts, and two sessions that run here."""
    contexts = [{"name": name, "context": {"cluster": "c", "user": "u"}} for name in (EKS, "test")]
    (tmp_path / "config").write_text(json.dumps({"kind": "Config", "contexts": contexts}))
    state = tmp_path / "run" / str(os.stat("/proc/self/ns/net").st_ino)
    for name in ("default", "second"):
        (state / name).mkdir(parents=True)
        session = rundir.Session(name, os.getpid(), os.getuid(), "tpvpn0", 7070, rundir.boot_id())
        (state / name / "session").write_text(rundir.encode(session))
    path = f"{BIN}:/usr/bin:/bin"
    home = {"HOME": str(tmp_path), "KUBECONFIG": str(tmp_path / "config"), "TPVPN_RUN_DIR": str(tmp_path / "run")}
    return {"PATH": path, "TERM": "dumb", "LC_ALL": "C.UTF-8", **home}


def values(*words: str) -> list[str]:
    return [value for value, _ in candidates(PROGRAM, words)[0]]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["pl"], ["plan"]),
        (["lab", ""], ["up", "down", "vpn", "shell"]),
        (["lab", "--nonsense", "v"], ["vpn"]),
        (["lab", "vpn", ""], ["up", "down"]),
        (["lab", "vpn", "up", "--pre"], ["--prefix"]),
        (["lab", "shell", ""], ["laptop", "vpn", "node", "cluster"]),
        (["helm", "inst"], ["install"]),
        (["plan", "--on-conflict", "h"], ["hosts"]),
        (["plan", "--on-conflict=h"], ["--on-conflict=hosts"]),
        (["plan", "--on-conflict=hosts", "--ou"], ["--output"]),
        (["plan", "--service-cidr", "10.0.0.0/8", "--ou"], ["--output"]),
        (["plan", "--service-cidr", ""], []),
        (["manager", "ses"], ["sessions"]),
        (["completion", ""], [*SHELLS]),
        (["no-such-command", "x", "y"], []),
        (["connect", "--", "kub"], []),
    ],
    ids=" ".join,
)
def test_what_may_stand_here(words: list[str], found: list[str]) -> None:
    assert values(*words) == found


def test_where_nothing_else_fits_the_options_are_offered_and_files_where_files_fit() -> None:
    assert {"--context", "--output", "--help"} <= set(values("plan", ""))
    for words in (["connect", "--token-file", ""], ["plan", "--hosts-file=x"], ["manager", "--tls-key", "/etc"]):
        assert candidates(PROGRAM, words) == ([], True)


def test_each_word_has_its_meaning() -> None:
    named: list[Candidate] = candidates(PROGRAM, [""])[0]
    assert all(meaning for _, meaning in named)
    assert ("quit", "end a session, leaving nothing behind") in named


def ask(environment: dict[str, str], *words: str) -> list[str]:
    """`tpvpn __complete`, which says nothing but candidates."""
    asked = subprocess.run([BIN / "tpvpn", "__complete", *words], env=environment, capture_output=True, text=True)
    assert (asked.returncode, asked.stderr) == (0, "")
    *found, last = asked.stdout.splitlines()
    assert last in (":0", ":4")
    return [line.partition("\t")[0] for line in found]


def test_what_there_is_now(environment: dict[str, str], tmp_path: Path) -> None:
    assert ask(environment, "plan", "--context", "") == [EKS, "test"]
    assert ask(environment, "plan", "--context=te") == ["--context=test"]
    assert ask(environment, "plan", "--kubeconfig", "/nowhere", "--context", "") == []
    assert ask(environment, "quit", "--name", "") == ["default", "second"]
    assert ask(environment, "--line", "=:", f"tpvpn plan --context {EKS[:14]}") == [EKS[12:]]
    assert ask(environment, "--line", "", f"tpvpn plan --context '{EKS[:14]}") == [EKS]
    assert ask(environment, "plan", "-n", "") == [], "there is no cluster"
    (tmp_path / "config").write_text("contexts: {")
    assert ask(environment, "plan", "--context", "") == []
    assert ask(environment, "--line", "=:", "tpvpn plan --context \\") == []


def test_it_feels_immediate(environment: dict[str, str]) -> None:
    def seconds() -> float:
        """Of a processor, as others use it meanwhile."""
        before = os.times()
        ask(environment, "plan", "--context", "t")
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(seconds() for _ in range(3)) <= 0.3


class Shell:
    """An interactive shell in a terminal of its own."""

    def __init__(self, argv: list[str], environment: dict[str, str]) -> None:
        self.pid, self._terminal = pty.fork()
        if not self.pid:
            os.execvpe(argv[0], argv, environment)
        self._shown = ""

    def type(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def shows(self, pattern: str) -> re.Match[str]:
        """What it shows from here on, until it has this."""
        found: list[re.Match[str]] = []

        def seen() -> bool:
            while select.select([self._terminal], [], [], 0.02)[0]:
                self._shown += os.read(self._terminal, 4096).decode(errors="replace")
            match = re.search(pattern, self._shown)
            if match:
                self._shown = self._shown[match.end() :]
                found.append(match)
            return bool(match)

        eventually(seen, 10, pattern)
        return found[0]

    def completed(self, words: str) -> str:
        """The line that TAB makes of words, as the shell then has it."""
        self.type(f"{words}\t")
        self.type("'\x01echo '=\x05\r")  # quoted whole: beginning and end of the line
        return self.shows(r"\n=(.*?)\r").group(1)

    def end(self) -> None:
        os.close(self._terminal)
        os.waitpid(self.pid, 0)


@pytest.fixture(params=["bash", "zsh"])
def shell(request: pytest.FixtureRequest, environment: dict[str, str]) -> Iterator[Shell]:
    """With completion as the guide has it."""
    if request.param == "bash":
        shell = Shell(["bash", "--norc", "--noprofile", "-i"], environment)
        shell.type("source <(tpvpn completion bash); bind 'set bell-style none'; echo rea''dy\r")
    else:
        shell = Shell(["zsh", "-f", "-i"], environment)
        shell.type("unsetopt prompt_sp zle_bracketed_paste; autoload -U compinit; compinit -D -u\r")
        shell.type("source <(tpvpn completion zsh); bindkey -e; echo rea''dy\r")
    shell.shows("ready\r")
    yield shell
    shell.end()


def test_tab_in_a_terminal(shell: Shell) -> None:
    assert shell.completed("tpvpn lab u") == "tpvpn lab up "
    assert shell.completed("tpvpn plan --context arn:aws:eks:e") == f"tpvpn plan --context {EKS} "
    assert shell.completed("tpvpn plan --context=te") == "tpvpn plan --context=test "
    assert shell.completed("tpvpn quit --name se") == "tpvpn quit --name second "
    assert shell.completed("tpvpn connect --token-file /etc/hostn") == "tpvpn connect --token-file /etc/hostname "
    assert shell.completed("tpvpn connect --name x -- resolvec") == "tpvpn connect --name x -- resolvec"


def test_fish(environment: dict[str, str]) -> None:
    def completed(words: str) -> list[str]:
        script = 'tpvpn completion fish | source; complete --do-complete "$argv[1]"'
        command = ["fish", "--no-config", "--command", script, words]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()

    assert completed("tpvpn con") == [
        "connect\tgive this laptop the cluster's subnets",
        "config\tshow the configuration",
    ]
    assert completed("tpvpn plan --context ") == [EKS, "test"]
    assert completed("tpvpn plan --context=te") == ["--context=test"]
    assert completed("tpvpn quit --name se") == ["second"]
    assert completed("tpvpn connect --token-file /etc/hostn") == ["/etc/hostname"]
    assert "tpvpn" in [line.partition("\t")[0] for line in completed("tpvpn connect -- tpvp")]
    assert completed("tpvpn connect -- tpvpn lab u") == ["up\tbuild the lab and start a traffic manager on its node"]
