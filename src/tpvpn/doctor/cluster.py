"""Looks at the cluster: kubeconfig, API server and the way to it, rights, the manager that an admin installed."""

import asyncio
import os
import socket
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

from tpvpn import __version__
from tpvpn.doctor.advice import cluster as advice
from tpvpn.doctor.advice.certificate import validity
from tpvpn.doctor.advice.cluster import unseen
from tpvpn.doctor.advice.host import of_clock, of_mtu
from tpvpn.doctor.advice.rights import RIGHTS, Right, Scope, of_rights
from tpvpn.doctor.check import Check, warning
from tpvpn.doctor.host import path_to
from tpvpn.doctor.patient import REQUEST, Patient
from tpvpn.errors import TpvpnError
from tpvpn.route.fib import View
from tpvpn.route.prefix import Prefix
from tpvpn.route.why import Way, way

if TYPE_CHECKING:
    from tpvpn.kube.api import Cluster
    from tpvpn.kube.installed import Installed

_NO_CLUSTER = "the cluster is not to be asked"


async def kubeconfig(patient: Patient) -> Iterable[Check]:
    """The file, the context, the credentials."""
    reached = await patient.reached()
    found = [advice.of_kubeconfig(reached), advice.of_login(reached)]
    if patient.cluster and patient.cluster.certificate:
        with suppress(ValueError):
            found.append(advice.of_certificate(validity(patient.cluster.certificate), datetime.now(UTC)))
    return found


async def api_server(patient: Patient) -> Iterable[Check]:
    """Whether it answers, and by which routes."""
    reached = await patient.reached()
    return advice.of_api_server(reached, await _ways(patient, reached.addresses))


async def _ways(patient: Patient, addresses: Iterable[str]) -> list[tuple[str, Way]]:
    view = await patient.view()
    hosts = [one.partition("%")[0] for one in addresses]
    return [
        (one, way(view, view.lookup(Prefix.host(one), uid=os.getuid()))) for one in hosts if ":" not in one or view.ipv6
    ]


async def clock(patient: Patient) -> Iterable[Check]:
    """This host's clock beside the API server's, whose answers have whole seconds."""
    await patient.reached()
    try:
        theirs = parsedate_to_datetime(patient.cluster.date if patient.cluster else "")
        return [of_clock((datetime.now(UTC) - theirs).total_seconds())]
    except (ValueError, TypeError):  # no date, or one without a zone
        return [unseen("clock", "the API server told no time")]


async def mtu(patient: Patient) -> Iterable[Check]:
    """Of the device by which the manager's address, or the API server's, goes."""
    reached, view = await patient.reached(), await patient.view()
    found: list[Check] = []
    if status := await patient.known_status():
        dialled = [one["cidr"].partition("/")[0] for one in status["plan"]["never_proxy"] if "manager" in one["reason"]]
        found += _mtus(_paths(dialled, view), "the manager's address")
        found.append(Check("tunnel-mtu", f"the tunnel's MTU is {status['manager']['mtu']}"))
    found += _mtus(_paths(reached.addresses, view), "the API server's address")
    return found or [unseen("mtu", "no address of a manager or API server is known")]


def _paths(addresses: Iterable[str], view: View) -> list[tuple[str, int, int]]:
    return list(dict.fromkeys(path for one in addresses if (path := path_to(one.partition("%")[0], view))))


def _mtus(paths: Iterable[tuple[str, int, int]], where: str) -> list[Check]:
    return [of_mtu(where, *path) for path in paths]


# -- what the user may do ----------------------------------------------------------------------------------------------


async def rbac(patient: Patient) -> Iterable[Check]:
    """Each right that tpvpn can use."""
    reached = await patient.reached()
    cluster = patient.cluster
    if cluster is None or reached.trouble not in ("", "forbidden"):
        return [unseen("rbac", _NO_CLUSTER)]
    namespaces: Mapping[Scope, str] = {
        "own": patient.wishes.manager_namespace or cluster.namespace,
        "manager": patient.manager_namespace,
        "kube-system": "kube-system",
    }

    async def ask(right: Right) -> tuple[Right, bool | None]:
        where = namespaces.get(right.scope, "")
        try:
            may = await cluster.allows(right.verb, right.resource, group=right.group, namespace=where, name=right.name)
        except TpvpnError:
            may = None
        return right, may

    answers = dict(await asyncio.gather(*map(ask, RIGHTS)))
    return of_rights(answers, namespaces, installed=await _is_installed(patient))


async def _is_installed(patient: Patient) -> bool:
    try:
        return await patient.installed() is not None
    except TpvpnError:
        return False


# -- the manager -------------------------------------------------------------------------------------------------------


async def manager(patient: Patient) -> Iterable[Check]:
    """The one that an admin installed: its version, and which way leads to it."""
    from tpvpn.kube.installed import NAME

    reached, cluster = await patient.reached(), patient.cluster
    if cluster is None or reached.trouble not in ("", "forbidden"):
        return [unseen("installed", _NO_CLUSTER)]
    namespace = patient.manager_namespace
    try:
        found = await patient.installed()
    except TpvpnError as error:
        return [Check("installed", str(error).partition(": ")[0], "tpvpn helm upgrade --install")]
    if found is None:
        return [
            Check(
                "installed",
                f"no manager that you may use is installed in namespace {namespace}: connect starts "
                f"one of your own in {cluster.namespace}",
            )
        ]
    labels: dict[str, str] = (await cluster.get(f"/api/v1/namespaces/{namespace}/configmaps/{NAME}"))["metadata"].get(
        "labels"
    ) or {}
    version = labels.get("app.kubernetes.io/version", "unknown")
    is_same = version == __version__
    checks = [
        Check(
            "installed",
            f"a manager is installed in namespace {namespace}, version {version}"
            + ("" if is_same else f", and this is {__version__}"),
            None if is_same else "tpvpn helm upgrade",
            warns=True,
        )
    ]
    return [*checks, *await _transports(cluster, found)]


async def _transports(cluster: "Cluster", admins: "Installed") -> list[Check]:
    """Each way through the API server, tried with a question to the manager."""
    from tpvpn.cluster import ClusterTransport, Options, Way
    from tpvpn.proto.sessions import Question
    from tpvpn.sessions import ask

    checks = list[Check]()
    ways: tuple[Way, ...] = ("upgrade", "portforward")
    remedy = f"kubectl get pods --namespace {admins.namespace}"
    loop = asyncio.get_running_loop()
    for name in ways:
        transport = ClusterTransport(cluster, admins, Options(way=name), lambda _: None)
        began = loop.time()
        try:
            async with asyncio.timeout(REQUEST):
                await ask(transport, Question(socket.gethostname()))
            took = 1000 * (loop.time() - began)
            checks.append(
                Check("way", f"{name} through the API server leads to the manager, which answers in {took:.0f} ms")
            )
            if name == "upgrade":
                return checks
        except (TpvpnError, TimeoutError) as error:
            said = str(error) or f"nothing came within {REQUEST:.0f} s"
            checks.append(warning("way", f"{name} through the API server does not lead to the manager: {said}", remedy))
    return [
        *checks,
        Check(
            "transport",
            "no way leads to the manager that is installed",
            f"`{remedy}` shows whether it runs",
        ),
    ]
