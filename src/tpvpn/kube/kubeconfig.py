"""A kubeconfig's files as they stand, without the loader that takes half a second: which there are, their contexts."""

import os
from pathlib import Path
from typing import Any


def contexts(kubeconfig: str | None) -> list[str]:
    """The names of a kubeconfig's contexts, without the loader; errors are as they come."""
    return sorted(contexts_of(files(kubeconfig)[2]))


def documents(kubeconfig: str | None) -> list[object]:
    """A kubeconfig's files as they stand; errors are as they come."""
    return _loaded(files(kubeconfig)[2])


def files(kubeconfig: str | None) -> tuple[str | None, list[str], list[str]]:
    """What names the kubeconfig's files, if anything does, the files, and those of them that are there."""
    named = kubeconfig or os.environ.get("KUBECONFIG")
    paths = [path for path in (named or "~/.kube/config").split(os.pathsep) if path]
    return named, paths, [path for path in paths if _has_words(Path(path).expanduser())]


def _has_words(file: Path) -> bool:
    """Whether a kubeconfig is there; an empty file counts as none, as for kubectl, and a pipe as one."""
    return file.exists() and not (file.is_file() and file.stat().st_size == 0)


def contexts_of(paths: list[str]) -> set[str]:
    """The names of the contexts in these files; errors are as they come."""
    files: Any = _loaded(paths)
    return {str(one["name"]) for words in files for one in words.get("contexts") or ()}


def _loaded(paths: list[str]) -> list[object]:
    import yaml

    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where it is
    return [yaml.load(Path(path).expanduser().read_text(), loader) for path in paths]
