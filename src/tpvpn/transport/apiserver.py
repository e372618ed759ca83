"""Through the API server to a manager's port: by an upgrade of a pod's proxy, or by its port-forward.

`upgrade` is the faster: behind the 101 there are raw bytes, and the hop from the API server to the pod is plain, like
what leaves the manager. It needs `get` on the proxy subresource, by the full NAME:PORT, and an API server that reaches
pods. `portforward` needs `get` and `create` on pods/portforward.
"""

import base64
import os
import ssl
import urllib.parse
import urllib.request
from abc import ABC, abstractmethod
from dataclasses import dataclass

from tpvpn.errors import ClusterError
from tpvpn.kube.api import Cluster
from tpvpn.kube.refusal import refusal
from tpvpn.transport.inner_tls import InnerTlsStream, encrypted
from tpvpn.transport.stream import NO_CERTIFICATE, Stream
from tpvpn.transport.tcp import authority, connect, first, resolve
from tpvpn.transport.upgrade import ENCRYPTED, PATH, PROTOCOL, RefusedUpgradeError, upgrade
from tpvpn.transport.websocket import WebSocketStream


@dataclass(frozen=True, slots=True)
class Target:
    """A manager in the cluster: `kind` "pods" or "services"."""

    namespace: str
    kind: str
    name: str
    port: int

    def __str__(self) -> str:
        return f"{self.kind}/{self.namespace}/{self.name}:{self.port}"


class ThroughApiServer(ABC):
    """A transport through the API server to one manager; encrypted end to end when the manager's certificate is pinned.

    `pin` is the SHA-256 of that certificate.
    """

    purpose = "the API server"
    word: str

    def __init__(self, cluster: Cluster, target: Target, token: bytes, pin: bytes | None = None) -> None:
        self.token = token
        self._pin = pin
        self._cluster, self._target = cluster, target
        self._proxy = proxy_of(cluster)

    @property
    def name(self) -> str:
        """As `status` shows it."""
        return f"{self.word} through {self._cluster.server} to {self._target}"

    async def resolve(self) -> list[str]:
        """The addresses of the API server, or of the proxy before it; ManagerError when there are none."""
        return await resolve(*next_hop(self._cluster), self.purpose)

    async def dial(self, addresses: list[str]) -> tuple[Stream, bytes]:
        """A stream on which frames may begin. ClusterError when the API server refuses, else ManagerError."""
        headers = await self._cluster.headers()
        whom = f"{self.purpose} at {self._authority}"
        return await first(addresses, lambda address: self._dial(address, headers), whom, self._cluster.timeout)

    @abstractmethod
    async def _open(self, stream: Stream, headers: list[tuple[str, str]]) -> tuple[Stream, bytes]:
        """From a connection to the API server to the manager's port."""

    @property
    def _authority(self) -> str:
        return authority(self._cluster.endpoint.host, self._cluster.endpoint.port)

    async def _dial(self, address: str, headers: list[tuple[str, str]]) -> tuple[Stream, bytes]:
        stream = Stream(await connect(address, next_hop(self._cluster)[1]))
        try:
            if self._proxy:
                await open_tunnel(stream, self._authority, self._proxy)
            stream = await secured(stream, self._cluster)
            return await self._open(stream, headers)
        except RefusedUpgradeError as error:
            stream.close()
            raise refusal(error.status, error.body, self._cluster.server, f"reach {self._target}") from error
        except BaseException:
            stream.close()
            raise

    def _path(self, subresource: str) -> str:
        target = self._target
        port = f":{target.port}" if subresource == "proxy" else ""
        of = f"/api/v1/namespaces/{target.namespace}/{target.kind}/{target.name}{port}/{subresource}"
        return self._cluster.endpoint.base + of


