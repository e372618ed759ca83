"""The plan in words: the JSON that other programs read, the text for a terminal, the one sentence of a refusal.

Pure: a `Plan` in, text or plain values out. It prints nothing, and knows no terminal beyond whether colour is wanted.
"""

import shlex
from collections import Counter
from collections.abc import Iterator
from typing import Any

from tpvpn.errors import ConflictError
from tpvpn.route.advice import hides
from tpvpn.route.fib import LOCAL_TABLE, MAIN_TABLE
from tpvpn.route.verdict import Conflict, Fix, Plan, Subnet

SCHEMA = "tpvpn.plan/1"
COLOURS = {"routed": 32, "virtual": 32, "partial": 33, "conflict": 31, "excluded": 2}
"""SGR codes (ECMA-48): green, yellow, red, faint."""
TABLE_NAMES = {MAIN_TABLE: "main", LOCAL_TABLE: "local", 253: "default"}
WIDTH = 88
SHOWN = 12
"""How many conflicts of one subnet, and how many prefixes of one list, the text shows; the JSON has all."""


def as_json(plan: Plan) -> dict[str, Any]:
    """The contract `tpvpn.plan/1`: strings, numbers, lists and dictionaries only."""
    return {
        "schema": SCHEMA,
        "ok": plan.ok,
        "subnets": [
            {
                "cidr": str(subnet.wanted.prefix),
                "kind": subnet.wanted.kind,
                "source": subnet.wanted.source,
                "verdict": subnet.verdict,
                "routes": list(map(str, subnet.routes)),
                "withheld": list(map(str, subnet.withheld)),
                "virtual": None if subnet.virtual is None else str(subnet.virtual),
                "conflicts": [
                    {
                        "route": str(conflict.route),
                        "device": conflict.device,
                        "owner": conflict.owner,
                        "gateway": conflict.gateway,
                        "table": conflict.table,
                        "relation": conflict.relation,
                        "allowed": conflict.allowed,
                    }
                    | ({"session": conflict.session} if conflict.session else {})
                    for conflict in subnet.conflicts
                ],
            }
            for subnet in plan.subnets
        ],
        "never_proxy": [
            {"cidr": str(never.prefix), "reason": never.reason, "route": never.route} for never in plan.never_proxy
        ],
        "warnings": list(plan.warnings),
        "fixes": [{"description": fix.description, "command": fix.command} for fix in plan.fixes],
    }


def as_text(plan: Plan, colour: bool = False) -> str:
    """The report for a person, at most 88 columns but for what must not be broken; ends with a newline."""
    lines = [summary(plan), ""]
    width = max((len(str(subnet.wanted.prefix)) for subnet in plan.subnets), default=0)
    for subnet in plan.subnets:
        lines += subnet_lines(subnet, width, colour)
    if plan.never_proxy:
        lines += ["", "Never proxied"]
        for never in plan.never_proxy:
            lines += wrap(f"{never.prefix} ({never.reason}) goes by: {never.route}", "  ")
    if plan.warnings:
        lines += ["", "Warnings"]
        for warning in plan.warnings:
            lines += wrap(warning, "  - ")
    for fix in plan.fixes:
        lines += [
            "",
            *wrap(fix.description[0].upper() + fix.description[1:] + ":", ""),
            *command_lines(pasteable(fix, plan)),
        ]
    return "\n".join(lines) + "\n"


def refusal(plan: Plan) -> ConflictError:
    """The error with which `connect` refuses a plan that is not ok: every conflicting subnet, why, and the way out."""
    reasons = [
        f"{subnet.wanted.prefix} ({subnet.wanted.kind}) with " + ", ".join(shorten([route_of(c) for c in open_ones]))
        for subnet in plan.subnets
        if subnet.verdict == "conflict"
        for open_ones in [[conflict for conflict in subnet.conflicts if not conflict.allowed]]
    ]
    way_out = f"; allow it with `{pasteable(plan.fixes[0], plan)}`, or see `tpvpn plan`" if plan.fixes else ""
    text = f"{'; '.join(reasons)}: mapping this could make hosts there unreachable{way_out}"
    return ConflictError(text, as_text(plan))


def summary(plan: Plan) -> str:
    """The first line: what connect would do."""
    total = f"{len(plan.subnets)} subnet{'s' if len(plan.subnets) > 1 else ''}"
    count = Counter(subnet.verdict for subnet in plan.subnets)
    if not plan.ok:
        return f"connect would refuse: {count['conflict']} of {total} in conflict with private routes."
    return f"connect would go ahead: of {total}, {counts(plan)}."


