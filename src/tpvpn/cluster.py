"""What a session needs of a Kubernetes cluster: its subnets, a manager in it, and the way there.

It knows the order of things, not how each is done (`kube/`, `transport/`). Nothing is created in the cluster before the
session's plan was found good: the manager is asked for when the transport dials.
"""

import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass

from tpvpn.errors import ClusterError, ManagerError
from tpvpn.kube.api import Cluster
from tpvpn.kube.discover import Discovery
from tpvpn.kube.install import Installer, name_for
from tpvpn.kube.manifest import IMAGE, Ephemeral
from tpvpn.kube.subnets import outside, subnets
from tpvpn.route.verdict import Wanted
from tpvpn.transport.apiserver import PortForward, Target, ThroughApiServer, Upgrade, next_hop
from tpvpn.transport.stream import Stream
from tpvpn.transport.tcp import resolve


@dataclass(frozen=True, slots=True)
class Options:
    """What a user says of the manager: where it is to be, its image, and what pulls that."""

    namespace: str | None = None
    image: str = IMAGE
    pull_secrets: tuple[str, ...] = ()


async def discover(cluster: Cluster, given: Sequence[Wanted]) -> tuple[list[Wanted], list[str]]:
    """Services and pods, a kind that is given as it is given; and what a user should know of how. ClusterError."""
    seen = await Discovery(cluster).run()
    found = subnets(seen.observed)
    kinds = {one.kind for one in given}
    wanted = [Wanted(one.prefix, one.kind, one.source) for one in found.found if one.kind not in kinds]
    warnings = [warning for warning in found.warnings if not any(f"--{kind}-cidr" in warning for kind in kinds)]
    for kind in ("service", "pod"):
        prefixes = [one.prefix for one in given if one.kind == kind]
        lost = outside(seen.observed, prefixes, kind) if prefixes else None
        warnings += [lost] if lost else []
    return [*given, *wanted], [*warnings, *(seen.forbidden if warnings else ())]


class AutoTransport:
    """To a manager of the user's own, started when there is none; by the fastest way through the API server."""

    purpose = "the API server"

    def __init__(self, cluster: Cluster, installer: Installer, say: Callable[[str], None]) -> None:
        self._cluster, self._installer, self._say = cluster, installer, say
        self._used: ThroughApiServer | None = None

    @property
    def name(self) -> str:
        """As `status` shows it."""
        return self._used.name if self._used else self._cluster.server

    @property
    def token(self) -> bytes:
        """The manager's, once it has dialled."""
        return self._used.token if self._used else b""

    async def resolve(self) -> list[str]:
        """The addresses of the API server; ManagerError when there are none."""
        return await resolve(*next_hop(self._cluster), self.purpose)

    def warning(self, addresses: list[str]) -> str | None:
        """Nothing: it is the way of kubectl."""
        return None

    async def dial(self, addresses: list[str]) -> tuple[Stream, bytes]:
        """A stream to the manager, when that is ready. Errors: ClusterError, ManagerError."""
        manager = await self._installer.manager()
        self._say(f"manager {manager.namespace}/{manager.pod} is ready")
        target = Target(manager.namespace, "pods", manager.pod, manager.port)
        self._used = Upgrade(self._cluster, target, manager.token)
        try:
            return await self._used.dial(addresses)
        except (ClusterError, ManagerError) as error:
            self._say(f"the transport is portforward, which is slower than upgrade: {error}")
            self._used = PortForward(self._cluster, target, manager.token)
            return await self._used.dial(addresses)


@contextlib.asynccontextmanager
async def transport_to(cluster: Cluster, options: Options, say: Callable[[str], None]) -> AsyncGenerator[AutoTransport]:
    """The way to a manager; one that was started for it is removed at the end."""
    namespace = options.namespace or cluster.namespace
    wanted = Ephemeral(await name_for(cluster), namespace, options.image, options.pull_secrets)
    installer = Installer(cluster, wanted, say)
    try:
        yield AutoTransport(cluster, installer, say)
    finally:
        await installer.remove()
