"""What a user sends to a real cluster: through both kinds of manager and by both transports.

A pod on each node serves pod_servers.py, behind a ClusterIP, a headless service and a NodePort.
"""

import errno
import hashlib
import itertools
import json
import os
import select
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dns.message
import dns.query
import pod_servers
import pytest
from kubernetes_lab import IMAGE, Kubernetes
from kubernetes_laptop import KubernetesLaptop

from pod import inside

NAMESPACE = "traffic"
NODE2 = "10.131.0.12"  # the other one is dialled, and so never routed
DNS = "10.130.0.10"
DIGEST, SOURCE, ECHO_UDP, ECHO_TCP, CLOSED = 7001, 7002, 7003, 7004, 7999
LABELS = {"app": "servers"}
INSIDE = ("--also-proxy", f"{NODE2}/32", "--allow-conflicting-subnets", f"{NODE2}/32")


@dataclass(frozen=True)
class Servers:
    """Where the servers are."""

    pods: dict[str, str]
    """By node."""
    service: str
    node_port: int


@dataclass(frozen=True)
class User:
    """A laptop that is connected."""

    laptop: KubernetesLaptop

    def connect(self, address: str, port: int, timeout: float = 10) -> socket.socket:
        with inside(self.laptop.namespace):
            return socket.create_connection((address, port), timeout)

    def tcp(self, address: str, port: int = ECHO_TCP) -> bool:
        """Whether what is sent comes back."""
        with self.connect(address, port) as connected:
            connected.sendall(b"hello")
            return connected.recv(100) == b"hello"

    def udp(self, address: str, data: bytes = b"hello", port: int = ECHO_UDP) -> bool:
        """Whether a datagram comes back; one may be lost."""
        with inside(self.laptop.namespace):
            asking = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with asking:
            asking.connect((address, port))
            for _ in range(3):
                asking.send(data)
                if select.select([asking], [], [], 2)[0]:
                    return asking.recv(65535) == data
            return False


@pytest.fixture(scope="module")
def servers(cluster: Kubernetes) -> Iterator[Servers]:
    with cluster.namespace(NAMESPACE):
        ports = [
            {"name": "tcp", "port": ECHO_TCP, "protocol": "TCP"},
            {"name": "udp", "port": ECHO_UDP, "protocol": "UDP"},
        ]
        objects = [_pod(node) for node in ("node1", "node2")]
        objects += [
            _service("plain", ports=ports),
            _service("headless", ports=ports, clusterIP="None"),
            _service("node-port", ports=ports, type="NodePort"),
        ]
        listed = {"apiVersion": "v1", "kind": "List", "items": objects}
        cluster.kubectl("create", "--filename", "-", input=json.dumps(listed))
        cluster.kubectl("wait", "--for=condition=Ready", "pod", "--all", "--namespace", NAMESPACE, "--timeout=40s")
        services = {one["metadata"]["name"]: one["spec"] for one in cluster.objects("services", NAMESPACE)}
        yield Servers(
            {one["spec"]["nodeName"]: one["status"]["podIP"] for one in cluster.objects("pods", NAMESPACE)},
            services["plain"]["clusterIP"],
            next(one["nodePort"] for one in services["node-port"]["ports"] if one["name"] == "tcp"),
        )


def _pod(node: str) -> dict[str, Any]:
    container = {
        "name": "servers",
        "image": IMAGE,
        "imagePullPolicy": "IfNotPresent",
        "command": ["python3", "-c", Path(pod_servers.__file__).read_text()],
        "readinessProbe": {"tcpSocket": {"port": ECHO_TCP}, "periodSeconds": 1},
    }
    spec = {"nodeName": node, "terminationGracePeriodSeconds": 0, "containers": [container]}
    metadata = {"name": node, "namespace": NAMESPACE, "labels": LABELS}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def _service(name: str, **spec: Any) -> dict[str, Any]:
    metadata = {"name": name, "namespace": NAMESPACE}
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": {"selector": LABELS, **spec}}


