"""Kubeconfigs, API servers, clusters and managers that are not as they should be: one sentence, and nothing is left."""

import base64
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from socketserver import StreamRequestHandler
from typing import Any

import pytest
from bare_laptop import BareLaptop, bare_laptop
from kubernetes_lab import ADMIN, CACHE, Kubernetes

from peers import eventually
from tpvpn.proto import message
from tpvpn.wire import frame

PKI = ADMIN.parent
SUBNETS = ("--service-cidr", "10.130.0.0/16", "--pod-cidr", "10.132.0.0/16")


@pytest.fixture(scope="module")
def laptop(cluster: Kubernetes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BareLaptop]:
    with bare_laptop(cluster, tmp_path_factory.mktemp("laptop"), 7) as laptop:
        yield laptop


# -- kubeconfigs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is no kubeconfig: "),
        ("hello", "is no kubeconfig"),
        ("", "there is no kubeconfig at "),
        ("kind: Config\n", "has no current context"),
        ("current-context: a\n", "has no context a; it has none"),
        ("current-context: a\ncontexts: 7\nclusters: []\nusers: []\n", "is no kubeconfig"),
    ],
)
def test_a_file_that_is_no_kubeconfig(laptop: BareLaptop, tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "kubeconfig"
    file.write_text(text)
    sentence = laptop.refused(code=4, kubeconfig=str(file))
    assert str(file) in sentence and said in sentence


def test_a_file_that_is_not_there(laptop: BareLaptop) -> None:
    sentence = laptop.refused(code=4, kubeconfig="/none/here")
    assert sentence == "there is no kubeconfig at /none/here: give --kubeconfig or set KUBECONFIG"


def test_a_file_that_may_not_be_read(laptop: BareLaptop) -> None:
    assert "Is a directory" in laptop.refused(code=4, kubeconfig="/etc")


def test_an_unknown_context(laptop: BareLaptop) -> None:
    assert laptop.refused("--context", "prod", code=4).endswith("has no context prod; it has test")


def test_a_context_whose_cluster_is_missing(laptop: BareLaptop) -> None:
    config = laptop.config | {"clusters": []}
    file = laptop.directory / "no-cluster"
    file.write_text(json.dumps(config))  # which is YAML too
    sentence = laptop.refused(code=4, kubeconfig=str(file))
    assert "test" in sentence and "clusters" in sentence


def test_a_token_at_the_wrong_place_is_not_shown(laptop: BareLaptop) -> None:
    config = laptop.config | {"users": [{"name": "admin", "token": "very-secret"}]}
    file = laptop.directory / "wrong-place"
    file.write_text(json.dumps(config))
    sentence = laptop.refused(code=4, kubeconfig=str(file))
    assert "Expected key user" in sentence and "very-secret" not in sentence


@pytest.mark.parametrize("member", ["certificate-authority", "client-certificate", "tokenFile"])
def test_a_file_that_the_kubeconfig_names_is_missing(laptop: BareLaptop, member: str) -> None:
    changes: dict[str, dict[str, object]] = {
        "cluster": {"certificate-authority": "/none/ca.crt", "certificate-authority-data": None},
        "user": {"client-certificate": "/none/me.crt", "client-certificate-data": None},
    }
    if member == "tokenFile":
        changes = {"user": {"tokenFile": "/none/token", "client-certificate-data": None, "client-key-data": None}}
    else:
        changes = {kind: members for kind, members in changes.items() if member in members}
    sentence = laptop.refused(code=4, kubeconfig=laptop.kubeconfig(**changes))
    assert "/none/" in sentence


@pytest.mark.parametrize("data", ["bm9uZQ==", "%%%"])
def test_a_certificate_that_is_none(laptop: BareLaptop, data: str) -> None:
    file = laptop.kubeconfig(cluster={"certificate-authority-data": data})
    assert "certificate" in laptop.refused(code=4, kubeconfig=file)


# -- credentials -------------------------------------------------------------------------------------------------------


def openssl(*words: str) -> None:
    subprocess.run(["openssl", *words], check=True, capture_output=True)


def test_an_expired_client_certificate(laptop: BareLaptop, tmp_path: Path) -> None:
    key, request, certificate = (str(tmp_path / f"me.{ending}") for ending in ("key", "csr", "crt"))
    openssl("req", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", request, "-subj", "/O=system:masters/CN=me")
    authority = ("-CA", str(PKI / "ca.crt"), "-CAkey", str(PKI / "ca.key"), "-set_serial", "7")
    openssl("x509", "-req", "-in", request, *authority, "-days", "-1", "-out", certificate)
    files = {"client-certificate": certificate, "client-key": key}
    user = files | {"client-certificate-data": None, "client-key-data": None}
    sentence = laptop.refused(code=4, kubeconfig=laptop.kubeconfig(user=user))
    assert "does not accept the credentials of the kubeconfig" in sentence


def test_a_token_that_nobody_knows(laptop: BareLaptop) -> None:
    user = {"token": "none", "client-certificate-data": None, "client-key-data": None}
    sentence = laptop.refused(code=4, kubeconfig=laptop.kubeconfig(user=user))
    assert sentence.endswith("does not accept the credentials of the kubeconfig: log in to the cluster again")


def exec_plugin(command: str) -> dict[str, object]:
    said = {"apiVersion": "client.authentication.k8s.io/v1", "command": command, "interactiveMode": "Never"}
    return {"exec": said, "client-certificate-data": None, "client-key-data": None}


def test_an_exec_plugin_that_is_missing(laptop: BareLaptop) -> None:
    sentence = laptop.refused(code=4, kubeconfig=laptop.kubeconfig(user=exec_plugin("log-me-in")))
    assert "runs log-me-in, which is not there: PATH is " in sentence


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'no such realm: try again' >&2; exit 3", "no such realm: try again"),
        ("echo hello", "failed to decode process output"),
        ("echo 7", ""),
    ],
)
def test_an_exec_plugin_that_fails(laptop: BareLaptop, tmp_path: Path, script: str, said: str) -> None:
    plugin = tmp_path / "log-me-in"
    plugin.write_text(f"#!/bin/sh\n{script}\n")
    plugin.chmod(0o755)
    sentence = laptop.refused(code=4, kubeconfig=laptop.kubeconfig(user=exec_plugin(str(plugin))))
    assert str(plugin) in sentence and said in sentence


