"""The kernel exit in real pods: by a TUN, by a veth pair, with `ip_forward` 0 and 1, and what it says without rights.

The client is a host of its own on the cluster's LAN, which reaches the manager's pod by its node.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from kubernetes_lab import IMAGE, TPVPN, Kubernetes

from peers import eventually
from pod import namespace, run

TOKEN = "token-of-ann"
LAN, CLIENT = "tvkube-lan", "10.131.0.150"
DEVICES = Path("/sys/fs/cgroup/devices")

WITH_TUN = ("NET_ADMIN", "MKNOD")
WITH_VETH = ("NET_ADMIN", "NET_RAW")


@dataclass
class Pod:
    """A manager's pod, or one that is to become it: its command waits for `go`."""

    cluster: Kubernetes
    namespace: str
    name: str

    def status(self) -> dict[str, Any]:
        shown = self.cluster.kubectl("get", "pod", self.name, "--namespace", self.namespace, "--output", "json")
        return json.loads(shown)["status"]

    def log(self) -> str:
        return self.cluster.kubectl("logs", self.name, "--namespace", self.namespace)

    def exec(self, *command: str) -> str:
        return self.cluster.kubectl("exec", self.name, "--namespace", self.namespace, "--", *command)

    def go(self) -> None:
        """Let the manager start."""
        self.exec("touch", "/go/go")

    def devices(self) -> Path:
        """The container's cgroup of devices, which has its processes too."""
        container = self.status()["containerStatuses"][0]["containerID"].removeprefix("containerd://")
        (found,) = DEVICES.glob(f"tvkube-*/kubepods/**/{container}")
        return found

    def on_node(self, *command: str) -> str:
        """Run a command of this machine in the pod's network, where /proc/sys can be written."""
        process = (self.devices() / "cgroup.procs").read_text().split()[0]
        return run("nsenter", f"--net=/proc/{process}/ns/net", *command)


