"""Reading nf_tables: the tables with chains that packets of ours pass, by netlink, and only what is used of them.

It decides nothing. Chains, rules and sets of a table are dumped; from the base chains on only what jumps lead to is
decoded, and only those sets are read that a decoded rule looks into. Chains at a device's own ingress or egress are
left out: the tunnel's device is too new to be in one. It needs CAP_NET_ADMIN. The standard library only.
"""

import errno
import struct
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Literal

from tpvpn.firewall.expressions import Attributes, Contents, contents, number, rule, text
from tpvpn.firewall.model import HOOKS, Chain, Hook, Rule, Table, VerdictMap
from tpvpn.netlink import NetlinkError, NetlinkSocket, attribute_text, parse_attributes

_NETLINK_NETFILTER = 12
_GETTABLE, _GETCHAIN, _GETRULE, _GETSET, _GETSETELEM = (10 << 8 | kind for kind in (1, 4, 7, 10, 13))
_FAMILIES: dict[int, Literal["ip", "ip6", "inet"]] = {1: "inet", 2: "ip", 10: "ip6"}
_DORMANT = 1
_TYPES = {"filter", "route"}
"""Of base chains; those of NAT see a connection's first packet, and are not for dropping."""
_PASSED = {"prerouting", "input", "output", "postrouting"}
_OURS = "tpvpn"


@dataclass(slots=True)
class _Table:
    """A table as it is read."""

    family: int
    name: str
    chains: dict[str, Chain] = field(default_factory=dict[str, Chain])
    rules: dict[str, list[Attributes]] = field(default_factory=lambda: defaultdict(list))
    sets: dict[str, Attributes] = field(default_factory=dict[str, Attributes])
    known: dict[str, Contents | None] = field(default_factory=dict[str, "Contents | None"])


def read_nftables() -> list[Table]:
    """The tables in the order in which they were made; none in a kernel without nf_tables.

    OSError EPERM without CAP_NET_ADMIN.
    """
    try:
        kernel = NetlinkSocket(_NETLINK_NETFILTER)
    except OSError as error:
        if error.errno == errno.EPROTONOSUPPORT:
            return []
        raise
    with closing(kernel):
        try:
            return [_read(kernel, table) for table in _tables(kernel)]
        except NetlinkError as error:
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):  # no such subsystem (net/netfilter/nfnetlink.c)
                return []
            raise


def _tables(kernel: NetlinkSocket) -> list[_Table]:
    """Those that have a base chain on the way of our packets."""
    tables: dict[tuple[int, str], _Table] = {}
    for family, fields in _dump(kernel, _GETTABLE, 0):
        name = text(fields, 1)
        if family in _FAMILIES and not number(fields, 2) & _DORMANT and not name.startswith(_OURS):
            tables[family, name] = _Table(family, name)
    for family, fields in _dump(kernel, _GETCHAIN, 0):
        table = tables.get((family, text(fields, 1)))
        if table is not None:
            chain = _chain(fields)
            table.chains[chain.name] = chain
    return [table for table in tables.values() if any(chain.hook for chain in table.chains.values())]


def _chain(fields: Attributes) -> Chain:
    name = text(fields, 3)
    if 4 not in fields or text(fields, 7) not in _TYPES:
        return Chain(name, ())
    hook = parse_attributes(fields[4])
    place = number(hook, 1)
    where: Hook | None = HOOKS[place] if place < len(HOOKS) and HOOKS[place] in _PASSED else None
    return Chain(name, (), where, struct.unpack("!i", hook[2])[0], drops=number(fields, 5, 1) == 0)


def _read(kernel: NetlinkSocket, table: _Table) -> Table:
    named = attribute_text(1, table.name)
    for _family, fields in _dump(kernel, _GETRULE, table.family, named):
        table.rules[text(fields, 2)].append(fields)
    for _family, fields in _dump(kernel, _GETSET, table.family, named):
        table.sets[text(fields, 2)] = fields

    def lookup(name: str) -> Contents | None:
        if name not in table.known:
            table.known[name] = _contents(kernel, table, name)
        return table.known[name]

    waiting = [chain.name for chain in table.chains.values() if chain.hook]
    reached: dict[str, Chain] = {}
    while waiting:
        name = waiting.pop()
        chain = table.chains.get(name)
        if chain is None or name in reached:
            continue
        rules = tuple(rule(fields, lookup) for fields in table.rules[name])
        reached[name] = Chain(name, rules, chain.hook, chain.priority, chain.drops)
        waiting += targets(rules)
    return Table("nft", _FAMILIES[table.family], table.name, reached)


def targets(rules: tuple[Rule, ...]) -> Iterator[str]:
    """The chains to which rules lead."""
    for each in rules:
        found = each.verdict
        verdicts = (*found.verdicts, found.default) if isinstance(found, VerdictMap) else (found,)
        yield from (verdict.chain for verdict in verdicts if verdict is not None and verdict.chain)


def _contents(kernel: NetlinkSocket, table: _Table, name: str) -> Contents | None:
    fields = table.sets.get(name)
    if fields is None:
        return None
    wanted = attribute_text(1, table.name) + attribute_text(2, name)
    try:
        return contents(fields, [fields for _family, fields in _dump(kernel, _GETSETELEM, table.family, wanted)])
    except (KeyError, ValueError, struct.error):  # of a kind that is not known here
        return None
    except NetlinkError as error:
        if error.errno == errno.ENOENT:  # it went since
            return None
        raise


def _dump(kernel: NetlinkSocket, kind: int, family: int, wanted: bytes = b"") -> Iterator[tuple[int, Attributes]]:
    """The objects of a kind, as family and attributes."""
    for message in kernel.dump(kind, struct.pack("!BBH", family, 0, 0) + wanted):
        yield message.payload[0], parse_attributes(message.payload[4:])
