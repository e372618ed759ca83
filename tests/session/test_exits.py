"""What ordinary programs see of the cluster, directly and through each exit: the same, but for what is named here.

Each row does something on the laptop and returns what came of it, in words. What that must be without a session stands
beside the row; the direct way of the same run must give that, and each exit what the direct way gives, unless the row
names the difference, whose reasons are in docs/concepts/exits.md.

    laptop ── node ── cluster (a pod; ports with firewall rules) ── router's other side, MTU 1400 ── beyond
                 └─ routes of every kind that refuses

The direct way is plain forwarding and masquerade at the node, to further addresses of the same hosts.
"""

import contextlib
import errno
import hashlib
import itertools
import re
import select
import socket
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
from laptop import ALLOWED, Laptop, lab_with_manager

from peers import eventually
from pod import inside, namespace, run
from tpvpn.lab import Exit, Lab
from tpvpn.lab.topology import EXITS, PODS, PODS6, TWINS, TWINS6

V4, V6 = socket.AF_INET, socket.AF_INET6
AT_ONCE, SOON, LONG = 1.0, 3.0, 8.0
"""Seconds. SOON: the kernel hears an ICMP error that comes while it still sends the first SYN with the second only."""
CLOSED, DROPPED, PROHIBITED, NO_HOST, NO_NETWORK, NO_PORT, RESET = 9000, 9001, 9002, 9003, 9004, 9005, 9006
FIREWALL = f"""
table inet exits {{
    chain input {{
        type filter hook input priority filter
        meta l4proto {{ tcp, udp }} th dport {DROPPED} drop
        meta l4proto {{ tcp, udp }} th dport {PROHIBITED} reject with icmpx admin-prohibited
        meta l4proto {{ tcp, udp }} th dport {NO_HOST} reject with icmpx host-unreachable
        meta l4proto {{ tcp, udp }} th dport {NO_NETWORK} reject with icmpx no-route
        meta l4proto {{ tcp, udp }} th dport {NO_PORT} reject with icmpx port-unreachable
        tcp dport {RESET} reject with tcp reset
    }}
    set dead {{ type inet_service; }}
    chain dead {{
        type filter hook input priority filter
        tcp dport @dead drop
    }}
}}
"""
KINDS = ("none", "unreachable", "prohibit", "blackhole")
"""Of the node's routes to what is nowhere; none: no route."""
NARROW = 1400
RESET_AT_CLOSE = struct.pack("ii", 1, 0)


