"""The few words of HTTP/1.1 (RFC 9112) that the manager's port and a session's control socket understand.

Bytes to a request, a status to bytes.
"""

from dataclasses import dataclass

from tpvpn.errors import ProtocolError
from tpvpn.exposition import CONTENT_TYPE
from tpvpn.transport.upgrade import ENCRYPTED, MAX_HEAD, PROTOCOL

_REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed", 426: "Upgrade Required"}


@dataclass(frozen=True, slots=True)
class Request:
    """A request's head, as far as anybody here wants to know it."""

    method: str
    path: str
    upgrade: str
    """The protocol of ours that it asks for, or "" for none."""
    rest: bytes
    """What came behind the head."""


def parse(data: bytes) -> Request | None:
    """The request at the start of `data`, None while its head is not whole; ProtocolError when it is not HTTP/1."""
    head, end, rest = data.partition(b"\r\n\r\n")
    if not end:
        line = data.split(b"\r\n", 1)[0]
        if len(data) > MAX_HEAD or not _begins_like_a_request(line):
            raise ProtocolError("not an HTTP request")
        return None
    line, *fields = head.decode("latin-1").split("\r\n")
    words = line.split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        raise ProtocolError("not an HTTP/1 request")
    values = {
        name.strip().lower(): value.strip().lower() for name, _, value in (field.partition(":") for field in fields)
    }
    asked = values.get("upgrade", "") if "upgrade" in values.get("connection", "") else ""
    return Request(words[0], words[1].partition("?")[0], asked if asked in (PROTOCOL, ENCRYPTED) else "", rest)


def _begins_like_a_request(line: bytes) -> bool:
    method = line.split(b" ", 1)[0]
    return len(method) <= 16 and (not method or (method.isalpha() and method.isupper()))


def switch(protocol: str) -> bytes:
    """The answer that ends HTTP; the protocol follows."""
    return f"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: {protocol}\r\n\r\n".encode()


def response(status: int, text: str, *fields: str, head: bool = False) -> bytes:
    """A whole response with a plain text, after which the connection ends; without it when only the head was asked."""
    body = text.encode()
    lines = [
        f"HTTP/1.1 {status} {_REASONS[status]}",
        f"Content-Type: {CONTENT_TYPE}",
        f"Content-Length: {len(body)}",
        "Connection: close",
        *fields,
    ]
    return "\r\n".join([*lines, "", ""]).encode() + (b"" if head else body)
