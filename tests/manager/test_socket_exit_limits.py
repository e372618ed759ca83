"""What the socket exit does at its limits: memory, descriptors, time; and what hostile or hasty clients bring it to."""

import contextlib
import gc
import os
import random
import select
import socket
import statistics
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from scapy.layers.inet import ICMP, TCP, UDP
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6EchoRequest
from scapy.packet import Packet, Raw
from socket_exits import UNPRIVILEGED, ExitWithin, Manager, Stream, exit_within, manager_in, place

from peers import eventually
from pod import CLUSTER4, CLUSTER6, POD4, POD6, SERVICE4, inside, readable, run, sysctl, udp_server
from tpvpn.manager.outbox import SLOT
from tpvpn.manager.socket_flow import Flow
from tpvpn.proto.tcp import Connection, Limits
from tpvpn.wire import frame, ip, tcp

__all__ = ["place"]


@pytest.fixture
def server(place) -> Iterator[socket.socket]:
    """The cluster's port 8080, whose connections have little room for what is not read."""
    with inside(place[1]):
        listening = socket.create_server((CLUSTER4, 8080))
    with listening:
        listening.settimeout(3)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        yield listening


@pytest.fixture
def exit(place) -> Iterator[ExitWithin]:
    with exit_within(place[0]) as exit:
        yield exit


def opened(exit: ExitWithin, port: int, server: socket.socket, *, seq: int = 1000) -> tuple[Stream, socket.socket]:
    """A connection to the cluster's port 8080: the client's end and the server's."""
    stream = Stream(exit.session, CLUSTER4, 8080, port)
    stream.seq = seq
    stream.connect()
    connected, _ = server.accept()
    connected.settimeout(3)
    return stream, connected


def stuff(exit: ExitWithin, stream: Stream) -> None:
    """Send what the server does not read until the exit has to keep some of it."""
    before = exit.carrier.pool.used
    while exit.carrier.pool.used < before + 4000:
        for _ in range(8):
            stream.send("A", bytes(1400))
        stream.latest_window()


def fill(exit: ExitWithin, stream: Stream, connected: socket.socket) -> None:
    """Fill the exit's memory, with what the server does not read and what the client does not acknowledge."""
    stuff(exit, stream)
    connected.sendall(bytes(300_000))
    eventually(lambda: exit.carrier.pool.is_full, 3)


def settle(exit: ExitWithin) -> None:
    """What was sent has been judged."""
    exit.session.packet(exit.session.to(CLUSTER4) / ICMP())
    while ICMP not in (exit.session.next_packet() or b""):
        pass


# -- memory ------------------------------------------------------------------------------------------------------------


def test_acknowledgments_count_while_memory_is_full(place, server: socket.socket) -> None:
    """Those that come with data too, or nothing would ever leave the buffers."""
    with exit_within(place[0], memory=100_000) as exit:
        stream, connected = opened(exit, 5001, server)
        with connected:
            fill(exit, stream, connected)
            got = 0
            while got < 300_000:
                packet = exit.session.next_packet()
                assert packet is not None, f"only {got} bytes came"
                if packet[TCP].seq == stream.ack and isinstance(packet[TCP].payload, Raw):
                    got += len(packet[TCP].payload)
                    stream.ack += len(packet[TCP].payload)
                    stream.seq = packet[TCP].ack  # what of its data was not taken comes again
                    stream.send("PA", b"more")
            eventually(lambda: not exit.carrier.pool.is_full, 3)


def test_a_reset_counts_while_memory_is_full(place, server: socket.socket) -> None:
    with exit_within(place[0], memory=100_000) as exit:
        stream, connected = opened(exit, 5002, server)
        with connected:
            fill(exit, stream, connected)
            stream.send("R", b"with a reason")  # RFC 9293 section 3.5.3 allows it
            eventually(lambda: not exit.carrier.table.flows, 3)
        eventually(lambda: not exit.carrier.table.flows, 3)


def test_what_comes_out_of_order_is_counted_and_refused_when_memory_is_full(place, server: socket.socket) -> None:
    with exit_within(place[0], memory=50_000) as exit:
        stream, connected = opened(exit, 5003, server)
        with connected:
            first, stream.seq = stream.seq, stream.seq + 1
            for _ in range(40):
                stream.send("A", bytes(1400))
            eventually(lambda: exit.carrier.pool.is_full, 3)
            settle(exit)
            used = exit.carrier.pool.used
            stream.send("A", bytes(1400))
            settle(exit)
            assert exit.carrier.pool.used == used
            stream.seq = first
            stream.send("A", b"x")
            got = 0
            while got < 30_000:
                got += len(connected.recv(1 << 16))


