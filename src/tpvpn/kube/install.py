"""An ephemeral manager: made in the user's namespace, used by the same user's next session too, removed at the end.

The Job owns Secret and ConfigMap, so that whatever removes it removes all: this process, the cluster's own clock when
the laptop has vanished, or a user with kubectl. What the user may not do is said before anything is created.
"""

import asyncio
import base64
import contextlib
import hashlib
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from tpvpn.errors import ClusterError, ManagerError
from tpvpn.kube import manifest, zipapp
from tpvpn.kube.api import Cluster
from tpvpn.kube.manifest import PORT, Ephemeral, Object
from tpvpn.kube.refusal import ExistsError, ForbiddenError, MissingError
from tpvpn.proto.token import first_token

PATIENCE = 90.0
"""Seconds for a manager to be ready, its image pulled."""
_POLL = 0.2
_BEGINNING = 10.0
"""Seconds in which a Job without a pod is one that another session is making (by the API server's clock)."""
_HOPELESS = ("ErrImageNeverPull", "InvalidImageName", "ErrImagePull", "ImagePullBackOff", "CreateContainerConfigError",
             "CreateContainerError", "RunContainerError", "CrashLoopBackOff")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Manager:
    """A manager that is ready."""

    namespace: str
    pod: str
    port: int
    token: bytes


class Installer:
    """Makes, finds and removes one user's ephemeral manager; `say` is told of warnings."""

    def __init__(self, cluster: Cluster, wanted: Ephemeral, say: Callable[[str], None]) -> None:
        self._cluster, self._wanted, self._say = cluster, wanted, say
        self._kind, self._uid = "jobs", ""
        self.used = False
        """There is one, made by this process or by another session of the same user."""

    async def manager(self) -> Manager:
        """The one that runs already, else a new one. Errors: ClusterError, ManagerError, with nothing left behind."""
        found = await self.running()
        if found:
            return found
        await self._check()
        try:
            return await self._make()
        except BaseException as error:
            quicker = isinstance(error, ExistsError) and not self.used  # another session of this user was
            if quicker and (found := await self.running()):
                return found
            await self.remove()
            raise

    async def remove(self) -> None:
        """Remove it, and with it all that it owns."""
        if self.used:
            self.used = False
            with contextlib.suppress(MissingError):
                await self._delete()
                await self._until_free()

    async def running(self) -> Manager | None:
        """The one that another session of this user started, when it is ready; None when there is none to be."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            try:
                pod = await self._pod()
                if not pod or _hopeless(pod):
                    if pod or not await self._is_beginning():
                        return None
                elif _is_ready(pod):
                    kept = await self._cluster.get(self._path("secrets", self._wanted.name))
                    token = first_token(base64.b64decode(kept["data"]["tokens"]).decode())
                    self._kind = "jobs" if pod["metadata"].get("ownerReferences") else "pods"
                    self.used = True
                    return Manager(self._wanted.namespace, pod["metadata"]["name"], PORT, token)
            except (ForbiddenError, MissingError):
                return None
            await asyncio.sleep(_POLL)
        return None

    async def _is_beginning(self) -> bool:
        """Whether there is a Job that is to have a pod soon: young, or at work."""
        return _begins(await self._cluster.get(self._path("jobs", self._wanted.name)))

    async def _check(self) -> None:
        """Say what is not allowed before anything is created."""
        namespace = self._wanted.namespace
        missing = await self._missing([("create", "secrets"), ("create", "configmaps"), ("list", "pods")])
        jobs = await self._missing([("create", "jobs"), ("patch", "jobs"), ("delete", "jobs")])
        if jobs and not await self._missing([("create", "pods"), ("delete", "pods")]):
            self._say("warning: you may not create jobs: a bare pod is used, which stays if this laptop vanishes")
            self._kind, jobs = "pods", []
        ways = await self._missing([("get", "pods/proxy"), ("get", "pods/portforward"), ("create", "pods/portforward")])
        missing += jobs + (ways if len(ways) == 3 else [])
        if missing:
            raise ForbiddenError(
                f"no manager runs in namespace {namespace}, and you may not start one there ({', '.join(missing)}): "
                "name another with --manager-namespace, or ask an admin to install tpvpn"
            )

    async def _missing(self, needed: Sequence[tuple[str, str]]) -> list[str]:
        """What of this the user may not do."""
        asked = [
            self._cluster.may(
                verb, resource, group="batch" if resource == "jobs" else "", namespace=self._wanted.namespace
            )
            for verb, resource in needed
        ]
        allowed = await asyncio.gather(*asked)
        return [f"{verb} {resource}" for (verb, resource), may in zip(needed, allowed, strict=True) if not may]

    async def _make(self) -> Manager:
        wanted, cluster = self._wanted, self._cluster
        await self._clear()
        token = secrets.token_hex(32).encode()
        made = manifest.job(wanted) if self._kind == "jobs" else manifest.pod(wanted)
        self.used = True
        try:
            owner = await cluster.request("POST", self._path(self._kind), made)
        except ExistsError:
            self.used = False
            raise
        owner |= {"apiVersion": made["apiVersion"], "kind": made["kind"]}
        self._uid = owner["metadata"]["uid"]
        await asyncio.gather(
            cluster.request("POST", self._path("secrets"), manifest.secret(wanted, token, owner)),
            cluster.request("POST", self._path("configmaps"), manifest.config_map(wanted, zipapp.build(), owner)),
        )
        if self._kind == "jobs":
            resume = {"spec": {"suspend": False}}
            merge = "application/merge-patch+json"
            await cluster.request("PATCH", self._path("jobs", wanted.name), resume, content_type=merge)
        pod = await self._ready()
        return Manager(wanted.namespace, pod["metadata"]["name"], PORT, token)

    async def _ready(self) -> Object:
        deadline = time.monotonic() + PATIENCE
        while True:
            pod = await self._pod()
            if pod and _is_ready(pod):
                return pod
            reason = _hopeless(pod) if pod else await self._refused()
            if reason or time.monotonic() > deadline:
                late = f"was not ready within {PATIENCE:g} s"
                raise ManagerError(f"the manager {self._wanted.namespace}/{self._wanted.name} {reason or late}")
            await asyncio.sleep(_POLL)

    async def _pod(self) -> Object | None:
        selector = ",".join(f"{key}={value}" for key, value in manifest.labels(self._wanted.name).items())
        found = await self._cluster.get(self._path("pods"), labelSelector=selector)
        pods: list[Object] = [one for one in found["items"] if not one["metadata"].get("deletionTimestamp")]
        return max(pods, key=lambda one: one["metadata"]["creationTimestamp"], default=None)

    async def _refused(self) -> str | None:
        """Why the Job has no pod: what admission or a quota said of it."""
        if self._kind != "jobs":
            return None
        selector = f"involvedObject.uid={self._uid},reason=FailedCreate"  # the one before had the same name
        try:
            events = await self._cluster.get(self._path("events"), fieldSelector=selector)
        except ForbiddenError:
            return None
        said = [event["message"] for event in events["items"]]
        return f"cannot be started: {said[-1]}" if said else None

    async def _clear(self) -> None:
        """Remove one that has ended, and no other: another session may be making one just now."""
        with contextlib.suppress(MissingError, ForbiddenError):
            found = await self._cluster.get(self._path(self._kind, self._wanted.name))
            if _begins(found) if self._kind == "jobs" else not _hopeless(found):
                return
            await self._delete(uid=found["metadata"]["uid"])
        await self._until_free()

    async def _delete(self, **preconditions: str) -> None:
        how = {"propagationPolicy": "Background", "gracePeriodSeconds": 0, "preconditions": preconditions}
        await self._cluster.request("DELETE", self._path(self._kind, self._wanted.name), how)

    async def _until_free(self) -> None:
        """Wait until its name is free."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                await self._cluster.get(self._path("secrets", self._wanted.name))
            except ClusterError:
                return
            await asyncio.sleep(_POLL)

    def _path(self, resource: str, name: str = "") -> str:
        base = "/apis/batch/v1" if resource == "jobs" else "/api/v1"
        return f"{base}/namespaces/{self._wanted.namespace}/{resource}" + (f"/{name}" if name else "")


