"""Too much of everything, and too little: a session degrades, says so, and recovers by itself."""

import contextlib
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import cut
from laptop import ALLOWED, CLUSTER4, Laptop, at_the_kernel_exit

from peers import eventually
from pod import inside
from traffic import HOST

pytestmark = pytest.mark.alone

FLOWS = 10_000


def status(laptop: Laptop) -> dict:
    return json.loads(laptop.tpvpn("status", "--output", "json").stdout)["sessions"][0]


def cpu(pid: int) -> float:
    """Seconds of processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def few_descriptors(pid: int) -> Iterator[None]:
    """The process may open nothing more."""
    had = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(os.listdir(f"/proc/{pid}/fd")) // 2, had[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, had)


def test_a_client_without_descriptors_waits_for_some(laptop: Laptop) -> None:
    with laptop.connected() as session:
        laptop.reaches("cluster", CLUSTER4)
        with few_descriptors(session.process.pid):
            cut(laptop)
            session.says("Too many open files", 5)
            before, began = cpu(session.process.pid), time.monotonic()
            laptop.sh("ip route add 10.77.0.0/16 dev eth0; ip route del 10.77.0.0/16 dev eth0")
            eventually(lambda: time.monotonic() - began > 2, 5)
            assert cpu(session.process.pid) - before < 1, "it does not spin"
            assert session.said.count("Too many open files") < 5, "nor fill the log"
        eventually(lambda: status(laptop)["state"] == "ready", 5, "ready")
        laptop.reaches("cluster", CLUSTER4)


@at_the_kernel_exit  # with sockets it is another user's process, whose limits are not ours to set
def test_a_manager_without_descriptors_keeps_who_is_there(laptop: Laptop) -> None:
    manager = laptop.process("node", "manager")
    with laptop.connected() as session:
        with few_descriptors(manager):
            laptop.reaches("cluster", CLUSTER4[:1])
            cut(laptop)
            session.says("connecting again", 5)
            before, began = cpu(manager), time.monotonic()
            eventually(lambda: time.monotonic() - began > 2, 5)
            assert cpu(manager) - before < 1, "it does not spin"
        eventually(lambda: status(laptop)["state"] == "ready", 15, "ready")
        laptop.reaches("cluster", CLUSTER4)


@contextlib.contextmanager
def full_disk(laptop: Laptop) -> Iterator[Path]:
    """A run directory on a file system without room."""
    with tempfile.TemporaryDirectory(prefix="tpvpn-tests-") as name:
        laptop.sh(f"mount -t tmpfs -o size=64k,mode=755 full {name}; cat /dev/zero >{name}/fill 2>/dev/null || true")
        try:
            yield Path(name)
        finally:
            laptop.sh(f"umount {name}")


def test_a_full_disk_is_one_sentence_and_nothing_is_done(laptop: Laptop) -> None:
    before = laptop.state()
    with full_disk(laptop) as directory:
        done = subprocess.run(
            laptop.command(laptop.connect_command(*ALLOWED)),
            env={**os.environ, "TPVPN_RUN_DIR": str(directory)},
            capture_output=True,
            text=True,
            timeout=20,
        )
        assert done.returncode == 1, done.stderr
        assert "Traceback" not in done.stderr
        assert "No space left on device" in done.stderr.strip().splitlines()[-1]
        laptop.is_as(before)


def test_what_cannot_be_written_down_is_not_done(laptop: Laptop) -> None:
    """The journal takes half a line more and nothing then, as on a full disk; when there is room again it is done."""
    routes = "ip route show table all proto 116"
    with laptop.connected("--on-conflict", "skip") as session:
        helper = laptop.process("laptop", "tpvpn.helper.root")
        journal = laptop.directory / "default" / "journal"
        written, size = journal.read_bytes(), journal.stat().st_size
        had = resource.prlimit(helper, resource.RLIMIT_FSIZE)
        resource.prlimit(helper, resource.RLIMIT_FSIZE, (size + 20, had[1]))
        try:
            laptop.lab.vpn_down()
            session.says("No space left on device", 5)
            assert "tpvpn0" not in laptop.sh(routes)
            assert journal.read_bytes() == written
        finally:
            resource.prlimit(helper, resource.RLIMIT_FSIZE, had)
        eventually(lambda: "10.130.0.0/16" in laptop.sh(routes), 5, "it is routed")
        laptop.reaches("cluster", CLUSTER4)
        laptop.lab.vpn_up()
    assert laptop.sh(routes) == ""


def test_a_log_that_takes_nothing_ends_no_session(laptop: Laptop) -> None:
    with open("/dev/full", "w") as full:
        process = subprocess.Popen(laptop.command(laptop.connect_command(*ALLOWED)), stderr=full)
    try:
        laptop.reaches("cluster", CLUSTER4)
        cut(laptop)
        eventually(lambda: status(laptop)["reconnects"] == 1, 5, "connected again")
        laptop.reaches("cluster", CLUSTER4)
    finally:
        process.terminate()
        assert process.wait(10) == 0


def test_a_storm_of_routes_is_outlived(laptop: Laptop) -> None:
    """More changes than a netlink socket holds, three times over, and a VPN's among them."""
    routes = "".join(f"route add 172.20.{n >> 8 & 255}.{n & 255}/32 dev eth0\n" for n in range(8000))
    with (
        laptop.connected("--on-conflict", "skip") as session,
        tempfile.NamedTemporaryFile("w", suffix=".batch") as batch,
    ):
        batch.write((routes + routes.replace("add", "del")) * 3)
        batch.flush()
        before, began = cpu(session.process.pid), time.monotonic()
        laptop.sh(f"ip -batch {batch.name}")
        laptop.lab.vpn_down()
        eventually(lambda: "10.130.0.0/16" in laptop.sh("ip route show table all proto 116"), 60, "it is routed")
        assert cpu(session.process.pid) - before < 0.6 * (time.monotonic() - began) + 1
        laptop.reaches("cluster", CLUSTER4)
        laptop.lab.vpn_up()
        eventually(lambda: "10.130.0.0/16" not in laptop.sh("ip route show table all proto 116"), 10, "it is not")


