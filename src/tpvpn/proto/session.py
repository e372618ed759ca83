"""The handshake that opens a session: greeting, hello, welcome (docs/reference/wire.md); its proofs are `handshake`'s.

It knows nothing of sockets: frames' payloads in, frames' payloads out; the nonce is an argument.

    manager                                   client
      greeting  versions, nonce          ->
                                         <-   hello    version, nonce, name, offer, proof
      welcome   session, terms, proof    ->

A session outlives the link that opened it. Another one joins it by the same handshake: its hello names the session, and
proves to have its secret. What the manager welcomes it to is the same session, or a new one when it has that no more.
"""

import hmac
import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

from tpvpn.errors import ProtocolError
from tpvpn.proto import message
from tpvpn.proto.handshake import CLIENT, MANAGER, VERSIONS, ClientSide, Transcript, check_nonce, check_version
from tpvpn.proto.sessions import Answer, Question, question
from tpvpn.wire import vnet
from tpvpn.wire.vnet import Offload

SPACE4 = ipaddress.IPv4Network("246.0.0.0/12")
SPACE6 = ipaddress.IPv6Network("fd74:7076:706e::/48")
"""Where the addresses of sessions come from (class E, and a ULA). A client takes no others: they configure the laptop,
and could be those of its LAN, of a host inside its VPN or of the cluster."""
VIRTUAL4 = ipaddress.IPv4Network("246.128.0.0/9")
VIRTUAL6 = ipaddress.IPv6Network("fd74:7077::/32")
"""Where a client's virtual subnets are, which a manager maps to the cluster's own (proto/config)."""
Space = ipaddress.IPv4Network | ipaddress.IPv6Network
MOST_LINKS = 8
"""Of a session; they are numbered from 0."""
_LEAST_MTU4, _LEAST_MTU6 = 576, 1280  # RFC 791 section 3.2, RFC 8200 section 5


def address_in(space: Space, chance: int) -> str:
    """An address of the space, by a large number."""
    return str(space[1 + chance % (space.num_addresses - 2)])


@dataclass(frozen=True, slots=True)
class Offer:
    """What a client says of itself and would like to have."""

    name: str
    ipv4: str | None = None
    """The address it would like to keep, or None for any."""
    ipv6: str | None = None
    offloads: list[str] = field(default_factory=list[str])
    session: str | None = None
    """The session that this link is to belong to."""
    link: int = 0
    """Its number there; it takes the place of one that has the same."""
    resume: str | None = None
    """Proves that the client has the session's secret."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What a manager grants for a session."""

    session: str
    ipv4: str | None
    """The client's address, as a /32; None when the manager carries no IPv4."""
    ipv6: str | None
    mtu: int
    offloads: list[str]
    exit: dict[str, str | None]
    """Kind of exit for each family: {"ipv4": "kernel", "ipv6": None}."""
    pod: str
    facts: dict[str, Any] = field(default_factory=dict[str, Any])
    """What was seen inside the pod: its addresses, its resolv.conf."""
    config: dict[str, Any] = field(default_factory=dict[str, Any])
    """The client configuration that the cluster's admin set for everyone."""
    linger: int = 0
    """Seconds for which the session outlives its last link."""

    @property
    def ping(self) -> dict[str, bool]:
        """For each family that is carried whether ping is, of which `facts` may say that it is not."""
        told: Any = self.facts.get("ping")
        refused = [family for family in self.exit if isinstance(told, dict) and told.get(family) is False]  # pyright: ignore[reportUnknownMemberType]
        return {family: family not in refused for family, kind in self.exit.items() if kind}

    @property
    def without_ping(self) -> str:
        """The families that are carried and ping not, in words."""
        return " and ".join(f"IPv{family[-1]}" for family, carried in self.ping.items() if not carried)


@dataclass(frozen=True, slots=True)
class Held:
    """A session as its client has it."""

    terms: Terms
    secret: bytes

    def wanted(self, offer: Offer, link: int) -> Offer:
        """The offer with which a link of that number joins the session, or has one of the same addresses."""
        terms = self.terms
        return replace(offer, ipv4=terms.ipv4, ipv6=terms.ipv6, session=terms.session, link=link)


class ClientHandshake(ClientSide):
    """The client's side; when it is done `held` is set. `secret`: of the session that the offer names."""

    request, answer = "hello", "welcome"

    def __init__(
        self,
        token: bytes,
        certificate_hash: bytes,
        nonce: bytes,
        offer: Offer,
        secret: bytes | None = None,
        versions: Sequence[int] = VERSIONS,
    ) -> None:
        super().__init__(token, certificate_hash, nonce, versions)
        self.held: Held | None = None
        self._offer, self._secret = offer, secret

    def _asked(self) -> Mapping[str, object]:
        if self._secret is None:
            return asdict(self._offer)
        return asdict(replace(self._offer, resume=self._transcript.resume(self._secret)))

    def _take(self, answer: message.Message) -> None:
        terms = _terms(answer)
        joined = self._secret if terms.session == self._offer.session else None
        self.held = Held(terms, joined or self._transcript.secret())


