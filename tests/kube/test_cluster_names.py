"""The cluster's own names, from laptops with a plain resolv.conf and with systemd-resolved: all that CoreDNS says."""

import json
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from kubernetes_lab import Kubernetes, inside

from name_clients import CLIENTS, clients  # noqa: F401  (a fixture)
from peers import eventually
from resolved_lab import Resolved

NAMESPACE = "names"
NOBODY = "10.131.0.250"
PODS = 1000
OBJECTS = f"""
apiVersion: v1
kind: Service
metadata: {{name: web, namespace: {NAMESPACE}}}
spec:
  ports: [{{name: http, port: 80}}]
---
apiVersion: v1
kind: Service
metadata: {{name: many, namespace: {NAMESPACE}}}
spec:
  clusterIP: None
  ports: [{{name: http, port: 80}}]
---
apiVersion: v1
kind: Service
metadata: {{name: alias, namespace: {NAMESPACE}}}
spec: {{type: ExternalName, externalName: web.{NAMESPACE}.svc.cluster.local}}
"""


def slice_of(number: int, addresses: list[str]) -> dict[str, object]:
    """Pods of the headless service, as its controller writes them; the first has a StatefulSet's name."""
    endpoints = [{"addresses": [one], "conditions": {"ready": True}} for one in addresses]
    if number == 0:
        endpoints[0]["hostname"] = "many-0"  # pyright: ignore[reportArgumentType]
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": f"many-{number}",
            "namespace": NAMESPACE,
            "labels": {"kubernetes.io/service-name": "many"},
        },
        "addressType": "IPv4",
        "endpoints": endpoints,
        "ports": [{"name": "http", "port": 80}],
    }


