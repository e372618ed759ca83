"""The root helper: a small process that changes the laptop's network for one session, and undoes it whatever happens.

It reads no kubeconfig and no packet, and serves the few requests of `protocol` over the socketpair that it was given as
standard input. When the other end closes, however that came to be, it undoes everything and is gone; so it guards
against the user's process dying, and ignores the signals that would end both at once. It runs in a session of its own
(setsid) for the same reason, and so that sudo, which waits for its parent, leaves the terminal alone.
"""

import contextlib
import errno
import os
import socket
import sys
from collections.abc import Generator
from functools import partial

from tpvpn import nfnetlink, privileged, rundir, sockdiag, xfrm
from tpvpn.dns.marker import Owner
from tpvpn.errors import PrivilegeError, TpvpnError
from tpvpn.helper import background, kernel, protocol
from tpvpn.helper.background import User
from tpvpn.helper.dns_sockets import open_dns
from tpvpn.helper.protocol import (
    Announce,
    Apply,
    Claim,
    Cleanup,
    Guard,
    Look,
    OpenDns,
    OpenTun,
    Request,
    RequestError,
    Reset,
    ResetAll,
    SetResolved,
    TakeFile,
    Watch,
)
from tpvpn.helper.resolver_file import FILE, ResolverFile, leftovers
from tpvpn.journal import Journal, JournalBusyError
from tpvpn.route.fib import Route
from tpvpn.route.operations import Operation, tunnelled
from tpvpn.route.prefix import DEFAULT, Space
from tpvpn.rundir import Session
from tpvpn.tun import open_tun