def test_connections_that_hold_nothing_count_for_nothing(exit: ExitWithin, server: socket.socket) -> None:
    """One that is being made, and one whose server has finished."""
    exit.session.packet(exit.session.to("10.132.77.77") / TCP(sport=5004, dport=80, flags="S"))
    stream, connected = opened(exit, 5005, server)
    with connected:
        connected.shutdown(socket.SHUT_WR)
        stream.expect(lambda got, _: "F" in got.flags)
        stream.send("PA", b"still here")
        assert connected.recv(100) == b"still here"
        eventually(lambda: not exit.carrier.pool.used, 1)


# -- descriptors -------------------------------------------------------------------------------------------------------


def test_a_manager_of_few_descriptors_keeps_half_of_them_for_links(place, server: socket.socket) -> None:
    few = ("prlimit", "--nofile=80", *UNPRIVILEGED)
    with manager_in(place[0], rights=few) as manager, manager.session() as greedy:
        for port in range(1, 101):
            greedy.packet(greedy.to(CLUSTER4) / UDP(sport=port, dport=9999))
        eventually(lambda: manager.dropped()["flows"] == 68, 3)
        with manager.session() as other:
            Stream(other, CLUSTER4, 8080, 5101).connect()
            assert manager.dropped()["socket"] == 0


def limit(manager: Manager, more: int) -> None:
    """The process may have so many descriptors more than it has."""
    as_its_user = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups")
    run(*as_its_user, "prlimit", f"--pid={manager.process.pid}", f"--nofile={manager.descriptors() + more}:")


def test_without_descriptors_clients_hear_nothing_and_all_goes_on_when_there_are_some(
    place, server: socket.socket
) -> None:
    with manager_in(place[0]) as manager, manager.session() as session:
        stream = Stream(session, CLUSTER4, 8080, 5102)
        stream.connect()
        limit(manager, 0)
        # Also to where nothing was sent yet, of which a socket would have to say whether it is the manager's own.
        for address in (CLUSTER4, CLUSTER6, SERVICE4):
            assert session.silent(session.to(address) / TCP(sport=5103, dport=8080, flags="S"))
            assert session.silent(session.to(address) / UDP(sport=5103, dport=9999))
            ping = ICMPv6EchoRequest(id=3) if ":" in address else ICMP(id=3)
            assert session.silent(session.to(address) / ping)
        assert session.silent(session.to("10.1.2.3", ttl=1) / UDP(sport=5103, dport=33434))
        with dialled(manager) as waiting:
            cpu = manager.cpu()
            waiting.settimeout(1)
            with pytest.raises(TimeoutError):
                waiting.recv(1)
            assert manager.cpu() - cpu < 0.2
            stream.send("PA", b"what is open goes on")
            with server.accept()[0] as connected:
                connected.settimeout(3)
                assert connected.recv(100) == b"what is open goes on"
            stream.expect(lambda got, _: "F" in got.flags)
            stream.send("FA")  # and gives its descriptor back
            assert b"200 OK" in waiting.recv(100)
        assert manager.said.count("cannot accept connections, they wait: Too many open files") == 1
        stream.expect(lambda got, _: got.ack == stream.seq)
        again = Stream(session, CLUSTER4, 8080, 5103)
        again.connect()
        limit(manager, 100)
        assert session.ask(session.to(CLUSTER4) / ICMP(id=3))[ICMP].type == 0
        expired = session.ask(session.to("10.1.2.3", ttl=1) / UDP(sport=5103, dport=33434))
        assert (expired.src, expired[ICMP].type) == (POD4, 11)
        assert manager.dropped()["socket"] == 9


def test_a_session_that_finds_no_descriptors_leaves_nothing(place) -> None:
    """Its link had one, and what watches its connections has none."""
    with manager_in(place[0]) as manager:
        manager.dropped()
        before = manager.descriptors()
        limit(manager, 1)
        with pytest.raises((EOFError, ConnectionError)), manager.session() as session:
            while True:
                session.receive()
        eventually(lambda: manager.descriptors() == before, 3)
        limit(manager, 100)
        with manager.session() as session:
            assert session.ask(session.to(CLUSTER4) / ICMP(id=3))[ICMP].type == 0


@contextlib.contextmanager
def dialled(manager: Manager) -> Iterator[socket.socket]:
    """A connection that asks whether the manager is well."""
    with inside(manager.pod), socket.create_connection(("127.0.0.1", manager.port), timeout=5) as connected:
        connected.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        yield connected


