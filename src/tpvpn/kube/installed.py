"""The manager that an admin installed for everyone, as its objects in the cluster tell of it (`chart/`).

All of them have one fixed name, so that a user needs no right to list anything: `get` on a ConfigMap and on a Secret.
"""

import base64
import binascii
import contextlib
import hashlib
import ssl
from dataclasses import dataclass
from typing import Any

from tpvpn.errors import ManagerError, UsageError
from tpvpn.kube.api import Cluster
from tpvpn.kube.refusal import ForbiddenError, MissingError
from tpvpn.proto.token import first_token

NAME = "tpvpn"
"""Of each object, and of the namespace unless the user names another."""


@dataclass(frozen=True, slots=True)
class Installed:
    """What its ConfigMap says."""

    namespace: str
    port: int
    replicas: int
    encrypted: bool
    client: bytes
    """The clients' configuration (YAML)."""

    @property
    def source(self) -> str:
        """Where the clients' configuration is, for its readers."""
        return f"configmap {self.namespace}/{NAME}"

    @property
    def pods(self) -> list[str]:
        """Its pods' names: a StatefulSet numbers them."""
        return [f"{NAME}-{number}" for number in range(self.replicas)]


@dataclass(frozen=True, slots=True)
class Credentials:
    """What opens a session with it. `pin`: the SHA-256 of its certificate, where it encrypts end to end."""

    token: bytes
    pin: bytes | None


async def installed(cluster: Cluster, namespace: str) -> Installed | None:
    """The manager of this namespace; None when there is none, or it is not for this user. ClusterError."""
    try:
        found = await cluster.get(f"/api/v1/namespaces/{namespace}/configmaps/{NAME}")
        data: dict[str, str] = found.get("data") or {}
        port, replicas = int(data["port"]), int(data.get("replicas", "1"))
        if not 0 < port < 65536 or replicas < 1:
            raise ValueError
        return Installed(
            namespace,
            port,
            replicas,
            data.get("encryption") == "always",
            data.get("client.yaml", "").encode(),
        )
    except (ForbiddenError, MissingError):
        return None
    except (KeyError, ValueError):
        raise ManagerError(
            f"configmap {namespace}/{NAME} is not what `tpvpn helm install` makes: install tpvpn again"
        ) from None


async def credentials(cluster: Cluster, manager: Installed, *, admin: bool = False) -> Credentials:
    """As they are now: tokens are rotated. `admin`: the token for everybody's sessions, for whoever may read that.

    Errors: ClusterError, ForbiddenError among them; ManagerError.
    """
    secrets = f"/api/v1/namespaces/{manager.namespace}/secrets"
    found: Any = await cluster.get(f"{secrets}/{NAME}")
    whose: Any = found
    if admin:
        with contextlib.suppress(ForbiddenError, MissingError):
            whose = await cluster.get(f"{secrets}/{NAME}-admin")
    try:
        token = first_token(base64.b64decode(whose["data"]["tokens"]).decode())
        certificate = base64.b64decode(found["data"]["tls.crt"]).decode() if manager.encrypted else None
        pin = hashlib.sha256(ssl.PEM_cert_to_DER_cert(certificate)).digest() if certificate else None
    except (KeyError, ValueError, TypeError, binascii.Error, UsageError):
        raise ManagerError(
            f"secret {manager.namespace}/{NAME} is not what `tpvpn helm install` makes: install tpvpn again"
        ) from None
    return Credentials(token, pin)
