"""Encryption end to end on a real cluster: through the API server's proxy and through a port-forward, to one pod."""

import asyncio
import base64
import json
import re
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

import pytest
from kubernetes_lab import ADMIN, IMAGE, LAPTOP, Kubernetes

from peers import Certificate, self_signed
from pod import inside
from tpvpn.engine import Transport
from tpvpn.errors import ManagerError
from tpvpn.kube.access import Access
from tpvpn.kube.api import opened
from tpvpn.kube.zipapp import build
from tpvpn.proto.session import Offer
from tpvpn.proto.sessions import Question
from tpvpn.sessions import ask
from tpvpn.transport.apiserver import PortForward, Target, ThroughApiServer, Upgrade
from tpvpn.tunnel import shake_hands
from tpvpn.wire import frame

NAMESPACE = "encryption"
TOKEN = b"token-of-ann"
WAYS = [Upgrade, PortForward]


@dataclass(frozen=True)
class Encrypted:
    """A manager with a certificate, in a pod."""

    cluster: Kubernetes
    made: Certificate

    def log(self) -> str:
        return self.cluster.kubectl("logs", "--namespace", NAMESPACE, "tpvpn-0")


@pytest.fixture(scope="module")
def manager(cluster: Kubernetes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Encrypted]:
    made = self_signed(tmp_path_factory.mktemp("tls"), "manager")
    files = {"manager.pyz": build(), "tokens": b"ann: " + TOKEN + b"\n"}
    files |= {"tls.crt": made.certificate.read_bytes(), "tls.key": made.key.read_bytes()}
    encoded = {name: base64.b64encode(data).decode() for name, data in files.items()}
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "tpvpn"}, "data": encoded}
    options = ["--listen", "*:7070", "--exit", "socket", "--token-file", "/opt/tpvpn/tokens"]
    options += ["--tls-cert", "/opt/tpvpn/tls.crt", "--tls-key", "/opt/tpvpn/tls.key"]
    container = {
        "name": "manager",
        "image": IMAGE,
        "imagePullPolicy": "IfNotPresent",
        "command": ["python3", "/opt/tpvpn/manager.pyz", "manager", *options],
        "readinessProbe": {"httpGet": {"path": "/healthz", "port": 7070}, "periodSeconds": 1},
        "livenessProbe": {"httpGet": {"path": "/healthz", "port": 7070}, "periodSeconds": 1, "failureThreshold": 1},
        "volumeMounts": [{"name": "files", "mountPath": "/opt/tpvpn"}],
    }
    spec = {"containers": [container], "volumes": [{"name": "files", "secret": {"secretName": "tpvpn"}}]}
    spec |= {"terminationGracePeriodSeconds": 1, "automountServiceAccountToken": False}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "tpvpn-0"}, "spec": spec}
    with cluster.namespace(NAMESPACE):
        for one in (secret, pod):
            cluster.kubectl("create", "--namespace", NAMESPACE, "--filename", "-", input=json.dumps(one))
        cluster.kubectl("wait", "--namespace", NAMESPACE, "--for=condition=Ready", "pod/tpvpn-0", "--timeout=50s")
        yield Encrypted(cluster, made)


def through(way: type[ThroughApiServer], pin: bytes | None, do: Callable[[Transport], Awaitable[object]]) -> object:
    """Do something over a transport of the laptop's."""

    async def scenario() -> object:
        async with opened(Access(kubeconfig=str(ADMIN))) as cluster:
            return await do(way(cluster, Target(NAMESPACE, "pods", "tpvpn-0", 7070), TOKEN, pin))

    with inside(LAPTOP):
        return asyncio.run(scenario())


async def pinged(transport: Transport) -> int:
    """Open a session, send a megabyte of frames that the manager skips, and have a ping behind them answered."""
    stream, early = await transport.dial(await transport.resolve())
    try:
        held, early = await shake_hands(stream, early, transport.token, Offer(transport.name[:64]))
        assert held.terms.exit["ipv4"] == "socket"
        for _ in range(20):
            await stream.send_all(frame.encode(200, bytes(50_000)))
        await stream.send_all(frame.encode(frame.CONTROL, b'{"type":"ping","id":7}'))
        decoder = frame.Decoder()
        decoder.receive(early)
        while True:
            for kind, payload in decoder.frames():
                assert (kind, json.loads(payload)) == (frame.CONTROL, {"type": "pong", "id": 7})
                return len(stream.certificate_hash)
            data = await stream.receive(1 << 16)
            assert data
            decoder.receive(data)
    finally:
        stream.close()


@pytest.mark.parametrize("way", WAYS)
def test_a_session_and_a_question_end_to_end(manager: Encrypted, way: type[ThroughApiServer]) -> None:
    assert through(way, manager.made.digest, pinged) == 32
    line = next(one for one in manager.log().splitlines() if "session-open" in one and way.word in one)
    assert "security=tls" in line
    assert re.search(r" peer=[0-9.]+:\d+ ", line), line

    async def asked(transport: Transport) -> str:
        return (await ask(transport, Question("laptop"))).user

    assert through(way, manager.made.digest, asked) == "ann"


@pytest.mark.parametrize("way", WAYS)
def test_a_wrong_pin_and_none(manager: Encrypted, way: type[ThroughApiServer]) -> None:
    with pytest.raises(ManagerError) as caught:
        through(way, bytes(32), pinged)
    target = f"pods/{NAMESPACE}/tpvpn-0:7070"
    assert str(caught.value) == (
        f"the certificate of the manager {target} is not the pinned one: it has {manager.made.pin}"
    )
    with pytest.raises(ManagerError, match="it takes encrypted sessions alone"):
        through(way, None, pinged)


def test_the_kubelet_finds_it_well(manager: Encrypted) -> None:
    """One failed probe would have restarted it."""
    (pod,) = manager.cluster.objects("pods", NAMESPACE)
    (status,) = pod["status"]["containerStatuses"]
    assert (status["ready"], status["restartCount"]) == (True, 0)
