"""`scripts/soak`: a session under traffic and random faults, for as long as wanted; what grew, and what was lost.

The same seed gives the same faults at the same moments. Every second the memory, descriptors and threads of the client,
its helper and the manager are looked at. It fails when a byte was lost, when something did not go on, or when something
of them grew: the median of the last fifth against that of the second.
"""

import argparse
import contextlib
import os
import random
import re
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib as mpl
from faults import cut, moved, reset, silence, stopped
from laptop import ALLOWED, Laptop, Session, lab_with_manager
from matplotlib import pyplot

from peers import eventually
from tpvpn.lab.topology import EXITS
from traffic import MEGABYTE, traffic

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "tpvpn"  # the same figures give the same file
ROUND = 20.0
"""Seconds that a transfer takes when nothing happens."""
SIZE = 60 * MEGABYTE
GROWTH = {"RSS, MiB": 6.0, "descriptors": 4.0, "threads": 2.0}
"""What is no growth."""
CONTENT = """# Soak, {when} UTC

In network namespaces of one machine of 2 cores; a transfer both ways, an idle shell, datagrams and a ping all the time,
over two connections that are renewed every 42 s. Growth is the median of the last fifth of the time against that of the
second.

{minutes} minutes, seed {seed}, {exit} exit: {faults} faults ({kinds}); {moved} MiB were compared byte by byte, none was
lost. The longest pause of a transfer was {longest} s, the median of the rounds' longest {median} s.

| process | | at first | most | growth |
|---|---|---:|---:|---:|
{rows}

![memory and faults](soak.svg)
"""
RESULTS = Path(__file__).parents[2] / "bench" / "results"


