"""Packets that no honest laptop sends, at the socket exit: a bounded run; `scripts/fuzz` has longer ones."""

import asyncio
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packet_fuzz import Side, allow_descriptors, echoing, run
from packets import padding

from pod import CLUSTER6, inside, pod_and_cluster, sysctl
from tpvpn.manager.socket_exit import SocketExit
from tpvpn.manager.socket_udp import answered_key
from tpvpn.wire import frame, ip, tcp

DROPPED = {"between_sessions", "manager", "destination", "flows", "flow_rate", "half_open", "socket", "ports",
           "fragments", "queue", "unanswered"}  # fmt: skip


@pytest.mark.parametrize("offload", [False, True], ids=["bare", "offload"])
def test_nothing_but_counted_drops(offload: bool) -> None:
    allow_descriptors()
    with pod_and_cluster() as (pod, cluster), inside(pod):
        sysctl(pod, "ipv4/ping_group_range", "0 2147483647")
        report = run(cluster, 1 + offload, offload=offload, packets=120_000)
    assert set(report.counters) == DROPPED | {"invalid", "foreign"}
    assert report.answers > 1000
    assert report.flows > 100
    assert report.congested > 20
    assert report.counters["invalid"] > 1000


@given(st.sampled_from([b"", b"\x40", b"\x41", b"\x45", b"\x4f", b"\x60"]), st.binary(max_size=60))
def test_a_quotation_cut_anywhere_names_a_flow_or_none(first: bytes, rest: bytes) -> None:
    key = answered_key(first + rest)
    assert len(key) in (0, 9, 21)
    assert not key or len(first + rest) >= 24


@pytest.mark.parametrize("length", [0, 1352, 2048, 14_336])
def test_the_mss_is_that_of_the_path_behind_any_extension_headers(length: int) -> None:
    async def answered(cluster: str) -> int | None:
        way_out = SocketExit(identity="fuzz")
        way_out.open()
        async with echoing(cluster):
            side = Side(way_out, offload=False)
            own, target = (socket.inet_pton(socket.AF_INET6, text or "") for text in (side.place.ipv6, CLUSTER6))
            options, following = b"", ip.TCP
            for left in range(length, 0, -2048):
                size = min(left, 2048)
                options = bytes((following, size // 8 - 1)) + padding(size - 2) + options
                following = ip.DESTINATION_OPTIONS
            buffer = bytearray(100)
            syn = tcp.Segment(1, 0, tcp.SYN, 65535)
            syn.mss = 1440
            end = tcp.Writer(own, 1000, target, 8080, offload=False).write(buffer, 0, syn, 1440)
            body = options + bytes(buffer[ip.HEADER_LENGTH6 : end])
            await side.send(frame.encode(frame.PACKET, ip.build(own, target, following, body)))
            async with asyncio.timeout(5):
                while not (heard := side.heard()):
                    await asyncio.sleep(0.01)
            side.close()
            return tcp.parse(ip.parse(heard[0])).mss

    with pod_and_cluster() as (pod, cluster), inside(pod):
        assert asyncio.run(answered(cluster)) == 1440
