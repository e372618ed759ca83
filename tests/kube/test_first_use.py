"""`tpvpn connect` with a kubeconfig and nothing else, against a real Kubernetes."""

import json

from kubernetes_lab import IMAGE, Kubernetes

from peers import eventually


def test_a_plan_creates_nothing(cluster: Kubernetes) -> None:
    shown = cluster.tpvpn("plan", "--output", "json")
    assert shown.returncode == 0, shown.stderr
    plan = json.loads(shown.stdout)
    assert [(one["cidr"], one["kind"], one["source"], one["verdict"]) for one in plan["subnets"]] == [
        ("10.130.0.0/16", "service", "ServiceCIDR API", "routed"),
        ("10.132.0.0/23", "pod", "nodes' podCIDRs", "routed"),
    ]
    assert cluster.objects("jobs", "default") == []


def test_the_cluster_is_reached_and_nothing_is_left(cluster: Kubernetes) -> None:
    restricted = {"pod_security.kubernetes.io__enforce": "restricted"}
    with cluster.namespace("first-use", **restricted) as namespace:
        with cluster.connected("--namespace", namespace) as session:
            dns = cluster.laptop("ping", "-c", "1", "-W", "3", "10.130.0.10")
            assert session.poll() is None
            (pod,) = cluster.objects("pods", namespace)
            assert pod["spec"]["containers"][0]["image"] == IMAGE
            coredns = cluster.objects("pods", "kube-system")[0]["status"]["podIP"]
            assert cluster.laptop("ping", "-c", "1", "-W", "3", coredns).returncode == 0, dns.stdout
            healthy = cluster.laptop("curl", "--silent", "--max-time", "5", f"http://{coredns}:8080/health")
            assert healthy.stdout == "OK"
        for kind in ("jobs", "pods", "secrets", "configmaps"):
            eventually(
                lambda kind=kind: (
                    [
                        one["metadata"]["name"]
                        for one in cluster.objects(kind, namespace)
                        if one["metadata"]["name"].startswith("tpvpn")
                    ]
                    == []
                ),
                20,
                kind,
            )


def test_a_user_who_may_only_forward_ports_connects_by_that(cluster: Kubernetes) -> None:
    rules = ["--verb=create,get,list,delete,patch", "--resource=pods,secrets,configmaps,events,services,jobs.batch"]
    with cluster.namespace("forwards") as namespace:
        cluster.kubectl("create", "role", "own", "--namespace", namespace, *rules)
        cluster.kubectl(
            "create", "role", "forward", "--namespace", namespace, "--verb=get,create", "--resource=pods/portforward"
        )
        for role in ("own", "forward"):
            cluster.kubectl("create", "rolebinding", role, "--namespace", namespace, "--role", role, "--user", "ann")
        words = (
            "--as",
            "ann",
            "--namespace",
            namespace,
            "--service-cidr",
            "10.130.0.0/16",
            "--pod-cidr",
            "10.132.0.0/16",
        )
        with cluster.connected(*words) as session:
            (shown,) = json.loads(cluster.tpvpn("status", "--output", "json").stdout)["sessions"]
            assert shown["manager"]["endpoint"].startswith(
                "portforward through https://10.131.0.11:6443 to pods/forwards/"
            )
            coredns = cluster.objects("pods", "kube-system")[0]["status"]["podIP"]
            assert cluster.laptop("ping", "-c", "1", "-W", "3", coredns).returncode == 0
            healthy = cluster.laptop("curl", "--silent", "--max-time", "5", f"http://{coredns}:8080/health")
            assert healthy.stdout == "OK"
            assert session.poll() is None


def test_a_user_who_may_nothing_is_told_so_and_nothing_is_made(cluster: Kubernetes) -> None:
    words = ("--as", "bob", "--service-cidr", "10.130.0.0/16", "--pod-cidr", "10.132.0.0/16")
    refused = cluster.tpvpn("connect", *words)
    assert refused.returncode == 4
    assert "no manager runs in namespace default, and you may not start one there" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert cluster.objects("jobs", "default") == []


def test_an_image_that_cannot_be_had_is_told_and_nothing_is_left(cluster: Kubernetes) -> None:
    with cluster.namespace("no-image") as namespace:
        refused = cluster.tpvpn("connect", "--namespace", namespace, "--image", "tpvpn.test/none:1")
        assert refused.returncode == 6, refused.stderr
        assert "cannot start: Err" in refused.stderr
        eventually(lambda: cluster.objects("jobs", namespace) == [], 20)
