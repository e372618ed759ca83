"""Taking secrets, and where that is wanted names, out of what a user hands to somebody else. Pure.

Of a kubeconfig only what is known to be harmless stays, so that a secret at a place that nobody thought of goes too. Of
all other texts go the secrets that the kubeconfig has, and whatever looks like one. A name becomes the same placeholder
wherever it stands.
"""

import ipaddress
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Literal, cast

REMOVED = "(removed)"
Kind = Literal["host", "user", "cluster", "context", "namespace", "domain", "address", "mac"]

_HARMLESS = {
    "apiVersion", "kind", "current-context", "name", "cluster", "user", "namespace", "server", "tls-server-name",
    "proxy-url", "certificate-authority", "client-certificate", "client-key", "tokenFile", "command",
    "interactiveMode", "as",
}  # fmt: skip
"""Members of a kubeconfig whose text is shown (client-go, tools/clientcmd/api/v1); those with paths have no keys."""
_LISTS = ("clusters", "contexts", "users")
_STRUCTURE = {*_LISTS, "cluster", "context", "user", "exec"}
"""Members that hold others."""
_USERINFO = re.compile(r"//(.*)@", re.DOTALL)
_LEAST = 6
"""Letters of a secret that is looked for in texts: a shorter one is part of too many words."""
_PRIVATE = "PRIVATE KEY-----"
_LOOKS_SECRET: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(rf"-----BEGIN [A-Z ]*{_PRIVATE}.*?(-----END [A-Z ]*{_PRIVATE}|\Z)", re.DOTALL), REMOVED),
    (re.compile(r"\b(authorization\W{1,4}(?:basic|bearer|negotiate)?|bearer)\s+[^\s\"',;]+", re.IGNORECASE),
     rf"\1 {REMOVED}"),
    (re.compile(r"\beyJ[\w-]+\.[\w-]+(\.[\w-]*)?"), REMOVED),
    (re.compile(r"(\w://)[^\s/@\"']+@"), rf"\1{REMOVED}@"),
    (re.compile(r"((?:\b|[_-])(?:token|password|passwd|passphrase|secret|api[-_]?key|access[-_]?key)[\"']?\s*[=:]\s*"
                r"[\"']?)(?!\()[^\s\"',;&]+", re.IGNORECASE), rf"\1{REMOVED}"),
    (re.compile(r"\b[A-Za-z0-9+/_-]{120,}={0,2}"), REMOVED),
)  # fmt: skip
"""What looks like one: keys, credentials of HTTP and of URLs, JWTs (RFC 7519), values so named, long base64."""


def shape(kubeconfig: object) -> object:
    """A kubeconfig with what is harmless of it alone."""
    return _shape(kubeconfig, "", 0)


def _shape(value: object, member: str, depth: int) -> object:
    if isinstance(value, dict) and (depth == 0 or member in _STRUCTURE or member in _LISTS):
        members = cast(dict[object, object], value)
        return {
            str(key): _shape(one, str(key), depth + 1)
            for key, one in members.items()
            if str(key) in _HARMLESS | _STRUCTURE or _is_word(str(key))
        }
    if isinstance(value, list) and member in _LISTS:
        # The entries of a list are of a kind, and hold a member of that kind.
        return [_shape(one, member, depth + 1) for one in cast(list[object], value)]
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, str) and member in _HARMLESS:
        return without_secrets(_USERINFO.sub(f"//{REMOVED}@", value), ())
    return REMOVED


def _is_word(key: str) -> bool:
    """Whether a member is of those that kubeconfigs have, whose value goes: its presence says something."""
    return key in {
        "token", "username", "password", "client-certificate-data", "client-key-data", "certificate-authority-data",
        "auth-provider", "args", "env", "extensions", "insecure-skip-tls-verify", "provideClusterInfo",
        "installHint", "preferences", "as-groups", "as-uid", "as-user-extra", "disable-compression",
    }  # fmt: skip


def secrets_of(kubeconfig: object) -> set[str]:
    """All texts of a kubeconfig that `shape` does not show."""
    shown, texts = set(_texts(shape(kubeconfig))), list(_texts(kubeconfig))
    texts += [part for text in texts for found in _USERINFO.findall(text) for part in (found, found.partition(":")[2])]
    return {text for text in texts if len(text) >= _LEAST} - shown


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for one in cast(dict[object, object], value).values():
            yield from _texts(one)
    elif isinstance(value, list):
        for one in cast(list[object], value):
            yield from _texts(one)


