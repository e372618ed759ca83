"""A direct connection to a manager: `tcp://HOST:PORT` and `tls://HOST:PORT`.

It knows nothing of sessions. Names are looked up apart from dialling, since every address that is dialled must first be
kept out of the tunnel.
"""

import asyncio
import ipaddress
import logging
import os
import re
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tpvpn.errors import ManagerError, UsageError
from tpvpn.transport.inner_tls import InnerTlsStream, check_pin
from tpvpn.transport.stream import Stream
from tpvpn.transport.upgrade import upgrade

_log = logging.getLogger(__name__)

CONNECT_TIMEOUT = 10.0
"""Seconds for a connection, its TLS handshake and the upgrade together."""

AGAIN = 1.0
"""Seconds between two tries to connect, as long as none is answered."""

NOT_SENT_LOW_WATER = 128 << 10
"""Bytes not yet sent after which the kernel takes no more: they are the queue that a ping waits in."""
DEAD_AFTER = 15
"""Seconds without an answer after which a connection is dead."""

_TCP_NOTSENT_LOWAT = 25  # linux/tcp.h


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a manager listens; `pin` is the SHA-256 of its certificate, or None to trust the system's authorities."""

    tls: bool
    host: str
    port: int
    pin: bytes | None = None

    @property
    def authority(self) -> str:
        """host:port, as in a URL."""
        return authority(self.host, self.port)

    @property
    def url(self) -> str:
        """As the user wrote it."""
        return f"{'tls' if self.tls else 'tcp'}://{self.authority}"


def authority(host: str, port: int) -> str:
    """host:port, as in a URL (RFC 3986 section 3.2.2)."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_endpoint(url: str, pin: str | None = None) -> Endpoint:
    """An endpoint from tcp://HOST:PORT or tls://HOST:PORT and sha256:HEX; UsageError when malformed."""
    match = re.fullmatch(r"(tcp|tls)://(?:\[([0-9a-fA-F:.]+)]|([^\s/:\[\]@]+)):([0-9]{1,5})/?", url)
    if not match or not _is_host(match[2], match[3]) or not 0 < int(match[4]) < 65536:
        raise UsageError(f"{url!r} names no manager: write tcp://HOST:PORT or tls://HOST:PORT")
    tls = match[1] == "tls"
    if pin is not None and not tls:
        raise UsageError("--tls-pin needs a manager at tls://HOST:PORT")
    return Endpoint(tls, match[2] or match[3], int(match[4]), None if pin is None else _parse_pin(pin))


def _is_host(ipv6: str | None, name: str) -> bool:
    try:
        return bool(ipaddress.IPv6Address(ipv6) if ipv6 else name.encode("idna"))
    except ValueError:  # UnicodeError is one
        return False


def _parse_pin(pin: str) -> bytes:
    digits = pin.removeprefix("sha256:").replace(":", "").lower()
    if not pin.startswith("sha256:") or not re.fullmatch(r"[0-9a-f]{64}", digits):
        raise UsageError(f"{pin!r} is no pin: write sha256: and the 64 hexadecimal digits of the certificate's SHA-256")
    return bytes.fromhex(digits)


@dataclass(frozen=True, slots=True)
class Direct:
    """The transport to a manager that listens where the laptop reaches it."""

    endpoint: Endpoint
    token: bytes = b""

    @property
    def name(self) -> str:
        """The manager's URL."""
        return self.endpoint.url

    def stay(self, pod: str | None) -> None:
        """There is one only."""

    @property
    def purpose(self) -> str:
        """What the addresses are, which must stay out of the tunnel."""
        return "the manager"

    async def resolve(self) -> list[str]:
        """All addresses of the endpoint's host, in the order to try; ManagerError when there are none."""
        return await resolve(self.endpoint.host, self.endpoint.port, "the manager")

    def warning(self, addresses: list[str]) -> str | None:
        """What a user should know of this transport before its use."""
        beyond = any(not ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses)
        if self.endpoint.tls or not beyond:
            return None
        return "tcp:// protects the opening of the session, not its traffic: use tls:// where it matters"

    async def dial(self, addresses: list[str]) -> tuple[Stream, bytes]:
        """A stream on which frames may begin, and the bytes that came early. ManagerError says what went wrong."""
        return await first(
            addresses,
            lambda address: _dial(self.endpoint, address),
            f"the manager at {self.endpoint.authority}",
            CONNECT_TIMEOUT,
        )