# -- flows that end ----------------------------------------------------------------------------------------------------


def alive() -> int:
    """Flows of which anything is left in this process."""
    gc.collect()
    return sum(isinstance(thing, Flow) for thing in gc.get_objects())


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def congest(place, exit: ExitWithin) -> None:
    """Fill the link: the client reads nothing of what the cluster sends it."""
    with udp_server(place[1], CLUSTER4, 5400) as source:
        exit.session.packet(exit.session.to(CLUSTER4) / UDP(sport=5999, dport=5400) / Raw(b"send"))
        _, client = source.recvfrom(100)

        def sent() -> bool:
            for _ in range(20):
                source.sendto(bytes(9000), client)
            return exit.carrier.congested

        eventually(sent, 3)


def test_flows_that_end_while_the_link_is_congested_are_not_kept(place, exit: ExitWithin) -> None:
    congest(place, exit)
    before = alive()
    for port in range(6000, 6100):
        syn = TCP(sport=port, dport=80, flags="S", seq=7)
        exit.session.packet(exit.session.to("10.132.77.77") / syn)
        exit.session.packet(exit.session.to("10.132.77.77") / TCP(sport=port, dport=80, flags="R", seq=8))
    eventually(lambda: len(exit.carrier.table.flows) == before and alive() == before, 3)
    assert exit.carrier.congested


def test_buffers_of_a_connection_are_gone_with_it(exit: ExitWithin, server: socket.socket) -> None:
    """Also while a timer of it would have run for long."""
    stream, connected = opened(exit, 5201, server)
    with connected:
        connected.sendall(bytes(1 << 20))
        eventually(lambda: exit.carrier.pool.used > 500_000, 3)
        exit.wind(0.5)
        exit.wind(5)  # the retransmission timeout is backed off
        stream.send("R")
        eventually(lambda: not exit.carrier.table.flows, 3)
        assert (exit.carrier.pool.used, alive()) == (0, 0)


def test_reading_goes_on_when_the_last_acknowledgment_came_while_the_link_was_full(
    place, server: socket.socket
) -> None:
    with exit_within(place[0], memory=10_000) as exit:
        stream, connected = opened(exit, 5202, server)
        with connected:
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            connected.setblocking(False)
            sent = connected.send(bytes(1 << 20))
            got = unacknowledged = 0
            while not 10_000 <= exit.carrier.pool.used == unacknowledged:  # it reads no more, and has sent all it read
                stream.send("A")
                unacknowledged = 0
                while (packet := exit.session.next_packet(0.1)) is not None:
                    size = len(packet[TCP].payload) if isinstance(packet[TCP].payload, Raw) else 0
                    stream.ack, got, unacknowledged = stream.ack + size, got + size, unacknowledged + size
            assert got < sent
            congest(place, exit)
            before = exit.carrier.counters.received_packets
            stream.send("A")
            eventually(lambda: exit.carrier.counters.received_packets == before + 1, 3)
            assert exit.carrier.congested
            assert len(stream.expect(lambda _, data: got + len(data) >= sent)) == sent - got


def frames(*packets: Packet) -> bytes:
    """Packets that come together."""
    return b"".join(frame.encode(frame.PACKET, bytes(packet)) for packet in packets)


def test_a_port_is_used_again_at_once_after_a_reset(exit: ExitWithin, server: socket.socket) -> None:
    stream, connected = opened(exit, 5203, server)
    with connected:
        reset = stream.segment("R")
        stream.seq, stream.ack = 70_000, 0
        exit.session.socket.sendall(frames(reset, stream.segment("S")))
        answer = exit.session.next_packet()
        assert answer is not None
        assert (answer[TCP].flags, answer[TCP].ack) == ("SA", 70_001)
        with pytest.raises(ConnectionResetError):
            connected.recv(1)


def test_a_port_is_used_again_while_its_connection_is_in_time_wait(exit: ExitWithin, server: socket.socket) -> None:
    stream, connected = opened(exit, 5204, server)
    with connected:
        connected.shutdown(socket.SHUT_WR)
        stream.expect(lambda got, _: "F" in got.flags)
    stream.send("FA")  # the server's end finished first: here it waits
    stream.expect(lambda got, _: got.ack == stream.seq)
    assert len(exit.carrier.table.flows) == 1
    again, other = opened(exit, 5204, server, seq=90_000)
    with other:
        again.send("PA", b"new")
        assert other.recv(10) == b"new"
        exit.wind(3)
        assert len(exit.carrier.table.flows) == 1


