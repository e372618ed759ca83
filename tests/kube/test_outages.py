"""What carries a session on a real cluster goes away and comes back: what is open goes on, byte by byte.

API server, kubelet and containerd are killed and started again under an echo that is compared, by both transports; of
several managers a session stays with one, and goes to another when that one goes.
"""

import contextlib
import itertools
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pod_servers
import pytest
from kubernetes_lab import IMAGE, KIND, Kubernetes
from kubernetes_laptop import KubernetesLaptop
from laptop import Session

from peers import eventually
from pod import inside
from traffic import BLOCK, Part, Seen, block

pytestmark = pytest.mark.skipif(bool(KIND), reason="kind's components are its own to restart")
NAMESPACE, ECHO = "outages", 7004
RATE = 2 << 20
"""Bytes a second each way."""
EVERY_NODE = ("node1", "node2")


class Echoed(Part):
    """A connection to a pod whose every byte comes back, and is compared."""

    def __init__(self, laptop: KubernetesLaptop, address: str) -> None:
        super().__init__()
        with inside(laptop.namespace):
            self._connected = self.own(socket.create_connection((address, ECHO), timeout=10))
        self._connected.settimeout(None)
        self.seen, self.blocks = Seen(), 0
        self.run(self._send)
        self.run(self._compare)

    def _send(self) -> None:
        for number in itertools.count():
            self._connected.sendall(block(7, number))
            if self.stopping.wait(BLOCK / RATE):
                return

    def _compare(self) -> None:
        buffer = bytearray(BLOCK)
        for number in itertools.count():
            have = 0
            while have < BLOCK:
                count = self._connected.recv_into(memoryview(buffer)[have:])
                if not count:
                    raise EOFError("the echo ended")
                have += count
                self.seen.now()
            assert buffer == block(7, number), f"block {number} is another one"
            self.blocks += 1


@pytest.fixture(scope="module")
def pod(cluster: Kubernetes) -> Iterator[str]:
    """The address of one that echoes."""
    container = {
        "name": "servers",
        "image": IMAGE,
        "imagePullPolicy": "IfNotPresent",
        "command": ["python3", "-c", Path(pod_servers.__file__).read_text()],
        "readinessProbe": {"tcpSocket": {"port": ECHO}, "periodSeconds": 1},
    }
    spec = {"nodeName": "node2", "terminationGracePeriodSeconds": 0, "containers": [container]}
    made = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "echo", "namespace": NAMESPACE}, "spec": spec}
    with cluster.namespace(NAMESPACE):
        cluster.kubectl("create", "--filename", "-", input=json.dumps(made))
        cluster.kubectl("wait", "--for=condition=Ready", "pod", "--all", "--namespace", NAMESPACE, "--timeout=40s")
        yield cluster.objects("pods", NAMESPACE)[0]["status"]["podIP"]


@pytest.fixture(scope="module")
def managers(cluster: Kubernetes, pod: str) -> Iterator[str]:
    """The namespace of two, with the pod's own sockets."""
    words = ("--namespace", NAMESPACE, "--wait", "--set", f"image={IMAGE}", "--set", "replicas=2")
    cluster.helm("install", *words)
    yield NAMESPACE
    cluster.helm("uninstall", "--namespace", NAMESPACE, "--wait")


@pytest.fixture(scope="module")
def laptop(cluster: Kubernetes) -> Iterator[KubernetesLaptop]:
    with cluster.laptop2(6) as netns:
        laptop = KubernetesLaptop(cluster, netns, "--manager-namespace", NAMESPACE)
        laptop.settle()
        yield laptop


def cut(laptop: KubernetesLaptop) -> None:
    """The laptop's connections to the API server are aborted."""
    laptop.sh("ss --tcp --kill dport = 6443")


def is_back(laptop: KubernetesLaptop, session: Session, echoed: Echoed, when: float) -> bool:
    assert session.process.poll() is None, session.said
    assert echoed.failed is None, echoed.failed
    return echoed.seen.first_after(when) is not None and laptop.status()["state"] == "ready"


COMPONENTS = {
    "API server": ("apiserver",),
    "kubelet": tuple(f"kubelet-{node}" for node in EVERY_NODE),
    "containerd": tuple(f"containerd-{node}" for node in EVERY_NODE),
}


@pytest.mark.parametrize("transport", ["upgrade", "portforward"])
@pytest.mark.parametrize("component", COMPONENTS)
def test_a_component_restarts(
    cluster: Kubernetes, managers: str, pod: str, laptop: KubernetesLaptop, component: str, transport: str
) -> None:
    with laptop.connected("--transport", transport) as session:
        before, echoed = laptop.status(), Echoed(laptop, pod)
        try:
            eventually(lambda: echoed.blocks > 5, 10, "it echoes")
            cluster.restart(*COMPONENTS[component])
            up = time.monotonic()
            eventually(lambda: is_back(laptop, session, echoed, up), 20, f"it goes on after the {component}")
            pause = echoed.seen.first_after(up)
            assert pause is not None
            assert pause < 5
        finally:
            echoed.stop()
        now = laptop.status()
        assert (now["addresses"], now["manager"]["session"]) == (before["addresses"], before["manager"]["session"])
        assert (now["reconnects"] > 0) == ("connecting again" in session.said)


def test_a_session_stays_with_its_pod(managers: str, pod: str, laptop: KubernetesLaptop) -> None:
    with laptop.connected("--links", "2") as session:
        eventually(lambda: laptop.status()["links"] == 2, 10, "two links")
        before, echoed = laptop.status(), Echoed(laptop, pod)
        try:
            for number in range(1, 5):
                when = time.monotonic()
                cut(laptop)
                eventually(lambda: is_back(laptop, session, echoed, when), 10, "it goes on")  # noqa: B023
                eventually(lambda: laptop.status()["links"] == 2, 10, f"two links after cut {number}")
                assert laptop.status()["manager"]["pod"] == before["manager"]["pod"]
        finally:
            echoed.stop()
        assert laptop.status()["manager"]["session"] == before["manager"]["session"]


def test_when_that_pod_goes_another_one_takes_it(
    cluster: Kubernetes, managers: str, pod: str, laptop: KubernetesLaptop
) -> None:
    """What was open is reset, what is new works, from the same addresses, within seconds."""
    with laptop.connected() as session:
        before, echoed = laptop.status(), Echoed(laptop, pod)
        eventually(lambda: echoed.blocks > 5, 10, "it echoes")
        cluster.kubectl("delete", "pod", before["manager"]["pod"], "--namespace", managers, "--wait=false")
        when = time.monotonic()
        eventually(lambda: echoed.failed is not None, 15, "what was open is reset")
        with contextlib.suppress(OSError, EOFError):
            echoed.stop()
        eventually(lambda: laptop.status()["state"] == "ready", 10, "ready")
        took = time.monotonic() - when
        now = laptop.status()
        assert now["manager"]["pod"] != before["manager"]["pod"]
        assert now["addresses"] == before["addresses"]
        assert took < 10
        session.says("the manager had forgotten the session")
        again = Echoed(laptop, pod)
        eventually(lambda: again.blocks > 2, 10, "new connections work")
        again.stop()
    cluster.kubectl("wait", "--for=condition=Ready", "pod", "--all", "--namespace", managers, "--timeout=60s")
