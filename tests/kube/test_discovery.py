"""What a user is told and given of a cluster's subnets, by the rights that the user has there."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bare_laptop import BareLaptop, bare_laptop
from kubernetes_lab import IMAGE, Kubernetes

from peers import eventually
from pod import inside

SERVICES, PODS = "10.130.0.0/16", "10.132.0.0/23"
API_SERVICE, DNS_SERVICE = "10.130.0.1", "10.130.0.10"
IMPOSSIBLE = "API server's ClusterIP range"


@pytest.fixture(scope="module")
def laptop(cluster: Kubernetes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BareLaptop]:
    with bare_laptop(cluster, tmp_path_factory.mktemp("laptop"), 8) as laptop:
        yield laptop


@pytest.fixture(scope="module")
def namespace(laptop: BareLaptop) -> Iterator[str]:
    """A namespace with a service and a pod, for users who have rights in it."""
    with laptop.cluster.namespace(f"discovery-{os.getpid()}") as namespace:
        kubectl = laptop.cluster.kubectl
        server = ("--command", "--", "python3", "-m", "http.server", "8080")
        kubectl("run", "web", "--namespace", namespace, f"--image={IMAGE}", "--port=8080", "--expose", *server)
        kubectl("wait", "pod/web", "--namespace", namespace, "--for=condition=Ready", "--timeout=30s")
        yield namespace


class User:
    """A user of the cluster with the rights that a test gives it."""

    def __init__(self, laptop: BareLaptop, namespace: str, name: str, given: contextlib.ExitStack) -> None:
        self.laptop, self.namespace, self.name, self._given = laptop, namespace, name, given
        self.words = ("--as", name, "--namespace", namespace)

    def may(self, verbs: str, resources: str, *words: str, where: str | None = None) -> None:
        """A role in one namespace, in the user's own unless `where` says another; "" is the whole cluster."""
        kubectl, number = self.laptop.cluster.kubectl, time.monotonic_ns()
        name = f"test-{self.name}-{number}"
        where = self.namespace if where is None else where
        kind, scope = ("role", ("--namespace", where)) if where else ("clusterrole", ())
        kubectl("create", kind, name, f"--verb={verbs}", f"--resource={resources}", *words, *scope)
        self._given.callback(kubectl, "delete", kind, name, *scope)
        kubectl("create", f"{kind}binding", name, f"--{kind}={name}", f"--user={self.name}", *scope)
        self._given.callback(kubectl, "delete", f"{kind}binding", name, *scope)

    def plan(self, *words: str, **environment: str) -> tuple[list[tuple[str, str, str]], list[str]]:
        """The subnets of a plan with their kinds and sources, and the warnings."""
        shown = self.laptop.tpvpn("plan", "--output", "json", *self.words, *words, **environment)
        assert shown.returncode == 0, shown.stderr
        lines = shown.stderr.splitlines()
        assert all(line.startswith("tpvpn: warning: ") for line in lines)
        subnets = json.loads(shown.stdout)["subnets"]
        return [(one["cidr"], one["kind"], one["source"]) for one in subnets], lines


@pytest.fixture
def user(laptop: BareLaptop, namespace: str, request: pytest.FixtureRequest) -> Iterator[User]:
    with contextlib.ExitStack() as given:
        name = request.node.name.removeprefix("test_").replace("_", "-")[:30].strip("-")
        yield User(laptop, namespace, name, given)


@contextlib.contextmanager
def second_range(cluster: Kubernetes, cidr: str) -> Iterator[None]:
    """A second ServiceCIDR; a controller takes some seconds to let it go."""
    made: dict[str, Any] = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "ServiceCIDR",
        "metadata": {"name": "second-range"},
        "spec": {"cidrs": [cidr]},
    }
    cluster.kubectl("apply", "--filename", "-", input=json.dumps(made))
    try:
        yield
    finally:
        cluster.kubectl("delete", "servicecidr", "second-range", "--wait=false")


# -- all rights --------------------------------------------------------------------------------------------------------


