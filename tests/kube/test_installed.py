"""A manager that an admin installed with Helm, and the laptops that use it."""

import json
from collections.abc import Iterator

import pytest
from kubernetes_lab import IMAGE, Kubernetes

from peers import eventually

SUBNETS = ("--service-cidr", "10.130.0.0/16", "--pod-cidr", "10.132.0.0/16")


@pytest.fixture(scope="module")
def installed(cluster: Kubernetes) -> Iterator[Kubernetes]:
    """In namespace tpvpn, where every laptop looks, for the group developers."""
    cluster.helm(
        *("install", "--wait", "--set", f"image={IMAGE}", "--set", "clusterRole=true"),
        *("--set", "users[0].kind=Group", "--set", "users[0].name=developers"),
    )
    try:
        yield cluster
    finally:
        cluster.helm("uninstall", "--wait")
        cluster.kubectl("delete", "namespace", "tpvpn", "--wait=true")


def manager_of(cluster: Kubernetes) -> str:
    (shown,) = json.loads(cluster.tpvpn("status", "--output", "json").stdout)["sessions"]
    return shown["manager"]["endpoint"]


def is_reached(cluster: Kubernetes) -> bool:
    coredns = cluster.coredns
    healthy = cluster.laptop("curl", "--silent", "--max-time", "5", f"http://{coredns}:8080/health")
    return healthy.stdout == "OK"


def test_it_is_used_by_whoever_may_and_no_other_is_started(installed: Kubernetes) -> None:
    user = ("--as", "ann", "--as-group", "developers")
    with installed.connected(*user):
        assert "upgrade through" in manager_of(installed) and "services/tpvpn/tpvpn:7070" in manager_of(installed)
        assert is_reached(installed)
        listed = installed.tpvpn("manager", "sessions", "--output", "json", *user)
        assert listed.returncode == 0, listed.stderr
        (one,) = json.loads(listed.stdout)["sessions"]
        assert one["user"] == "default"
    assert installed.objects("jobs", "default") == []


def test_by_port_forward_too(installed: Kubernetes) -> None:
    with installed.connected("--as", "ann", "--as-group", "developers", "--transport", "portforward"):
        assert "portforward through" in manager_of(installed) and "pods/tpvpn/tpvpn-0:7070" in manager_of(installed)
        assert is_reached(installed)


def test_whoever_may_not_use_it_has_one_of_their_own(installed: Kubernetes) -> None:
    with installed.namespace("strangers") as namespace:
        installed.kubectl("create", "rolebinding", "eve", "--namespace", namespace, "--clusterrole=edit", "--user=eve")
        refused = installed.tpvpn("connect", "--as", "eve", "--namespace", namespace, "--no-ephemeral", *SUBNETS)
        assert refused.returncode == 4
        assert "no manager that you may use is installed in namespace tpvpn" in refused.stderr
        with installed.connected("--as", "eve", "--namespace", namespace, *SUBNETS):
            assert f"pods/{namespace}/tpvpn-" in manager_of(installed)


def test_one_of_their_own_may_be_asked_for(installed: Kubernetes) -> None:
    with installed.namespace("own") as namespace, installed.connected("--ephemeral", "--namespace", namespace):
        assert f"pods/{namespace}/tpvpn-" in manager_of(installed)


def test_what_the_admin_allows_reaches_a_connected_laptop(installed: Kubernetes) -> None:
    """A private route covers the cluster; the admin's word routes it within the time of two questions."""
    with installed.private_route("10.0.0.0/8"), installed.connected("--on-conflict", "skip") as session:

        def verdicts() -> dict[str, str]:
            (shown,) = json.loads(installed.tpvpn("status", "--output", "json").stdout)["sessions"]
            return {one["cidr"]: one["verdict"] for one in shown["plan"]["subnets"]}

        assert set(verdicts().values()) == {"conflict"}
        assert not is_reached(installed)
        installed.helm("upgrade", "--set", "client.routing.allowConflictingSubnets={10.128.0.0/9}")
        eventually(lambda: set(verdicts().values()) == {"routed"}, 30)
        assert is_reached(installed)
        plan = installed.tpvpn("plan")  # and a later one begins with it
        assert plan.returncode == 0, plan.stdout
        installed.helm("upgrade", "--set", "client.routing.allowConflictingSubnets=null")
        eventually(lambda: set(verdicts().values()) == {"conflict"}, 30)
        assert session.poll() is None


