"""Pictures that are fetched by URL: kept in memory for a limited time and up to a limited size."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class _Kept:
    content: bytes
    until: float


class PictureUrls:
    """File names that cannot be guessed, each with a picture's bytes, in the order of their age."""

    def __init__(self, seconds: float, max_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.max_bytes, self.clock = seconds, max_bytes, clock
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self.size = 0  # bytes

    def add(self, content: bytes, suffix: str) -> str:
        """The name under which ``content`` can be fetched from now on."""
        name = f"{secrets.token_urlsafe(24)}.{suffix}"
        self._kept[name] = _Kept(content, self.clock() + self.seconds)
        self.size += len(content)
        self._drop_old()
        return name

    def get(self, name: str) -> bytes | None:
        """The picture, or None where there is none (any more)."""
        self._drop_old()
        kept = self._kept.get(name)
        return None if kept is None else kept.content

    def _drop_old(self) -> None:
        while self._kept:
            oldest = next(iter(self._kept))
            if self.size <= self.max_bytes and self._kept[oldest].until > self.clock():
                return
            self.size -= len(self._kept.pop(oldest).content)
