"""`upgrade`: straight through the API server's proxy of a pod or service, by an HTTP/1.1 upgrade that it passes on.

Behind the 101 there are raw bytes to the manager's port. The hop from the API server to the pod is plain, like what
leaves the manager. It needs `get` on the proxy subresource, by the full NAME:PORT, and an API server that reaches pods.
"""

import base64
import socket
import ssl
import urllib.parse
import urllib.request
from dataclasses import dataclass

from tpvpn.errors import ClusterError
from tpvpn.kube.api import Cluster
from tpvpn.kube.refusal import refusal
from tpvpn.transport.stream import Stream, TlsStream, tls_handshake
from tpvpn.transport.tcp import connect, first, resolve
from tpvpn.transport.upgrade import PATH, RefusedUpgradeError, upgrade


@dataclass(frozen=True, slots=True)
class Target:
    """A manager in the cluster: `kind` "pods" or "services"."""

    namespace: str
    kind: str
    name: str
    port: int

    def __str__(self) -> str:
        return f"{self.kind}/{self.namespace}/{self.name}:{self.port}"


class ApiServerUpgrade:
    """The transport of this name."""

    purpose = "the API server"

    def __init__(self, cluster: Cluster, target: Target | None) -> None:
        self._cluster, self._target = cluster, target
        self._proxy = proxy_of(cluster)

    @property
    def name(self) -> str:
        """As `status` shows it."""
        return f"upgrade through {self._cluster.server}" + (f" to {self._target}" if self._target else "")

    async def resolve(self) -> list[str]:
        """The addresses of the API server, or of the proxy before it; ManagerError when there are none."""
        return await resolve(*self._next_hop(), self.purpose)

    def warning(self, addresses: list[str]) -> str | None:
        """Nothing: it is the way of kubectl."""
        return None

    async def dial(self, addresses: list[str]) -> tuple[Stream, bytes]:
        """A stream on which frames may begin. ClusterError when the API server refuses, else ManagerError."""
        headers = await self._cluster.headers()
        return await first(
            addresses, lambda address: self._dial(address, headers), f"{self.purpose} at {self._authority}"
        )

    def _next_hop(self) -> tuple[str, int]:
        if self._proxy:
            return self._proxy.hostname or "", self._proxy.port or 80
        return self._cluster.endpoint.host, self._cluster.endpoint.port

    @property
    def _authority(self) -> str:
        host, port = self._cluster.endpoint.host, self._cluster.endpoint.port
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def _dial(self, address: str, headers: list[tuple[str, str]]) -> tuple[Stream, bytes]:
        connected = await connect(address, self._next_hop()[1])
        stream = Stream(connected)
        try:
            if self._proxy:
                await open_tunnel(stream, self._authority, self._proxy)
            stream = await secured(connected, self._cluster)
            target = self._target
            assert target, "it is known before anything is dialled"
            of_target = f"/api/v1/namespaces/{target.namespace}/{target.kind}/{target.name}:{target.port}/proxy"
            path = self._cluster.endpoint.base + of_target + PATH
            try:
                return stream, await upgrade(stream, self._authority, path, headers)
            except RefusedUpgradeError as error:
                what = f"reach {target}"
                raise refusal(error.status, error.body, self._cluster.server, what) from error
        except BaseException:
            stream.close()
            connected.close()
            raise


async def secured(connected: socket.socket, cluster: Cluster) -> Stream:
    """The connection to the API server, with TLS if it has that; its certificate is not the manager's."""
    endpoint = cluster.endpoint
    if endpoint.tls is None:
        return Stream(connected)
    wrapped = endpoint.tls.wrap_socket(connected, server_hostname=endpoint.server_name, do_handshake_on_connect=False)
    try:
        await tls_handshake(wrapped)
    except ssl.SSLCertVerificationError as error:
        wrapped.close()
        raise ClusterError(
            f"{cluster.server} has a certificate that the kubeconfig does not trust: {error.verify_message}"
        ) from error
    except BaseException:
        wrapped.close()
        raise
    return TlsStream(wrapped, None)


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
