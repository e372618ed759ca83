"""The rights in a cluster that tpvpn can use, and what it costs not to have each. Pure."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from tpvpn.doctor.check import Check, warning

Scope = Literal["cluster", "own", "manager", "kube-system"]
Use = Literal["subnets", "installed", "way", "own"]


@dataclass(frozen=True, slots=True)
class Right:
    """One right; `name`: of the one object, "" for all."""

    verb: str
    resource: str
    scope: Scope
    use: Use
    without: str
    """What it costs not to have it."""
    group: str = ""
    name: str = ""


_SEEN = "subnets are guessed from those of your own namespace"
_PORT = "tpvpn:7070"
RIGHTS = (
    Right("list", "servicecidrs", "cluster", "subnets", "the service subnet is learned from an error or guessed",
          group="networking.k8s.io"),
    Right("list", "nodes", "cluster", "subnets", "the pod subnet is guessed from the pods seen"),
    Right("list", "namespaces", "cluster", "subnets", "short names of other namespaces' services are not found"),
    Right("list", "services", "cluster", "subnets", _SEEN),
    Right("list", "pods", "cluster", "subnets", _SEEN),
    Right("get", "configmaps", "kube-system", "subnets", "what kubeadm knows of subnets is not used",
          name="kubeadm-config"),
    Right("create", "services", "own", "subnets", "the service subnet is not learned from the API server's error"),
    Right("get", "configmaps", "manager", "installed", "the manager that an admin installed is not found",
          name="tpvpn"),
    Right("get", "secrets", "manager", "installed", "the manager that an admin installed cannot be used",
          name="tpvpn"),
    Right("get", "services/proxy", "manager", "way", "the fast way to the installed manager is closed", name=_PORT),
    Right("create", "pods/portforward", "manager", "way", "the slow way to the installed manager is closed",
          name="tpvpn-0"),
    Right("create", "secrets", "own", "own", "you cannot start a manager of your own"),
    Right("create", "configmaps", "own", "own", "you cannot start a manager of your own"),
    Right("list", "pods", "own", "own", "you cannot start a manager of your own"),
    Right("create", "jobs", "own", "own", "a manager of your own is a bare pod, which stays if this laptop vanishes",
          group="batch"),
    Right("delete", "jobs", "own", "own", "a manager of your own cannot be removed at the end", group="batch"),
    Right("patch", "jobs", "own", "own", "a manager of your own cannot be kept from being made twice", group="batch"),
    Right("get", "pods/proxy", "own", "own", "the fast way to a manager of your own is closed"),
    Right("create", "pods/portforward", "own", "own", "the slow way to a manager of your own is closed"),
)  # fmt: skip

Answers = Mapping[Right, bool | None]
"""Whether the user has each right; None: the API server does not say."""


def of_rights(answers: Answers, namespaces: Mapping[Scope, str], *, installed: bool) -> Iterator[Check]:
    """Each right that matters with the manager that there is; those of another kind of manager cost nothing."""
    for right, may in answers.items():
        if (installed and right.use == "own") or (not installed and right.use in ("installed", "way")):
            continue
        what = f"{right.verb} {right.resource}{_where(right, namespaces)}"
        if may is None:
            yield warning(_id(right), f"whether you may {what} cannot be asked", f"kubectl auth can-i {what}")
        elif may:
            yield Check(_id(right), f"you may {what}")
        else:
            yield warning(_id(right), f"you may not {what}: {right.without}", _command(right, namespaces))
    yield of_ways(answers, installed=installed)


def of_ways(answers: Answers, *, installed: bool) -> Check:
    """Whether what is allowed suffices for a session."""

    def lacks(*uses: tuple[str, str, str]) -> bool:
        return any(answers.get(one) is False for one in RIGHTS if (one.use, one.verb, one.resource) in uses)

    use: Use = "way" if installed else "own"
    proxy = "services/proxy" if installed else "pods/proxy"
    closed = lacks((use, "get", proxy)) and lacks((use, "create", "pods/portforward"))
    ask = "ask an admin for `tpvpn helm install --set 'users[0].kind=User,users[0].name=YOU'`"
    if installed and lacks(("installed", "get", "secrets")):
        return Check("rbac", "a manager is installed, and you may not read its Secret", ask)
    if closed:
        return Check("rbac", "you may use neither pods/proxy nor pods/portforward, so no way leads to a manager", ask)
    if not installed and lacks(*(("own", "create", one) for one in ("secrets", "configmaps")), ("own", "list", "pods")):
        return Check("rbac", "no manager is installed for you, and you may not start one of your own", ask)
    return Check("rbac", "what you may do suffices for a session")


def _id(right: Right) -> str:
    return f"rbac-{right.scope}-{right.verb}-{right.resource.replace('/', '-')}"


def _where(right: Right, namespaces: Mapping[Scope, str]) -> str:
    name = f" {right.name}" if right.name else ""
    return name + (
        f" in namespace {namespaces[right.scope]}"
        if right.scope in namespaces
        else " of all namespaces"
        if right.resource in ("services", "pods")
        else ""
    )


def _command(right: Right, namespaces: Mapping[Scope, str]) -> str:
    """What an admin allows it with."""
    namespace = namespaces.get(right.scope)
    kind, scope = ("role", f" --namespace {namespace}") if namespace else ("clusterrole", "")
    group = f".{right.group}" if right.group else ""
    resource, _, part = right.resource.partition("/")
    called = f"tpvpn-{right.verb}-{resource}"
    named = f" --resource-name {right.name}" if right.name else ""
    kinds = f"{resource}{group}" + (f"/{part}" if part else "")
    return (
        f"kubectl create {kind} {called} --verb {right.verb} --resource {kinds}{named}{scope} && "
        f"kubectl create {kind}binding {called} --{kind} {called} --user YOU{scope}"
    )
