"""What a person sees of a session with a real cluster: each step, names of services, and an end without waiting."""

import subprocess
import time
from collections.abc import Iterator

import pytest
from kubernetes_lab import LAPTOP, Kubernetes
from kubernetes_laptop import PATIENCE, KubernetesLaptop

from terminal import Terminal, terminal

CTRL_C = "\x03"


@pytest.fixture
def seen(cluster: Kubernetes, request: pytest.FixtureRequest) -> Iterator[Terminal]:
    with cluster.namespace(request.node.name.replace("_", "-")) as namespace:
        laptop = KubernetesLaptop(cluster, LAPTOP, "--ephemeral", "--namespace", namespace)
        with terminal(laptop.command(laptop.connect_command())) as opened:
            opened.shows("tpvpn default  ready", "10.130.0.0/16  routed", seconds=PATIENCE)
            yield opened


def test_the_services_are_named(cluster: Kubernetes, seen: Terminal) -> None:
    kept = "import socket, time; s = socket.create_connection(('10.130.0.10', 53)); time.sleep(20)"
    with subprocess.Popen(["nsenter", f"--net=/run/netns/{LAPTOP}", "python3", "-c", kept]) as process:
        seen.shows("most traffic", "kube-dns.kube-system:53")
        process.kill()
    seen.type(CTRL_C)
    assert seen.wait(30) == 130
    steps = ["API server", "subnets", "plan", "helper", "manager", "TUN", "routes", "DNS"]
    found = [line[2:].partition("  ")[0].strip() for line in seen.text.splitlines() if line.startswith("✓ ")]
    assert found == steps


def test_ctrl_c_twice_waits_for_nobody(cluster: Kubernetes, seen: Terminal) -> None:
    """The helper has undone everything here; the manager ends by itself when nobody uses it."""
    with cluster.api_server_stopped():
        seen.type(CTRL_C)
        seen.shows("session default lasted")
        began = time.monotonic()
        seen.type(CTRL_C)
        assert seen.wait(5) == 130
        assert time.monotonic() - began < 2
        assert cluster.laptop("ip", "link", "show", "tpvpn0").returncode != 0
