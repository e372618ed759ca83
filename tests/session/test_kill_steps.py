"""SIGKILL at every step of `tpvpn connect`, one by one and exactly there: strace ends, or stops, the helper at it.

A step is a call that changes what outlasts the helper by itself or tells what does: a line of the journal, after which
the kernel's routing is changed, and all that is done to files. What the steps are is seen from a session that nobody
disturbs.
"""

import os
import re
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from laptop import SERVICE_CIDR, SERVICE_CIDR6, VPN, Laptop
from test_kill import ALLOW, NEVER, harmless, kill

from peers import eventually

WANTED = ("--service-cidr", SERVICE_CIDR, "--service-cidr", SERVICE_CIDR6)
CALLS = r"/^(write|chmod|fchmod|chown|fsync|link(at)?|rename(at2?)?|unlink(at)?|mkdir(at)?|rmdir)$"
CALL = re.compile(r"(?P<pid>\d+) +(?P<name>\w+)\((?P<words>.*)")


class Step(NamedTuple):
    """A call of the helper's: the how manieth of its name, and what it was, for people."""

    name: str
    number: int
    words: str

    def with_signal(self, number: signal.Signals) -> str:
        """What strace is to do: SIGKILL comes instead of the call, SIGSTOP when it is done."""
        return f"inject={self.name}:signal={number.name}:when={self.number}"


class Strace:
    """Watches what the helper of the session `default` does to files of ours."""

    def __init__(self, laptop: Laptop, log: Path) -> None:
        own, resolv = laptop.directory / "default", Path("/etc/resolv.conf")
        self._log = log
        self._paths = [own.parent, own, *(own / name for name in ("journal", "session", "session.new", "control"))]
        self._paths += [resolv, resolv.with_name(".resolv.conf.tpvpn")]
        self._paths += [resolv.with_name(f"resolv.conf.before-tpvpn-{laptop.inode}-default.1")]

    def command(self, *injected: str) -> list[str]:
        """What a session is to run under. It stays our child."""
        self._log.unlink(missing_ok=True)
        selected = [word for path in self._paths for word in ("-P", str(path))]
        said = ["-e", f"trace={CALLS}", "-e", "signal=kill,stop", *(word for one in injected for word in ("-e", one))]
        return ["strace", "-D", "-f", "-q", "-y", "-o", str(self._log), *selected, *said]

    def steps(self) -> list[Step]:
        """All calls so far that did something."""
        calls = [found for line in self._lines() if (found := CALL.match(line))]
        assert len({call["pid"] for call in calls}) == 1, "the helper's alone"
        names = [call["name"] for call in calls]
        steps = [Step(name, names[:place].count(name) + 1, calls[place][0]) for place, name in enumerate(names)]
        return [step for step in steps if " = -1 " not in step.words]

    def heard(self, words: str) -> int:
        """Wait until it tells something of a process, and give that."""
        eventually(lambda: any(words in line for line in self._lines()), 10, words)
        return next(int(line.split()[0]) for line in self._lines() if words in line)

    def stopped(self) -> int:
        """The helper, which has been stopped."""
        return self.heard("--- stopped by SIGSTOP ---")

    def _lines(self) -> Sequence[str]:
        return self._log.read_text().splitlines() if self._log.exists() else ()


class Steps(NamedTuple):
    """Those until a session is ready, and those of its end."""

    beginning: list[Step]
    end: list[Step]

    @property
    def journalled(self) -> list[Step]:
        """The lines of the journal."""
        return [step for step in self.beginning if "/journal>" in step.words and step.name == "write"]


@pytest.fixture
def strace(laptop: Laptop, tmp_path: Path) -> Strace:
    return Strace(laptop, tmp_path / "strace")


