"""A process as in a pod of PodSecurity `restricted`: nobody, no capability and no way to one, nothing to write to."""

from collections.abc import Sequence

NOBODY = 65534
UNPRIVILEGED = (
    *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"),
    *("--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"),
)
"""The words before a command that make it nobody's, without a right; they need root."""

# Read-only is each mount by itself: mount(8) knows `ro=recursive` from util-linux 2.39 on. The namespace of another lab
# may be deleted meanwhile, and its mount with it.
_READ_ONLY = """
for point in $(cut -d " " -f 2 /proc/self/mounts); do
    mount -o remount,bind,ro "$point" || ! mountpoint -q "$point"
done
exec "$@"
"""


def restricted(argv: Sequence[str]) -> list[str]:
    """The command that runs `argv` so; it needs root."""
    return ["unshare", "--mount", "sh", "-ec", _READ_ONLY, "sh", *UNPRIVILEGED, *argv]
