"""`tpvpn helm`, by the real helm on a real cluster: what it installs, what that lets users do, what changes."""

import asyncio
import base64
import hashlib
import json
import os
import re
import shlex
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes_lab import ADMIN, CACHE, IMAGE, LAPTOP, TPVPN, Kubernetes

from peers import eventually
from pod import inside
from tpvpn import __version__, config
from tpvpn.errors import TpvpnError
from tpvpn.kube import manifest
from tpvpn.kube.access import Access
from tpvpn.kube.api import opened
from tpvpn.kube.helm import CHART, VERBS, words
from tpvpn.proto.session import Offer
from tpvpn.proto.token import parse_tokens
from tpvpn.transport.apiserver import PortForward, Target, ThroughApiServer, Upgrade
from tpvpn.tunnel import shake_hands

ROOT = Path(__file__).parents[2]
NAMESPACE = "chart"
RESTRICTED = {"pod_security.kubernetes.io__enforce": "restricted"}
PATH = f"{CACHE / 'bin'}:{os.environ['PATH']}"
WAIT = ("--wait", "--timeout", "50s")


class Release:
    """A release of the chart in a namespace, as an admin on the laptop handles it."""

    def __init__(self, cluster: Kubernetes, namespace: str) -> None:
        self.cluster, self.namespace = cluster, namespace

    def helm(self, verb: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = ("helm", verb, *arguments, "--namespace", self.namespace)
        return self.cluster.tpvpn(*command, env={"PATH": PATH})

    def done(self, verb: str, *arguments: str) -> str:
        """What helm printed; it must succeed."""
        ran = self.helm(verb, *arguments)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    def get(self, kind: str, name: str = "tpvpn") -> dict[str, Any]:
        return json.loads(self.cluster.kubectl("get", kind, name, "--namespace", self.namespace, "--output", "json"))

    def secret(self, key: str, name: str = "tpvpn") -> bytes:
        return base64.b64decode(self.get("secret", name)["data"][key])

    def tokens(self) -> dict[str, bytes]:
        return parse_tokens(self.secret("tokens").decode())

    def client(self) -> dict[str, list[str]]:
        """What laptops are told, as they read it."""
        read = config.parse(self.get("configmap")["data"]["client.yaml"].encode(), "client.yaml")
        return {key.name: [str(one.value) for one in values] for key, values in read.values.items() if values}

    def pods(self) -> dict[str, tuple[str, int]]:
        """Of each pod of the manager, its uid and how often it was started again."""
        found = self.cluster.objects("pods", self.namespace)
        return {
            one["metadata"]["name"]: (one["metadata"]["uid"], one["status"]["containerStatuses"][0]["restartCount"])
            for one in found
            if one["metadata"]["labels"].get("app.kubernetes.io/component") == "manager"
        }

    def session(self, token: bytes, user: str | None = None, way: type[ThroughApiServer] = Upgrade, *pin: bytes) -> str:
        """Open a session; the pod that has it, or why there was none."""
        target = Target(self.namespace, *(("services", "tpvpn") if way is Upgrade else ("pods", "tpvpn-0")), 7070)

        async def scenario() -> str:
            async with opened(Access(kubeconfig=str(ADMIN), user=user)) as cluster:
                transport = way(cluster, target, token, *pin)
                stream, early = await transport.dial(await transport.resolve())
                try:
                    held, _ = await shake_hands(stream, early, token, Offer("test-helm"))
                finally:
                    stream.close()
                return held.terms.pod

        with inside(LAPTOP):
            try:
                return asyncio.run(scenario())
            except TpvpnError as error:
                return str(error)


@pytest.fixture(scope="module")
def release(cluster: Kubernetes) -> Iterator[Release]:
    """Installed once, by nothing but an image and a user, where PodSecurity `restricted` is enforced."""
    with cluster.namespace(NAMESPACE, **RESTRICTED) as namespace:
        made = Release(cluster, namespace)
        said = made.done("install", "--set", f"image={IMAGE},users[0].kind=User,users[0].name=carol", *WAIT)
        assert f"tpvpn connect --manager-namespace {NAMESPACE}" in said
        assert "User carol" in said
        yield made


def rendered(release: Release, *values: str) -> list[dict[str, Any]]:
    """The chart's objects."""
    flags = [word for value in values for word in ("--set", value)]
    return list(yaml.safe_load_all(release.done("template", *flags)))


def test_it_runs_and_helm_tests_it(release: Release) -> None:
    assert "Phase:          Succeeded" in release.done("test")
    (uid_and_restarts,) = release.pods().values()
    assert uid_and_restarts[1] == 0
    assert list(release.tokens()) == ["default"]
    assert release.session(release.tokens()["default"]) == "tpvpn-0"
    assert "the token is not one of this manager's" in release.session(b"another")


@pytest.mark.parametrize("way", [Upgrade, PortForward])
def test_a_user_by_name_gets_a_session_by_either_way(release: Release, way: type[ThroughApiServer]) -> None:
    assert release.session(release.tokens()["default"], "carol", way) == "tpvpn-0"
    assert "user dave may not" in release.session(release.tokens()["default"], "dave", way)


def test_a_user_may_do_what_is_listed_and_nothing_more(release: Release) -> None:
    def listed(user: str) -> set[str]:
        words = ("auth", "can-i", "--list", "--no-headers", "--as", user, "--namespace", NAMESPACE)
        return {" ".join(line.split()) for line in release.cluster.kubectl(*words).splitlines()}

    assert listed("carol") - listed("dave") == {
        "secrets [] [tpvpn] [get]",
        "configmaps [] [tpvpn] [get]",
        "services/proxy [] [tpvpn:7070] [get]",
        "pods/proxy [] [tpvpn-0:7070] [get]",
        "pods/portforward [] [tpvpn-0] [get create]",
    }
    for resource in ("secret/tpvpn-tls", "configmap/tpvpn-program", "secrets", "pods/tpvpn-0"):
        asked = ("auth", "can-i", "get", resource, "--as", "carol", "--namespace", NAMESPACE)
        assert release.cluster.laptop(str(CACHE / "bin" / "kubectl"), *asked).stdout.strip() == "no"


def test_what_laptops_are_told_changes_without_a_restart_and_keeps_what_was_said(release: Release) -> None:
    before, token = release.pods(), release.tokens()
    release.done("upgrade", "--set", "client.routing.allowConflictingSubnets={10.128.0.0/9}")
    assert release.client() == {"client.routing.allowConflictingSubnets": ["10.128.0.0/9"]}
    release.done("upgrade", "--set", "client.routing.onConflict=skip")
    assert release.client() == {
        "client.routing.allowConflictingSubnets": ["10.128.0.0/9"],
        "client.routing.onConflict": ["skip"],
    }
    (subject,) = release.get("rolebinding")["subjects"]
    assert subject["name"] == "carol"
    data = release.get("configmap")["data"]
    assert (data["port"], data["replicas"], data["encryption"]) == ("7070", "1", "auto")
    assert release.tokens() == token
    generation = release.get("statefulset")
    assert generation["metadata"]["generation"] == generation["status"]["observedGeneration"] == 1
    assert release.pods() == before
    release.done("upgrade", "--reset-values", "--set", f"image={IMAGE}", "--dry-run=server")


def test_other_tokens_reach_the_running_manager(release: Release) -> None:
    before, first = release.pods(), release.tokens()["default"]

    def known(*tokens: bytes) -> bool:
        # The kubelet looks at a pod's volumes each minute, and at once when something of the pod changes.
        release.cluster.kubectl(
            *("annotate", "pod", "tpvpn-0", "--namespace", NAMESPACE, "--overwrite", f"seen={os.urandom(4).hex()}")
        )
        return all(release.session(token) == "tpvpn-0" for token in tokens)

    release.done("upgrade", "--set", "tokens.default=,tokens.next=")
    both = release.tokens()
    assert list(both) == ["default", "next"]
    assert both["default"] == first, "an empty one is kept"
    eventually(lambda: known(*both.values()), 150, "both tokens")
    release.done("upgrade", "--set", "tokens.default=null")
    assert release.tokens() == {"next": both["next"]}
    eventually(lambda: not known(first), 150, "the first one is forgotten")
    assert release.session(both["next"]) == "tpvpn-0"
    given = "a-token-that-an-admin-chose"
    release.done("upgrade", "--set", f"tokens.next={given}")
    assert release.tokens() == {"next": given.encode()}
    eventually(lambda: known(given.encode()), 150, "the given token")
    assert release.pods() == before


def test_an_admin_of_one_namespace_may_install_there(cluster: Kubernetes) -> None:
    with cluster.namespace("chart-own", **RESTRICTED) as namespace:
        admin = ("--namespace", namespace, "--clusterrole", "admin", "--user", "ned")
        cluster.kubectl("create", "rolebinding", "admin", *admin)
        release = Release(cluster, namespace)
        ned = ("--kube-as-user", "ned", "--set", f"image={IMAGE},replicas=2,users[0].kind=Group,users[0].name=devs")
        refused = release.helm("install", *ned)
        assert 'cannot create resource "namespaces"' in refused.stderr
        release.done("install", "--create-namespace=false", *ned, *WAIT)
        release.done("uninstall", "--kube-as-user", "ned")


def test_two_pods_on_two_nodes(release: Release) -> None:
    first = release.pods()["tpvpn-0"]
    release.done("upgrade", "--set", "replicas=2", *WAIT)
    pods = {one["metadata"]["name"]: one["spec"]["nodeName"] for one in release.cluster.objects("pods", NAMESPACE)}
    assert sorted(pods) == ["tpvpn-0", "tpvpn-1"]
    assert len(set(pods.values())) == 2
    assert release.pods()["tpvpn-0"] == first
    assert release.get("poddisruptionbudget")["spec"]["maxUnavailable"] == 1
    names = {tuple(rule["resources"]): rule["resourceNames"] for rule in release.get("role")["rules"]}
    assert names[("pods/proxy",)] == ["tpvpn-0:7070", "tpvpn-1:7070"]
    assert names[("pods/portforward",)] == ["tpvpn-0", "tpvpn-1"]
    assert release.get("configmap")["data"]["replicas"] == "2"
    assert "Phase:          Succeeded" in release.done("test")
    (token,) = release.tokens().values()
    seen = set[str]()
    eventually(lambda: seen.add(release.session(token, "carol")) or seen == {"tpvpn-0", "tpvpn-1"}, 30, "both pods")


def test_encrypted_end_to_end_with_a_certificate_that_is_kept(cluster: Kubernetes) -> None:
    with cluster.namespace("chart-encrypted", **RESTRICTED) as namespace:
        release = Release(cluster, namespace)
        release.done("install", "--set", f"image={IMAGE},encryption=always", *WAIT)
        before = release.pods()
        pem = release.secret("tls.crt")
        assert pem == release.secret("tls.crt", "tpvpn-tls")
        assert set(release.get("secret")["data"]) == {"tokens", "tls.crt"}
        pin = hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem.decode())).digest()
        token = release.tokens()["default"]
        assert release.session(token, None, Upgrade, pin) == "tpvpn-0"
        assert "encrypted sessions alone" in release.session(token)
        release.done("upgrade", "--set", "client.routing.onConflict=skip", *WAIT)
        assert release.secret("tls.crt") == pem
        assert release.pods() == before
        release.done("uninstall")