def counts(plan: Plan) -> str:
    """How many subnets have which verdict: "2 routed, 1 excluded"."""
    count = Counter(subnet.verdict for subnet in plan.subnets)
    return ", ".join(f"{count[verdict]} {verdict}" for verdict in COLOURS if count[verdict])


def painted(text: str, colour: int) -> str:
    """The text in a colour, an SGR code, and then in that of before."""
    return f"\x1b[{colour}m{text}\x1b[0m"


def subnet_lines(subnet: Subnet, width: int, colour: bool) -> Iterator[str]:
    """One wanted subnet: verdict, routes, what is withheld, and every conflict with what allowing it would hide."""
    verdict = f"{subnet.verdict:<8}"
    if colour:
        verdict = painted(verdict, COLOURS[subnet.verdict])
    prefix = subnet.wanted.prefix
    yield f"{prefix!s:<{width}}  {verdict}  {subnet.wanted.kind}, from {subnet.wanted.source}"
    if subnet.virtual is not None:
        yield f"    virtual   {subnet.virtual}, address by address; {prefix} itself stays as it is"
    elif subnet.routes and subnet.routes != (prefix,):
        yield from wrap(", ".join(shorten(list(map(str, subnet.routes)))), "    routed    ")
    if subnet.virtual is None and subnet.withheld and subnet.withheld != (prefix,):
        yield from wrap(", ".join(shorten(list(map(str, subnet.withheld)))), "    withheld  ")
    for conflict in subnet.conflicts[:SHOWN]:
        state = "allowed" if conflict.allowed else "conflict"
        yield from wrap(f"{RELATIONS[conflict.relation]} {route_of(conflict)}", f"    {state:<8}  ")
        yield from wrap(hides(conflict, subnet), " " * 14)
    if len(subnet.conflicts) > SHOWN:
        yield f"    and {len(subnet.conflicts) - SHOWN} more, see --output json"


RELATIONS = {"covers": "inside", "inside": "holds", "equal": "equals"}
"""How the subnet lies to the route: the other way round than the contract says how the route lies to the subnet."""


def route_of(conflict: Conflict) -> str:
    """A private route with its device, owner, gateway and table, or an IPsec policy."""
    if conflict.table == 0:
        return f"the IPsec policy for {conflict.route} ({conflict.whose})"
    gateway = f" via {conflict.gateway}" if conflict.gateway else ""
    table = TABLE_NAMES.get(conflict.table, str(conflict.table))
    return f"{conflict.route}{gateway} dev {conflict.device or '?'} ({conflict.whose}, table {table})"


def shorten(items: list[str]) -> list[str]:
    """A list that fits a screen."""
    return items if len(items) <= SHOWN else [*items[:SHOWN], f"and {len(items) - SHOWN} more"]


def wrap(text: str, label: str) -> list[str]:
    """A paragraph behind a label, broken between words only."""
    lines, line = list[str](), label
    for word in text.split():
        if len(line) + 1 + len(word) > WIDTH and line.strip():
            lines.append(line)
            line = " " * len(label)
        line += word if len(line) == len(label) else f" {word}"
    return [*lines, line]


def pasteable(fix: Fix, plan: Plan) -> str:
    """The command with the words that the user gave, where it is `tpvpn connect` again."""
    return f"{fix.command} {shlex.join(plan.given)}" if plan.given and " connect " in fix.command else fix.command


def command_lines(command: str) -> list[str]:
    """A command to paste, broken before its flags by backslashes when it is long."""
    head, *flags = command.split(" --")
    parts = [head, *(f"--{flag}" for flag in flags)]
    lines, line = list[str](), "  "
    for part in parts:
        if line.strip() and len(line) + len(part) + 3 > WIDTH:
            lines.append(f"{line} \\")
            line = "    "
        line += part if not line.strip() else f" {part}"
    return [*lines, line]


def bits(rate: float) -> str:
    """A rate of bytes a second in bits, three digits: "12.3 Mb/s"."""
    return _scaled(8 * rate, "b/s")


def size(count: float) -> str:
    """Bytes: "1.20 GB"."""
    return _scaled(count, "B")


def _scaled(value: float, unit: str) -> str:
    prefixes = iter(("", "k", "M", "G", "T"))
    prefix = next(prefixes)
    while value >= 999.5 and prefix != "T":
        value, prefix = value / 1000, next(prefixes)
    digits = 0 if not prefix or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {prefix}{unit}"