@dataclass(frozen=True)
class Way:
    """How the laptop names the same hosts on one of the ways to them."""

    laptop: Laptop
    family: socket.AddressFamily
    pod: str
    dead: str
    """Nobody has this address of the pods' subnet."""
    nowhere: str
    """A pattern for an address that is behind a route of one of `KINDS`."""
    distant: str
    """A pattern for the addresses of the host behind a router."""
    namespace: str
    """Where that one is."""

    @property
    def beyond(self) -> str:
        return self.distant.format(1)

    def name(self, address: str) -> str:
        """Who has an address."""
        if address in (*PODS, *PODS6, *TWINS, *TWINS6):
            return "pod"
        if address in ("192.0.2.10", "10.132.0.1", "2001:db8:2::10", "fd10:132::1"):
            return "node"
        return "beyond" if address in self.distants else address

    @property
    def distants(self) -> list[str]:
        """Each has a path MTU of its own."""
        return [self.distant.format(number) for number in (1, 2, 3)]

    def open(self, kind: int = socket.SOCK_STREAM, patience: float = AT_ONCE) -> socket.socket:
        near = self.laptop.socket(self.family, kind)
        near.settimeout(patience)
        return near

    def listener(self, address: str, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """A socket of the pod, or of the host beyond, on a free port."""
        with inside(self.namespace if address in self.distants else self.laptop.lab.namespace("cluster")):
            bound = socket.socket(self.family, kind)
        bound.bind((address, 0))
        bound.settimeout(LONG)
        return bound

    @contextlib.contextmanager
    def pair(self, address: str = "") -> Iterator[tuple[socket.socket, socket.socket]]:
        """The laptop's and the other end of a connection, by default to the pod."""
        with self.listener(address or self.pod) as server, self.open(patience=LONG) as near:
            server.listen()
            near.connect(server.getsockname()[:2])
            far, _ = server.accept()
            with far:
                far.settimeout(LONG)
                yield near, far


DIRECT = {
    V4: ("203.0.113.10", "203.0.113.99", "203.0.114.{}", "203.0.115.{}"),
    V6: ("2001:db8:133::10", "2001:db8:133::99", "2001:db8:134::{}", "2001:db8:135::{}"),
}
THROUGH = {
    V4: (PODS[0], "10.132.9.9", "10.140.0.{}", "10.141.0.{}"),
    V6: (PODS6[0], "fd10:132::9:9", "fd10:140::{}", "fd10:141::{}"),
}
ALSO = ("10.140.0.0/16", "10.141.0.0/16", "fd10:140::/64", "fd10:141::/64")


@dataclass(frozen=True)
class Connected:
    """A session through an exit, in a lab with all that refuses; the rows that wait have begun."""

    exit: Exit
    laptop: Laptop
    beyond: str
    waiting: "dict[tuple[Action, int, bool], Future[Outcome]]"

    def way(self, family: int, direct: bool) -> Way:
        addresses = (DIRECT if direct else THROUGH)[family]
        return Way(self.laptop, socket.AddressFamily(family), *addresses, self.beyond)

    def outcome(self, row: "Row", family: int, direct: bool) -> "Outcome":
        """What comes of a row on one of the ways."""
        if row.waits:
            return self.waiting[row.action, family, direct].result()
        return row.action(self.way(family, direct))


@pytest.fixture(scope="module", params=EXITS)
def connected(request: pytest.FixtureRequest) -> Iterator[Connected]:
    with lab_with_manager(exit=request.param) as laptop, namespace("beyond") as beyond:
        furnish(laptop.lab, beyond)
        also = [word for subnet in ALSO for word in ("--also-proxy", subnet)]
        actions = [row.action for row in ROWS if row.waits]
        waiting = list(itertools.product(actions, (V4, V6), (True, False)))
        with (
            laptop.connected(ALLOWED[0], ",".join((ALLOWED[1], *ALSO)), *also),
            ThreadPoolExecutor(len(waiting)) as pool,
        ):
            connected = Connected(request.param, laptop, beyond, {})
            for action, family, direct in waiting:
                begun = pool.submit(action, connected.way(family, direct))
                connected.waiting[action, family, direct] = begun
            yield connected


def furnish(lab: Lab, beyond: str) -> None:
    """The firewall, the host behind a router, and the routes that refuse."""
    lab.run("cluster", ["nft", "-f", "-"], input=FIREWALL)
    laptop, node, cluster = (lab.namespace(where) for where in ("laptop", "node", "cluster"))
    run("ip", "-n", cluster, "link", "add", "beyond", "type", "veth", "peer", "name", "eth0", "netns", beyond)
    for name, device in ((cluster, "beyond"), (beyond, "eth0")):
        run("ip", "-n", name, "link", "set", device, "mtu", str(NARROW), "up")
    for family, link, router in ((V4, "172.30.0.{}/24", "192.0.2.10"), (V6, "fd30::{}/64", "2001:db8:2::10")):
        length, nodad = ("24", []) if family == V4 else ("64", ["nodad"])
        run("ip", "-n", cluster, "address", "add", link.format(1), "dev", "beyond", *nodad)
        run("ip", "-n", beyond, "address", "add", link.format(2), "dev", "eth0", *nodad)
        run("ip", "-n", beyond, "route", "add", "default", "via", link.format(1).partition("/")[0])
        for ways in (DIRECT, THROUGH):
            pod, _, nowhere, distant = ways[family]
            subnet = f"{distant.format(0)}/{length}"
            for number in (1, 2, 3):
                run("ip", "-n", beyond, "address", "add", distant.format(number), "dev", "lo", *nodad)
            run("ip", "-n", cluster, "route", "add", subnet, "via", link.format(2).partition("/")[0])
            run("ip", "-n", node, "route", "add", subnet, "via", pod, "dev", "cni0", "onlink")
            for number, kind in enumerate(KINDS[1:], 2):
                run("ip", "-n", node, "route", "add", kind, nowhere.format(number))
            if ways is DIRECT:
                for pattern in (nowhere, distant):
                    run("ip", "-n", laptop, "route", "add", f"{pattern.format(0)}/{length}", "via", router)
    lab.sysctl("cluster", "net/ipv4/ip_forward", 1)
    lab.sysctl("cluster", "net/ipv6/conf/all/forwarding", 1)


# -- rows --------------------------------------------------------------------------------------------------------------

Outcome = object
Action = Callable[[Way], Outcome]


@dataclass(frozen=True)
class Row:
    """What is done, and what must come of it: without a session, and where an exit differs."""

    action: Action
    expected: dict[int, Outcome]
    differs: dict[Exit, Outcome] = field(default_factory=dict)
    waits: bool = False
    """For seconds, and little else: all of these wait at the same time. Few may be for what a route refuses, of which
    the kernel tells each sender once a second, and five times in advance (net.ipv4.route.error_cost)."""


ROWS: list[Row] = []


def gives(four: Outcome, six: Outcome = None, *, waits: bool = False, **differs: Outcome) -> Callable[[Action], Action]:
    """A row of the matrix; IPv6 gives the same unless said."""

    def add(action: Action) -> Action:
        expected = {V4: four, V6: four if six is None else six}
        ROWS.append(Row(action, expected, differs, waits))  # type: ignore[arg-type]
        return action

    return add


@pytest.mark.parametrize("family", [V4, V6], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.action.__name__)
def test_as_without_a_session(connected: Connected, row: Row, family: socket.AddressFamily) -> None:
    direct = connected.outcome(row, family, direct=True)
    assert direct == row.expected[family], "directly"
    through = connected.outcome(row, family, direct=False)
    assert through == row.differs.get(connected.exit, direct), f"{connected.exit} exit"


def outcome(call: Callable[..., object], *arguments: object) -> object:
    """What a call gives: its value, the error's name, or that nothing came of it in time."""
    try:
        return call(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno] if error.errno else "nothing"


# -- opening a connection ----------------------------------------------------------------------------------------------


def opening(way: Way, address: str, port: int, patience: float = SOON) -> object:
    with way.open(patience=patience) as near:
        return outcome(near.connect, (address, port)) or "open"


@gives(("the pod's name", "from the node"))
def an_open_port(way: Way) -> object:
    with way.pair() as (near, far):
        assert near.getpeername()[:2] == far.getsockname()[:2]
        return "the pod's name", f"from the {way.name(far.getpeername()[0])}"


@gives("ECONNREFUSED")
def a_closed_port(way: Way) -> object:
    return opening(way, way.pod, CLOSED, AT_ONCE)


@gives("nothing", waits=True)
def a_dropped_port(way: Way) -> object:
    return opening(way, way.pod, DROPPED, AT_ONCE)


@gives("EHOSTUNREACH", "EACCES", waits=True)
def a_prohibited_port(way: Way) -> object:
    return opening(way, way.pod, PROHIBITED)


@gives("EHOSTUNREACH", waits=True)
def a_port_of_no_host(way: Way) -> object:
    return opening(way, way.pod, NO_HOST)


@gives("ENETUNREACH", waits=True)
def a_port_of_no_network(way: Way) -> object:
    return opening(way, way.pod, NO_NETWORK)


@gives("ECONNREFUSED", waits=True)
def a_port_that_icmp_refuses(way: Way) -> object:
    return opening(way, way.pod, NO_PORT)


@gives("ECONNREFUSED")
def a_port_that_a_reset_refuses(way: Way) -> object:
    return opening(way, way.pod, RESET, AT_ONCE)


@gives("EHOSTUNREACH", waits=True)
def a_host_that_is_not_there(way: Way) -> object:
    return opening(way, way.dead, 80, LONG)


@gives(
    ["ENETUNREACH", "EHOSTUNREACH", "EHOSTUNREACH", "nothing"],
    ["ENETUNREACH", "ENETUNREACH", "EACCES", "nothing"],
    waits=True,
)
def routes_that_refuse(way: Way) -> object:
    return [opening(way, way.nowhere.format(number + 1), 80) for number in range(len(KINDS))]


@gives("nothing", waits=True)
def a_full_backlog(way: Way) -> object:
    with way.listener(way.pod) as server, way.open() as first, way.open() as second:
        server.listen(0)
        first.connect(server.getsockname()[:2])
        eventually(lambda: bool(select.select([server], [], [], 0)[0]), LONG)  # the last ACK of three has come
        return outcome(second.connect, server.getsockname()[:2])


# -- closing it --------------------------------------------------------------------------------------------------------


@gives(("EOF", b"still there", "EOF"))
def the_laptop_closes_its_half(way: Way) -> object:
    with way.pair() as ends:
        return half_close(*ends)


@gives(("EOF", b"still there", "EOF"))
def the_pod_closes_its_half(way: Way) -> object:
    with way.pair() as (near, far):
        return half_close(far, near)


def half_close(first: socket.socket, second: socket.socket) -> object:
    first.shutdown(socket.SHUT_WR)
    ended = second.recv(1) or "EOF"
    second.sendall(b"still there")
    second.shutdown(socket.SHUT_WR)
    return ended, first.recv(100), first.recv(1) or "EOF"


@gives(("ECONNRESET", "EPIPE"))
def the_laptop_aborts(way: Way) -> object:
    with way.pair() as ends:
        return abort(*ends)


@gives(("ECONNRESET", "EPIPE"))
def the_pod_aborts(way: Way) -> object:
    with way.pair() as (near, far):
        return abort(far, near)


def abort(first: socket.socket, second: socket.socket) -> object:
    first.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_AT_CLOSE)
    first.close()
    return outcome(second.recv, 1), outcome(second.send, b"x")


