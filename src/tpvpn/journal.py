"""What a session has changed, written down before it is done, so that it can be undone whatever happens.

It holds operations and who made them; how they are applied is not its concern. A journal is a file of JSON lines: first
the session, then one line an operation, appended with one write each. Its lock (flock) is held as long as the helper
lives: a journal that can be locked belongs to nobody any more. What a crash cut off in the last line was not done yet,
since lines are written first; undoing what was never done is harmless.
"""

import errno
import fcntl
import json
import os
from pathlib import Path

from tpvpn.errors import TpvpnError, UsageError
from tpvpn.helper.protocol import decode_operation, encode_operation
from tpvpn.route.fib import Route, Rule
from tpvpn.route.operations import Operation
from tpvpn.rundir import Session, decode, encode, name_option

_FILE = {"file": "/etc/resolv.conf"}


class JournalBusyError(UsageError):
    """The journal's session lives; `session` is what it wrote about itself."""

    def __init__(self, path: Path, session: Session | None) -> None:
        self.session = session
        who = f"{session.name!r} (process {session.pid})" if session else f"that holds {path}"
        name = name_option(session.name) if session else ""
        super().__init__(f"the session {who} runs already: end it with `tpvpn quit{name}`, or choose another --name")


class Journal:
    """An open and locked journal. JournalBusyError when a living session holds it.

    What cannot be written down raises OSError, and is not to be done.
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd = os.open(path, flags, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            session, _ = self._read()
            os.close(self._fd)
            raise JournalBusyError(path, session) from None
        self.took_file = False
        self.session, self._done = self._read()

    def close(self) -> None:
        """Give the lock back."""
        os.close(self._fd)

    def begin(self, session: Session) -> None:
        """Start anew: what was written before is forgotten. Nothing is appended to what a crash may have cut off."""
        os.ftruncate(self._fd, 0)
        self.session, self._done, self.took_file = session, [], False
        self._append(encode(session))

    def record(self, operation: Operation) -> None:
        """Write the operation down; call this before it is done."""
        self._append(json.dumps(encode_operation(operation)))
        self._done.append(operation)

    def record_file(self) -> None:
        """Write down that /etc/resolv.conf is taken, which says itself how it was; call this before it is done."""
        if not self.took_file:
            self._append(json.dumps(_FILE))
            self.took_file = True

    def undo_list(self) -> list[Operation]:
        """What removes everything that was added and not removed since: rules first, the latest first."""
        present: dict[Route | Rule, None] = {}
        for operation in self._done:
            present.pop(operation.target, None)
            if operation.verb == "add":
                present[operation.target] = None
        rules = [target for target in present if isinstance(target, Rule)]
        routes = [target for target in present if isinstance(target, Route)]
        return [Operation("remove", target) for target in rules[::-1] + routes[::-1]]

    def _append(self, line: str) -> None:
        data, size = line.encode() + b"\n", os.fstat(self._fd).st_size
        if os.write(self._fd, data) < len(data):  # a disk that is full took a part
            os.ftruncate(self._fd, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _read(self) -> tuple[Session | None, list[Operation]]:
        text = os.pread(self._fd, os.fstat(self._fd).st_size, 0).decode(errors="replace")
        first, *rest = text.split("\n")[:-1] or [""]
        operations: list[Operation] = []
        for line in rest:
            try:
                entry: object = json.loads(line)
                if entry == _FILE:
                    self.took_file = True
                else:
                    operations.append(decode_operation(entry))
            except (ValueError, RecursionError, TpvpnError):
                break
        return decode(first), operations
