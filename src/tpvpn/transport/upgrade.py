"""The HTTP/1.1 upgrade that begins every byte stream to a manager (RFC 9110 section 7.8), the client's half.

It knows nothing of frames: it ends where they begin, and hands over the bytes that came early.
"""

from tpvpn.errors import ManagerError
from tpvpn.proto.message import printable
from tpvpn.transport.stream import Stream

PATH = "/v1/session"
PROTOCOL = "tpvpn"
MAX_HEAD = 8192
"""Bytes of a request's or a response's head."""


async def upgrade(stream: Stream, authority: str, path: str = PATH) -> bytes:
    """Ask for the protocol; the bytes that came behind the 101. ManagerError when the other end is no tpvpn manager."""
    await stream.send_all(
        f"GET {path} HTTP/1.1\r\nHost: {authority}\r\nConnection: Upgrade\r\nUpgrade: {PROTOCOL}\r\n\r\n".encode()
    )
    head, early = await _head(stream, authority)
    line, *fields = head.decode("latin-1").split("\r\n")
    version, _, rest = line.partition(" ")
    if not version.startswith("HTTP/1."):
        raise ManagerError(f"{authority} is no tpvpn manager: it answered {printable(line, 60)!r} instead of HTTP")
    if not rest.startswith("101"):
        raise ManagerError(
            f"{authority} is no tpvpn manager, or not on this port: it answered HTTP {printable(rest, 60)}"
        )
    if not any(field.lower().replace(" ", "") == f"upgrade:{PROTOCOL}" for field in fields):
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
