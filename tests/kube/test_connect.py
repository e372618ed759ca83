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
