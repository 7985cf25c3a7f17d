"""Where and when a number was measured: device, versions, threads, commit, date."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parent.parent


def provenance(device: str) -> dict[str, Any]:
    """One flat record, equal for all rows of a run. It holds no host name and no path."""
    versions = {
        name: _version(name) for name in ("torch", "triton", "xentile", "liger-kernel", "quack-kernels", "flash-attn")
    }
    return {
        "date": datetime.datetime.now(tz=datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(device),
        "kind": device,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {name: version for name, version in versions.items() if version},
        "cuda": torch.version.cuda if device == "cuda" else None,
        "isa": _isa(device),
        "commit": commit(),
    }


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        fields = dict(re.findall(r"^(.+?)\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE))
        name = fields.get("model name") or platform.machine()
    except OSError:
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def slug(name: str) -> str:
    """A file name for a device: lower case, words joined by dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit() -> str:
    """The checked-out commit; "+" is added when tracked files differ from it, "unknown" outside a git checkout."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        # The results themselves change while they are made.
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")


def _git(*arguments: str) -> str:
    output = subprocess.run(["git", *arguments], cwd=REPOSITORY, check=True, capture_output=True, text=True)
    return output.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _isa(device: str) -> str | None:
    """What serves CPU calls: the instruction set of the native library, or None when there is none."""
    if device != "cpu":
        return None
    try:
        import xentile  # noqa: F401 - registers the operators, if it is installed

        return str(torch.ops.xentile.isa())
    except (ImportError, AttributeError, RuntimeError):
        return None
