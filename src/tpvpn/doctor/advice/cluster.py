"""What the kubeconfig, the API server and the way to it are good for. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from tpvpn.doctor.advice.host import NOT_VPNS
from tpvpn.doctor.check import Check, warning
from tpvpn.route.why import Way

Trouble = Literal["", "absent", "kubeconfig", "plugin", "login", "untrusted", "forbidden", "unreachable"]
"""What came of asking: nothing amiss, or at which step it ended."""
_SHOW = "kubectl config view --minify"
_SOON = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Reached:
    """What came of opening a kubeconfig and of asking its API server."""

    trouble: Trouble
    error: str = ""
    context: str = ""
    server: str = ""
    proxy: str = ""
    addresses: Sequence[str] = ()
    """Those that are dialled: the API server's, or its proxy's."""
    seconds: float | None = None
    """For a connection to be there."""

    @property
    def opened(self) -> bool:
        """Whether there is a kubeconfig that is good for something."""
        return self.trouble not in ("absent", "kubeconfig", "plugin") and bool(self.server)


def of_kubeconfig(reached: Reached) -> Check:
    """Whether there is one, with the context that is wanted."""
    if reached.trouble == "absent":
        return warning("kubeconfig", _sentence(reached.error), "give --kubeconfig FILE, or set KUBECONFIG")
    if reached.trouble == "kubeconfig":
        return Check(
            "kubeconfig",
            reached.error,
            f"correct it, or name another one with --kubeconfig FILE or --context NAME; `{_SHOW}` shows it",
        )
    return Check("kubeconfig", f"context {reached.context} leads to {reached.server or 'a cluster'}")


def of_login(reached: Reached) -> Check:
    """Whether the user is somebody to the cluster."""
    match reached.trouble:
        case "plugin":
            return Check("login", reached.error, "install that program, or put its directory on PATH")
        case "login":
            return Check(
                "login",
                _sentence(reached.error),
                "log in to the cluster again; `kubectl auth whoami` says whether that helped",
            )
        case "forbidden":
            return Check(
                "login", reached.error, "log in to the cluster; `kubectl auth whoami` says who you are", warns=True
            )
        case "absent" | "kubeconfig":
            return unseen("login", "the kubeconfig is not to be used")
        case "untrusted" | "unreachable":
            return unseen("login", "the API server is not to be asked")
        case "":
            return Check("login", "the API server takes the kubeconfig's credentials")


def of_certificate(valid: tuple[datetime, datetime], now: datetime) -> Check:
    """The client's certificate."""
    since, until = valid
    renew = "have whoever runs the cluster give you a new one (`kubeadm certs renew admin.conf`)"
    if now > until:
        return Check(
            "certificate", f"the kubeconfig's client certificate has expired at {until:%Y-%m-%d %H:%M} UTC", renew
        )
    if now < since:
        return Check(
            "certificate",
            f"the kubeconfig's client certificate is not valid before {since:%Y-%m-%d %H:%M} UTC",
            "set this host's clock: `timedatectl set-ntp true`",
        )
    if until - now < _SOON:
        return warning(
            "certificate", f"the kubeconfig's client certificate expires at {until:%Y-%m-%d %H:%M} UTC", renew
        )
    return Check("certificate", f"the kubeconfig's client certificate is valid until {until:%Y-%m-%d}")


def of_api_server(reached: Reached, ways: Sequence[tuple[str, Way]]) -> Iterator[Check]:
    """Whether it answers, and which ways its addresses go now."""
    if not reached.opened:
        yield unseen("api-server", "no kubeconfig leads to one")
        return
    by = f" through the proxy {reached.proxy}" if reached.proxy else ""
    if reached.trouble == "untrusted":
        yield Check(
            "api-server",
            reached.error,
            "give the kubeconfig the cluster's own certificate-authority; a clock that is wrong does this too (`date`)",
        )
    elif reached.trouble == "unreachable":
        yield Check(
            "api-server",
            reached.error.partition(": is the VPN")[0],
            f"see that the VPN that leads to it is up, and it runs: `curl -k {reached.server}/version`",
        )
    else:
        took = "" if reached.seconds is None else f" in {1000 * reached.seconds:.1f} ms"
        yield Check("api-server", f"{reached.server} answers{by}{took}")
    answers = reached.trouble != "unreachable"
    for address, way in ways:
        yield _of_route(address, way, answers, "the proxy" if reached.proxy else "the API server")


def _of_route(address: str, way: Way, answers: bool, whose: str) -> Check:
    """Where an address goes that is dialled."""
    if way.device is None:
        return Check("api-route", f"{whose}'s address {address} goes nowhere: {way.route}", f"ip route get {address}")
    if way.owner == "tpvpn":
        return Check(
            "api-route",
            f"{whose}'s address {address} goes into the tunnel itself ({way.route})",
            f"tpvpn connect --never-proxy {address}",
        )
    goes = f"{whose}'s address {address} goes by {way.route} ({way.owner}, known by {way.known_by})"
    if way.owner in NOT_VPNS:
        return Check("api-route", goes)
    if answers:
        return Check("api-route", f"{goes}: it is reached as long as that VPN is up")
    return warning(
        "api-route",
        f"{goes}, where nobody answers for it: that VPN may not be the one that leads to it",
        f"end that VPN, or have it leave {address} out; `tpvpn why {address}` says more",
    )


def unseen(identity: str, why: str) -> Check:
    """The warning for what could not be looked at."""
    return warning(identity, f"not looked at: {why}", "see what is said of that above")


def _sentence(error: str) -> str:
    """An error without what it says is to be done, where the remedy says that."""
    return error.rpartition(": ")[0] if error.count(": ") == 1 else error
