"""The way of a packet through a firewall's chains, as the kernel walks it, with three answers: yes, no, perhaps.

It knows no encoding and words nothing. A rule whose conditions hold for some of the packets, or cannot be read, matches
perhaps: both ways are walked. What a packet goes through after that on one of them only is doubtful, for the reasons
that are kept. Each base chain is walked as though all before had let the packet pass, so that every obstacle is found.

An accept ends its base chain alone; return and the end of a chain lead back to the jump, or to the policy; a goto
leaves nothing to come back to.
"""

from collections.abc import Iterator
from typing import NamedTuple

from tpvpn.firewall.model import Chain, Condition, Firewall, Operand, Rule, Table, Verdict, VerdictMap
from tpvpn.firewall.packet import HOOKS_PASSED, Packet

_DEPTH = 16
"""NFT_JUMP_STACK_SIZE: the kernel takes no ruleset that is deeper."""
_STEPS = 500_000
"""Rules walked for one packet; chains that jump to each other many times over are not worth more."""

NO, MAYBE, YES = 0, 1, 2

Doubts = frozenset[str]
"""What must be known of a packet to tell whether it comes so far; none: it surely does."""
_NONE: Doubts = frozenset()
_UNSEEN: Doubts = frozenset(("a chain that was not read",))
"""It may be that packets are accepted there."""


class Drop(NamedTuple):
    """Where packets end: at a rule of a chain, or by its policy when `rule` is None."""

    table: Table
    chain: Chain
    rule: Rule | None
    rejected: bool
    doubts: Doubts


def drops(firewall: Firewall, packet: Packet) -> list[Drop]:
    """Where the packet surely ends, or else may end, in each base chain it passes, in the order of its way."""
    found: list[Drop] = []
    for hook in HOOKS_PASSED[packet.direction]:
        bases = [
            (chain, table)
            for table in firewall.tables
            if packet.version in table.versions
            for chain in table.chains.values()
            if chain.hook == hook
        ]
        for chain, table in sorted(bases, key=lambda base: base[0].priority):
            packet.enter(hook, chain.priority)
            found += _Walk(packet, table).through(chain)
    return found


class _Ending(NamedTuple):
    """How a chain may be left: `back` to where it was called, `accepted` with these doubts."""

    back: bool
    accepted: Doubts


class _Walk:
    """One packet in one base chain."""

    def __init__(self, packet: Packet, table: Table) -> None:
        self._packet, self._table = packet, table
        self._found: list[Drop] = []
        self._steps = 0

    def through(self, base: Chain) -> list[Drop]:
        """The drops of a base chain: the sure one alone where there is one."""
        ending = self._chain(base, _NONE, 0)
        if ending.back and base.drops:
            self._found.append(Drop(self._table, base, None, False, ending.accepted))
        sure = [drop for drop in self._found if not drop.doubts]
        return sure or self._found

    def _chain(self, chain: Chain, doubts: Doubts, depth: int) -> _Ending:
        back = False
        accepted = _NONE
        for rule in chain.rules:
            self._steps += 1
            for verdict, why in self._verdicts(rule, doubts):
                here = doubts | why
                if verdict.kind in ("drop", "reject"):
                    self._found.append(Drop(self._table, chain, rule, verdict.kind == "reject", here))
                    ending = _Ending(False, _NONE)
                elif verdict.kind in ("jump", "goto"):
                    ending = self._call(verdict.chain, here, depth + 1)
                elif verdict.kind == "return":
                    ending = _Ending(True, _NONE)
                else:  # what a program behind a queue decides, it asks its user
                    ending = _Ending(False, here)
                accepted |= ending.accepted
                if verdict.kind == "jump" and ending.back:
                    doubts |= ending.accepted
                    continue
                back |= ending.back
                if not why:
                    return _Ending(back, accepted)
                if ending.back or verdict.kind in ("accept", "queue"):
                    doubts |= why
                doubts |= ending.accepted
        return _Ending(True, accepted)

    def _call(self, name: str, doubts: Doubts, depth: int) -> _Ending:
        target = self._table.chains.get(name)
        if target is None or depth > _DEPTH or self._steps > _STEPS:
            return _Ending(True, _UNSEEN)
        return self._chain(target, doubts, depth)

    def _verdicts(self, rule: Rule, doubts: Doubts) -> Iterator[tuple[Verdict, Doubts]]:
        """What the rule may decide, each with the reasons why it may not."""
        why = _NONE
        for step in rule.steps:
            if isinstance(step, Condition):
                truth = _holds(self._packet, step)
                if truth == NO:
                    return
                if truth == MAYBE:
                    why |= _named(step.operand)
            elif self._packet.value(step.operand) is None:
                return
            else:
                self._packet.apply(step, not doubts and not why)
        if isinstance(rule.verdict, VerdictMap):
            yield from _mapped(self._packet, rule.verdict, why)
        elif rule.verdict is not None:
            yield rule.verdict, why


def _holds(packet: Packet, condition: Condition) -> int:
    operand, ranges, negated = condition
    if ranges is None:
        return MAYBE
    bits = packet.value(operand)
    if bits is None:
        return NO
    found, sure = ranges.candidates(bits.value, bits.known, (1 << 8 * bits.length) - 1)
    truth = YES if sure else MAYBE if found else NO
    return YES - truth if negated else truth


def _mapped(packet: Packet, verdicts: VerdictMap, why: Doubts) -> Iterator[tuple[Verdict, Doubts]]:
    bits = packet.value(verdicts.operand)
    if bits is None:
        return
    found, sure = verdicts.ranges.candidates(bits.value, bits.known, (1 << 8 * bits.length) - 1)
    unsure = _named(verdicts.operand) if found and not sure else _NONE
    possible = [verdicts.verdicts[place] for place in found] + ([] if sure else [verdicts.default])
    for verdict in possible:
        if verdict is not None:
            yield verdict, why | unsure


def _named(operand: Operand) -> Doubts:
    return frozenset(str(piece.field) for piece in operand.pieces)
