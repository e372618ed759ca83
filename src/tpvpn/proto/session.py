"""The handshake that opens a session: greeting, hello, welcome, and the proofs in them (docs/protocol.md).

It knows nothing of sockets: frames' payloads in, frames' payloads out; the nonce is an argument. Both ends know a token
and neither sends it. Each proves that it has it by an HMAC over its own label, the hash of all frames so far and the
hash of the manager's certificate:
- another label for each side, so that a proof cannot be reflected;
- a fresh nonce of each side in the transcript, so that a proof cannot be replayed;
- every byte of every frame in the transcript, so that nothing can be altered;
- the certificate's hash, so that nobody between the ends can open the TLS connection and pass the proofs on.

    manager                                   client
      greeting  versions, nonce          ->
                                         <-   hello    version, nonce, name, offer, proof
      welcome   session, terms, proof    ->
"""

import hashlib
import hmac
import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

from tpvpn.errors import ManagerError, ProtocolError
from tpvpn.proto import message
from tpvpn.wire import frame, vnet
from tpvpn.wire.vnet import Offload

VERSIONS = (1,)
NONCE_LENGTH = 32
SPACE4 = ipaddress.IPv4Network("246.0.0.0/12")
SPACE6 = ipaddress.IPv6Network("fd74:7076:706e::/48")
"""Where the addresses of sessions come from (class E, and a ULA). A client takes no others: they configure the laptop,
and could be those of its LAN, of a host inside its VPN or of the cluster."""
VIRTUAL4 = ipaddress.IPv4Network("246.128.0.0/9")
VIRTUAL6 = ipaddress.IPv6Network("fd74:7077::/32")
"""Where a client's virtual subnets are, which a manager maps to the cluster's own (proto/config)."""
_CLIENT, _MANAGER = b"tpvpn 1 client", b"tpvpn 1 manager"
_NO_PROOF = "0" * 64
Space = ipaddress.IPv4Network | ipaddress.IPv6Network
_LEAST_MTU4, _LEAST_MTU6 = 576, 1280  # RFC 791 section 3.2, RFC 8200 section 5


@dataclass(frozen=True, slots=True)
class Offer:
    """What a client says of itself and would like to have."""

    name: str
    ipv4: str | None = None
    """The address it would like to keep, or None for any."""
    ipv6: str | None = None
    offloads: list[str] = field(default_factory=list[str])


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


class ClientHandshake:
    """The client's side: `receive` the greeting, send what that gives, `receive` the welcome; then `terms` is set."""

    def __init__(self, token: bytes, certificate_hash: bytes, nonce: bytes, offer: Offer) -> None:
        self.terms: Terms | None = None
        self._transcript = _Transcript(token, certificate_hash)
        self._nonce, self._offer = nonce, offer
        self._greeted = False

    def receive(self, payload: bytes) -> bytes | None:
        """Take one control frame; the one to send in return, if any. ManagerError when the manager is not to be had."""
        what = message.decode(payload)
        if what["type"] == "error":
            raise ManagerError(f"the manager refuses: {message.printable(str(what.get('message')), 300)}")
        if not self._greeted and what["type"] == "greeting":
            self._greeted = True
            return self._hello(payload, what)
        if self._greeted and what["type"] == "welcome":
            if not self._transcript.matches(_MANAGER, payload, what):
                raise ManagerError("the manager does not know this token: is it the right manager?")
            self.terms = _terms(what)
            return None
        raise ProtocolError(f"the manager sent {what['type']!r} in the middle of the handshake")

    def _hello(self, payload: bytes, greeting: message.Message) -> bytes:
        theirs = message.numbers(greeting, "versions")
        common = set(theirs) & set(VERSIONS)
        if not common:
            older = "tpvpn here" if max(theirs, default=0) > max(VERSIONS) else "the manager"
            raise ManagerError(
                f"the manager speaks protocol version {_listed(theirs)}, this tpvpn {_listed(VERSIONS)}: "
                f"upgrade {older}"
            )
        _nonce(greeting)
        self._transcript.add(payload)
        return self._transcript.prove(
            _CLIENT,
            message.encode(
                "hello",
                version=max(common),
                nonce=self._nonce.hex(),
                session=None,
                **asdict(self._offer),
                proof=_NO_PROOF,
            ),
        )


