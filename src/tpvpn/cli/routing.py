"""The flags that say what to route, shared by `plan`, `connect` and `why`, laid over the configuration file."""

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, TypeVar, get_args

from tpvpn.cli.config import load
from tpvpn.config import ALLOW, ALSO, NEVER, ON_CONFLICT, PODS, SERVICES, Config, Key, Source, Value, merge, subnet
from tpvpn.errors import UsageError
from tpvpn.route.prefix import Prefix
from tpvpn.route.verdict import Kind, OnConflict, Policy, Request, Wanted

T = TypeVar("T")

CLUSTER: tuple[tuple[str, Key[Prefix], Kind], ...] = (
    ("--service-cidr", SERVICES, "service"),
    ("--pod-cidr", PODS, "pod"),
)
KEYS: tuple[tuple[str, Key[Any]], ...] = (
    ("--service-cidr", SERVICES),
    ("--pod-cidr", PODS),
    ("--allow-conflicting-subnets", ALLOW),
    ("--also-proxy", ALSO),
    ("--never-proxy", NEVER),
)
GIVEN = (*(flag for flag, _, _ in CLUSTER), "--also-proxy", "--never-proxy", "--virtual", "--host", "--hosts-file")
"""What a command to paste repeats; what is allowed, and what a conflict leads to, is for it to say."""
HOSTS = 1024
"""Single addresses are routes, and many of them: as many as a table bears that is read again at each change."""
NOTHING = Config()
FILE_LIMIT = 1 << 20
"""Bytes of a file of hosts."""


def add_routing_flags(parser: argparse.ArgumentParser) -> None:
    """Add them; all but --on-conflict may be repeated, and take several values with commas between."""
    group = parser.add_argument_group("routing", "CIDR: 10.130.0.0/16, fd00:130::/64 or an address; repeatable, or A,B")

    def values(flag: str, what: str, meaning: str) -> None:
        group.add_argument(flag, action="append", default=[], metavar=what, help=meaning)

    values("--service-cidr", "CIDR", "the cluster's service subnet")
    values("--pod-cidr", "CIDR", "the cluster's pod subnet")
    values("--also-proxy", "CIDR|NAME", "route this too: a subnet, or a host name's addresses")
    values("--never-proxy", "CIDR", "never route this: it keeps the way it has now")
    values("--allow-conflicting-subnets", "CIDR", "may be taken from a private route, a VPN's for example")
    group.add_argument(
        "--on-conflict",
        choices=get_args(OnConflict),
        help="when something conflicts: change nothing (fail, the default), route the rest (skip), the rest and single "
        "hosts (hosts), or reach the subnet by other addresses (virtual)",
    )
    values("--host", "ADDRESS", "with --on-conflict hosts: route this address")
    group.add_argument(
        "--hosts-file",
        action="append",
        default=[],
        metavar="FILE",
        help="the same for a file's addresses, one a line, # begins a comment",
    )
    values("--virtual", "CIDR|service|pod", "reach this subnet by other addresses, conflict or not")


def names_a_cluster(arguments: argparse.Namespace) -> bool:
    """Whether the flags name subnets of a cluster."""
    return any(_words(arguments, flag) for flag, _, _ in CLUSTER)


def routing(
    arguments: argparse.Namespace,
    admin: Config = NOTHING,
    found: Sequence[Wanted] | None = None,
    seen: Iterable[tuple[Prefix, str]] = (),
) -> Request:
    """What the flags ask for; beneath them the file of whoever runs this; beneath that what the cluster's admin set.

    `found`: the cluster's subnets, where they are known from it: those of a kind that is given do not count. `seen`:
    addresses there, for --on-conflict hosts. UsageError when a value is malformed, when flags contradict each other, or
    when no subnet of a cluster is known or to be found.
    """
    merged = merge(_flags(arguments), load(), admin)
    wanted = [Wanted(one.value, kind, str(one.source)) for kind, one in _subnets(merged)]
    kinds = {one.kind for one in wanted}
    wanted += [one for one in found or () if one.kind not in kinds]
    if not wanted and found is None:
        raise UsageError(
            "the cluster's subnets are not known: give --service-cidr and/or --pod-cidr, "
            "for example --service-cidr 10.96.0.0/12"
        )
    also = [(one.value, str(one.source)) for one in merged.all(ALSO)]
    wanted += [Wanted(value, "also", source) for value, source in also if isinstance(value, Prefix)]
    return Request(
        tuple(wanted),
        Policy(
            allow=tuple(one.value for one in merged.all(ALLOW)),
            never=tuple((one.value, str(one.source)) for one in merged.all(NEVER)),
            on_conflict=merged.one(ON_CONFLICT).value,
            hosts=_hosts(arguments, merged.one(ON_CONFLICT), seen),
            virtual=_virtual(arguments, wanted),
            given=tuple(word for flag in GIVEN for value in _words(arguments, flag) for word in (flag, value)),
        ),
        tuple((value, source) for value, source in also if isinstance(value, str)),
    )


def _subnets(config: Config) -> Iterator[tuple[Kind, Value[Prefix]]]:
    """Of each kind the uppermost layer's: who gives some gives all."""
    for _, key, kind in CLUSTER:
        for one in config.all(key):
            yield kind, one


