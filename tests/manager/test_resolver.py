"""DNS frames at a real manager, whose pod's resolver is the lab's, or one of the tests' own that is ill."""

import contextlib
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peers import NODE, Client, Manager, eventually, lab, running_manager
from pod import inside
from tpvpn.lab import Lab
from tpvpn.lab.names import CROWD, POD
from tpvpn.wire import dns, frame
from tpvpn.wire.dns import Rcode

__all__ = ["lab"]
CLUSTER, CLUSTER6 = "10.130.0.10", "fd10:130::10"
ILL, OTHER = "127.0.0.53", "127.0.0.54"
"""Where a test's own resolver listens, in the manager's network namespace."""
A, SRV, TXT, MX = 1, 33, 16, 15
OPT_1232 = b"\0\0\x29\x04\xd0\0\0\x80\0\0\0"
"""EDNS: 1,232 bytes are welcome, and DNSSEC's records (RFC 6891)."""
Answering = Callable[[socket.socket, bytes, tuple[str, int]], None]


@pytest.fixture(scope="module", params=["kernel", "socket"])
def manager(request: pytest.FixtureRequest, lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Manager]:
    """With the kernel exit the zipapp without uvloop, with the socket exit a restricted process with it."""
    if request.param == "kernel":
        with running_manager(lab, tmp_path_factory.mktemp("resolver")) as manager:
            yield manager
    else:
        token = lab.token_file.read_text().partition(": ")[2].strip().encode()
        process = lab.start_manager(exit="socket", listen=f"{NODE}:7071", name="socket-manager")
        yield Manager(lab, process, lab.log("socket-manager"), (NODE, 7071), token)
        assert "Traceback" not in lab.log("socket-manager").read_text()


class Asker:
    """A client that asks for names."""

    def __init__(self, client: Client) -> None:
        self.client = client

    def send(self, identity: int, message: bytes) -> None:
        self.client.send(frame.DNS, identity.to_bytes(2) + message)

    def answer(self, patience: float = 5) -> tuple[int, bytes]:
        kind = frame.PACKET  # the kernel exit's device says hello to its neighbours
        while kind == frame.PACKET:
            kind, payload = self.client.receive(patience)
        assert kind == frame.DNS
        return int.from_bytes(payload[:2]), payload[2:]

    def ask(self, message: bytes) -> bytes:
        identity = random.randrange(1 << 16)
        self.send(identity, message)
        answered, answer = self.answer()
        assert answered == identity
        assert answer[:2] == message[:2]
        return answer

    def timed(self, message: bytes) -> tuple[Rcode, float]:
        began = time.monotonic()
        answer = self.ask(message)
        assert dns.question(answer).labels == dns.question(message).labels
        return rcode(answer), time.monotonic() - began


@contextlib.contextmanager
def asking(manager: Manager, text: str = POD) -> Iterator[Asker]:
    """A session at a manager whose pod has this resolv.conf: it is read with the session's first question."""
    file = manager.lab.run_directory / "pod-etc" / "resolv.conf"
    file.write_text(text)
    try:
        with manager.session() as client:
            yield Asker(client)
            assert client.answers()
    finally:
        file.write_text(POD)


@contextlib.contextmanager
def nameserver(lab: Lab, answering: Answering, address: str = ILL) -> Iterator[None]:
    """A resolver of the test's own, which is given the datagrams that come."""
    with inside(lab.namespace("node")):
        server = socket.socket(type=socket.SOCK_DGRAM)
    server.bind((address, 53))
    server.settimeout(0.05)
    ended = threading.Event()

    def serve() -> None:
        while not ended.is_set():
            with contextlib.suppress(TimeoutError):
                answering(server, *server.recvfrom(65535))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        server.close()


