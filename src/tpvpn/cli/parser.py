"""The program's argument parser: what is wrong with a command line is one sentence, with the nearest that is right.

It knows no command. Every parser of the program is one of these, since argparse makes those of commands of the class
of the one above them; so a flag is looked for among those of the command that it was given to.
"""

import argparse
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn, cast

from tpvpn.errors import UsageError

_MISSING = "the following arguments are required"


class Parser(argparse.ArgumentParser):
    """An argument parser that raises a UsageError, and takes no abbreviation: what is short today may be two flags."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False)
        self._words: list[str] = []

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As argparse has it; unknown words are refused here, where the flags are those of one command."""
        self._words = list(args)
        found, rest = super().parse_known_args(self._words, namespace)
        if rest:
            self.error(self._unknown(next((word for word in rest if word.startswith("-")), rest[0])))
        return found, rest

    def error(self, message: str) -> NoReturn:
        """UsageError; a flag that is misspelt comes first, since what else is wrong may be because of it."""
        known = self._option_string_actions
        unknown = next((word for word in self._flags() if word.partition("=")[0] not in known), "")
        text = self._unknown(unknown) if unknown else message.removeprefix("argument ").replace(_MISSING, "missing")
        raise UsageError(f"{text}{' See' if text.endswith('?') else '; see'} `{self.prog} --help`")

    def _flags(self) -> Iterator[str]:
        """The words that are flags for certain: none behind a `--`, or that may be another command's."""
        positional = self._get_positional_actions()
        passes_on = any(action.nargs in (argparse.PARSER, argparse.REMAINDER) for action in positional)
        for word in self._words:
            if word == "--" or (passes_on and not word.startswith("-")):
                return
            if word.startswith("--"):
                yield word

    def _unknown(self, word: str) -> str:
        """What to say of a word that is no argument."""
        flag = word.partition("=")[0]
        if not flag.startswith("-"):
            return f"unknown argument {word!r}"
        if any(flag in parser._option_string_actions for parser in self._commands()):
            return f"{flag} stands behind the command: `{self.prog} COMMAND {flag} …`"
        return f"unknown flag {flag}{_meant(flag, self._option_string_actions)}"

    def _commands(self) -> Iterator["Parser"]:
        """The parsers of the commands below this one."""
        for action in self._get_positional_actions():
            if action.nargs == argparse.PARSER:
                below: dict[str, Parser] = cast("Any", action.choices)
                yield from below.values()

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        known = [str(one) for one in action.choices]
        if action.nargs == argparse.PARSER:
            raise argparse.ArgumentError(None, f"unknown command {value!r}{_meant(value, known)}")
        raise argparse.ArgumentError(action, f"{value!r} is none of {', '.join(known)}{_meant(value, known)}")


def _meant(word: str, known: Iterable[str]) -> str:
    """The nearest of what is known, as a question; "" when nothing is near."""
    import difflib

    names = {one.lstrip("-"): one for one in known}
    typed = word.lstrip("-").lower()
    begun = [name for name in names if typed and name.startswith(typed)]
    near = begun or difflib.get_close_matches(typed, names, 1)
    return f": did you mean {names[near[0]]}?" if near else ""
