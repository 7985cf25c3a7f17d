"""Files that are complete or not there."""

from __future__ import annotations

import os
import secrets
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

UNFINISHED = ".unfinished-"


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that after a crash, of the process or of the machine, it is there whole or not at all."""
    unfinished = path.with_name(f"{UNFINISHED}{path.name}-{secrets.token_hex(4)}")
    try:
        with open(unfinished, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make names in a folder last through a crash of the machine."""
    if os.name == "nt":  # has no such thing
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_unfinished(folder: Path, name_start: str) -> None:
    """Remove what a killed writer left of the files whose names start so."""
    for path in folder.glob(f"{UNFINISHED}{name_start}*"):
        path.unlink(missing_ok=True)
