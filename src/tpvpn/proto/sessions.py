"""The handshake that asks for the manager's sessions, and may end some, instead of opening one: docs/reference/wire.md.

Pure. What is asked stands in the proven request, so nobody on the way can end a session; whether it may be done is the
manager's to say.

    manager                                                  client
      greeting                                          ->
                                                        <-   sessions  name, end_session, end_user, proof
      sessions  user, sessions, ended, proof            ->
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from tpvpn.errors import ProtocolError
from tpvpn.proto import message
from tpvpn.proto.handshake import VERSIONS, ClientSide


@dataclass(frozen=True, slots=True)
class Question:
    """What a client would like to know, and to have done."""

    name: str
    """What it calls itself."""
    end_session: str | None = None
    """End the session of this id."""
    end_user: str | None = None
    """End all sessions of this user."""


@dataclass(frozen=True, slots=True)
class Listed:
    """A session as the manager knows it."""

    session: str
    user: str
    """The name of its token."""
    client: str
    """What the client calls itself."""
    peer: str
    ipv4: str | None
    ipv6: str | None
    since: str
    """ISO 8601."""
    security: str
    version: int
    exit: dict[str, str | None]
    from_client: int
    """Bytes."""
    to_client: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What a manager says: the sessions that the user may see, without those that it has just ended."""

    user: str
    """Whom the token makes us."""
    sessions: list[Listed]
    ended: list[str]


class SessionsHandshake(ClientSide):
    """The client's side; when it is done `answered` is set."""

    request = answer = "sessions"

    def __init__(
        self,
        token: bytes,
        certificate_hash: bytes,
        nonce: bytes,
        question: Question,
        versions: Sequence[int] = VERSIONS,
    ) -> None:
        super().__init__(token, certificate_hash, nonce, versions)
        self.answered: Answer | None = None
        self._question = question

    def _asked(self) -> Mapping[str, object]:
        return asdict(self._question)

    def _take(self, answer: message.Message) -> None:
        self.answered = Answer(
            _text(answer, "user"),
            [_listed(one) for one in cast(list[object], message.member(answer, "sessions", list))],
            [message.printable(one, 64) for one in message.texts(answer, "ended")],
        )


def question(what: message.Message) -> Question:
    """What a client's `sessions` asks; ProtocolError when it has another shape."""
    ends = (message.optional(what, name, str) for name in ("end_session", "end_user"))
    return Question(_text(what, "name"), *ends)


def _listed(given: object) -> Listed:
    if not isinstance(given, dict):
        raise ProtocolError(f"the sessions of the other end have {str(given)[:60]!r} among them")
    one = {"type": "sessions", **cast(dict[str, Any], given)}
    exit = cast(dict[str, object], message.member(one, "exit", dict))
    return Listed(
        session=_text(one, "session"),
        user=_text(one, "user"),
        client=_text(one, "client"),
        peer=_text(one, "peer"),
        ipv4=_text(one, "ipv4") if one.get("ipv4") is not None else None,
        ipv6=_text(one, "ipv6") if one.get("ipv6") is not None else None,
        since=_text(one, "since"),
        security=_text(one, "security"),
        version=message.member(one, "version", int),
        exit={family: str(exit[family])[:32] if exit.get(family) else None for family in ("ipv4", "ipv6")},
        from_client=message.member(one, "from_client", int),
        to_client=message.member(one, "to_client", int),
    )


def _text(what: message.Message, name: str) -> str:
    return message.printable(message.member(what, name, str), 64)