@contextlib.contextmanager
def tcp_nameserver(lab: Lab, answering: Callable[[socket.socket], None], address: str = ILL) -> Iterator[None]:
    """One whose datagrams say "too long", and whose every connection has a thread."""
    with inside(lab.namespace("node")):
        server = socket.create_server((address, 53), backlog=128)
    threads: list[threading.Thread] = []

    def serve_one(connected: socket.socket) -> None:
        with connected, contextlib.suppress(OSError):
            connected.settimeout(5)
            answering(connected)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threads.append(threading.Thread(target=serve_one, args=(server.accept()[0],)))
                threads[-1].start()

    accepting = threading.Thread(target=accept)
    accepting.start()
    try:
        with nameserver(lab, truncated, address):
            yield
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        for thread in (accepting, *threads):
            thread.join()


def silent(server: socket.socket, message: bytes, peer: tuple[str, int]) -> None:
    pass


def truncated(server: socket.socket, message: bytes, peer: tuple[str, int]) -> None:
    server.sendto(dns.reply(message, Rcode.NOERROR, dns.TC), peer)


def refused(server: socket.socket, message: bytes, peer: tuple[str, int]) -> None:
    server.sendto(dns.reply(message, Rcode.REFUSED), peer)


def question_over(connected: socket.socket) -> bytes:
    """The question that comes over TCP."""
    length = int.from_bytes(connected.recv(2, socket.MSG_WAITALL))
    message = b""
    while len(message) < length:
        message += connected.recv(length - len(message))
    return message


def query(name: str, kind: int = A, identity: int = 0x1234, klass: int = dns.IN) -> bytes:
    return dns.query(tuple(name.encode().split(b".")), kind, identity, klass)


def with_edns(message: bytes) -> bytes:
    return message[:10] + b"\0\1" + message[12:] + OPT_1232


def rcode(answer: bytes) -> Rcode:
    assert dns.HEADER.unpack_from(answer)[1] & dns.QR
    return Rcode(answer[3] & dns.RCODE)


def direct(lab: Lab, message: bytes) -> bytes:
    """What the cluster's resolver says, over TCP when it is too long for UDP."""
    with inside(lab.namespace("node")):
        over_udp, over_tcp = socket.socket(type=socket.SOCK_DGRAM), socket.socket()
    with over_udp, over_tcp:
        over_udp.settimeout(2)
        over_udp.sendto(message, (CLUSTER, 53))
        answer = over_udp.recv(65535)
        if dns.is_truncated(answer):
            over_tcp.settimeout(2)
            over_tcp.connect((CLUSTER, 53))
            over_tcp.sendall(len(message).to_bytes(2) + message)
            answer = question_over(over_tcp)
    return answer


WEB = "web.default.svc.cluster.local"
LONG = "long.default.svc.cluster.local"
REVERSE6 = ".".join(reversed(f"fd100130{'0' * 20}0080")) + ".ip6.arpa"


@pytest.mark.parametrize("edns", [False, True], ids=["plain", "EDNS"])
@pytest.mark.parametrize(
    ("name", "kind", "expected", "answers"),
    [
        (WEB, A, Rcode.NOERROR, 1),
        (WEB.upper(), A, Rcode.NOERROR, 1),
        (WEB, dns.AAAA, Rcode.NOERROR, 1),
        (WEB, MX, Rcode.NOERROR, 0),
        (WEB, 65280, Rcode.NOERROR, 0),
        (WEB, dns.ANY, Rcode.NOERROR, 2),
        ("db.default.svc.cluster.local", A, Rcode.NOERROR, 3),
        ("_sql._tcp.db.default.svc.cluster.local", SRV, Rcode.NOERROR, 2),
        ("first.default.svc.cluster.local", A, Rcode.NOERROR, 3),
        ("first.default.svc.cluster.local", dns.CNAME, Rcode.NOERROR, 1),
        ("mail.default.svc.cluster.local", MX, Rcode.NOERROR, 1),
        ("dns-version.cluster.local", TXT, Rcode.NOERROR, 1),
        ("80.0.130.10.in-addr.arpa", dns.PTR, Rcode.NOERROR, 1),
        (REVERSE6, dns.PTR, Rcode.NOERROR, 1),
        (LONG, TXT, Rcode.NOERROR, 20),
        ("crowd.default.svc.cluster.local", A, Rcode.NOERROR, CROWD),
        ("nowhere.default.svc.cluster.local", A, Rcode.NXDOMAIN, 0),
        ("81.0.130.10.in-addr.arpa", dns.PTR, Rcode.NXDOMAIN, 0),
        ("nowhere.example", A, Rcode.NXDOMAIN, 0),
    ],
)
def test_an_answer_is_the_resolvers_byte_by_byte(
    manager: Manager, name: str, kind: int, expected: Rcode, answers: int, edns: bool
) -> None:
    message = with_edns(query(name, kind)) if edns else query(name, kind)
    with asking(manager) as asker:
        answer = asker.ask(message)
    assert answer in [direct(manager.lab, message) for _ in range(2)]  # dnsmasq lets SRV records take turns
    assert (rcode(answer), dns.HEADER.unpack_from(answer)[3]) == (expected, answers)
    assert not dns.is_truncated(answer)