def test_a_syn_that_comes_again_makes_no_second_connection(exit: ExitWithin) -> None:
    before = descriptors()
    for _ in range(3):
        exit.session.packet(exit.session.to("10.132.77.77") / TCP(sport=5205, dport=80, flags="S"))
    settle(exit)
    assert (len(exit.carrier.table.flows), exit.carrier.table.half_open) == (2, 1)
    assert descriptors() == before + 2  # with that of the ping


def test_a_reset_ends_the_connecting(exit: ExitWithin) -> None:
    settle(exit)
    before = descriptors()
    to = exit.session.to("10.132.77.77")
    exit.session.packet(to / TCP(sport=5206, dport=80, flags="S", seq=7))
    eventually(lambda: exit.carrier.table.half_open == 1, 3)
    exit.session.packet(to / TCP(sport=5206, dport=80, flags="RA", seq=9))  # not at what is expected
    settle(exit)
    assert exit.carrier.table.half_open == 1
    exit.session.packet(to / TCP(sport=5206, dport=80, flags="R", seq=8))
    eventually(lambda: exit.carrier.table.half_open == 0, 3)
    assert descriptors() == before


def test_a_server_that_resets_at_once_is_told(exit: ExitWithin, server: socket.socket) -> None:
    def reset() -> None:
        with contextlib.suppress(OSError):
            while True:
                accepted, _ = server.accept()
                accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                accepted.close()

    thread = threading.Thread(target=reset)
    thread.start()
    try:
        for port in range(5300, 5350):
            to = exit.session.to(CLUSTER4)
            exit.session.packet(to / TCP(sport=port, dport=8080, flags="S"))
            flags = ""
            while "R" not in flags:
                answer = exit.session.next_packet()
                assert answer is not None, f"silence after {flags!r}"
                if answer[TCP].dport == port:  # else the reset of an acknowledgment that came too late
                    flags = str(answer[TCP].flags)
                if flags == "SA":
                    exit.session.packet(to / TCP(sport=port, dport=8080, flags="A", seq=1, ack=answer[TCP].seq + 1))
    finally:
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_a_reset_reaches_a_client_that_has_finished_and_says_something_just_then(
    exit: ExitWithin, server: socket.socket
) -> None:
    stream, connected = opened(exit, 5206, server)
    with connected:
        stream.send("FA")
        assert connected.recv(1) == b""
        stream.expect(lambda got, _: got.ack == stream.seq)
        connected.settimeout(0.3)
        with pytest.raises(TimeoutError):
            connected.sendall(bytes(32 << 20))  # so that nobody reads the connection any more
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with exit.busy():
            connected.close()
            stream.send("A")
        stream.expect(lambda got, _: "R" in got.flags)
    eventually(lambda: not exit.carrier.table.flows, 3)


@pytest.mark.parametrize("first", ["client", "server"])
def test_what_was_acknowledged_arrives_though_both_have_finished(
    exit: ExitWithin, server: socket.socket, first: str
) -> None:
    """And the laptop's connection is over: what the server has not read yet is still on its way."""
    stream, connected = opened(exit, 5220, server)
    with connected:
        begin = stream.seq
        if first == "client":
            stuff(exit, stream)
            stream.send("FA")
            stream.expect(lambda got, _: got.ack == stream.seq)
        connected.shutdown(socket.SHUT_WR)
        stream.expect(lambda got, _: "F" in got.flags)
        if first == "server":
            stuff(exit, stream)
            stream.send("FA")
            stream.expect(lambda got, _: got.ack == stream.seq)
        settle(exit)
        exit.wind(3)  # TIME-WAIT is over
        got = 0
        while data := connected.recv(1 << 16):
            got += len(data)
        assert got == stream.seq - 1 - begin
        eventually(lambda: not exit.carrier.pool.used, 3)


def test_a_port_waits_for_what_was_acknowledged_before(exit: ExitWithin, server: socket.socket) -> None:
    """To the laptop its connection is over; to reset what the server has not read would lose it."""
    stream, connected = opened(exit, 5221, server)
    with connected:
        connected.shutdown(socket.SHUT_WR)
        stream.expect(lambda got, _: "F" in got.flags)
        begin = stream.seq
        stuff(exit, stream)
        stream.send("FA")
        stream.expect(lambda got, _: got.ack == stream.seq)
        exit.wind(3)
        to = exit.session.to(CLUSTER4)
        exit.session.packet(to / TCP(sport=5221, dport=8080, flags="S", seq=stream.seq + 9))
        settle(exit)
        got = 0
        while data := connected.recv(1 << 16):
            got += len(data)
        assert got == stream.seq - 1 - begin
    eventually(lambda: not exit.carrier.pool.used, 3)
    _, connected = opened(exit, 5221, server, seq=stream.seq + 9)
    connected.close()


