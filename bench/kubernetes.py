"""A laptop beside the test cluster, and the ways from it to a pod: plain routing, and tpvpn through the API server.

The laptop is a network namespace of its own on the cluster's LAN, so that nothing else that uses the cluster is in the
way. Each way has a pod for itself, whose address is all that it routes, so that all are up at once.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kubernetes_lab import ADMIN, IMAGE, LAPTOP, Kubernetes

from bench import pod
from bench.measure import Effort
from bench.summary import DIRECT, Figures
from bench.ways import TIMEOUT, Way, descendants, end, ready
from tpvpn.lab import servers
from tpvpn.lab.processes import Processes

PREFIX = "tpvpn-bench-"
ADDRESS = "10.131.0.101/24"  # beside the cluster's own laptop


class Site:
    """The cluster that is up, with a laptop and two namespaces of our own, from `with` to its end."""

    def __init__(self) -> None:
        self.name = f"{PREFIX}{os.getpid()}"
        self.empty = f"{self.name}-empty"
        self._kubernetes = Kubernetes()

    def __enter__(self) -> Self:
        self._directory = Path(tempfile.mkdtemp(prefix=self.name))
        self._processes = Processes(self._directory / "processes")
        try:
            self._remove_leftovers()
            self._join()
            self._make_namespaces()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._remove()

    def _remove(self) -> None:
        self._processes.end()
        self._delete(self.name)
        shutil.rmtree(self._directory)

    def _delete(self, name: str) -> None:
        """Delete the laptop and the namespaces of a run."""
        namespaces = [name, f"{name}-empty"]
        self.kubectl("delete", "namespace", "--ignore-not-found", "--wait=false", *namespaces, check=False)
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    def _remove_leftovers(self) -> None:
        """Remove what runs left that were killed: their laptops tell of them."""
        for laptop in Path("/run/netns").glob(f"{PREFIX}*"):
            if not Path("/proc", laptop.name.removeprefix(PREFIX)).exists():
                inside = subprocess.run(["ip", "netns", "pids", laptop.name], capture_output=True, text=True).stdout
                for pid in inside.split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
                self._delete(laptop.name)

    def _join(self) -> None:
        """Make the laptop, on the LAN's switch, with ports for thousands of short connections a second."""
        lan = f"{LAPTOP.removesuffix('laptop')}lan"
        for words in (
            f"netns add {self.name}",
            f"-n {self.name} link set lo up",
            f"link add eth0 netns {self.name} type veth peer name bench netns {lan}",
            f"-n {lan} link set bench master br0 up",
            f"-n {self.name} address add {ADDRESS} dev eth0",
            f"-n {self.name} link set eth0 up",
        ):
            done = subprocess.run(["ip", *words.split()], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"ip {words}: {done.stderr.strip()}; is the cluster of tests/cluster/up there?")
        for word in ("ip_local_port_range=1024 65535", "tcp_tw_reuse=1"):
            self.run("laptop", ["sysctl", "-qw", f"net.ipv4.{word}"])

    def _make_namespaces(self) -> None:
        files = [f"--from-file={Path(str(module.__file__))}" for module in (pod, servers)]
        for namespace in (self.name, self.empty):
            self.kubectl("create", "namespace", namespace)
        self.kubectl("create", "configmap", "programs", "--namespace", self.name, *files)

    def run(
        self, where: str, argv: Sequence[str], *, check: bool = True, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the laptop to its end."""
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 60} | options
        return subprocess.run(self._inside(argv), text=True, check=check, **options)

    def popen(self, where: str, argv: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a command on the laptop."""
        return self._processes.start(self._inside(argv), **options)

    def log(self, name: str) -> Path:
        """The file for what a process says."""
        return self._directory / f"{name}.log"

    def _inside(self, argv: Sequence[str]) -> list[str]:
        return ["nsenter", f"--net=/run/netns/{self.name}", "env", f"KUBECONFIG={ADMIN}", *argv]

    def kubectl(self, *words: str, check: bool = True, input: str | None = None) -> str:
        """What kubectl printed."""
        try:
            return self._kubernetes.kubectl(*words, input=input)
        except AssertionError as error:
            if check:
                raise RuntimeError(f"kubectl {' '.join(words)}: {error}") from error
            return ""

    def nodes(self) -> dict[str, str]:
        """The nodes' addresses by name."""
        found: list[dict[str, Any]] = json.loads(self.kubectl("get", "nodes", "--output", "json"))["items"]
        return {
            node["metadata"]["name"]: address["address"]
            for node in found
            for address in node["status"]["addresses"]
            if address["type"] == "InternalIP"
        }

    def pod(self, name: str) -> dict[str, Any]:
        """A pod of ours as the API has it."""
        return json.loads(self.kubectl("get", "pod", name, "--namespace", self.name, "--output", "json"))

    def serve(self, name: str, node: str) -> str:
        """Start a pod with all servers on a node; its address."""
        program = "iperf3 --server & python3 /programs/pod.py & exec python3 /programs/servers.py $NAME $ADDRESS"
        own = {"fieldRef": {"fieldPath": "status.podIP"}}
        container = {
            "name": "servers",
            "image": IMAGE,
            "command": ["sh", "-c", program],
            "env": [{"name": "NAME", "value": name}, {"name": "ADDRESS", "valueFrom": own}],
            "securityContext": {"capabilities": {"add": ["NET_ADMIN"]}},  # iperf3 chooses a congestion control
            "readinessProbe": {"httpGet": {"path": "/", "port": servers.HTTP_PORT}, "periodSeconds": 1},
            "volumeMounts": [{"name": "programs", "mountPath": "/programs"}],
        }
        spec = {
            "nodeName": node,
            "terminationGracePeriodSeconds": 0,
            "automountServiceAccountToken": False,
            "containers": [container],
            "volumes": [{"name": "programs", "configMap": {"name": "programs"}}],
        }
        wanted = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}
        self.kubectl("apply", "--namespace", self.name, "--filename", "-", input=json.dumps(wanted))
        waited = ["--for=condition=Ready", f"--timeout={TIMEOUT:g}s"]
        self.kubectl("wait", f"pod/{name}", "--namespace", self.name, *waited)
        return str(self.pod(name)["status"]["podIP"])


