"""Every command of README and guides that needs a cluster, as a person on a laptop types it."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from kubernetes_lab import ADMIN, CACHE, IMAGE, Kubernetes

import blocks
from pod import inside
from tpvpn.kube import manifest

NAMESERVER = "10.131.0.250"
"""A laptop's own, which nobody answers."""
WEB = blocks.ROOT / "docs" / "guides" / "first-use.md"
PAGES = [page for page in blocks.PAGES if blocks.script(page, "cluster") and page != WEB]


class Person:
    """On a laptop with a home and an /etc of its own, and a context whose namespace is theirs."""

    def __init__(self, cluster: Kubernetes, directory: Path, where: str, namespace: str) -> None:
        self._directory, self._where = directory, where
        kubeconfig = directory / "kubeconfig"
        kubeconfig.write_text(ADMIN.read_text())
        path = f"{Path(sys.executable).parent}:{CACHE / 'bin'}:{os.environ['PATH']}"
        self._environment = {**os.environ, "HOME": str(directory), "KUBECONFIG": str(kubeconfig), "PATH": path}
        cluster.run("kubectl", "config", "set-context", "--current", "--namespace", namespace, env=self._environment)

    def types(self, script: str) -> str:
        """Run it; what it printed. The image is the test cluster's own, which cannot pull any."""
        script = script.replace(manifest.IMAGE, IMAGE)
        for command in ("connect", "run"):
            script = script.replace(f"tpvpn {command} ", f"tpvpn {command} --image {IMAGE} ")
            script = script.replace(f"tpvpn {command}\n", f"tpvpn {command} --image {IMAGE}\n")
        return blocks.run(script, *inside(self._where), environment=self._environment, directory=self._directory)


@pytest.fixture(scope="module")
def person(cluster: Kubernetes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Person]:
    """Who has read the first guide as far as the service `web`."""
    directory = tmp_path_factory.mktemp("person")
    with cluster.own_files(directory, NAMESERVER) as where, cluster.namespace("guides") as namespace:
        person = Person(cluster, directory, where, namespace)
        person.types("".join(block for _, block in blocks.blocks(WEB) if block.startswith("kubectl create deployment")))
        yield person


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page(person: Person, page: Path) -> None:
    person.types(blocks.script(page, "cluster"))


@pytest.mark.parametrize(
    "page", [page for page in blocks.PAGES if blocks.script(page, "cluster, vpn")], ids=lambda page: page.name
)
def test_a_page_beside_a_vpn(cluster: Kubernetes, person: Person, page: Path) -> None:
    with cluster.private_route("10.0.0.0/8"):
        told = person.types(blocks.script(page, "cluster, vpn"))
    assert "connect would refuse: 2 of 2 subnets in conflict with private routes." in told


def test_first_use(person: Person) -> None:
    """From the plan to a pod's web page, and out again; it is the last, since it takes `web` away."""
    told = person.types("kubectl delete service,deployment web\n" + blocks.script(WEB, "cluster"))
    assert told.count("<title>Directory listing for /</title>") == 3
