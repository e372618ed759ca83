"""Captures as files: the ring, what cannot be written, what is missing; scapy reads them."""

import argparse
import asyncio
import contextlib
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from scapy.layers.inet import IP, UDP
from scapy.utils import RawPcapNgReader

from tpvpn import packet_filter
from tpvpn.capture import FILES, Capture, capturing
from tpvpn.cli.capturing import add_capture_flags, capture_of
from tpvpn.errors import UsageError
from tpvpn.wire.pcapng import INBOUND, OUTBOUND

BIG = bytes(64_000)


def capture(path: Path, act: Callable[[Capture], object], **options: object) -> list[str]:
    """Have a capture for as long as `act` takes; what was said."""
    said = list[str]()

    async def scenario() -> None:
        settings = {"size": 1_000_000} | options
        async with capturing(path, said.append, **settings) as made:  # type: ignore[arg-type]
            done = act(made)
            if asyncio.iscoroutine(done):
                await done

    asyncio.run(scenario())
    return said


def numbered(number: int) -> memoryview:
    return memoryview(number.to_bytes(4) * 32)


def read(path: Path) -> list[bytes]:
    with RawPcapNgReader(str(path)) as reader:
        return [packet for packet, _ in reader]


async def _write_rounds(made: Capture) -> None:
    for start in range(0, 4000, 500):
        for number in range(start, start + 500):
            made.record(numbered(number), OUTBOUND)
        await asyncio.sleep(0)


def test_the_newest_packets_stay_and_files_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "ring.pcapng"
    for number in range(FILES):
        (tmp_path / f"ring.pcapng.{number}").write_text("of another capture")
    assert capture(path, _write_rounds, size=400_000) == []
    files = [path, *(tmp_path / f"ring.pcapng.{number}" for number in range(1, FILES))]
    assert set(tmp_path.iterdir()) == {*files, tmp_path / "ring.pcapng.0"}
    assert all(file.stat().st_size <= 100_000 for file in files)
    kept = [packet for file in reversed(files) for packet in read(file)]
    assert kept == [numbered(number).tobytes() for number in range(4000 - len(kept), 4000)]
    assert len(kept) > 1500


def test_what_is_cut_says_how_long_it_was(tmp_path: Path) -> None:
    path = tmp_path / "cut.pcapng"
    assert capture(path, lambda made: made.record(memoryview(BIG), INBOUND), snap_length=96) == []
    with RawPcapNgReader(str(path)) as reader:
        ((packet, about),) = reader
    assert (packet, about.wirelen, about.direction) == (BIG[:96], len(BIG), INBOUND)


def test_only_what_is_wanted_is_kept(tmp_path: Path) -> None:
    def act(made: Capture) -> None:
        for packet in packets:
            made.record(memoryview(packet), OUTBOUND)

    packets = [bytes(IP(src="10.0.0.1", dst="10.0.0.2") / UDP(dport=number)) for number in range(10)]
    path = tmp_path / "some.pcapng"
    assert capture(path, act, wanted=packet_filter.parse("port 3 or port 5")) == []
    assert read(path) == [packets[3], packets[5]]


def test_the_tunnel_does_not_wait_for_a_disk(tmp_path: Path) -> None:
    """While the loop does not turn nothing is known to be written: what is too much then is missing, and counted."""

    def act(made: Capture) -> None:
        for _ in range(600):
            made.record(memoryview(BIG), OUTBOUND)

    (said,) = capture(tmp_path / "much.pcapng", act, size=400_000_000)
    kept = len(read(tmp_path / "much.pcapng"))
    assert said == f"warning: {600 - kept} packets are missing in the capture: the disk was too slow"
    assert 500 < kept < 600


@pytest.fixture
def little_room() -> Iterator[int]:
    """How large a file of this process may become."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield 100_000
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_ends_it_between_packets_with_one_warning(tmp_path: Path, little_room: int) -> None:
    path = tmp_path / "full.pcapng"
    (said,) = capture(path, _write_rounds, size=10_000_000)
    assert said == f"warning: the capture ends here, the session goes on: {path}: File too large"
    assert path.stat().st_size <= little_room
    kept = read(path)
    assert kept == [numbered(number).tobytes() for number in range(len(kept))]


def _missing(directory: Path) -> Path:
    return directory / "none" / "file"


def _pipe(directory: Path) -> Path:
    os.mkfifo(directory / "pipe")
    return directory / "pipe"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (_missing, "No such file or directory; name another file"),
        (_pipe, "it is no regular file"),
        (lambda directory: directory, "it is no regular file"),
        (lambda directory: directory / ("x" * 300), "File name too long; name another file"),
    ],
)
def test_a_file_that_cannot_be_written_is_one_sentence(tmp_path: Path, name: Callable[[Path], Path], said: str) -> None:
    path = name(tmp_path)
    with pytest.raises(UsageError) as refused:
        capture(path, lambda _: None)
    assert str(refused.value) == f"cannot capture to {path}: {said}"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--capture", "{}/file,tpc"], "a filter cannot have 'tpc' there; its words are: host A"),
        (["--capture", "{}/file,"], "a filter cannot have 'its end' there"),
        (["--capture", ",tcp"], "--capture wants the name of a file"),
        (["--capture-size", "5"], "--capture-size and --capture-snaplen are for a capture: give --capture FILE"),
        (["--capture", "{}/file", "--capture-size", "0"], "--capture-size 0: megabytes, 1 to"),
        (["--capture", "{}/file", "--capture-snaplen", "-1"], "--capture-snaplen -1: bytes, 1 to"),
    ],
)
def test_flags_that_make_no_sense_are_refused_before_a_file_is_there(
    tmp_path: Path, flags: list[str], said: str
) -> None:
    parser = argparse.ArgumentParser()
    add_capture_flags(parser)
    arguments = parser.parse_args([flag.format(tmp_path) for flag in flags])
    with pytest.raises(UsageError) as refused:
        asyncio.run(capture_of(arguments, contextlib.AsyncExitStack(), print))
    assert said in str(refused.value)
    assert list(tmp_path.iterdir()) == []
