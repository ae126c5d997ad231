"""Files and folders that are written whole or not at all, and what identifies their content."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from stages.errors import UserError


@contextmanager
def replacing(final: Path | str, suffix: str = "") -> Iterator[Path]:
    """Yield a path beside `final` to write to; what was written there takes the place of `final` at the end, or nothing does.

    A reader sees the old file or the new one, never half of it. `suffix` is for writers that insist on one.
    """
    final = Path(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    draft = final.with_name(f".{final.name}.{os.getpid()}.{threading.get_ident()}{suffix}")
    try:
        yield draft
        os.replace(draft, final)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """Yield a folder beside `final` that takes its place only when everything in it has been written."""
    final = Path(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    try:
        yield draft
        draft.chmod(0o755)
        if final.exists():
            old = draft.with_name(draft.name + ".old")
            os.replace(final, old)
            os.replace(draft, final)
            shutil.rmtree(old)
        else:
            os.replace(draft, final)
    finally:
        if draft.exists():
            shutil.rmtree(draft)


def write_json(path: Path | str, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    with replacing(path) as draft:
        draft.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def digest(value: Any, length: int = 64) -> str:
    """The first `length` hex digits of the sha256 of a JSON value; keys of dicts are sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:length]


def weights_hash(folder: Path) -> str:
    """sha256 over the names and contents of all safetensors files below `folder`."""
    digest = hashlib.sha256()
    files = sorted(Path(folder).rglob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} holds no safetensors weights")
    for path in files:
        digest.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


@lru_cache(maxsize=1)
def code_version() -> str:
    """What made the data: the git revision of a checkout ("+" when it has local changes), else the package version."""
    folder = Path(__file__).resolve().parent.parent
    if (folder / ".git").exists():
        try:
            told = [
                subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=10).stdout.strip()
                for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
            ]
            return told[0] + ("+" if told[1] else "")
        except (OSError, subprocess.SubprocessError):
            pass  # no git here, or a checkout without commits
    try:
        return f"loa {metadata.version('loa')}"
    except metadata.PackageNotFoundError:
        return "unknown"