def without_secrets(text: str, known: Iterable[str]) -> str:
    """A text without these secrets and without what looks like one."""
    for secret in sorted(known, key=len, reverse=True):
        text = text.replace(secret, REMOVED)
    for pattern, instead in _LOOKS_SECRET:
        text = pattern.sub(instead, text)
    return text


def throughout(value: object, change: Callable[[str], str]) -> Any:
    """The value with each of its texts changed; the keys of objects too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        members = cast(dict[object, object], value)
        return {change(str(key)): throughout(one, change) for key, one in members.items()}
    if isinstance(value, list | tuple):
        return [throughout(one, change) for one in cast("list[object]", value)]
    return value


# -- names -------------------------------------------------------------------------------------------------------------

_COMMON = {
    "default",
    "kube-system",
    "root",
    "localhost",
    "kubernetes",
    "tpvpn",
    "in-cluster",
    "user",
    "cluster",
    "local",
}
"""Names that say nothing of whose they are."""
_OPEN = ("k8s.io", "kubernetes.io", "cluster.local", "kubernetes.default.svc", "github.com", "python.org")
"""Domains that everybody has."""
_PRIVATE_TLDS = {"local", "lan", "corp", "internal", "intranet", "home", "private", "example", "test", "invalid"}
_DOMAIN = re.compile(
    r"(?<![\w.-])(?:[a-zA-Z0-9_](?:[a-zA-Z0-9_-]*[a-zA-Z0-9])?\.)+[a-zA-Z][a-zA-Z0-9-]*[a-zA-Z0-9](?![\w-]|\.\w)"
)
_MAC = re.compile(r"(?<![\w:])(?:[0-9a-f]{2}:){5}[0-9a-f]{2}(?![\w:])", re.IGNORECASE)
_ADDRESS = re.compile(
    r"(?<![\w.:])(?:[0-9]{1,3}(?:\.[0-9]{1,3}){3}|[0-9a-fA-F]{0,4}(?::[0-9a-fA-F]{0,4}){2,7})(?![\w:])"
)


class Names:
    """Placeholders for names: the same one for the same name, for as long as this object lives."""

    def __init__(self, known: Mapping[Kind, Iterable[str]], tlds: Collection[str]) -> None:
        self._placeholders = dict[str, str]()
        self._counts = dict[str, int]()
        self._tlds = {*tlds, *_PRIVATE_TLDS}
        for kind, names in known.items():
            for name in names:
                if name and name.lower() not in _COMMON and not _is_open(name) and _address(name) is None:
                    self._of(kind, name)
        names = sorted(self._placeholders, key=len, reverse=True)
        words = "|".join(map(re.escape, names))
        self._known = re.compile(rf"(?<![\w-])(?:{words})(?![\w-])", re.IGNORECASE) if names else None

    def replace(self, text: str) -> str:
        """The text with placeholders."""
        if self._known:
            text = self._known.sub(lambda found: self._placeholders[found[0].lower()], text)
        text = _MAC.sub(lambda found: self._of("mac", found[0]), text)
        text = _ADDRESS.sub(self._public, text)
        return _DOMAIN.sub(self._domain, text)

    def _of(self, kind: Kind, name: str) -> str:
        name = name.lower()
        if name not in self._placeholders:
            self._counts[kind] = self._counts.get(kind, 0) + 1
            self._placeholders[name] = f"{kind}-{self._counts[kind]}"
        return self._placeholders[name]

    def _public(self, found: re.Match[str]) -> str:
        address = _address(found[0])
        if address is None or not address.is_global or address.is_multicast:
            return found[0]
        return self._of("address", str(address))

    def _domain(self, found: re.Match[str]) -> str:
        name = found[0].lower()
        if name.rpartition(".")[2] not in self._tlds or _is_open(name) or name in self._placeholders.values():
            return found[0]
        return self._of("domain", name)


def _is_open(name: str) -> bool:
    return name.startswith("tpvpn.") or any(f".{name.lower()}".endswith(f".{one}") for one in _OPEN)


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None