@gives((b"last words", "ECONNRESET"))
def the_pod_aborts_behind_data(way: Way) -> object:
    with way.pair() as (near, far):
        far.send(b"last words")
        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_AT_CLOSE)
        assert select.select([near], [], [], LONG)[0]
        far.close()
        return near.recv(100), outcome(near.recv, 1)


@gives("ECONNRESET")
def the_laptop_closes_without_having_read(way: Way) -> object:
    with way.pair() as ends:
        return close_unread(*ends)


@gives("ECONNRESET")
def the_pod_closes_without_having_read(way: Way) -> object:
    with way.pair() as (near, far):
        return close_unread(far, near)


def close_unread(first: socket.socket, second: socket.socket) -> object:
    second.sendall(b"unread")
    assert select.select([first], [], [], LONG)[0]
    first.close()
    return outcome(second.recv, 1)


@gives(("EOF", "told"))
def the_laptop_closes_while_the_pod_sends(way: Way) -> object:
    with way.pair() as ends:
        return close_under(*ends)


@gives(("EOF", "told"))
def the_pod_closes_while_the_laptop_sends(way: Way) -> object:
    with way.pair() as (near, far):
        return close_under(far, near)


def close_under(first: socket.socket, second: socket.socket) -> object:
    """One write after the end is answered by a reset, which is heard without another."""
    first.close()
    ended = second.recv(1) or "EOF"
    second.send(b"to nobody")
    told = select.poll()
    told.register(second, 0)
    return ended, "told" if told.poll(1000 * AT_ONCE) else "not told"