ECHOES = """
import resource, selectors, socket, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
listening, selector = socket.create_server((sys.argv[1], 0), backlog=4096), selectors.DefaultSelector()
selector.register(listening, selectors.EVENT_READ)
print(listening.getsockname()[1], flush=True)
while True:
    for key, _ in selector.select():
        if key.fileobj is listening:
            selector.register(listening.accept()[0], selectors.EVENT_READ)
        elif data := key.fileobj.recv(100):
            key.fileobj.sendall(data)
        else:
            selector.unregister(key.fileobj)
            key.fileobj.close()
"""
"""A server that answers each connection's bytes, however many there are."""


@contextlib.contextmanager
def echoes(laptop: Laptop) -> Iterator[int]:
    """It runs in the cluster; its port."""
    argv = [sys.executable, "-c", ECHOES, HOST]
    with subprocess.Popen(laptop.lab.command("cluster", argv), stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        yield int(server.stdout.readline())
        server.kill()


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """As many as this process may have."""
    had = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (had[1], had[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, had)


def test_ten_thousand_connections_at_once(laptop: Laptop, many_descriptors: None) -> None:
    """All answer, a new one and a ping are quick meanwhile, they outlive a lost link, and nothing is left of them."""
    manager = Path(f"/proc/{laptop.process('node', 'manager')}/fd")
    before = len(os.listdir(manager))
    with laptop.connected() as session, contextlib.ExitStack() as stack:
        port = stack.enter_context(echoes(laptop))
        opened: list[socket.socket] = []
        with inside(laptop.namespace):
            for _ in range(FLOWS):
                opened.append(socket.create_connection((HOST, port), timeout=20))
                stack.callback(opened[-1].close)
        answer(opened)
        began = time.monotonic()
        laptop.reaches("cluster", CLUSTER4[:1])
        assert time.monotonic() - began < 3
        assert " 0% packet loss" in laptop.sh(f"ping -c 5 -i 0.2 -W 1 {HOST}")
        cut(laptop)
        eventually(lambda: status(laptop)["reconnects"] == 1, 10, "connected again")
        answer(opened)
        rss = int(Path(f"/proc/{session.process.pid}/statm").read_text().split()[1]) * 4096
        assert rss < 150 << 20
        stack.close()
        laptop.reaches("cluster", CLUSTER4)
    eventually(lambda: len(os.listdir(manager)) <= before, 20, "the manager has closed every socket")


MEMORY = Path("/sys/fs/cgroup/memory")


@contextlib.contextmanager
def little_memory(limit: int) -> Iterator[Path]:
    """Processes that are started within have so many bytes together; their cgroup."""
    own = MEMORY / f"tv{os.getpid()}"
    own.mkdir()
    (own / "memory.limit_in_bytes").write_text(str(limit))
    (own / "cgroup.procs").write_text(str(os.getpid()))
    try:
        yield own
    finally:
        (MEMORY / "cgroup.procs").write_text(str(os.getpid()))


@at_the_kernel_exit  # it has a manager of its own
@pytest.mark.skipif(not MEMORY.exists(), reason="no memory controller of version 1 is mounted here")
def test_a_manager_with_little_memory_keeps_within_it(laptop: Laptop) -> None:
    """Far more is sent than it may keep, to a server that reads nothing; another flow goes on meanwhile."""
    listen = "192.0.2.10:7072"
    with little_memory(96 << 20) as cgroup:
        manager = laptop.lab.start_manager(exit="socket", listen=listen, name="small")
    link = ("--manager", f"tcp://{listen}", "--token-file", str(laptop.lab.token_file))
    namespace = laptop.lab.namespace("cluster")
    try:
        with laptop.connected(*ALLOWED, *link), contextlib.ExitStack() as stack:
            with inside(namespace):
                server = stack.enter_context(socket.create_server((HOST, 0), backlog=512))
            stuck = [stack.enter_context(connected(laptop, server)) for _ in range(200)]
            block, began = bytes(1 << 16), time.monotonic()
            while time.monotonic() < began + 4:
                for one in stuck:
                    with contextlib.suppress(BlockingIOError):
                        one.send(block)
            used = int((cgroup / "memory.max_usage_in_bytes").read_text())
            assert 40 << 20 < used < 96 << 20, "much was kept, and not too much"
            laptop.reaches("cluster", CLUSTER4)
            assert manager.poll() is None
    finally:
        manager.terminate()
        manager.wait(10)
        eventually(lambda: (cgroup / "cgroup.procs").read_text() == "", 5, "the cgroup is empty")
        cgroup.rmdir()


def connected(laptop: Laptop, server: socket.socket) -> socket.socket:
    one = laptop.socket(socket.AF_INET)
    one.settimeout(10)
    one.connect(server.getsockname())
    one.setblocking(False)
    return one


def answer(opened: list[socket.socket]) -> None:
    """Each connection answers a byte."""
    for number, one in enumerate(opened):
        one.send(bytes([number & 255]))
    for number, one in enumerate(opened):
        assert one.recv(1) == bytes([number & 255])
