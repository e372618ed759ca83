"""Laptops to which the API server is near in other ways than most: behind a proxy, over IPv6, under another name.

The laptop cannot reach it by itself. Beside it stands a gateway that can, and a session of the gateway's own, whose
manager is the others' too.
"""

import base64
import contextlib
import socket
import threading
from collections.abc import Iterator
from socketserver import StreamRequestHandler
from typing import Any

import pytest
import yaml
from bare_laptop import API, BareLaptop, bare_laptop
from kubernetes_lab import Kubernetes

from pod import inside

GATEWAY = "10.131.0.109"
GATEWAY6 = "fd00:131::109"
SERVER = "https://10.131.0.11:6443"


@pytest.fixture(scope="module")
def gateway(cluster: Kubernetes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BareLaptop]:
    address = f"address add {GATEWAY6}/64 dev eth0 nodad"
    with bare_laptop(cluster, tmp_path_factory.mktemp("gateway"), 10, address) as gateway:
        with (
            cluster.namespace("ways") as namespace,
            cluster.connected("--ephemeral", "--namespace", namespace, where=gateway.where),
        ):
            yield gateway
        gateway.nothing_is_left(namespace)


@pytest.fixture(scope="module")
def laptop(cluster: Kubernetes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BareLaptop]:
    setup = ("address add fd00:131::108/64 dev eth0 nodad", f"route add prohibit {API[0]}")
    with bare_laptop(cluster, tmp_path_factory.mktemp("laptop"), 9, *setup) as laptop:
        yield laptop


class Gateway:
    """Two ways through the gateway: an HTTP proxy, which notes what it was asked for, and a plain forwarder."""

    def __init__(self, gateway: BareLaptop) -> None:
        self._gateway = gateway
        self.asked: list[str] = []
        self.password: str | None = None
        self.answer = b"200 Connection established"

    def proxy(self, request: StreamRequestHandler) -> None:
        """CONNECT (RFC 9110 section 9.3.6)."""
        lines = list(iter(lambda: request.rfile.readline().decode().strip(), ""))
        self.asked.append(lines[0])
        told = [line.partition(": ")[2] for line in lines if line.lower().startswith("proxy-authorization: ")]
        wanted = [f"Basic {base64.b64encode(self.password.encode()).decode()}"] if self.password else told
        answer = self.answer if told == wanted else b"407 Proxy Authentication Required"
        request.wfile.write(b"HTTP/1.1 " + answer + b"\r\n\r\n")
        if answer.startswith(b"200"):
            self.forward(request)

    def forward(self, request: StreamRequestHandler) -> None:
        """Bytes to the API server, and back."""
        with inside(self._gateway.where):
            there = socket.create_connection(API)
        with there:
            back = threading.Thread(target=copy, args=(there, request.connection))
            back.start()
            copy(request.connection, there)
            back.join()


