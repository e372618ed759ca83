"""A stub resolver in a network namespace of its own, between real servers: dnsmasq in the cluster, dnsmasq elsewhere.

dig ── 127.0.0.1, ::1  Server ──┬── Exchange ── the test's far side ── 127.0.0.3 dnsmasq: cluster.local
                                └── Upstream ── 127.0.0.2 dnsmasq: lan.example
"""

import asyncio
import contextlib
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import dns.message
import pytest
import uvloop

from pod import inside, namespace
from tpvpn.dns.exchange import Exchange
from tpvpn.dns.policy import Decision
from tpvpn.dns.server import Server
from tpvpn.dns.upstream import Upstream

ADDRESSES = ("127.0.0.1", "::1")
ELSEWHERE, CLUSTER = "127.0.0.2", "127.0.0.3"
LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
Decide = Callable[[str, int], Decision]
HEADLESS = "web.shop.svc.cluster.local"
RECORDS = [
    "--host-record=db.shop.svc.cluster.local,10.130.0.7,fd00:130::7",
    "--srv-host=_http._tcp.db.shop.svc.cluster.local,db.shop.svc.cluster.local,80,0,10",
    "--ptr-record=7.0.130.10.in-addr.arpa,db.shop.svc.cluster.local",
    "--cname=one.shop.svc.cluster.local,two.shop.svc.cluster.local,db.shop.svc.cluster.local",
    "--mx-host=shop.svc.cluster.local,db.shop.svc.cluster.local,5",
    "--txt-record=txt.shop.svc.cluster.local,hello,world",
    *(f"--txt-record=long.shop.svc.cluster.local,{letter * 250}" for letter in "abcdefghijklmnopq"),
    "--caa-record=shop.svc.cluster.local,0,issue,ca.example",
    "--dns-rr=odd.shop.svc.cluster.local,65280,c00cc00c",
    "--local=/cluster.local/",
    "--local-ttl=30",
]


def decide(name: str, kind: int) -> Decision:
    """A policy for tests: the last label or suffix says it."""
    if name.endswith(("cluster.local", "in-addr.arpa", ".include")):
        return Decision("cluster", "it is under the cluster's domain")
    if name.endswith(".shop"):
        return Decision("cluster", "it is a service's", asked=f"{name}.svc.cluster.local")
    if name == "wpad":
        return Decision("nowhere", "nobody may answer for it")
    if name == "mapped":
        return Decision("address", "it is mapped", address="10.130.0.9")
    if name == "outside":
        return Decision("elsewhere", "it is mapped", asked="host.lan.example")
    return Decision("elsewhere", "it is not the cluster's")


@contextlib.contextmanager
def dnsmasq(directory: Path, address: str, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server in this thread's namespace, which answers."""
    only = ["--conf-file=/dev/null", "--no-hosts", "--no-resolv", "--bind-interfaces", f"--listen-address={address}"]
    command = [
        "dnsmasq",
        "--keep-in-foreground",
        "--pid-file=",
        "--user=root",
        "--edns-packet-max=4096",
        *only,
        *options,
    ]
    with (directory / f"dnsmasq-{address}").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 5
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(0.1)
            client.connect((address, 53))
            while True:
                assert process.poll() is None, (directory / f"dnsmasq-{address}").read_text()
                assert time.monotonic() < deadline, "dnsmasq answers"
                with contextlib.suppress(OSError):
                    client.send(dns.message.make_query("x.invalid", "A").to_wire())
                    if client.recv(512):
                        break
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The namespace with both servers."""
    directory = tmp_path_factory.mktemp("dnsmasq")
    hosts = directory / "hosts"
    hosts.write_text("".join(f"10.132.{n // 250}.{n % 250} {HEADLESS}\n" for n in range(1000)))
    with namespace("stub") as name, inside(name):
        cluster = dnsmasq(directory, CLUSTER, *RECORDS, f"--addn-hosts={hosts}")
        with (
            cluster,
            dnsmasq(directory, ELSEWHERE, "--host-record=host.lan.example,192.0.2.7", "--local=/lan.example/"),
        ):
            yield name


def bound(port: int = 53) -> list[socket.socket]:
    """UDP sockets and listeners on the stub's addresses."""
    found = list[socket.socket]()
    for address in ADDRESSES:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
            one = socket.socket(family, kind)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind((address, port))
            if kind == socket.SOCK_STREAM:
                one.listen(128)
            found.append(one)
    return found


class Stub:
    """The server with both ways of asking; `asked` are the questions that went through the tunnel."""

    def __init__(self, decide: Decide) -> None:
        self.asked: list[tuple[int, bytes]] = []
        self.exchange, self.upstream, self.cluster = Exchange(), Upstream(), Upstream()
        self.upstream.set([ELSEWHERE])
        self.cluster.set([CLUSTER])
        self.exchange.attach(self.to_cluster)
        self.server = Server(bound(), self.exchange, self.upstream, decide)

    def to_cluster(self, identity: int, message: bytes) -> None:
        """What a manager does: UDP, then TCP when truncated."""
        self.asked.append((identity, message))

        def over_udp(answer: bytes | None) -> None:
            if answer and answer[2] & 2:
                self.cluster.ask(message, come_back, tcp=True)
            else:
                come_back(answer)

        def come_back(answer: bytes | None) -> None:
            if answer:
                self.exchange.receive(identity, answer)

        self.cluster.ask(message, over_udp)

    def close(self) -> None:
        self.server.close()
        self.upstream.close()
        self.cluster.close()


@contextlib.asynccontextmanager
async def stub(decide: Decide = decide) -> AsyncIterator[Stub]:
    made = Stub(decide)
    try:
        yield made
    finally:
        made.close()


def play(network: str, loop: str, scenario: Callable[[], Awaitable[None]], seconds: float = 20) -> None:
    """Run it in the namespace; what the loop would only log is an error."""
    errors: list[dict[str, object]] = []

    async def playing() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: errors.append(context))
        async with asyncio.timeout(seconds):
            await scenario()

    with inside(network), asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(playing())
    assert not errors


async def dig(*words: str, server: str = "127.0.0.1") -> str:
    """What dig printed."""
    command = ["dig", f"@{server}", "+tries=1", "+time=5", *words]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    said = (await process.communicate())[0].decode()
    assert process.returncode == 0, said
    return said


async def ask(query: dns.message.Message | bytes, seconds: float = 5, server: str = "127.0.0.1") -> dns.message.Message:
    """The answer to one datagram."""
    loop = asyncio.get_running_loop()
    family = socket.AF_INET6 if ":" in server else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as client:
        client.setblocking(False)
        client.connect((server, 53))
        await loop.sock_sendall(client, query if isinstance(query, bytes) else query.to_wire())
        async with asyncio.timeout(seconds):
            return dns.message.from_wire(await loop.sock_recv(client, 1 << 16))
