"""The commands of README and guides as a person types them: each fenced `sh` block says before it what it needs.

    <!-- needs: cluster, vpn -->

Blocks of a page with the same need run in their order, as one script. `# exit code 3` behind a command says how it
ends; a `connect` or a `manager` in the foreground, which ends with Ctrl-C, is another terminal's: it runs until it is
ready, and ends before the next one begins.
"""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "guides").glob("*.md"))]
NEEDS = {
    "everything": "scripts/test, which CI runs",
    "checkout": "tests/test_guides.py",
    "lab": "tests/test_guides.py",
    "cluster": "tests/kube/test_guides_in_a_cluster.py",
    "cluster, vpn": "tests/kube/test_guides_in_a_cluster.py",
    "helm": "tests/kube/test_helm.py",
}
"""What a block may need, and who runs it."""
FOREGROUND = re.compile(
    r"(tpvpn connect|tpvpn lab shell node -- tpvpn manager)\b(?!.*( -- |&$|--detach)(?!tpvpn manager))"
)
PRELUDE = r"""
set -eu -o pipefail
log=$(mktemp)
running=
leave() { [ -z "$running" ] || { kill "$running" 2>/dev/null || :; wait "$running" || :; running=; }; }
trap 'leave; rm -f "$log"' EXIT
foreground() {
    leave
    "$@" >"$log" 2>&1 &
    running=$!
    until grep -Eq '^tpvpn: ready|listening on' "$log"; do
        kill -0 "$running" 2>/dev/null || { cat "$log"; exit 1; }
        sleep 0.05
    done
}
ends_with() {
    local wanted=$1 code=0
    shift
    "$@" || code=$?
    [ "$code" = "$wanted" ] || { echo "exit code $code instead of $wanted: $*"; exit 1; }
}
set -x
"""


def blocks(page: Path) -> list[tuple[str, str]]:
    """All `sh` and `console` blocks of a page, each with what it needs; "" when it does not say."""
    found = re.findall(r"(?:<!-- needs: ([\w, ]+) -->\n)?```(?:sh|console)\n(.*?)^```", page.read_text(), re.M | re.S)
    return [(needs, block) for needs, block in found]


def script(page: Path, needs: str) -> str:
    """The page's blocks with that need, as one script; "" when there are none."""
    lines = "".join(block for needed, block in blocks(page) if needed == needs)
    lines = re.sub(r"^(.*\S)\s+# exit code (\d+).*$", r"ends_with \2 \1", lines, flags=re.MULTILINE)
    return re.sub(rf"^(?={FOREGROUND.pattern})", "foreground ", lines, flags=re.MULTILINE)


def run(script: str, *under: str, environment: dict[str, str], directory: Path, timeout: float = 120) -> str:
    """Run a script to its end, in a place; what it printed. It must succeed."""
    command = [*under, "bash", "-c", PRELUDE + script]
    ran = subprocess.run(
        command,
        env=environment,
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert ran.returncode == 0, ran.stdout
    return ran.stdout
