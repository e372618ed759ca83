"""A `View` from what `ip rule`, `ip route show table all`, `ip link` and `ip addr` print, and case files of such text.

A case file has sections: [links] [addresses] [rules] [rules6] [routes] [routes6] (each pasted from iproute2; without
[rules] the kernel's three), [ipsec] (`src … dst …` lines of outbound `ip xfrm policy`), [resolvers] (addresses),
[command] (flags of `tpvpn plan`) and [expect] (the plan as `render()` writes it; a line `warning WORDS` holds when some
warning has all these words).
"""

import argparse
from dataclasses import replace
from pathlib import Path

from views import default_rules

from tpvpn.cli.routing import add_routing_flags, routing
from tpvpn.config import Config
from tpvpn.route.fib import Address, IpsecPolicy, Link, Nexthop, Route, Rule, View
from tpvpn.route.operations import Operation, operations
from tpvpn.route.plan import make_plan
from tpvpn.route.prefix import DEFAULT, Prefix
from tpvpn.route.verdict import Plan

TABLES = {"main": 254, "local": 255, "default": 253}
PROTOCOLS = {"kernel": 2, "boot": 3, "static": 4, "ra": 9, "bird": 12, "dhcp": 16, "bgp": 186, "tpvpn": 116}
SCOPES = {"global": 0, "link": 253, "host": 254}
KINDS = ("local", "broadcast", "anycast", "multicast", "blackhole", "unreachable", "prohibit", "throw")
TABLE, DEVICE = 0x74707600, "tpvpn0"


def number(word: str, names: dict[str, int]) -> int:
    return names[word] if word in names else int(word, 0)


def read_prefix(word: str, version: int) -> Prefix:
    return DEFAULT[version] if word in ("default", "all") else Prefix.parse(word)


def value(words: list[str], key: str) -> str | None:
    return words[words.index(key) + 1] if key in words else None


def read_rule(line: str, version: int) -> Rule:
    """`32765: not from all fwmark 0xca6c lookup 51820`, and the like."""
    preference, _, rest = line.partition(":")
    words = rest.split()
    mark, _, mask = (value(words, "fwmark") or "").partition("/")
    source, to, uids = value(words, "from"), value(words, "to"), value(words, "uidrange")
    table, suppress, goto = value(words, "lookup"), value(words, "suppress_prefixlength"), value(words, "goto")
    rejects = [word for word in words if word in ("blackhole", "unreachable", "prohibit", "nop")]
    low, _, high = (uids or "").partition("-")
    return Rule(
        4 if version == 4 else 6,
        int(preference),
        "lookup" if table else "goto" if goto else rejects[0],  # type: ignore[arg-type]
        number(table, TABLES) if table else 0,
        source=None if source in (None, "all") else read_prefix(source, version),
        destination=None if to is None else read_prefix(to, version),
        iif=value(words, "iif"),
        oif=value(words, "oif"),
        mark=int(mark, 0) if mark else None,
        mark_mask=int(mask, 0) if mask else 0xFFFFFFFF,
        uids=(int(low), int(high)) if uids else None,
        protocols_ports=any(word in words for word in ("ipproto", "sport", "dport", "tos")),
        inverted="not" in words,
        suppress_prefixlength=int(suppress) if suppress else None,
        goto=int(goto) if goto else None,
        protocol=number(value(words, "proto") or "0", PROTOCOLS),
    )


def read_route(line: str, version: int) -> Route:
    """`10.0.0.0/8 via 10.8.0.1 dev tun0 proto static metric 50`, and the like; nexthops may follow on the same line."""
    head, *more = line.split(" nexthop ")
    words = head.split()
    kind = words.pop(0) if words[0] in KINDS else "unicast"
    hops = [hop.split() for hop in more] or ([words] if "dev" in words or "via" in words else [])
    return Route(
        read_prefix(words[0], version),
        number(value(words, "table") or "main", TABLES),
        kind,  # type: ignore[arg-type]
        tuple(Nexthop(value(hop, "dev"), value(hop, "via")) for hop in hops),
        metric=int(value(words, "metric") or 0),
        protocol=number(value(words, "proto") or "boot", PROTOCOLS),
        scope=number(value(words, "scope") or "global", SCOPES),
        source=value(words, "src"),
    )


def read_link(line: str) -> Link:
    """`3: tun0: <POINTOPOINT,UP,LOWER_UP> mtu 1500`, with ` kind tun` appended where it matters."""
    index, name, rest = line.split(":", 2)
    flags = rest[rest.index("<") + 1 : rest.index(">")].split(",")
    up, carrier = "UP" in flags, "LOWER_UP" in flags
    kind = value(rest.split(), "kind")
    return Link(int(index), name.strip().partition("@")[0], kind, up, carrier, loopback="LOOPBACK" in flags)