@dataclass
class Sampled:
    """A process and what it had, second by second."""

    pid: int
    at: list[float] = field(default_factory=list)
    seen: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in GROWTH})

    def sample(self, now: float) -> None:
        status = Path(f"/proc/{self.pid}/status").read_text()
        numbers = {name: int(re.search(rf"{name}:\s+(\d+)", status)[1]) for name in ("VmRSS", "Threads")}  # type: ignore[index]
        self.at.append(now)
        self.seen["RSS, MiB"].append(numbers["VmRSS"] / 1024)
        self.seen["threads"].append(numbers["Threads"])
        self.seen["descriptors"].append(len(os.listdir(f"/proc/{self.pid}/fd")))

    def growth(self, name: str) -> float:
        """The last fifth against the second; the first warms up."""
        values = self.seen[name]
        fifth = max(len(values) // 5, 1)
        return statistics.median(values[-fifth:]) - statistics.median(values[fifth : 2 * fifth] or values)


@dataclass
class Soak:
    """What happened."""

    seed: int
    exit: str
    began: float = field(default_factory=time.monotonic)
    processes: dict[str, Sampled] = field(default_factory=dict[str, Sampled])
    faults: list[tuple[float, str]] = field(default_factory=list[tuple[float, str]])
    pauses: list[float] = field(default_factory=list[float])
    """The longest of each round."""
    moved: int = 0
    """Bytes, compared."""
    lasted: float = 0.0

    @property
    def now(self) -> float:
        return time.monotonic() - self.began

    def grew(self) -> list[str]:
        """What did, in words."""
        return [
            f"the {who}'s {name} grew by {process.growth(name):.1f}"
            for who, process in self.processes.items()
            for name, most in GROWTH.items()
            if process.growth(name) > most
        ]


@contextlib.contextmanager
def sampling(soak: Soak) -> Iterator[None]:
    """Look at the processes every second meanwhile."""
    stop = threading.Event()

    def work() -> None:
        while not stop.wait(1):
            for process in soak.processes.values():
                process.sample(soak.now)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def fault(laptop: Laptop, session: Session, chance: random.Random) -> tuple[str, Callable[[], None]]:
    """One that chance chooses: its name, and what does it."""

    def lasting(context: contextlib.AbstractContextManager[None], seconds: float) -> Callable[[], None]:
        def last() -> None:
            with context:
                time.sleep(seconds)

        return last

    def vpn() -> None:
        laptop.lab.vpn_down()
        time.sleep(1)
        laptop.lab.vpn_up()

    quiet, asleep, away = chance.uniform(0.5, 9), chance.uniform(0.5, 8), chance.uniform(2, 6)
    return chance.choice(
        [
            ("cut here", lambda: cut(laptop)),
            ("cut there", lambda: reset(laptop)),
            (f"silence of {quiet:.1f} s", lasting(silence(laptop), quiet)),
            (f"sleep of {asleep:.1f} s", lasting(stopped(session.process.pid), asleep)),
            (f"another address for {away:.1f} s", lasting(moved(laptop), away)),
            ("the VPN goes and comes", vpn),
        ]
    )


def run(minutes: float, seed: int) -> Soak:
    """As long as it takes; AssertionError when something was lost."""
    chance = random.Random(seed)
    with lab_with_manager() as laptop:
        soak = Soak(seed, laptop.lab.options["exit"])
        near, far = laptop.lab.namespace("laptop"), laptop.lab.namespace("cluster")
        with laptop.connected(*ALLOWED, "--links", "2", "--max-link-age", "0.7") as session:
            soak.processes = {
                "client": Sampled(session.process.pid),
                "helper": Sampled(laptop.process("laptop", "tpvpn.helper.root")),
                "manager": Sampled(laptop.process("node", "manager")),
            }
            with sampling(soak):
                while soak.now < minutes * 60:
                    _round(soak, laptop, session, chance, near, far)
            soak.lasted = soak.now
            assert "forgotten" not in session.said, session.said
    return soak


def _round(soak: Soak, laptop: Laptop, session: Session, chance: random.Random, near: str, far: str) -> None:
    with traffic(near, far, ROUND, SIZE) as running:
        began = time.monotonic()
        for _ in range(chance.randrange(1, 4)):
            time.sleep(chance.uniform(0.5, 4))
            name, happen = fault(laptop, session, chance)
            soak.faults.append((soak.now, name))
            print(f"{soak.now:7.1f} s  {name}", flush=True)
            happen()
        running.finishes(ROUND + 60)
        soak.moved += 2 * SIZE
        soak.pauses.append(running.transfer.gap(began))
        eventually(lambda: laptop.probe(["10.130.0.80"], 2)["10.130.0.80"] is not None, 10, "a new connection")


def report(soak: Soak) -> str:
    """Markdown, with what to beware of first."""
    rows = [
        f"| {who} | {name} | {seen[0]:.0f} | {max(seen):.0f} | {process.growth(name):+.1f} |"
        for who, process in soak.processes.items()
        for name, seen in process.seen.items()
    ]
    kinds = ", ".join(sorted({re.sub(r" (of|for) .*", "", name) for _, name in soak.faults}))
    return CONTENT.format(
        when=time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        minutes=f"{soak.lasted / 60:.1f}",
        seed=soak.seed,
        exit=soak.exit,
        faults=len(soak.faults),
        kinds=kinds,
        moved=f"{soak.moved / MEGABYTE:,.0f}",
        longest=f"{max(soak.pauses):.1f}",
        median=f"{statistics.median(soak.pauses):.1f}",
        rows="\n".join(rows),
    )


def plot(soak: Soak, path: Path) -> None:
    """Memory by time, with the faults."""
    figure, axes = pyplot.subplots(figsize=(9, 4), layout="constrained")
    for when, _ in soak.faults:
        axes.axvline(when / 60, color="0.85", linewidth=0.8)
    for who, process in soak.processes.items():
        axes.plot([at / 60 for at in process.at], process.seen["RSS, MiB"], label=who)
    axes.set_xlabel("minutes; a line for each fault")
    axes.set_ylabel("RSS, MiB")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(description="A session under traffic and random faults.")
    parser.add_argument("--minutes", type=float, default=20.0, help="how long (20)")
    parser.add_argument("--seed", type=int, default=1, help="of the faults (1)")
    parser.add_argument("--exit", choices=EXITS, help="the manager's (kernel)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the report goes (bench/results)")
    arguments = parser.parse_args()
    if arguments.exit and os.environ.get("TPVPN_TEST_EXIT") != arguments.exit:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "TPVPN_TEST_EXIT": arguments.exit})
    soak = run(arguments.minutes, arguments.seed)
    (arguments.output / "soak.md").write_text(report(soak))
    plot(soak, arguments.output / "soak.svg")
    print(report(soak))
    for words in (grew := soak.grew()):
        print(f"soak: {words}", file=sys.stderr)
    return 1 if grew else 0


if __name__ == "__main__":
    sys.exit(main())
