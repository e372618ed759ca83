"""Every command of README and guides that needs a cluster, as a person on a laptop types it."""

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kubernetes_lab import ADMIN, CACHE, IMAGE, Kubernetes, inside

import blocks
from tpvpn.kube import manifest

NAMESERVER = "10.131.0.250"
"""A laptop's own, which nobody answers."""
WEB = blocks.ROOT / "docs" / "guides" / "first-use.md"
PAGES = [page for page in blocks.PAGES if blocks.script(page, "cluster") and page != WEB]
BESIDE_A_VPN = [page for page in blocks.PAGES if blocks.script(page, "cluster, vpn")]


class Person:
    """On a laptop with a home and an /etc of its own, and a context whose namespace is theirs."""

    def __init__(self, cluster: Kubernetes, directory: Path, where: str, namespace: str) -> None:
        self._directory, self._where = directory, where
        kubeconfig = directory / f"{namespace}.kubeconfig"
        kubeconfig.write_text(ADMIN.read_text())
        path = f"{directory}/.local/bin:{Path(sys.executable).parent}:{CACHE / 'bin'}:{os.environ['PATH']}"
        self._environment = {**os.environ, "HOME": str(directory), "KUBECONFIG": str(kubeconfig), "PATH": path}
        cluster.run("kubectl", "config", "set-context", "--current", "--namespace", namespace, env=self._environment)

    def types(self, script: str) -> str:
        """Run it; what it printed. The image is the test cluster's own, which cannot pull any."""
        script = re.sub(r"tpvpn (connect|run)(?=\s)", rf"\g<0> --image {IMAGE}", script.replace(manifest.IMAGE, IMAGE))
        return blocks.run(script, *inside(self._where), environment=self._environment, directory=self._directory)

    @contextlib.contextmanager
    def manager(self) -> Iterator[None]:
        """A manager that is there for all sessions, since another terminal's command uses it."""
        command = [
            *inside(self._where),
            "tpvpn",
            "run",
            "--image",
            IMAGE,
            "--",
            "sh",
            "-c",
            "echo ready; exec sleep 900",
        ]
        with subprocess.Popen(command, env=self._environment, stdout=subprocess.PIPE) as running:
            assert running.stdout
            assert running.stdout.readline() == b"ready\n"
            yield
            running.terminate()


@pytest.fixture(scope="module")
def laptop(cluster: Kubernetes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A home, and where commands run that have an /etc of their own."""
    directory = tmp_path_factory.mktemp("person")
    with cluster.own_files(directory, NAMESERVER) as where:
        yield directory, where


@pytest.fixture(scope="module")
def person(cluster: Kubernetes, laptop: tuple[Path, str]) -> Iterator[Person]:
    """Who has read the first guide as far as the service `web`."""
    with cluster.namespace("guides") as namespace:
        person = Person(cluster, *laptop, namespace)
        person.types("".join(block for _, block in blocks.blocks(WEB) if block.startswith("kubectl create deployment")))
        with person.manager():
            yield person


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page(person: Person, page: Path) -> None:
    person.types(blocks.script(page, "cluster"))


@pytest.mark.parametrize("page", BESIDE_A_VPN, ids=lambda page: page.name)
def test_a_page_beside_a_vpn(cluster: Kubernetes, person: Person, page: Path) -> None:
    with cluster.private_route("10.0.0.0/8"):
        told = person.types(blocks.script(page, "cluster, vpn"))
    assert "connect would refuse: 2 of 2 subnets in conflict with private routes." in told


def test_first_use(cluster: Kubernetes, laptop: tuple[Path, str], tmp_path: Path) -> None:
    """From the installation to a pod's web page, and out again, in a namespace that has nothing: within a minute."""
    began = time.monotonic()
    newcomers = {**os.environ, "HOME": str(tmp_path), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    newcomers |= {"PIP_CACHE_DIR": str(Path.home() / ".cache" / "pip")}  # how fast a registry answers is another matter
    blocks.run(blocks.script(WEB, "checkout"), environment=newcomers, directory=blocks.ROOT)
    installed = time.monotonic()
    with cluster.namespace("first-guide") as namespace:
        told = Person(cluster, tmp_path, laptop[1], namespace).types(
            "command -v tpvpn\n" + blocks.script(WEB, "cluster")
        )
        ended = time.monotonic()
    assert f"\n{tmp_path}/.local/bin/tpvpn\n" in told
    assert told.count("<title>Directory listing for /</title>") == 3
    assert ended - began < 60, f"{installed - began:.0f} s of installation, and {ended - installed:.0f} s to the end"