def test_data_with_a_syn_comes_again_and_a_fin_with_one_is_refused(exit: ExitWithin, server: socket.socket) -> None:
    to = exit.session.to(CLUSTER4)
    answer = exit.session.ask(to / TCP(sport=5222, dport=8080, flags="S", seq=7) / Raw(b"early"))
    assert (answer[TCP].flags, answer[TCP].ack) == ("SA", 8)  # RFC 9293 section 3.10.7.2 lets it be dropped
    data = TCP(sport=5222, dport=8080, flags="PA", seq=8, ack=answer[TCP].seq + 1)
    exit.session.packet(to / data / Raw(b"early"))
    with server.accept()[0] as connected:
        connected.settimeout(3)
        assert connected.recv(100) == b"early"
    settle(exit)
    flows = len(exit.carrier.table.flows)
    answer = exit.session.ask(to / TCP(sport=5223, dport=8080, flags="SF", seq=7))
    assert (answer[TCP].flags, len(exit.carrier.table.flows)) == ("RA", flows)


def test_resets_that_cross_leave_nothing(exit: ExitWithin, server: socket.socket) -> None:
    stream, connected = opened(exit, 5224, server)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with exit.busy():
        connected.close()
        stream.send("R")
    eventually(lambda: not exit.carrier.table.flows, 3)


def test_errors_are_told_at_a_rate(exit: ExitWithin) -> None:
    """A hundred at once, then a thousand a second; the rest is counted."""
    expired = bytes(exit.session.to(CLUSTER4, ttl=1) / UDP(sport=1, dport=33434))
    began = time.monotonic()
    exit.session.socket.sendall(frame.encode(frame.PACKET, expired) * 2000)
    eventually(lambda: exit.carrier.counters.received_packets == 2000, 5)
    most, told = 100 + 1000 * (time.monotonic() - began), 0
    while exit.session.next_packet(0.1) is not None:
        told += 1
    assert 100 <= told <= most
    assert exit.carrier.dropped["unanswered"] == 2000 - told


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_left_after_random_use(place, server: socket.socket, seed: int) -> None:
    """Held, half open, flows, descriptors: what `exit_within` looks at in the end."""
    run("ip", "-n", place[0], "route", "replace", "unreachable", "10.141.0.0/16")
    chance = random.Random(seed)
    before = descriptors()
    targets = [(CLUSTER4, 8080)] * 5 + [(CLUSTER4, 8081), ("10.132.77.77", 80), ("10.141.0.1", 80), ("127.0.0.1", 80)]
    kept: list[socket.socket] = []
    with exit_within(place[0], memory=200_000) as exit, contextlib.ExitStack() as stack:
        streams = [Stream(exit.session, *chance.choice(targets), 7000 + number) for number in range(30)]
        for _ in range(1500):
            stream = chance.choice(streams)
            kind = chance.choice(["S", "S", "A", "PA", "PA", "PA", "FA", "R", "RA", "SA", "", "FS"])
            stream.send(kind, chance.randbytes(chance.choice([1, 1000, 1400])) if kind == "PA" else b"")
            if readable([server.fileno()], 0):
                kept.append(stack.enter_context(server.accept()[0]))
                kept[-1].setblocking(False)
            if kept and chance.random() < 0.3:
                connected = chance.choice(kept)
                with contextlib.suppress(OSError):
                    chance.choice([lambda c: c.send(bytes(100_000)), lambda c: c.recv(1000), lambda c: c.close(),
                                   lambda c: c.shutdown(socket.SHUT_WR)])(connected)  # fmt: skip
            while chance.random() < 0.7 and (packet := exit.session.next_packet(0.001)) is not None:
                if TCP in packet and 7000 <= packet[TCP].dport < 7030:
                    answered = streams[packet[TCP].dport - 7000]
                    size = len(packet[TCP].payload) if isinstance(packet[TCP].payload, Raw) else 0
                    answered.ack = packet[TCP].seq + size + ("S" in packet[TCP].flags)
                    answered.seq = packet[TCP].ack or answered.seq
            if chance.random() < 0.05:
                exit.wind(chance.choice([0.01, 0.3, 3]))
        assert exit.carrier.pool.used <= 200_000 + (1 << 19)
    assert (descriptors(), alive()) == (before, 0)


