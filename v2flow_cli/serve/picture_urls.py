"""Pictures for download by URL, in memory for a limited time and up to a limited size."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class _File:
    content: bytes
    expiry: float


class PictureUrls:
    """Random file names, each with a picture's bytes, oldest first."""

    def __init__(self, seconds: float, max_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.max_bytes, self.clock = seconds, max_bytes, clock
        self._files: OrderedDict[str, _File] = OrderedDict()
        self.size = 0  # bytes

    def add(self, content: bytes, suffix: str) -> str:
        """The new file name of ``content``."""
        name = f"{secrets.token_urlsafe(24)}.{suffix}"
        self._files[name] = _File(content, self.clock() + self.seconds)
        self.size += len(content)
        self._drop_old()
        return name

    def get(self, name: str) -> bytes | None:
        """The picture, or None if there is none or it has expired."""
        self._drop_old()
        file = self._files.get(name)
        return None if file is None else file.content

    def _drop_old(self) -> None:
        while self._files:
            oldest = next(iter(self._files))
            if self.size <= self.max_bytes and self._files[oldest].expiry > self.clock():
                return
            self.size -= len(self._files.pop(oldest).content)
