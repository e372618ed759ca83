"""What an API server's answer means for its user: one sentence, with what to do next. Pure."""

import json
import re
from typing import Any, cast

from tpvpn.errors import ClusterError

_FORBIDDEN = re.compile(
    r'User "(?P<user>[^"]+)" cannot (?P<verb>\w+) resource "(?P<resource>[^"]+)" in API group "(?P<group>[^"]*)" '
    r'(?:at the cluster scope|in the namespace "(?P<namespace>[^"]+)")'
)
_LONGEST = 300


class ForbiddenError(ClusterError):
    """The user may not do this; the text has the command by which an admin allows it."""


class MissingError(ClusterError):
    """There is no such object, or no such API."""


class ExistsError(ClusterError):
    """There is one of this name already."""


def refusal(status: int, body: bytes, server: str, what: str) -> ClusterError:
    """The error for an answer that is not 2xx; `what` was asked, as "list nodes"."""
    said = message_of(body)
    if said is None:
        return ClusterError(
            f"{server} answered {status} and nothing that an API server would say: check the kubeconfig's server"
        )
    if status == 401:
        return ClusterError(f"{server} does not accept the credentials of the kubeconfig: log in to the cluster again")
    if status == 403:
        return ForbiddenError(_forbidden(said))
    if status == 404:
        return MissingError(f"{server} cannot {what}: {said}")
    kind = ExistsError if status == 409 else ClusterError
    return kind(f"{server} refused to {what} ({status}): {said}")


def message_of(body: bytes) -> str | None:
    """The message of a Status object on one line; None when it is none."""
    try:
        status: Any = json.loads(body)
    except ValueError:
        return None
    if not isinstance(status, dict) or cast(dict[str, Any], status).get("kind") != "Status":
        return None
    said = " ".join(str(cast(dict[str, Any], status).get("message", "no reason given")).split())
    return "".join(letter if letter.isprintable() else "?" for letter in said[:_LONGEST])


def _forbidden(said: str) -> str:
    found = _FORBIDDEN.search(said)
    if not found:
        return f"the API server forbids it: {said}"
    user, verb, group = found["user"], found["verb"], found["group"]
    resource, _, part = found["resource"].partition("/")
    name = f"tpvpn-{verb}-{resource}"
    kind, scope = ("role", f" --namespace {found['namespace']}") if found["namespace"] else ("clusterrole", "")
    kinds = resource + (f".{group}" if group else "") + (f"/{part}" if part else "")
    where = f" in namespace {found['namespace']}" if found["namespace"] else ""
    return (
        f"user {user} may not {verb} {kinds}{where}; an admin allows it with "
        f"`kubectl create {kind} {name} --verb {verb} --resource {kinds}{scope}` and "
        f"`kubectl create {kind}binding {name} --{kind} {name} --user {user}{scope}`"
    )
