"""What a session shows of itself: `--capture`, and metrics for Prometheus."""

import json
import re
import socket
from pathlib import Path

import pytest
from laptop import ALLOWED, Laptop
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.utils import rdpcap

from peers import ROOT, eventually
from tpvpn import __version__
from tpvpn.lab.topology import PODS, PODS6, SERVICES
from tpvpn.wire.pcapng import INBOUND, OUTBOUND


def test_both_ends_of_a_connection_are_there(laptop: Laptop, tmp_path: Path) -> None:
    file, filtered = tmp_path / "all.pcapng", f"{tmp_path}/some.pcapng,tcp and host {PODS[0]}"
    with laptop.connected(*ALLOWED, "--capture", str(file)):
        laptop.reaches("cluster", [PODS[0], SERVICES[0], PODS6[0]])
        eventually(lambda: file.stat().st_size > 1000, 3, "it is written while the session lasts")
        (own,) = [one for one in laptop.sh("ip -brief -4 address show dev tpvpn0").split() if "/32" in one]
    packets = list(rdpcap(str(file)))
    assert [type(packet) for packet in packets if not isinstance(packet, IP | IPv6)] == []
    for packet in packets:
        if IP in packet:
            ours = packet[IP].src if packet.direction == OUTBOUND else packet[IP].dst
            assert ours == own.removesuffix("/32")
    flags = [
        (one.direction, str(one[TCP].flags)) for one in packets if TCP in one and PODS[0] in (one[0].src, one[0].dst)
    ]
    assert flags[:3] == [(OUTBOUND, "S"), (INBOUND, "SA"), (OUTBOUND, "A")]
    assert any(b"cluster " + PODS6[0].encode() in bytes(packet) for packet in packets if IPv6 in packet)
    times = [packet.time for packet in packets]
    assert times == sorted(times)

    with laptop.connected(*ALLOWED, "--capture", filtered):
        laptop.reaches("cluster", [PODS[0], SERVICES[0]])
    some = list(rdpcap(str(tmp_path / "some.pcapng")))
    assert some and all(PODS[0] in (one.src, one.dst) for one in some)
    assert not any(UDP in packet for packet in some)


def test_what_makes_no_sense_is_said_before_the_session(laptop: Laptop, tmp_path: Path) -> None:
    refused = laptop.connect("--capture", f"{tmp_path}/none/file")
    assert refused.returncode == 2
    assert refused.stderr == (
        f"tpvpn: cannot capture to {tmp_path}/none/file: No such file or directory; name another file\n"
    )


def test_a_full_disk_ends_the_capture_and_not_the_session(laptop: Laptop, tmp_path: Path) -> None:
    laptop.sh(f"mount -t tmpfs -o size=64k small {tmp_path}")
    try:
        with laptop.connected(*ALLOWED, "--capture", f"{tmp_path}/file") as session:
            laptop.sh(f"head -c 100000 /dev/zero >{tmp_path}/fill || true")
            eventually(lambda: _reaches_and_said(laptop, session), 10, "the warning")
            laptop.reaches("cluster", [PODS[0]])
            assert session.said.count("the capture ends here") == 1
    finally:
        laptop.sh(f"umount {tmp_path}")


def _reaches_and_said(laptop: Laptop, session: object) -> bool:
    laptop.reaches("cluster", [PODS[0]])
    return "No space left on device" in session.said  # type: ignore[attr-defined]


def families(text: str) -> dict[str, Metric]:
    """By the name of their samples."""
    found = list(text_string_to_metric_families(text))
    return {one.name + ("_total" if one.type == "counter" else ""): one for one in found}


def get(laptop: Laptop, *pieces: bytes) -> str:
    """What the control socket answers."""
    with socket.socket(socket.AF_UNIX) as asking:
        asking.settimeout(5)
        asking.connect(str(laptop.directory / "default" / "control" / "socket"))
        for piece in pieces:
            asking.sendall(piece)
        return b"".join(iter(lambda: asking.recv(65536), b"")).decode()


