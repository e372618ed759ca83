"""`connect` and `status --watch` in a terminal, as a person sees them; TPVPN_SCREENSHOTS=1 keeps what docs show."""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from laptop import ALLOWED, CLUSTER4, TPVPN, WANTED4, Laptop

from peers import eventually
from terminal import Terminal, terminal
from tpvpn.lab.topology import POD_CIDR, PODS, SERVICE_CIDR, SERVICES

IMAGES = Path(__file__).parents[2] / "docs" / "images"
STEPS = ["plan", "helper", "manager", "TUN", "routes", "DNS"]
CTRL_C, CTRL_Z, CTRL_S, CTRL_Q = "\x03", "\x1a", "\x13", "\x11"


@pytest.fixture
def seen(laptop: Laptop) -> Iterator[Terminal]:
    """A session with its live view, of 80 columns and 24 lines."""
    with terminal(laptop.command(laptop.connect_command(*ALLOWED, wanted=WANTED4))) as opened:
        opened.shows("ready", "subnets", "Ctrl-C ends the session")
        yield opened


def ends(opened: Terminal, code: int = 130) -> str:
    """What is on the terminal after Ctrl-C."""
    opened.type(CTRL_C)
    assert opened.wait() == code, opened.text
    assert not opened.is_other and "Traceback" not in opened.text
    return opened.text


def keep(name: str, opened: Terminal) -> None:
    """The picture in docs."""
    image = IMAGES / name
    if os.environ.get("TPVPN_SCREENSHOTS"):
        image.parent.mkdir(exist_ok=True)
        image.write_text(opened.screenshot())
    assert image.read_text().startswith("<svg") and "Ctrl-C ends the session" in image.read_text()


def test_the_live_view(laptop: Laptop, seen: Terminal) -> None:
    assert seen.is_other
    seen.shows(f"{SERVICE_CIDR}  routed", f"{POD_CIDR}  routed", "before 10.0.0.0/8 on tun0 (openvpn)", "RTT")
    flows = [
        ["iperf3", "-c", SERVICES[1], "-R", "-b", "300M", "-t", "20"],
        ["iperf3", "-c", PODS[0], "-b", "40M", "-t", "20"],
    ]
    with contextlib.ExitStack() as stack:
        for flow in flows:
            process = stack.enter_context(subprocess.Popen(laptop.command(flow), stdout=subprocess.DEVNULL))
            stack.callback(process.kill)
        seen.shows("most traffic", "web.default:5201", "db-0.db.default:5201", "Mb/s up", "Mb/s down")
        keep("live.svg", seen)
        # Narrower and lower: nothing is wider than the terminal, what is most important is there.
        seen.resize(40, 12)
        seen.shows("tpvpn default  ready", SERVICE_CIDR, "Ctrl-C ends the session")
        eventually(lambda: all(len(line) <= 40 for line in seen.lines) and len(seen.text.splitlines()) <= 12, 5, "fits")
        seen.resize(100, 30)
        seen.shows("most traffic", "subnets")
    assert "session default lasted" in ends(seen)


def test_what_changes_is_said(laptop: Laptop) -> None:
    connect = laptop.connect_command("--on-conflict", "skip", wanted=WANTED4)
    with terminal(laptop.command(connect)) as opened:
        opened.shows(f"{SERVICE_CIDR}  conflict", "against 10.0.0.0/8 on tun0 (openvpn)")
        laptop.lab.vpn_down()
        opened.shows(f"{SERVICE_CIDR}  routed", "messages", f"{SERVICE_CIDR} is now routed: nothing private")
        laptop.lab.vpn_up()
        opened.shows(f"{SERVICE_CIDR}  conflict", f"{SERVICE_CIDR} is now conflict")
        assert f"{SERVICE_CIDR} is now routed" in ends(opened), "what was said is in the scrollback"


def test_a_held_terminal_holds_no_packet(laptop: Laptop, seen: Terminal) -> None:
    seen.type(CTRL_S)
    for _ in range(3):
        laptop.reaches("cluster", CLUSTER4)
    seen.type(CTRL_Q)
    text = ends(seen)
    assert [line.split()[1] for line in text.splitlines() if line.startswith("✓")] == STEPS


def test_stopped_and_continued(laptop: Laptop, seen: Terminal) -> None:
    seen.type(CTRL_Z)
    eventually(lambda: not seen.is_other, 5, "the terminal is given back")
    os.kill(seen.process.pid, signal.SIGCONT)
    eventually(lambda: seen.is_other, 5, "it is drawn again")
    laptop.reaches("cluster", CLUSTER4[:1])
    ends(seen)