def test_a_long_answer_is_whole(manager: Manager) -> None:
    with asking(manager) as asker:
        assert len(asker.ask(query(LONG, TXT))) > 4096


def test_other_names_other_classes_and_a_resolver_by_ipv6(manager: Manager) -> None:
    with asking(manager, f"nameserver {CLUSTER6}\n") as asker:
        answer = asker.ask(query("www.example.com"))
        assert socket.inet_aton("203.0.113.80") in answer
        assert len(asker.ask(query(LONG, TXT))) > 4096
        chaos = query("version.bind", TXT, klass=3)
        assert asker.ask(chaos) == direct(manager.lab, chaos)


def test_questions_under_one_id_have_each_their_answer(manager: Manager) -> None:
    with asking(manager) as asker:
        for number, kind in enumerate((A, dns.AAAA, TXT)):
            asker.send(number, query(WEB, kind, identity=7))
        found = dict(asker.answer() for _ in range(3))
    assert {number: dns.question(answer).type for number, answer in found.items()} == {0: A, 1: dns.AAAA, 2: TXT}
    assert {answer[:2] for answer in found.values()} == {b"\0\7"}


# -- resolvers that are ill --------------------------------------------------------------------------------------------


def test_a_dead_resolver_is_a_failure_within_3_seconds(manager: Manager) -> None:
    before = manager.metrics()["tpvpn_manager_dns_failures_total"]
    with nameserver(manager.lab, silent), asking(manager, f"nameserver {ILL}\n") as asker:
        code, took = asker.timed(with_edns(query(WEB)))
    assert code == Rcode.SERVFAIL
    assert 2.4 < took < 3
    assert manager.metrics()["tpvpn_manager_dns_failures_total"] == before + 1


def test_behind_a_dead_resolver_the_next_one_answers(manager: Manager) -> None:
    with nameserver(manager.lab, silent), asking(manager, f"nameserver {ILL}\nnameserver {CLUSTER}\n") as asker:
        code, took = asker.timed(query(WEB))
    assert code == Rcode.NOERROR
    assert 0.9 < took < 1.5


def test_a_question_is_asked_again_on_a_new_socket_and_an_old_one_is_still_heard(manager: Manager) -> None:
    asked: list[tuple[bytes, tuple[str, int]]] = []

    def late(server: socket.socket, message: bytes, peer: tuple[str, int]) -> None:
        asked.append((message, peer))
        if len(asked) == 2:  # it answers the first, and never the second
            server.sendto(dns.reply(asked[0][0], Rcode.NXDOMAIN), asked[0][1])

    with nameserver(manager.lab, late), asking(manager, f"nameserver {ILL}\n") as asker:
        code, took = asker.timed(query(WEB))
    assert code == Rcode.NXDOMAIN
    assert 0.9 < took < 1.5
    assert asked[0][1] != asked[1][1]


@pytest.mark.parametrize("text", [f"nameserver {ILL}\n", f"nameserver {ILL}\nnameserver {OTHER}\n", "", "nameserver x"])
def test_where_no_resolver_listens_a_failure_comes_at_once(manager: Manager, text: str) -> None:
    with asking(manager, text) as asker:
        for _ in range(3):
            code, took = asker.timed(query(WEB))
            assert code == Rcode.SERVFAIL
            assert took < 0.5