@gives("told")
def the_pod_dies_while_the_laptop_does_not_read(way: Way) -> object:
    with way.pair() as (near, far):
        far.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                far.send(bytes(1 << 16))
        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_AT_CLOSE)
        far.close()
        told = select.poll()
        told.register(near, 0)
        return "told" if told.poll(1000 * AT_ONCE) else "not told"


@gives("ETIMEDOUT", socket="ECONNRESET", waits=True)
def keepalive_finds_a_dead_pod(way: Way) -> object:
    with way.pair() as (near, far):
        near.settimeout(2 * LONG)
        near.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in ((socket.TCP_KEEPIDLE, 1), (socket.TCP_KEEPINTVL, 1), (socket.TCP_KEEPCNT, 3)):
            near.setsockopt(socket.IPPROTO_TCP, option, value)
        port = str(far.getsockname()[1])
        way.laptop.lab.run("cluster", ["nft", "add", "element", "inet", "exits", "dead", f"{{ {port} }}"])
        return outcome(near.recv, 1)


# -- bytes -------------------------------------------------------------------------------------------------------------


@gives("the same bytes")
def large_writes_both_ways_at_once(way: Way) -> object:
    with way.pair() as (near, far), ThreadPoolExecutor(4) as pool:
        sent = [hashlib.shake_256(name).digest(16 << 20) for name in (b"up", b"down")]

        def send(end: socket.socket, data: bytes) -> None:
            end.sendall(data)
            end.shutdown(socket.SHUT_WR)

        ends = (near, sent[0]), (far, sent[1])
        sending = [pool.submit(send, *end) for end in ends]
        received = [pool.submit(lambda end: b"".join(iter(lambda: end.recv(1 << 20), b"")), end) for end in (far, near)]
        for one in sending:
            one.result()
        return "the same bytes" if [one.result() for one in received] == sent else "others"


