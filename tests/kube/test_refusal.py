"""What an API server's refusal becomes: one sentence, and the command by which an admin allows it."""

import json

import pytest

from tpvpn.errors import ClusterError
from tpvpn.kube.refusal import ExistsError, ForbiddenError, LoginError, MissingError, refusal

SERVER = "https://10.131.0.11:6443"


def status(message: str) -> bytes:
    return json.dumps({"kind": "Status", "apiVersion": "v1", "message": message}).encode()


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (
            'nodes is forbidden: User "ann" cannot list resource "nodes" in API group "" at the cluster scope',
            "user ann may not list nodes; an admin allows it with `kubectl create clusterrole tpvpn-list-nodes --verb "
            "list --resource nodes` and `kubectl create clusterrolebinding tpvpn-list-nodes --clusterrole "
            "tpvpn-list-nodes --user ann`",
        ),
        (
            'jobs.batch is forbidden: User "ann" cannot create resource "jobs" in API group "batch" '
            'in the namespace "dev"',
            "user ann may not create jobs.batch in namespace dev; an admin allows it with `kubectl create role "
            "tpvpn-create-jobs --verb create --resource jobs.batch --namespace dev` and `kubectl create rolebinding "
            "tpvpn-create-jobs --role tpvpn-create-jobs --user ann --namespace dev`",
        ),
        (
            'pods "m" is forbidden: User "ann" cannot get resource "pods/proxy" in API group "" in the namespace "dev"',
            "user ann may not get pods/proxy in namespace dev; an admin allows it with `kubectl create role "
            "tpvpn-get-pods --verb get --resource pods/proxy --namespace dev` and `kubectl create rolebinding "
            "tpvpn-get-pods --role tpvpn-get-pods --user ann --namespace dev`",
        ),
        ("exceeded quota: q", "the API server forbids it: exceeded quota: q"),
    ],
)
def test_forbidden(said: str, expected: str) -> None:
    error = refusal(403, status(said), SERVER, "list nodes")
    assert isinstance(error, ForbiddenError)
    assert (str(error), error.exit_code) == (expected, 4)


@pytest.mark.parametrize(
    ("code", "body", "kind", "says"),
    [
        (401, status("Unauthorized"), LoginError, "log in to the cluster again"),
        (404, status('pods "x" not found'), MissingError, 'pods "x" not found'),
        (500, status("etcd is\ndown\x1b[2J"), ClusterError, "(500): etcd is down?[2J"),
        (200, b"<html>", ClusterError, "nothing that an API server would say"),
        (502, b"", ClusterError, "nothing that an API server would say"),
        (400, b"[1]", ClusterError, "nothing that an API server would say"),
        (409, json.dumps({"kind": "Status"}).encode(), ExistsError, "no reason given"),
    ],
)
def test_other_refusals(code: int, body: bytes, kind: type[ClusterError], says: str) -> None:
    error = refusal(code, body, SERVER, "get /x")
    assert type(error) is kind
    assert says in str(error)
    assert str(error).isprintable()
