"""The audit: one line when a session opens, when a link of it is lost, when another joins it, and when it ends; and
one when a token is refused (docs/reference/wire.md).

Each is words of the form key=value that stay as they are from version to version; a value with anything but plain
characters in it is quoted as in JSON, so that a client's name makes no words of its own.
"""

import json
import logging
import re
import time

from tpvpn.manager.session import Session
from tpvpn.proto.message import printable

log = logging.getLogger("tpvpn.manager")


def opened(session: Session) -> None:
    """A client was taken in."""
    visitor, place = session.visitor, session.place
    more = {"ipv4": place.ipv4, "ipv6": place.ipv6, "security": visitor.security, "version": visitor.version}
    log.info(line("session-open", **_who(session), **more))


def ended(session: Session, reason: str) -> None:
    """A session is over, and why."""
    counters = session.counters
    carried = {"from_client": counters.received_bytes, "to_client": counters.sent_bytes}
    duration = f"{time.monotonic() - session.began:.1f}"
    log.info(line("session-end", **_who(session), duration=duration, **carried, reason=reason))


def lost_link(session: Session, number: int, reason: str) -> None:
    """A link is gone; the session may have others, and lingers without."""
    log.info(line("link-end", **_who(session), link=number, links=session.links, reason=reason))


def resumed(session: Session, number: int) -> None:
    """Another link has joined a session."""
    log.info(line("session-resume", **_who(session), link=number, security=session.visitor.security))


def refused(peer: str, client: str) -> None:
    """A client had no token of ours."""
    log.warning(line("token-refused", client=client, peer=peer))


def line(event: str, **values: object) -> str:
    """The words of one event; a value that there is not is a dash."""
    return " ".join(f"{key}={_quoted(value)}" for key, value in {"event": event, **values}.items())


def _who(session: Session) -> dict[str, object]:
    visitor = session.visitor
    return {"session": session.name, "user": visitor.user, "client": visitor.name, "peer": visitor.peer}


def _quoted(value: object) -> str:
    text = "-" if value is None else printable(str(value), 300)
    return text if re.fullmatch(r"[\w.:/@%+\[\]-]+", text, re.ASCII) else json.dumps(text, ensure_ascii=False)