@pytest.fixture(scope="module")
def services(cluster: Kubernetes) -> Iterator[str]:
    """The address of the service `web`."""
    with cluster.namespace(NAMESPACE):
        cluster.kubectl("apply", "--filename", "-", input=OBJECTS)
        addresses = [f"10.132.{100 + number // 250}.{number % 250 + 1}" for number in range(PODS)]
        for number in range(PODS // 100):
            part = slice_of(number, addresses[number * 100 : number * 100 + 100])
            cluster.kubectl("apply", "--filename", "-", input=json.dumps(part))
        (web,) = [one for one in cluster.objects("services", NAMESPACE) if one["metadata"]["name"] == "web"]
        yield web["spec"]["clusterIP"]


@pytest.fixture(scope="module")
def laptop(cluster: Kubernetes, services: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A laptop that is connected, whose own resolver is nobody."""
    with (
        cluster.own_files(tmp_path_factory.mktemp("laptop"), NOBODY) as where,
        cluster.connected("--namespace", NAMESPACE, "--name", "names", where=where),
    ):
        yield where


def dig(cluster: Kubernetes, laptop: str, *words: str) -> list[str]:
    done = cluster.run("dig", "+tries=1", "+time=3", *words, where=laptop)
    assert done.returncode == 0, done.stdout
    return done.stdout.split("\n")[:-1]


# These come first: of two sessions in one network namespace only the first has the short names.


def test_the_file_is_as_before_when_the_session_has_ended(cluster: Kubernetes, services: str, tmp_path: Path) -> None:
    with cluster.own_files(tmp_path, NOBODY) as where:
        file = tmp_path / "etc" / "resolv.conf"
        before = file.read_text()
        with cluster.connected("--namespace", NAMESPACE, "--name", "names2", where=where):
            assert file.read_text() != before
            assert cluster.run("getent", "hosts", "web", where=where).stdout.split()[0] == services
        assert file.read_text() == before
        assert not list(file.parent.glob("resolv.conf?*"))


class Laptop:
    """The laptop with files of its own, as `Resolved` has a lab's."""

    def __init__(self, cluster: Kubernetes, where: str, directory: Path) -> None:
        self.cluster, self.where, self.run_directory = cluster, where, directory

    def run(self, _: str, argv: Sequence[str], *, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = self.cluster.run(*argv, where=self.where)
        assert not check or done.returncode == 0, done.stderr
        return done

    def popen(self, _: str, argv: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        return subprocess.Popen([*inside(self.where), *argv], **options)


def test_by_systemd_resolved(
    cluster: Kubernetes,
    services: str,
    clients: dict[str, tuple[str, ...]],  # noqa: F811
    tmp_path: Path,
) -> None:
    with cluster.own_files(tmp_path, NOBODY) as where, Resolved(Laptop(cluster, where, tmp_path)) as resolved:
        resolved.uplink("eth0", NOBODY)
        file = tmp_path / "etc" / "resolv.conf"
        words = ("--namespace", NAMESPACE, "--name", "resolved")
        with cluster.connected(*words, where=where):
            assert status_of(cluster, where, "resolved")["dns"]["mode"] == "resolved"
            assert file.is_symlink()
            for client in CLIENTS:
                has_every_form(cluster, where, services, clients[client])
            assert "DNSSEC=no" in resolved.resolvectl("status", "tpvpn-resolved")
        assert "cluster.local" not in resolved.resolvectl("status")


@pytest.mark.parametrize("client", CLIENTS)
def test_every_client_has_every_form(
    cluster: Kubernetes,
    laptop: str,
    services: str,
    clients: dict[str, tuple[str, ...]],  # noqa: F811
    client: str,
) -> None:
    has_every_form(cluster, laptop, services, clients[client])


def has_every_form(cluster: Kubernetes, where: str, services: str, client: Sequence[str]) -> None:
    for name in ("web", f"web.{NAMESPACE}", f"web.{NAMESPACE}.svc", f"web.{NAMESPACE}.svc.cluster.local", "alias"):
        found = cluster.run(*client, name, where=where)
        assert found.stdout.split() == [services], (name, found)
    missing = cluster.run(*client, f"none.{NAMESPACE}", where=where)
    assert missing.returncode != 0 and not missing.stdout


def test_programs_reach_services_and_pods_by_name(cluster: Kubernetes, laptop: str) -> None:
    api = cluster.run(
        "curl", "-sk", "-o", "/dev/null", "-w", "%{http_code}", "https://kubernetes.default/", where=laptop
    )
    assert api.stdout in ("401", "403"), api
    ready = cluster.run("curl", "-s", "http://kube-dns.kube-system.svc:9153/metrics", where=laptop)
    assert ready.returncode in (0, 7), ready  # the name was found; the service has no such port
    dashed = cluster.coredns.replace(".", "-")
    ready = cluster.run("curl", "-s", f"http://{dashed}.kube-system.pod.cluster.local:8181/ready", where=laptop)
    assert ready.stdout == "OK", ready


@pytest.mark.parametrize(
    "question",
    [
        ("web.names.svc.cluster.local", "A"),
        ("web.names.svc.cluster.local", "AAAA"),
        ("web.names.svc.cluster.local", "MX"),
        ("_http._tcp.web.names.svc.cluster.local", "SRV"),
        ("_http._tcp.many.names.svc.cluster.local", "SRV", "+tcp"),
        ("alias.names.svc.cluster.local", "A"),
        ("alias.names.svc.cluster.local", "CNAME"),
        ("dns-version.cluster.local", "TXT"),
        ("cluster.local", "SOA"),
        ("none.names.svc.cluster.local", "A"),
        ("many-0.many.names.svc.cluster.local", "A"),
    ],
    ids=" ".join,
)
def test_answers_are_those_of_coredns(cluster: Kubernetes, laptop: str, question: tuple[str, ...]) -> None:
    words = ("+noall", "+answer", "+authority", "+comments", "+ttlid", "+nocookie", *question)

    def records(server: str) -> list[str]:
        lines = [line.split() for line in dig(cluster, laptop, f"@{server}", *words)]
        found = [[*words[:1], *words[2:]] for words in lines if words and not words[0].startswith(";")]
        status = [" ".join(words) for words in lines if "status:" in words]
        return [status[0].partition(", id")[0], *sorted(" ".join(words) for words in found)]

    own = status_of(cluster, laptop)["dns"]["listening"][0]
    assert records(own) == records(cluster.coredns)


def test_the_reverse_name_of_a_service(cluster: Kubernetes, laptop: str, services: str) -> None:
    assert dig(cluster, laptop, "+short", "-x", services) == [f"web.{NAMESPACE}.svc.cluster.local."]
    assert cluster.run("getent", "hosts", services, where=laptop).stdout.split()[1:2] == [
        f"web.{NAMESPACE}.svc.cluster.local"
    ]


def test_a_headless_service_of_a_thousand_pods(
    cluster: Kubernetes,
    laptop: str,
    clients: dict[str, tuple[str, ...]],  # noqa: F811
) -> None:
    assert len(set(dig(cluster, laptop, "+short", f"many.{NAMESPACE}.svc.cluster.local"))) == PODS  # by TCP at last
    for client in ("glibc", "go", "python"):
        found = cluster.run(*clients[client], f"many.{NAMESPACE}", where=laptop)
        assert len(set(found.stdout.split())) == PODS, (client, found.stderr)


def test_a_namespace_that_comes_and_goes(cluster: Kubernetes, laptop: str) -> None:
    with cluster.namespace("latecomer"):
        cluster.kubectl("create", "service", "clusterip", "one", "--tcp=80", "--namespace", "latecomer")
        eventually(
            lambda: cluster.run("getent", "hosts", "one.latecomer", where=laptop).returncode == 0, 15, "its names"
        )


def test_why(cluster: Kubernetes, laptop: str, services: str) -> None:
    said = cluster.run("python3", "-c", "pass", where=laptop)
    assert said.returncode == 0
    told = cluster.tpvpn("why", f"web.{NAMESPACE}", "--name", "names", where=laptop)
    assert told.returncode == 0, told.stderr
    assert services in told.stdout and f"web.{NAMESPACE}.svc.cluster.local" in told.stdout


def status_of(cluster: Kubernetes, where: str, name: str = "names") -> dict[str, dict[str, Any]]:
    told = cluster.tpvpn("status", "--name", name, "--output", "json", where=where)
    return json.loads(told.stdout)["sessions"][0]


def test_a_thousand_questions_a_second_through_the_tunnel(cluster: Kubernetes, laptop: str, tmp_path: Path) -> None:
    names = [f"10-132-{100 + number // 250}-{number % 250 + 1}.{NAMESPACE}.pod.cluster.local" for number in range(PODS)]
    questions = tmp_path / "questions"
    questions.write_text("".join(f"{name} A\n" for name in names))
    own = status_of(cluster, laptop)["dns"]["listening"][0]
    words = ("-s", own, "-d", str(questions), "-Q", str(PODS), "-l", "3")
    said = cluster.run("dnsperf", *words, where=laptop).stdout
    figures = dict(line.strip().split(":", 1) for line in said.splitlines() if line.startswith("  ") and ":" in line)
    assert figures["Queries lost"].split()[0] == "0", said
    assert figures["Response codes"].split() == ["NOERROR", figures["Queries completed"].split()[0], "(100.00%)"], said
