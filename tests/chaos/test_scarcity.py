"""Too little of what a machine lends a session: descriptors, memory, room on a disk.

What lacks them says so in one sentence and goes on when it can; what the kernel ends, the other process cleans up.
"""

import contextlib
import os
import re
import resource
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from laptop import ALLOWED, CLUSTER4, TPVPN, Laptop

from peers import eventually
from tpvpn.lab.topology import IPERF

pytestmark = pytest.mark.timeout(60)


def cpu(pid: int) -> float:
    """Seconds of processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# -- descriptors -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def few_descriptors(pid: int, more: int) -> Iterator[None]:
    """The process may have so many more than it has; half as many as it has when that is less than nothing."""
    had, has = resource.prlimit(pid, resource.RLIMIT_NOFILE), len(os.listdir(f"/proc/{pid}/fd"))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (has + more if more >= 0 else has // 2, had[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, had)


@pytest.mark.parametrize("limit", [12, 14, 16, 19, 21, 22, 23])
def test_too_few_to_connect_is_one_sentence(laptop: Laptop, limit: int) -> None:
    """Whatever they do not suffice for: a module, the helper, the routes, the control socket, the command."""
    before = laptop.state()
    connect = laptop.connect_command(*ALLOWED, "--", "true")
    ended = laptop.run("prlimit", f"--nofile={limit}:", *connect)
    assert ended.returncode in (1, 126), ended.stderr
    assert re.match("tpvpn: .*Too many open files", ended.stderr.splitlines()[-1]), ended.stderr
    assert "/tpvpn/" not in ended.stderr.rpartition("tpvpn: ")[0], ended.stderr
    laptop.is_as(before)


@pytest.mark.parametrize("more", [-1, 0, 2])
def test_none_from_the_first_moment_on(laptop: Laptop, more: int) -> None:
    with laptop.connected() as session:
        with few_descriptors(session.process.pid, more):
            laptop.sh("ip route add 10.130.5.0/24 dev tun0; ip route del 10.130.5.0/24 dev tun0")
            if more < 0:  # else what had been open for a moment may suffice
                session.says("Too many open files")
            laptop.reaches("cluster", CLUSTER4)
        laptop.reaches("cluster", CLUSTER4)
        assert session.said.count("Too many open files") <= 2, "of routes and of names, once each"


def test_who_asks_a_session_without_any_waits_and_costs_nothing(laptop: Laptop) -> None:
    with laptop.connected() as session:
        with few_descriptors(session.process.pid, -1):
            asking = subprocess.Popen(laptop.command((*TPVPN, "status")), stdout=subprocess.PIPE, text=True)
            before, began = cpu(session.process.pid), time.monotonic()
            eventually(lambda: time.monotonic() - began > 2, 5)
            assert cpu(session.process.pid) - before < 0.5
            assert asking.poll() is None
        answer, _ = asking.communicate(timeout=10)
        assert asking.returncode == 0
        assert "routed" in answer


# -- room on a disk ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(laptop: Laptop, options: str, free: int) -> Iterator[Path]:
    """A directory on a file system of the laptop's that has little left."""
    with tempfile.TemporaryDirectory(prefix="tpvpn-tests-") as name:
        laptop.sh(
            f"mount -t tmpfs -o mode=755,{options} small {name}; head -c {(64 << 10) - free} /dev/zero >{name}/fill"
        )
        try:
            yield Path(name)
        finally:
            laptop.sh(f"umount {name}")


@pytest.mark.parametrize("inodes", [4, 5, 6, 7, 8])
def test_a_file_too_many_is_one_sentence(laptop: Laptop, inodes: int) -> None:
    """Whichever it is: a directory, the journal, what tells of the session, its socket."""
    with small_disk(laptop, f"nr_inodes={inodes}", 64 << 10) as directory:
        no_room(laptop, directory)


@pytest.mark.parametrize("free", [0, 4 << 10])
def test_a_page_too_many_is_one_sentence(laptop: Laptop, free: int) -> None:
    """Be it the journal's, or that of what tells of the session."""
    with small_disk(laptop, "size=64k", free) as directory:
        no_room(laptop, directory)


