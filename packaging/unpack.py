# The beginning of the one file `tpvpn` (packaging/build.py): its tree is unpacked once, and what is asked for runs
# there, since compiled modules cannot be imported from an archive. An older Python 3 has to understand it, to say which
# one it wants.
import os
import sys

VERSION, MACHINE, TREE = "$version", "$machine", "$tree"


def cache():
    """Where trees are: of root's, whom sudo may make, all have to read, since tpvpn then becomes the user."""
    if os.geteuid() == 0:
        return "/var/cache/tpvpn"
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "tpvpn")


def unpack(tree):
    """Beside its place first, so that there is all of it or none."""
    import shutil
    import tempfile
    import zipfile

    os.umask(0o022)
    os.makedirs(os.path.dirname(tree), exist_ok=True)
    new = tempfile.mkdtemp(dir=os.path.dirname(tree))
    try:
        with zipfile.ZipFile(sys.argv[0]) as archive:
            archive.extractall(new)
        python = os.path.realpath(sys.executable)
        os.symlink(python, os.path.join(new, "bin", "python"))
        with open(os.path.join(new, "pyvenv.cfg"), "w") as file:
            file.write(f"home = {os.path.dirname(python)}\ninclude-system-site-packages = false\n")
        os.chmod(new, 0o755)
        if os.path.lexists(tree):  # its Python is gone
            shutil.rmtree(tree)
        os.rename(new, tree)
    except OSError:
        shutil.rmtree(new)
        if not os.path.exists(tree):  # else another one was quicker
            raise


def main():
    if sys.version_info[:2] != tuple(map(int, VERSION.split("."))) or os.uname().machine != MACHINE:
        sys.exit(
            f"tpvpn: this file is for Python {VERSION} on {MACHINE}: run it as `python{VERSION} FILE`, "
            "or take the one for yours"
        )
    tree = os.path.join(cache(), TREE)
    python = os.path.join(tree, "bin", "python")
    mask = os.umask(0)
    os.umask(mask)
    if not os.path.exists(python):
        try:
            unpack(tree)
        except OSError as error:
            sys.exit(f"tpvpn: cannot unpack into {cache()} ({error.strerror}): set XDG_CACHE_HOME")
        os.umask(mask)
    if os.stat(tree).st_uid not in (0, os.geteuid()):
        sys.exit(f"tpvpn: {tree} is another user's: set XDG_CACHE_HOME")
    name = os.path.basename(sys.argv[0])
    name = name if name in ("kubectl-tpvpn", "kubectl_complete-tpvpn") else "tpvpn"
    os.execv(python, [python, os.path.join(tree, "bin", name), *sys.argv[1:]])


main()