@pytest.fixture(scope="module")
def steps(laptop: Laptop, tmp_path_factory: pytest.TempPathFactory) -> Steps:
    """Of a session that nobody disturbs."""
    strace = Strace(laptop, tmp_path_factory.mktemp("steps") / "strace")
    with laptop.start(*ALLOW, *NEVER, wanted=WANTED, under=strace.command()) as session:
        session.wait_ready()
        beginning = strace.steps()
        journal = (laptop.directory / "default" / "journal").read_text()
    steps = Steps(beginning, strace.steps()[len(beginning) :])
    assert len(steps.journalled) == journal.count("\n") >= 8, journal
    assert '"/etc/resolv.conf"' in journal
    return steps


@pytest.fixture
def before(laptop: Laptop) -> Iterator[str]:
    before = laptop.state()
    yield before
    laptop.reaches("vpn", VPN)


def repaired(laptop: Laptop, before: str, step: Step) -> None:
    """At once nothing is in the way; and the next session is one like any other, which leaves nothing at its end."""
    eventually(lambda: harmless(laptop, before), 1, f"nothing that alters routing after {step}")
    done = laptop.connect(*ALLOW, *NEVER, "--", "true", wanted=WANTED)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), f"{step}\n{done.stderr}"
    assert laptop.state() == before, step


def test_the_helper_before_each_step(laptop: Laptop, strace: Strace, steps: Steps, before: str) -> None:
    for step in steps.beginning:
        under = strace.command(step.with_signal(signal.SIGKILL))
        with laptop.start(*ALLOW, *NEVER, wanted=WANTED, under=under) as session:
            strace.heard("+++ killed by SIGKILL +++")
            laptop.is_as(before, 1)
            assert session.wait(1) in (1, 7), step
            assert "helper" in session.said, step
        repaired(laptop, before, step)


def test_the_helper_when_a_step_is_written_down_and_not_done(
    laptop: Laptop, strace: Strace, steps: Steps, before: str
) -> None:
    for step in steps.journalled:
        under = strace.command(step.with_signal(signal.SIGSTOP))
        with laptop.start(*ALLOW, *NEVER, wanted=WANTED, under=under) as session:
            kill(strace.stopped())
            laptop.is_as(before, 1)
            assert session.wait(1) in (1, 7), step
            assert "helper" in session.said, step
        repaired(laptop, before, step)


def test_the_users_process_while_the_helper_is_at_a_step(
    laptop: Laptop, strace: Strace, steps: Steps, before: str
) -> None:
    """The helper, which goes on in its midst, undoes it all."""
    for step in steps.journalled:
        under = strace.command(step.with_signal(signal.SIGSTOP))
        with laptop.start(*ALLOW, *NEVER, wanted=WANTED, under=under) as session:
            helper = strace.stopped()
            kill(session.process.pid)
            session.wait()
            os.kill(helper, signal.SIGCONT)
            laptop.is_as(before, 1)


def test_both_at_each_step(laptop: Laptop, strace: Strace, steps: Steps, before: str) -> None:
    for step in steps.journalled:
        under = strace.command(step.with_signal(signal.SIGSTOP))
        with laptop.start(*ALLOW, *NEVER, wanted=WANTED, under=under) as session:
            kill(strace.stopped(), session.process.pid)
            session.wait()
        repaired(laptop, before, step)


def test_the_helper_at_each_step_of_the_end(laptop: Laptop, strace: Strace, steps: Steps, before: str) -> None:
    """Here it is `tpvpn cleanup` that does the rest."""
    for step in steps.end:
        under = strace.command(step.with_signal(signal.SIGKILL))
        with laptop.start(*ALLOW, *NEVER, "--", "true", wanted=WANTED, under=under) as session:
            strace.heard("+++ killed by SIGKILL +++")
            assert session.wait(1) == 0, step
        eventually(lambda: harmless(laptop, before), 1, f"nothing that alters routing after {step}")
        done = laptop.tpvpn("cleanup")
        assert (done.returncode, done.stderr) == (0, ""), step
        assert laptop.state() == before, step