class ManagerHandshake:
    """The manager's side: send `greeting`, `receive` the hello, decide on terms, send what `welcome(terms)` gives."""

    def __init__(self, tokens: Mapping[str, bytes], certificate_hash: bytes, nonce: bytes) -> None:
        self.greeting = message.encode("greeting", versions=list(VERSIONS), nonce=nonce.hex())
        self.user = ""
        """The name of the token that the client proved to have."""
        self._transcripts = {name: _Transcript(token, certificate_hash) for name, token in tokens.items()}
        for transcript in self._transcripts.values():
            transcript.add(self.greeting)

    def receive(self, payload: bytes) -> Offer:
        """Take the hello. ProtocolError when it is not one, RefusedError with the client's name for a foreign token."""
        hello = message.decode(payload)
        if hello["type"] != "hello":
            raise ProtocolError(f"the client began with {hello['type']!r} instead of a hello")
        version = message.member(hello, "version", int)
        if version not in VERSIONS:
            raise ProtocolError(
                f"the client speaks protocol version {_listed([version])}, this manager {_listed(VERSIONS)}"
            )
        _nonce(hello)
        offer = Offer(
            name=message.printable(message.member(hello, "name", str), 64),
            ipv4=_address(hello, "ipv4", 4),
            ipv6=_address(hello, "ipv6", 6),
            offloads=_offloads(hello),
        )
        # Every token is tried, whatever the others gave: the time taken tells nothing of which was right.
        matching = [name for name, one in self._transcripts.items() if one.matches(_CLIENT, payload, hello)]
        if not matching:
            raise RefusedError(offer.name)
        self.user = matching[0]
        self._transcripts[self.user].add(payload)
        return offer

    def welcome(self, terms: Terms) -> bytes:
        """The welcome to send, with this end's proof."""
        return self._transcripts[self.user].prove(_MANAGER, message.encode("welcome", **asdict(terms), proof=_NO_PROOF))


class RefusedError(ProtocolError):
    """A client without a token of ours; the argument is the name it gave itself."""


class _Transcript:
    """All frames of a handshake as sent; a frame that is being proved counts with zeros in the place of its proof."""

    def __init__(self, token: bytes, certificate_hash: bytes) -> None:
        self._token, self._certificate_hash = token, certificate_hash
        self._hash = hashlib.sha256()

    def add(self, payload: bytes) -> None:
        self._hash.update(frame.encode(frame.CONTROL, payload))

    def prove(self, label: bytes, payload: bytes) -> bytes:
        """The payload with its proof filled in; it joins the transcript."""
        proven = _exchange(payload, _NO_PROOF, self._proof(label, payload))
        self.add(proven)
        return proven

    def matches(self, label: bytes, payload: bytes, what: message.Message) -> bool:
        proof = message.member(what, "proof", str)
        # One of another length, or spelled with escapes, is none of ours; in its place zeros might not fit the frame.
        if len(proof) != len(_NO_PROOF) or proof.encode(errors="replace") not in payload:
            return False
        expected = self._proof(label, _exchange(payload, proof, _NO_PROOF))
        return hmac.compare_digest(proof.encode(errors="replace"), expected.encode())

    def _proof(self, label: bytes, payload: bytes) -> str:
        transcript = self._hash.copy()
        transcript.update(frame.encode(frame.CONTROL, payload))
        return hmac.new(self._token, label + transcript.digest() + self._certificate_hash, "sha256").hexdigest()


def _exchange(payload: bytes, old: str, new: str) -> bytes:
    """The payload with its last `old` made `new`: the proof is its last member."""
    before, _, after = payload.rpartition(old.encode(errors="replace"))
    return before + new.encode() + after


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


def _nonce(what: message.Message) -> None:
    nonce = message.member(what, "nonce", str)
    if len(nonce) != 2 * NONCE_LENGTH:
        raise ProtocolError(f"the {what['type']} of the other end has a nonce of {len(nonce)} digits")


def _listed(versions: Sequence[int]) -> str:
    """As far as it fits a sentence: they come from outside."""
    return " and ".join(str(version)[:20] for version in versions[:8]) or "none"
