"""Who is talked to most through the tunnel: the connections of this host's programs, by destination, with their names.

It asks the kernel for its table of sockets, and for that only when somebody looks, so that nothing on the packet path
is counted for it, and at most for a hundredth of the time, however many connections there are. What travels without a
socket of this network namespace (a container's, UDP, ping) is not among them. Names come from the cluster: PTR
questions, one an address, asked behind the back of whoever looks; until there is an answer the address is shown.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

from tpvpn.sockdiag import Flow, flows

SHOWN = 20
"""Destinations that are told of."""
SHARE = 100
"""How many times as long as a look took none is taken."""
NAMES = 1000
"""Addresses whose names are remembered."""


@dataclass(slots=True)
class Talker:
    """A destination; bytes are those of the connections that are open, rates are bytes a second since the last look."""

    address: str
    port: int
    name: str | None = None
    connections: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    sent_rate: int = 0
    received_rate: int = 0


class Talkers:
    """Those of one session, whose own addresses are `own`; `name_of` comes by an address's name, or None."""

    def __init__(self, own: Sequence[str], name_of: Callable[[str], Awaitable[str | None]]) -> None:
        self._own, self._name_of = own, name_of
        self._flows: dict[bytes, Flow] = {}
        self._looked = self._due = 0.0
        self._found: list[Talker] = []
        self._names: dict[str, str | None] = {}
        self._asking: set[asyncio.Task[None]] = set()

    def look(self) -> list[Talker]:
        """The busiest, the first of all first."""
        began = time.monotonic()
        if began >= self._due:
            found = flows(self._own)
            now = time.monotonic()
            self._due = now + SHARE * (now - began)
            self._found = busiest(found, self._flows, began - self._looked)
            self._flows, self._looked = {flow.cookie: flow for flow in found}, began
        for talker in self._found:
            talker.name = self._name(talker.address)
        return self._found

    def close(self) -> None:
        """Ask for no more names."""
        for task in self._asking:
            task.cancel()

    def _name(self, address: str) -> str | None:
        """What it is called, as far as is known; it is asked for once."""
        if address not in self._names:
            if len(self._names) >= NAMES:
                self._names.clear()
            self._names[address] = None
            task = asyncio.create_task(self._ask(address))
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)
        return self._names[address]

    async def _ask(self, address: str) -> None:
        self._names[address] = await self._name_of(address)


def busiest(found: Iterable[Flow], before: dict[bytes, Flow], seconds: float) -> list[Talker]:
    """The destinations with the most bytes since `before`, then in all."""
    by_destination: dict[tuple[str, int], list[Flow]] = defaultdict(list)
    for flow in found:
        by_destination[flow.address, flow.port].append(flow)
    talkers = [_talker(flows, before, seconds) for flows in by_destination.values()]
    talkers.sort(key=lambda one: (-one.sent_rate - one.received_rate, -one.sent_bytes - one.received_bytes))
    return talkers[:SHOWN]


def _talker(flows: Sequence[Flow], before: dict[bytes, Flow], seconds: float) -> Talker:
    sent, received = sum(flow.sent for flow in flows), sum(flow.received for flow in flows)
    known = [before[flow.cookie] for flow in flows if flow.cookie in before]
    sent_before, received_before = sum(flow.sent for flow in known), sum(flow.received for flow in known)
    return Talker(
        flows[0].address,
        flows[0].port,
        connections=len(flows),
        sent_bytes=sent,
        received_bytes=received,
        sent_rate=round((sent - sent_before) / seconds) if before else 0,
        received_rate=round((received - received_before) / seconds) if before else 0,
    )
