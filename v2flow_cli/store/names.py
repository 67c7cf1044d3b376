"""Names of files and keys: case-insensitive suffixes, keys that any file system accepts, no two alike.

A key is the name of an image in its set: its path under the input, with '/' between parts and without suffix.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from v2flow_cli.store.text import SURROGATE

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")

_LONGEST_PART = 200  # bytes; file systems allow 255, including the longest suffix and a number
_UNSAFE = re.compile(  # not printable, or not allowed on Windows
    r'[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff<>:"|?*.]'
)
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])", re.IGNORECASE)  # devices of Windows


def suffix_of(name: str | os.PathLike[str], suffixes: Collection[str]) -> str:
    """The longest of ``suffixes`` (lower case) that ``name`` ends in, in any case; empty if it has none of them."""
    base = os.path.basename(os.fspath(name)).lower()
    return max((s for s in suffixes if base.endswith(s) and len(base) > len(s)), key=len, default="")


def is_tar(name: str | os.PathLike[str]) -> bool:
    """True for the name of a tar, gzipped or not."""
    return bool(suffix_of(name, TAR_SUFFIXES))


def temporary_name(name: str) -> str:
    """The beginning of a hidden name, of constant length, for the time that a file is being written."""
    return f".{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"


def safe_key(key: str, taken: set[str] | None = None) -> str:
    """``key`` as a path that stays inside a folder on any system, without dots.

    Args:   taken, the keys in use, to which the result is added: a key that differs from them only in case or in the
            composition of accents gets a number.
    """
    parts = [_safe_part(part) for part in re.split(r"[/\\]", key) if part.strip(". ")]
    return _unique("/".join(parts) or "image", taken)


def safe_prefixes(keys: Sequence[str]) -> list[str]:
    """``keys`` made safe, so that no path under one of them is a path under another one."""
    safe = [safe_key(key) for key in keys]
    taken = {_folded("/".join(parts[:i])) for parts in (key.split("/") for key in safe) for i in range(1, len(parts))}
    return [_unique(key, taken) for key in safe]


def _safe_part(part: str) -> str:
    part = _shorten(_UNSAFE.sub("_", part.rstrip(" ")))
    return f"{part}_" if _RESERVED.fullmatch(part) else part


def _unique(name: str, taken: set[str] | None) -> str:
    if taken is None:
        return name
    unique, number = name, 2
    while _folded(unique) in taken:
        unique, number = f"{name}-{number}", number + 1
    taken.add(_folded(unique))
    return unique


def _folded(name: str) -> str:
    """Equal for two names that some file system treats as one."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


def _shorten(part: str) -> str:
    encoded = part.encode("utf-8", "surrogateescape")
    if len(encoded) <= _LONGEST_PART:
        return part
    start = encoded[: _LONGEST_PART - 17].decode(errors="ignore")
    return f"{start}-{hashlib.sha256(encoded).hexdigest()[:16]}"


def keys_of(files: Sequence[tuple[Path, Path]], suffixes: Collection[str]) -> list[str]:
    """A key for each (root, path under it): the path without its suffix, all keys different.

    Keys that would be equal keep their suffixes (``a.jpg``, ``a.png``, ``a.jpg.webp``). If they are still equal,
    because several roots hold the same names, they begin with the last parts of the root's path in which the roots
    differ (``left/1``, ``right/1``). Invalid parts are replaced: bytes that are no text by ``_``, the end of a part of
    more than 200 bytes by a digest.
    """
    names = [_mirrored(path.relative_to(root).as_posix()) for root, path in files]
    if len(roots := dict.fromkeys(root for root, _ in files)) > 1 and _meet(files, names, suffixes):
        labels = dict(zip(roots, _labels(list(roots))))
        names = [_mirrored(f"{labels[root]}/{name}") for (root, _), name in zip(files, names)]
    keys = [_without_suffix(name, suffixes) for name in names]
    whole: set[int] = set()
    while True:
        counts = Counter(keys)
        equal = {i for i, key in enumerate(keys) if counts[key] > 1} - whole
        if not equal:
            break
        for i in equal:
            keys[i] = names[i]
        whole |= equal
    taken: set[str] = set()
    for i, key in enumerate(keys):  # equal only after invalid parts were replaced
        number = 2
        while keys[i] in taken:
            keys[i], number = f"{key}-{number}", number + 1
        taken.add(keys[i])
    return keys


def _without_suffix(name: str, suffixes: Collection[str]) -> str:
    return name[: len(name) - len(suffix_of(name, suffixes))]


def _mirrored(name: str) -> str:
    return "/".join(_shorten(SURROGATE.sub("_", part)) for part in name.split("/"))


def _meet(files: Sequence[tuple[Path, Path]], names: Sequence[str], suffixes: Collection[str]) -> bool:
    """True if files under different roots have the same name, also without their suffixes."""
    first: dict[str, Path] = {}
    stems = ((root, _without_suffix(name, suffixes)) for (root, _), name in zip(files, names))
    return any(first.setdefault(stem, root) != root for root, stem in stems)


def _labels(roots: Sequence[Path]) -> list[str]:
    """The last parts of each root's absolute path, as many as make all of them different."""
    parts = [[part for part in Path(os.path.abspath(root)).parts if part.strip("/\\:")] for root in roots]
    depth = next(d for d in range(1, 1 + max(map(len, parts))) if len({tuple(p[-d:]) for p in parts}) == len(parts))
    return ["/".join(p[-depth:]) for p in parts]