VARIANTS = [
    ("exit=auto",),
    ("exit=socket", "destinations={10.130.0.0/16,fd00:130::/64}", "imagePullSecrets[0].name=registry"),
    ("exit=kernel", "replicas=2", "nodeSelector.pool=edge"),
    ("encryption=always", "replicas=3", "podAnnotations.team=net", "tolerations[0].operator=Exists"),
    ("clusterRole=true", "users[0].kind=Group,users[0].name=devs", "resources=null"),
    ("clusterRole=true", "users[0].kind=ServiceAccount,users[0].name=ci,users[0].namespace=default"),
    ("metrics.annotations=true", "metrics.dashboard.enabled=true"),
    ("networkPolicy.enabled=true", "networkPolicy.from={192.0.2.0/28,fd00::/64}"),
    ("serviceCIDRs={fd00:130::/112}", "client.dns.mappings[0].name=a.example,client.dns.mappings[0].aliasFor=b.c"),
]


@pytest.fixture(scope="module")
def elsewhere(cluster: Kubernetes) -> Iterator[Release]:
    """A namespace where nothing is installed."""
    with cluster.namespace("chart-variants") as namespace:
        yield Release(cluster, namespace)


@pytest.mark.parametrize("values", VARIANTS, ids=" ".join)
def test_every_variant_is_what_the_api_server_takes(elsewhere: Release, values: tuple[str, ...]) -> None:
    text = elsewhere.done("template", *(word for value in values for word in ("--set", value)))
    words = ("create", "--dry-run=server", "--validate=strict", "--filename", "-")
    taken = elsewhere.cluster.laptop(str(CACHE / "bin" / "kubectl"), *words, input=text)
    assert (taken.returncode, taken.stderr) == (0, "")
    assert len(taken.stdout.splitlines()) == len([one for one in yaml.safe_load_all(text) if one])


