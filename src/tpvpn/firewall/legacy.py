"""The tables of iptables-legacy: a blob of entries, as getsockopt hands it out, into the model.

Pure: bytes in, a table out. An entry (struct ipt_entry, ip6t_entry) is the addresses, devices and protocol it asks for,
then matches, then a target; a jump is the offset of an entry, a chain of a user's begins with an ERROR target that
holds its name.
"""

import struct
from collections.abc import Iterator
from typing import Literal, NamedTuple

from tpvpn.firewall import xtables
from tpvpn.firewall.model import (
    HOOKS,
    IIFNAME,
    L4PROTO,
    OIFNAME,
    Chain,
    Condition,
    Effect,
    Field,
    Hook,
    Mask,
    Rule,
    Table,
    Verdict,
    equals,
    plain,
)

PRIORITIES = {"raw": -300, "mangle": -150, "filter": 0, "security": 50}
"""The tables in which packets are dropped, with the priority of their chains (enum nf_ip_hook_priorities)."""
NO_HOOK = 0xFFFFFFFF

_INVERT_IIF, _INVERT_OIF, _INVERT_SOURCE, _INVERT_DESTINATION, _INVERT_FRAGMENT, _INVERT_PROTOCOL = (
    0x01, 0x02, 0x08, 0x10, 0x20, 0x40,
)  # fmt: skip
_RETURN = -5
_STANDARD = {-1: Verdict("drop"), -2: Verdict("accept"), -4: Verdict("queue"), _RETURN: Verdict("return")}
_SIZED = struct.Struct("=H29sB")
"""Head of struct xt_entry_match and xt_entry_target: size, name, revision."""


class _Layout(NamedTuple):
    """Where an entry of a family has what."""

    width: int
    """Of an address."""
    addresses: tuple[int, int]
    """Offsets of source and destination in the packet's header."""
    protocol: int
    flags: int
    inverted: int
    offsets: int
    """Of the u16 pair: where the target begins, where the next entry does."""
    size: int
    goto: int


_LAYOUTS = {
    "ip": _Layout(4, (12, 16), 80, 82, 83, 88, 112, 0x02),
    "ip6": _Layout(16, (8, 24), 128, 131, 132, 140, 168, 0x04),
}
_FLAG_FRAGMENT = 0x01


class Blob(NamedTuple):
    """A table as the kernel hands it out; for each hook the offset of its first entry and of its policy."""

    name: str
    entries: bytes
    begins: tuple[int, ...]
    policies: tuple[int, ...]


class _Entry(NamedTuple):
    """An entry taken apart: the name, revision and data of its target, and where the next one is."""

    steps: list[Condition | Effect]
    comment: str
    goto: bool
    target: str
    revision: int
    data: bytes
    next: int


def table(family: Literal["ip", "ip6"], blob: Blob) -> Table:
    """The table with all its chains."""
    entries = dict(_entries(_LAYOUTS[family], blob.entries))
    hooks: dict[int, Hook] = {begin: hook for hook, begin in zip(HOOKS, blob.begins, strict=True) if begin != NO_HOOK}
    # Chains by the offset of their first rule: what a jump holds. The last ERROR ends the table.
    starts = (entry for entry in entries.values() if entry.target == _ERROR and entry.next in entries)
    names = {entry.next: _name(entry.data) for entry in starts}
    names |= {begin: hook.upper() for begin, hook in hooks.items()}
    rules: dict[str, list[Rule]] = {name: [] for name in names.values()}
    policies: dict[str, bool] = {}
    name = ""
    for offset, entry in entries.items():
        name = names.get(offset, name)
        if entry.target == _ERROR:
            continue
        made = _rule(entry, len(rules[name]) + 1, names)
        if offset in blob.policies:
            policies[name] = made.verdict == Verdict("drop")
        else:
            rules[name].append(made)
    based: dict[str, Hook] = {hook.upper(): hook for hook in hooks.values()}
    priority = PRIORITIES[blob.name]
    chains = {
        name: Chain(name, tuple(found), based.get(name), priority, policies.get(name, False))
        for name, found in rules.items()
    }
    return Table("iptables-legacy" if family == "ip" else "ip6tables-legacy", family, blob.name, chains)


