"""What the user's process may ask of the root helper, as JSON messages, and what the helper refuses.

Pure: bytes to values and back. One message of the SOCK_SEQPACKET socketpair is one request or one reply; every request
has one reply, in order. The helper trusts nothing of it: each field has its type and range, and an operation must
concern the session's own table, device and protocol number, so that whoever may start the helper gains a tunnel of
their own and nothing more. Operations have the same JSON in the journal.

    {"request": "claim", "name": …}                  {"device": …, "table": …, "directory": …}
    {"request": "open_tun", "mtu": …, "addresses": […], "offload": …, "txqueuelen": …}
                                                     {"device": …, "offloads": …, "addresses": […]}
                                                     and the descriptors of its two queues
    {"request": "guard"}                             {}
    {"request": "apply", "operations": […]}
                                                     {}
    {"request": "look", "prefixes": […]}             what `privileged.encode` says
    {"request": "watch"}                             {} and, where the kernel has IPsec, a descriptor
    {"request": "reset", "withdrawn": […], "routed": […]}
                                                     {"destroyed": …}
    {"request": "reset_all"}                         {"destroyed": …}
    {"request": "open_dns"}                          {} and the descriptors of sockets of port 53
    {"request": "announce", "suffixes": […]}         {}
    {"request": "set_resolved", "search": […], "domains": […]}
                                                     {"because": …}: null when done
    {"request": "take_file", "search": […]}          {"path": …, "how": …, "generation": …}
    {"request": "cleanup"}                           {"removed": […]}
    anything that is not done                        {"error": "PrivilegeError", "message": …}
"""

import ipaddress
import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, cast, get_args

from tpvpn.errors import PrivilegeError, TpvpnError, UsageError
from tpvpn.helper.decoders import Decoder, integer, many, one_of, optional, record, text
from tpvpn.route.fib import TPVPN_PROTOCOL, Nexthop, Route, RouteKind, Rule, RuleAction
from tpvpn.route.operations import Operation
from tpvpn.route.prefix import Prefix

MESSAGE_LIMIT = 1 << 16
"""Bytes of the longest request or reply."""
OPERATIONS_LIMIT = 100
"""Operations in one request: they fit the limit above however long their fields."""
PREFIXES_LIMIT = 256
"""Prefixes in each list of one request, likewise."""
DOMAINS_LIMIT, SEARCH_LIMIT = 200, 6
"""Domains that systemd-resolved is told of, which takes 256 (LINK_SEARCH_DOMAINS_MAX), and those that are
searched; all fit one request."""
REMOVED_LIMIT = 400
"""Objects that the answer to a cleanup names."""


class RequestError(TpvpnError):
    """A request that is malformed, out of place, or not about our own objects. Nothing was done."""


_ERRORS = {kind.__name__: kind for kind in (RequestError, UsageError, PrivilegeError, TpvpnError)}
"""What a reply may report; a subclass is reported as what it is one of."""


@dataclass(frozen=True, slots=True)
class Claim:
    """Become the session of this name in this network namespace."""

    name: str


@dataclass(frozen=True, slots=True)
class OpenTun:
    """Open the session's TUN, bring it up with these addresses (a /32, a /128 or both)."""

    mtu: int
    addresses: tuple[str, ...]
    offload: bool
    txqueuelen: int


@dataclass(frozen=True, slots=True)
class Guard:
    """Let no new flow in from the TUN, masquerade what is forwarded to it."""


@dataclass(frozen=True, slots=True)
class Apply:
    """Do these operations, in this order."""

    operations: tuple[Operation, ...]


@dataclass(frozen=True, slots=True)
class Look:
    """Tell what only root sees and these prefixes meet."""

    prefixes: tuple[Prefix, ...]


@dataclass(frozen=True, slots=True)
class Watch:
    """Pass a socket that hears of changed IPsec policies."""


@dataclass(frozen=True, slots=True)
class Reset:
    """End the connections that have lost their way since these prefixes left the tunnel, or came to it."""

    withdrawn: tuple[Prefix, ...]
    routed: tuple[Prefix, ...]


@dataclass(frozen=True, slots=True)
class ResetAll:
    """End all connections of the session's own addresses: their other ends know them no more."""


@dataclass(frozen=True, slots=True)
class OpenDns:
    """Pass sockets at which programs of this host may ask for names, on the session's own addresses."""


@dataclass(frozen=True, slots=True)
class Announce:
    """Let other sessions of this host know below which suffixes this one has names, before they do."""

    suffixes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SetResolved:
    """Have systemd-resolved ask us for names below these."""

    search: tuple[str, ...]
    domains: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TakeFile:
    """Have /etc/resolv.conf name us, and search these domains too."""

    search: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Cleanup:
    """Undo what dead sessions of this network namespace left."""


