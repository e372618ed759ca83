"""Who has a TUN or TAP open: real devices, real programs."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from pod import inside, namespace, run
from tpvpn.holders import holders
from tpvpn.tun import open_tun

HOLD = """
import ctypes, fcntl, os, struct, sys
program, device, flags = sys.argv[1].encode(), sys.argv[2].encode(), int(sys.argv[3], 0)
ctypes.CDLL(None).prctl(15, program)  # PR_SET_NAME
tun = os.open("/dev/net/tun", os.O_RDWR)
if device:
    fcntl.ioctl(tun, 0x400454CA, struct.pack("16sH22x", device, flags))  # TUNSETIFF
print("open", flush=True)
sys.stdin.read()
"""
TUN, TAP, QUEUE = 0x1001, 0x1002, 0x1101

Hold = Callable[..., None]


@pytest.fixture
def laptop() -> Iterator[str]:
    with namespace("holders") as name:
        yield name


@pytest.fixture
def hold(laptop: str) -> Iterator[Hold]:
    """Starts programs that have a device open until the test ends."""
    with contextlib.ExitStack() as stack:

        def start(program: str, device: str, flags: int = TUN, netns: str = laptop) -> None:
            argv = ["ip", "netns", "exec", netns, sys.executable, "-c", HOLD, program, device, hex(flags)]
            process = stack.enter_context(
                subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            assert process.stdout is not None and process.stdout.readline() == "open\n"

        yield start


def seen(name: str) -> dict[str, str]:
    with inside(name):
        return holders()


def test_programs_are_named(laptop: str, hold: Hold) -> None:
    hold("openvpn", "tun0")
    hold("charon-systemd1", "ipsec0")
    hold("qemu", "tap0", TAP)
    assert seen(laptop) == {"tun0": "openvpn", "ipsec0": "charon-systemd1", "tap0": "qemu"}


def test_of_several_queues_the_oldest_is_named(laptop: str, hold: Hold) -> None:
    hold("first", "tun0", QUEUE)
    hold("second", "tun0", QUEUE)
    assert seen(laptop) == {"tun0": "first"}


def test_other_namespaces_are_not_looked_at(laptop: str, hold: Hold) -> None:
    hold("openvpn", "tun0")
    with namespace("other") as other:
        assert seen(other) == {}


def test_devices_that_nobody_has_open_and_descriptors_without_a_device(laptop: str, hold: Hold) -> None:
    run("ip", "-n", laptop, "tuntap", "add", "tun0", "mode", "tun")
    hold("idle", "")
    assert seen(laptop) == {}


def test_we_are_not_among_them(laptop: str) -> None:
    with inside(laptop):
        tun = open_tun("tpvpn0", offload=True)
        try:
            assert holders() == {}
        finally:
            tun.close()


def test_a_name_prints_whatever_the_program_chose(laptop: str, hold: Hold) -> None:
    hold("\x1b[31m\nvpn", "tun0")
    assert seen(laptop) == {"tun0": "?[31m?vpn"}


def test_what_nobody_may_read_is_left_out(laptop: str, hold: Hold) -> None:
    hold("openvpn", "tun0")
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    ask = [sys.executable, "-c", "from tpvpn.holders import holders; print(holders())"]
    assert run("ip", "netns", "exec", laptop, *nobody, *ask) == "{}\n"


@pytest.mark.alone
def test_five_hundred_processes_take_a_tenth_of_a_second(laptop: str) -> None:
    """Each with 20 descriptors, as a desktop's have."""
    script = """
        for number in {3..19}; do eval "exec $number</dev/null"; done
        for process in {1..500}; do sleep 60 & done
        echo started; read; kill $(jobs -p)
    """
    argv = ["ip", "netns", "exec", laptop, "bash", "-c", script]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "started\n"
        seconds = min(timed(laptop) for _ in range(3))
        process.communicate("\n", timeout=10)
    print(f"500 processes in {seconds * 1000:.0f} ms")
    assert seconds < 0.1


def timed(name: str) -> float:
    start = time.monotonic()
    assert seen(name) == {}
    return time.monotonic() - start
