"""The flags that name a cluster and the manager in it: kubectl's own where it has one."""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from tpvpn.cli.naming import naming
from tpvpn.cli.routing import routing
from tpvpn.rundir import DEFAULT_NAME

if TYPE_CHECKING:
    from tpvpn.cluster import Options
    from tpvpn.kube.access import Access
    from tpvpn.kube.api import Cluster
    from tpvpn.kube.installed import Installed
    from tpvpn.route.verdict import Request
    from tpvpn.wishes import FromCluster

_REPEATED = (
    *("--manager", "--token-file", "--tls-pin", "--kubeconfig", "--context", "--namespace", "--as", "--as-group"),
    *("--manager-namespace", "--ephemeral", "--no-ephemeral", "--transport", "--image", "--image-pull-secret"),
    *("--name", "--dns"),
)


def add_cluster_flags(parser: argparse.ArgumentParser) -> "argparse._ArgumentGroup":  # pyright: ignore[reportPrivateUsage]
    """Add the flags that kubectl has too."""
    group = parser.add_argument_group("cluster", "as for kubectl; used unless subnets and manager are given by hand")
    group.add_argument("--kubeconfig", metavar="F", help="the kubeconfig (default: KUBECONFIG, or ~/.kube/config)")
    group.add_argument("--context", metavar="NAME", help="its context (default: the current one)")
    group.add_argument("-n", "--namespace", metavar="NAME", help="the namespace (default: the context's)")
    group.add_argument("--as", dest="as_user", metavar="USER", help="impersonate this user")
    group.add_argument("--as-group", action="append", default=[], metavar="GROUP", help="and this group (repeatable)")
    group.add_argument(
        "--request-timeout", type=_seconds, default=10.0, metavar="S", help="for a request to the API server (10)"
    )
    return group


def _seconds(text: str) -> float:
    """Seconds as kubectl writes them too, "5s"."""
    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(text.removesuffix("s"))) < float("inf"):
            return seconds
    raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")


def add_manager_namespace(group: "argparse._ArgumentGroup") -> None:  # pyright: ignore[reportPrivateUsage]
    """Add the one flag that says where a manager is."""
    group.add_argument(
        "--manager-namespace",
        metavar="NAME",
        help="where the manager is (default: tpvpn, if one is installed there, else one of your own in --namespace)",
    )


def add_manager_flags(group: "argparse._ArgumentGroup") -> None:  # pyright: ignore[reportPrivateUsage]
    """Add the flags of a manager in the cluster."""
    from tpvpn.kube.manifest import IMAGE

    add_manager_namespace(group)
    own = group.add_mutually_exclusive_group()
    own.add_argument("--ephemeral", action="store_true", help="start a manager of your own, even if one is installed")
    own.add_argument("--no-ephemeral", action="store_true", help="use the manager that is installed, or none")
    group.add_argument(
        "--transport",
        choices=("auto", "upgrade", "portforward"),
        default="auto",
        help="the way through the API server (auto: upgrade, else portforward, which is slower)",
    )
    group.add_argument("--image", default=IMAGE, help=f"a Python for the manager that is started ({IMAGE})")
    group.add_argument("--image-pull-secret", action="append", default=[], metavar="NAME", help="pulls it (repeatable)")


def access(arguments: argparse.Namespace) -> "Access":
    """How the cluster is reached; from here on this process is an ordinary user's, as whoever reads a kubeconfig is."""
    from tpvpn.helper import rights
    from tpvpn.kube.access import Access

    rights.give_up()
    return Access(
        kubeconfig=arguments.kubeconfig,
        context=arguments.context,
        namespace=arguments.namespace,
        user=arguments.as_user,
        groups=tuple(arguments.as_group),
        timeout=arguments.request_timeout,
    )


def request_of(arguments: argparse.Namespace, *found: Any) -> "Request":
    """What `routing` makes of the flags; the commands of its fixes repeat those about the cluster too."""
    request = routing(arguments, *found)
    return replace(request, policy=replace(request.policy, given=(*request.policy.given, *_given(arguments))))


def _given(arguments: argparse.Namespace) -> Iterator[str]:
    """The words about session, cluster and manager, which a command to paste repeats."""
    from tpvpn.kube.manifest import IMAGE

    usual = {"transport": "auto", "image": IMAGE, "name": DEFAULT_NAME, "dns": "auto"}
    for flag in _REPEATED:
        name = {"--as": "as_user"}.get(flag, flag.removeprefix("--").replace("-", "_"))
        value: str | bool | list[str] | None = getattr(arguments, name, None)  # `plan` has some of them
        if value is True:
            yield flag
        elif isinstance(value, list):
            yield from (word for one in value for word in (flag, one))
        elif value and value != usual.get(name):
            yield from (flag, value)


async def wishes_of(
    arguments: argparse.Namespace, cluster: "Cluster", admins: "Installed | None", say: Callable[[str], None]
) -> "FromCluster":
    """What the flags ask for, and what a look at the cluster adds to it. Errors: ClusterError, UsageError."""
    from tpvpn.wishes import FromCluster

    wishes = FromCluster(cluster, admins, partial(request_of, arguments), partial(naming, arguments), say)
    await wishes.look()
    return wishes


def manager_options(arguments: argparse.Namespace) -> "Options":
    """What the manager is to be."""
    from tpvpn.cluster import Options

    return Options(
        arguments.manager_namespace,
        arguments.image,
        tuple(arguments.image_pull_secret),
        ephemeral=True if arguments.ephemeral else False if arguments.no_ephemeral else None,
        way=arguments.transport,
    )
