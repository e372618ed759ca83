"""The command line as values: each command with its options, arguments and commands, read from argparse's parsers.

What describes it (the reference, the man page) and what completes it look here, so nothing has to be said twice. It
knows no command by name, and the one place where argparse's own attributes are looked at is this.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Option:
    """An option, or an argument that has no `flags`."""

    flags: tuple[str, ...]
    value: str
    """What stands behind it, as help shows it; "" for a switch."""
    choices: tuple[str, ...]
    help: str
    rest: bool
    """It takes all that follows."""
    required: bool


@dataclass(frozen=True, slots=True)
class Group:
    """Options that belong together."""

    title: str
    description: str
    options: tuple[Option, ...]


@dataclass(frozen=True, slots=True)
class Command:
    """A command, with those below it."""

    words: tuple[str, ...]
    summary: str
    description: str
    groups: tuple[Group, ...]
    arguments: tuple[Option, ...]
    commands: "tuple[Command, ...]"

    @property
    def name(self) -> str:
        """As it is typed."""
        return " ".join(self.words)

    @property
    def options(self) -> Iterator[Option]:
        """All of them."""
        return (option for group in self.groups for option in group.options)

    def all(self) -> Iterator["Command"]:
        """It and all below it, in their order."""
        yield self
        for command in self.commands:
            yield from command.all()


def command(parser: argparse.ArgumentParser, words: tuple[str, ...], summary: str = "") -> Command:
    """What a parser knows of itself."""
    groups: list[Group] = []
    arguments: list[Option] = []
    commands: list[Command] = []
    found: Any
    for found in parser._action_groups:  # pyright: ignore[reportPrivateUsage]
        options: list[Option] = []
        for action in found._group_actions:
            if isinstance(action, argparse._SubParsersAction):  # pyright: ignore[reportPrivateUsage]
                commands += _below(action, words)
            elif action.help != argparse.SUPPRESS:
                (options if action.option_strings else arguments).append(_option(action))
        if options:
            groups.append(Group(str(found.title or ""), str(found.description or ""), tuple(options)))
    description = parser.description or summary
    return Command(words, summary, description, tuple(groups), tuple(arguments), tuple(commands))


def _below(action: Any, words: tuple[str, ...]) -> Iterator[Command]:
    for entry in action._choices_actions:
        yield command(action.choices[entry.dest], (*words, entry.dest), entry.help or "")


def _option(action: Any) -> Option:
    choices = tuple(str(one) for one in action.choices or ())
    takes = action.nargs != 0
    value = action.metavar or ("|".join(choices) if choices else action.dest.upper())
    return Option(
        tuple(action.option_strings),
        str(value) if takes else "",
        choices,
        action.help % {"prog": "tpvpn"} if action.help else "",
        action.nargs == argparse.REMAINDER,
        bool(action.required),
    )
