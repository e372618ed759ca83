"""Completion with a cluster: its namespaces, `kubectl tpvpn` by kubectl, an API server that is silent."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from kubernetes_lab import KUBECTL, Kubernetes

BIN = Path(sys.executable).parent
PATH = f"{BIN}:{Path(KUBECTL).parent}:{os.environ['PATH']}"


def ask(cluster: Kubernetes, *words: str) -> tuple[list[str], str]:
    """What is offered for the last word, and what is said beside."""
    asked = cluster.laptop(*words, env={"PATH": PATH})
    *found, last = asked.stdout.splitlines()
    assert last in (":0", ":4")
    return [line.partition("\t")[0] for line in found], asked.stderr


def test_namespaces_are_the_clusters(cluster: Kubernetes) -> None:
    assert ask(cluster, "tpvpn", "__complete", "plan", "-n", "kube-s") == (["kube-system"], "")
    assert ask(cluster, "tpvpn", "__complete", "plan", "--as", "nobody-at-all", "-n", "") == ([], "")


def test_kubectl_completes_its_plugin(cluster: Kubernetes) -> None:
    assert ask(cluster, KUBECTL, "__complete", "tpvpn", "lab", "u")[0] == ["up"]
    assert ask(cluster, KUBECTL, "__complete", "tpvpn", "plan", "--namespace", "kube-s")[0] == ["kube-system"]
    shown = cluster.laptop(KUBECTL, "tpvpn", "plan", "--help", env={"PATH": PATH})
    assert shown.stdout.startswith("usage: kubectl tpvpn plan ")


def test_an_api_server_that_is_silent_costs_a_second(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        server = f"--server=http://127.0.0.1:{silent.getsockname()[1]}"
        environment = {**os.environ, "PATH": PATH, "KUBECONFIG": str(tmp_path / "config")}
        subprocess.run([KUBECTL, "config", "set-cluster", "silent", server], env=environment, check=True)
        subprocess.run([KUBECTL, "config", "set-context", "silent", "--cluster=silent"], env=environment, check=True)
        begun = time.monotonic()
        asked = subprocess.run(
            [BIN / "tpvpn", "__complete", "plan", "--context", "silent", "-n", ""],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert (asked.stdout, asked.stderr) == (":4\n", "")
        assert time.monotonic() - begun < 3
