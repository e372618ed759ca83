"""Whom the doctor examines: what was asked for, and what several checks want to know, each looked up once.

Nothing is judged here. What only root may see is looked at first (`rooted`), since whoever reads a kubeconfig is an
ordinary user from then on.
"""

import asyncio
import contextlib
import errno
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tpvpn import rundir
from tpvpn.control import ask
from tpvpn.doctor.advice.cluster import Reached, Trouble
from tpvpn.errors import ClusterError, ManagerError, TpvpnError, UsageError
from tpvpn.firewall.model import Firewall
from tpvpn.firewall.read import read
from tpvpn.helper import rights
from tpvpn.holders import holders
from tpvpn.kube.access import Access
from tpvpn.kube.refusal import ForbiddenError, LoginError, NoKubeconfigError, NoPluginError, UntrustedError
from tpvpn.route.fib import View

if TYPE_CHECKING:
    from tpvpn.kube.api import Cluster
    from tpvpn.kube.installed import Installed
    from tpvpn.route.verdict import Plan

T = TypeVar("T")
REQUEST = 4.0
"""Seconds for one request, and for one connection."""
_LOGIN = 8.0
"""Seconds for whatever logs in."""


@dataclass(frozen=True, slots=True)
class Rooted:
    """What only root may see, as far as this process may."""

    held: str
    """Where the helper's rights come from, "" for nowhere."""
    holders: Mapping[str, str]
    firewall: Firewall | None
    """None when it may not be read."""
    nftables: bool | None
    """None when that may not be known."""


def rooted(root: bool) -> Rooted:
    """Look, as whoever this process still is. PrivilegeError of a sudo that names no user."""
    held = ("root" if root else "CAP_NET_ADMIN, which this process was given") if rights.held() else ""
    firewall, nftables = None, True if Path("/sys/module/nf_tables").exists() else None
    try:
        firewall, nftables = read(), True
    except OSError as error:
        if error.errno in (errno.EPROTONOSUPPORT, errno.ENOENT, errno.EOPNOTSUPP):
            nftables = False
    return Rooted(held, holders(), firewall if firewall and firewall.complete else None, nftables)


@dataclass(frozen=True, slots=True)
class Wishes:
    """What was asked for: the session's name, the cluster, and what would be routed and named without a session."""

    name: str
    access: Access
    manager_namespace: str | None
    home: Path
    domains: Sequence[str]
    """The cluster's own first."""
    plan: "Callable[[Cluster | None], Awaitable[Plan]]"


