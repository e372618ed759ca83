"""Which rules stand in the way of the tunnel's packets, each said in one sentence with the command that shows it.

Pure: a firewall in, sentences out. Packets to a subnet are told of when they surely or perhaps end somewhere; answers
only when they surely do, since what lets answers in is written in many ways.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tpvpn.firewall.model import Firewall, Rule, Table
from tpvpn.firewall.packet import Direction, Packet
from tpvpn.firewall.walk import Drop, drops
from tpvpn.route.prefix import Prefix

_NO_DEVICE = 0x7FFFFFFF
"""The index of a device that is not there yet: no rule can name it."""
_NAMED = 4
"""Rules of one chain, or reasons, that are named one by one."""


class _Place(NamedTuple):
    """What one sentence is about: a rule or policy that surely stops packets, or a chain that perhaps does."""

    direction: Direction
    program: str
    family: str
    table: str
    chain: str
    handle: int | None
    sure: bool


def obstacles(firewall: Firewall, device: str, addresses: Sequence[str], prefixes: Iterable[Prefix]) -> list[str]:
    """What stops packets between the device, whose addresses these are, and the subnets; a sentence for each.

    The device need not be there yet, and addresses that are not known may be left out.
    """
    own = {address.version: address for address in map(Prefix.host, addresses)}
    index = (firewall.devices or {}).get(device, _NO_DEVICE)
    subnets = tuple(prefixes)
    directions: tuple[Direction, Direction] = ("out", "in")
    found: dict[_Place, list[tuple[Prefix, Drop]]] = {}
    for direction in directions:
        for subnet in subnets:
            packet = Packet(direction, device, index, own.get(subnet.version), subnet)
            for drop in drops(firewall, packet):
                if direction == "out" or not drop.doubts:
                    found.setdefault(_place(direction, drop), []).append((subnet, drop))
    return [_sentence(device, place, hits) for place, hits in found.items()]


def _place(direction: Direction, drop: Drop) -> _Place:
    table, rule, sure = drop.table, drop.rule, not drop.doubts
    handle = rule.handle if rule and sure else None
    return _Place(direction, table.program, table.family, table.name, drop.chain.name, handle, sure)


def _sentence(device: str, place: _Place, hits: list[tuple[Prefix, Drop]]) -> str:
    drop = hits[0][1]
    table = drop.table
    subnets = _listed(dict.fromkeys(str(subnet) for subnet, _drop in hits))
    packets = f"packets to {subnets}" if place.direction == "out" else f"answers from {subnets}"
    what = "rejected" if all(hit.rejected for _subnet, hit in hits) else "dropped"
    rules = list(dict.fromkeys("its policy" if hit.rule is None else _named(table, hit.rule) for _subnet, hit in hits))
    by = f"chain {place.chain} of {_program(table)} table {_table(table)} ({_listed(rules)})"
    show = f"`{_command(table, place.chain)}` shows it"
    if place.sure:
        return f"{packets} are {what} by {by}: let device {device} pass there; {show}"
    doubts = _listed(sorted(frozenset[str]().union(*(hit.doubts for _subnet, hit in hits))))
    return f"{packets} may be {what} by {by}, depending on {doubts}: see that device {device} may pass there; {show}"


def _named(table: Table, rule: Rule) -> str:
    number = f"handle {rule.handle}" if table.program == "nft" else f"rule {rule.handle}"
    comment = "".join(letter for letter in rule.comment if letter.isprintable())
    return f'{number} "{comment}"' if comment else number


def _listed(words: Iterable[str]) -> str:
    """ "a", "a and b", "a, b and c", "a, b, c, d and 9 more"."""
    all_words = list(words)
    if len(all_words) > _NAMED + 1:
        all_words[_NAMED:] = [f"{len(all_words) - _NAMED} more"]
    *first, last = all_words
    return f"{', '.join(first)} and {last}" if first else last


def _program(table: Table) -> str:
    return "nft" if table.program == "nft" else table.program.removesuffix("-legacy")


def _table(table: Table) -> str:
    return f"{table.family} {table.name}" if table.program == "nft" else table.name


def _command(table: Table, chain: str) -> str:
    if table.program == "nft":
        return f"nft -a list chain {table.family} {table.name} {chain}"
    return f"{table.program} -t {table.name} -nvL {chain} --line-numbers"
