"""A file on a disk that only one of several writers makes, whole."""

from __future__ import annotations

import errno
import os
import uuid
from pathlib import Path


def create_whole(final: Path, data: bytes) -> bool:
    """Put `data` at `final` unless there is something: of several writers one gets True, the others False and no change."""
    final.parent.mkdir(parents=True, exist_ok=True)
    draft = final.with_name(f".{final.name}.{uuid.uuid4().hex}")
    try:
        draft.write_bytes(data)
        os.link(draft, final)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS):
            raise
        return _create_without_links(final, data)
    finally:
        draft.unlink(missing_ok=True)
    return True


def _create_without_links(final: Path, data: bytes) -> bool:
    """For filesystems that know no hard links: only a reader in that very moment can see a part of it."""
    try:
        with open(final, "xb") as file:
            file.write(data)
    except FileExistsError:
        return False
    return True
