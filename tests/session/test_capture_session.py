"""`--capture`: the packets of a real session, as its kernel sees them."""

from pathlib import Path

from laptop import ALLOWED, Laptop
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.utils import rdpcap

from peers import eventually
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
