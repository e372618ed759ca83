"""Looks at what keeps the cluster's names from programs: files of this host, and each step that a name takes."""

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tpvpn import rundir
from tpvpn.dns import advice, marker
from tpvpn.dns.advice import WELL, Id
from tpvpn.doctor.check import Check
from tpvpn.doctor.host import output, read_text
from tpvpn.doctor.patient import Patient

Examined = dict[Id, list[Check]]
LIMIT = 1 << 24
"""Characters that are read of a file; a browser's state has some hundred thousand."""
PROFILES = (
    ".mozilla/firefox/*/",
    "snap/firefox/common/.mozilla/firefox/*/",
    ".var/app/org.mozilla.firefox/.mozilla/firefox/*/",
)
FIREFOX = Path("/etc/firefox/policies/policies.json")
CHROMIUM = (
    ("Chrome", "chrome", ("google-chrome", ".var/app/com.google.Chrome/config/google-chrome")),
    (
        "Chromium",
        "chromium",
        ("chromium", "snap/chromium/common/chromium", ".var/app/org.chromium.Chromium/config/chromium"),
    ),
    ("Edge", "edge", ("microsoft-edge", ".var/app/com.microsoft.Edge/config/microsoft-edge")),
)
"""Browsers, each with the word in the path of its managed policies, and the directories of its own state, below the
home, or below ~/.config when it is one word.
"""
RESOLVED = ("usr/lib", "run", "etc")
"""Where systemd-resolved's settings are, the weakest first (resolved.conf(5))."""
VARLINK = Path("/run/systemd/resolve/io.systemd.Resolve")
"""Where nss-resolve(8) asks systemd-resolved."""


async def names(patient: Patient) -> Iterable[Check]:
    """All that concerns names; each check that found nothing says so."""
    return await asyncio.to_thread(_names, patient, await patient.known_status())


def _names(patient: Patient, status: dict[str, Any] | None) -> list[Check]:
    of_session: Examined = {}
    if status is not None:
        said = status["dns"]
        of_session = _session(patient.wishes.name, said)
        domains, mode = [said["domain"], *said["domains"]], said["mode"]
    else:
        domains, mode = list(patient.wishes.domains), "resolved"
    examined = _files(patient.wishes.home, domains, mode, found=of_session.get("programs") == [])
    return [
        one for identity, some in (examined | of_session).items() for one in some or [Check(identity, WELL[identity])]
    ]


def _files(home: Path, suffixes: Sequence[str], mode: str, *, found: bool) -> Examined:
    """What the host's files say; `suffixes`: the cluster's, its domain first; `found`: programs do find names there."""

    nsswitch = _read(Path("/etc/nsswitch.conf"))
    profiles = [path for pattern in PROFILES for path in sorted(home.glob(pattern))]
    settings = [path for place in RESOLVED for path in _globbed(f"{place}/systemd/resolved.conf.d/*.conf")]
    main = [Path("/", place, "systemd/resolved.conf") for place in RESOLVED]
    chromium: list[Check] = []
    for browser, word, states in CHROMIUM:
        place = f"etc/{word}" if word == "chromium" else f"etc/opt/{word}"
        policies = {str(path): _read(path) for path in _globbed(f"{place}/policies/managed/*.json")}
        paths = [home / (one if "/" in one else f".config/{one}") / "Local State" for one in states]
        chromium += advice.of_chromium(browser, policies, {str(path): _read(path) for path in paths})
    return {
        "nsswitch": list(advice.of_nsswitch(nsswitch)),
        "mdns": [] if found else list(advice.of_mdns(nsswitch, suffixes, mode)),
        "nss-resolve": list(advice.of_nss_resolve(nsswitch, mode, resolved=VARLINK.exists())),
        "firefox": list(
            advice.of_firefox(
                _read(FIREFOX),
                {str(one): f"{_read(one / 'prefs.js')}\n{_read(one / 'user.js')}" for one in profiles},
                list(dict.fromkeys((suffixes[0], "svc"))),
            )
        ),
        "chromium": chromium,
        "dnssec": list(
            advice.of_dnssec("\n".join(map(_read, [*main, *settings])), output("resolvectl", "--no-pager", "dnssec"))
        ),
    }


def _session(name: str, dns: dict[str, Any]) -> Examined:
    """What a session that runs says, and at which step a name is lost; the steps behind that are not taken."""

    listening, mode, now = dns["listening"], dns["mode"], _read(marker.FILE)
    before, below = _replaced(name)
    option = rundir.name_option(name)
    examined: Examined = {"session": list(advice.of_session(dns["warnings"], listening, dns["because"], option))}
    if not listening:
        return examined
    examined["resolv.conf"] = list(advice.of_resolv_conf(now, listening, mode, below=below))
    examined["search"] = list(advice.of_search(now, before))
    for step, found in _steps(dns, advice.first_server(now), option):
        examined[step] = found
        if found:
            break
    return examined


def _steps(dns: dict[str, Any], server: str, option: str) -> Iterator[tuple[Id, list[Check]]]:
    """A name that every cluster has, asked of the session, of whom /etc/resolv.conf names first, and as programs do."""
    import socket

    from tpvpn.dns.ask import ask

    name, mode = f"kubernetes.default.svc.{dns['below']}", dns["mode"]
    yield (
        "stub",
        [one for address in dns["listening"] for one in advice.of_stub(name, address, ask(name, address), option)],
    )
    if mode != "off":
        yield "server", list(advice.of_server(name, server, ask(name, server), mode, option))
    try:
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]
    except OSError:
        found = []
    yield "programs", list(advice.of_programs(name, found, mode, dns["because"], option))


def _replaced(name: str) -> tuple[str, bool]:
    """What the session's /etc/resolv.conf replaced, "" when it is not there; whether another session's stands above."""

    ours = marker.Owner(name, rundir.namespace().name)
    for path, found in marker.chain():
        if found.owner == ours:
            return _read(marker.kept(ours, found.generation)), path != marker.FILE
    return "", False


def _globbed(pattern: str) -> list[Path]:
    return sorted(Path("/").glob(pattern))


def _read(path: Path) -> str:
    return read_text(path, LIMIT)
