"""Which of the sessions of this network namespace a command is about: the one that is named, or the only one."""

from typing import TYPE_CHECKING

from tpvpn.errors import UsageError

if TYPE_CHECKING:
    from tpvpn.rundir import Session

NOBODY = "no session runs here"


def running(name: str | None) -> "list[Session]":
    """The sessions that run, the oldest first, or the named one alone; UsageError when that does not run."""
    from tpvpn import rundir

    found = rundir.sessions()
    if name is None:
        return found
    rundir.directory(name)  # whether it is a name
    others = f": those that run are {_names(found)}" if found else ""
    if not (found := [one for one in found if one.name == name]):
        raise UsageError(f"no session {name} runs here{others}")
    return found


def the_one(name: str | None) -> "Session | None":
    """The session that is named, or the only one; None when none runs. UsageError when several do."""
    found = running(name)
    if len(found) > 1:
        raise UsageError(f"several sessions run: name one with --name ({_names(found)})")
    return found[0] if found else None


def _names(sessions: "list[Session]") -> str:
    return ", ".join(one.name for one in sessions)
