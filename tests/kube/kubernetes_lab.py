"""The test cluster as its tests use it: the laptop beside it, kubectl, users with few rights.

It is the one of tests/cluster, with network namespaces as laptops; or kind's (scripts/kind), with this machine as the
one laptop.
"""

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

import pytest

from peers import eventually

LAPTOP = "tvkube-laptop"
MOUNTS = """
set -e
mount --bind "$1/etc" /etc
for hidden in /run/dbus /run/systemd; do
    if [ -d "$hidden" ]; then mount -t tmpfs tmpfs "$hidden"; fi
done
touch "$2"
exec sleep infinity
"""
CACHE = Path(
    os.environ.get("TPVPN_CLUSTER_DIR")
    or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tpvpn-cluster"
)
KIND = os.environ.get("TPVPN_KIND")
"""The name of kind's cluster, where it is that one."""
ADMIN = Path(os.environ["TPVPN_KIND_KUBECONFIG"]) if KIND else CACHE / "state" / "pki" / "admin.kubeconfig"
KUBECTL = "kubectl" if KIND else str(CACHE / "bin" / "kubectl")
IMAGE = "tpvpn.test/python:1"
TPVPN = (sys.executable, "-m", "tpvpn")


class Kubernetes:
    """The cluster that is up."""

    def run(self, *argv: str, where: str = LAPTOP, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command on a laptop to its end."""
        environment = {**os.environ, "KUBECONFIG": str(ADMIN)} | options.pop("env", {})
        command = [*inside(where), *argv]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, **options)

    def laptop(self, *argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command on the laptop to its end."""
        return self.run(*argv, **options)

    @contextlib.contextmanager
    def laptop2(self, number: int = 2) -> Iterator[str]:
        """A second laptop on the LAN, or a later one: its network namespace."""
        if KIND:
            pytest.skip("this machine is the one laptop of kind's cluster")
        name = f"tvkube-laptop{number}"
        _ip(f"netns add {name}")
        try:
            _ip(f"link add eth0 netns {name} type veth peer name laptop{number} netns tvkube-lan")
            _ip(f"-n tvkube-lan link set laptop{number} master br0 up")
            _ip(f"-n {name} address add 10.131.0.{99 + number}/24 dev eth0")
            _ip(f"-n {name} link set eth0 up")
            _ip(f"-n {name} link set lo up")
            yield name
        finally:
            _ip(f"netns delete {name}")

    @contextlib.contextmanager
    def own_files(self, directory: Path, nameserver: str) -> Iterator[str]:
        """The laptop with an /etc of its own, and without this machine's D-Bus: where commands run there."""
        if KIND:
            pytest.skip("this machine is the one laptop of kind's cluster, and its files stay as they are")
        subprocess.run(["cp", "--archive", "/etc", directory / "etc"], check=True)
        resolver = directory / "etc" / "resolv.conf"
        resolver.unlink(missing_ok=True)
        resolver.write_text(f"nameserver {nameserver}\n")
        ready = directory / "ready"
        shell = [*inside(LAPTOP), "unshare", "--mount", "sh", "-c", MOUNTS, "laptop", str(directory), str(ready)]
        holder = subprocess.Popen(shell)
        try:
            eventually(ready.exists, 5, "the laptop's mounts")
            yield f"/proc/{holder.pid}"
        finally:
            holder.kill()
            holder.wait()

    @contextlib.contextmanager
    def private_route(self, cidr: str) -> Iterator[None]:
        """A route on the laptop as a VPN has it, to nobody."""
        of_laptop = "" if KIND else f"-n {LAPTOP}"
        _ip(f"{of_laptop} link add vpn0 type veth peer name vpn1")
        try:
            _ip(f"{of_laptop} address add 192.0.2.1/30 dev vpn0")
            for device in ("vpn0", "vpn1"):
                _ip(f"{of_laptop} link set {device} up")
            _ip(f"{of_laptop} route add {cidr} dev vpn0")
            yield
        finally:
            _ip(f"{of_laptop} link delete vpn0")

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
        if KIND:  # its kubelet does
            subprocess.run(["docker", "exec", f"{KIND}-control-plane", "pkill", "kube-apiserver"], check=True)
            return
        self.restart("apiserver")

    @contextlib.contextmanager
    def api_server_stopped(self) -> Iterator[None]:
        """It says nothing, and its connections stay."""
        if KIND:
            signals = [
                ["docker", "exec", f"{KIND}-control-plane", "pkill", f"-{one}", "kube-apiserver"]
                for one in ("STOP", "CONT")
            ]
        else:
            pid = (CACHE / "state" / "run" / "apiserver.pid").read_text().strip()
            signals = [["kill", f"-{one}", pid] for one in ("STOP", "CONT")]
        subprocess.run(signals[0], check=True)
        try:
            yield
        finally:
            subprocess.run(signals[1], check=True)

    def restart(self, *components: str) -> None:
        """Kill them, and start them again."""
        for name in components:
            os.kill(int((CACHE / "state" / "run" / f"{name}.pid").read_text()), signal.SIGKILL)
        subprocess.run([Path(__file__).parents[1] / "cluster" / "up"], check=True, timeout=120, capture_output=True)

    def kubectl(self, *words: str, input: str | None = None) -> str:
        """What kubectl printed; it must succeed."""
        done = self.laptop(KUBECTL, *words, input=input)
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
            *inside(where),
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


def inside(where: str) -> list[str]:
    """What runs a command on a laptop, or where a process is."""
    if where.startswith("/proc/"):
        return ["nsenter", "--target", Path(where).name, "--net", "--mount"]
    return [] if KIND and where == LAPTOP else ["nsenter", f"--net=/run/netns/{where}"]
