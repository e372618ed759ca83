"""A manager in a Kubernetes cluster and the way to it: the one that an admin installed, else one of the user's own.

It knows the order of things, not how each is done (`kube/`, `transport/`). Nothing is created in the cluster before the
session's plan was found good: the manager is asked for when the transport dials.
"""

import asyncio
import contextlib
import secrets
import socket
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from tpvpn.errors import ClusterError, ManagerError, TpvpnError
from tpvpn.kube.api import Cluster
from tpvpn.kube.install import Installer, name_for
from tpvpn.kube.installed import NAME, Installed, credentials, installed
from tpvpn.kube.manifest import IMAGE, Ephemeral
from tpvpn.kube.refusal import ForbiddenError, UnreadyError
from tpvpn.proto.sessions import Question
from tpvpn.sessions import ask
from tpvpn.transport.apiserver import PortForward, Target, ThroughApiServer, Upgrade, next_hop
from tpvpn.transport.inner_tls import ImpostorError
from tpvpn.transport.stream import Stream
from tpvpn.transport.tcp import resolve

Way = Literal["auto", "upgrade", "portforward"]
_WAYS: dict[Way, tuple[type[ThroughApiServer], ...]] = {
    "auto": (Upgrade, PortForward),
    "upgrade": (Upgrade,),
    "portforward": (PortForward,),
}
_STAYING = 10.0
"""Seconds for which nothing but the pod that has the session is tried: what is open lives there alone."""
_LEAVING = 5.0
"""Seconds at the end of a session for finding out who else uses its manager."""


@dataclass(frozen=True, slots=True)
class Options:
    """What a user says of the manager: where it is to be, what starts one, and the way to it."""

    namespace: str | None = None
    image: str = IMAGE
    pull_secrets: tuple[str, ...] = ()
    ephemeral: bool | None = None
    """True: always one of the user's own; False: never."""
    way: Way = "auto"


async def find(cluster: Cluster, options: Options) -> Installed | None:
    """The installed one, if it is wanted. ClusterError when there is none, and none of the user's own is wanted."""
    if options.ephemeral:
        return None
    found = await installed(cluster, options.namespace or NAME)
    if not found and options.ephemeral is False:
        raise ClusterError(
            f"no manager that you may use is installed in namespace {options.namespace or NAME}: ask an admin for "
            "`tpvpn helm install`, name another with --manager-namespace, or leave out --no-ephemeral"
        )
    return found


