"""The kernel exit in real pods: by a TUN, by a veth pair, with `ip_forward` 0 and 1, and what it says without rights.

The client is a host of its own on the cluster's LAN, which reaches the manager's pod by its node.
"""

import contextlib
import json
import os
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
NODES = {"node1": "10.131.0.11", "node2": "10.131.0.12"}
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


@pytest.fixture
def space(cluster: Kubernetes, tmp_path: Path) -> Iterator[str]:
    """A namespace with the program and the token."""
    subprocess.run([sys.executable, "-m", "tpvpn.kube.zipapp", tmp_path / "manager.pyz"], check=True)
    with cluster.namespace(f"kernel-exit-{os.getpid()}") as name:
        words = ("--namespace", name)
        cluster.kubectl("create", "configmap", "program", *words, f"--from-file={tmp_path / 'manager.pyz'}")
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
    run("ip", "-n", host, "route", "replace", status["podIP"], "via", status["hostIP"])
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


def carries(cluster: Kubernetes, on_host: Callable[..., str]) -> None:
    """The session reaches a pod on the other node, the manager's node's too, and a service."""
    coredns = cluster.objects("pods", "kube-system")[0]["status"]["podIP"]
    on_host("ping", "-c", "1", "-W", "3", coredns)
    assert on_host("curl", "--silent", "--max-time", "5", f"http://{coredns}:8080/health") == "OK"
    healthy = on_host("curl", "--silent", "--insecure", "--max-time", "5", "https://10.130.0.1/healthz")
    assert healthy == "ok"