def _words(arguments: argparse.Namespace, flag: str) -> list[str]:
    """The values of a flag as they were typed."""
    return getattr(arguments, flag.removeprefix("--").replace("-", "_"))


def _read(arguments: argparse.Namespace, flag: str, read: Callable[[str], T]) -> Iterable[T]:
    """The values of a flag, each once; UsageError names the flag."""
    try:
        return dict.fromkeys(read(text.strip()) for word in _words(arguments, flag) for text in word.split(","))
    except UsageError as error:
        raise UsageError(f"{flag}: {error}") from None


def _flags(arguments: argparse.Namespace) -> Config:
    """The flags that are keys of the configuration too."""
    values = {key: tuple(Value(one, Source(flag)) for one in _read(arguments, flag, key.read)) for flag, key in KEYS}
    chosen: OnConflict | None = arguments.on_conflict
    return Config(values | ({ON_CONFLICT: (Value(chosen, Source("--on-conflict")),)} if chosen else {}))


# -- single hosts ------------------------------------------------------------------------------------------------------


def _hosts(
    arguments: argparse.Namespace, conflict: Value[OnConflict], seen: Iterable[tuple[Prefix, str]]
) -> tuple[tuple[Prefix, str], ...]:
    """The single hosts to route, each once, with where it is from; none unless conflicts lead to that.

    Those that are given come first; of those that were seen in the cluster as many as there is room for.
    """
    flags = [flag for flag in ("--host", "--hosts-file") if _words(arguments, flag)]
    if conflict.value != "hosts":
        if flags:
            raise UsageError(
                f"{' and '.join(flags)} would be for nothing, since on-conflict is {conflict.value} "
                f"({conflict.source}): give --on-conflict hosts, or leave the hosts out"
            )
        return ()
    found = dict[Prefix, str]()
    for prefix in _read(arguments, "--host", _host):
        found.setdefault(prefix, "--host")
    for file in _words(arguments, "--hosts-file"):
        for prefix, source in _hosts_of(file):
            found.setdefault(prefix, source)
    given = len(found)
    for prefix, source in seen:
        if len(found) < HOSTS:
            found.setdefault(prefix, source)
    if not found:
        what = "no address is in " + ", ".join(arguments.hosts_file) if flags else "none is given"
        raise UsageError(f"on-conflict is hosts ({conflict.source}), but {what}: give some with --host or --hosts-file")
    if given > HOSTS:
        raise UsageError(
            f"{given:,} hosts are given, and at most {HOSTS:,} can be routed one by one: give fewer, "
            "or allow a subnet with --allow-conflicting-subnets"
        )
    return tuple(found.items())


def _host(text: str) -> Prefix:
    """A single address that a service or pod could have."""
    from tpvpn.route.conflict import NEVER_WANTED

    prefix = subnet(text)
    if prefix.size > 1:
        raise UsageError(f"{text} is a subnet: give single addresses, {prefix.address(1)} for example")
    for never in NEVER_WANTED:
        if never.contains(prefix):
            raise UsageError(
                f"{text} is in {never}, which is loopback, link-local, multicast or unspecified and stays with the "
                "host: give the address of a service or pod"
            )
    return prefix


def _hosts_of(file: str) -> Iterator[tuple[Prefix, str]]:
    """The addresses in a file, each with its line."""
    try:
        with open(file, "rb") as opened:
            data = opened.read(FILE_LIMIT + 1)
    except (OSError, ValueError) as error:  # a NUL in the name is a ValueError
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"cannot read --hosts-file {file}: {reason}") from None
    if len(data) > FILE_LIMIT:
        raise UsageError(f"--hosts-file {file} is larger than 1 MiB: give at most {HOSTS:,} addresses")
    for number, line in enumerate(data.split(b"\n"), 1):
        # What is no UTF-8 is no address either, and shown with its bytes.
        text = line.partition(b"#")[0].decode(errors="backslashreplace").strip()
        if text:
            try:
                yield _host(text[:100]), f"{file} line {number}"
            except UsageError as error:
                raise UsageError(f"{file} line {number}: {error}") from None


# -- virtual subnets ---------------------------------------------------------------------------------------------------


def _virtual(arguments: argparse.Namespace, wanted: Iterable[Wanted]) -> tuple[Prefix | Literal["service", "pod"], ...]:
    """What is mapped in any case; UsageError when that is not among the wanted."""
    found = tuple(_read(arguments, "--virtual", _subnet_or_kind))
    there = {one.prefix: one.kind for one in wanted}
    for one in found:
        if isinstance(one, Prefix) and one not in there:
            wanted_are = ", ".join(map(str, there))
            raise UsageError(f"--virtual: {one} is none of the wanted subnets, which are {wanted_are}")
        if isinstance(one, str) and one not in there.values():
            raise UsageError(f"--virtual: no {one} subnet is wanted: give --{one}-cidr, or leave out --virtual {one}")
    return found


def _subnet_or_kind(text: str) -> Prefix | Literal["service", "pod"]:
    return text if text == "service" or text == "pod" else Prefix.parse(text)