def test_an_exec_plugin_that_may_not_be_run(laptop: BareLaptop, tmp_path: Path) -> None:
    plugin = tmp_path / "log-me-in"
    plugin.write_text("")
    sentence = laptop.refused(code=4, kubeconfig=laptop.kubeconfig(user=exec_plugin(str(plugin))))
    assert str(plugin) in sentence


# -- API servers -------------------------------------------------------------------------------------------------------


def test_a_server_with_a_certificate_of_another_authority(laptop: BareLaptop) -> None:
    changed = {"certificate-authority-data": None, "certificate-authority": str(PKI / "front.crt")}
    sentence = laptop.refused(code=4, kubeconfig=laptop.kubeconfig(cluster=changed))
    assert "https://10.131.0.11:6443 has a certificate that the kubeconfig does not trust" in sentence


def test_a_server_of_another_name(laptop: BareLaptop) -> None:
    file = laptop.kubeconfig(cluster={"tls-server-name": "somewhere.example"})
    sentence = laptop.refused(code=4, kubeconfig=file)
    assert "has a certificate that the kubeconfig does not trust" in sentence


def answer(text: bytes) -> Any:
    """A handler that answers every request with this page."""

    def handle(request: StreamRequestHandler) -> None:
        while request.rfile.readline().strip():
            pass
        head = f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: {len(text)}\r\nConnection: close\r\n\r\n"
        request.wfile.write(head.encode() + text)

    return handle


@pytest.mark.parametrize("page", [b"<html>Welcome to the wireless network</html>", b"{}"])
def test_a_web_server(laptop: BareLaptop, page: bytes) -> None:
    with laptop.serving(answer(page)) as port:
        file = laptop.kubeconfig(cluster={"server": f"http://127.0.0.1:{port}"})
        sentence = laptop.refused(code=4, kubeconfig=file)
    assert "nothing that an API server would say: check the kubeconfig's server" in sentence


