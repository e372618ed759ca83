"""The objects of an ephemeral manager, as the API wants them. Pure: names and bytes in, JSON out.

They are what PodSecurity `restricted` admits: nobody, no capability, a root that is read-only, no account of the
cluster. The one sysctl, which counts as safe, lets the process answer ping.
"""

import base64
from dataclasses import dataclass
from typing import Any

PORT = 7070
IMAGE = "docker.io/library/python:3.13-slim"
DEADLINE = 24 * 3600
"""Seconds after which a manager ends, whoever uses it."""
LINGER, IDLE = 600, 60
"""Seconds for which it keeps a session without a connection, and after which it ends without any session."""
KEPT = 60
"""Seconds that the cluster keeps an ended Job."""
_NOBODY = 65534
_ZIPAPP, _TOKENS = "/opt/tpvpn/manager.pyz", "/run/tpvpn/tokens"

Object = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Ephemeral:
    """What an ephemeral manager is to be."""

    name: str
    namespace: str
    image: str = IMAGE
    pull_secrets: tuple[str, ...] = ()


def labels(name: str) -> dict[str, str]:
    """By which its objects are found."""
    return {"app.kubernetes.io/name": "tpvpn-manager", "app.kubernetes.io/instance": name}


def job(wanted: Ephemeral) -> Object:
    """The Job, suspended until what it owns is there."""
    return _object("batch/v1", "Job", wanted) | {
        "spec": {
            "suspend": True,
            "backoffLimit": 2,
            "activeDeadlineSeconds": DEADLINE,
            "ttlSecondsAfterFinished": KEPT,
            "template": {"metadata": {"labels": labels(wanted.name)}, "spec": _pod_spec(wanted)},
        }
    }


def pod(wanted: Ephemeral) -> Object:
    """The pod alone, for users who may create no Job."""
    return _object("v1", "Pod", wanted) | {"spec": _pod_spec(wanted) | {"activeDeadlineSeconds": DEADLINE}}


def secret(wanted: Ephemeral, token: bytes, owner: Object) -> Object:
    """The Secret with the token."""
    data = {"tokens": base64.b64encode(b"user: " + token + b"\n").decode()}
    return _object("v1", "Secret", wanted, owner) | {"type": "Opaque", "data": data}


def config_map(wanted: Ephemeral, zipapp: bytes, owner: Object) -> Object:
    """The ConfigMap with the program."""
    return _object("v1", "ConfigMap", wanted, owner) | {
        "binaryData": {"manager.pyz": base64.b64encode(zipapp).decode()}
    }


def _object(version: str, kind: str, wanted: Ephemeral, owner: Object | None = None) -> Object:
    metadata: Object = {"name": wanted.name, "namespace": wanted.namespace, "labels": labels(wanted.name)}
    if owner:
        reference = {"apiVersion": owner["apiVersion"], "kind": owner["kind"], "name": wanted.name}
        metadata["ownerReferences"] = [reference | {"uid": owner["metadata"]["uid"]}]
    return {"apiVersion": version, "kind": kind, "metadata": metadata}


def _pod_spec(wanted: Ephemeral) -> Object:
    user = {"runAsNonRoot": True, "runAsUser": _NOBODY, "runAsGroup": _NOBODY, "fsGroup": _NOBODY}
    return {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": 5,
        "imagePullSecrets": [{"name": name} for name in wanted.pull_secrets],
        "securityContext": user
        | {
            "seccompProfile": {"type": "RuntimeDefault"},
            "sysctls": [{"name": "net.ipv4.ping_group_range", "value": "0 2147483647"}],
        },
        "containers": [_container(wanted)],
        "volumes": [
            {"name": "program", "configMap": {"name": wanted.name}},
            {"name": "tokens", "secret": {"secretName": wanted.name, "defaultMode": 0o440}},
        ],
    }


def _container(wanted: Ephemeral) -> Object:
    options = ["--listen", f"*:{PORT}", "--exit", "socket", "--token-file", _TOKENS]
    options += ["--linger", str(LINGER), "--until-idle", str(IDLE)]
    return {
        "name": "manager",
        "image": wanted.image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["python3", _ZIPAPP, "manager", *options],
        "ports": [{"name": "session", "containerPort": PORT}],
        "readinessProbe": {"httpGet": {"path": "/healthz", "port": PORT}, "periodSeconds": 1},
        "resources": {
            "requests": {"cpu": "100m", "memory": "64Mi"},
            "limits": {"cpu": "4", "memory": "512Mi"},
        },
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "program", "mountPath": "/opt/tpvpn", "readOnly": True},
            {"name": "tokens", "mountPath": "/run/tpvpn", "readOnly": True},
        ],
    }