def test_a_refusal_leads_to_the_next_resolver_at_once(manager: Manager) -> None:
    with asking(manager, f"nameserver {ILL}\nnameserver {CLUSTER}\n") as asker:
        for number in range(100):
            asker.send(number, query(WEB))
        answers = dict(asker.answer(0.9) for _ in range(100))
    assert {rcode(answer) for answer in answers.values()} == {Rcode.NOERROR}


def test_a_resolver_without_a_way_to_it_is_passed_over(manager: Manager) -> None:
    text = f"nameserver 255.255.255.255\nnameserver 2001:db8:ffff::1\nnameserver {CLUSTER}\n"
    with asking(manager, text) as asker:
        code, took = asker.timed(query(WEB))
    assert code == Rcode.NOERROR
    assert took < 0.5


def test_a_silent_resolver_is_asked_after_the_others_from_then_on(manager: Manager) -> None:
    with nameserver(manager.lab, silent), asking(manager, f"nameserver {ILL}\nnameserver {CLUSTER}\n") as asker:
        first, *later = [asker.timed(query(WEB)) for _ in range(5)]
    assert first[0] == Rcode.NOERROR and 0.9 < first[1] < 1.5
    assert all(code == Rcode.NOERROR and took < 0.5 for code, took in later)


def altered(message: bytes) -> Iterator[bytes]:
    """Answers to other questions, and what is no answer."""
    good = dns.reply(message, Rcode.NXDOMAIN)
    yield from (b"", b"\0", message[:2], good[:11], good[:-1], random.randbytes(100))
    yield message  # a question
    yield dns.with_identity(good, int.from_bytes(message[:2]) ^ 1)
    for other in ("wiki.default.svc.cluster.local", f"a.{WEB}", "cluster.local"):
        yield dns.reply(query(other, identity=int.from_bytes(message[:2])), Rcode.NXDOMAIN)
    yield dns.reply(query(WEB, TXT, int.from_bytes(message[:2])), Rcode.NXDOMAIN)
    yield dns.reply(query(WEB, A, int.from_bytes(message[:2]), klass=3), Rcode.NXDOMAIN)
    for count in (0, 2, 0xFFFF):
        yield good[:4] + count.to_bytes(2) + good[6:]


def test_spoofed_and_garbled_answers_are_ignored(manager: Manager) -> None:
    with inside(manager.lab.namespace("node")):
        stranger = socket.socket(type=socket.SOCK_DGRAM)
    stranger.bind((OTHER, 53))

    def spoofing(server: socket.socket, message: bytes, peer: tuple[str, int]) -> None:
        stranger.sendto(dns.reply(message, Rcode.NXDOMAIN), peer)
        for one in altered(message):
            server.sendto(one, peer)
        server.sendto(dns.reply(message, Rcode.REFUSED), peer)

    with stranger, nameserver(manager.lab, spoofing), asking(manager, f"nameserver {ILL}\n") as asker:
        for _ in range(5):
            assert asker.timed(query(WEB))[0] == Rcode.REFUSED


def test_a_resolver_that_answers_only_garbage_is_a_failure(manager: Manager) -> None:
    def garbage(server: socket.socket, message: bytes, peer: tuple[str, int]) -> None:
        for one in altered(message):
            server.sendto(one, peer)

    with nameserver(manager.lab, garbage), asking(manager, f"nameserver {ILL}\n") as asker:
        code, took = asker.timed(query(WEB))
    assert code == Rcode.SERVFAIL
    assert took < 3


# -- over TCP ----------------------------------------------------------------------------------------------------------


def test_too_long_and_nobody_listens_for_connections(manager: Manager) -> None:
    with nameserver(manager.lab, truncated), asking(manager, f"nameserver {ILL}\n") as asker:
        code, took = asker.timed(query(WEB))
    assert code == Rcode.SERVFAIL
    assert took < 0.5


def closing(connected: socket.socket) -> None:
    question_over(connected)


def half(connected: socket.socket) -> None:
    answer = dns.reply(question_over(connected), Rcode.NOERROR)
    connected.sendall(len(answer).to_bytes(2) + answer[:-1])