def test_a_server_that_speaks_no_http(laptop: BareLaptop) -> None:
    with laptop.serving(lambda request: request.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n")) as port:
        file = laptop.kubeconfig(cluster={"server": f"http://127.0.0.1:{port}"})
        assert "cannot reach the API server" in laptop.refused(code=4, kubeconfig=file)


def test_a_server_that_closes(laptop: BareLaptop) -> None:
    with laptop.serving(lambda request: None) as port:
        file = laptop.kubeconfig(cluster={"server": f"https://127.0.0.1:{port}"})
        assert "cannot reach the API server" in laptop.refused(code=4, kubeconfig=file)


def test_a_server_that_never_answers(laptop: BareLaptop) -> None:
    with laptop.serving(lambda request: list(request.rfile) and None) as port:
        file = laptop.kubeconfig(cluster={"server": f"http://127.0.0.1:{port}"})
        sentence = laptop.refused("--request-timeout", "0.5", code=4, kubeconfig=file)
    assert f"http://127.0.0.1:{port} did not answer within 0.5 s" in sentence


@pytest.mark.parametrize(
    ("server", "said"),
    [
        ("https://127.0.0.1:1", "Connection refused"),
        ("https://192.0.2.1:6443", "Network is unreachable"),
        ("https://api.none.invalid:6443", "api.none.invalid"),
        ("https://10.131.0.11:99999", "is no https:// URL"),
        ("10.131.0.11:6443", "is no https:// URL"),
    ],
)
def test_a_server_that_is_not_to_be_reached(laptop: BareLaptop, server: str, said: str) -> None:
    assert said in laptop.refused(code=4, kubeconfig=laptop.kubeconfig(cluster={"server": server}))


# -- clusters that refuse ----------------------------------------------------------------------------------------------


def test_an_image_that_cannot_be_had(laptop: BareLaptop) -> None:
    with laptop.cluster.namespace("image") as namespace:
        sentence = laptop.refused("--ephemeral", "--namespace", namespace, "--image", "tpvpn.test/none:1", code=6)
        assert "cannot start: ErrImagePull" in sentence or "cannot start: ImagePullBackOff" in sentence
        laptop.nothing_is_left(namespace)


@pytest.mark.parametrize("what", ["pods", "secrets", "count/jobs.batch"])
def test_a_quota_that_refuses(laptop: BareLaptop, what: str) -> None:
    namespace = f"quota-{what.replace('/', '-').replace('.', '-')}"
    with laptop.cluster.namespace(namespace):
        laptop.cluster.kubectl("create", "quota", "none", "--namespace", namespace, f"--hard={what}=0")
        code = 6 if what == "pods" else 4
        sentence = laptop.refused("--ephemeral", "--namespace", namespace, code=code)
        assert "exceeded quota: none" in sentence
        laptop.nothing_is_left(namespace)


def test_limits_that_refuse(laptop: BareLaptop) -> None:
    limits = {
        "apiVersion": "v1",
        "kind": "LimitRange",
        "metadata": {"name": "large"},
        "spec": {"limits": [{"type": "Container", "min": {"memory": "8Gi"}}]},
    }
    with laptop.cluster.namespace("limits") as namespace:
        laptop.cluster.kubectl("apply", "--namespace", namespace, "--filename", "-", input=json.dumps(limits))
        sentence = laptop.refused("--ephemeral", "--namespace", namespace, code=6)
        assert "minimum memory usage per Container is 8Gi" in sentence
        laptop.nothing_is_left(namespace)


def test_a_policy_that_refuses_our_pod(laptop: BareLaptop) -> None:
    rule = {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}
    here = {"matchLabels": {"kubernetes.io/metadata.name": "policy"}}
    policy = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingAdmissionPolicy",
        "metadata": {"name": "no-pods"},
        "spec": {
            "matchConstraints": {"resourceRules": [rule], "namespaceSelector": here},
            "validations": [{"expression": "false", "message": "no pods on Fridays"}],
        },
    }
    binding = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingAdmissionPolicyBinding",
        "metadata": {"name": "no-pods"},
        "spec": {"policyName": "no-pods", "validationActions": ["Deny"]},
    }
    kubectl = laptop.cluster.kubectl
    with laptop.cluster.namespace("policy") as namespace:
        kubectl(
            "apply",
            "--filename",
            "-",
            input=json.dumps({"apiVersion": "v1", "kind": "List", "items": [policy, binding]}),
        )
        try:
            eventually(lambda: not is_admitted(laptop.cluster, namespace), 30, "the policy is at work")
            sentence = laptop.refused("--ephemeral", "--namespace", namespace, code=6)
            assert "no pods on Fridays" in sentence
            laptop.nothing_is_left(namespace)
        finally:
            kubectl("delete", "validatingadmissionpolicy,validatingadmissionpolicybinding", "no-pods")