Names = OpenDns | Announce | SetResolved | TakeFile
Request = Claim | OpenTun | Guard | Apply | Look | Watch | Reset | ResetAll | Names | Cleanup


def _prefix(value: Any) -> Prefix:
    return Prefix.parse(text(50)(value))


def _address(value: Any) -> str:
    return str(ipaddress.ip_address(text(45)(value)))


def _own_address(value: Any) -> str:
    ip = ipaddress.ip_address(_address(value))
    if ip.is_loopback or ip.is_multicast or ip.is_unspecified or ip.is_link_local:
        raise ValueError(f"{ip} is no address for a tunnel")
    return str(ip)


def is_domain(name: str) -> bool:
    """Whether it is a name as resolv.conf and D-Bus take it (RFC 1035 section 2.3.4): no space, no line's end."""
    return bool(re.fullmatch(r"(?:[a-z0-9_-]{1,63}\.)*[a-z0-9_-]{1,63}", name))


def _domain(value: Any) -> str:
    name: str = text(253)(value)
    if not is_domain(name):
        raise ValueError(f"{name!r} is no domain")
    return name


def _pair(value: Any) -> tuple[int, int]:
    low, high = many(_U32, 2)(value)
    return low, high


_BYTE, _U32 = integer(0, 0xFF), integer(0, 0xFFFFFFFF)
_DEVICE = text(15)

NEXTHOP_FIELDS: Mapping[str, Decoder] = {
    "device": optional(_DEVICE),
    "gateway": optional(_address),
    "weight": integer(1, 256),
}
ROUTE_FIELDS: Mapping[str, Decoder] = {
    "prefix": _prefix,
    "table": _U32,
    "kind": one_of(*get_args(RouteKind)),
    "nexthops": many(record(Nexthop, NEXTHOP_FIELDS), 16),
    "metric": _U32,
    "protocol": _BYTE,
    "scope": _BYTE,
    "source": optional(_address),
}
RULE_FIELDS: Mapping[str, Decoder] = {
    "version": one_of(4, 6),
    "preference": _U32,
    "action": one_of(*get_args(RuleAction)),
    "table": _U32,
    "source": optional(_prefix),
    "destination": optional(_prefix),
    "iif": optional(_DEVICE),
    "oif": optional(_DEVICE),
    "mark": optional(_U32),
    "mark_mask": _U32,
    "uids": optional(_pair),
    "protocols_ports": one_of(False, True),
    "inverted": one_of(False, True),
    "suppress_prefixlength": optional(integer(0, 128)),
    "goto": optional(_U32),
    "protocol": _BYTE,
}


def _target(route: Route | None = None, rule: Rule | None = None) -> Route | Rule:
    if route is None and rule is not None:
        return rule
    if route is not None and rule is None:
        return route
    raise ValueError("an operation concerns one route or one rule")


def _operation(value: Any) -> Operation:
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is no operation")
    given = dict(cast(dict[str, Any], value))
    verb = one_of("add", "remove")(given.pop("verb", None))
    target = record(_target, {"route": record(Route, ROUTE_FIELDS), "rule": record(Rule, RULE_FIELDS)})
    return Operation(verb, target(given))


_OPERATIONS = many(_operation, OPERATIONS_LIMIT)
_PREFIXES = many(_prefix, PREFIXES_LIMIT)
_SEARCH = many(_domain, SEARCH_LIMIT)
_REQUESTS: Mapping[str, tuple[type[Request], Decoder]] = {
    "claim": (Claim, record(Claim, {"name": text(64)})),
    "open_tun": (
        OpenTun,
        record(
            OpenTun,
            {
                "mtu": integer(68, 65535),
                "addresses": many(_own_address, 2),
                "offload": one_of(False, True),
                "txqueuelen": integer(1, 100_000),
            },
        ),
    ),
    "guard": (Guard, record(Guard, {})),
    "apply": (Apply, record(Apply, {"operations": _OPERATIONS})),
    "look": (Look, record(Look, {"prefixes": _PREFIXES})),
    "watch": (Watch, record(Watch, {})),
    "reset": (Reset, record(Reset, {"withdrawn": _PREFIXES, "routed": _PREFIXES})),
    "reset_all": (ResetAll, record(ResetAll, {})),
    "open_dns": (OpenDns, record(OpenDns, {})),
    "announce": (Announce, record(Announce, {"suffixes": many(_domain, DOMAINS_LIMIT)})),
    "set_resolved": (SetResolved, record(SetResolved, {"search": _SEARCH, "domains": many(_domain, DOMAINS_LIMIT)})),
    "take_file": (TakeFile, record(TakeFile, {"search": _SEARCH})),
    "cleanup": (Cleanup, record(Cleanup, {})),
}
_NAMES = {kind: name for name, (kind, _) in _REQUESTS.items()}


