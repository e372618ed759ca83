"""TLS inside a byte stream of any kind: to whoever is at its other end, or through somebody else's connection.

OpenSSL is given memory in the place of a socket (ssl.MemoryBIO), so that the stream below may be a socket, a TLS
connection of somebody else or a WebSocket; on a socket it is faster than Python's own SSLSocket, which reads twice and
writes once for each record of 16 KiB (docs/decisions.md). It knows nothing of what the bytes mean.

How it works. Receiving: what the stream below has goes into OpenSSL, which gives as many records as the caller's buffer
holds. Sending: a piece of the caller's bytes is encrypted, and counts as sent when the stream below has taken all of
it. Until then `send` says "not now" and owes the piece: the caller comes again with the same bytes, as SSL_write(3) has
it too.
"""

import hashlib
import hmac
import mmap
import ssl

from tpvpn.errors import ManagerError
from tpvpn.transport.stream import WOULD_BLOCK, Stream

FIRST_BYTE = 0x16
"""Of a TLS connection: a record with a handshake (RFC 8446 section 5.1). No HTTP request begins so."""
_RECEIVED = 1 << 19
"""Bytes taken from the stream below at once: as many as a link receives."""
_PIECE = 1 << 17
"""Bytes encrypted at once: nothing overtakes them any more."""
_HANDSHAKE = 1 << 14


class ImpostorError(ManagerError):
    """Somebody else's certificate."""


class InnerTlsStream(Stream):
    """TLS over a stream, which it owns from now on; `early` came before. Its `handshake` is the first thing to be done.

    `certificate` is the manager's own (DER) at the manager's end, None at the client's, where `server_name` is whom the
    certificate must be for.
    """

    def __init__(
        self,
        below: Stream,
        context: ssl.SSLContext,
        early: bytes = b"",
        certificate: bytes | None = None,
        server_name: str | None = None,
    ) -> None:
        super().__init__(below.socket)
        self.recv_into = self._receive
        self.send = self._send
        self._below, self._certificate = below, certificate
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._incoming.write(early)
        manager = certificate is not None
        self._tls = context.wrap_bio(self._incoming, self._outgoing, manager, server_name)
        self._raw = memoryview(mmap.mmap(-1, _RECEIVED))  # memory that is not used yet costs none
        self._dry = False  # nothing is here that was not received
        self._encrypted = memoryview(b"")  # what the stream below has not taken yet
        self._owed = 0  # of the caller's bytes: what that stands for

    async def handshake(self) -> None:
        """Run it; then `certificate_hash` is the manager's. ssl.SSLError or OSError when it fails."""
        done = False
        while not done:
            try:
                self._tls.do_handshake()
                done = True
            except ssl.SSLWantReadError:
                await self._below.send_all(self._outgoing.read())
                data = await self._below.receive(_HANDSHAKE)
                if not data:
                    raise ConnectionResetError("closed in the middle of the TLS handshake") from None
                self._incoming.write(data)
            except ssl.SSLError:
                await self._below.send_all(self._outgoing.read())  # the alert, by which the other end knows why
                raise
        await self._below.send_all(self._outgoing.read())
        certificate = self._certificate or self._tls.getpeercert(binary_form=True) or b""
        self.certificate_hash = hashlib.sha256(certificate).digest()

    def pending(self) -> int:
        """Bytes that are here already but not announced by the descriptor."""
        return 0 if self._dry else 1  # or an end, or an error, which the descriptor need not announce either

    def _receive(self, buffer: memoryview | bytearray) -> int:
        """As many records as are here; 0 at the end. One of WOULD_BLOCK, or OSError."""
        view = memoryview(buffer)
        have, self._dry = 0, False
        while have < len(view):
            try:
                count = self._decrypt(view[have:])
            except OSError as error:  # nothing more now, or it broke: what is here already counts first
                self._dry = isinstance(error, WOULD_BLOCK)
                if have:
                    break
                raise
            if not count:
                break
            have += count
        return have

    def _decrypt(self, view: memoryview) -> int:
        """One record, or what fits of it; 0 at the end."""
        while True:
            try:
                return self._tls.read(len(view), view)  # type: ignore[arg-type]
            except ssl.SSLWantReadError:
                count = self._below.recv_into(self._raw)
                if not count:  # without a close_notify: the frames say what is an end
                    return 0
                self._incoming.write(self._raw[:count])

    def _send(self, data: memoryview | bytes) -> int:
        """Send a piece of the data; how much. One of WOULD_BLOCK, after which the same data must come; or OSError."""
        if not self._owed:
            self._owed = self._tls.write(memoryview(data)[:_PIECE])
        while self._encrypted or self._outgoing.pending:
            if not self._encrypted:
                self._encrypted = memoryview(self._outgoing.read())
            self._encrypted = self._encrypted[self._below.send(self._encrypted) :]
        sent, self._owed = self._owed, 0
        return sent


async def encrypted(below: Stream, early: bytes, pin: bytes, whom: str) -> InnerTlsStream:
    """TLS 1.3 to the manager whose certificate's SHA-256 is the pin; ManagerError when it is not that one."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # the pin says more
    stream = InnerTlsStream(below, context, early)
    try:
        await stream.handshake()
    except ssl.SSLError as error:
        raise ManagerError(
            f"{whom} does not speak TLS as expected ({error.reason or error}): was it started with --tls-cert?"
        ) from error
    check_pin(stream, pin, whom)
    return stream


def check_pin(stream: InnerTlsStream, pin: bytes, whom: str) -> None:
    """ImpostorError unless the other end's certificate has this SHA-256."""
    seen = stream.certificate_hash
    if not hmac.compare_digest(seen, pin):
        raise ImpostorError(f"the certificate of {whom} is not the pinned one: it has sha256:{seen.hex()}")
