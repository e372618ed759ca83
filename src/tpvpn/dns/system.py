"""The host's own DNS servers, from the files that the resolver library reads; it asks nobody and changes nothing."""

import contextlib
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

from tpvpn.dns.resolv_conf import lines_of
from tpvpn.proto.session import SPACE4, SPACE6

FILES = (Path("/etc/resolv.conf"), Path("/run/systemd/resolve/resolv.conf"))
"""resolv.conf(5); and, behind the stub of systemd-resolved(8) that the first then names, the servers that it asks."""
KEPT = "/etc/resolv.conf.before-tpvpn-*"
"""What sessions have replaced the first by (helper/resolver_file), which goes on to be asked."""


def nameservers(files: tuple[Path, ...] = FILES) -> tuple[str, ...]:
    """The addresses of the DNS servers that this host asks, each once, without loopback and zones."""
    found = dict[str, None]()
    for file in (*files, *sorted(Path("/").glob(KEPT.removeprefix("/")))):
        with contextlib.suppress(OSError):
            found |= dict.fromkeys(nameservers_of(file.read_text(errors="replace")))
    return tuple(one for one in found if not is_own(one))


def nameservers_of(text: str) -> Iterator[str]:
    """The addresses of the DNS servers that a resolv.conf names, without loopback and zones."""
    for server in servers_of(text):
        address = ip_address(server.partition("%")[0])
        if not address.is_loopback:
            yield str(address)


def servers_of(text: str) -> Iterator[str]:
    """All the DNS servers that a resolv.conf names, as they stand there."""
    for server, *_ in filter(None, lines_of(text, "nameserver")):
        with contextlib.suppress(ValueError):
            ip_address(server.partition("%")[0])
            yield server


def is_own(server: str) -> bool:
    """Whether a server is a session's own, at its device's address."""
    address = ip_address(server.partition("%")[0])
    return address in (SPACE4 if address.version == 4 else SPACE6)
