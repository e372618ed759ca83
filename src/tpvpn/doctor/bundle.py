"""One file for whoever helps: the doctor's findings, the session's status, the network, the logs; no secrets in it.

What goes in is text or plain values, and all of it passes `redact` on its way. What cannot be read is left out.
"""

import io
import json
import os
import platform
import pwd
import socket
import tarfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

from tpvpn import __version__
from tpvpn.control import listed
from tpvpn.dns.policy import public_domains
from tpvpn.doctor.examine import Found
from tpvpn.doctor.host import output, read_text
from tpvpn.doctor.redact import Kind, Names, secrets_of, shape, throughout, without_secrets
from tpvpn.errors import UsageError
from tpvpn.kube.access import Access

_NETWORK = ("rule", "-6 rule", "route show table all", "-6 route show table all", "link", "address")
_FILES = ("/etc/resolv.conf", "/etc/nsswitch.conf", "/etc/os-release")
_MOST, _LOG = 1 << 20, 1 << 20
"""Characters of one file; bytes of a log, the last ones."""

Content = str | dict[str, Any] | list[Any]


def write(file: str, found: Found, access: Access, logs: Path, *, redact_names: bool) -> None:
    """Write it to a new file, for its owner alone; `logs` is their directory.

    UsageError when there is such a file, or it cannot be written.
    """
    kubeconfigs = _kubeconfigs(access)
    secrets = {secret for one in kubeconfigs for secret in secrets_of(one)}
    shapes = [shape(one) for one in kubeconfigs]
    names = Names(_names(shapes, found.status, access), public_domains()) if redact_names else None

    def clean(text: str) -> str:
        text = without_secrets(text, secrets)
        return names.replace(text) if names else text

    contents = dict[str, Content](
        {
            "doctor.json": found.as_json(),
            "status.json": listed([found.status] if found.status else []),
            "versions.json": _versions(),
            "kubeconfig.json": shapes,
            "network.txt": "\n".join(map(_network, _NETWORK)),
        }
    )
    contents |= {Path(path).name: text for path in _FILES if (text := read_text(Path(path), _MOST))}
    contents |= {f"logs/{path.name}": text for path in sorted(logs.glob("*.log*")) if (text := _end_of(path))}
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as raw, tarfile.open(fileobj=raw, mode="w:gz") as archive:
            for name, content in contents.items():
                _add(archive, name, content, clean)
    except FileExistsError:
        raise UsageError(f"--bundle {file} is there already: name a file that is not") from None
    except OSError as error:
        raise UsageError(f"--bundle {file} cannot be written: {error.strerror}") from None


def _add(archive: tarfile.TarFile, name: str, content: Content, clean: Callable[[str], str]) -> None:
    """One file of it, cleaned before it becomes JSON, whose escapes would hide a secret."""
    text = clean(content) if isinstance(content, str) else json.dumps(throughout(content, clean), indent=1) + "\n"
    data = text.encode(errors="replace")
    entry = tarfile.TarInfo(f"tpvpn-doctor/{name}")
    entry.size, entry.mode, entry.mtime = len(data), 0o600, int(time.time())
    archive.addfile(entry, io.BytesIO(data))


def _kubeconfigs(access: Access) -> list[object]:
    """The kubeconfig's files; none of them when one is none."""
    from tpvpn.kube.kubeconfig import documents

    try:
        return documents(access.kubeconfig)
    except Exception:  # a parser's of foreign words, of which there is no complete list
        return []


def _names(shapes: Iterable[object], status: dict[str, Any] | None, access: Access) -> dict[Kind, set[str]]:
    """The names that are to be found in all the rest."""
    found: dict[Kind, set[str]] = {
        "host": {socket.gethostname()},
        "user": {pwd.getpwuid(os.getuid()).pw_name, Path.home().name, access.user or "", *access.groups},
        "cluster": set(),
        "context": {access.context or ""},
        "namespace": {access.namespace or ""},
        "domain": set(),
    }
    kinds: dict[str, Kind] = {"clusters": "cluster", "contexts": "context", "users": "user"}
    for members in shapes:
        for member, kind in kinds.items():
            for entry in _objects(members, member):
                found[kind].add(str(entry.get("name", "")))
                context = entry.get("context")
                if isinstance(context, dict):
                    found["namespace"].add(str(cast(dict[str, object], context).get("namespace", "")))
    if status:
        found["domain"] |= {status["dns"]["domain"], *status["dns"]["domains"]}
        found["namespace"].add(status["dns"]["namespace"])
    return found


def _objects(members: object, member: str) -> list[dict[str, object]]:
    """The objects of a list in a kubeconfig, which may be anything."""
    entries = cast(dict[str, object], members).get(member) if isinstance(members, dict) else None
    found = cast(list[object], entries) if isinstance(entries, list) else []
    return [cast(dict[str, object], one) for one in found if isinstance(one, dict)]


def _versions() -> dict[str, str]:
    return {
        "tpvpn": __version__,
        "python": platform.python_version(),
        "kernel": f"{platform.release()} {platform.machine()}",
        "kubectl": output("kubectl", "version", "--client", "--output", "json"),
        "ip": output("ip", "-V"),
    }


def _network(words: str) -> str:
    return f"# ip {words}\n{output('ip', *words.split())[:_MOST]}"


def _end_of(path: Path) -> str:
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _LOG))
            return file.read(_LOG).decode(errors="replace")
    except OSError:
        return ""