def copy(source: socket.socket, to: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            to.sendall(data)
    for one in (source, to):
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def way(gateway: BareLaptop) -> Gateway:
    return Gateway(gateway)


@pytest.fixture
def proxy(gateway: BareLaptop, way: Gateway) -> Iterator[str]:
    with gateway.serving(way.proxy, GATEWAY) as port:
        yield f"http://{GATEWAY}:{port}"


def connects(laptop: BareLaptop, transport: str, kubeconfig: str | None = None) -> None:
    """A session is ready by this transport, and the cluster is reached by it."""
    words = ["--namespace", "ways", "--ephemeral", "--transport", transport]
    words += ["--kubeconfig", kubeconfig] if kubeconfig else []
    with laptop.cluster.connected(*words, where=laptop.where) as session:
        assert laptop.session()["manager"]["endpoint"].startswith(f"{transport} through https://")
        assert laptop.reaches(f"http://{laptop.cluster.coredns}:8080/health")
        session.terminate()
        said = session.communicate()[1]
        assert session.returncode == 0, said


TRANSPORTS = pytest.mark.parametrize("transport", ["upgrade", "portforward"])


# -- a proxy -----------------------------------------------------------------------------------------------------------


@TRANSPORTS
def test_the_kubeconfigs_proxy(laptop: BareLaptop, way: Gateway, proxy: str, transport: str) -> None:
    way.password = "ann:pass@word"
    with_password = proxy.replace("://", "://ann:pass%40word@")
    connects(laptop, transport, laptop.kubeconfig(cluster={"proxy-url": with_password}))
    assert set(way.asked) == {"CONNECT 10.131.0.11:6443 HTTP/1.1"}


@TRANSPORTS
def test_the_environments_proxy(
    laptop: BareLaptop, way: Gateway, proxy: str, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    connects(laptop, transport)
    assert len(way.asked) > 1


def test_no_proxy_for_this_server(laptop: BareLaptop, way: Gateway, proxy: str) -> None:
    for name in ("10.131.0.11", "*"):
        sentence = laptop.refused(code=4, HTTPS_PROXY=proxy, NO_PROXY=name)
        assert sentence == f"cannot reach the API server {SERVER}: Permission denied"
    assert way.asked == []


def test_a_proxy_that_wants_a_password(laptop: BareLaptop, way: Gateway, proxy: str) -> None:
    way.password = "ann:secret"
    file = laptop.kubeconfig(cluster={"proxy-url": proxy.replace("://", "://ann:geheim@")})
    sentence = laptop.refused(code=4, kubeconfig=file)
    assert sentence.startswith(f"the proxy does not connect to {SERVER}: it answered 407 Proxy Authentication Required")
    assert "geheim" not in sentence


def test_a_proxy_that_refuses(laptop: BareLaptop, way: Gateway, proxy: str) -> None:
    way.answer = b"403 Forbidden"
    sentence = laptop.refused(code=4, HTTPS_PROXY=proxy)
    assert sentence.startswith(f"the proxy does not connect to {SERVER}: it answered 403 Forbidden")


@pytest.mark.parametrize("url", [f"http://{GATEWAY}:1", "socks5://10.131.0.109:1080", "http://none.invalid:3128"])
def test_a_proxy_that_is_not_to_be_had(laptop: BareLaptop, url: str) -> None:
    sentence = laptop.refused(code=4, kubeconfig=laptop.kubeconfig(cluster={"proxy-url": url}))
    said = "only http:// proxies can" if url.startswith("socks5") else "cannot reach the proxy "
    assert said in sentence and sentence.endswith("; check proxy-url or HTTPS_PROXY")


# -- other addresses and names -----------------------------------------------------------------------------------------


@TRANSPORTS
def test_an_ipv6_endpoint_with_a_name_of_its_own(
    laptop: BareLaptop, gateway: BareLaptop, way: Gateway, transport: str
) -> None:
    with gateway.serving(way.forward, GATEWAY6) as port:
        server = f"https://[{GATEWAY6}]:{port}"
        changed = {"server": server, "tls-server-name": "kubernetes.default"}
        connects(laptop, transport, laptop.kubeconfig(cluster=changed))
        sentence = laptop.refused(code=4, kubeconfig=laptop.kubeconfig(cluster={"server": server}))
        assert sentence.startswith(f"{server} has a certificate that the kubeconfig does not trust: ")


def test_a_certificate_that_is_not_to_be_looked_at(laptop: BareLaptop, gateway: BareLaptop, way: Gateway) -> None:
    with gateway.serving(way.forward, GATEWAY) as port:
        changed = {
            "server": f"https://{GATEWAY}:{port}",
            "certificate-authority-data": None,
            "insecure-skip-tls-verify": True,
        }
        connects(laptop, "upgrade", laptop.kubeconfig(cluster=changed))


# -- several kubeconfigs -----------------------------------------------------------------------------------------------


def test_several_files_are_one(gateway: BareLaptop) -> None:
    """The first that names something has it; what is missing is passed over, and paths are beside their own file."""
    parts: dict[str, Any] = {key: {key: gateway.config[key]} for key in ("clusters", "contexts", "users")}
    (cluster,) = gateway.config["clusters"]
    authority = base64.b64decode(cluster["cluster"]["certificate-authority-data"])
    named = {"name": "test", "cluster": {"server": SERVER, "certificate-authority": "ca.crt"}}
    parts["clusters"] = {"clusters": [named], "current-context": "test"}
    wrong = {"name": "test", "cluster": {"server": "https://127.0.0.1:1"}}
    parts["later"] = {"clusters": [wrong], "current-context": "none"}
    files = [str(gateway.directory / "missing")]
    for name, part in parts.items():
        directory = gateway.directory / name
        directory.mkdir()
        (directory / "config").write_text(yaml.safe_dump(part))
        files.append(str(directory / "config"))
    (gateway.directory / "clusters" / "ca.crt").write_bytes(authority)
    (gateway.directory / "empty").touch()
    shown = gateway.tpvpn("plan", kubeconfig=":".join([str(gateway.directory / "empty"), *files]))
    assert shown.returncode == 0, shown.stderr
    assert "10.130.0.0/16" in shown.stdout
