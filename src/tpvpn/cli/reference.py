"""The reference of the command line, from the parsers themselves: docs/reference/cli.md and the man page tpvpn(1).

    python -m tpvpn.cli.reference markdown|man

`scripts/docs` writes the one, `scripts/package` the other.
"""

import os
import re
import sys
import time
from collections.abc import Iterator

from tpvpn import __version__
from tpvpn.cli import DESCRIPTION, EXIT_CODES, PROGRAM, command_line
from tpvpn.cli.grammar import Command, Option, command

HEAD = """\
# Commands

Made by `scripts/docs` from the program itself, which says the same with `--help`. Each is `kubectl tpvpn …` too, where
`kubectl-tpvpn` is on the PATH. How they end: [exit codes](exit-codes.md). What can stand in a file:
[configuration](configuration.md).
"""
FILES = (
    ("~/.config/tpvpn/config.yaml", "the configuration, by default ($XDG_CONFIG_HOME)"),
    ("~/.kube/config", "the kubeconfig, by default ($KUBECONFIG)"),
    ("/run/tpvpn/", "the sessions that run, and what they have to undo"),
)


def markdown() -> str:
    """The page."""
    program = command(command_line(PROGRAM), (PROGRAM,))
    commands = [one for one in program.all() if one is not program]
    rows = [f"| [`{one.name}`](#{'-'.join(one.words)}) | {one.summary} |" for one in commands]
    pages = ["\n".join(_section(one)) for one in commands]
    return "\n".join([HEAD, "| command | |", "|---|---|", *rows, "", *pages])


def _section(one: Command) -> Iterator[str]:
    yield f"## {one.name}\n"
    yield f"    {synopsis(one)}\n"
    yield f"{_sentence(one.description)}\n"
    for group in one.groups:
        shown = [option for option in group.options if "--help" not in option.flags]
        if shown:
            yield f"**{group.title}**{f' ({group.description})' if group.description else ''}\n"
            yield from (f"- {', '.join(f'`{flag}`' for flag in _flags(option))}{_what(option)}" for option in shown)
            yield ""
    if any(option.help for option in one.arguments):
        yield from (f"- `{option.value}`{_what(option)}" for option in one.arguments if option.help)
        yield ""


def _what(option: Option) -> str:
    return f": {option.help}" if option.help else ""


def _flags(option: Option) -> list[str]:
    """Each flag, the last with its value."""
    *others, last = option.flags
    return [*others, f"{last} {option.value}".rstrip()]


def synopsis(one: Command) -> str:
    """A command in a line."""
    words = [one.name]
    options = [option for option in one.options if "--help" not in option.flags]
    words += ["[OPTION …]"] if options else []
    words += ["|".join(below.words[-1] for below in one.commands)] if one.commands else []
    words += [f"[{option.value}]" if option.rest else option.value for option in one.arguments]
    return " ".join(words)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


def man(date: str) -> str:
    """The man page, in man(7)'s macros."""
    program = command(command_line(PROGRAM), (PROGRAM,))
    lines = [
        f'.TH TPVPN 1 "{date}" "tpvpn {__version__}"',
        *(".SH NAME", f"tpvpn \\- {_roff(DESCRIPTION[0].lower() + DESCRIPTION[1:].rstrip('.'))}"),
        *(".SH SYNOPSIS", r".B tpvpn", r"\fICOMMAND\fR [\fIOPTION\fR ...]", ".br"),
        *(".B kubectl tpvpn", r"\fICOMMAND\fR [\fIOPTION\fR ...]"),
        *(".SH DESCRIPTION", _roff(DESCRIPTION), ".SH COMMANDS"),
    ]
    for one in program.all():
        if one is not program:
            lines += [f".SS {_roff(synopsis(one))}", _roff(_sentence(one.description))]
            for group in one.groups:
                for option in group.options:
                    if "--help" not in option.flags:
                        lines += [".TP", rf"\fB{_roff(', '.join(_flags(option)))}\fR", _roff(option.help) or r"\&"]
    lines += [".SH EXIT STATUS", *_listed((str(code), text) for code, text in EXIT_CODES.items())]
    lines += [".SH FILES", *_listed(FILES), ".SH SEE ALSO", ".BR kubectl (1),", ".BR ip\\-route (8)"]
    return "\n".join(lines) + "\n"


def _listed(entries: Iterator[tuple[str, str]] | tuple[tuple[str, str], ...]) -> Iterator[str]:
    for name, text in entries:
        yield from (".TP", rf"\fB{_roff(name)}\fR", _roff(text))


def _roff(text: str) -> str:
    """Text as roff takes it: its own characters escaped, none at the beginning of a line that would be a request."""
    escaped = text.replace("\\", r"\e").replace("-", r"\-").replace("…", "...").replace("`", "")
    return re.sub(r"^(?=[.'])", r"\\&", escaped)


def main(words: list[str]) -> int:
    """Print one of them."""
    if words == ["markdown"]:
        print(markdown(), end="")
    elif words == ["man"]:
        print(
            man(time.strftime("%Y-%m-%d", time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))))), end=""
        )
    else:
        print("usage: python -m tpvpn.cli.reference markdown|man", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