def test_a_second_range_of_services_comes_and_goes(laptop: BareLaptop, namespace: str) -> None:
    with laptop.cluster.connected("--ephemeral", "--namespace", namespace, where=laptop.where):

        def routed() -> set[str]:
            return {one["cidr"] for one in laptop.session()["plan"]["subnets"] if one["verdict"] == "routed"}

        assert routed() == {SERVICES, PODS}
        with second_range(laptop.cluster, "10.133.0.0/24"):
            eventually(lambda: routed() == {SERVICES, PODS, "10.133.0.0/24"}, 8)
            plan = json.loads(laptop.tpvpn("plan", "--output", "json").stdout)
            assert ("10.133.0.0/24", "service", "ServiceCIDR API") in [
                (one["cidr"], one["kind"], one["source"]) for one in plan["subnets"]
            ]
            words = ("service", "clusterip", "second", "--namespace", namespace, "--tcp=80:8080")
            laptop.cluster.kubectl("create", *words, "--clusterip=10.133.0.7")
            laptop.cluster.kubectl("delete", "service", "second", "--namespace", namespace)
        eventually(lambda: routed() == {SERVICES, PODS}, 15)
    laptop.nothing_is_left(namespace)


# -- fewer -------------------------------------------------------------------------------------------------------------


def test_the_error_of_a_dry_run(user: User) -> None:
    user.may("create", "services")
    user.may("list", "nodes,pods", where="")
    subnets, warnings = user.plan()
    assert subnets == [(SERVICES, "service", IMPOSSIBLE), (PODS, "pod", "nodes' podCIDRs")]
    assert warnings == []
    services = user.laptop.cluster.objects("services", user.namespace)
    assert [one["metadata"]["name"] for one in services] == ["web"]


def test_kubeadms_configuration(user: User) -> None:
    kubectl = user.laptop.cluster.kubectl
    words = "networking: {serviceSubnet: 10.130.0.0/16, podSubnet: '10.132.0.0/16,fd00:132::/48'}"
    place = ("configmap", "kubeadm-config", "--namespace", "kube-system")
    kubectl("create", *place, f"--from-literal=ClusterConfiguration={words}")
    try:
        user.may("get", "configmaps", "--resource-name=kubeadm-config", where="kube-system")
        subnets, warnings = user.plan()
        assert ("10.130.0.0/16", "service", "kubeadm-config") in subnets
        assert ("10.132.0.0/16", "pod", "kubeadm-config") in subnets
        assert ("fd00:132::/48", "pod", "kubeadm-config") in subnets
        assert warnings == []
    finally:
        kubectl("delete", *place)


def test_addresses_alone(user: User) -> None:
    user.may("list", "services,pods", where="")
    subnets, warnings = user.plan()
    kinds = {kind: (cidr, source) for cidr, kind, source in subnets}
    assert kinds["service"][1] == "ClusterIPs seen" and kinds["pod"][1] == "pods seen"
    assert kinds["service"][0].startswith("10.130.")
    told = "\n".join(warnings)
    assert f"the service subnets are not stated anywhere that you may read: {kinds['service'][0]} covers" in told
    assert "may not list servicecidrs.networking.k8s.io; an admin allows it with `kubectl create clusterrole" in told


def test_pods_outside_the_subnet_that_is_given(user: User) -> None:
    user.may("list", "services,pods", where="")
    ended = user.laptop.tpvpn("connect", "--ephemeral", "--pod-cidr", "10.140.0.0/16", *user.words)
    assert ended.returncode == 4, ended.stderr  # no manager may be started
    warnings = [line for line in ended.stderr.splitlines() if "warning" in line]
    assert any(
        "pod addresses are outside the --pod-cidr given and will not be reached: 10.132." in one for one in warnings
    )
    assert any("the service subnets are not stated anywhere" in one for one in warnings)
    assert not any("the pod subnets" in one for one in warnings)