async def name_for(cluster: Cluster) -> str:
    """The name of this user's manager: the same for each session of the user, another for others."""
    try:
        review = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
        answer = await cluster.request("POST", "/apis/authentication.k8s.io/v1/selfsubjectreviews", review)
        user = answer["status"]["userInfo"]["username"]
    except (ClusterError, KeyError, TypeError):
        user = cluster.context
    return f"tpvpn-{hashlib.sha256(user.encode()).hexdigest()[:10]}"


def _is_ready(pod: Object) -> bool:
    conditions: Any = pod.get("status", {}).get("conditions") or []
    return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)


def _begins(job: Object) -> bool:
    """Whether a Job without a pod is to have one soon."""
    conditions: list[Object] = job.get("status", {}).get("conditions") or []
    ended = any(one["type"] in ("Complete", "Failed") and one["status"] == "True" for one in conditions)
    if ended or job["metadata"].get("deletionTimestamp"):
        return False
    made = datetime.fromisoformat(job["metadata"]["creationTimestamp"])
    return (datetime.now(UTC) - made).total_seconds() < _BEGINNING


def _hopeless(pod: Object) -> str | None:
    """Why a pod will not become ready, in words; None while it may."""
    status: Object = pod.get("status", {})
    containers: list[Object] = status.get("containerStatuses") or []
    for container in containers:
        waiting: Object = container.get("state", {}).get("waiting") or {}
        if waiting.get("reason") in _HOPELESS:
            return f"cannot start: {waiting['reason']}: {waiting.get('message', 'no reason given')}"
    if status.get("phase") in ("Failed", "Succeeded"):
        return f"has ended: {status.get('message') or status.get('reason') or 'see the log of its pod'}"
    return None
