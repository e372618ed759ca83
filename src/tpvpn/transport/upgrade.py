"""The HTTP/1.1 upgrade that begins every byte stream to a manager (RFC 9110 section 7.8), the client's half.

It knows nothing of frames: it ends where they begin, and hands over the bytes that came early.
"""

from collections.abc import Sequence

from tpvpn.errors import ManagerError
from tpvpn.proto.message import printable
from tpvpn.transport.stream import Stream

PATH = "/v1/session"
PROTOCOL = "tpvpn"
ENCRYPTED = "tpvpn-tls"
"""TLS begins behind the 101, and the protocol inside it."""
MAX_HEAD = 8192
"""Bytes of a request's or a response's head."""


class RefusedUpgradeError(ManagerError):
    """Another answer than 101: its `status`, and the beginning of its `body`."""

    def __init__(self, text: str, status: int, body: bytes) -> None:
        super().__init__(text)
        self.status, self.body = status, body


async def upgrade(
    stream: Stream,
    authority: str,
    path: str = PATH,
    headers: Sequence[tuple[str, str]] = (),
    protocol: str = PROTOCOL,
) -> bytes:
    """Ask for the protocol; the bytes that came behind the 101. ManagerError when the other end is no tpvpn manager."""
    fields = [("Host", authority), ("Connection", "Upgrade"), ("Upgrade", protocol), *headers]
    lines = [f"GET {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields), "", ""]
    await stream.send_all("\r\n".join(lines).encode())
    head, early = await _head(stream, authority)
    line, *answered = head.decode("latin-1").split("\r\n")
    version, _, rest = line.partition(" ")
    if not version.startswith("HTTP/1."):
        raise ManagerError(f"{authority} is no tpvpn manager: it answered {printable(line, 60)!r} instead of HTTP")
    if not rest.startswith("101"):
        words = f"{authority} is no tpvpn manager, or not on this port: it answered HTTP {printable(rest, 60)}"
        status = int(rest[:3]) if rest[:3].isdecimal() else 0
        body = early + await _body(stream, answered, len(early))
        if status == 426:
            said = printable(body.decode(errors="replace").strip(), 300)
            raise ManagerError(f"the manager at {authority} refuses: {said or 'it wants another protocol'}")
        raise RefusedUpgradeError(words, status, body)
    if not any(field.lower().replace(" ", "") == f"upgrade:{protocol}" for field in answered):
        raise ManagerError(f"{authority} is no tpvpn manager: it switched to another protocol")
    return early


async def _head(stream: Stream, authority: str) -> tuple[bytes, bytes]:
    """The response's head without the empty line, and what follows it."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = await stream.receive(MAX_HEAD)
        data += more
        if not more:
            said = f"after {printable(data[:40].decode('latin-1'), 40)!r}" if data else "without a word"
            raise ManagerError(f"{authority} closed the connection {said}: is a tpvpn manager listening there?")
        if len(data) > MAX_HEAD or not b"HTTP/".startswith(data[:5]):
            shown = printable(data[:40].decode("latin-1"), 40)
            raise ManagerError(f"{authority} is no tpvpn manager: it answered {shown!r} instead of HTTP")
    head, _, early = data.partition(b"\r\n\r\n")
    return head, early


async def _body(stream: Stream, fields: list[str], have: int) -> bytes:
    """What is missing of a body whose length is told and small."""
    lengths = [field.partition(":")[2].strip() for field in fields if field.lower().startswith("content-length:")]
    missing = int(lengths[0]) - have if lengths and lengths[0].isdecimal() else 0
    data = b""
    while 0 < missing - len(data) <= MAX_HEAD:
        more = await stream.receive(MAX_HEAD)
        if not more:
            break
        data += more
    return data