@gives("the same bytes")
def many_small_writes(way: Way) -> object:
    with way.pair() as (near, far), ThreadPoolExecutor(1) as pool:
        near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        received = pool.submit(lambda: b"".join(iter(lambda: far.recv(1 << 16), b"")))
        sent = b""
        for number in range(3000):
            piece = bytes([number & 0xFF]) * (1 + number % 50)
            near.sendall(piece)
            sent += piece
        near.shutdown(socket.SHUT_WR)
        return "the same bytes" if received.result() == sent else "others"


@gives(("blocked", "all of it"))
def a_pod_that_never_reads(way: Way) -> object:
    """Until it does: the sender waits, and what was taken is not lost."""
    with way.pair() as (near, far):
        return never_read(near, far)


@gives(("blocked", "all of it"))
def a_laptop_that_never_reads(way: Way) -> object:
    with way.pair() as (near, far):
        return never_read(far, near)


def never_read(sender: socket.socket, reader: socket.socket) -> object:
    sender.settimeout(0.3)
    sent = 0
    with contextlib.suppress(TimeoutError):
        while sent < 64 << 20:
            sent += sender.send(bytes(1 << 16))
    blocked = "blocked" if sent < 64 << 20 else "never"
    sender.shutdown(socket.SHUT_WR)
    total = 0
    while data := reader.recv(1 << 20):
        total += len(data)
    return blocked, "all of it" if total == sent else total - sent


@gives((b"ab", b"!"), socket=(b"ab!", "EINVAL"))
def urgent_data(way: Way) -> object:
    with way.pair() as (near, far):
        near.send(b"ab")
        near.send(b"!", socket.MSG_OOB)
        near.shutdown(socket.SHUT_WR)
        ended = select.poll()
        ended.register(far, select.POLLRDHUP)
        eventually(lambda: bool(ended.poll(0)), LONG)
        urgent = outcome(far.recv, 1, socket.MSG_OOB)
        return b"".join(iter(lambda: far.recv(100), b"")), urgent


@gives("the same bytes")
def a_narrower_link_on_the_way(way: Way) -> object:
    """Both ends send segments that do not fit there, and the router says so."""
    with way.pair(way.beyond) as (near, far), ThreadPoolExecutor(1) as pool:
        sent = hashlib.shake_256(b"narrow").digest(1 << 20)
        sending = pool.submit(near.sendall, sent)
        received = b""
        while len(received) < len(sent):
            received += far.recv(1 << 20)
        sending.result()
        return "the same bytes" if received == sent else "others"


# -- datagrams ---------------------------------------------------------------------------------------------------------

IP_MTU_DISCOVER = {V4: (socket.IPPROTO_IP, 10), V6: (socket.IPPROTO_IPV6, 23)}
IP_RECVERR = {V4: (socket.IPPROTO_IP, 11), V6: (socket.IPPROTO_IPV6, 25)}
IP_MTU = {V4: (socket.IPPROTO_IP, 14), V6: (socket.IPPROTO_IPV6, 24)}
DO = 2
MORE_THAN_FITS = 2000
SERVICE = 7
HEADERS = {V4: 28, V6: 48}


@gives("the same bytes")
def datagrams_of_every_size(way: Way) -> object:
    with way.open(socket.SOCK_DGRAM, LONG) as near:
        near.connect((way.pod, SERVICE))
        fits = 1500 - HEADERS[way.family]
        for size in (1, 2, fits - 1, fits, fits + 1, 2 * fits, 9000, 65_507):
            sent = hashlib.shake_256(bytes(size)).digest(size)
            near.send(sent)
            if near.recv(1 << 16) != sent:
                return size
    return "the same bytes"


