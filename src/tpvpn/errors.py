"""Every error a user can meet, each with the exit code that the command line promises.

An error's text is one clear sentence that says what to do next; it is printed as it stands, without a traceback.
"""


class TpvpnError(Exception):
    """Base of all errors that are shown to a user; `exit_code` is the process's."""

    exit_code = 1


class UsageError(TpvpnError):
    """What was asked for makes no sense: a malformed CIDR, contradictory flags, a name in use."""

    exit_code = 2


class ConflictError(TpvpnError):
    """A wanted subnet overlaps a private route and was not allowed to; `report` tells all there is to know of it."""

    exit_code = 3

    def __init__(self, text: str, report: str) -> None:
        super().__init__(text)
        self.report = report


class ClusterError(TpvpnError):
    """The API server is unreachable, or forbids what is needed."""

    exit_code = 4


class PrivilegeError(TpvpnError):
    """A right or a device is missing: root, CAP_NET_ADMIN, /dev/net/tun."""

    exit_code = 5


class ManagerError(TpvpnError):
    """The traffic manager cannot be reached, refuses, or is not one."""

    exit_code = 6


class ProtocolError(ManagerError):
    """The one error that bytes from the other end can cause: they are not what the protocol allows."""


class LinkLostError(TpvpnError):
    """The connection to the manager is gone."""

    exit_code = 7


class SessionEndedError(LinkLostError):
    """The manager wants this session no more: it is not to be opened again."""
