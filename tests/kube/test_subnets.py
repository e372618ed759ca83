"""What an API server tells, and which subnets that makes: a table, and properties of what covers addresses."""

from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpvpn.kube.subnets import Found, Observed, cover, outside, subnets
from tpvpn.route.prefix import Prefix


def shown(found: tuple[Found, ...]) -> list[str]:
    return [f"{one.prefix} {one.kind} {one.source}{'' if one.sure else ' ?'}" for one in found]


@pytest.mark.parametrize(
    ("observed", "expected"),
    [
        (Observed(), []),
        (
            Observed(
                service_cidrs=("10.130.0.0/16", "10.131.0.0/16"), refusal="10.0.0.0/8", kubeadm_service="10.1.0.0/16"
            ),
            ["10.130.0.0/15 service ServiceCIDR API"],
        ),
        (
            Observed(service_cidrs=("10.96.0.0/12", "fd00:96::/112")),
            ["10.96.0.0/12 service ServiceCIDR API", "fd00:96::/112 service ServiceCIDR API"],
        ),
        (
            Observed(refusal="the provided IP is not in the valid range. The range of valid IPs is 10.96.0.0/12"),
            ["10.96.0.0/12 service API server's ClusterIP range"],
        ),
        (
            Observed(kubeadm_service="10.96.0.0/16,fd00:96::/112", kubeadm_pod="10.244.0.0/16"),
            [
                "10.96.0.0/16 service kubeadm-config",
                "fd00:96::/112 service kubeadm-config",
                "10.244.0.0/16 pod kubeadm-config",
            ],
        ),
        (Observed(cluster_ips=("10.96.0.1", "10.96.0.10", "None", "")), ["10.96.0.0/24 service ClusterIPs seen ?"]),
        (Observed(cluster_ips=("10.96.0.1", "10.100.4.7")), ["10.96.0.0/13 service ClusterIPs seen ?"]),
        (
            Observed(node_cidrs=("10.132.0.0/24", "10.132.1.0/24"), pod_ips=("10.132.1.7",)),
            ["10.132.0.0/23 pod nodes' podCIDRs"],
        ),
        (Observed(node_cidrs=("10.132.0.0/24",)), ["10.132.0.0/24 pod nodes' podCIDRs"]),
        # A network that has addresses of its own: all pods, or some, are elsewhere.
        (Observed(node_cidrs=("10.132.0.0/24",), pod_ips=("172.31.4.5",)), ["172.31.4.0/24 pod pods seen ?"]),
        (
            Observed(node_cidrs=("10.132.0.0/24",), kubeadm_pod="172.31.0.0/16", pod_ips=("172.31.4.5",)),
            ["172.31.0.0/16 pod kubeadm-config"],
        ),
        (
            Observed(node_cidrs=("10.132.0.0/24",), pod_ips=("10.132.0.9", "10.140.0.9")),
            ["10.132.0.0/24 pod nodes' podCIDRs", "10.140.0.0/24 pod pods seen ?"],
        ),
        (
            Observed(pod_ips=("10.0.0.1", "192.168.7.7", "fd00::1", "fd00::ffff:1")),
            ["10.0.0.0/24 pod pods seen ?", "192.168.7.0/24 pod pods seen ?", "fd00::/64 pod pods seen ?"],
        ),
        (Observed(service_cidrs=("nonsense", "10.130.0.1/16"), node_cidrs=("", "x/y")), []),
    ],
)
def test_subnets(observed: Observed, expected: list[str]) -> None:
    assert shown(subnets(observed).found) == expected


def test_what_is_guessed_or_missing_is_said() -> None:
    warnings = subnets(Observed(cluster_ips=("10.96.0.1",))).warnings
    assert len(warnings) == 2
    assert "10.96.0.0/24 covers the service addresses seen" in warnings[0]
    assert "--service-cidr" in warnings[0]
    assert "no pod subnet was found: give --pod-cidr" in warnings[1]
    assert subnets(Observed(service_cidrs=("10.96.0.0/12",), node_cidrs=("10.244.0.0/24",))).warnings == ()


def test_addresses_outside_what_was_given() -> None:
    observed = Observed(pod_ips=("10.132.0.7", "10.140.0.1", "10.140.0.2", "10.140.0.3", "10.140.0.4"))
    assert outside(observed, [Prefix.parse("10.0.0.0/8")], "pod") is None
    warning = outside(observed, [Prefix.parse("10.132.0.0/16")], "pod")
    assert warning is not None
    assert warning.startswith("4 pod addresses are outside the --pod-cidr given")
    assert warning.endswith(": 10.140.0.1, 10.140.0.2, 10.140.0.3, …")


ADDRESSES = st.one_of(
    st.builds(IPv4Address, st.integers(0, 2**32 - 1)), st.builds(IPv6Address, st.integers(0, 2**128 - 1))
)


@given(st.lists(ADDRESSES, max_size=20))
def test_every_address_is_covered_once_and_not_by_too_much(addresses: list[IPv4Address | IPv6Address]) -> None:
    hosts = [Prefix.host(str(address)) for address in addresses]
    found = cover(hosts)
    for host in hosts:
        assert sum(prefix.contains(host) for prefix in found) == 1
    for prefix in found:
        assert prefix.length >= {4: 12, 6: 48}[prefix.version]
        assert any(prefix.contains(host) for host in hosts)