def errors(way: Way, address: str, port: int, size: int = 1, patience: float = AT_ONCE, **options: bool) -> object:
    """What a program is told that asks for every error of a datagram (IP_RECVERR): errno, type, code, by whom, MTU."""
    with way.open(socket.SOCK_DGRAM, patience) as near:
        near.setsockopt(*IP_RECVERR[way.family], 1)
        if options.get("whole"):
            near.setsockopt(*IP_MTU_DISCOVER[way.family], DO)
        near.connect((address, port))
        sent = outcome(near.send, bytes(size))
        if sent != size:
            return sent
        told = select.poll()
        told.register(near, 0)
        if not told.poll(1000 * patience):
            return "nothing"
        _, ancillary, *_ = near.recvmsg(1, 512, socket.MSG_ERRQUEUE)
        number, _, kind, code, _, mtu, _ = struct.unpack_from("=IBBBBII", ancillary[0][2])
        at = 20 if way.family == V4 else 24
        offender = ancillary[0][2][at : at + (4 if way.family == V4 else 16)]
        return errno.errorcode[number], kind, code, way.name(socket.inet_ntop(way.family, offender)), mtu


@gives(("ECONNREFUSED", 3, 3, "pod", 0), ("ECONNREFUSED", 1, 4, "pod", 0))
def a_datagram_to_a_closed_port(way: Way) -> object:
    return errors(way, way.pod, CLOSED)


@gives("ECONNREFUSED")
def a_datagram_to_a_closed_port_for_an_ordinary_program(way: Way) -> object:
    with way.open(socket.SOCK_DGRAM) as near:
        near.connect((way.pod, CLOSED))
        near.send(b"x")
        return outcome(near.recv, 1)


@gives("nothing", waits=True)
def a_datagram_to_a_dropped_port(way: Way) -> object:
    return errors(way, way.pod, DROPPED)


@gives(("EHOSTUNREACH", 3, 13, "pod", 0), ("EACCES", 1, 1, "pod", 0))
def a_datagram_to_a_prohibited_port(way: Way) -> object:
    return errors(way, way.pod, PROHIBITED)


@gives(("EHOSTUNREACH", 3, 1, "node", 0), ("EHOSTUNREACH", 1, 3, "node", 0), waits=True)
def a_datagram_to_a_host_that_is_not_there(way: Way) -> object:
    return errors(way, way.dead, 80, patience=LONG)


@gives(
    [
        ("ENETUNREACH", 3, 0, "node", 0),
        ("EHOSTUNREACH", 3, 1, "node", 0),
        ("EHOSTUNREACH", 3, 13, "node", 0),
        "nothing",
    ],
    [("ENETUNREACH", 1, 0, "node", 0), ("ENETUNREACH", 1, 0, "node", 0), ("EACCES", 1, 1, "node", 0), "nothing"],
)
def datagrams_to_routes_that_refuse(way: Way) -> object:
    return [errors(way, way.nowhere.format(number + 1), 80) for number in range(len(KINDS))]


@gives("EMSGSIZE")
def a_datagram_that_is_larger_than_the_mtu(way: Way) -> object:
    return errors(way, way.pod, SERVICE, MORE_THAN_FITS, whole=True)


@gives(("EMSGSIZE", 3, 4, "pod", NARROW), ("EMSGSIZE", 2, 0, "pod", NARROW))
def a_datagram_that_is_larger_than_the_paths_mtu(way: Way) -> object:
    with way.listener(way.distants[1], socket.SOCK_DGRAM) as far:
        return errors(way, way.distants[1], far.getsockname()[1], 1450 - HEADERS[way.family], whole=True)


# -- ping and traceroute -----------------------------------------------------------------------------------------------


def ping(way: Way, address: str, *options: str, size: int = 56) -> object:
    said = way.laptop.run("ping", "-n", "-c", "1", "-W", "4", "-s", str(size), *options, address)
    text = said.stdout + said.stderr
    error = re.search(r"^From (\S+?):? icmp_seq=\d+ (.*)$|^ping: (?:sendmsg|local error): (.*)$", text, re.MULTILINE)
    if error:
        return error[3] or f"{way.name(error[1])}: {error[2]}"
    answer = re.search(r"(\d+) bytes from (\S+): icmp_seq=1 ttl=(\d+)", text)
    return f"{way.name(answer[2])}: {answer[1]} bytes" if answer else "nothing"


