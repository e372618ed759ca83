"""The host's own DNS servers, from the files that the resolver library reads; it asks nobody and changes nothing."""

import contextlib
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

FILES = (Path("/etc/resolv.conf"), Path("/run/systemd/resolve/resolv.conf"))
"""resolv.conf(5); and, behind the stub of systemd-resolved(8) that the first then names, the servers that it asks."""


def nameservers(files: tuple[Path, ...] = FILES) -> tuple[str, ...]:
    """The addresses of the DNS servers that this host asks, each once, without loopback and zones."""
    found = dict[str, None]()
    for file in files:
        with contextlib.suppress(OSError):
            found |= dict.fromkeys(nameservers_of(file.read_text(errors="replace")))
    return tuple(found)


def nameservers_of(text: str) -> Iterator[str]:
    """The addresses of the DNS servers that a resolv.conf names, without loopback and zones."""
    for words in map(str.split, text.splitlines()):
        if len(words) > 1 and words[0] == "nameserver":
            with contextlib.suppress(ValueError):
                address = ip_address(words[1].partition("%")[0])
                if not address.is_loopback:
                    yield str(address)
