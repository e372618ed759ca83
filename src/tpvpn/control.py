"""The control socket of a running session: a line of request, a line of JSON as its answer; HTTP for /metrics.

`status`; `quit`; `name NAME`: what becomes of a name; `speed`: how much the way to the manager carries.

It knows nothing of what a session is: it is given functions that describe it, end it, explain a name and measure. It
stands in a directory that only the user can enter; the peer's uid is checked all the same.
"""

import asyncio
import contextlib
import json
import os
import socket
import struct
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpvpn.errors import PrivilegeError, ProtocolError, TpvpnError, UsageError

TIMEOUT = 8.0
"""Seconds for a request and its answer; a name that nobody answers for is known to be so after three."""
_MAX_REQUEST = 4096
_HTTP = (b"GET ", b"HEAD ")
_PAUSE = 0.1
_ANOTHERS = "this session is another user's: ask as that user, or as root"
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid (unix(7), SO_PEERCRED)


@dataclass(frozen=True, slots=True)
class Handles:
    """What may be asked of a session."""

    describe: Callable[[], dict[str, Any]]
    quit: Callable[[], None]
    explain: Callable[[str], Awaitable[dict[str, Any]]]
    """What becomes of a name."""
    measure: Callable[[], Awaitable[dict[str, Any]]]
    """How much the way to the manager carries."""


@contextlib.asynccontextmanager
async def serving(directory: Path, handles: Handles) -> AsyncGenerator[None]:
    """Answer requests for the session of this directory while the context lasts."""
    path = _socket(directory)
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.setblocking(False)
        listening.bind(str(path))
        listening.listen()
        accepting = asyncio.create_task(_accept(listening, handles))
        try:
            yield
        finally:
            accepting.cancel()
            await asyncio.gather(accepting, return_exceptions=True)
            path.unlink(missing_ok=True)


async def _accept(listening: socket.socket, handles: Handles) -> None:
    """Accept for ever; a lack of descriptors is waited out, and whoever asks waits too."""
    loop, serving = asyncio.get_running_loop(), set[asyncio.Task[None]]()
    while True:
        try:
            connected, _ = await loop.sock_accept(listening)
        except OSError:
            await asyncio.sleep(_PAUSE)
            continue
        task = loop.create_task(_serve(connected, handles))
        serving.add(task)
        task.add_done_callback(serving.discard)


async def _serve(connected: socket.socket, handles: Handles) -> None:
    """One request and its answer."""
    loop = asyncio.get_running_loop()
    with connected, contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(TIMEOUT):
            if not _allowed(connected):
                await loop.sock_sendall(connected, b"{}\n")
            else:
                request = await _request(connected)
                if request.startswith(_HTTP):
                    answer = _page(request, handles)
                else:
                    answer = json.dumps(await _answer(request, handles)).encode() + b"\n"
                await loop.sock_sendall(connected, answer)


async def _request(connected: socket.socket) -> bytes:
    """What comes until the end of a line, or of an HTTP request's head; OSError when that is none of ours."""
    request = b""
    while not request.endswith(b"\r\n\r\n" if request.startswith(_HTTP) else b"\n"):
        more = await asyncio.get_running_loop().sock_recv(connected, _MAX_REQUEST)
        if not more or len(request) > _MAX_REQUEST:
            raise ConnectionAbortedError
        request += more
    return request


def _page(request: bytes, handles: Handles) -> bytes:
    """The answer to an HTTP request."""
    from tpvpn import client_metrics
    from tpvpn.manager import http  # whoever asks by a line needs neither

    try:
        asked = http.parse(request)
    except ProtocolError as error:
        return http.response(400, f"{error}\n")
    if not asked or asked.path != "/metrics":
        return http.response(404, "only /metrics is here\n")
    return http.response(200, client_metrics.render([handles.describe()]), head=asked.method == "HEAD")


async def _answer(request: bytes, handles: Handles) -> dict[str, Any]:
    match request.split():
        case [b"status"]:
            return handles.describe()
        case [b"quit"]:
            handles.quit()
            return {"quitting": True}
        case [b"speed"]:
            return await handles.measure()
        case [b"name", name]:
            return await handles.explain(name.decode(errors="replace"))
        case _:
            return {"error": f"unknown request {request[:20]!r}"}


def _allowed(peer: socket.socket) -> bool:
    """True for root and for the user whose session this is."""
    _, uid, _ = _CREDENTIALS.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return uid in (0, os.geteuid())


def _socket(directory: Path) -> Path:
    return directory / "control" / "socket"


def listed(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What sessions answered to `status`, as other programs read it."""
    return {"schema": "tpvpn.status/1", "sessions": answers}


def ask(directory: Path, request: str) -> dict[str, Any]:
    """The answer of the session of this directory. UsageError when it is not there, PrivilegeError when not ours."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
            asking.settimeout(TIMEOUT)
            asking.connect(str(_socket(directory)))
            asking.sendall(request.encode() + b"\n")
            line = asking.makefile("rb").readline()
    except PermissionError as error:
        raise PrivilegeError(_ANOTHERS) from error
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise UsageError("this session does not answer: it is connecting still, or has just ended") from error
    except OSError as error:
        raise TpvpnError(f"the session did not answer: {error}") from error
    try:
        answer: dict[str, Any] = json.loads(line)
    except ValueError as error:
        raise TpvpnError("the session has ended, or did not answer in time") from error
    if not answer:
        raise PrivilegeError(_ANOTHERS)
    return answer
