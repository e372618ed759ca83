"""The flags that say what to route, shared by `plan` and `connect`."""

import argparse
from collections.abc import Iterable
from typing import cast

from tpvpn.errors import UsageError
from tpvpn.route.verdict import Kind, Policy, Wanted
from tpvpn.route.prefix import Prefix

FLAGS: tuple[tuple[str, Kind], ...] = (("--service-cidr", "service"), ("--pod-cidr", "pod"), ("--also-proxy", "also"))


def add_routing_flags(parser: argparse.ArgumentParser) -> None:
    """Add them; each may be repeated, and takes several values with commas between."""
    group = parser.add_argument_group("routing", "CIDR: 10.130.0.0/16, fd00:130::/64 or an address; repeatable, or A,B")

    def cidrs(flag: str, meaning: str) -> None:
        group.add_argument(flag, action="append", default=[], metavar="CIDR", help=meaning)

    cidrs("--service-cidr", "the cluster's service subnet")
    cidrs("--pod-cidr", "the cluster's pod subnet")
    cidrs("--also-proxy", "route this too")
    cidrs("--never-proxy", "never route this: it keeps the way it has now")
    cidrs("--allow-conflicting-subnets", "may be taken from a private route, a VPN's for example")
    group.add_argument(
        "--on-conflict",
        choices=("fail", "skip"),
        default="fail",
        help="when something conflicts: change nothing (fail, the default), or route the rest (skip)",
    )


def policy_and_wanted(arguments: argparse.Namespace) -> tuple[list[Wanted], Policy]:
    """What the flags ask for; UsageError when a value is malformed or neither services nor pods are named."""
    given = {flag: list(prefixes(flag, arguments)) for flag, _ in FLAGS}
    if not given["--service-cidr"] and not given["--pod-cidr"]:
        raise UsageError(
            "the cluster's subnets are not known: give --service-cidr and/or --pod-cidr, "
            "for example --service-cidr 10.96.0.0/12"
        )
    wanted = [Wanted(prefix, kind, flag) for flag, kind in FLAGS for prefix in given[flag]]
    never = ((prefix, "--never-proxy") for prefix in prefixes("--never-proxy", arguments))
    allow = prefixes("--allow-conflicting-subnets", arguments)
    return wanted, Policy(tuple(allow), tuple(dict.fromkeys(never)), arguments.on_conflict)


def prefixes(flag: str, arguments: argparse.Namespace) -> Iterable[Prefix]:
    """The values of a flag, each once; UsageError names the flag."""
    values = cast(list[str], getattr(arguments, flag.removeprefix("--").replace("-", "_")))
    try:
        return dict.fromkeys(Prefix.parse(text.strip()) for value in values for text in value.split(","))
    except UsageError as error:
        raise UsageError(f"{flag}: {error}") from None