class Upgrade(ThroughApiServer):
    """Raw bytes by an HTTP/1.1 upgrade of the pod's, or the service's, proxy."""

    word = "upgrade"

    async def _open(self, stream: Stream, headers: list[tuple[str, str]]) -> tuple[Stream, bytes]:
        protocol = ENCRYPTED if self._pin else PROTOCOL
        early = await upgrade(stream, self._authority, self._path("proxy") + PATH, headers, protocol)
        if self._pin:
            return await encrypted(stream, early, self._pin, f"the manager {self._target}"), b""
        return stream, early


class PortForward(ThroughApiServer):
    """A WebSocket of the pod's port-forward: through the kubelet, slower, but allowed to more users."""

    word = "portforward"

    async def _open(self, stream: Stream, headers: list[tuple[str, str]]) -> tuple[Stream, bytes]:
        key = base64.b64encode(os.urandom(16)).decode()
        asked = [
            ("Sec-WebSocket-Key", key),
            ("Sec-WebSocket-Version", "13"),
            ("Sec-WebSocket-Protocol", "v4.channel.k8s.io"),
        ]
        path = f"{self._path('portforward')}?ports={self._target.port}"
        early = await upgrade(stream, self._authority, path, [*headers, *asked], "websocket")
        inside: Stream = WebSocketStream(stream, early)
        if self._pin:
            inside = await encrypted(inside, b"", self._pin, f"the manager {self._target}")
        return inside, await upgrade(inside, f"{self._target.name}:{self._target.port}")


async def secured(stream: Stream, cluster: Cluster) -> Stream:
    """The connection to the API server, with TLS if it has that; its certificate is not the manager's."""
    endpoint = cluster.endpoint
    if endpoint.tls is None:
        return stream
    inside = InnerTlsStream(stream, endpoint.tls, server_name=endpoint.server_name)
    try:
        await inside.handshake()
    except ssl.SSLCertVerificationError as error:
        raise ClusterError(
            f"{cluster.server} has a certificate that the kubeconfig does not trust: {error.verify_message}"
        ) from error
    inside.certificate_hash = NO_CERTIFICATE
    return inside


def next_hop(cluster: Cluster) -> tuple[str, int]:
    """Host and port of the API server, or of the proxy before it."""
    proxy = proxy_of(cluster)
    if proxy:
        return proxy.hostname or "", proxy.port or 80
    return cluster.endpoint.host, cluster.endpoint.port


def proxy_of(cluster: Cluster) -> urllib.parse.SplitResult | None:
    """The HTTP proxy before the API server: the kubeconfig's proxy-url, else the environment's, as kubectl has it."""
    url = cluster.endpoint.proxy
    if not url and not urllib.request.proxy_bypass(cluster.endpoint.host):
        url = urllib.request.getproxies().get("https" if cluster.endpoint.tls else "http")
    if not url:
        return None
    parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme != "http":
        raise ClusterError(f"the proxy {parts.scheme}://{parts.hostname} cannot be used: only http:// proxies can")
    return parts


async def open_tunnel(stream: Stream, authority: str, proxy: urllib.parse.SplitResult) -> None:
    """CONNECT through an HTTP proxy (RFC 9110 section 9.3.6); ClusterError when it refuses."""
    lines = [f"CONNECT {authority} HTTP/1.1", f"Host: {authority}"]
    if proxy.username is not None:
        words = f"{urllib.parse.unquote(proxy.username)}:{urllib.parse.unquote(proxy.password or '')}"
        lines.append(f"Proxy-Authorization: Basic {base64.b64encode(words.encode()).decode()}")
    await stream.send_all("\r\n".join([*lines, "", ""]).encode())
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        more = await stream.receive(1)  # not a byte beyond: TLS begins there
        head += more
        if not more or len(head) > 8192:
            raise ClusterError(f"the proxy {proxy.hostname} closed the connection: check proxy-url or HTTPS_PROXY")
    status = head.split(None, 2)[1:2]
    if status != [b"200"]:
        said = head.partition(b"\r\n")[0].decode("latin-1")
        raise ClusterError(f"the proxy {proxy.hostname} does not connect to {authority}: it answered {said!r}")
