"""`tpvpn manager`: options to a running server; also the start of the zipapp, where it is the whole program."""

import argparse
import asyncio
import contextlib
import logging
import re
import resource
import signal
import socket
import ssl
import sys
from collections.abc import Callable, Mapping, Sequence
from ipaddress import ip_network
from pathlib import Path
from typing import NoReturn, TypeVar

from tpvpn.errors import PrivilegeError, TpvpnError, UsageError
from tpvpn.manager import memory
from tpvpn.manager.kernel_exit import KernelExit
from tpvpn.manager.mixed_exit import MixedExit
from tpvpn.manager.options import add_options
from tpvpn.manager.server import Server
from tpvpn.manager.socket_exit import KEPT_DESCRIPTORS, MAX_FLOWS, MAX_MEMORY, SocketExit
from tpvpn.proto.token import ANONYMOUS, parse_tokens

log = logging.getLogger("tpvpn.manager")
_Told = TypeVar("_Told")


def run(options: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; 0."""
    if options.listen is None:
        raise UsageError("a manager needs --listen HOST:PORT; *:PORT is every address")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    if not 0 <= options.linger < float("inf"):
        raise UsageError("--linger wants seconds, 0 or more")
    tokens = _Tokens(options)
    tls = _tls(options)
    destinations = [_network(text) for text in options.destination]
    listening = _listen(options.listen)
    _allow_descriptors()
    if options.insecure:
        log.warning("--insecure: whoever reaches this port is let into the cluster's network")
    try:
        import uvloop

        runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    except ImportError:
        runner = asyncio.Runner()
    with runner, contextlib.closing(_open_exit(options.exit, destinations)) as exit:
        runner.run(_serve(Server(exit, tokens, tls, options.linger), listening, options.until_idle))
    return 0


def _open_exit(kind: str, destinations: Sequence[str]) -> KernelExit | SocketExit | MixedExit:
    """The exit that was asked for; `auto`: the kernel's for what it can carry, and sockets for the rest."""
    if kind == "socket":
        return _open_sockets(destinations)
    kernel = KernelExit(destinations=destinations)
    try:
        kernel.open()
    except PrivilegeError as error:
        if kind == "kernel":
            raise
        log.info("%s; packets leave by sockets", error)
        return _open_sockets(destinations)
    if kernel.without_tun:
        log.info("%s; sessions have a veth pair in its place", kernel.without_tun)
    if kind == "kernel" or not kernel.reasons:
        return kernel
    try:
        sockets = _open_sockets(destinations, versions=list(kernel.reasons))
    except PrivilegeError:
        return kernel
    for version, reason in kernel.reasons.items():
        log.info("the kernel exit cannot carry IPv%d: %s; its packets leave by sockets", version, reason)
    return MixedExit(kernel, sockets)


def _open_sockets(destinations: Sequence[str], versions: Sequence[int] = (4, 6)) -> SocketExit:
    sockets = SocketExit(destinations=destinations, max_flows=_descriptors(), max_memory=_memory(), versions=versions)
    sockets.open()
    return sockets


def _descriptors() -> int:
    """How many flows of the socket exit the process may have a descriptor for; links keep theirs, or half of few."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return min(MAX_FLOWS, max(most - KEPT_DESCRIPTORS, most // 2))


def _memory() -> int:
    """How many bytes the buffers of all flows may hold: half of what the process may use at most."""
    most = memory.limit()
    return MAX_MEMORY if most is None else min(MAX_MEMORY, most // 2)


def _allow_descriptors() -> None:
    """As many as this process may have: a session has four, and all of them more than the usual 1024."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # where the hard limit is above what the kernel takes by now
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _serve(server: Server, listening: socket.socket, until_idle: float | None) -> None:
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    host, port = listening.getsockname()[:2]
    log.info("listening on %s port %d, exit %s", host, port, _described(server.exit.kinds))
    serving = loop.create_task(server.serve(listening))
    ending = [loop.create_task(stopping.wait())]
    ending += [loop.create_task(_idle(server, until_idle))] if until_idle else []
    await asyncio.wait(ending, return_when=asyncio.FIRST_COMPLETED)
    log.info("shutting down")
    for task in (serving, *ending):
        task.cancel()
    listening.close()
    await server.close()


async def _idle(server: Server, seconds: float) -> None:
    """Return when there was no session for so long."""
    clock = asyncio.get_running_loop().time
    since = clock()
    while (rest := since + seconds - clock()) > 0:
        await asyncio.sleep(min(rest, 1.0))
        if server.sessions:
            since = clock()
    log.info("no session for %g s", seconds)


def _described(kinds: Mapping[int, str | None]) -> str:
    carried = {
        kind: [f"IPv{version}" for version in kinds if kinds[version] == kind] for kind in kinds.values() if kind
    }
    return ", ".join(f"{kind} ({' and '.join(versions)})" for kind, versions in carried.items())


def _listen(address: str) -> socket.socket:
    host, colon, port = address.rpartition(":")
    everywhere = host == "*"
    if not colon or not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
        raise UsageError(f"{address!r} is no address to listen on: write HOST:PORT")
    try:
        if everywhere and socket.has_dualstack_ipv6():
            return socket.create_server(("", int(port)), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128)
        host = "0.0.0.0" if everywhere else host
        found = socket.getaddrinfo(
            host.strip("[]") or None, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, *_, bound = found[0]
        return socket.create_server(bound[:2], family=family, backlog=128)
    except (OSError, UnicodeError) as error:  # a name that is none (RFC 3490) is a UnicodeError
        reason = error.strerror if isinstance(error, OSError) else "no such host"
        raise UsageError(f"cannot listen on {address}: {reason or error}; choose another --listen") from error


def _network(text: str) -> str:
    try:
        return str(ip_network(text))
    except ValueError as error:
        raise UsageError(f"--destination {text}: {error}") from error


class _Tokens:
    """The tokens of all --token-file as they are now; files that cannot be read any more leave the last in force."""

    def __init__(self, options: argparse.Namespace) -> None:
        if options.insecure and options.token_file:
            raise UsageError("--insecure and --token-file contradict each other: give one")
        if not options.insecure and not options.token_file:
            raise UsageError("a manager needs --token-file F with a line `name: token` (or --insecure, in a lab)")
        self._paths = [Path(file) for file in options.token_file]
        self._seen: list[tuple[int, int]] = []
        self._tokens: Mapping[str, bytes] = ANONYMOUS
        if self._paths:
            self._read()

    def __call__(self) -> Mapping[str, bytes]:
        if self._paths:
            try:
                self._read()
            except UsageError as error:
                log.warning("%s; the tokens read before stay in force", error)
        return self._tokens

    def _read(self) -> None:
        seen = [_told(path, _changed) for path in self._paths]
        if seen != self._seen:
            self._tokens = parse_tokens("\n".join(_told(path, Path.read_text) for path in self._paths))
            self._seen = seen


def _changed(path: Path) -> tuple[int, int]:
    """Another value when the file is another."""
    status = path.stat()
    return status.st_mtime_ns, status.st_ino


def _told(path: Path, do: Callable[[Path], _Told]) -> _Told:
    """What a token file gives; UsageError when it cannot be read."""
    try:
        return do(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UsageError(f"cannot read the token file {path}: {reason}") from error


def _tls(options: argparse.Namespace) -> tuple[ssl.SSLContext, bytes] | None:
    """A server's TLS 1.3 context and its certificate (DER), or None without --tls-cert."""
    if not options.tls_cert and not options.tls_key:
        return None
    if not options.tls_cert or not options.tls_key:
        raise UsageError("--tls-cert and --tls-key go together: give both")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        # The empty password is for a key that is encrypted: without one OpenSSL would ask the terminal.
        context.load_cert_chain(options.tls_cert, options.tls_key, password="")
        leaf = Path(options.tls_cert).read_text().split("-----END CERTIFICATE-----")[0] + "-----END CERTIFICATE-----\n"
        return context, ssl.PEM_cert_to_DER_cert(leaf[leaf.index("-----BEGIN CERTIFICATE-----") :])
    except (OSError, ValueError) as error:
        raise UsageError(
            f"cannot use --tls-cert {options.tls_cert} with --tls-key {options.tls_key}: {error}"
        ) from error


def main() -> NoReturn:
    """The zipapp's entry; it takes the same words as `tpvpn manager`."""
    words = sys.argv[1:]
    parser = argparse.ArgumentParser(prog="tpvpn-manager", description="tpvpn's traffic manager")
    add_options(parser)
    try:
        sys.exit(run(parser.parse_args(words[1:] if words[:1] == ["manager"] else words)))
    except TpvpnError as error:
        print(f"tpvpn-manager: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
