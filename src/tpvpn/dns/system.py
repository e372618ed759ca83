"""The host's own DNS servers, from the files that the resolver library reads; it asks nobody and changes nothing."""

from ipaddress import ip_address
from pathlib import Path

FILES = (Path("/etc/resolv.conf"), Path("/run/systemd/resolve/resolv.conf"))
"""resolv.conf(5); and, behind the stub of systemd-resolved(8) that the first then names, the servers that it asks."""


def nameservers(files: tuple[Path, ...] = FILES) -> tuple[str, ...]:
    """The addresses of the DNS servers that this host asks, each once, without loopback and zones."""
    found = dict[str, None]()
    for file in files:
        try:
            lines = file.read_text(errors="replace").splitlines()
        except OSError:
            continue
        for words in map(str.split, lines):
            if len(words) > 1 and words[0] == "nameserver":
                try:
                    address = ip_address(words[1].partition("%")[0])
                except ValueError:
                    continue
                if not address.is_loopback:
                    found[str(address)] = None
    return tuple(found)