def test_the_outbox_has_room_for_all_that_a_connection_says_at_once() -> None:
    """One large segment, and acknowledgments that tell of as many ranges as they ever do."""
    largest = tcp.LARGEST_PACKET - ip.HEADER_LENGTH6 - tcp.HEADER_LENGTH - tcp.TIMESTAMP_LENGTH
    connection = Connection(Limits(1440, largest))
    syn = tcp.Segment(999, 0, tcp.SYN, 65535, b"", 1)
    syn.mss, syn.window_scale, syn.sack_permitted = 1440, 7, True
    connection.receive_segment(syn, 0)
    connection.accept(0, 4999)
    connection.segments_to_send(0)
    connection.receive_segment(tcp.Segment(1000, 5000, tcp.ACK, 65535, b"", 1), 0)
    for hole in range(24):
        connection.receive_segment(tcp.Segment(1001 + 2 * hole, 5000, tcp.ACK, 65535, b"x", 1), 0)
    connection.write(bytes(1 << 17))
    segments, end, buffer = connection.segments_to_send(0, 1), 0, bytearray(2 * SLOT)
    writer = tcp.Writer(bytes(16), 1, bytes(16), 2, offload=True)
    for segment in segments:
        end = writer.write(buffer, end + frame.HEADER_LENGTH, segment, connection.send_mss)
    assert (len(segments), len(segments[-1].payload)) == (9, largest)
    assert end <= SLOT


def test_a_slow_reader_has_no_more_than_its_window(exit: ExitWithin, server: socket.socket) -> None:
    stream, connected = opened(exit, 5207, server)
    with connected:
        connected.settimeout(0.3)
        with pytest.raises(TimeoutError):
            connected.sendall(bytes(32 << 20))
        assert 1 << 19 < exit.carrier.pool.used <= 1 << 20
        stream.send("R")


def test_a_bulk_flow_leaves_others_their_turn(exit: ExitWithin, server: socket.socket) -> None:
    bulk, connected = opened(exit, 5208, server)
    stopping = threading.Event()

    def send() -> None:
        with contextlib.suppress(OSError):
            while not stopping.is_set():
                connected.sendall(bytes(1 << 16))

    thread = threading.Thread(target=send)
    thread.start()
    try:
        bulk.expect(lambda _, data: len(data) > 1 << 19)
        for port in range(5209, 5219):
            began, other = time.monotonic(), Stream(exit.session, CLUSTER4, 8080, port)
            other.send("S")
            found: list[Packet] = []
            while not found:
                packet = exit.session.next_packet()
                assert packet is not None
                if packet[TCP].dport == port:
                    found.append(packet)
                elif isinstance(packet[TCP].payload, Raw) and packet[TCP].seq == bulk.ack:
                    bulk.ack += len(packet[TCP].payload)
                    bulk.send("A")
            assert (found[0][TCP].flags, time.monotonic() - began < 0.5) == ("SA", True)
    finally:
        stopping.set()
        bulk.send("R")
        thread.join()
        connected.close()


_MUCH = bytes(1 << 18)


class Bulk:
    """Forty connections on which the server sends all it can, to a client that is slower than the exit."""

    def __init__(self, exit: ExitWithin, server: socket.socket) -> None:
        self._exit = exit
        self._streams: dict[int, Stream] = {}
        self._received: Counter[Stream] = Counter()
        self._connected: list[socket.socket] = []
        for port in range(5600, 5640):
            stream = self._streams[port] = Stream(exit.session, CLUSTER4, 8080, port)
            stream.options = [("WScale", 5)]  # so that a window never holds them back
            stream.connect()
            self._connected.append(server.accept()[0])
            self._connected[-1].setblocking(False)

    def send(self, stopping: threading.Event) -> None:
        while not stopping.is_set():
            for connected in select.select([], self._connected, [], 0.1)[1]:
                connected.send(_MUCH)

    def close(self) -> None:
        for stream in self._streams.values():
            stream.send("R")
        for connected in self._connected:
            connected.close()

    def receive_until(self, found: Callable[[ip.Packet], bool]) -> int:
        """Take and acknowledge until something else comes; how many bytes came before."""
        total = 0
        while True:
            packet = ip.parse(memoryview(self._exit.session.receive()[1]))
            if found(packet):
                return total
            stream = self._streams.get(tcp.ports(packet.payload)[1]) if packet.protocol == ip.TCP else None
            if stream is not None:
                segment = tcp.parse(packet)
                total += len(packet.data)
                stream.ack = (segment.seq + len(segment.payload)) & 0xFFFFFFFF
                received = self._received[stream] = self._received[stream] + 1
                if received % 64 == 0:
                    stream.send("A")