def test_names_that_the_admin_sets_reach_a_connected_laptop(installed: Kubernetes) -> None:
    def told(name: str) -> tuple[str, list[str]]:
        said = json.loads(installed.tpvpn("why", name, "--output", "json").stdout)["name"]
        return said["where"], said["addresses"]

    (service,) = [one for one in installed.objects("services", "default") if one["metadata"]["name"] == "kubernetes"]
    kubernetes = service["spec"]["clusterIP"]
    with installed.connected():
        assert told("api.example.com") == ("elsewhere", [])
        assert told("kubernetes.default") == ("cluster", [kubernetes])
        alias = '[{"name": "api.example.com", "aliasFor": "kubernetes.default.svc"}]'
        installed.helm(
            *("upgrade", "--set-json", f"client.dns.mappings={alias}"),
            *("--set", "client.dns.includeSuffixes={k8s.example}", "--set", "client.dns.excludeSuffixes={default}"),
        )
        eventually(lambda: told("api.example.com") == ("cluster", [kubernetes]), 30)
        assert told("x.k8s.example")[0] == "cluster" and told("kubernetes.default") == ("elsewhere", [])
        installed.helm("upgrade", "--set", "client.dns=null")
        eventually(lambda: told("api.example.com") == ("elsewhere", []), 30)


def test_subnets_that_the_admin_names_are_taken_as_they_are(installed: Kubernetes) -> None:
    installed.helm("upgrade", "--set", "podCIDRs={10.132.0.0/16}")
    try:
        plan = json.loads(installed.tpvpn("plan", "--output", "json").stdout)
        assert ("10.132.0.0/16", "pod") in [(one["cidr"], one["kind"]) for one in plan["subnets"]]
        assert any("configmap tpvpn/tpvpn" in one["source"] for one in plan["subnets"])
    finally:
        installed.helm("upgrade", "--set", "podCIDRs=null")


@pytest.mark.parametrize("removing", ["delete", "evict", "upgrade"])
def test_a_manager_that_goes_hands_its_sessions_to_the_next(installed: Kubernetes, removing: str) -> None:
    with installed.connected() as session:
        (before,) = json.loads(installed.tpvpn("status", "--output", "json").stdout)["sessions"]
        if removing == "delete":
            installed.kubectl("delete", "pod", "tpvpn-0", "--namespace", "tpvpn", "--wait=false")
        elif removing == "evict":
            installed.evict("tpvpn", "tpvpn-0")
        else:
            installed.helm("upgrade", "--wait", "--set", f"podAnnotations.again=x{session.pid}")

        def is_there_again() -> bool:
            (now,) = json.loads(installed.tpvpn("status", "--output", "json").stdout)["sessions"]
            assert now["addresses"] == before["addresses"]
            other = now["manager"]["session"] != before["manager"]["session"]
            return other and now["state"] == "ready" and is_reached(installed)

        eventually(is_there_again, 60)
        assert session.poll() is None


def test_the_api_server_may_restart(installed: Kubernetes) -> None:
    with installed.connected() as session:
        (before,) = json.loads(installed.tpvpn("status", "--output", "json").stdout)["sessions"]
        installed.restart_api_server()

        def is_there_again() -> bool:
            (now,) = json.loads(installed.tpvpn("status", "--output", "json").stdout)["sessions"]
            return now["reconnects"] > 0 and now["state"] == "ready" and is_reached(installed)

        eventually(is_there_again, 60)
        assert session.poll() is None
        (now,) = json.loads(installed.tpvpn("status", "--output", "json").stdout)["sessions"]
        assert now["manager"]["session"] == before["manager"]["session"]


def test_a_session_that_its_admin_ends_does_not_come_again(installed: Kubernetes) -> None:
    with installed.connected() as session:
        (shown,) = json.loads(installed.tpvpn("status", "--output", "json").stdout)["sessions"]
        ended = installed.tpvpn("manager", "sessions", "--end", shown["manager"]["session"])
        assert ended.returncode == 0, ended.stderr
        assert session.wait(10) == 7
        assert "the manager ended the session" in (session.stderr.read() if session.stderr else "")


def test_two_users_at_once(installed: Kubernetes) -> None:
    developer = ("--as-group", "developers")
    with (
        installed.connected("--as", "ann", *developer),
        installed.laptop2() as laptop2,
        installed.connected("--as", "bob", *developer, where=laptop2),
    ):
        assert is_reached(installed)
        health = f"http://{installed.coredns}:8080/health"
        assert installed.run("curl", "--silent", "--max-time", "5", health, where=laptop2).stdout == "OK"
        listed = installed.tpvpn("manager", "sessions", "--output", "json")
        assert len(json.loads(listed.stdout)["sessions"]) == 2
