"""What keeps programs of a host from the cluster's names, and what to do about it.

Pure: the texts of files, what a session says of itself and what servers answered in; checks out. What is found is one
sentence with its remedy, a command or the line to write. It says only what keeps names from working: what is odd but
harmless is nobody's trouble.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, cast

from tpvpn.dns.policy import is_below
from tpvpn.dns.resolv_conf import lines_of
from tpvpn.doctor.check import Check

Id = Literal[
    "nsswitch", "mdns", "nss-resolve", "firefox", "chromium", "dnssec",
    "resolv.conf", "search", "session", "stub", "server", "programs",
]  # fmt: skip
WELL: Mapping[Id, str] = {
    "nsswitch": "programs of glibc ask DNS servers",
    "mdns": "mDNS takes no names of the cluster's",
    "nss-resolve": "systemd-resolved has not the last word where it does not know of the session",
    "firefox": "no Firefox passes by this host's DNS for names of the cluster's",
    "chromium": "no browser of Chromium's passes by this host's DNS",
    "dnssec": "systemd-resolved takes answers that are not signed",
    "resolv.conf": "/etc/resolv.conf names the session first where it is to",
    "search": "no search domain is lost",
    "session": "the session has no trouble with this host's resolver",
    "stub": "the session answers",
    "server": "the server that /etc/resolv.conf names first answers",
    "programs": "programs of this host find names of the cluster's",
}
SEARCHED, SEARCHED_LENGTH = 6, 256
"""Domains of a search line, and characters of all, that a resolver before glibc 2.26 takes (resolv.conf(5))."""
_ENTRY = re.compile(r"([^\s\[]+)\s*(\[[^\]]*\])?")
_FINAL = re.compile(r"(?<!!)\bNOTFOUND\s*=\s*return|!\s*UNAVAIL\s*=\s*return", re.IGNORECASE)
"""An action after which a name that is not found is asked of nobody else (nsswitch.conf(5))."""
_MDNS = ("mdns_minimal", "mdns4_minimal", "mdns6_minimal")
_PREFERENCE = re.compile(r"""^\s*user_pref\("network\.trr\.(mode|excluded-domains)",\s*"?([^")]*)"?\)""", re.MULTILINE)
_NEVER_ASKED = ("local", "localhost")
"""What Firefox asks over HTTPS for in no case (network.trr.builtin-excluded-domains)."""
_SIGNED = ("yes", "true", "1", "on", "y", "t")
_LINK = re.compile(r"^Link [0-9]+ \((?P<device>[^)]+)\): (?P<setting>\S+)", re.MULTILINE)


# -- nsswitch.conf -----------------------------------------------------------------------------------------------------


def hosts_line(nsswitch: str) -> str:
    """The line that says where programs of glibc look names up; the usual one where there is none (nss(5))."""
    lines = (line.partition("#")[0].strip() for line in nsswitch.splitlines())
    return next((line for line in lines if line.startswith("hosts:")), "hosts: files dns")


def _entries(line: str) -> list[tuple[str, str]]:
    """The services of a line, each with its action, "" for none."""
    return [(service, action or "") for service, action in _ENTRY.findall(line.removeprefix("hosts:"))]


def _write(line: str, entries: Sequence[tuple[str, str]]) -> str:
    words = " ".join(word for entry in entries for word in entry if word)
    return f"in /etc/nsswitch.conf write `hosts: {words}` for `{' '.join(line.split())}`"


def of_nsswitch(nsswitch: str) -> Iterator[Check]:
    """Whether DNS is asked at all."""
    line = hosts_line(nsswitch)
    entries = _entries(line)
    if not any(service in ("dns", "resolve") for service, _ in entries):
        yield Check(
            "nsswitch",
            "/etc/nsswitch.conf has neither dns nor resolve for hosts, so that programs of glibc ask no DNS server",
            _write(line, _mdns_behind([*entries, ("dns", "")])),
        )