def test_bulk_flows_do_not_keep_answers_waiting(place, exit: ExitWithin, server: socket.socket) -> None:
    """While the link is always full: what comes seldom goes first, be it a ping, a datagram or a few bytes."""
    few, other = opened(exit, 5640, server)
    bulk, stopping = Bulk(exit, server), threading.Event()
    thread = threading.Thread(target=bulk.send, args=(stopping,))
    thread.start()
    try:
        with udp_server(place[1], CLUSTER4, 5400) as echo, other:
            exit.session.packet(exit.session.to(CLUSTER4) / UDP(sport=5998, dport=5400) / Raw(b"x"))
            _, client = echo.recvfrom(100)
            waited: dict[str, list[int]] = {"ping": [], "datagram": [], "answer": []}
            for _ in range(8):
                exit.session.packet(exit.session.to(CLUSTER4) / ICMP(id=3))
                waited["ping"].append(bulk.receive_until(lambda packet: packet.protocol == ip.ICMP4))
                echo.sendto(b"x", client)
                waited["datagram"].append(bulk.receive_until(lambda packet: packet.protocol == ip.UDP))
                other.send(b"x")
                waited["answer"].append(bulk.receive_until(lambda packet: tcp.ports(packet.payload)[1] == 5640))
                few.ack += 1
                few.send("A")
        # What the link and the buffer before it hold; in turn with all others it would be four times as much.
        assert all(statistics.median(bytes_before) < 1_500_000 for bytes_before in waited.values())
    finally:
        stopping.set()
        thread.join()
        bulk.close()


def test_small_answers_do_not_wait_behind_bulk_flows_on_a_full_link(exit: ExitWithin, server: socket.socket) -> None:
    """What a ping and an open connection hear is among the first that a link brings which has been full."""
    flows, window = 64, 65_535
    with contextlib.ExitStack() as stack:
        streams = [opened(exit, port, server) for port in range(5300, 5301 + flows)]
        for stream, connected in streams:
            stack.enter_context(connected)
            stack.callback(stream.send, "R")
        (_, served), *bulk = streams
        with exit.busy():
            for _, connected in bulk:
                connected.sendall(bytes(window))
        eventually(lambda: exit.carrier.congested, 3)
        idle = len(exit.carrier.table.flows)
        exit.session.packet(exit.session.to(CLUSTER4) / ICMP(id=9))
        served.sendall(b"an answer")
        eventually(lambda: len(exit.carrier.table.flows) > idle, 3)
        waiting, before = {"ping", "answer"}, 0
        while waiting:
            eventually(lambda: exit.carrier.congested, 3, f"all bulk data came before {waiting}")
            packet = exit.session.next_packet()
            assert packet is not None, waiting
            before += len(packet)
            if ICMP in packet:
                waiting.discard("ping")
            elif packet[TCP].dport == 5300 and Raw in packet:
                waiting.discard("answer")
        assert before < flows * window / 2


# -- policy ------------------------------------------------------------------------------------------------------------

ANYWHERE = ("--destination", "0.0.0.0/0", "--destination", "::/0")


def test_a_mapped_address_leads_nowhere_even_where_all_is_allowed(place, server: socket.socket) -> None:
    """The policy for IPv4 is another one than that for IPv6."""
    with (
        manager_in(place[0], *ANYWHERE) as manager,
        manager.session() as session,
        udp_server(place[1], CLUSTER4, 5300) as other,
    ):
        to = session.to(f"::ffff:{CLUSTER4}")
        for packet in (TCP(sport=1, dport=8080, flags="S"), UDP(sport=1, dport=5300), ICMPv6EchoRequest(id=3)):
            answer = session.ask(to / packet)
            assert (answer.src, answer[ICMPv6DestUnreach].code) == (POD6, 0)
        assert readable([server.fileno(), other.fileno()], 0) == []


