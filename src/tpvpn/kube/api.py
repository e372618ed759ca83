"""The door to the API server: a kubeconfig becomes a `Cluster`, which answers requests with plain JSON.

The only user of kubernetes_asyncio: its loader knows contexts, exec plugins, tokens and certificates. It is imported
when a cluster is opened, since that takes half a second. Credentials are asked for anew whenever they are needed, so
that a token that has expired meanwhile is replaced. Files with keys, which the loader makes, are gone as soon as they
have been read.
"""

import asyncio
import contextlib
import logging
import os
import re
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpvpn.errors import ClusterError
from tpvpn.kube.access import CHECK_PROXY, Access, endpoint_of
from tpvpn.kube.kubeconfig import contexts_of, files
from tpvpn.kube.refusal import (
    ForbiddenError,
    LoginError,
    NoKubeconfigError,
    NoPluginError,
    UntrustedError,
    answer_of,
    event_of,
    nonsense,
    page_of,
    refusal,
)

if TYPE_CHECKING:
    from kubernetes_asyncio.client import ApiClient, Configuration
    from kubernetes_asyncio.config.kube_config import KubeConfigLoader

_log = logging.getLogger(__name__)

PAGE = 500
"""Objects a request, as kubectl asks."""
_WATCHED = 240
"""Seconds of one watch, after which the next one begins."""
_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
_MALFORMED = (ValueError, TypeError, AttributeError, KeyError, AssertionError)
"""What the loader raises for words that are not where, or what, they should be; beside its own ConfigException."""
_LONGEST = 300
"""Characters of what somebody else says of an error."""
_LARGEST_OBJECT, _LARGEST_LIST = 4 << 20, 64 << 20
"""Bytes: etcd takes no object above 1.5 MiB, and a page has PAGE of them."""
_VERBS = {"GET": "get", "POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}


class Cluster:
    """An API server, as one user; made by `opened`."""

    def __init__(
        self, access: Access, loader: "KubeConfigLoader | None", configuration: "Configuration", context: str
    ) -> None:
        self._access, self._loader, self._configuration = access, loader, configuration
        self.context, self.timeout = context, access.timeout
        self.server = str(configuration.host)
        self.namespace = access.namespace or _namespace_of(loader)
        self.date = ""
        """The API server's clock in its last answer (RFC 9110 section 5.6.7)."""
        self.certificate = ""
        """The one that the user logs in with, in PEM; "" for none."""
        self._client: ApiClient

    async def start(self) -> None:
        """Log in as the kubeconfig says."""
        from kubernetes_asyncio.client import ApiClient

        with _short_lived_files():
            await self._log_in()
            try:
                self.endpoint = endpoint_of(self._configuration)
                if file := str(self._configuration.cert_file or ""):
                    self.certificate = Path(file).read_text(errors="replace")
                self._client = ApiClient(self._configuration)
            except (OSError, ValueError) as error:  # SSLError is an OSError
                raise ClusterError(f"the kubeconfig's certificates cannot be used: {error}") from error
        self.server = str(self._configuration.host)

    async def close(self) -> None:
        """Close its connections."""
        await self._client.close()

    async def headers(self) -> list[tuple[str, str]]:
        """Who we are, in HTTP headers, with credentials that are valid now."""
        if self._loader:
            with _short_lived_files():
                await self._log_in()
        return await self._identity()

    async def _identity(self) -> list[tuple[str, str]]:
        token = await self._configuration.get_api_key_with_prefix("BearerToken")
        headers = [("User-Agent", "tpvpn"), ("Accept", "application/json, */*")]
        headers += [("Authorization", token)] if token else []
        headers += [("Impersonate-User", self._access.user)] if self._access.user else []
        return headers + [("Impersonate-Group", group) for group in self._access.groups]

    async def _log_in(self) -> None:
        from kubernetes_asyncio.config import ConfigException

        if not self._loader:
            return
        try:
            await self._loader.load_and_set(self._configuration)  # pyright: ignore[reportUnknownMemberType]
        except (ConfigException, OSError, *_MALFORMED) as error:
            user: Any = self._loader._user  # pyright: ignore[reportPrivateUsage]
            kind = LoginError
            if not user or "exec" not in user:
                kind, reason = ClusterError, f"cannot be used: {_plain(error)}"
            elif isinstance(error, FileNotFoundError):
                kind = NoPluginError
                reason = f"runs {user['exec']['command']}, which is not there: PATH is {os.environ.get('PATH')}"
            else:
                reason = f"runs {user['exec']['command']}, which does not log in: {_plain(error)}"
            raise kind(f"context {self.context} of the kubeconfig {reason}") from error

    # -- requests ------------------------------------------------------------------------------------------------------

    async def get(self, path: str, **query: str) -> dict[str, Any]:
        """GET a path such as /api/v1/nodes. Errors: every ClusterError."""
        return await self.request("GET", path, query=query)

    async def items(self, path: str, **query: str) -> AsyncIterator[dict[str, Any]]:
        """The objects of a list, page by page."""
        more = ""
        while True:
            page = await self.get(path, limit=str(PAGE), **query, **({"continue": more} if more else {}))
            items, more = page_of(page, self.server)
            for item in items:
                yield item
            if not more:
                return

    async def request(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        query: Mapping[str, str] | None = None,
        content_type: str = "application/json",
    ) -> dict[str, Any]:
        """One request; an expired credential is renewed once. Errors: every ClusterError."""

        async def send(identity: list[tuple[str, str]]) -> tuple[int, bytes]:
            try:
                answer = await self._open(method, path, body, query, content_type, identity, self.timeout)
                return answer.status, await self._body(answer)
            except TimeoutError:
                raise ClusterError(
                    f"{self.server} did not answer within {self.timeout:g} s: is the VPN up that leads to it?"
                ) from None

        status, data = await send(await self._identity())
        _log.debug("%s %s: %d, %d bytes", method, path, status, len(data))
        if status == 401 and self._loader:
            _log.debug("the credential is not taken any more: another is asked for")
            status, data = await send(await self.headers())
        if not 200 <= status < 300:
            raise refusal(status, data, self.server, _words(method, path))
        return answer_of(data, self.server)

    async def _open(
        self,
        method: str,
        path: str,
        body: object,
        query: Mapping[str, str] | None,
        content_type: str,
        identity: list[tuple[str, str]],
        timeout: float,
    ) -> Any:
        """The answer's head, and what gives its body. ClusterError, TimeoutError."""
        import aiohttp
        from multidict import CIMultiDict

        headers: Any = CIMultiDict([*identity, ("Content-Type", content_type)])
        try:
            client: Any = self._client.rest_client
            answer: Any = await client.request(
                method,
                self.server + path,
                query_params=list((query or {}).items()),
                headers=headers,
                body=body,
                _preload_content=False,
                _request_timeout=timeout,
            )
            self.date = str(answer.headers.get("Date", ""))
            return answer
        except TimeoutError:
            raise
        except aiohttp.ClientConnectorCertificateError as error:
            raise UntrustedError(
                f"{self.server} has a certificate that the kubeconfig does not trust: {error.certificate_error}"
            ) from error
        except aiohttp.ClientHttpProxyError as error:
            raise ClusterError(
                f"the proxy does not connect to {self.server}: "
                f"it answered {error.status} {error.message}; {CHECK_PROXY}"
            ) from error
        except aiohttp.ClientConnectorError as error:
            if error.host == self.endpoint.host:
                raise ClusterError(f"cannot reach the API server {self.server}: {_plain(error.os_error)}") from error
            raise ClusterError(
                f"cannot reach the proxy {error.host} before {self.server}: {_plain(error.os_error)}; {CHECK_PROXY}"
            ) from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise ClusterError(f"cannot reach the API server {self.server}: {_plain(error)}") from error

    async def watch(self, path: str) -> AsyncIterator[dict[str, Any]]:
        """Events of a list, beginning with what is there, for some minutes. Errors: every ClusterError."""
        query = {"watch": "1", "timeoutSeconds": str(_WATCHED)}
        answer = await self._open("GET", path, None, query, "application/json", await self.headers(), 2.0 * _WATCHED)
        if answer.status != 200:
            raise refusal(answer.status, await self._body(answer), self.server, _words("GET", path))
        rest = b""
        async for data in self._data_of(answer):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                yield event_of(line, self.server)
            if len(rest) > _LARGEST_OBJECT:
                raise nonsense(self.server)

    async def _body(self, answer: Any) -> bytes:
        """The whole body. ClusterError, TimeoutError."""
        found: list[bytes] = []
        have = 0
        async for data in self._data_of(answer):
            found.append(data)
            have += len(data)
            if have > _LARGEST_LIST:
                raise nonsense(self.server)
        return b"".join(found)

    async def _data_of(self, answer: Any) -> AsyncIterator[bytes]:
        """The body as it comes; ClusterError when it breaks off, TimeoutError."""
        import aiohttp

        try:
            async for data in answer.content.iter_any():
                yield data
        except (aiohttp.ClientError, OSError) as error:
            if isinstance(error, TimeoutError):
                raise
            raise ClusterError(f"the API server {self.server} broke off its answer: {_plain(error)}") from error
        finally:
            answer.close()

    async def may(self, verb: str, resource: str, *, group: str = "", namespace: str = "", name: str = "") -> bool:
        """Whether this user may; "pods/portforward" for a subresource. What cannot be asked counts as yes."""
        return await self.allows(verb, resource, group=group, namespace=namespace, name=name) is not False

    async def allows(
        self, verb: str, resource: str, *, group: str = "", namespace: str = "", name: str = ""
    ) -> bool | None:
        """As `may`; None for what cannot be asked."""
        resource, _, part = resource.partition("/")
        attributes = {"verb": verb, "resource": resource, "subresource": part, "group": group}
        asked = {"spec": {"resourceAttributes": attributes | {"namespace": namespace, "name": name}}}
        try:
            answer = await self.request("POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", asked)
        except ForbiddenError:
            return None
        return bool(answer.get("status", {}).get("allowed"))


@contextlib.asynccontextmanager
async def opened(access: Access) -> AsyncGenerator[Cluster]:
    """The cluster that these flags name; ClusterError when there is none or it cannot be used."""
    there = _there(access)
    from kubernetes_asyncio.client import Configuration

    # It logs what it raises; with a handler of its own nothing of that goes to stderr.
    logging.getLogger("kubernetes_asyncio").addHandler(logging.NullHandler())
    configuration = Configuration()
    configuration.connection_pool_maxsize = 16
    if there:
        loader, context = await asyncio.to_thread(_load, there, access.context or "")
        cluster = Cluster(access, loader, configuration, context)
    else:
        cluster = Cluster(access, None, _in_cluster(configuration), "in-cluster")
    await cluster.start()
    _log.info("context %s is %s, with namespace %s", cluster.context, cluster.server, cluster.namespace)
    try:
        yield cluster
    finally:
        await cluster.close()


def _there(access: Access) -> list[str]:
    """The kubeconfigs that are there; none inside a cluster, where none need be. NoKubeconfigError."""
    named, paths, there = files(access.kubeconfig)
    if not there:
        if not named and "KUBERNETES_SERVICE_HOST" in os.environ:
            return []
        raise NoKubeconfigError(f"there is no kubeconfig at {' or '.join(paths)}: give --kubeconfig or set KUBECONFIG")
    return there


def _load(there: list[str], context: str) -> "tuple[KubeConfigLoader, str]":
    """The kubeconfigs' loader, and its context: the current one when none is named."""
    import yaml
    from kubernetes_asyncio.config import ConfigException
    from kubernetes_asyncio.config.kube_config import KubeConfigLoader, KubeConfigMerger

    try:
        merged = KubeConfigMerger(os.pathsep.join(there))
        # Of several files the first that names a context has it; the merger takes the last.
        current = [
            str(words["current-context"]) for words in merged.config_files.values() if words.get("current-context")
        ]
        context = context or (current[0] if current else "")
        if not context:
            raise ClusterError(f"{there[0]} has no current context: give --context")
        return KubeConfigLoader(merged.config, active_context=context, config_base_path=None), context
    except ConfigException as error:
        names = sorted(contexts_of(there))
        reason = f"no context {context}" if context not in names else f"no usable context {context}: {_plain(error)}"
        raise ClusterError(f"{' and '.join(there)} has {reason}; it has {', '.join(names) or 'none'}") from error
    except (OSError, yaml.YAMLError) as error:
        raise ClusterError(f"{' and '.join(there)} is no kubeconfig: {_plain(error)}") from error
    except _MALFORMED as error:
        raise ClusterError(
            f"{' and '.join(there)} is no kubeconfig: clusters, contexts and users are not there as they should be"
        ) from error


def _in_cluster(configuration: "Configuration") -> "Configuration":
    from kubernetes_asyncio.config import ConfigException
    from kubernetes_asyncio.config.incluster_config import InClusterConfigLoader

    try:
        InClusterConfigLoader(f"{_ACCOUNT}/token", f"{_ACCOUNT}/ca.crt").load_and_set(configuration)
    except ConfigException as error:
        raise ClusterError(f"this pod's service account cannot be used: {error}") from error
    return configuration


def _namespace_of(loader: "KubeConfigLoader | None") -> str:
    current: Any = loader.current_context if loader else {}
    return str(current["context"].get("namespace") or "default") if current else "default"


@contextlib.contextmanager
def _short_lived_files() -> Generator[None]:
    """The loader writes keys of a kubeconfig to files, for OpenSSL to read; they are removed at the end."""
    from kubernetes_asyncio.config import kube_config

    try:
        yield
    finally:
        kube_config._cleanup_temp_files()  # pyright: ignore[reportPrivateUsage]


def _words(method: str, path: str) -> str:
    return f"{_VERBS[method]} {path}"


def _plain(error: object) -> str:
    if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) and error.strerror:
        # asyncio puts words of its own into strerror; getaddrinfo's numbers, below zero, are not the kernel's.
        number = error.errno or 0
        words = os.strerror(number) if number > 0 else error.strerror
        return f"{error.filename}: {words}" if error.filename else words
    # The loader shows where something is missing with all that is beside it, keys and tokens too.
    words = re.sub(r"\S*/\{'.*\}(/(\w+))?", r"\2", " ".join(str(error).split()))
    return words[:_LONGEST] or type(error).__name__