def of_mdns(nsswitch: str, suffixes: Sequence[str], mode: str) -> Iterator[Check]:
    """Whether mDNS has the last word on names of the cluster's, `suffixes`, before we are asked by DNS or resolved."""
    line = hosts_line(nsswitch)
    entries = _entries(line)
    local = next((one for one in suffixes if is_below(one, "local")), None)
    asking = ("dns", "resolve") if "resolved" in mode else ("dns",)
    for at, (service, action) in enumerate(entries):
        if service in asking:
            return
        if service in _MDNS and _FINAL.search(action) and local and any(one in asking for one, _ in entries[at:]):
            yield Check(
                "mdns",
                f"/etc/nsswitch.conf has {service} alone asked for names below .local, and an nss-mdns before 0.11 "
                f"takes those below {local} for such, so that programs of glibc ask nobody else for them",
                _write(line, _mdns_behind(entries)),
            )
            return


def _mdns_behind(entries: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The same services, those of mDNS behind those of DNS."""
    mdns = [(service, "") for service, _ in entries if service in _MDNS]
    rest = [entry for entry in entries if entry[0] not in _MDNS]
    last = max(at for at, (service, _) in enumerate(rest) if service in ("dns", "resolve"))
    return [*rest[: last + 1], *mdns, *rest[last + 1 :]]


def of_nss_resolve(nsswitch: str, mode: str, *, resolved: bool) -> Iterator[Check]:
    """Whether a systemd-resolved that does not know of the session has the last word; `resolved`: whether it runs."""
    line = hosts_line(nsswitch)
    entries = _entries(line)
    if not resolved or mode != "file":
        return
    for at, (service, action) in enumerate(entries):
        if service == "dns":
            return
        if service == "resolve" and _FINAL.search(action):
            dns = [] if any(one == "dns" for one, _ in entries) else [("dns", "")]
            after = [*entries[:at], (service, ""), *entries[at + 1 :], *dns]
            yield Check(
                "nss-resolve",
                "/etc/nsswitch.conf has systemd-resolved asked before dns, which does not know of the session, and its "
                "word is final",
                f"connect with `--dns auto`, or {_write(line, after)}",
            )
            return


# -- browsers ----------------------------------------------------------------------------------------------------------


def of_firefox(policies: str, profiles: Mapping[str, str], suffixes: Sequence[str]) -> Iterator[Check]:
    """Whether a Firefox asks over HTTPS for names below `suffixes`.

    `policies`: its policies.json; `profiles`: by the profile's directory its prefs.js and then user.js, which counts.
    """
    policy = _member(_json(policies), "policies", "DNSOverHTTPS")
    managed = "/etc/firefox/policies/policies.json"
    excepted = _words(_member(policy, "ExcludedDomains"))
    if _member(policy, "Enabled") is True and (missing := _without(suffixes, excepted)):
        yield Check(
            "firefox",
            f"{managed} has Firefox ask a server over HTTPS for names, which knows none below {_list(missing)}",
            f'in its "DNSOverHTTPS" write `"ExcludedDomains": {json.dumps([*excepted, *missing])}`, '
            'or `"Enabled": false`',
        )
    if _member(policy, "Locked") is True:
        return
    for profile, preferences in profiles.items():
        said = dict(_PREFERENCE.findall(preferences))
        own = [*excepted, *_words(said.get("excluded-domains", "").split(","))]
        if said.get("mode", "").strip() in ("2", "3") and (missing := _without(suffixes, own)):
            yield Check(
                "firefox",
                f"Firefox with the profile {profile} asks a server over HTTPS for names, which knows none below "
                f"{_list(missing)}",
                "turn DNS over HTTPS off in Firefox's settings, or in that profile's user.js write "
                f'`user_pref("network.trr.excluded-domains", "{",".join([*own, *missing])}");`',
            )


def of_chromium(browser: str, policies: Mapping[str, str], states: Mapping[str, str]) -> Iterator[Check]:
    """Whether a browser of Chromium's asks over HTTPS; of its managed policies and its own `Local State`s, by file.

    "automatic" without a server of its own asks over HTTPS only where the system's server is known for that, and ours
    is not.
    """
    ruling = {file: mode for file, text in policies.items() if (mode := _mode(text)) is not None}
    ruling = ruling or {file: mode for file, text in states.items() if (mode := _mode(text)) is not None}
    for file, (mode, templates) in ruling.items():
        if mode == "secure" or (mode == "automatic" and templates):
            here = (
                'write `"DnsOverHttpsMode": "off"` in that file'
                if file in policies
                else "turn secure DNS off at chrome://settings/security"
            )
            yield Check(
                "chromium",
                f"{browser} asks a server over HTTPS for names ({file}), which knows none of the cluster's",
                here,
            )


def _mode(text: str) -> tuple[object, object] | None:
    """How a policy or a state has names asked over HTTPS, and of whom; None when it does not say how."""
    given = _json(text)
    state = _member(given, "dns_over_https")
    mode = _member(given, "DnsOverHttpsMode") or _member(state, "mode")
    templates = _member(given, "DnsOverHttpsTemplates") or _member(state, "templates")
    return None if mode is None else (mode, templates)


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _member(given: object, *path: str) -> object:
    for word in path:
        given = cast(dict[str, object], given).get(word) if isinstance(given, dict) else None
    return given


def _words(given: object) -> list[str]:
    """The strings of a list, as domains; nothing of what is none."""
    found = cast(list[object], given) if isinstance(given, list) else []
    return [one.strip().strip(".").lower() for one in found if isinstance(one, str) and one.strip()]


def _without(suffixes: Sequence[str], excepted: Sequence[str]) -> list[str]:
    """The suffixes that no exception covers."""
    return [one for one in suffixes if not any(is_below(one, other) for other in (*excepted, *_NEVER_ASKED))]


def _list(words: Sequence[str]) -> str:
    return " and ".join(words)


# -- systemd-resolved --------------------------------------------------------------------------------------------------


def of_dnssec(resolved_conf: str, links: str) -> Iterator[Check]:
    """`resolved_conf`: systemd-resolved's settings, the later the stronger; `links`: what `resolvectl dnssec` says."""
    settings = [line.replace(" ", "").lower().split("=") for line in resolved_conf.splitlines()]
    said = [words[1] for words in settings if words[0] == "dnssec" and len(words) == 2]
    if said and said[-1] in _SIGNED:
        yield Check(
            "dnssec",
            "systemd-resolved wants every answer signed (DNSSEC=yes), which those of a VPN's servers for its own names "
            "are not",
            "in /etc/systemd/resolved.conf write `DNSSEC=allow-downgrade`, and then `systemctl restart "
            "systemd-resolved`; the session's own link needs nothing",
        )
        return
    for device, setting in _LINK.findall(links):
        if setting == "yes":
            yield Check(
                "dnssec",
                f"systemd-resolved wants every answer signed that comes by {device}, which those of a VPN's servers "
                "for its own names are not",
                f"resolvectl dnssec {device} allow-downgrade",
            )


# -- resolv.conf -------------------------------------------------------------------------------------------------------


def first_server(resolv_conf: str) -> str:
    """Whom programs ask first; the host itself where nobody is named (resolv.conf(5))."""
    return next((words[0] for words in lines_of(resolv_conf, "nameserver") if words), "127.0.0.1")


def searched(resolv_conf: str) -> list[str]:
    """The domains that are searched: the last line counts."""
    found = lines_of(resolv_conf, "search", "domain")
    return found[-1] if found else []


def of_resolv_conf(now: str, listening: Sequence[str], mode: str, *, below: bool) -> Iterator[Check]:
    """Whether the file leads to the session, which has it by its `mode`; `below`: another session's stands above."""
    server = first_server(now)
    if "file" in mode and server not in listening and not below:
        yield Check(
            "resolv.conf",
            f"/etc/resolv.conf names {server} first and not the session: another program has written it since",
            f"have that program leave the file alone; until then write `nameserver {listening[0]}` as its first line",
        )


def of_search(now: str, before: str) -> Iterator[Check]:
    """Whether all is searched that was, and whether older programs take so much; `before`: what our file replaced."""
    there = searched(now)
    if lost := [one for one in searched(before) if one not in there]:
        yield Check(
            "search",
            f"/etc/resolv.conf does not search {_list(lost)} any more",
            f"in /etc/resolv.conf write `search {' '.join([*there, *lost])}`",
        )
    if len(there) > SEARCHED or len(" ".join(there)) > SEARCHED_LENGTH:
        kept = there[:SEARCHED]
        while len(" ".join(kept)) > SEARCHED_LENGTH:
            kept = kept[:-1]
        yield Check(
            "search",
            f"/etc/resolv.conf searches {len(there)} domains, of which programs with a glibc before 2.26 take "
            f"{len(kept)} and leave out {_list(there[len(kept) :])}",
            "have whoever gives this host its search domains (DHCP, a VPN) give fewer, or write such names in full",
        )


# -- where a name is lost; `option` names the session to a command, "" for the default one -----------------------------


def of_session(warnings: Sequence[str], listening: Sequence[str], because: str, option: str) -> Iterator[Check]:
    """What the session itself knows of."""
    if not listening:
        yield Check(
            "session", f"the session answers nowhere: {because}", "`ss -lntup sport = :53` shows who has port 53"
        )
    shows = f"`tpvpn status{option}` shows how names are led"
    yield from (Check("session", one.rstrip("."), shows) for one in warnings)


def of_stub(name: str, address: str, answer: str | None, option: str) -> Iterator[Check]:
    """Step 1: the session itself, asked at its own address."""
    why = f"`tpvpn why {name}{option}` says who was asked"
    if answer is None:
        yield Check(
            "stub",
            f"{name} is lost on the way to the session: nobody answers at {address}, where it listens",
            "`ss -lntup sport = :53` shows whether it does, `nft list ruleset` what drops packets to our own address",
        )
    elif answer in ("NXDOMAIN", "no address"):
        yield Check(
            "stub",
            f"{name} is lost in the cluster, whose resolver knows no such name",
            f"{why}; `kubectl get configmap -n kube-system coredns -o yaml` shows whether that is the cluster's domain",
        )
    elif answer != "NOERROR":
        yield Check(
            "stub",
            f"{name} is lost between the session and the cluster's resolver: {answer}",
            f"{why}, `tpvpn status{option}` whether the link is up, `kubectl get pods -n kube-system` whether DNS runs",
        )


def of_server(name: str, server: str, answer: str | None, mode: str, option: str) -> Iterator[Check]:
    """Step 2: whom /etc/resolv.conf names first, which is the session or comes to ask it."""
    if answer != "NOERROR":
        look = "`resolvectl status` shows whom it asks, and for which domains"
        if "resolved" not in mode:
            look = f"`tpvpn status{option}` shows how names are led"
        yield Check(
            "server",
            f"{name} is lost at {server}, which /etc/resolv.conf names first: {answer or 'it does not answer'}, though "
            "the session does",
            f"{look}; `--dns file` has programs ask the session itself",
        )


def of_programs(name: str, found: Sequence[str], mode: str, because: str, option: str) -> Iterator[Check]:
    """Step 3: the addresses that programs of this host have by getaddrinfo(3); why the `mode` is what it is."""
    if found:
        return
    if mode == "off":
        yield Check(
            "programs",
            f"the session answers for {name}, but programs are not led to it: {because}",
            f"connect with `--dns auto`; `tpvpn status{option}` shows how names are led",
        )
    else:
        yield Check(
            "programs",
            f"{name} is lost in programs themselves, though whom /etc/resolv.conf names answers",
            f"`getent -s dns hosts {name}` asks DNS alone: does it find the name, then another word of the line "
            "`hosts:` in /etc/nsswitch.conf takes it, or a cache (`nscd --invalidate=hosts`)",
        )