class Helper:
    """One session's hands: each request is carried out, or refused with an error and nothing done."""

    def __init__(self, user: User) -> None:
        self._user = user
        self._journal: Journal | None = None
        self._addresses: tuple[str, ...] = ()
        self._guard: nfnetlink.Table | None = None

    def handle(self, request: Request) -> tuple[dict[str, object], list[int]]:
        """The reply to a request, and descriptors to pass with it and then to close. TpvpnError when it is refused."""
        match request:
            case Claim():
                return self._claim(request.name), []
            case OpenTun():
                return self._open_tun(request)
            case Guard():
                self._install_guard()
            case Apply():
                self._apply(request.operations)
            case Look():
                seen = privileged.look(request.prefixes, self._claimed().device, self._addresses)
                return privileged.encode(seen), []
            case Watch():
                return {}, self._watch()
            case Reset() | ResetAll():
                return {"destroyed": self._reset(request)}, []
            case OpenDns():
                self._own_address()
                return {}, open_dns(self._addresses)
            case Announce() | SetResolved() | TakeFile():
                return self._lead_names(request), []
            case Cleanup():
                return {"removed": _cleanup()}, []
        return {}, []

    def close(self) -> None:
        """Undo everything: rules first, the latest first; then the guard, and the session's directory.

        Nobody is to wait for answers to the addresses that are gone.
        """
        if self._journal is None or self._journal.session is None:
            return
        for operation in self._journal.undo_list():
            _try(operation)
        if self._journal.took_file:
            with rundir.locked():
                _release(_owner(self._journal.session.name))
        if self._guard is not None:
            self._guard.close()
        with contextlib.suppress(OSError):
            sockdiag.reset(tuple(DEFAULT.values()), (), self._addresses)
        with rundir.locked():
            rundir.remove(self._journal.session.name)
            self._journal.close()

    def _claim(self, name: str) -> dict[str, object]:
        if self._journal is not None:
            raise RequestError("this helper has a session already")
        with _state_locked():
            try:
                directory = rundir.create(name)
                self._begin(name, Journal(directory / "journal"))
            except OSError:
                rundir.remove_empty(name)
                raise
        session = self._claimed()
        return {"device": session.device, "table": session.table, "directory": str(directory)}

    def _begin(self, name: str, journal: Journal) -> None:
        """Repair what dead sessions left, then start ours."""
        try:
            _replay(journal)
            _release(_owner(name))
            living, _ = _repair(name)
            # Above those that live: of two sessions that want the same, the older one's table is the lower.
            after = max(living, default=kernel.TABLES.start - 1) + 1
            tables = (*range(after, kernel.TABLES.stop), *range(kernel.TABLES.start, after))
            free = (table for table in tables if table not in living and kernel.table_is_free(table))
            table = next(free, None)
            if table is None:
                raise TpvpnError(f"all routing tables from {kernel.TABLES[0]} to {kernel.TABLES[-1]} are in use")
            device, user = rundir.device_name(name), self._user
            session = Session(name, user.pid, user.uid, device, table, rundir.boot_id())
            journal.begin(session)
            rundir.write(session, user.gid)
        except BaseException:
            rundir.remove(name)
            journal.close()
            raise
        self._journal = journal

    def _open_tun(self, request: OpenTun) -> tuple[dict[str, object], list[int]]:
        device = self._claimed().device
        tun = open_tun(device, offload=request.offload)
        try:
            addresses = kernel.configure_tun(device, request.mtu, request.addresses, request.txqueuelen)
        except BaseException:
            tun.close()
            raise
        self._addresses = addresses
        return {"device": device, "offloads": int(tun.offloads), "addresses": list(addresses)}, [tun.fd, tun.prompt_fd]

    def _install_guard(self) -> None:
        device = self._claimed().device
        if self._guard is not None:
            self._guard.close()
        ipv4 = next((address for address in self._addresses if ":" not in address), None)
        ipv6 = next((address for address in self._addresses if ":" in address), None)
        self._guard = nfnetlink.install_laptop_guard(device, ipv4, ipv6)

    def _apply(self, operations: tuple[Operation, ...]) -> None:
        session = self._claimed()
        for operation in operations:
            protocol.check(operation, session.device, session.table)
        for operation in operations:
            if self._journal is not None:
                self._journal.record(operation)
            kernel.apply(operation)

    def _watch(self) -> list[int]:
        self._claimed()
        changes = xfrm.watch()
        return [] if changes is None else [changes.detach()]

    def _reset(self, request: Reset | ResetAll) -> int:
        self._claimed()
        if isinstance(request, ResetAll):
            return sockdiag.reset(tuple(DEFAULT.values()), (), self._addresses)
        for prefix in request.withdrawn + request.routed:
            protocol.check_prefix(prefix)
        ours = self._routed()
        withdrawn, routed = Space(request.withdrawn) - ours, Space(request.routed) & ours
        return sockdiag.reset(withdrawn.prefixes(), routed.prefixes(), self._addresses)

    def _routed(self) -> Space:
        """What the session's table leads into the tunnel now."""
        undo = self._journal.undo_list() if self._journal is not None else ()
        return tunnelled(operation.target for operation in undo if isinstance(operation.target, Route))

    def _lead_names(self, request: Announce | SetResolved | TakeFile) -> dict[str, object]:
        match request:
            case Announce():
                rundir.announce(self._claimed().name, request.suffixes)
                return {}
            case SetResolved():
                return {"because": self._set_resolved(request)}
            case TakeFile():
                return self._take_file(request.search)

    def _set_resolved(self, request: SetResolved) -> str | None:
        from tpvpn.dns.resolved import set_link  # D-Bus, which not every session needs

        own, device = self._own_address(), self._claimed().device
        return set_link(device, [own], request.search, request.domains)

    def _take_file(self, search: tuple[str, ...]) -> dict[str, object]:
        own, owner = self._own_address(), _owner(self._claimed().name)
        if self._journal is not None:
            self._journal.record_file()
        with _state_locked():
            taken = ResolverFile(owner).take(own, search)
        return {"path": str(taken.path), "how": taken.how, "generation": taken.generation}

    def _own_address(self) -> str:
        self._claimed()
        if not self._addresses:
            raise RequestError("open the TUN first: it has the address that is asked for names")
        return self._addresses[0]

    def _claimed(self) -> Session:
        if self._journal is None or self._journal.session is None:
            raise RequestError("claim a session first")
        return self._journal.session


def _owner(name: str) -> Owner:
    return Owner(name, rundir.namespace().name)


def _release(owner: Owner) -> list[str]:
    """Give back /etc/resolv.conf as a session would; what was done, in words."""
    here = owner.netns == rundir.namespace().name
    reread = partial(_reread, rundir.device_name(owner.name)) if here else lambda: None
    return [f"{FILE} of session {owner.name}"] if ResolverFile(owner).release(reread) else []


