"""What every handshake has: a greeting, a version, and proofs that both ends know the token (docs/reference/wire.md).

It knows nothing of sockets, nor of what is asked and granted. Neither end sends the token. Each proves that it has it
by an HMAC over its own label, the hash of all frames so far and the hash of the manager's certificate:
- another label for each side, so that a proof cannot be reflected;
- a fresh nonce of each side in the transcript, so that a proof cannot be replayed;
- every byte of every frame in the transcript, so that nothing can be altered;
- the certificate's hash, so that nobody between the ends can open the TLS connection and pass the proofs on.
Both ends of a handshake then know a secret that nobody else has who knows the token: with it another link joins what
the handshake opened.

    manager                                   client
      greeting  versions, nonce          ->
                                         <-   a request: version, nonce, what is asked, proof
      an answer: what is granted, proof  ->
"""

import hashlib
import hmac
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from tpvpn.errors import ManagerError, ProtocolError
from tpvpn.proto import message
from tpvpn.wire import frame

VERSIONS = (1,)
NONCE_LENGTH = 32
CLIENT, MANAGER = b"tpvpn 1 client", b"tpvpn 1 manager"
_SESSION, _RESUME = b"tpvpn 1 session", b"tpvpn 1 resume"
_NO_PROOF = "0" * 64


class ClientSide(ABC):
    """`receive` the greeting, send what that gives, `receive` the answer; then it is `done`."""

    request: str
    answer: str

    def __init__(self, token: bytes, certificate_hash: bytes, nonce: bytes, versions: Sequence[int] = VERSIONS) -> None:
        self.version = 0
        """The one that both speak, once the manager has greeted."""
        self.done = False
        self._transcript = Transcript(token, certificate_hash)
        self._nonce, self._versions = nonce, versions

    @abstractmethod
    def _asked(self) -> Mapping[str, object]:
        """The request's own members."""

    @abstractmethod
    def _take(self, answer: message.Message) -> None:
        """What a proven answer says."""

    def receive(self, payload: bytes) -> bytes | None:
        """Take one control frame; the one to send in return, if any. ManagerError when the manager is not to be had."""
        what = message.decode(payload)
        if what["type"] == "error":
            raise ManagerError(f"the manager refuses: {message.printable(str(what.get('message')), 300)}")
        if not self.version and what["type"] == "greeting":
            return self._ask(payload, what)
        if self.version and what["type"] == self.answer:
            if not self._transcript.matches(MANAGER, payload, what):
                raise ManagerError("the manager does not know this token: is it the right manager?")
            self._transcript.add(payload)
            self._take(what)
            self.done = True
            return None
        raise ProtocolError(f"the manager sent {what['type']!r} in the middle of the handshake")

    def _ask(self, payload: bytes, greeting: message.Message) -> bytes:
        theirs = message.numbers(greeting, "versions")
        version = max(set(theirs) & set(self._versions), default=0)
        if not version:
            older = "tpvpn here" if max(theirs, default=0) > max(self._versions) else "the manager"
            raise ManagerError(
                f"the manager speaks protocol version {_listed(theirs)}, this tpvpn {_listed(self._versions)}: "
                f"upgrade {older}"
            )
        check_nonce(greeting)
        self.version = version
        self._transcript.add(payload)
        members = {"version": version, "nonce": self._nonce.hex(), **self._asked()}
        return self._transcript.prove(CLIENT, self.request, members)


class Transcript:
    """All frames of a handshake as sent; a frame that is being proved counts with zeros in the place of its proof."""

    def __init__(self, token: bytes, certificate_hash: bytes) -> None:
        self._token, self._certificate_hash = token, certificate_hash
        self._hash = hashlib.sha256()

    def add(self, payload: bytes) -> None:
        """A frame that was sent or received."""
        self._hash.update(frame.encode(frame.CONTROL, payload))

    def prove(self, label: bytes, kind: str, members: Mapping[str, object]) -> bytes:
        """The payload of a frame with its proof; it joins the transcript."""
        payload = message.encode(kind, **members, proof=_NO_PROOF)
        proven = _exchange(payload, _NO_PROOF, self._proof(label, payload))
        self.add(proven)
        return proven

    def matches(self, label: bytes, payload: bytes, what: message.Message) -> bool:
        """The frame's proof is that of someone who knows the token."""
        proof = message.member(what, "proof", str)
        # One of another length, or spelled with escapes, is none of ours; in its place zeros might not fit the frame.
        if len(proof) != len(_NO_PROOF) or proof.encode(errors="replace") not in payload:
            return False
        expected = self._proof(label, _exchange(payload, proof, _NO_PROOF))
        return hmac.compare_digest(proof.encode(errors="replace"), expected.encode())

    def secret(self) -> bytes:
        """What the two ends of this handshake have in common, when all its frames are there: 32 bytes."""
        return self._tag(self._token, _SESSION)

    def resume(self, secret: bytes) -> str:
        """With the greeting alone in the transcript: proves that its writer has this secret of a handshake before."""
        return self._tag(secret, _RESUME).hex()

    def _tag(self, key: bytes, label: bytes) -> bytes:
        return hmac.digest(key, label + self._hash.digest() + self._certificate_hash, "sha256")

    def _proof(self, label: bytes, payload: bytes) -> str:
        transcript = self._hash.copy()
        transcript.update(frame.encode(frame.CONTROL, payload))
        return hmac.new(self._token, label + transcript.digest() + self._certificate_hash, "sha256").hexdigest()


def _exchange(payload: bytes, old: str, new: str) -> bytes:
    """The payload with its last `old` made `new`: the proof is its last member."""
    before, _, after = payload.rpartition(old.encode(errors="replace"))
    return before + new.encode() + after


def check_version(request: message.Message, versions: Sequence[int]) -> int:
    """The version that a client chose; ProtocolError when it is none of these."""
    version = message.member(request, "version", int)
    if version not in versions:
        older = "the manager" if version > max(versions) else "tpvpn there"
        raise ProtocolError(
            f"the client speaks protocol version {_listed([version])}, this manager {_listed(versions)}: "
            f"upgrade {older}"
        )
    return version


def check_nonce(what: message.Message) -> None:
    """ProtocolError unless there is a nonce of the right length."""
    nonce = message.member(what, "nonce", str)
    if not re.fullmatch(rf"[0-9a-f]{{{2 * NONCE_LENGTH}}}", nonce):
        raise ProtocolError(f"the {what['type']} of the other end has no nonce of {2 * NONCE_LENGTH} digits")


def _listed(versions: Sequence[int]) -> str:
    """As far as it fits a sentence: they come from outside."""
    return " and ".join(str(version)[:20] for version in versions[:8]) or "none"
