"""What a session needs of a Kubernetes cluster: its subnets, a manager in it, and the way there.

It knows the order of things, not how each is done (`kube/`, `transport/`). Nothing is created in the cluster before the
session's plan was found good: the manager is asked for when the transport dials.
"""

import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass

from tpvpn.kube.api import Cluster
from tpvpn.kube.discover import Discovery
from tpvpn.kube.install import Installer, name_for
from tpvpn.kube.manifest import IMAGE, Ephemeral
from tpvpn.kube.subnets import outside, subnets
from tpvpn.route.verdict import Wanted
from tpvpn.transport.apiserver import ApiServerUpgrade, Target
from tpvpn.transport.stream import Stream


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


class EphemeralTransport:
    """Through the API server to a manager of the user's own, which is started when there is none."""

    purpose = "the API server"
    token = b""

    def __init__(self, cluster: Cluster, installer: Installer, say: Callable[[str], None]) -> None:
        self._cluster, self._installer, self._say = cluster, installer, say
        self._upgrade = ApiServerUpgrade(cluster, None)

    @property
    def name(self) -> str:
        """As `status` shows it."""
        return self._upgrade.name

    async def resolve(self) -> list[str]:
        """The addresses of the API server; ManagerError when there are none."""
        return await self._upgrade.resolve()

    def warning(self, addresses: list[str]) -> str | None:
        """Nothing."""
        return self._upgrade.warning(addresses)

    async def dial(self, addresses: list[str]) -> tuple[Stream, bytes]:
        """A stream to the manager, ready. Errors: ClusterError, ManagerError."""
        manager = await self._installer.manager()
        self.token = manager.token
        self._say(f"manager {manager.namespace}/{manager.pod} is ready")
        self._upgrade = ApiServerUpgrade(self._cluster, Target(manager.namespace, "pods", manager.pod, manager.port))
        return await self._upgrade.dial(addresses)


@contextlib.asynccontextmanager
async def transport_to(
    cluster: Cluster, options: Options, say: Callable[[str], None]
) -> AsyncGenerator[EphemeralTransport]:
    """The way to a manager; one that was started for it is removed at the end."""
    namespace = options.namespace or cluster.namespace
    wanted = Ephemeral(await name_for(cluster), namespace, options.image, options.pull_secrets)
    installer = Installer(cluster, wanted, say)
    try:
        yield EphemeralTransport(cluster, installer, say)
    finally:
        await installer.remove()