def _reread(device: str) -> None:
    """Have systemd-resolved forget us, with a device of this name, which may be gone with the user's process."""
    from tpvpn.dns.resolved import reread

    with contextlib.ExitStack() as stack:
        with contextlib.suppress(TpvpnError, OSError):
            stack.callback(open_tun(device, offload=False).close)
        reread(device)


@contextlib.contextmanager
def _state_locked() -> Generator[None]:
    """As `rundir.locked`; PrivilegeError where the state cannot be kept, TpvpnError where there is no room for it."""
    try:
        with rundir.locked():
            yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise TpvpnError(
                f"cannot keep the sessions' state in {rundir.base()}: {error.strerror}; make room there, or set "
                "TPVPN_RUN_DIR to another directory"
            ) from error
        if error.filename is None:
            raise
        raise PrivilegeError(
            f"cannot keep the sessions' state in {rundir.base()}: {error.strerror}; "
            "set TPVPN_RUN_DIR to a directory that the helper may write"
        ) from error


def _cleanup() -> list[str]:
    """What was removed, in words."""
    with _state_locked():
        _, removed = _repair()
        rundir.remove_empty()
    limit = protocol.REMOVED_LIMIT
    return removed[:limit] + ([f"{len(removed) - limit} more"] if len(removed) > limit else [])


def _repair(own: str | None = None) -> tuple[set[int], list[str]]:
    """Undo what dead sessions of this network namespace left; gives the tables of the living, and what was removed."""
    living: set[int] = set()
    removed: list[str] = []
    for other in rundir.names():
        if other == own:
            continue
        try:
            journal = Journal(rundir.directory(other) / "journal")
        except JournalBusyError as busy:
            living |= {busy.session.table} if busy.session else set()
            continue
        removed += [f"session {other}", *_replay(journal), *_release(_owner(other))]
        rundir.remove(other)
        journal.close()
    for owner in leftovers():
        removed += _release(owner)
    return living, removed + kernel.sweep(living)


def _replay(journal: Journal) -> list[str]:
    """Undo what the journal's session left; what there was, in words.

    The journal of a helper that was an ordinary user's could have been written by that user: it is no more believed
    than a request.
    """
    session = journal.session
    if session is None or session.boot_id != rundir.boot_id():
        return []
    done = [operation for operation in journal.undo_list() if _is_ours(operation, session)]
    return [protocol.describe(operation.target) for operation in done if _try(operation)]


def _is_ours(operation: Operation, session: Session) -> bool:
    with contextlib.suppress(RequestError):
        protocol.check(operation, session.device, session.table)
        return True
    return False


def _try(operation: Operation) -> bool:
    """Undo one operation; whether there was anything to do.

    What cannot be undone must not keep the rest from it, nor must a terminal that is gone.
    """
    try:
        return kernel.apply(operation)
    except TpvpnError as error:
        with contextlib.suppress(OSError):
            print(f"tpvpn helper: {error}", file=sys.stderr)
        return False


def serve(connection: socket.socket, helper: Helper) -> None:
    """Answer requests until the other end closes."""
    while data := connection.recv(protocol.MESSAGE_LIMIT + 1):
        descriptors: list[int] = []
        try:
            if len(data) > protocol.MESSAGE_LIMIT:
                raise RequestError(f"a request is longer than {protocol.MESSAGE_LIMIT} bytes")
            reply, descriptors = helper.handle(protocol.parse_request(data))
            answer = protocol.pack_reply(reply)
        except TpvpnError as error:
            answer = protocol.pack_error(error)
        except OSError as error:
            answer = protocol.pack_error(TpvpnError(f"the helper failed: {error}"))
        try:
            socket.send_fds(connection, [answer], descriptors)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)


def main() -> None:
    """Serve the session of the process at the other end of standard input."""
    try:
        connection = background.take_connection()
        helper = Helper(background.user(connection))
    except OSError as error:
        sys.exit(
            f"tpvpn helper: standard input must be tpvpn's socket ({error.strerror}); sudo's log_input breaks this"
        )
    background.detach()
    try:
        serve(connection, helper)
    except ConnectionError:
        pass  # the other end closed before it read its answer
    finally:
        helper.close()


if __name__ == "__main__":
    main()