def _plain(value: Any) -> Any:
    """A value as JSON holds it; of records the fields that are not at their default."""
    if isinstance(value, Prefix):
        return str(value)
    if isinstance(value, Operation):
        return encode_operation(value)
    if isinstance(value, tuple):
        return [_plain(entry) for entry in cast(tuple[Any, ...], value)]
    if isinstance(value, Nexthop | Route | Rule):
        return {
            field.name: _plain(getattr(value, field.name))
            for field in fields(value)
            if field.default is MISSING or getattr(value, field.name) != field.default
        }
    return value


def encode_operation(operation: Operation) -> dict[str, Any]:
    """The operation as JSON: {"verb": "add", "route": {"prefix": "10.0.0.0/8", …}}, or "rule"."""
    kind = "route" if isinstance(operation.target, Route) else "rule"
    return {"verb": operation.verb, kind: _plain(operation.target)}


def decode_operation(value: object) -> Operation:
    """The inverse of `encode_operation`. RequestError when it is none."""
    try:
        return _operation(value)
    except (ValueError, UsageError) as error:
        raise RequestError(f"not an operation: {error}") from error


def pack_request(request: Request) -> bytes:
    """One message of the socketpair."""
    body = {field.name: _plain(getattr(request, field.name)) for field in fields(request)}
    return json.dumps({"request": _NAMES[type(request)]} | body).encode()


def parse_request(data: bytes) -> Request:
    """The request in a message. RequestError when it is malformed in any way."""
    try:
        given: Any = json.loads(data)
        if not isinstance(given, dict):
            raise ValueError("it is no JSON object")
        body = dict(cast(dict[str, Any], given))
        name = one_of(*_REQUESTS)(body.pop("request", None))
        return _REQUESTS[name][1](body)
    except (ValueError, UsageError, RecursionError) as error:
        raise RequestError(f"malformed request: {error}") from error


def pack_reply(values: Mapping[str, object]) -> bytes:
    """The reply to a request that was done."""
    return json.dumps(values).encode()


def pack_error(error: TpvpnError) -> bytes:
    """The reply to a request that was not."""
    kind = next(kind.__name__ for kind in type(error).__mro__ if kind.__name__ in _ERRORS)
    return json.dumps({"error": kind, "message": str(error)}).encode()


def parse_reply(data: bytes) -> dict[str, Any]:
    """The values of a reply; the error that it reports is raised, with its exit code."""
    values: dict[str, Any] = json.loads(data)
    if "error" not in values:
        return values
    raise _ERRORS[values["error"]](values["message"])


_FORBIDDEN = [Prefix.parse(text) for text in ("127.0.0.0/8", "224.0.0.0/4", "::1/128", "ff00::/8")]


def check(operation: Operation, device: str, table: int) -> None:
    """RequestError unless the operation concerns this session's own device and table."""
    target = operation.target
    if target.protocol != TPVPN_PROTOCOL or target.table != table:
        raise RequestError(f"{describe(target)} is not of table {table} with protocol {TPVPN_PROTOCOL}")
    if isinstance(target, Rule):
        _check_rule(target)
    else:
        _check_route(target, device)


def _check_rule(rule: Rule) -> None:
    plain = rule.suppress_prefixlength is None and rule.goto is None and not rule.protocols_ports
    if rule.action != "lookup" or not plain:
        raise RequestError(f"{describe(rule)} does more than look up our table")


def _check_route(route: Route, device: str) -> None:
    ways_out = {"unicast": (Nexthop(device),), "throw": ()}
    if route.kind not in ways_out or route.nexthops != ways_out[route.kind]:
        raise RequestError(f"{describe(route)} is neither a throw route nor one to {device}")
    check_prefix(route.prefix)


def check_prefix(prefix: Prefix) -> None:
    """RequestError when no tunnel may have the prefix."""
    if prefix.is_default or any(prefix.overlaps(forbidden) for forbidden in _FORBIDDEN):
        raise RequestError(f"{prefix} touches the default route, loopback or multicast")


def describe(target: Route | Rule) -> str:
    """The object in words, for errors: "route 10.130.0.0/16 dev tpvpn0 table 29808"."""
    if isinstance(target, Rule):
        return f"IPv{target.version} rule {target.preference} lookup {target.table}"
    kind = "" if target.kind == "unicast" else f"{target.kind} "
    device = f" dev {target.device}" if target.device else ""
    return f"route {kind}{target.prefix}{device} table {target.table}"
