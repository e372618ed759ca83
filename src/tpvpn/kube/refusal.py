"""What an API server's answer means for its user: one sentence, with what to do next. Pure."""

import json
import re
import shlex
from typing import Any, TypeGuard, cast

from tpvpn.errors import ClusterError

Object = dict[str, Any]

_FORBIDDEN = re.compile(
    r'User "(?P<user>[^"]+)" cannot (?P<verb>\w+) resource "(?P<resource>[a-z0-9/-]+)" '
    r'in API group "(?P<group>[a-z0-9.-]*)" '
    r'(?:at the cluster scope|in the namespace "(?P<namespace>[a-z0-9-]+)")'
)
_LONGEST = 300


class ForbiddenError(ClusterError):
    """The user may not do this; the text has the command by which an admin allows it."""


class LoginError(ClusterError):
    """The kubeconfig does not log in, or nobody takes what it logs in with."""


class NoPluginError(LoginError):
    """The program that the kubeconfig has run to log in is not there."""


class NoKubeconfigError(ClusterError):
    """There is none."""


class UntrustedError(ClusterError):
    """The API server's certificate is of no authority that the kubeconfig trusts, or of another name, or time."""


class MissingError(ClusterError):
    """There is no such object, or no such API."""


class ExistsError(ClusterError):
    """There is one of this name already."""


class UnreadyError(ClusterError):
    """What is asked for is there, and no pod of it is ready."""


def refusal(status: int, body: bytes, server: str, what: str) -> ClusterError:
    """The error for an answer that is not 2xx; `what` was asked, as "list nodes"."""
    said = message_of(body)
    if said is None:
        return nonsense(server, status)
    if status == 401:
        return LoginError(f"{server} does not accept the credentials of the kubeconfig: log in to the cluster again")
    if status == 403:
        return ForbiddenError(_forbidden(said))
    if status == 404:
        return MissingError(f"{server} cannot {what}: {said}")
    kind = ExistsError if status == 409 else ClusterError
    if status == 503 and "no endpoints available" in said:  # ErrServiceUnavailable of the API server's proxy
        kind = UnreadyError
    return kind(f"{server} refused to {what} ({status}): {said}")


def nonsense(server: str, status: int = 200) -> ClusterError:
    """The error for an answer that is none of an API server."""
    return ClusterError(
        f"{server} answered {status} and nothing that an API server would say: check the kubeconfig's server"
    )


def answer_of(data: bytes, server: str) -> Object:
    """The object in an answer; ClusterError when it is none of the API."""
    try:
        answer: object = json.loads(data)
    except (ValueError, RecursionError):
        answer = None
    if isinstance(answer, dict) and "kind" in answer:
        return cast(Object, answer)
    raise nonsense(server)


def page_of(page: Object, server: str) -> tuple[list[Object], str]:
    """The objects of a page of a list, and where the next page begins, or ""."""
    items, metadata = page.get("items"), page.get("metadata")
    if not isinstance(items, list) or not isinstance(metadata, dict):
        raise nonsense(server)
    more = cast(Object, metadata).get("continue")
    return [one for one in cast(list[object], items) if _is_object(one)], str(more or "")


def event_of(line: bytes, server: str) -> Object:
    """An event of a watch: its `type`, and an `object`."""
    try:
        event: Any = json.loads(line)
    except (ValueError, RecursionError):
        event = None
    if isinstance(event, dict) and _is_object(found := cast(Object, event).get("object")):
        return {"type": str(cast(Object, event).get("type")), "object": found}
    raise nonsense(server)


def _is_object(found: object) -> TypeGuard[Object]:
    """Whether it looks like an object of the API, with metadata and, if any, a spec."""
    if not isinstance(found, dict):
        return False
    members = cast(Object, found)
    return isinstance(members.get("metadata"), dict) and isinstance(members.get("spec", {}), dict)


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
    user, verb, group = shlex.quote(found["user"]), found["verb"], found["group"]
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