async def resolve(host: str, port: int, whose: str) -> list[str]:
    """All addresses of a host, in the order to try; ManagerError when there are none."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "this is no name"
        raise ManagerError(f"cannot find {whose}'s host {host!r}: {reason or error}") from error
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


async def first(
    addresses: list[str],
    dial: Callable[[str], Awaitable[tuple[Stream, bytes]]],
    whom: str,
    timeout: float,
) -> tuple[Stream, bytes]:
    """What dialling the first address that answers gives. ManagerError with what every address said."""
    failures: list[str] = []
    for address in addresses:
        _log.debug("dial %s at %s", whom, address)
        try:
            async with asyncio.timeout(timeout):
                return await dial(address)
        except TimeoutError:
            failures.append(f"{address} did not answer within {timeout:g} s")
        except ssl.SSLError as error:
            failures.append(f"{address} does not speak TLS as expected ({error.reason or error})")
        except OSError as error:  # asyncio puts words of its own into strerror
            failures.append(f"{address}: {os.strerror(error.errno) if error.errno else error}")
    raise ManagerError(
        f"cannot reach {whom}: {'; '.join(failures)}. Check that it runs and that no firewall is in between"
    )


async def _dial(endpoint: Endpoint, address: str) -> tuple[Stream, bytes]:
    connected = await connect(address, endpoint.port)
    stream = Stream(connected)
    try:
        if endpoint.tls:
            stream = await _secure(endpoint, stream)
        return stream, await upgrade(stream, endpoint.authority)
    except BaseException:
        stream.close()
        connected.close()
        raise


async def connect(address: str, port: int) -> socket.socket:
    """A connection for a link to be, as soon as the path is there; OSError when it is refused.

    A SYN that was lost is repeated by the kernel after 1, 3 and 7 s: another try begins every second, and the first
    one to be answered is taken.
    """
    tries: set[asyncio.Task[socket.socket]] = set()
    try:
        while True:
            tries.add(asyncio.create_task(_connect(address, port)))
            done, _ = await asyncio.wait(tries, timeout=AGAIN, return_when=asyncio.FIRST_COMPLETED)
            if done:
                tries.remove(answered := done.pop())
                return answered.result()
    finally:
        for one in tries:
            one.cancel()
        for late in await asyncio.gather(*tries, return_exceptions=True):
            if isinstance(late, socket.socket):
                late.close()


async def _connect(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ipaddress.ip_address(address.partition("%")[0]).version == 6 else socket.AF_INET
    connecting = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        tune(connecting)
        await asyncio.get_running_loop().sock_connect(connecting, (address, port))
        if fit_to_path(connecting):
            # Without BBR's pacing the laptop sends a third more, where nothing is lost (docs/decisions.md).
            connecting.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
    except BaseException:
        connecting.close()
        raise
    return connecting


async def _secure(endpoint: Endpoint, stream: Stream) -> Stream:
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if endpoint.pin:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    secured = InnerTlsStream(stream, context, server_name=endpoint.host)
    try:
        await secured.handshake()
    except ssl.SSLCertVerificationError as error:
        raise ManagerError(
            f"the certificate of {endpoint.authority} is not trusted ({error.verify_message}): give --tls-pin sha256:… "
            "with the digest that its administrator tells you"
        ) from error
    if endpoint.pin:
        check_pin(secured, endpoint.pin, endpoint.authority)
    return secured


def tune(connected: socket.socket) -> None:
    """Set what every connection of a link wants, at either end; an option that the kernel lacks is left alone."""
    options = [
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, NOT_SENT_LOW_WATER),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_AFTER * 1000),
        # BBR outside: on a lossy path TCP inside TCP suffers under cubic (docs/decisions.md).
        (socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"bbr"),
    ]
    for level, option, value in options:
        try:
            connected.setsockopt(level, option, value)
        except OSError:
            continue


_LEAST_WINDOW = 4 << 20
_FASTEST = 10e9 / 8  # bytes a second
_SHORT_PATH = 2000  # microseconds there and back: a LAN, or one machine
_SHORT_LOW_WATER = 512 << 10
_TCPI_RTT = struct.Struct("68xI")  # struct tcp_info, linux/tcp.h: tcpi_rtt, in microseconds


def fit_to_path(connected: socket.socket) -> bool:
    """Fit a connection's queues to the path, by the round trip of its own handshake; whether the path is a short one.

    The receive window is bounded to twice what 10 Gb/s can have under way: the kernel grows it to tens of megabytes
    whatever the path, and on a short one that is a queue and nothing else. On a short path, which is a fast one, more
    may wait unsent: it is gone in no time, and keeps both ends busy (docs/decisions.md).
    """
    try:
        (rtt,) = _TCPI_RTT.unpack_from(connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 128))
        window = max(_LEAST_WINDOW, int(2 * _FASTEST * rtt / 1e6))
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP, window)
        if rtt < _SHORT_PATH:
            connected.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, _SHORT_LOW_WATER)
            return True
    except (OSError, struct.error):
        pass
    return False