def another(connected: socket.socket) -> None:
    answer = dns.with_identity(dns.reply(message := question_over(connected), Rcode.NOERROR), message[1] ^ 1)
    connected.sendall(len(answer).to_bytes(2) + answer)


def empty(connected: socket.socket) -> None:
    question_over(connected)
    connected.sendall(b"\0\0")


@pytest.mark.parametrize("answering", [closing, half, another, empty])
def test_a_bad_answer_over_tcp_is_a_failure_at_once(manager: Manager, answering: Callable[..., None]) -> None:
    with tcp_nameserver(manager.lab, answering), asking(manager, f"nameserver {ILL}\n") as asker:
        code, took = asker.timed(query(WEB))
    assert code == Rcode.SERVFAIL
    assert took < 0.5


def test_a_connection_that_hangs_is_a_failure_within_3_seconds(manager: Manager) -> None:
    def hanging(connected: socket.socket) -> None:
        while connected.recv(4096):
            pass

    with tcp_nameserver(manager.lab, hanging), asking(manager, f"nameserver {ILL}\n") as asker:
        for number in range(40):  # more than may have a connection
            asker.send(number, query(WEB))
        began = time.monotonic()
        answers = dict(asker.answer() for _ in range(40))
    assert {rcode(answer) for answer in answers.values()} == {Rcode.SERVFAIL}
    assert time.monotonic() - began < 3


def test_a_session_has_so_many_connections_and_no_more(manager: Manager) -> None:
    lock, counts = threading.Lock(), [0, 0]

    def counting(connected: socket.socket) -> None:
        message = question_over(connected)
        with lock:
            counts[0] += 1
            counts[1] = max(counts)
        time.sleep(0.05)
        answer = dns.reply(message, Rcode.NOERROR) + bytes(65_000)
        with lock:
            counts[0] -= 1
        connected.sendall(len(answer).to_bytes(2) + answer)

    with tcp_nameserver(manager.lab, counting), asking(manager, f"nameserver {ILL}\n") as asker:
        for number in range(100):
            asker.send(number, query(WEB))
        answers = dict(asker.answer() for _ in range(100))
    assert {len(answer) for answer in answers.values()} == {len(query(WEB)) + 65_000}
    assert counts[1] == 16


def test_a_long_question_goes_over_tcp(manager: Manager) -> None:
    padding = b"\0\x0c" + (2044).to_bytes(2) + bytes(2044)  # RFC 7830
    long = query(WEB)[:10] + b"\0\1" + query(WEB)[12:] + b"\0\0\x29\x10\0" + bytes(4) + b"\x08\0" + padding
    seen: list[bytes] = []

    def answering(connected: socket.socket) -> None:
        seen.append(question_over(connected))
        answer = dns.reply(seen[0], Rcode.NXDOMAIN)
        connected.sendall(len(answer).to_bytes(2) + answer)

    with tcp_nameserver(manager.lab, answering), asking(manager, f"nameserver {ILL}\n") as asker:
        assert rcode(asker.ask(long)) == Rcode.NXDOMAIN
    assert seen[0][2:] == long[2:]


# -- what clients may do -----------------------------------------------------------------------------------------------


def test_a_flood_is_answered_to_the_last_question(manager: Manager) -> None:
    before = manager.metrics()
    with nameserver(manager.lab, silent), asking(manager, f"nameserver {ILL}\n") as asker:
        frames = (frame.encode(frame.DNS, one.to_bytes(2) + query(WEB)) for one in range(5000))
        asker.client.socket.sendall(b"".join(frames))
        began = time.monotonic()
        answers = dict(asker.answer() for _ in range(5000))
        assert time.monotonic() - began < 4
    assert len(answers) == 5000
    assert {rcode(answer) for answer in answers.values()} == {Rcode.SERVFAIL}
    after = manager.metrics()
    assert after["tpvpn_manager_dns_questions_total"] - before["tpvpn_manager_dns_questions_total"] == 5000
    assert after["tpvpn_manager_dns_failures_total"] - before["tpvpn_manager_dns_failures_total"] == 5000
    took = "tpvpn_manager_dns_duration_seconds"
    assert after[f"{took}_count"] - before[f"{took}_count"] == 1000  # the others were not asked
    assert 2400 < after[f"{took}_sum"] - before[f"{took}_sum"] < 4000


