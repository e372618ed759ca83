"""Who is killed and who comes twice: what an ephemeral manager and the laptops that use it leave behind."""

import asyncio
import os
import signal
from collections.abc import Iterator

import pytest
from kubernetes_lab import ADMIN, IMAGE, Kubernetes
from kubernetes_laptop import PATIENCE, KubernetesLaptop

from peers import eventually
from pod import inside
from tpvpn.kube import manifest
from tpvpn.kube.access import Access
from tpvpn.kube.api import opened
from tpvpn.kube.install import Installer, Manager, name_for
from tpvpn.kube.manifest import Ephemeral

KINDS = ("jobs", "pods", "secrets", "configmaps")


@pytest.fixture(scope="module")
def namespaces(cluster: Kubernetes) -> Iterator[tuple[str, str]]:
    with (
        cluster.laptop2(3) as one,
        cluster.laptop2(4) as other,
    ):
        for netns in (one, other):
            KubernetesLaptop(cluster, netns).settle()
        yield one, other


@pytest.fixture
def laptops(
    cluster: Kubernetes, namespaces: tuple[str, str], request: pytest.FixtureRequest
) -> Iterator[list[KubernetesLaptop]]:
    """Two of one user, with a namespace for his manager; nothing is left of it in the end, and nothing on them."""
    name = f"crash-{request.function.__name__.replace('_', '-')}"[:60].rstrip("-")
    with cluster.namespace(name) as namespace:
        laptops = [KubernetesLaptop(cluster, netns, "--manager-namespace", namespace) for netns in namespaces]
        before = [laptop.state() for laptop in laptops]
        yield laptops
        for laptop, state in zip(laptops, before, strict=True):
            laptop.is_as(state)
        eventually(lambda: not any(made(laptops[0], kind) for kind in KINDS), 30, "nothing is left in the cluster")


@pytest.fixture
def laptop(laptops: list[KubernetesLaptop]) -> KubernetesLaptop:
    return laptops[0]


def made(laptop: KubernetesLaptop, kind: str) -> list[str]:
    """The names of what tpvpn made."""
    found = [one["metadata"]["name"] for one in laptop.cluster.objects(kind, laptop.manager[-1])]
    return [name for name in found if name.startswith("tpvpn")]


def reaches(laptop: KubernetesLaptop) -> bool:
    health = f"http://{laptop.cluster.coredns}:8080/health"
    return laptop.run("curl", "--silent", "--max-time", "5", health).stdout == "OK"


async def start_manager(namespace: str, linger: int, idle: int, kept: int) -> None:
    """The admin's own ephemeral manager, which is less patient than usual."""
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(manifest, "LINGER", linger)
        patching.setattr(manifest, "IDLE", idle)
        patching.setattr(manifest, "KEPT", kept)
        async with opened(Access(kubeconfig=str(ADMIN))) as cluster:
            await Installer(cluster, Ephemeral(await name_for(cluster), namespace, IMAGE), print).manager()


def test_a_killed_session_leaves_nothing_and_its_manager_ends_by_itself(laptop: KubernetesLaptop) -> None:
    with inside(laptop.namespace):
        asyncio.run(start_manager(laptop.manager[-1], linger=2, idle=3, kept=1))
    before = laptop.state()
    (pod,) = made(laptop, "pods")
    with laptop.connected() as session:
        assert reaches(laptop)
        assert made(laptop, "pods") == [pod]
        os.kill(session.process.pid, signal.SIGKILL)
        laptop.is_as(before, 1)
        session.wait()
    assert made(laptop, "jobs"), "nobody has removed it"
    eventually(lambda: not made(laptop, "jobs"), 30, "idle, complete, and past its time to live")


def test_sessions_of_one_user_share_a_manager_and_the_last_removes_it(laptops: list[KubernetesLaptop]) -> None:
    first, second = laptops
    with second.start() as other:
        with first.connected() as one:
            other.wait_ready(PATIENCE)  # begun at the same moment
            (pod,) = made(first, "pods")
            for laptop, session in ((first, one), (second, other)):
                assert laptop.status()["manager"]["pod"] == pod, session.said
                assert reaches(laptop)
        assert made(first, "jobs"), "it is used still"
        assert reaches(second)
        with first.connected():
            assert made(first, "pods") == [pod]
            assert reaches(first)
    assert made(first, "jobs") == []


def test_managers_that_are_started_within_moments_are_one(laptop: KubernetesLaptop) -> None:
    """The second to come asks while the first one makes it: nobody removes what has only begun."""

    async def start_two(delay: float) -> None:
        async with opened(Access(kubeconfig=str(ADMIN))) as cluster:
            wanted = Ephemeral(await name_for(cluster), laptop.manager[-1], IMAGE)
            one, other = (Installer(cluster, wanted, print) for _ in range(2))

            async def later() -> Manager:
                await asyncio.sleep(delay)
                return await other.manager()

            first, second = await asyncio.gather(one.manager(), later())
            assert first == second
            await one.remove()

    for delay in (0.0, 0.01, 0.02):
        with inside(laptop.namespace):
            asyncio.run(start_two(delay))


def test_a_command_has_the_cluster_and_its_exit_code_is_ours(laptop: KubernetesLaptop) -> None:
    script = f"curl --silent --max-time 5 http://{laptop.cluster.coredns}:8080/health; exit 7"
    done = laptop.connect("--", "sh", "-c", script)
    assert (done.returncode, done.stdout) == (7, "OK"), done.stderr


def test_a_manager_whose_pod_goes_is_had_again_with_the_same_addresses(laptop: KubernetesLaptop) -> None:
    with laptop.connected() as session:
        before, (pod,) = laptop.status(), made(laptop, "pods")
        words = ("--namespace", laptop.manager[-1], "--wait=false")
        laptop.cluster.kubectl("delete", "pod", pod, *words)
        eventually(lambda: session.said.count("took us in") == 2 or session.process.poll() is not None, PATIENCE)
        assert session.process.poll() is None, session.said
        eventually(lambda: laptop.status()["state"] == "ready", 5)
        now = laptop.status()
        assert now["manager"]["pod"] != pod
        assert now["addresses"] == before["addresses"]
        assert reaches(laptop)
