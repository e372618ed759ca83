"""How a cluster is named by its user, and where its API server is: values, and how a kubeconfig has them."""

import ssl
import urllib.parse
from dataclasses import dataclass
from typing import Any

from tpvpn.errors import ClusterError

CHECK_PROXY = "check proxy-url or HTTPS_PROXY"


@dataclass(frozen=True, slots=True)
class Access:
    """How a user names a cluster: kubectl's flags of the same names; `timeout` in seconds for one request."""

    kubeconfig: str | None = None
    context: str | None = None
    namespace: str | None = None
    user: str | None = None
    """--as: whom to be instead."""
    groups: tuple[str, ...] = ()
    timeout: float = 10.0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the API server is, for whoever opens a connection of their own."""

    host: str
    port: int
    base: str
    """The path before /api; "" mostly."""
    tls: ssl.SSLContext | None
    server_name: str
    proxy: str | None


def endpoint_of(configuration: Any) -> Endpoint:
    """Of kubernetes_asyncio's Configuration, logged in. ClusterError, OSError and ValueError of its certificates."""
    server = str(configuration.host)
    try:
        parts = urllib.parse.urlsplit(server)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError
    except ValueError:
        raise ClusterError(f"the kubeconfig's server {server!r} is no https:// URL: correct it") from None
    if configuration.proxy and not str(configuration.proxy).startswith("http://"):
        raise ClusterError(f"the kubeconfig's proxy-url cannot be used: only http:// proxies can; {CHECK_PROXY}")
    tls = None
    if parts.scheme == "https":
        tls = ssl.create_default_context(cafile=configuration.ssl_ca_cert)
        if configuration.cert_file:
            tls.load_cert_chain(configuration.cert_file, configuration.key_file)
        if not configuration.verify_ssl:
            tls.check_hostname = False
            tls.verify_mode = ssl.CERT_NONE
    host, port = parts.hostname, parts.port or (443 if tls else 80)
    return Endpoint(host, port, parts.path.rstrip("/"), tls, configuration.tls_server_name or host, configuration.proxy)
