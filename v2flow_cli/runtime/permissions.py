"""Permissions of files that other libraries write."""

from __future__ import annotations

import stat
import tempfile
from pathlib import Path


def set_default_mode(path: Path) -> None:
    """Give a file the permissions that any new file in its folder has.

    safetensors and tempfile make files that only their owner can read, so that nobody else could load a model from a
    shared disk.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".mode-") as folder:
        probe = Path(folder, "probe")
        probe.touch()
        path.chmod(stat.S_IMODE(probe.stat().st_mode))