class Patient:
    """The laptop, its session and its cluster; what is asked of them is asked once."""

    def __init__(self, wishes: Wishes, seen: Rooted, stack: contextlib.AsyncExitStack) -> None:
        self.wishes, self.rooted = wishes, seen
        self.option = rundir.name_option(wishes.name)
        self.cluster: Cluster | None = None
        self._stack = stack
        self._asked = dict[str, asyncio.Task[Any]]()

    async def _once(self, what: str, asking: Callable[[], Awaitable[T]]) -> T:
        """The answer, which a check that gives up does not take from the others."""
        if what not in self._asked:
            self._asked[what] = asyncio.ensure_future(asking())  # pyright: ignore[reportArgumentType]
        return await asyncio.shield(self._asked[what])

    async def close(self) -> None:
        """End what is still being asked."""
        for task in self._asked.values():
            task.cancel()
        await asyncio.gather(*self._asked.values(), return_exceptions=True)

    # -- the host ------------------------------------------------------------------------------------------------------

    async def view(self) -> View:
        """The kernel's routing, with who holds which device. OSError."""
        return await self._once("view", self._view)

    async def _view(self) -> View:
        from tpvpn.route.netlink import read_view

        view = await read_view()
        return replace(
            view, links=tuple(replace(link, holder=self.rooted.holders.get(link.name)) for link in view.links)
        )

    # -- the session ---------------------------------------------------------------------------------------------------

    @property
    def session(self) -> rundir.Session | None:
        """The session that runs."""
        found = rundir.read(self.wishes.name)
        return found if found is not None and found.running else None

    async def status(self) -> dict[str, Any] | None:
        """What the session says; None when none runs. UsageError when it is another user's, TpvpnError."""
        return await self._once("status", self._status)

    async def _status(self) -> dict[str, Any] | None:
        session = self.session
        return None if session is None else await asyncio.to_thread(ask, session.directory, "status")

    async def known_status(self) -> dict[str, Any] | None:
        """As `status`; None too when it does not say."""
        try:
            return await self.status()
        except TpvpnError:
            return None

    async def plan(self) -> dict[str, Any]:
        """The session's plan, else what would be. Errors: ClusterError, UsageError, when subnets are not known."""
        return await self._once("plan", self._plan)

    async def _plan(self) -> dict[str, Any]:
        from tpvpn.report import as_json

        if status := await self.known_status():
            return status["plan"]
        try:
            return as_json(await self.wishes.plan(None))
        except UsageError:
            reached = await self.reached()
            if reached.trouble not in ("", "forbidden"):
                raise
            return as_json(await self.wishes.plan(self.cluster))

    # -- the cluster ---------------------------------------------------------------------------------------------------

    async def reached(self) -> Reached:
        """What comes of opening the kubeconfig and of asking the API server."""
        return await self._once("reached", self._reached)

    async def _reached(self) -> Reached:
        from tpvpn.kube.api import opened

        access = replace(self.wishes.access, timeout=min(self.wishes.access.timeout, REQUEST))
        try:
            async with asyncio.timeout(_LOGIN):
                cluster = await self._stack.enter_async_context(opened(access))
        except TimeoutError:
            return Reached("login", f"the kubeconfig does not log in within {_LOGIN:.0f} s")
        except ClusterError as error:
            return Reached(_trouble_of(error, "kubeconfig"), str(error))
        self.cluster = cluster
        return await _asked(cluster)

    @property
    def manager_namespace(self) -> str:
        """Where an admin's manager would be."""
        from tpvpn.kube.installed import NAME

        return self.wishes.manager_namespace or NAME

    async def installed(self) -> "Installed | None":
        """The manager that an admin installed; to be asked when the cluster was reached. Errors: ClusterError."""
        return await self._once("installed", self._installed)

    async def _installed(self) -> "Installed | None":
        from tpvpn.kube.installed import installed

        assert self.cluster
        return await installed(self.cluster, self.manager_namespace)


async def _asked(cluster: "Cluster") -> Reached:
    """What comes of a request that everybody who is logged in may make, and of one connection beside it."""
    from tpvpn.transport.apiserver import proxy_of

    try:
        proxy = proxy_of(cluster)
    except ClusterError as error:
        return Reached("unreachable", str(error), cluster.context, cluster.server)
    (addresses, seconds), (trouble, said) = await asyncio.gather(_dialled(cluster), _requested(cluster))
    name = "" if proxy is None else f"{proxy.hostname}:{proxy.port or 80}"
    return Reached(trouble, said, cluster.context, cluster.server, name, addresses, seconds)


async def _requested(cluster: "Cluster") -> tuple[Trouble, str]:
    """What is amiss with a request, and the error's text."""
    try:
        await cluster.get("/api")
    except ClusterError as error:
        return _trouble_of(error, "unreachable"), str(error)
    return "", ""


async def _dialled(cluster: "Cluster") -> tuple[list[str], float | None]:
    """The addresses of the first hop, and how long the first one of them takes to connect."""
    from tpvpn.transport.apiserver import next_hop
    from tpvpn.transport.tcp import connect, resolve

    host, port = next_hop(cluster)
    loop, addresses = asyncio.get_running_loop(), list[str]()
    with contextlib.suppress(ManagerError, OSError, TimeoutError):
        async with asyncio.timeout(REQUEST):
            addresses = await resolve(host, port, "the API server")
            began = loop.time()
            (await connect(addresses[0], port)).close()
            return addresses, loop.time() - began
    return addresses, None


def _trouble_of(error: ClusterError, otherwise: Trouble) -> Trouble:
    kinds: tuple[tuple[type[ClusterError], Trouble], ...] = (
        (NoKubeconfigError, "absent"),
        (NoPluginError, "plugin"),
        (LoginError, "login"),
        (UntrustedError, "untrusted"),
        (ForbiddenError, "forbidden"),
    )
    for kind, trouble in kinds:
        if isinstance(error, kind):
            return trouble
    return otherwise
