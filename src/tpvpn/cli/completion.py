"""`tpvpn completion bash|zsh|fish`, and what the shells then ask: `tpvpn __complete WORD…`, the last one unfinished.

The answer is cobra's, as kubectl asks of its plugins' `kubectl_complete-NAME` too: a line VALUE<TAB>WORDS for each
candidate, then `:0` where file names fit, else `:4`. Commands, options and their choices come from the parsers;
contexts, namespaces, sessions and labs from where they are, now. Whatever fails on the way is no candidate: a person
who presses TAB has asked for no error.
"""

import argparse
import contextlib
import os
import shlex
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from tpvpn.cli import PROGRAM, Commands, command_line
from tpvpn.cli.grammar import Command, Option, command

SHELLS = ("bash", "zsh", "fish")
PATIENCE = 1.0
"""Seconds for the API server to name its namespaces; who presses TAB waits no longer."""
_FILES = ("F", "FILE")
_SCRIPTS = Path(__file__).parent / "shells"

Given: TypeAlias = Mapping[str, str]
"""The options that stand before, with their values."""
Candidate: TypeAlias = tuple[str, str]
"""A word, and what it means."""


@dataclass(slots=True)
class Line:
    """What stands before the unfinished word: the command it belongs to, and what was given to it."""

    command: Command
    given: dict[str, str] = field(default_factory=dict[str, str])
    arguments: int = 0
    waiting: Option | None = None
    """The option whose value comes next."""

    def take(self, word: str) -> None:
        """The next word, which is finished."""
        if self.waiting:
            self.given[self.waiting.flags[-1]], self.waiting = word, None
        elif word.startswith("-"):
            flag, equals, value = word.partition("=")
            option = _option(self.command, flag)
            if option and equals:
                self.given[option.flags[-1]] = value
            elif option and option.value:
                self.waiting = option
        elif below := [one for one in self.command.commands if one.words[-1] == word]:
            self.command, self.arguments = below[0], 0
        else:
            self.arguments += 1


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "completion",
        help="print what makes a shell complete this program's words",
        description="Print what makes a shell complete commands, options, contexts, namespaces and sessions. For this "
        "shell: source <(tpvpn completion bash), or zsh; tpvpn completion fish | source. kubectl completes "
        "`kubectl tpvpn` by itself.",
    )
    parser.add_argument("shell", choices=SHELLS)
    parser.set_defaults(run=_run, anywhere=True)


def _run(arguments: argparse.Namespace) -> int:
    print((_SCRIPTS / f"{PROGRAM}.{arguments.shell}").read_text(), end="")
    return 0


def answer(words: Sequence[str]) -> int:
    """Print the candidates for the last word; with `--line BREAKS LINE`, of a line as bash has it."""
    cut = 0
    if words[:1] == ["--line"]:
        breaks, line = words[1:]
        words = _split(line)[1:]
        # Bash replaces what stands behind the last of its breaks only, of a context arn:aws:eks:… for example.
        cut = max(words[-1].rfind(one) for one in "=:" if one in breaks) + 1 if words and breaks else 0
    try:
        found, files = candidates(command(command_line(PROGRAM), (PROGRAM,)), words or [""])
    except Exception:
        found, files = [], False
    print("".join(f"{value[cut:]}\t{means}\n" for value, means in found), end="")
    print(":0" if files else ":4")
    return 0


def _split(line: str) -> list[str]:
    """A line's words, the last one unfinished."""
    for closing in ("", '"', "'"):
        with contextlib.suppress(ValueError):
            return [*shlex.split(line + closing), *([""] if line[-1:].isspace() and not closing else [])]
    return []


def candidates(program: Command, words: Sequence[str]) -> tuple[list[Candidate], bool]:
    """What may stand in the place of the last word, and whether file names may."""
    line, last = Line(program), words[-1]
    for word in words[:-1]:
        if word == "--":
            return [], True
        line.take(word)
    here = line.command
    if line.waiting:
        return _values(line.waiting, line, "", last)
    flag, equals, _ = last.partition("=")
    if last.startswith("-") and equals:
        option = _option(here, flag)
        return _values(option, line, f"{flag}=", last) if option else ([], False)
    below = [(one.words[-1], one.summary) for one in here.commands]
    arguments = here.arguments[line.arguments : line.arguments + 1]
    found, files = _values(arguments[0], line, "", last) if arguments else ([], False)
    found += _beginning(below, last)
    if last.startswith("-") or (not found and not files):
        flags = [(flag, option.help) for option in here.options for flag in option.flags if flag.startswith("--")]
        found += _beginning(flags, last)
    return found, files and not last.startswith("-")


def _option(command: Command, flag: str) -> Option | None:
    return next((option for option in command.options if flag in option.flags), None)


def _beginning(all: Iterable[Candidate], start: str) -> list[Candidate]:
    return [one for one in all if one[0].startswith(start)]


def _values(option: Option, line: Line, before: str, last: str) -> tuple[list[Candidate], bool]:
    """What an option, or an argument, may be; `before` stands in front of it in the same word."""
    live = _LIVE.get((line.command.words[1:], option.flags[-1:])) or _LIVE.get(((), option.flags[-1:]))
    known = live(line.given) if live else option.choices
    found = [(before + value, "") for value in known]
    return _beginning(found, last), not live and option.value in _FILES


# -- what there is now -------------------------------------------------------------------------------------------------


def _contexts(given: Given) -> Iterable[str]:
    from tpvpn.kube.kubeconfig import contexts

    return contexts(given.get("--kubeconfig"))


def _namespaces(given: Given) -> Iterator[str]:
    """As kubectl names them: it starts in a fifth of the time that this process would need to ask by itself."""
    flags = [f"{flag}={given[flag]}" for flag in ("--kubeconfig", "--context", "--as") if flag in given]
    asked = ["kubectl", "get", "namespaces", "--output=name", f"--request-timeout={PATIENCE:g}s", *flags]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, timeout=PATIENCE, stdin=subprocess.DEVNULL).stdout
    except (OSError, subprocess.TimeoutExpired):
        return iter(())
    return (line.removeprefix("namespace/") for line in told.splitlines())


def _sessions(_: Given) -> Iterator[str]:
    from tpvpn import rundir

    return (session.name for session in rundir.sessions())


def _labs(_: Given) -> list[str]:
    from tpvpn.lab.lab import RUN

    return sorted(os.listdir(RUN)) if RUN.exists() else []


def _places(_: Given) -> Iterable[str]:
    from tpvpn.lab.topology import WHERE

    return WHERE


_LIVE: Mapping[tuple[tuple[str, ...], tuple[str, ...]], Callable[[Given], Iterable[str]]] = {
    ((), ("--context",)): _contexts,
    ((), ("--namespace",)): _namespaces,
    ((), ("--manager-namespace",)): _namespaces,
    ((), ("--name",)): _sessions,
    ((), ("--prefix",)): _labs,
    (("lab", "shell"), ()): _places,
}
"""By the command, or () for every one, and the option, or () for an argument."""