@gives([f"pod: {size + 8} bytes" for size in (0, 56, 1472, 1473, 9000, 65_507)])
def pings_of_every_size(way: Way) -> object:
    return [ping(way, way.pod, size=size) for size in (0, 56, 1472, 1473, 9000, 65_507)]


@gives("message too long, mtu=1500", "message too long, mtu: 1500", waits=True)
def a_ping_that_may_not_be_fragmented(way: Way) -> object:
    return ping(way, way.pod, "-M", "do", size=1473)


@gives(f"pod: Frag needed and DF set (mtu = {NARROW})", f"pod: Packet too big: mtu={NARROW}")
def a_ping_that_may_not_be_fragmented_on_the_way(way: Way) -> object:
    return ping(way, way.distants[2], "-M", "do", size=1450 - HEADERS[way.family])


@gives("node: Destination Host Unreachable", "node: Destination unreachable: Address unreachable", waits=True)
def a_ping_to_a_host_that_is_not_there(way: Way) -> object:
    return ping(way, way.dead)


@gives("node: Time to live exceeded", "node: Time exceeded: Hop limit")
def a_ping_for_one_hop(way: Way) -> object:
    return ping(way, way.pod, "-t", "1")


def traceroute(way: Way, address: str, *options: str) -> object:
    traced = way.laptop.run("traceroute", "-n", "-q", "1", "-w", "2", "-N", "1", "-m", "5", *options, address).stdout
    hops = re.findall(r"^ *\d+  (\S+)(?:  \S+ ms)?(?: (!\S*))?", traced, re.MULTILINE)
    return [way.name(hop) + mark for hop, mark in hops]


@gives(["node", "pod", "beyond"])
def traceroute_by_datagrams(way: Way) -> object:
    return traceroute(way, way.beyond)


@gives(["node", "pod", "beyond"])
def traceroute_by_ping(way: Way) -> object:
    return traceroute(way, way.beyond, "--icmp")


@gives(["node", "pod", "beyond"])
def traceroute_by_tcp(way: Way) -> object:
    return traceroute(way, way.beyond, "--tcp", "--port=80")


# -- the header --------------------------------------------------------------------------------------------------------


HEADER_OPTIONS = {  # IP_RECVTTL, IP_RECVTOS, IP_TOS; IPV6_RECVHOPLIMIT, IPV6_RECVTCLASS, IPV6_TCLASS
    V4: (socket.IPPROTO_IP, 12, 13, socket.IP_TOS),
    V6: (socket.IPPROTO_IPV6, 51, 66, 67),
}


@gives({"hop limit": 63, "traffic class": 0xB9})
def header_fields_of_a_datagram(way: Way) -> object:
    """What the laptop's socket chose is what arrives, one hop later."""
    with way.listener(way.pod, socket.SOCK_DGRAM) as far, way.open(socket.SOCK_DGRAM) as near:
        return header(way.family, near, far, far.getsockname())


@gives({"hop limit": 63, "traffic class": 0xB9}, socket={"hop limit": 64, "traffic class": 0})
def header_fields_of_an_answer(way: Way) -> object:
    with way.listener(way.pod, socket.SOCK_DGRAM) as far, way.open(socket.SOCK_DGRAM) as near:
        near.sendto(b"x", far.getsockname())
        return header(way.family, far, near, far.recvfrom(1)[1])


def header(family: int, sender: socket.socket, receiver: socket.socket, address: object) -> object:
    level, with_limit, with_class, traffic_class = HEADER_OPTIONS[family]
    receiver.setsockopt(level, with_limit, 1)
    receiver.setsockopt(level, with_class, 1)
    sender.setsockopt(level, traffic_class, 0xB9)  # expedited forwarding, ECT(1)
    sender.sendto(b"x", address)  # type: ignore[arg-type]
    _, ancillary, *_ = receiver.recvmsg(10, 512)
    names = {socket.IP_TTL: "hop limit", 52: "hop limit", socket.IP_TOS: "traffic class", 67: "traffic class"}
    return {names[kind]: int.from_bytes(data, "little") for _, kind, data in ancillary}


@gives("kept", socket="another")
def the_source_port(way: Way) -> object:
    with way.pair() as (near, far):
        return "kept" if near.getsockname()[1] == far.getpeername()[1] else "another"
