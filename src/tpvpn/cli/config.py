"""The configuration file of whoever runs the command: where it is, reading it, and `tpvpn config view`.

It is $XDG_CONFIG_HOME/tpvpn/config.yaml, ~/.config/tpvpn/config.yaml by default, and need not exist. Started by sudo,
it is the file of the user who called sudo, read with that user's rights.
"""

import argparse
import contextlib
import json
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpvpn.cli import Commands
from tpvpn.config import KEYS, LIMIT, Config, NameMapping, Value, parse
from tpvpn.errors import UsageError
from tpvpn.route.prefix import Prefix

if TYPE_CHECKING:
    from pwd import struct_passwd

SCHEMA = "tpvpn.config/1"


def add_parser(commands: Commands) -> None:
    """Add `config` and its one command."""
    config = commands.add_parser(
        "config",
        help="show the configuration",
        description="The configuration file's keys: docs/reference/configuration.md.",
    )
    verbs = config.add_subparsers(required=True, metavar="COMMAND")
    view = verbs.add_parser("view", help="show every key's value and where it is from (flags are no part of it)")
    view.add_argument("--output", choices=("text", "json"), default="text", help="json: for other programs")
    view.set_defaults(run=_view)


def load() -> Config:
    """The configuration of whoever runs this; UsageError when the file is broken or cannot be read."""
    account = _caller_of_sudo()
    data = _read(account)
    return Config() if data is None else parse(data, _shown(account))


def _caller_of_sudo() -> "struct_passwd | None":
    """The user who called sudo, when that is where root's rights are from."""
    import pwd

    uid = os.environ.get("SUDO_UID", "0")
    if os.geteuid() != 0 or uid == "0":
        return None
    try:
        return pwd.getpwuid(int(uid))
    except (KeyError, ValueError):
        raise UsageError(f"SUDO_UID is {uid!r}, which is no user of this host: unset it") from None


@contextlib.contextmanager
def _rights_of(account: "struct_passwd | None") -> Generator[None]:
    """Act as this user: root may be allowed less (a home on NFS), and must not show what the user may not read."""
    if account is None:
        yield
        return
    uid, gid, groups = os.geteuid(), os.getegid(), os.getgroups()
    os.initgroups(account.pw_name, account.pw_gid)
    os.setegid(account.pw_gid)
    os.seteuid(account.pw_uid)
    try:
        yield
    finally:
        os.seteuid(uid)
        os.setegid(gid)
        os.setgroups(groups)


def home() -> Path:
    """The home of whoever runs this."""
    return Path(_home(_caller_of_sudo()))


def _home(account: "struct_passwd | None") -> str:
    return account.pw_dir if account else os.path.expanduser("~")


def _path(account: "struct_passwd | None") -> Path:
    """Where the file is, or would be."""
    return _directory("XDG_CONFIG_HOME", ".config", account) / "config.yaml"


def state_directory() -> Path:
    """Where the logs of whoever runs this are."""
    return _directory("XDG_STATE_HOME", ".local/state", _caller_of_sudo())


def _directory(variable: str, default: str, account: "struct_passwd | None") -> Path:
    """Ours, of one kind; a relative path in the variable is ignored (XDG Base Directory Specification)."""
    base = os.environ.get(variable, "")
    return (Path(base) if os.path.isabs(base) else Path(_home(account), default)) / "tpvpn"


def _shown(account: "struct_passwd | None") -> str:
    """The path as a person writes it."""
    path, home = _path(account), Path(_home(account))
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)


def _read(account: "struct_passwd | None") -> bytes | None:
    """What is in the file, or enough to see that it is too large; None when there is none."""
    try:
        with _rights_of(account):
            # Not to be seen either when HOME is still another user's, as setpriv leaves it: then it is not ours.
            if not os.path.lexists(_path(account)):
                return None
            with open(_path(account), "rb", opener=_open) as file:
                return file.read(LIMIT + 1)
    except OSError as error:
        raise UsageError(f"cannot read {_shown(account)}: {error.strerror}; make it a file that you can read") from None


def _open(path: str, flags: int) -> int:
    """Open without blocking: a FIFO in the file's place must not hold us."""
    return os.open(path, flags | os.O_NONBLOCK)


def _view(arguments: argparse.Namespace) -> int:
    config, account = load(), _caller_of_sudo()
    if arguments.output == "json":
        values = [{"key": key.name, **_as_json(config.all(key), key.default is None)} for key in KEYS]
        print(json.dumps({"schema": SCHEMA, "file": str(_path(account)), "values": values}, indent=2))
    else:
        print(f"# {_shown(account)}", *_text(config), sep="\n")
    return 0


def _as_json(values: tuple[Value[Any], ...], many: bool) -> dict[str, Any]:
    """A value, or a list of them, and the places that it is from."""
    plain = [_plain(one.value) for one in values]
    places = dict.fromkeys(one.source.place for one in values)
    return {"value": plain if many else plain[0], "source": ", ".join(places) or "default"}


def _plain(value: Any) -> str | dict[str, str]:
    return {"name": value.name, "aliasFor": value.alias} if isinstance(value, NameMapping) else str(value)


def _text(config: Config) -> Iterator[str]:
    """YAML that can be pasted into a file, each value with the place that it is from."""
    above: list[str] = []
    for key in KEYS:
        *path, last = key.name.split(".")
        for depth, word in enumerate(path):
            if above[: depth + 1] != path[: depth + 1]:
                yield "  " * depth + f"{word}:"
        above, indent = path, "  " * len(path)
        values = config.all(key)
        if key.default is not None:
            yield f"{indent}{last}: {_quoted(values[0])}"
        elif values:
            yield f"{indent}{last}:"
            yield from (f"{indent}- {_quoted(value)}" for value in values)
        else:
            yield f"{indent}{last}: []  # default"


def _quoted(value: Value[Any]) -> str:
    """A value as YAML, which JSON is a part of, and its place as a comment."""
    match value.value:
        case Prefix():
            text = str(value.value)
        case NameMapping(name, alias):
            text = f"{{name: {json.dumps(name)}, aliasFor: {json.dumps(alias)}}}"
        case _:
            text = json.dumps(value.value)
    return f"{text}  # {value.source.place}"
