"""`tpvpn doctor`: what keeps the cluster's names from working on this host, each with its remedy."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpvpn.cli import Commands
from tpvpn.cli.config import home, rights_of_caller

if TYPE_CHECKING:
    from tpvpn.dns.advice import Finding

SCHEMA = "tpvpn.doctor/1"
LIMIT = 1 << 20
PROFILES = (
    ".mozilla/firefox/*/",
    "snap/firefox/common/.mozilla/firefox/*/",
    ".var/app/org.mozilla.firefox/.mozilla/firefox/*/",
)
POLICIES = (
    "/etc/firefox/policies/policies.json",
    "/etc/opt/chrome/policies/managed/*.json",
    "/etc/chromium/policies/managed/*.json",
    "/etc/opt/edge/policies/managed/*.json",
)
STATES = (".config/google-chrome/Local State", ".config/chromium/Local State", ".config/microsoft-edge/Local State")
RESOLVED = ("/etc/systemd/resolved.conf", "/etc/systemd/resolved.conf.d/*.conf")


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "doctor",
        help="find what keeps the cluster's names from working",
        description="Look for what keeps programs of this host from the cluster's names: nsswitch.conf, browsers, "
        "resolv.conf, systemd-resolved; of a session that runs also at which step a name is lost. Changes nothing, "
        "needs no privilege. Exit code 1: something was found.",
    )
    parser.add_argument("--name", default="default", help="name of the session (default: default)")
    parser.add_argument("--output", choices=("text", "json"), default="text", help="json: for other programs")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the findings; 0 when there are none, else 1."""
    from tpvpn import rundir
    from tpvpn.control import ask
    from tpvpn.dns.policy import DOMAIN

    status: dict[str, Any] | None = None
    if rundir.table_of(arguments.name) is not None:
        status = ask(rundir.directory(arguments.name), "status")["dns"]
    dns = status or {"domain": DOMAIN, "domains": [DOMAIN], "mode": "auto or resolved", "listening": []}
    with rights_of_caller():
        found = list(_of_files(dns))
    found += _of_session(arguments.name, status) if status else ()
    if arguments.output == "json":
        print(json.dumps({"schema": SCHEMA, "ok": not found, "findings": [one.as_json() for one in found]}, indent=2))
    else:
        print("\n\n".join(f"{one.sentence}.\n  {one.remedy}" for one in found) or "nothing is in the way of names")
    return 1 if found else 0


def _of_files(dns: dict[str, Any]) -> "Iterator[Finding]":
    from tpvpn.dns import advice

    suffixes = [one for one in (dns["domain"], *dns["domains"]) if not one.endswith(".arpa")]
    yield from advice.of_nsswitch(_read(Path("/etc/nsswitch.conf")), suffixes, dns["mode"])
    for profile in (path for pattern in PROFILES for path in sorted(home().glob(pattern))):
        yield from advice.of_firefox(_read(profile / "prefs.js") + _read(profile / "user.js"), str(profile))
    files = [path for pattern in POLICIES for path in sorted(Path("/").glob(pattern[1:]))]
    for file in (*files, *(home() / one for one in STATES)):
        yield from advice.of_policy(_read(file), str(file))
    yield from advice.of_dnssec(
        "\n".join(_read(path) for pattern in RESOLVED for path in sorted(Path("/").glob(pattern[1:])))
    )


def _of_session(name: str, dns: dict[str, Any]) -> "Iterator[Finding]":
    """What a session that runs warns of, and whether programs come to its names."""
    import socket

    from tpvpn import rundir
    from tpvpn.control import ask
    from tpvpn.dns import advice

    yield from (advice.Finding("session", one, "`tpvpn status` shows how names are led") for one in dns["warnings"])
    kept = sorted(Path("/etc").glob(f"resolv.conf.before-tpvpn-*-{name}.*"))
    if dns["listening"]:
        yield from advice.of_resolv_conf(_read(Path("/etc/resolv.conf")), _read(kept[-1]) if kept else "", dns)
    asked = f"kubernetes.default.svc.{dns['domain']}"
    ours = ask(rundir.directory(name), f"name {asked}")["rcode"]
    try:
        system = [str(entry[4][0]) for entry in socket.getaddrinfo(asked, None, type=socket.SOCK_STREAM)]
    except OSError:
        system = []
    yield from advice.of_answers(asked, ours, system, dns["mode"])


def _read(path: Path) -> str:
    """What is in a file, as far as it may be read."""
    try:
        with path.open(errors="replace") as file:
            return file.read(LIMIT)
    except OSError:
        return ""