class Direct(Way):
    """Plain routing: from the laptop to the pod's node, and into the pod."""

    name = DIRECT
    address = ""
    lab: Site

    def __init__(self, site: Site) -> None:
        self.lab = site

    def start(self) -> dict[str, float]:
        """Start the pod once, on the last node, and route its address."""
        if not self.address:
            node, gateway = list(self.lab.nodes().items())[-1]
            self.address = self.lab.serve(self.name, node)
            self.lab.run("laptop", ["ip", "route", "add", self.address, "via", gateway])
        return {}

    def bare(self, effort: Effort) -> Figures:
        """There is no stream below it."""
        return {}

    def ephemeral(self) -> Figures:
        """Nothing is started for it."""
        return {}


class Upgrade(Direct):
    """tpvpn by one transport, with a manager of the user's own on another node than the pod."""

    name = "upgrade"
    number = 10  # the first of its sessions'

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self._connect: subprocess.Popen[Any] | None = None
        self._manager: list[int] = []

    def start(self) -> dict[str, float]:
        """Have a manager and both pods once, and `tpvpn connect` anew; the seconds until it is ready."""
        if not self.address:
            self._prepare()
        end(self._connect)
        self._connect, took = self._session(self.name, self.lab.name, self.number, f"{self.address}/32")
        self._manager_pod(self.name)
        return {"connect_s": took}

    def _session(
        self, name: str, namespace: str, number: int, pods: str | None = None
    ) -> tuple[subprocess.Popen[Any], float]:
        """A session that routes `pods` and a service subnet of those for examples (RFC 5737), by its number."""
        where = ["--namespace", namespace, "--ephemeral", "--transport", self.name, "--image", IMAGE, "--name", name]
        subnets = ["--service-cidr", f"192.0.2.{number}/32", "--pod-cidr", pods or f"198.51.100.{number}/32"]
        return ready(self.lab, f"connect-{name}", [*where, *subnets])

    def _prepare(self) -> None:
        """A session that keeps its manager for all others of this user, and a pod beside it and one far from it."""
        keeper = f"keep-{self.number}"
        self._session(keeper, self.lab.name, self.number + 1)
        manager = self.lab.pod(self._manager_pod(keeper))
        self._manager = processes_of(manager["metadata"]["uid"])
        near = manager["spec"]["nodeName"]
        self.lab.serve(f"{self.name}-near", near)
        far = next((node for node in self.lab.nodes() if node != near), near)
        self.address = self.lab.serve(f"{self.name}-far", far)

    def _manager_pod(self, session: str) -> str:
        """The pod that a session leads to, by the transport that is to be measured."""
        shown = self.lab.run("laptop", [sys.executable, "-m", "tpvpn", "status", "--output", "json"]).stdout
        sessions = {one["name"]: one["manager"]["endpoint"] for one in json.loads(shown)["sessions"]}
        found = re.fullmatch(rf"{self.name} through \S+ to pods/[^/]+/([^:]+):\d+", sessions[session])
        if not found:
            raise RuntimeError(f"the transport is not {self.name}: {sessions[session]}")
        return found[1]

    def ends(self) -> dict[str, list[int]]:
        """connect with its helper, and the manager."""
        assert self._connect
        return {"laptop": descendants(self._connect.pid), "node": self._manager}

    def bare(self, effort: Effort) -> Figures:
        """Gb/s of the same transport to the manager's node, without a tunnel."""
        figures: Figures = {}
        for direction in ("up", "down"):
            where = [self.name, self.lab.name, f"{self.name}-near", direction]
            argv = [sys.executable, "-m", "bench.bare", *where, "--seconds", f"{effort.seconds:g}"]
            figures[f"bare_{direction}"] = json.loads(self.lab.run("laptop", argv).stdout)
        return figures

    def ephemeral(self) -> Figures:
        """The seconds until a session is ready in a namespace where there is no manager."""
        process, took = self._session(f"new-{self.number}", self.lab.empty, self.number + 2)
        end(process)
        return {"ephemeral_s": took}


class PortForward(Upgrade):
    """The same by the other transport."""

    name = "portforward"
    number = 20


def processes_of(uid: str) -> list[int]:
    """The processes of a pod's manager."""
    found = [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cgroup")
        if uid in path.read_text() and b"manager.pyz" in path.with_name("cmdline").read_bytes()
    ]
    if not found:
        raise RuntimeError(f"no process of this machine is the manager of pod {uid}")
    return found
