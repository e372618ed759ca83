"""Packets that no honest laptop sends, at the socket exit: a bounded run; `scripts/fuzz` has longer ones."""

import asyncio

import pytest
from packet_fuzz import allow_descriptors, fuzz

from pod import inside, pod_and_cluster, sysctl

DROPPED = {"between_sessions", "manager", "destination", "flows", "flow_rate", "half_open", "socket", "ports"}


@pytest.mark.parametrize("offload", [False, True], ids=["bare", "offload"])
def test_nothing_but_counted_drops(offload: bool) -> None:
    allow_descriptors()
    with pod_and_cluster() as (pod, cluster), inside(pod):
        sysctl(pod, "ipv4/ping_group_range", "0 2147483647")
        report = asyncio.run(fuzz(cluster, 1 + offload, offload=offload, packets=200_000))
    assert {name.removeprefix("dropped_") for name in report.counters} == DROPPED | {"invalid", "foreign"}
    assert report.answers > 1000
    assert report.flows > 300
    assert report.counters["invalid"] > 1000