def test_a_flood_at_the_clusters_resolver(manager: Manager) -> None:
    with asking(manager) as asker:
        frames = (frame.encode(frame.DNS, one.to_bytes(2) + query(WEB)) for one in range(5000))
        asker.client.socket.sendall(b"".join(frames))
        answers = dict(asker.answer() for _ in range(5000))
    found = [rcode(answer) for answer in answers.values()]
    assert set(found) <= {Rcode.NOERROR, Rcode.SERVFAIL}
    assert found.count(Rcode.NOERROR) >= 1000


def test_a_client_that_takes_nothing_loses_answers_and_not_its_link(manager: Manager) -> None:
    def large(server: socket.socket, message: bytes, peer: tuple[str, int]) -> None:
        server.sendto(dns.reply(message, Rcode.NOERROR) + bytes(60_000), peer)

    before = manager.metrics()
    with nameserver(manager.lab, large), asking(manager, f"nameserver {ILL}\n") as asker:
        for number in range(2000):
            asker.send(number, query(WEB))
            if number % 100 == 99:  # the manager has read them, and its resolver has answered
                eventually(
                    lambda: settled(manager, before, number + 1),  # noqa: B023
                    5,
                    "the questions are taken",
                )
        eventually(lambda: dropped(manager, before) > 0, 5)
        taken, deadline = 0, time.monotonic() + 5
        while taken + dropped(manager, before) < 2000:
            assert time.monotonic() < deadline
            with contextlib.suppress(TimeoutError):
                while asker.answer(0.1):
                    taken += 1
        assert taken > 10


def dropped(manager: Manager, before: dict[str, int]) -> int:
    return manager.metrics()["tpvpn_manager_dns_dropped_total"] - before["tpvpn_manager_dns_dropped_total"]


def settled(manager: Manager, before: dict[str, int], count: int) -> bool:
    return manager.metrics()["tpvpn_manager_dns_questions_total"] - before["tpvpn_manager_dns_questions_total"] == count


NO_QUESTIONS = [
    b"",
    b"\0",
    b"\0\1",
    b"\0\1\2",
    b"\0\1" + query(WEB)[:11],
    b"\0\1" + dns.reply(query(WEB), Rcode.NOERROR),
]
HEAD = struct.pack(">6H", 7, dns.RD, 1, 0, 0, 0)


@pytest.mark.parametrize(
    "message",
    [
        HEAD,
        HEAD + b"\x3fshort",
        HEAD + b"\3web\0\0\1",
        HEAD + b"\xc0\x0c\0\1\0\1",  # a pointer to itself
        HEAD + b"\x40" + bytes(70),
        HEAD + b"\x01a" * 130 + b"\0\0\1\0\1",
        query(WEB)[:4] + b"\0\0" + query(WEB)[6:],
        query(WEB)[:4] + b"\0\2" + query(WEB)[6:],
        query(WEB)[:4] + b"\xff\xff" + query(WEB)[6:],
        query(WEB)[:10] + b"\0\1" + query(WEB)[12:],  # an additional record that is not there
        with_edns(query(WEB))[:-1],
        query(WEB) + bytes(4096),
        query(WEB) + bytes(frame.MAX_PAYLOAD - 1000),
    ],
)
def test_a_malformed_question_is_called_so(manager: Manager, message: bytes) -> None:
    with asking(manager) as asker:
        answer = asker.ask(message)
        assert rcode(answer) == Rcode.FORMERR
        assert len(answer) <= len(message) + 11
        assert rcode(asker.ask(query(WEB))) == Rcode.NOERROR


def test_what_is_no_question_is_dropped(manager: Manager) -> None:
    before = manager.metrics()["tpvpn_manager_dns_dropped_total"]
    with asking(manager) as asker:
        for payload in NO_QUESTIONS:
            asker.client.send(frame.DNS, payload)
        assert rcode(asker.ask(query(WEB))) == Rcode.NOERROR
    assert manager.metrics()["tpvpn_manager_dns_dropped_total"] - before == len(NO_QUESTIONS)


