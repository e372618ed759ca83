"""An ordinary user of the laptop: a home, a kubeconfig whose exec plugin tells who ran it, and what sudo allows."""

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

NAME, UID, GROUP = "tpvpn-ann", 64321, 64322
PASSWORD = "secret"
_HASH = "$6$OCCw.8V55uov.eoA$uvz9HN1liNMfxOmIgA06vQVTe2t5SC0XkNdFx0FWb4tt7NzIrw0Kt3hXyxlcKNpW.p/ibP.9x/d7xFmsi76cz1"
PATH = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
NOTHING = "root ALL=(ALL) ALL"
ALLOWED = f"{NAME} ALL=(root) NOPASSWD: ALL"
WITH_PASSWORD = f"{NAME} ALL=(root) ALL"

# Everyone may open /dev/net/tun, as udev has it. The interpreter may be where only root can go: then what hides it is
# covered by what leads to it alone.
_SETUP = """
mount --make-rprivate /
mount -t tmpfs -o mode=755 none "$1/dev"
mknod -m 666 "$1/dev/tun" c 10 200
mount --bind "$1/dev/tun" /dev/net/tun
for file in passwd shadow group sudoers; do mount --bind "$1/$file" "/etc/$file"; done
if [ -n "$2" ]; then
    mount --bind "$3" "$1/python"
    mount -t tmpfs -o mode=755 none "$2"
    mkdir -p "$3"
    mount --bind "$1/python" "$3"
fi
shift 3
exec "$@"
"""

_PLUGIN = """#!/bin/sh
cat /proc/self/status >"$HOME/plugin"
cat "/proc/$PPID/status" >"$HOME/tpvpn"
env >"$HOME/environment"
cat "$HOME/credential"
"""

_KUBECONFIG = """apiVersion: v1
kind: Config
current-context: test
contexts: [{{name: test, context: {{cluster: test, user: ann, namespace: {namespace}}}}}]
clusters: [{{name: test, cluster: {{server: "{server}"{authority}}}}}]
users: [{{name: ann, user: {{exec: {{apiVersion: client.authentication.k8s.io/v1, interactiveMode: Never,
  command: tell-who}}}}}}]
"""
_CREDENTIAL = (
    '{{"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": {{"token": "{token}"}}}}\n'
)


class User:
    """The user, whose files are in `home`."""

    def __init__(self, directory: Path) -> None:
        self._directory, self.home = directory, directory / "home"
        self.kubeconfig = self.home / ".kube" / "config"
        for place in ("python", "dev"):
            (directory / place).mkdir()
        for made in (self.home, self.kubeconfig.parent, self.home / "bin"):
            made.mkdir()
            os.chown(made, UID, UID)
        self.write("bin/tell-who", _PLUGIN, 0o755)
        users = f"{NAME}:x:{UID}:{UID}:Ann:{self.home}:/bin/sh\n"
        (directory / "passwd").write_text(Path("/etc/passwd").read_text() + users)
        shadow = directory / "shadow"
        shadow.touch(0o600)
        shadow.write_text(Path("/etc/shadow").read_text() + f"{NAME}:{_HASH}:20000:0:99999:7:::\n")
        groups = f"{NAME}:*:{UID}:\ntpvpn-developers:*:{GROUP}:{NAME}\n"
        (directory / "group").write_text(Path("/etc/group").read_text() + groups)

    def write(self, name: str, text: str, mode: int = 0o600) -> Path:
        """A file of the user's."""
        file = self.home / name
        file.write_text(text)
        file.chmod(mode)
        os.chown(file, UID, UID)
        return file

    def link(self, manager: str, token: str) -> tuple[str, ...]:
        """The options that lead to a manager, with a token file of the user's."""
        return ("--manager", f"tcp://{manager}", "--token-file", str(self.write("token", token)))

    def log_in(self, server: str, token: str = "none", authority: str = "", namespace: str = "default") -> str:
        """Have a kubeconfig for a cluster; its text."""
        self.write("credential", _CREDENTIAL.format(token=token))
        words = f", certificate-authority-data: {authority}" if authority else ""
        text = _KUBECONFIG.format(server=server, namespace=namespace, authority=words)
        self.write(".kube/config", text)
        return text

    def status(self, of: Literal["plugin", "tpvpn"]) -> dict[str, str]:
        """The plugin as /proc/PID/status told of it when it ran, which it must have; or the process that ran it."""
        return dict(line.split(":\t", 1) for line in (self.home / of).read_text().splitlines())

    def environment(self) -> dict[str, str]:
        """The plugin's environment."""
        return dict(line.split("=", 1) for line in (self.home / "environment").read_text().splitlines())

    def host(self, argv: Sequence[str], rule: str = NOTHING) -> list[str]:
        """The command that runs another, as root, on a laptop that this user has, with this rule for sudo."""
        sudoers = self._directory / "sudoers"
        defaults = f"env_reset, use_pty, lecture=never, timestamp_timeout=0, secure_path={PATH}"
        sudoers.write_text(f"Defaults {defaults}\n{rule}\n")
        sudoers.chmod(0o440)
        base = Path(sys.base_prefix).resolve()
        hidden = next((str(one) for one in reversed(base.parents) if not one.stat().st_mode & 0o001), "")
        return ["unshare", "--mount", "sh", "-ec", _SETUP, "sh", str(self._directory), hidden, str(base), *argv]

    def shell(self, argv: Sequence[str], **environment: str) -> list[str]:
        """The command that runs another as this user, with the environment of a shell of theirs."""
        own = {"HOME": str(self.home), "USER": NAME, "LOGNAME": NAME, "PATH": f"{self.home}/bin:{PATH}"}
        become = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--init-groups"]
        return [*become, "env", "-i", *(f"{name}={value}" for name, value in (own | environment).items()), *argv]


@contextlib.contextmanager
def ordinary_user() -> Iterator[User]:
    """A user for a test, in a directory that every user may enter."""
    directory = Path(tempfile.mkdtemp(prefix="tpvpn-user-"))
    directory.chmod(0o755)
    try:
        yield User(directory)
    finally:
        shutil.rmtree(directory)