class ClusterTransport:
    """The fastest way through the API server to a manager, which is started when there is none.

    With `asked` it is to ask, as an admin who may, that pod of the manager's and no other, and nothing is started.
    """

    purpose = "the API server"

    def __init__(
        self,
        cluster: Cluster,
        admins: Installed | None,
        options: Options,
        say: Callable[[str], None],
        asked: str | None = None,
    ) -> None:
        self._cluster, self._admins, self._options, self._say, self._asked = cluster, admins, options, say, asked
        self._ways = _WAYS[options.way]
        self._own: Installer | None = None
        self._used: ThroughApiServer | None = None
        self._pod: str | None = None
        self._failing_since: float | None = None

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

    def stay(self, pod: str | None) -> None:
        """That pod is to be dialled, and others only when it has not been there for a while; None: any may be."""
        self._pod, self._failing_since = pod, None

    def warning(self, addresses: list[str]) -> str | None:
        """Nothing: it is the way of kubectl."""
        return None

    async def dial(self, addresses: list[str]) -> tuple[Stream, bytes]:
        """A stream to the manager, when that is ready. Errors: ClusterError, ManagerError."""
        tried = await self._tried()
        for number, one in enumerate(tried):
            self._used = one
            try:
                return await one.dial(addresses)
            except (ClusterError, ManagerError) as error:
                self._failing_since = self._failing_since or time.monotonic()
                if isinstance(error, ImpostorError | UnreadyError) or number == len(tried) - 1:
                    raise
                if tried[number + 1].word != one.word:
                    self._say(f"the transport is {tried[number + 1].word}, which is slower than {one.word}: {error}")
        raise AssertionError("there is always a way")

    async def _tried(self) -> Sequence[ThroughApiServer]:
        """All ways to the manager, in order. Errors: ClusterError, ManagerError."""
        if self._admins:
            if self._used:  # it may have been upgraded meanwhile
                self._admins = await installed(self._cluster, self._admins.namespace) or self._admins
            try:
                keys = await credentials(self._cluster, self._admins, admin=bool(self._asked))
            except ForbiddenError as error:
                if self._options.ephemeral is False:
                    raise
                self._say(f"warning: the manager of namespace {self._admins.namespace} is not for you: {error}")
                self._admins = None
            else:
                return [way(self._cluster, target, keys.token, keys.pin) for way, target in self._to(self._admins)]
        self._own = own = self._own or await self._installer()
        manager = await (own.running() if self._asked else own.manager())
        if not manager:
            raise ClusterError(
                "no manager is installed that you may use, and none of your own runs: nobody is connected"
            )
        self._say(f"manager {manager.namespace}/{manager.pod} is ready")
        target = Target(manager.namespace, "pods", manager.pod, manager.port)
        return [way(self._cluster, target, manager.token) for way in self._ways]

    async def _installer(self) -> Installer:
        options = self._options
        namespace = options.namespace or self._cluster.namespace
        wanted = Ephemeral(await name_for(self._cluster), namespace, options.image, options.pull_secrets)
        return Installer(self._cluster, wanted, self._say)

    def _to(self, admins: Installed) -> Iterator[tuple[type[ThroughApiServer], Target]]:
        """The pod that has the session; else the service's proxy chooses one that is ready, or each is tried."""
        if self._pod in admins.pods and not self._asked:
            for way in self._ways:
                yield way, Target(admins.namespace, "pods", self._pod, admins.port)
            if self._failing_since is None or time.monotonic() - self._failing_since < _STAYING:
                return
        first = secrets.randbelow(len(admins.pods))
        for way in self._ways:
            if self._asked:
                yield way, Target(admins.namespace, "pods", self._asked, admins.port)
            elif way is Upgrade:
                yield way, Target(admins.namespace, "services", NAME, admins.port)
            else:
                for pod in admins.pods[first:] + admins.pods[:first]:
                    yield way, Target(admins.namespace, "pods", pod, admins.port)

    async def leave(self) -> None:
        """Remove the user's own manager, unless another session uses it still. One that cannot be ends by itself."""
        if self._own and self._own.used and not await self._is_shared():
            try:
                await self._own.remove()
            except ClusterError as error:
                self._say(f"warning: your manager could not be removed, and ends by itself: {error}")

    async def _is_shared(self) -> bool:
        if not self._used:
            return False
        try:
            async with asyncio.timeout(_LEAVING):
                for _ in range(3):  # the goodbye of our own may be on its way
                    answer = await ask(self._used, Question(socket.gethostname()))
                    if not answer.sessions:
                        return False
                    await asyncio.sleep(0.2)
                return True
        except ManagerError:
            return False  # it is gone
        except (TpvpnError, TimeoutError):
            return True  # nobody can tell: when it is idle it ends by itself


def to_each(
    cluster: Cluster, admins: Installed | None, options: Options, say: Callable[[str], None]
) -> list[ClusterTransport]:
    """Ways to ask each pod of the manager."""
    pods = admins.pods if admins else ["own"]
    return [ClusterTransport(cluster, admins, options, say, asked=pod) for pod in pods]


@contextlib.asynccontextmanager
async def transport_to(
    cluster: Cluster,
    admins: Installed | None,
    options: Options,
    say: Callable[[str], None],
    hurried: asyncio.Event,
) -> AsyncGenerator[ClusterTransport]:
    """The way to a manager; one of the user's own is removed at the end, when nobody uses it any more.

    `hurried`: whoever waits for the end waits no longer, and the manager ends by itself.
    """
    transport = ClusterTransport(cluster, admins, options, say)
    try:
        yield transport
    finally:
        leaving, hurrying = asyncio.create_task(transport.leave()), asyncio.create_task(hurried.wait())
        await asyncio.wait((leaving, hurrying), return_when=asyncio.FIRST_COMPLETED)
        for task in (leaving, hurrying):
            task.cancel()
        await asyncio.gather(leaving, hurrying, return_exceptions=True)