def test_what_is_no_query_is_not_implemented(manager: Manager) -> None:
    with asking(manager) as asker:
        for opcode in range(1, 16):
            answer = asker.ask(query(WEB)[:2] + bytes([opcode << 3]) + query(WEB)[3:])
            assert rcode(answer) == Rcode.NOTIMP
            assert answer[2] >> 3 & 15 == opcode


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_bytes_are_survived(manager: Manager, data: st.DataObject) -> None:
    """The question behind them is answered, and nothing but answers comes."""
    message = bytearray(data.draw(st.sampled_from([query(WEB), with_edns(query(LONG, TXT)), b""])))
    for at, byte in data.draw(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 255)), max_size=8)):
        if at < len(message):
            message[at] = byte
    message += data.draw(st.binary(max_size=40))
    with manager.session() as client:
        asker = Asker(client)
        asker.send(1, bytes(message))
        client.send(frame.DNS, bytes(message))
        asker.send(0xFFFF, query("marker.cluster.local"))
        identities = list[int]()
        while 0xFFFF not in identities:
            identity, answer = asker.answer()
            identities.append(identity)
            assert dns.HEADER.unpack_from(answer)[1] & dns.QR


# -- the pod -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replaced", [False, True], ids=["written in place", "replaced"])
def test_another_resolv_conf_is_in_force_soon(manager: Manager, replaced: bool) -> None:
    file = manager.lab.run_directory / "pod-etc" / "resolv.conf"
    with nameserver(manager.lab, refused), asking(manager) as asker:
        assert rcode(asker.ask(query(WEB))) == Rcode.NOERROR
        written = file.with_name("resolv.conf.new") if replaced else file
        written.write_text(f"nameserver {ILL}\n")
        written.rename(file)
        eventually(lambda: rcode(asker.ask(query(WEB))) == Rcode.REFUSED, 2)
        file.unlink()
        began = time.monotonic()
        while time.monotonic() < began + 1.2:  # looked at again, it is not there: what was read stays in force
            assert rcode(asker.ask(query(WEB))) == Rcode.REFUSED


def test_a_session_leaves_no_descriptor(manager: Manager) -> None:
    with manager.session():
        before = manager.descriptors() - 1  # of the session that is there
    eventually(lambda: manager.descriptors() <= before, 3)
    before = manager.descriptors()
    with tcp_nameserver(manager.lab, silent_connection), nameserver(manager.lab, silent, OTHER):
        with asking(manager, f"nameserver {ILL}\nnameserver {OTHER}\n") as asker:
            for number in range(200):
                asker.send(number, query(WEB))
            asker.send(200, query("one.more.example"))
            assert asker.answer()[0] <= 200  # a second has passed: all were sent again, on other sockets
            assert manager.descriptors() > before
            for _ in range(200):
                asker.answer()
            for number in range(50):
                asker.send(number, query(WEB))
        eventually(lambda: manager.descriptors() <= before, 3, "all is closed with the session")


def silent_connection(connected: socket.socket) -> None:
    while connected.recv(4096):
        pass


def test_the_destination_policy_is_not_for_the_pods_resolver(lab: Lab, tmp_path: Path) -> None:
    with running_manager(lab, tmp_path, "--destination", "10.132.0.0/16") as manager, asking(manager) as asker:
        assert rcode(asker.ask(query(WEB))) == Rcode.NOERROR


def test_a_goodbye_ends_what_is_asked(lab: Lab, tmp_path: Path) -> None:
    with running_manager(lab, tmp_path) as manager, nameserver(lab, silent), manager.session() as client:
        (lab.run_directory / "pod-etc" / "resolv.conf").write_text(f"nameserver {ILL}\n")
        for number in range(10):
            Asker(client).send(number, query(WEB))
        assert client.answers()
        (lab.run_directory / "pod-etc" / "resolv.conf").write_text(POD)
        manager.process.terminate()
        assert client.hear()["type"] == "goodbye"
        with pytest.raises(EOFError):
            client.receive()