@pytest.fixture(
    scope="module", params=itertools.product(["socket", "kernel"], ["upgrade", "portforward"]), ids="-".join
)
def user(cluster: Kubernetes, servers: Servers, request: pytest.FixtureRequest) -> Iterator[User]:
    """Of an ephemeral manager, which has sockets, or an installed one with the kernel's exit."""
    exit, transport = request.param
    with (
        cluster.namespace(f"traffic-{exit}-{transport}") as namespace,
        cluster.laptop2(5) as netns,
    ):
        if exit == "kernel":
            words = ("--namespace", namespace, "--wait", "--set", f"image={IMAGE}", "--set", "exit=kernel")
            cluster.helm("install", *words)
        laptop = KubernetesLaptop(cluster, netns, "--manager-namespace", namespace, "--transport", transport)
        laptop.settle()
        before = laptop.state()
        with laptop.connected(*INSIDE):
            manager = laptop.status()["manager"]
            assert manager["exit"]["ipv4"] == exit
            assert manager["endpoint"].startswith(transport)
            yield User(laptop)
        laptop.is_as(before)


def test_pods_on_both_nodes(user: User, servers: Servers) -> None:
    for address in servers.pods.values():
        assert user.tcp(address) and user.udp(address)
        assert user.laptop.run("ping", "-c", "1", "-W", "3", address).returncode == 0


def test_a_service(user: User, servers: Servers) -> None:
    assert all(user.tcp(servers.service) and user.udp(servers.service) for _ in range(4))


@pytest.mark.parametrize("ask", [dns.query.udp, dns.query.tcp])
def test_names_are_asked_for_and_a_headless_service_is_its_pods(user: User, servers: Servers, ask: Any) -> None:
    with inside(user.laptop.namespace):
        headless = ask(dns.message.make_query(f"headless.{NAMESPACE}.svc.cluster.local", "A"), DNS, timeout=5)
        plain = ask(dns.message.make_query(f"plain.{NAMESPACE}.svc.cluster.local", "A"), DNS, timeout=5)
    found = {record.address for answer in headless.answer for record in answer}
    assert found == set(servers.pods.values())
    assert [record.address for answer in plain.answer for record in answer] == [servers.service]
    assert all(map(user.tcp, found))


def test_a_node_port_from_inside(user: User, servers: Servers) -> None:
    assert " dev tpvpn0 " in user.laptop.sh(f"ip route get {NODE2}")
    assert user.tcp(NODE2, servers.node_port)


def test_a_closed_port_refuses(user: User, servers: Servers) -> None:
    for address in servers.pods.values():
        with pytest.raises(ConnectionRefusedError):
            user.connect(address, CLOSED)
    with inside(user.laptop.namespace):
        asking = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with asking:
        asking.connect((servers.pods["node2"], CLOSED))
        asking.settimeout(3)
        asking.send(b"hello")
        with pytest.raises(ConnectionRefusedError):
            asking.recv(1)


def test_who_is_not_there_does_not_answer(user: User) -> None:
    """No address of a pod: ARP has no answer, which a node's kernel says after three seconds, or nobody."""
    with pytest.raises(OSError) as raised:
        user.connect(f"10.132.0.{200 + os.urandom(1)[0] % 50}", 80, 5)
    assert isinstance(raised.value, TimeoutError) or raised.value.errno == errno.EHOSTUNREACH, raised.value


@pytest.mark.parametrize("node", ["node1", "node2"])
def test_fifty_megabytes_each_way_are_the_same_bytes(user: User, servers: Servers, node: str) -> None:
    """Up with a half-close: the answer comes after the end of what was sent."""
    expected = hashlib.sha256(pod_servers.source()).hexdigest()
    with user.connect(servers.pods[node], DIGEST, 60) as up:
        up.sendall(pod_servers.source())
        up.shutdown(socket.SHUT_WR)
        assert up.recv(100).decode() == expected
        assert up.recv(1) == b""
    digest = hashlib.sha256()
    with user.connect(servers.pods[node], SOURCE, 60) as down:
        while data := down.recv(1 << 18):
            digest.update(data)
    assert digest.hexdigest() == expected


def test_a_datagram_of_many_packets(user: User, servers: Servers) -> None:
    assert user.udp(servers.pods["node1"], os.urandom(20_000))
    assert user.udp(servers.pods["node2"], os.urandom(60_000))
    assert user.udp(servers.service, os.urandom(9_000))