def is_admitted(cluster: Kubernetes, namespace: str) -> bool:
    words = ("run", "asked", "--namespace", namespace, "--image", "none", "--dry-run=server")
    return cluster.laptop(str(CACHE / "bin" / "kubectl"), *words).returncode == 0


# -- managers ----------------------------------------------------------------------------------------------------------


def config_map(**data: str) -> str:
    """As the chart makes it, with other data."""
    there = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "tpvpn"}, "data": data}
    return json.dumps(there)


@pytest.mark.parametrize("data", [{"port": "none"}, {"port": "7070", "replicas": "0"}, {"port": "70700"}])
def test_an_installed_manager_that_is_garbage(laptop: BareLaptop, garbage: str, data: dict[str, str]) -> None:
    laptop.cluster.kubectl("apply", "--namespace", garbage, "--filename", "-", input=config_map(**data))
    sentence = laptop.refused("--manager-namespace", garbage, code=6)
    assert sentence == f"configmap {garbage}/tpvpn is not what `tpvpn helm install` makes: install tpvpn again"


@pytest.fixture(scope="module")
def garbage(laptop: BareLaptop) -> Iterator[str]:
    with laptop.cluster.namespace(f"garbage-{os.getpid()}") as namespace:
        yield namespace


def test_garbage_for_clients_is_a_warning(laptop: BareLaptop, garbage: str) -> None:
    kubectl = laptop.cluster.kubectl
    for text in (
        "{",
        "client: 7",
        "client: {routing: {allowConflictingSubnets: [here]}}",
        "serviceCIDRs: [10.0.0.0/99]",
    ):
        data = config_map(port="7070", **{"client.yaml": text})
        kubectl("apply", "--namespace", garbage, "--filename", "-", input=data)
        plan = laptop.tpvpn("plan", "--manager-namespace", garbage)
        assert plan.returncode == 0, plan.stderr
        (warning,) = plan.stderr.splitlines()
        assert warning.startswith("tpvpn: warning: what the admin set for clients is ignored: "), text
        assert f"configmap {garbage}/tpvpn" in warning
        assert "10.130.0.0/16" in plan.stdout


def secret(tokens: bytes) -> str:
    """As the chart makes it, with other tokens."""
    data = {"tokens": base64.b64encode(tokens).decode()}
    return json.dumps({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "tpvpn"}, "data": data})


def test_a_secret_that_is_garbage(laptop: BareLaptop, garbage: str) -> None:
    kubectl = laptop.cluster.kubectl
    kubectl("apply", "--namespace", garbage, "--filename", "-", input=config_map(port="7070"))
    assert '"tpvpn" not found' in laptop.refused("--manager-namespace", garbage, code=4)
    for tokens in (b"", b"\xff"):
        kubectl("apply", "--namespace", garbage, "--filename", "-", input=secret(tokens))
        sentence = laptop.refused("--manager-namespace", garbage, code=6)
        assert sentence == f"secret {garbage}/tpvpn is not what `tpvpn helm install` makes: install tpvpn again"


def test_an_installed_manager_without_pods(laptop: BareLaptop, garbage: str) -> None:
    kubectl = laptop.cluster.kubectl
    kubectl("apply", "--namespace", garbage, "--filename", "-", input=config_map(port="7070"))
    kubectl("apply", "--namespace", garbage, "--filename", "-", input=secret(b"ann: 1234567890abcdef1234567890abcdef"))
    assert "tpvpn-0" in laptop.refused("--manager-namespace", garbage, code=4)


def test_a_manager_of_another_version(laptop: BareLaptop) -> None:
    def handle(request: StreamRequestHandler) -> None:
        while request.rfile.readline().strip():
            pass
        greeting = message.encode("greeting", versions=[99], nonce="0" * 64)
        switched = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: tpvpn\r\n\r\n"
        request.wfile.write(switched + frame.encode(frame.CONTROL, greeting))
        request.rfile.read(1)

    with laptop.serving(handle) as port:
        sentence = laptop.refused("--manager", f"tcp://127.0.0.1:{port}", code=6)
    assert "99" in sentence