@pytest.mark.parametrize(
    ("environment", "plain"),
    [({"NO_COLOR": "1"}, True), ({"LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, False)],
    ids=["no colour", "no Unicode"],
)
def test_a_lesser_terminal(laptop: Laptop, environment: dict[str, str], plain: bool) -> None:
    command = laptop.command(laptop.connect_command(*ALLOWED, wanted=WANTED4))
    with terminal(command, 40, 20, **environment) as opened:
        opened.shows("ready", "subnets")
        laptop.reaches("cluster", CLUSTER4[:1])
        opened.shows("B")
        ends(opened)
        assert (b"\x1b[3" not in opened.raw.replace(b"\x1b[3J", b"")) == plain
        assert opened.raw.isascii() == ("LANG" in environment)


def test_no_screen(laptop: Laptop) -> None:
    with terminal(laptop.command(laptop.connect_command(*ALLOWED, wanted=WANTED4)), TERM="dumb") as opened:
        opened.shows("tpvpn: ready")
        assert b"\x1b" not in opened.raw
        assert "tpvpn: session default lasted" in ends(opened)


def test_around_a_command(laptop: Laptop) -> None:
    command = laptop.connect_command(*ALLOWED, "--", "sh", "-c", "echo the command; exit 7", wanted=WANTED4)
    with terminal(laptop.command(command)) as opened:
        assert opened.wait() == 7
        assert opened.text.splitlines()[-1] == "the command"
        assert b"\x1b[?1049h" not in opened.raw


def test_a_refusal(laptop: Laptop) -> None:
    with terminal(laptop.command(laptop.connect_command(wanted=WANTED4)), lines=60) as opened:
        assert opened.wait() == 3
        assert opened.text.startswith("! plan") and "connect would refuse: 2 of 2" in opened.text


def test_quiet(laptop: Laptop) -> None:
    with laptop.connected("--quiet", *ALLOWED, wanted=WANTED4) as session:
        (warning,) = session.said.splitlines()
    assert warning.startswith("tpvpn: warning: tcp:// protects")


def events(text: str) -> list[dict]:
    """The objects of the stream; each is one of the schema."""
    found = [json.loads(line) for line in text.splitlines()]
    assert all(one["schema"] == "tpvpn.events/1" and one["at"] for one in found)
    return found


def test_the_stream_of_events(laptop: Laptop) -> None:
    probe = ("sh", "-c", 'sleep 1.5; exec "$@"', "sh", *TPVPN, "quit")
    connect = laptop.connect_command(*ALLOWED, "--output", "json", wanted=WANTED4)
    with subprocess.Popen(
        laptop.command(connect), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        laptop.reaches("cluster", CLUSTER4[:1])
        laptop.run(*probe)
        out, said = process.communicate(timeout=10)
    found = events(out)
    assert process.returncode == 0 and said == ""
    assert [one["step"] for one in found if one["event"] == "step" and one["state"] == "done"] == STEPS
    kinds = [one["event"] for one in found]
    assert kinds.count("ready") == 1 and kinds.index("plan") < kinds.index("ready") < kinds.index("traffic")
    (ready,) = (one for one in found if one["event"] == "ready")
    assert ready["session"]["device"] == "tpvpn0"
    assert found[-1]["event"] == "ended" and found[-1]["exit_code"] == 0
    traffic = [one["traffic"]["received_bytes"] for one in found if one["event"] == "traffic"]
    assert traffic and traffic[-1] > 0


def test_the_stream_of_a_refusal(laptop: Laptop) -> None:
    done = laptop.connect("--output", "json", wanted=WANTED4)
    assert done.returncode == 3 and done.stderr.count("\n") == 1
    found = events(done.stdout)
    (plan,) = (one["plan"] for one in found if one["event"] == "plan")
    assert plan["schema"] == "tpvpn.plan/1" and not plan["ok"]
    assert found[-1]["event"] == "ended" and found[-1]["exit_code"] == 3 and SERVICE_CIDR in found[-1]["error"]


def test_status_again_and_again(laptop: Laptop) -> None:
    with terminal(laptop.command([*TPVPN, "status", "--watch"])) as opened:
        opened.shows("no session runs here")
        with laptop.connected(*ALLOWED, wanted=WANTED4):
            opened.shows("tpvpn default  ready", SERVICE_CIDR)
            opened.resize(50, 14)
            opened.shows("tpvpn default  ready", SERVICE_CIDR)
            lines = laptop.run("timeout", "--preserve-status", "2", *TPVPN, "status", "--watch", "--output", "json")
            assert [json.loads(line)["sessions"][0]["name"] for line in lines.stdout.splitlines()][:1] == ["default"]
        opened.shows("no session runs here")
        ends(opened)


def test_the_view_costs_little(laptop: Laptop) -> None:
    """Less than 2 % of a core, with traffic to show."""
    command = laptop.command(laptop.connect_command(*ALLOWED, wanted=WANTED4))
    with terminal(command) as opened:
        opened.shows("ready", "subnets")
        laptop.reaches("cluster", CLUSTER4)
        pid = opened.process.pid

        def used() -> float:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

        before, began = used(), time.monotonic()
        eventually(lambda: time.monotonic() - began > 5, 10, "five seconds")
        share = (used() - before) / (time.monotonic() - began)
        assert share < 0.02, f"{100 * share:.1f} % of a core"
        ends(opened)
