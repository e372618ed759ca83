"""A DNS server that answers every question with one address, and remembers who was asked what."""

import contextlib
import socket
import threading
from collections.abc import Iterator

import dns.flags
import dns.message
import dns.rdatatype
import dns.rrset

from pod import inside


class NamesServer:
    """Its `asked` are the names of all questions so far, in small letters."""

    def __init__(self, sock: socket.socket, answer: str) -> None:
        self.asked: list[str] = []
        self._socket, self._answer = sock, answer

    def serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                data, asker = self._socket.recvfrom(4096)
                if not data:  # shut down
                    return
                question = dns.message.from_wire(data)
                name = question.question[0].name
                self.asked.append(name.to_text(omit_final_dot=True).lower())
                response = dns.message.make_response(question, recursion_available=True)
                if question.question[0].rdtype == dns.rdatatype.A:
                    response.answer.append(dns.rrset.from_text(name, 60, "IN", "A", self._answer))
                self._socket.sendto(response.to_wire(), asker)


@contextlib.contextmanager
def names_server(namespace: str, address: str, answer: str) -> Iterator[NamesServer]:
    """One at port 53 of an address in a network namespace; UDP only."""
    with inside(namespace):
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((address, 53))
    server = NamesServer(sock, answer)
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield server
    finally:
        with contextlib.suppress(OSError):  # it is not connected; who waits on it wakes all the same
            sock.shutdown(socket.SHUT_RDWR)
        thread.join()
        sock.close()
