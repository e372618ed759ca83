"""What a token's holder may know of the sessions here, and end: his own; with the token `admin`, everybody's.

It knows nothing of how he was authenticated, nor of frames.
"""

from collections.abc import Mapping

from tpvpn.errors import ManagerError
from tpvpn.manager.session import Session
from tpvpn.proto.message import printable
from tpvpn.proto.sessions import Answer, Listed, Question

ADMIN = "admin"
"""The name of the token whose holder may see and end all sessions."""


def answer(user: str, question: Question, sessions: Mapping[str, Session], exit: Mapping[int, str | None]) -> Answer:
    """End what is to be ended, and list the rest. ManagerError, with nothing ended, when that may not be."""
    ending = _to_end(user, question, sessions)
    for session in ending:
        session.say_goodbye(f"ended by {user}")
    shown = [one for one in sessions.values() if one not in ending and user in (ADMIN, one.visitor.user)]
    kinds = {f"ipv{version}": kind for version, kind in exit.items()}
    return Answer(user, [_listed(one, kinds) for one in shown], [one.name for one in ending])


def _to_end(user: str, question: Question, sessions: Mapping[str, Session]) -> list[Session]:
    if question.end_session is not None:
        found = [one for one in sessions.values() if one.name == question.end_session]
        owners, what = [one.visitor.user for one in found], f"session {printable(question.end_session, 64)!r}"
    elif question.end_user is not None:
        found = [one for one in sessions.values() if one.visitor.user == question.end_user]
        owners, what = [question.end_user], f"a session of {printable(question.end_user, 64)!r}"
    else:
        return []
    if user != ADMIN and any(owner != user for owner in owners):
        raise ManagerError(f"{user} may not end {what}: only its own user or the token named {ADMIN} may")
    if not found:
        raise ManagerError(f"there is no {what.removeprefix('a ')} here: see the list without --end")
    return found


def _listed(session: Session, exit: dict[str, str | None]) -> Listed:
    visitor, counters = session.visitor, session.counters
    return Listed(
        session=session.name,
        user=visitor.user,
        client=visitor.name,
        peer=visitor.peer,
        ipv4=session.place.ipv4,
        ipv6=session.place.ipv6,
        since=session.since.isoformat(timespec="seconds"),
        security=visitor.security,
        version=visitor.version,
        exit=exit,
        from_client=counters.received_bytes,
        to_client=counters.sent_bytes,
    )