@pytest.mark.parametrize(("exit", "admitted"), [("auto", True), ("socket", True), ("kernel", False)])
def test_the_pod_is_admitted_where_restricted_is_enforced(release: Release, exit: str, admitted: bool) -> None:
    (stateful,) = (one for one in rendered(release, f"exit={exit}") if one["kind"] == "StatefulSet")
    template = stateful["spec"]["template"]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "asked"}, "spec": template["spec"]}
    words = ("create", "--dry-run=server", "--namespace", NAMESPACE, "--filename", "-")
    asked = release.cluster.laptop(str(CACHE / "bin" / "kubectl"), *words, input=json.dumps(pod))
    assert (asked.returncode == 0) is admitted, asked.stderr
    assert admitted or "violates PodSecurity" in asked.stderr
    (container,) = template["spec"]["containers"]
    assert f"--exit={exit}" in container["command"]
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["readOnlyRootFilesystem"] is True


def test_the_kernel_exit_has_the_rights_it_needs(cluster: Kubernetes) -> None:
    with cluster.namespace("chart-kernel") as namespace:
        release = Release(cluster, namespace)
        release.done("install", "--set", f"image={IMAGE},exit=kernel", *WAIT)
        assert release.session(release.tokens()["default"]) == "tpvpn-0"
        assert "exit kernel (IPv4" in cluster.kubectl("logs", "tpvpn-0", "--namespace", namespace)
        release.done("uninstall")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("client.routing.allowConflictingSubnet={10.128.0.0/9}", "allowConflictingSubnet"),
        ("client.routing.allowConflictingSubnets={db.example.com}", "allowConflictingSubnets"),
        ("client.routing.onConflict=maybe", "onConflict"),
        ("replica=2", "replica"),
        ("replicas=0", "replicas"),
        ("exit=iptables", "exit"),
        ("tokens.ann=short", "tokens"),
        ("users[0].kind=Group", "users"),
        ("users[0].kind=ServiceAccount,users[0].name=ci", "namespace"),
        ("networkPolicy.enabled=true", "networkPolicy"),
        ("metrics.podMonitor.interval=often", "interval"),
    ],
)
def test_a_value_that_is_none_is_refused(release: Release, value: str, said: str) -> None:
    refused = release.helm("template", "--set", value)
    assert refused.returncode == 1
    assert "values don't meet the specifications of the schema" in refused.stderr
    assert said in refused.stderr