def test_metrics_by_http_and_for_a_textfile(laptop: Laptop) -> None:
    with laptop.connected(*ALLOWED, "--links", "2"):
        laptop.reaches("cluster", [PODS[0]])
        path = laptop.directory / "default" / "control" / "socket"
        curl = ("curl", "--silent", "--fail", "--unix-socket", str(path))
        found = families(laptop.sh('exec "$@"', *curl, "http://session/metrics"))
        assert laptop.run(*curl, "http://session/other").returncode == 22
        assert get(laptop, b"GET /met", b"rics HTTP/1.1\r\nHost:", b" x\r\n\r\n").startswith("HTTP/1.1 200 OK\r\n")
        assert get(laptop, b"HEAD /metrics HTTP/1.1\r\n\r\n").endswith("Connection: close\r\n\r\n")
        assert get(laptop, b"GET nothing\r\n\r\n").startswith("HTTP/1.1 400 ")
        assert get(laptop, b"status\n").startswith('{"name": "default"')
        told = laptop.tpvpn("status", "--output", "prometheus")
        assert families(told.stdout).keys() == found.keys()
    page = (ROOT / "docs" / "reference" / "metrics.md").read_text().split("## Of a session\n")[1]
    listed = {name: row.split(" | ")[1] for row in page.splitlines() for name in re.findall("`(tpvpn_[a-z_]+)`", row)}
    assert {"tpvpn_client_rtt_seconds": "gauge"} | {name: one.type for name, one in found.items()} == listed
    of_session = {name: one.samples[0].labels.get("session") for name, one in found.items()}
    whole = {"tpvpn_client_build_info": None, "tpvpn_client_sessions": None}
    assert of_session == dict.fromkeys(found, "default") | whole
    samples = {(one.name, *one.labels.values()): one.value for family in found.values() for one in family.samples}
    assert samples["tpvpn_client_build_info", __version__] == samples["tpvpn_client_sessions",] == 1
    assert samples["tpvpn_client_connected", "default"] == 1
    assert samples["tpvpn_client_links", "default"] == 2
    assert samples["tpvpn_client_subnets", "default", "routed"] == 4
    assert samples["tpvpn_client_packets_total", "default", "received"] >= 3
    nothing = laptop.tpvpn("status", "--output", "prometheus")
    assert families(nothing.stdout).keys() == {"tpvpn_client_build_info", "tpvpn_client_sessions"}


def test_how_much_the_connection_carries(laptop: Laptop) -> None:
    """In Mb/s, both ways, over a link of known rates; `doctor` says so."""
    limit = "tc qdisc replace dev eth0 root tbf rate {}mbit burst 128kb latency 200ms"
    node = ("ip", "netns", "exec", laptop.lab.namespace("node"))
    with laptop.connected():
        assert all(rate > 10e6 for rate in speed(laptop)), "nothing is in the way"
        laptop.sh(limit.format(40))
        try:
            assert laptop.run(*node, *limit.format(20).split()).returncode == 0
            up, down = speed(laptop)
            assert 8 * up == pytest.approx(40e6, rel=0.25)
            assert 8 * down == pytest.approx(20e6, rel=0.25)
            laptop.reaches("cluster", [PODS[0]])
            said = laptop.tpvpn("doctor", "--output", "json").stdout
        finally:
            laptop.sh("tc qdisc del dev eth0 root")
            laptop.run(*node, *["tc", "qdisc", "del", "dev", "eth0", "root"])
        (sentence,) = [one["sentence"] for one in json.loads(said)["checks"] if one["id"] == "speed"]
        assert re.fullmatch(r"the connection carries at least \d\d\.\d Mb/s up and \d\d\.\d Mb/s down", sentence)


def speed(laptop: Laptop) -> tuple[float, float]:
    """Bytes a second, up and down."""
    answer = json.loads(get(laptop, b"speed\n"))
    return answer["up"], answer["down"]