def no_room(laptop: Laptop, directory: Path) -> None:
    before = laptop.state()
    elsewhere = ("env", f"TPVPN_RUN_DIR={directory}")
    ended = laptop.run(*elsewhere, *laptop.connect_command(*ALLOWED, "--", "true"))
    assert ended.returncode == 1, ended.stderr
    assert re.match("tpvpn: .*No space left on device", ended.stderr.splitlines()[-1]), ended.stderr
    assert "Traceback" not in ended.stderr
    assert set(laptop.sh(f"ls {directory}").split()) == {"fill", "lock"}, "no part of a session"
    laptop.is_as(before)


@pytest.mark.parametrize("log", ["2>/dev/full", "2>&1 >/dev/null | true"])
def test_the_exit_code_tells_what_a_log_cannot(laptop: Laptop, log: str) -> None:
    connect = laptop.connect_command("--on-conflict", "fail")
    ended = laptop.run("bash", "-c", f'set -o pipefail; "$@" {log}', "bash", *connect)
    assert ended.returncode == 3, ended


# -- memory ------------------------------------------------------------------------------------------------------------

MEMORY = Path("/sys/fs/cgroup/memory")
has_cgroups = pytest.mark.skipif(not MEMORY.exists(), reason="no memory controller of version 1 is mounted here")


@contextlib.contextmanager
def no_more_memory_than(pids: Sequence[int], more: int) -> Iterator[Path]:
    """The processes may take so many bytes more than they have; the cgroup."""
    own = MEMORY / f"tv{os.getpid()}-scarce"
    own.mkdir()
    (own / "memory.limit_in_bytes").write_text(str(more))  # what they have is not charged anew
    for pid in pids:
        (own / "cgroup.procs").write_text(str(pid))
    try:
        yield own
    finally:
        for pid in pids:
            with contextlib.suppress(OSError):  # it has ended
                (MEMORY / "cgroup.procs").write_text(str(pid))
        eventually(lambda: (own / "cgroup.procs").read_text() == "", 5, "the cgroup is empty")
        own.rmdir()


def full_load(laptop: Laptop) -> None:
    """Many streams in both directions and many connections; all of them carry bytes."""
    argv = [["iperf3", "--client", IPERF[0], "--time", "4", "--parallel", "8"]]
    argv.append([*argv[0], "--reverse", "--cport", "40000"])
    argv[1][2] = IPERF[1]
    streams = [subprocess.Popen(laptop.command(one), stdout=subprocess.PIPE, text=True) for one in argv]
    try:
        for _ in range(5):
            laptop.reaches("cluster", CLUSTER4)
        for stream in streams:
            shown, _ = stream.communicate(timeout=20)
            assert re.search(r"\[SUM\].* [MG]Bytes .*receiver", shown), shown
    finally:
        for stream in streams:
            stream.kill()
            stream.wait()


@has_cgroups
def test_full_load_within_a_few_megabytes(laptop: Laptop) -> None:
    """At both ends at once. Measured: 1.5 MB; with the socket exit 12 MB, its connections' buffers."""
    manager, kernel = laptop.process("node", "manager"), laptop.lab.options["exit"] == "kernel"
    with laptop.connected() as session:
        helper = laptop.process("laptop", "tpvpn.helper.root")
        with no_more_memory_than([session.process.pid, helper, manager], (8 if kernel else 32) << 20) as cgroup:
            full_load(laptop)
            assert "oom_kill 0" in (cgroup / "memory.oom_control").read_text()
            laptop.reaches("cluster", CLUSTER4)


@has_cgroups
def test_a_session_that_the_kernel_ends_for_memory_leaves_nothing(laptop: Laptop) -> None:
    """With 30,000 routes its view of them has no room."""
    before = laptop.state()
    with laptop.start(*ALLOWED) as session:
        session.wait_ready()
        helper = laptop.process("laptop", "tpvpn.helper.root")
        with no_more_memory_than([session.process.pid, helper], 4 << 20) as cgroup:
            routes(laptop, "add")
            eventually(lambda: "oom_kill 1" in (cgroup / "memory.oom_control").read_text(), 20)
            assert session.wait() == -9
            eventually(lambda: not laptop.directory.exists(), 1, "the helper has undone everything")
    routes(laptop, "del")
    laptop.is_as(before)
    with laptop.connected():
        laptop.reaches("cluster", CLUSTER4)


def routes(laptop: Laptop, verb: str) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".batch") as batch:
        batch.writelines(f"route {verb} 172.20.{n >> 8}.{n & 255}/32 dev eth0\n" for n in range(30_000))
        batch.flush()
        laptop.sh(f"ip -batch {batch.name}")