def test_what_the_configuration_names_wins(user: User, tmp_path: Path) -> None:
    file = tmp_path / "tpvpn" / "config.yaml"
    file.parent.mkdir()
    file.write_text("serviceCIDRs: [10.130.0.0/17]\npodCIDRs: [10.132.0.0/16]\n")
    subnets, warnings = user.plan(XDG_CONFIG_HOME=str(tmp_path))
    assert subnets == [("10.130.0.0/17", "service", f"{file} line 1"), ("10.132.0.0/16", "pod", f"{file} line 2")]
    assert warnings == []
    subnets, _ = user.plan("--service-cidr", SERVICES, XDG_CONFIG_HOME=str(tmp_path))
    assert subnets == [(SERVICES, "service", "--service-cidr"), ("10.132.0.0/16", "pod", f"{file} line 2")]


# -- one namespace -----------------------------------------------------------------------------------------------------


def test_a_user_of_one_namespace_reaches_it(user: User) -> None:
    """And the API server's service and the DNS service, which the manager sees."""
    user.may("get,list,create,delete", "pods,secrets,configmaps")
    user.may("list", "services")
    user.may("get,create,delete,patch", "jobs.batch")
    user.may("get", "pods/proxy")
    laptop, cluster = user.laptop, user.laptop.cluster
    (pod,) = [one["status"]["podIP"] for one in cluster.objects("pods", user.namespace)]
    (service,) = [one["spec"]["clusterIP"] for one in cluster.objects("services", user.namespace)]
    with cluster.connected("--ephemeral", *user.words, where=laptop.where) as session:
        for url in (f"http://{pod}:8080", f"http://{service}:8080", f"https://{API_SERVICE}/livez"):
            assert laptop.reaches(url), url
        assert resolves(laptop)
        session.terminate()
        said = session.communicate()[1]
        assert session.returncode == 0, said
    assert "tpvpn: warning: the service subnets are not stated anywhere that you may read: 10.130." in said
    assert "tpvpn: warning: the pod subnets are not stated anywhere that you may read: 10.132." in said
    assert "may not list pods; an admin allows it with `kubectl create clusterrole tpvpn-list-pods" in said
    laptop.nothing_is_left(user.namespace)


def test_an_editor_of_one_namespace_reaches_every_service(user: User) -> None:
    """Who may create services is told their range."""
    kubectl, scope = user.laptop.cluster.kubectl, ("--namespace", user.namespace)
    kubectl("create", "rolebinding", "editor", *scope, "--clusterrole=edit", f"--user={user.name}")
    laptop, words = user.laptop, ("--ephemeral", *user.words)
    (pod,) = [one["status"]["podIP"] for one in laptop.cluster.objects("pods", user.namespace)]
    with laptop.cluster.connected(*words, where=laptop.where) as session:
        subnets = {one["source"]: one["cidr"] for one in laptop.session()["plan"]["subnets"]}
        assert subnets[IMPOSSIBLE] == SERVICES
        assert laptop.reaches(f"http://{pod}:8080") and laptop.reaches(f"https://{API_SERVICE}/livez")
        assert resolves(laptop)
        session.terminate()
        said = session.communicate()[1]
    assert "the service subnets" not in said
    assert "the pod subnets are not stated anywhere that you may read" in said
    laptop.nothing_is_left(user.namespace)


def resolves(laptop: BareLaptop) -> bool:
    """Whether the cluster's DNS tells the address of the API server's service (RFC 1035 section 4.1)."""
    name = b"".join(bytes([len(one)]) + one for one in b"kubernetes.default.svc.cluster.local".split(b"."))
    with inside(laptop.where), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.settimeout(5)
        asking.sendto(b"\0\7\1\0\0\1\0\0\0\0\0\0" + name + b"\0\0\1\0\1", (DNS_SERVICE, 53))
        return socket.inet_aton(API_SERVICE) in asking.recv(512)


# -- none --------------------------------------------------------------------------------------------------------------


def test_a_user_with_nothing(user: User) -> None:
    sentence = user.laptop.refused("--ephemeral", *user.words, code=4)
    assert f"no manager runs in namespace {user.namespace}, and you may not start one there" in sentence
    assert user.laptop.cluster.objects("jobs", user.namespace) == []