def test_uninstalled_nothing_is_left(cluster: Kubernetes) -> None:
    kinds = cluster.kubectl("api-resources", "--namespaced", "--verbs=list", "--output=name").split()
    listed = ",".join(kind for kind in kinds if not kind.startswith("events"))

    def objects(namespace: str) -> set[str]:
        return set(cluster.kubectl("get", listed, "--namespace", namespace, "--output=name").split())

    with cluster.namespace("chart-gone", **RESTRICTED) as namespace:
        eventually(lambda: len(objects(namespace)) == 2, 20, "what each namespace has")
        before = objects(namespace)
        release = Release(cluster, namespace)
        values = "encryption=always,replicas=2,clusterRole=true,users[0].kind=User,users[0].name=carol"
        release.done("install", "--set", f"image={IMAGE},{values}")
        assert "statefulset.apps/tpvpn" in objects(namespace)
        assert cluster.kubectl("get", "clusterrole", f"tpvpn:{namespace}", "--output=name")
        release.done("uninstall")
        eventually(lambda: objects(namespace) == before, 40, "all objects are gone")
        clusterwide = cluster.kubectl("get", "clusterroles,clusterrolebindings", "--output=name")
        assert f"tpvpn:{namespace}" not in clusterwide


def test_each_command_of_the_admins_page_is_true(cluster: Kubernetes) -> None:
    """As they stand there, but for the namespace and the image."""
    page = (ROOT / "docs" / "guides" / "admins.md").read_text()
    lines = [line for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    assert len(lines) == 16
    try:
        for line in lines:
            line = re.sub("^tpvpn manager sessions", r"\g<0> --manager-namespace chart-page", line)
            line = re.sub("^tpvpn helm [a-z]+", r"\g<0> --namespace chart-page", line)
            line = re.sub("namespace tpvpn", "namespace chart-page", line)
            line = re.sub(" install ", rf"\g<0>--set image={IMAGE} --wait ", line)
            words = shlex.split(line)
            words[:1] = [*TPVPN] if words[0] == "tpvpn" else [str(CACHE / "bin" / words[0])]
            ran = cluster.laptop(*words, env={"PATH": PATH})
            assert ran.returncode == 0, f"{line}: {ran.stderr}"
    finally:
        cluster.kubectl("delete", "namespace", "chart-page", "--ignore-not-found")


def test_helm_answers_a_signal_and_its_exit_code_is_ours(cluster: Kubernetes, tmp_path: Path) -> None:
    with cluster.namespace("chart-signal") as namespace:
        release = Release(cluster, namespace)
        missing = release.helm("status")
        assert (missing.returncode, missing.stdout) == (1, "")
        assert "release: not found" in missing.stderr
        command = ["nsenter", f"--net=/run/netns/{LAPTOP}", *TPVPN, "helm", "install"]
        command += ["--namespace", namespace, "--set", "image=tpvpn.test/none:1", "--wait", "--timeout", "100s"]
        environment = {**os.environ, "KUBECONFIG": str(ADMIN), "PATH": PATH, "TMPDIR": str(tmp_path)}
        running = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        eventually(lambda: cluster.objects("pods", namespace) != [], 30, "a pod")
        assert [one.name for one in next(tmp_path.iterdir()).iterdir()] == ["tpvpn"]
        running.send_signal(signal.SIGTERM)
        _, said = running.communicate(timeout=30)
        assert running.returncode == 1, said
        assert list(tmp_path.iterdir()) == []


def test_without_a_helm_it_says_what_to_do() -> None:
    command = [*TPVPN, "helm", "install"]
    refused = subprocess.run(command, env={**os.environ, "PATH": "/nonexistent"}, capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr == (
        "tpvpn: there is no helm on PATH, and `tpvpn helm` runs your own: install Helm 3.14 or newer "
        "(https://helm.sh), or do without, as `tpvpn connect` starts a manager of its own\n"
    )


@pytest.mark.parametrize(
    ("given", "run"),
    [
        ("install", "install tpvpn C --create-namespace --namespace tpvpn"),
        ("install -n own --wait", "install tpvpn C --create-namespace -n own --wait"),
        ("upgrade --set a=b", "upgrade tpvpn C --reset-then-reuse-values --namespace tpvpn --set a=b"),
        ("upgrade --reset-values -nown", "upgrade tpvpn C --reset-values -nown"),
        ("upgrade --namespace=own --reuse-values=true", "upgrade tpvpn C --namespace=own --reuse-values=true"),
        ("uninstall --wait", "uninstall tpvpn --namespace tpvpn --wait"),
        ("get values --all", "get values tpvpn --namespace tpvpn --all"),
        ("show values", "show values C --namespace tpvpn"),
        ("rollback 2", "rollback tpvpn --namespace tpvpn 2"),
        ("lint --strict", "lint C --namespace tpvpn --strict"),
        ("get --help", "get tpvpn --namespace tpvpn --help"),
    ],
)
def test_what_helm_is_given(given: str, run: str) -> None:
    verb, *arguments = given.split()
    assert words(verb, arguments, Path("C")) == run.split()


def test_every_verb_is_one_of_helms(release: Release) -> None:
    for verb in VERBS:
        assert "Usage:" in release.done(verb, "--help")


MONITORING = (
    "metrics.podMonitor.enabled",
    "metrics.alerts.enabled",
    "metrics.dashboard.enabled",
    "metrics.annotations",
)


def test_what_watches_the_manager_is_there_when_it_is_asked_for() -> None:
    def rendered(*values: str) -> dict[tuple[str, str], Any]:
        flags = [word for value in values for word in ("--set", value)]
        run = [*TPVPN, "helm", "template", "--namespace", "vpn", *flags]
        text = subprocess.run(run, env={**os.environ, "PATH": PATH}, check=True, capture_output=True, text=True).stdout
        return {(one["kind"], one["metadata"]["name"]): one for one in yaml.safe_load_all(text) if one}

    without = rendered()
    found = rendered(*(f"{value}=true" for value in MONITORING), "metrics.labels.release=prom")
    added = {("PodMonitor", "tpvpn"), ("PrometheusRule", "tpvpn"), ("ConfigMap", "tpvpn-dashboard")}
    assert set(found) - set(without) == added
    board = found["ConfigMap", "tpvpn-dashboard"]
    assert board["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(board["data"]["tpvpn.json"])["uid"] == "tpvpn-manager"
    template = found["StatefulSet", "tpvpn"]["spec"]["template"]
    assert template["metadata"]["annotations"]["prometheus.io/port"] == "7070"
    assert "prometheus" not in json.dumps(without["StatefulSet", "tpvpn"])
    monitor = found["PodMonitor", "tpvpn"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    (port,) = template["spec"]["containers"][0]["ports"]
    assert monitor["spec"]["podMetricsEndpoints"] == [{"port": port["name"], "interval": "30s"}]
    (group,) = found["PrometheusRule", "tpvpn"]["spec"]["groups"]
    for rule in group["rules"]:
        assert 'namespace="vpn"' in rule["expr"]
        assert rule["annotations"]["summary"] and rule["labels"]["severity"] in ("warning", "critical")
    for kind in ("PodMonitor", "PrometheusRule"):
        assert found[kind, "tpvpn"]["metadata"]["labels"]["release"] == "prom"
    assert "NAMESPACE" not in json.dumps(list(found.values()))


def test_chart_and_package_are_one(tmp_path: Path) -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (__version__, __version__)
    assert yaml.safe_load((CHART / "values.yaml").read_text())["image"] == manifest.IMAGE
    # Helm's own rule: every value that is there has its place in the schema, and the other way round.
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert set(schema["properties"]) == set(yaml.safe_load((CHART / "values.yaml").read_text()))
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([sys.executable, "-m", "zipfile", "-e", wheel, tmp_path / "site"], check=True)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "PATH": PATH}
    run = [*TPVPN, "helm", "template", "--show-only", "templates/configmaps.yaml"]
    shown = subprocess.run(run, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout
    program = next(one for one in yaml.safe_load_all(shown) if one["metadata"]["name"] == "tpvpn-program")
    (tmp_path / "manager.pyz").write_bytes(base64.b64decode(program["binaryData"]["manager.pyz"]))
    help = subprocess.run([sys.executable, "-I", tmp_path / "manager.pyz", "--help"], capture_output=True, text=True)
    assert "--until-idle" in help.stdout