@pytest.fixture(scope="module")
def space(cluster: Kubernetes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A namespace with the program and the token."""
    program = tmp_path_factory.mktemp("program") / "manager.pyz"
    subprocess.run([sys.executable, "-m", "tpvpn.kube.zipapp", program], check=True)
    with cluster.namespace(f"kernel-exit-{os.getpid()}") as name:
        words = ("--namespace", name)
        cluster.kubectl("create", "configmap", "program", *words, f"--from-file={program}")
        cluster.kubectl("create", "secret", "generic", "tokens", *words, f"--from-literal=tokens=ann: {TOKEN}\n")
        yield name


@contextlib.contextmanager
def a_pod(
    cluster: Kubernetes,
    space: str,
    *capabilities: str,
    exit: str = "kernel",
    user: int = 0,
    device: bool = False,
    prepare: Callable[[Pod], object] = lambda pod: None,
) -> Iterator[Pod]:
    """A pod whose manager has these capabilities alone, on a read-only root."""
    pod = Pod(cluster, space, "manager")
    command = f"python3 /program/manager.pyz manager --listen *:7070 --exit {exit} --token-file /tokens/tokens"
    mounts = [{"name": name, "mountPath": f"/{name}"} for name in ("program", "tokens", "go")]
    volumes: list[dict[str, Any]] = [
        {"name": "program", "configMap": {"name": "program"}},
        {"name": "tokens", "secret": {"secretName": "tokens"}},
        {"name": "go", "emptyDir": {}},
    ]
    if device:
        mounts.append({"name": "tun", "mountPath": "/dev/net/tun"})
        volumes.append({"name": "tun", "hostPath": {"path": "/dev/net/tun", "type": "CharDevice"}})
    container = {
        "name": "manager",
        "image": IMAGE,
        "imagePullPolicy": "IfNotPresent",
        "command": ["sh", "-c", f"until [ -e /go/go ]; do sleep 0.1; done; exec {command}"],
        "securityContext": {
            "runAsUser": user,
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"], "add": list(capabilities)},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumeMounts": mounts,
    }
    spec = {
        "restartPolicy": "OnFailure",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": 5,
        "nodeName": "node2",
        "containers": [container],
        "volumes": volumes,
    }
    made = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": pod.name, "namespace": space}, "spec": spec}
    cluster.kubectl("create", "--filename", "-", input=json.dumps(made))
    try:
        cluster.kubectl("wait", "--for=condition=Ready", "pod/manager", "--namespace", space, "--timeout=40s")
        prepare(pod)
        pod.go()
        yield pod
    finally:
        cluster.kubectl("delete", "pod", pod.name, "--namespace", space, "--grace-period=2")


def says(pod: Pod, text: str) -> str:
    """The log, once it has this text."""
    eventually(lambda: text in pod.log(), 15, text)
    return pod.log()


@pytest.fixture
def host() -> Iterator[str]:
    """A host on the cluster's LAN."""
    with namespace("kexit") as name:
        port = f"k{os.getpid()}"
        run("ip", "link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", port, "netns", LAN)
        run("ip", "-n", LAN, "link", "set", port, "master", "br0", "up")
        run("ip", "-n", name, "address", "add", f"{CLIENT}/24", "dev", "eth0")
        run("ip", "-n", name, "link", "set", "eth0", "up")
        yield name


@contextlib.contextmanager
def connected(host: str, pod: Pod, directory: Path) -> Iterator[Callable[..., str]]:
    """A session from the host; what runs a command there."""
    status = pod.status()
    run("ip", "-n", host, "route", "add", status["podIP"], "via", status["hostIP"])
    (directory / "token").write_text(f"ann: {TOKEN}\n")
    ready, announce = os.pipe()
    words = ["--manager", f"tcp://{status['podIP']}:7070", "--token-file", str(directory / "token")]
    words += ["--service-cidr", "10.130.0.0/16", "--pod-cidr", "10.132.0.0/16", "--ready-fd", str(announce)]
    enter = ("nsenter", f"--net=/run/netns/{host}")
    environment = {**os.environ, "TPVPN_RUN_DIR": str(directory / "run")}
    command = [*enter, *TPVPN, "connect", *words]
    process = subprocess.Popen(command, env=environment, pass_fds=[announce], stderr=subprocess.PIPE, text=True)
    os.close(announce)
    try:
        assert os.read(ready, 1), process.communicate()[1]
        yield lambda *command: run(*enter, *command)
    finally:
        os.close(ready)
        process.terminate()
        process.communicate(timeout=30)
        run("ip", "-n", host, "route", "del", status["podIP"])


def carries(cluster: Kubernetes, on_host: Callable[..., str]) -> None:
    """The session reaches a pod on the other node, the manager's node's too, and a service."""
    coredns = cluster.objects("pods", "kube-system")[0]["status"]["podIP"]
    on_host("ping", "-c", "1", "-W", "3", coredns)
    assert on_host("curl", "--silent", "--max-time", "5", f"http://{coredns}:8080/health") == "OK"
    healthy = on_host("curl", "--silent", "--insecure", "--max-time", "5", "https://10.130.0.1/healthz")
    assert healthy == "ok"


def forward(value: int) -> Callable[[Pod], object]:
    """Forwarding as a CNI sets it in the pod."""
    return lambda pod: pod.on_node("sysctl", "-w", f"net.ipv4.ip_forward={value}")


def deny_tun(pod: Pod) -> None:
    """As runc 1.2.0 to 1.2.3 start a container: 10:200 is not in its list of devices."""
    (pod.devices() / "devices.deny").write_text("c 10:200 rwm")


@pytest.mark.parametrize("forwarding", [0, 1])
@pytest.mark.parametrize(("capabilities", "device"), [(WITH_TUN, "tun"), (WITH_VETH, "veth")])
def test_the_kernel_carries_ipv4_whatever_the_cni_set(
    cluster: Kubernetes,
    space: str,
    host: str,
    tmp_path: Path,
    capabilities: tuple[str, ...],
    device: str,
    forwarding: int,
) -> None:
    with a_pod(cluster, space, *capabilities, prepare=forward(forwarding)) as pod:
        said = says(pod, "exit kernel (IPv4)")
        assert ("a veth pair in its place" in said) == (device == "veth")
        with connected(host, pod, tmp_path) as on_host:
            carries(cluster, on_host)
            assert ("tpvpn-s1p" in pod.exec("ls", "/sys/class/net")) == (device == "veth")
            assert pod.exec("cat", "/proc/sys/net/ipv4/ip_forward").strip() == str(forwarding)
            assert pod.exec("cat", "/proc/sys/net/ipv4/conf/eth0/forwarding").strip() == "1"
        eventually(lambda: "tpvpn-s1" not in pod.exec("ls", "/sys/class/net"), 5, "the session's device is gone")


def test_the_nodes_device_is_enough_without_mknod(cluster: Kubernetes, space: str, host: str, tmp_path: Path) -> None:
    with a_pod(cluster, space, "NET_ADMIN", device=True) as pod:
        assert "veth" not in says(pod, "exit kernel (IPv4)")
        with connected(host, pod, tmp_path) as on_host:
            carries(cluster, on_host)


def test_a_runtime_that_forbids_the_device_leaves_the_veth_pair(
    cluster: Kubernetes, space: str, host: str, tmp_path: Path
) -> None:
    with a_pod(cluster, space, "NET_ADMIN", "NET_RAW", "MKNOD", prepare=deny_tun) as pod:
        assert "/dev/net/tun may not be opened" in says(pod, "exit kernel (IPv4)")
        with connected(host, pod, tmp_path) as on_host:
            carries(cluster, on_host)


@pytest.mark.parametrize(
    ("capabilities", "user", "missing"),
    [
        ((), 0, "changing nf_tables needs CAP_NET_ADMIN"),
        (("NET_ADMIN",), 0, "/dev/net/tun is missing.*; a veth pair in its place needs CAP_NET_RAW"),
        # A kubelet gives no ambient capabilities: another user than root has none of those that were added.
        (("NET_ADMIN", "NET_RAW", "MKNOD"), 65534, "changing nf_tables needs CAP_NET_ADMIN"),
    ],
)
def test_what_is_missing_is_named_and_auto_takes_sockets(
    cluster: Kubernetes, space: str, capabilities: tuple[str, ...], user: int, missing: str
) -> None:
    with a_pod(cluster, space, *capabilities, user=user) as pod:
        said = says(pod, "the kernel exit cannot be used")
        (line,) = said.splitlines()
        assert re.search(missing, line)
        assert "capabilities.add: [NET_ADMIN, NET_RAW, MKNOD]" in line
    with a_pod(cluster, space, *capabilities, user=user, exit="auto") as pod:
        assert re.search(missing, says(pod, "exit socket (IPv4)"))


def test_what_a_killed_manager_left_in_the_pod_is_removed_when_its_container_starts_again(
    cluster: Kubernetes, space: str, host: str, tmp_path: Path
) -> None:
    with a_pod(cluster, space, *WITH_VETH) as pod:
        says(pod, "listening")
        with connected(host, pod, tmp_path) as on_host:
            left = device_index(pod)
            assert left > 0
            run("kill", "-KILL", (pod.devices() / "cgroup.procs").read_text().split()[0])
            eventually(lambda: pod.status()["containerStatuses"][0]["restartCount"] == 1, 20, "it starts again")
            eventually(lambda: device_index(pod) not in (0, left), 20, "the laptop is back, on a device of its own")
            carries(cluster, on_host)


def device_index(pod: Pod) -> int:
    """The index of the first session's device; 0 when there is none."""
    return int(pod.exec("sh", "-c", "cat /sys/class/net/tpvpn-s1/ifindex 2>/dev/null || echo 0"))