class ManagerHandshake:
    """The manager's side: send `greeting`, `receive` the request, decide, send what `welcome` or `sessions` gives."""

    def __init__(
        self, tokens: Mapping[str, bytes], certificate_hash: bytes, nonce: bytes, versions: Sequence[int] = VERSIONS
    ) -> None:
        self.greeting = message.encode("greeting", versions=list(versions), nonce=nonce.hex())
        self.user = ""
        """The name of the token that the client proved to have."""
        self.version = 0
        self._versions = versions
        self._transcripts = {name: Transcript(token, certificate_hash) for name, token in tokens.items()}
        self._greeted = Transcript(b"", certificate_hash)
        for transcript in (*self._transcripts.values(), self._greeted):
            transcript.add(self.greeting)

    def receive(self, payload: bytes) -> Offer | Question:
        """Take a hello, or a question about sessions.

        ProtocolError when it is neither, RefusedError with the client's name for a foreign token.
        """
        what = message.decode(payload)
        if what["type"] not in ("hello", "sessions"):
            raise ProtocolError(f"the client began with {what['type']!r} instead of a hello")
        self.version = check_version(what, self._versions)
        check_nonce(what)
        asked = _offer(what) if what["type"] == "hello" else question(what)
        # Every token is tried, whatever the others gave: the time taken tells nothing of which was right.
        matching = [name for name, one in self._transcripts.items() if one.matches(CLIENT, payload, what)]
        if not matching:
            raise RefusedError(asked.name)
        self.user = matching[0]
        self._transcripts[self.user].add(payload)
        return asked

    def resumes(self, offer: Offer, secret: bytes) -> bool:
        """Whether the client proved to have the secret of the session that it names."""
        return hmac.compare_digest(self._greeted.resume(secret).encode(), (offer.resume or "").encode(errors="replace"))

    @property
    def secret(self) -> bytes:
        """Of the session that was welcomed."""
        return self._transcripts[self.user].secret()

    def welcome(self, terms: Terms) -> bytes:
        """The welcome to send, with this end's proof."""
        return self._transcripts[self.user].prove(MANAGER, "welcome", asdict(terms))

    def sessions(self, answer: Answer) -> bytes:
        """The answer to a question about sessions, with this end's proof."""
        return self._transcripts[self.user].prove(MANAGER, "sessions", asdict(answer))


class RefusedError(ProtocolError):
    """A client without a token of ours; the argument is the name it gave itself."""


def _offer(hello: message.Message) -> Offer:
    return Offer(
        name=message.printable(message.member(hello, "name", str), 64),
        ipv4=_address(hello, "ipv4", 4),
        ipv6=_address(hello, "ipv6", 6),
        offloads=_offloads(hello),
        session=message.optional(hello, "session", str),
        link=_link(hello),
        resume=message.optional(hello, "resume", str),
    )


def _link(hello: message.Message) -> int:
    number = message.member(hello, "link", int)
    if not 0 <= number < MOST_LINKS:
        raise ProtocolError(f"the client numbers a link {str(number)[:20]}: there are {MOST_LINKS}, from 0")
    return number


def _terms(welcome: message.Message) -> Terms:
    """The terms in a welcome; ProtocolError when following them could harm the laptop."""
    ipv4, ipv6 = _own_address(welcome, "ipv4", SPACE4), _own_address(welcome, "ipv6", SPACE6)
    if ipv4 is None and ipv6 is None:
        raise ProtocolError("the manager gives no address")
    mtu = message.member(welcome, "mtu", int)
    if not (_LEAST_MTU6 if ipv6 else _LEAST_MTU4) <= mtu <= 65_535:
        raise ProtocolError(f"the manager names an MTU of {str(mtu)[:20]} bytes")
    return Terms(
        session=message.printable(message.member(welcome, "session", str), 64),
        ipv4=ipv4,
        ipv6=ipv6,
        mtu=mtu,
        offloads=_offloads(welcome),
        exit=_exit(welcome),
        pod=message.printable(message.member(welcome, "pod", str), 253),
        facts=cast(dict[str, Any], message.member(welcome, "facts", dict)),
        config=cast(dict[str, Any], message.member(welcome, "config", dict)),
        linger=message.member(welcome, "linger", int),
    )


def _exit(welcome: message.Message) -> dict[str, str | None]:
    given = cast(dict[str, object], message.member(welcome, "exit", dict))
    kinds: dict[str, str | None] = {}
    for family in ("ipv4", "ipv6"):
        kind = given.get(family)
        if not isinstance(kind, str | None):
            raise ProtocolError(f"the manager names no kind of exit for {family}")
        kinds[family] = kind and message.printable(kind, 32)
    return kinds


def _offloads(what: message.Message) -> list[str]:
    """The offloads named, but for those that a kernel takes only beside others (set_offload in drivers/net/tun.c)."""
    named = vnet.from_names(message.texts(what, "offloads"))
    if not named & (Offload.TSO4 | Offload.TSO6):
        named &= ~Offload.ECN
    if (both := Offload.USO4 | Offload.USO6) not in named:
        named &= ~both
    return vnet.names(named) if Offload.CHECKSUM in named else []


def _address(what: message.Message, name: str, version: int) -> str | None:
    """The address in a member, or None when it is null; ProtocolError when it is none or has a zone."""
    text = message.optional(what, name, str)
    if text is None:
        return None
    try:
        address = ipaddress.IPv4Address(text) if version == 4 else ipaddress.IPv6Address(text)
    except ValueError as error:
        raise _no_address(what, name) from error
    if "%" in text:
        raise _no_address(what, name)
    return str(address)


def _own_address(welcome: message.Message, name: str, space: Space) -> str | None:
    address = _address(welcome, name, space.version)
    if address is not None and ipaddress.ip_address(address) not in space:
        raise ProtocolError(
            f"the manager gives this laptop {address}, which may be another host's: it is not in {space}"
        )
    return address


def _no_address(what: message.Message, name: str) -> ProtocolError:
    return ProtocolError(f"the {what['type']} of the other end names {str(what[name])[:60]!r} as its {name} address")