def test_a_lack_of_ports_does_not_lead_to_the_manager_itself(place) -> None:
    """Whether an address is the manager's own is asked by binding to it, for which there may be no port."""
    before = sysctl(place[0], "ipv4/ip_local_port_range")
    sysctl(place[0], "ipv4/ip_local_port_range", "40000 40019")
    try:
        with inside(place[0]):
            own = socket.create_server((POD4, 8090))
        with own, manager_in(place[0], *ANYWHERE) as manager, manager.session() as session:
            for port in range(1, 41):
                session.packet(session.to(CLUSTER4) / UDP(sport=port, dport=9999))
            eventually(lambda: manager.dropped()["socket"] == 20, 3)
            session.packet(session.to(POD4) / TCP(sport=1, dport=8090, flags="S"))
            eventually(lambda: manager.dropped()["manager"] == 1, 3)
            assert readable([own.fileno()], 0) == []
    finally:
        sysctl(place[0], "ipv4/ip_local_port_range", before)


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "::1", "::", "::ffff:127.0.0.1"])
def test_the_manager_names_itself_by_an_address_that_others_know(exit: ExitWithin, address: str) -> None:
    limited = {"hlim": 1} if ":" in address else {"ttl": 1}
    expired = exit.session.ask(exit.session.to(address, **limited) / UDP(sport=1, dport=33434))
    assert expired.src == (POD6 if ":" in address else POD4)


def test_nothing_begins_behind_a_goodbye(place, server: socket.socket) -> None:
    with exit_within(place[0]) as exit:
        exit.stop()
        exit.session.packet(exit.session.to(CLUSTER4) / TCP(sport=5401, dport=8080, flags="S"))
        assert readable([server.fileno()], 0.3) == []


# -- time --------------------------------------------------------------------------------------------------------------


def idle_descriptors(exit: ExitWithin, seconds: float) -> int:
    """Those of this process, after some time in which nothing happens."""
    exit.wind(seconds)
    return descriptors()


@pytest.mark.parametrize(
    ("port", "answered", "seconds"), [(5300, False, 60), (5300, True, 180), (53, False, 10), (53, True, 10)]
)
def test_an_association_ends_when_it_was_idle_for_so_long(
    place, exit: ExitWithin, port: int, answered: bool, seconds: int
) -> None:
    with udp_server(place[1], CLUSTER4, port) as server:
        before = descriptors()
        datagram = exit.session.to(CLUSTER4) / UDP(sport=4000, dport=port) / Raw(b"ping")
        exit.session.packet(datagram)
        _, first = server.recvfrom(100)
        if answered:
            server.sendto(b"pong", first)
            assert exit.session.next_packet() is not None
        assert idle_descriptors(exit, seconds - 2) == before + 1
        exit.session.packet(datagram)  # it begins anew
        assert server.recvfrom(100)[1] == first
        assert idle_descriptors(exit, seconds - 2) == before + 1
        if answered:
            server.sendto(b"pong", first)
            assert exit.session.next_packet() is not None
            assert idle_descriptors(exit, seconds - 2) == before + 1
        assert idle_descriptors(exit, 3) == before
        assert not exit.carrier.table.flows
        exit.session.packet(datagram)
        assert server.recvfrom(100)[0] == b"ping"


def test_a_connection_that_was_idle_for_an_hour_goes_on(exit: ExitWithin, server: socket.socket) -> None:
    stream, connected = opened(exit, 5501, server)
    with connected:
        stream.send("PA", b"before")
        assert connected.recv(100) == b"before"
        connected.sendall(b"answer")
        assert stream.expect(lambda _, data: len(data) == 6) == b"answer"
        exit.wind(3600)
        assert exit.session.next_packet(0.1) is None
        connected.sendall(b"after an hour")
        assert stream.expect(lambda _, data: len(data) == 13) == b"after an hour"
        stream.send("PA", b"still")
        assert connected.recv(100) == b"still"
        exit.wind(3600)
        stream.send("PA", b"the client first")
        assert connected.recv(100) == b"the client first"
        stream.send("FA")
        assert connected.recv(100) == b""
        connected.shutdown(socket.SHUT_WR)
        stream.expect(lambda got, _: "F" in got.flags)


def test_a_client_that_is_silent_with_data_on_the_way_is_given_up(exit: ExitWithin, server: socket.socket) -> None:
    """After a quarter of an hour, as Linux does by net.ipv4.tcp_retries2."""
    _, connected = opened(exit, 5502, server)
    with connected:
        connected.sendall(b"nobody acknowledges this")
        eventually(lambda: exit.carrier.pool.used > 0, 3)
        for _ in range(14):
            exit.wind(60)
        assert exit.carrier.table.flows
        for _ in range(3):
            exit.wind(60)
        assert not exit.carrier.table.flows
        with pytest.raises(ConnectionResetError):
            connected.recv(1)
