"""Where a session works: on this host, or in a network namespace of its own (`sandbox`).

It is no more than the doors that differ: who looks at the kernel's routes and hears of their changes, who leads names
to the session, who puts right what a helper that was ended has left, and which other sessions have names there.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tpvpn.dns.neighbours import neighbours
from tpvpn.dns.policy import Neighbour
from tpvpn.helper.client import HelperClient, clean_up
from tpvpn.host_resolver import HostResolver, Mode
from tpvpn.route import netlink
from tpvpn.route.changes import Changes
from tpvpn.route.fib import Route, View
from tpvpn.route.prefix import Prefix


class Kernel(Protocol):
    """What tells of the kernel's routes, as `route/netlink` does."""

    async def read_view(self) -> View:
        """All that the kernel would look at."""
        ...

    async def ask(self, hosts: Sequence[Prefix]) -> list[Route | None]:
        """Where a packet to each of these hosts would go; None where there is no route."""
        ...


class Resolver(Protocol):
    """What leads programs' names to the session, as `HostResolver` does."""

    async def start(self, search: Sequence[str], domains: Sequence[str]) -> None:
        """Set everything up."""
        ...

    async def update(self, search: Sequence[str], domains: Sequence[str]) -> None:
        """Other domains are ours from now on."""
        ...

    @property
    def servers(self) -> tuple[str, ...]:
        """Who answers all that is not the cluster's."""
        ...

    @property
    def claimed(self) -> tuple[str, ...]:
        """The domains that others have."""
        ...

    def status(self) -> dict[str, Any]:
        """What is done, and why."""
        ...

    async def follow(self, changed: Callable[[], None]) -> None:
        """Put right what others undo, for ever; `changed()` when there are other servers or claimed domains."""
        ...


MakeResolver = Callable[[HelperClient, Mode, Sequence[str], Callable[[str], None]], Resolver]


async def _clean_up() -> None:
    """If that can be had without asking anybody."""
    await clean_up(ask=False)


@dataclass(frozen=True, slots=True)
class Place:
    """This host, unless it is said otherwise."""

    kernel: Kernel = netlink
    changes: Callable[[], Changes] = Changes
    resolver: MakeResolver = HostResolver
    clean_up: Callable[[], Awaitable[object]] = _clean_up
    neighbours: Callable[[str, int], tuple[Neighbour, ...]] = neighbours


HERE = Place()
