"""What keeps programs of a host from the cluster's names, and what to do about it.

Pure: the texts of files, and what a session says of itself, in; findings out. Each finding is one sentence with its
remedy, a command or the line to write.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

Id = Literal["nsswitch", "nss-resolve", "browser", "dnssec", "search", "resolv.conf", "session", "answer"]
SEARCHED = 6
"""Domains of a search line that a resolver before glibc 2.26 takes (resolv.conf(5))."""
_MDNS = re.compile(r"\bmdns[46]?_minimal\b\s*\[NOTFOUND=return\]\s*", re.IGNORECASE)
_TRR = re.compile(r"""user_pref\("network\.trr\.mode",\s*([23])\)""")


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that keeps names from working."""

    id: Id
    sentence: str
    remedy: str

    def as_json(self) -> dict[str, str]:
        """As `tpvpn doctor --output json` shows it."""
        return asdict(self)


def hosts_line(nsswitch: str) -> str:
    """The line that says where programs of glibc look names up; the usual one where there is none (nss(5))."""
    lines = (line.partition("#")[0].strip() for line in nsswitch.splitlines())
    return next((line for line in lines if line.startswith("hosts:")), "hosts: files dns")


def of_nsswitch(nsswitch: str, suffixes: Iterable[str], mode: str) -> Iterator[Finding]:
    """`suffixes`: those that are the cluster's; `mode`: how the session leads names to itself."""
    line = hosts_line(nsswitch)
    local = next((one for one in suffixes if one == "local" or one.endswith(".local")), None)
    minimal = _MDNS.search(line)
    if local and minimal and not re.search(r"\b(resolve|dns)\b", line[: minimal.start()]):
        yield Finding(
            "nsswitch",
            f"/etc/nsswitch.conf has mdns alone asked for names below .local, so that those below {local} are asked "
            "of no DNS server",
            f"in /etc/nsswitch.conf write `{' '.join(_MDNS.sub('', line).split())}`, with mdns behind dns if at all",
        )
    words = re.findall(r"\b(resolve|dns)\b", line)
    if not words:
        yield Finding(
            "nsswitch",
            "/etc/nsswitch.conf names neither dns nor resolve for hosts: programs of glibc ask no DNS server at all",
            f"in /etc/nsswitch.conf write `{line} dns`",
        )
    if words[:1] == ["resolve"] and "resolved" not in mode and mode != "off":
        stops = re.search(r"\bresolve\b\s*\[!UNAVAIL=return\]", line)
        if stops:
            yield Finding(
                "nss-resolve",
                "/etc/nsswitch.conf has systemd-resolved asked first, which does not know of the session, and its word "
                "is final",
                "connect with `--dns auto` where systemd-resolved runs, or put dns before resolve in that file",
            )


def of_firefox(preferences: str, profile: str) -> Iterator[Finding]:
    """`preferences`: a profile's prefs.js or user.js."""
    if _TRR.search(preferences):
        yield Finding(
            "browser",
            f"Firefox asks a server over HTTPS for names ({profile}), which knows nothing of the cluster",
            "in Firefox's settings turn off DNS over HTTPS, or add the cluster's domain to its exceptions "
            "(network.trr.excluded-domains)",
        )


def of_policy(text: str, file: str) -> Iterator[Finding]:
    """`text`: a managed policy of Firefox or of a browser of Chromium's, or what such a browser keeps of its state."""
    try:
        given: Any = json.loads(text)
    except ValueError:
        return
    found = _member(given, "policies", "DNSOverHTTPS", "Enabled") is True
    found |= _member(given, "DnsOverHttpsMode") == "secure" or _member(given, "dns_over_https", "mode") == "secure"
    if found:
        yield Finding(
            "browser",
            f"a browser asks a server over HTTPS for names ({file}), which knows nothing of the cluster",
            "turn off its secure DNS, or have whoever manages it except the cluster's domain",
        )


def _member(given: Any, *path: str) -> object:
    for word in path:
        given = cast(dict[str, Any], given).get(word) if isinstance(given, dict) else None
    return given


def of_dnssec(resolved_conf: str) -> Iterator[Finding]:
    """`resolved_conf`: the settings of systemd-resolved."""
    settings = [line.strip().lower() for line in resolved_conf.splitlines()]
    if "dnssec=yes" in settings or "dnssec=true" in settings:
        yield Finding(
            "dnssec",
            "systemd-resolved wants every answer signed (DNSSEC=yes), which a VPN's servers and private zones are not",
            "set DNSSEC=allow-downgrade in /etc/systemd/resolved.conf; the session's own link needs nothing",
        )


def words_of(resolv_conf: str, keyword: str) -> list[list[str]]:
    """The words behind a keyword, of each of its lines."""
    lines = (line.split() for line in resolv_conf.splitlines())
    return [words[1:] for words in lines if words[:1] == [keyword]]


def of_resolv_conf(now: str, before: str, dns: Mapping[str, Any]) -> Iterator[Finding]:
    """The file as it is and as it was; `dns`: what the session's status says of names."""
    listening: Sequence[str] = dns["listening"]
    servers = [words[0] for words in words_of(now, "nameserver") if words]
    if "file" in dns["mode"] and servers[:1] and servers[0] not in listening:
        yield Finding(
            "resolv.conf",
            f"/etc/resolv.conf names {servers[0]} before the session's {listening[0]}: another program wrote it since",
            "have that program leave the file alone while you are connected; the session puts itself back",
        )
    searched = (words_of(now, "search") or [[]])[-1]
    lost = [one for one in (words_of(before, "search") or [[]])[-1] if one not in searched]
    if lost:
        yield Finding(
            "search", f"/etc/resolv.conf searches {' '.join(lost)} no more", f"add `search {' '.join(lost)}` to it"
        )
    if len(searched) > SEARCHED:
        yield Finding(
            "search",
            f"/etc/resolv.conf searches {len(searched)} domains, of which older programs take {SEARCHED}",
            f"leave out some: {' '.join(searched)}",
        )


def of_answers(name: str, ours: str | None, system: Sequence[str], mode: str) -> Iterator[Finding]:
    """Where a name is lost: `ours` is what the session answers (a code), `system` what programs of this host get."""
    if ours != "NOERROR":
        yield Finding(
            "answer",
            f"the session itself has no answer for {name} ({ours or 'nobody answered'})",
            f"`tpvpn why {name}` says who was asked; `tpvpn manager sessions` whether the manager lives",
        )
    elif not system:
        why = (
            "names are left alone (`--dns off`)" if mode == "off" else "what stands before it is named above, if found"
        )
        yield Finding(
            "answer",
            f"the session answers for {name}, but programs of this host do not come to ask it: {why}",
            "connect with `--dns auto`" if mode == "off" else f"compare `getent hosts {name}` with `tpvpn why {name}`",
        )