def read_address(line: str) -> Address:
    """`2: eth0    inet 192.168.1.5/24 brd …`."""
    words = line.split()
    text, _, length = words[3].partition("/")
    host = Prefix.host(text)
    return Address(words[1], text, Prefix.around(host.version, host.network, int(length)))


def read_policy(line: str) -> IpsecPolicy:
    """`src 10.9.0.2/32 dst 10.0.0.0/8`."""
    words = line.split()
    return IpsecPolicy(Prefix.parse(value(words, "src") or ""), Prefix.parse(value(words, "dst") or ""))


def sections(text: str) -> dict[str, list[str]]:
    """The lines of each section; comments and blank lines left out, indented `nexthop` lines joined to theirs."""
    found, lines = dict[str, list[str]](), list[str]()
    for line in text.splitlines():
        if line.startswith("[") and line.endswith("]"):
            lines = found.setdefault(line[1:-1], [])
        elif line.strip().startswith("nexthop "):
            lines[-1] += f" {line.strip()}"
        elif line.strip() and not line.startswith("#"):
            lines.append(line.rstrip())
    return found


def read_view(case: dict[str, list[str]]) -> View:
    rules = [read_rule(line, 4) for line in case.get("rules", [])]
    rules6 = [read_rule(line, 6) for line in case.get("rules6", [])]
    for version, mine in ((4, rules), (6, rules6)):
        mine += [] if mine else [rule for rule in default_rules() if rule.version == version]
    routes = [read_route(line, 6 if ":" in line.split(" dev ")[0] else 4) for line in case.get("routes", [])]
    routes += [read_route(line, 6) for line in case.get("routes6", [])]
    return View(
        rules=(*rules, *rules6),
        routes=tuple(routes),
        links=tuple(map(read_link, case.get("links", []))),
        addresses=tuple(map(read_address, case.get("addresses", []))),
        policies=tuple(map(read_policy, case.get("ipsec", []))),
        resolvers=tuple(case.get("resolvers", [])),
        ipv6="off" not in case.get("ipv6", []),
    )


def read_case(path: Path) -> tuple[View, str, list[str]]:
    """The view, the command line and the expected lines of a case file."""
    case = sections(path.read_text())
    return read_view(case), " ".join(case["command"]), case["expect"]


def plan_of(view: View, command: str) -> Plan:
    parser = argparse.ArgumentParser()
    add_routing_flags(parser)
    request = routing(parser.parse_args(command.split()), Config())
    return make_plan(view, request.wanted, request.policy, table=TABLE)


def render(plan: Plan, view: View) -> list[str]:
    """The plan, line by line, but for warnings and fixes."""
    lines = ["ok" if plan.ok else "refused"]
    for subnet in plan.subnets:
        parts = [str(subnet.wanted.prefix), subnet.wanted.kind, subnet.verdict]
        parts += ["routes", *map(str, subnet.routes)] if subnet.routes else []
        parts += ["withheld", *map(str, subnet.withheld)] if subnet.withheld else []
        parts += ["virtual", str(subnet.virtual)] if subnet.virtual else []
        lines.append(" ".join(parts))
        for one in subnet.conflicts:
            state = "allowed" if one.allowed else "conflict"
            lines.append(f"  {state} {one.relation} {one.route} dev {one.device} {one.owner} table {one.table}")
    lines += [f"never {never.prefix} by {never.route}" for never in plan.never_proxy]
    return lines + [render_operation(step) for step in operations(plan, view, TABLE, DEVICE)]


def render_operation(step: Operation) -> str:
    sign, target = ("+" if step.verb == "add" else "-"), step.target
    if isinstance(target, Rule):
        return f"{sign} rule{target.version} {target.preference}"
    return f"{sign} {target}"


def apply(view: View, steps: list[Operation]) -> View:
    """The view after the kernel did these: a rule goes behind its equals; what is there cannot be added."""
    for step in steps:
        field = "rules" if isinstance(step.target, Rule) else "routes"
        items: list[Route | Rule] = list(getattr(view, field))
        if step.verb == "remove":
            items.remove(step.target)
        elif isinstance(step.target, Rule):
            assert step.target not in items
            mine = step.target
            order = (mine.version, mine.preference)
            place = [i for i, r in enumerate(items) if isinstance(r, Rule) and (r.version, r.preference) <= order]
            items.insert(max(place, default=-1) + 1, mine)
        else:
            new = step.target
            key = (new.prefix, new.table, new.metric)
            clash = [r for r in items if isinstance(r, Route) and (r.prefix, r.table, r.metric) == key]
            assert not clash, "EEXIST"
            items.append(new)
        view = replace(view, **{field: tuple(items)})
    return view
