"""The test cluster as its tests use it: the laptop beside it, kubectl, users with few rights."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LAPTOP = "tvkube-laptop"
CACHE = Path(
    os.environ.get("TPVPN_CLUSTER_DIR")
    or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tpvpn-cluster"
)
ADMIN = CACHE / "state" / "pki" / "admin.kubeconfig"
IMAGE = "tpvpn.test/python:1"
TPVPN = (sys.executable, "-m", "tpvpn")


class Kubernetes:
    """The cluster that is up."""

    def run(self, *argv: str, where: str = LAPTOP, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command on a laptop to its end."""
        environment = {**os.environ, "KUBECONFIG": str(ADMIN)} | options.pop("env", {})
        command = ["nsenter", f"--net=/run/netns/{where}", *argv]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, **options)

    def laptop(self, *argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command on the laptop to its end."""
        return self.run(*argv, **options)

    @contextlib.contextmanager
    def laptop2(self, port: str = "laptop2", address: str = "10.131.0.101") -> Iterator[str]:
        """A second laptop on the LAN: its network namespace."""
        name = f"tvkube-{port}"
        _ip(f"netns add {name}")
        try:
            _ip(f"link add eth0 netns {name} type veth peer name {port} netns tvkube-lan")
            _ip(f"-n tvkube-lan link set {port} master br0 up")
            _ip(f"-n {name} address add {address}/24 dev eth0")
            _ip(f"-n {name} link set eth0 up")
            _ip(f"-n {name} link set lo up")
            yield name
        finally:
            _ip(f"netns delete {name}")

    @contextlib.contextmanager
    def private_route(self, cidr: str) -> Iterator[None]:
        """A route on the laptop as a VPN has it, to nobody."""
        _ip(f"-n {LAPTOP} link add vpn0 type veth peer name vpn1")
        try:
            _ip(f"-n {LAPTOP} address add 192.0.2.1/30 dev vpn0")
            for device in ("vpn0", "vpn1"):
                _ip(f"-n {LAPTOP} link set {device} up")
            _ip(f"-n {LAPTOP} route add {cidr} dev vpn0")
            yield
        finally:
            _ip(f"-n {LAPTOP} link delete vpn0")

    @property
    def coredns(self) -> str:
        """The address of its pod."""
        return self.objects("pods", "kube-system")[0]["status"]["podIP"]

    def helm(self, *words: str) -> str:
        """What `tpvpn helm` printed; it must succeed."""
        done = self.tpvpn("helm", *words, env={"PATH": f"{CACHE / 'bin'}:{os.environ['PATH']}"})
        assert done.returncode == 0, done.stderr
        return done.stdout

    def evict(self, namespace: str, pod: str) -> None:
        """As a drained node does."""
        eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": namespace}}
        path = f"/api/v1/namespaces/{namespace}/pods/{pod}/eviction"
        self.kubectl("create", "--raw", path, "--filename", "-", input=json.dumps(eviction))

    def restart_api_server(self) -> None:
        """End it, and start it again."""
        pid = int((CACHE / "state" / "run" / "apiserver.pid").read_text())
        os.kill(pid, signal.SIGKILL)
        subprocess.run([Path(__file__).parents[1] / "cluster" / "up"], check=True, timeout=120)

    def kubectl(self, *words: str, input: str | None = None) -> str:
        """What kubectl printed; it must succeed."""
        done = self.laptop(str(CACHE / "bin" / "kubectl"), *words, input=input)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def objects(self, kind: str, namespace: str) -> list[dict[str, Any]]:
        """The objects of a kind in a namespace."""
        return json.loads(self.kubectl("get", kind, "--namespace", namespace, "--output", "json"))["items"]

    @contextlib.contextmanager
    def namespace(self, name: str, **labels: str) -> Iterator[str]:
        """A namespace for one test, with labels such as pod_security."""
        self.kubectl("create", "namespace", name)
        for key, value in labels.items():
            self.kubectl("label", "namespace", name, f"{key.replace('__', '/').replace('_', '-')}={value}")
        try:
            yield name
        finally:
            self.kubectl("delete", "namespace", name, "--wait=false")

    def tpvpn(self, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run tpvpn to its end."""
        return self.laptop(*TPVPN, *words, **options)

    @contextlib.contextmanager
    def connected(self, *words: str, where: str = LAPTOP, patience: float = 60.0) -> Iterator[subprocess.Popen[str]]:
        """A session that is ready."""
        ready, announce = os.pipe()
        command = [
            "nsenter",
            f"--net=/run/netns/{where}",
            *TPVPN,
            "connect",
            "--image",
            IMAGE,
            "--ready-fd",
            str(announce),
            *words,
        ]
        environment = {**os.environ, "KUBECONFIG": str(ADMIN)}
        process = subprocess.Popen(command, env=environment, pass_fds=[announce], stderr=subprocess.PIPE, text=True)
        os.close(announce)
        try:
            began = time.monotonic()
            told = os.read(ready, 1)
            assert told, process.communicate()[1]
            assert time.monotonic() - began < patience
            yield process
        finally:
            os.close(ready)
            process.terminate()
            process.communicate(timeout=30)


def _ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True)