_ERROR = "ERROR"


def _name(data: bytes) -> str:
    return data.partition(b"\0")[0].decode(errors="replace")


def _entries(layout: _Layout, entries: bytes) -> Iterator[tuple[int, _Entry]]:
    offset = 0
    while offset + layout.size <= len(entries):
        target, following = struct.unpack_from("=HH", entries, offset + layout.offsets)
        entry = entries[offset : offset + following]
        steps: list[Condition | Effect] = list(_header(layout, entry))
        comment = ""
        place = layout.size
        while place < target:
            name, revision, info, size = _sized(entry, place)
            comment = xtables.comment(info) if name == "comment" else comment
            steps += xtables.match(name, revision, info)
            place += size
        name, revision, data, _size = _sized(entry, target)
        goto = bool(entry[layout.flags] & layout.goto)
        yield offset, _Entry(steps, comment, goto, name, revision, data, offset + following)
        offset += max(following, layout.size)


def _sized(entry: bytes, place: int) -> tuple[str, int, bytes, int]:
    """A match or target: name, revision, data, and its size."""
    size, name, revision = _SIZED.unpack_from(entry, place)
    size = max(size, _SIZED.size)
    return _name(name), revision, entry[place + _SIZED.size : place + size], size


def _header(layout: _Layout, entry: bytes) -> Iterator[Condition]:
    """What the entry itself asks for."""
    inverted = entry[layout.inverted]
    width = layout.width
    addresses = zip(layout.addresses, (_INVERT_SOURCE, _INVERT_DESTINATION), strict=True)
    for place, (offset, invert) in enumerate(addresses):
        address, mask = (_number(entry, width * (place + step), width) for step in (0, 2))
        if mask or inverted & invert:
            yield _masked(Field("nh", width, offset), mask, address, inverted & invert)
    for place, (device, invert) in enumerate(((IIFNAME, _INVERT_IIF), (OIFNAME, _INVERT_OIF))):
        name, mask = (_number(entry, 4 * width + 16 * (place + step), 16) for step in (0, 2))
        if mask or inverted & invert:
            yield _masked(device, mask, name, inverted & invert)
    protocol = struct.unpack_from("=H", entry, layout.protocol)[0]
    if protocol:
        yield equals(plain(L4PROTO), protocol, negated=bool(inverted & _INVERT_PROTOCOL))
    if width == 4 and entry[layout.flags] & _FLAG_FRAGMENT:  # only fragments but the first
        yield _masked(Field("nh", 2, 6), 0x1FFF, 0, not inverted & _INVERT_FRAGMENT)


def _number(entry: bytes, offset: int, width: int) -> int:
    return int.from_bytes(entry[offset : offset + width])


def _masked(field: Field, mask: int, value: int, negated: int) -> Condition:
    return equals(plain(field, Mask(mask, 0, field.length)), value & mask, negated=bool(negated))


def _rule(entry: _Entry, number: int, names: dict[int, str]) -> Rule:
    steps = entry.steps
    if entry.target:
        done = xtables.target(entry.target, entry.revision, entry.data)
        if isinstance(done, Effect):
            return Rule((*steps, done), None, number, entry.comment)
        return Rule(tuple(steps), done, number, entry.comment)
    code = struct.unpack_from("=i", entry.data)[0]
    if code < 0:
        return Rule(tuple(steps), _STANDARD.get(code), number, entry.comment)
    called = Verdict("goto" if entry.goto else "jump", names.get(code, ""))
    return Rule(tuple(steps), None if code == entry.next else called, number, entry.comment)
