"""Finding what inputs hold: files, folders, globs and brace lists, in the same way for every command."""

from __future__ import annotations

import glob
import itertools
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from braceexpand import braceexpand

from v2flow_cli.errors import DataError
from v2flow_cli.store.failures import Failure
from v2flow_cli.store.images import SUFFIXES
from v2flow_cli.store.names import TAR_SUFFIXES, is_tar, keys_of, suffix_of
from v2flow_cli.store.not_taken import NotTaken
from v2flow_cli.store.paths import user_path
from v2flow_cli.store.shard_index import MANIFEST, missing_shards
from v2flow_cli.store.text import printable

_CONVERT = "not a format that is read here; convert them to JPEG or PNG"
_UNPACK = "not an archive that is read here; unpack them, or make a .tar"
_REASONS = dict.fromkeys(
    ".heic .heif .hif .jxl .jp2 .j2k .svg .psd .psb .ai .eps .ico .tga .exr .hdr .xcf .raw .cr2 .cr3 .crw .nef .nrw "
    ".arw .srf .sr2 .dng .raf .orf .rw2 .pef .srw .x3f .3fr .erf .kdc .mrw .mos .iiq".split(),
    _CONVERT,
) | dict.fromkeys(".zip .7z .rar .zst .xz .bz2 .gz .lz4".split(), _UNPACK)


@dataclass(frozen=True)
class FoundFile:
    """A file and its key; see ``names.keys_of``."""

    path: Path
    key: str


@dataclass(frozen=True)
class Inputs:
    """The images and the tars among inputs, each with keys and sorted by them."""

    images: list[FoundFile]
    tars: list[FoundFile]


def find_inputs(
    inputs: Sequence[str | Path], *, not_taken: NotTaken | None = None, exclude: Path | None = None
) -> Inputs:
    """The images and tars among files, folders (searched recursively), globs and brace lists.

    Hidden files are left out; folders that are links are searched, each folder once. Shards that a manifest lists are
    among the tars even where their files are gone.

    Args:   not_taken, where whatever else lies there is counted; exclude, a folder that is not searched: the output.
    Raises: DataError for an input that does not exist, or that holds neither images nor tars.
    """
    left = NotTaken() if not_taken is None else not_taken
    images: list[tuple[Path, Path]] = []
    tars: list[tuple[Path, Path]] = []
    for given in inputs:
        root, paths = expand_input(str(given), not_taken=left, exclude=exclude)
        mine = [path for path in paths if suffix_of(path, SUFFIXES)]
        packed = [path for path in paths if is_tar(path)]
        packed += missing_shards(root, packed) if os.path.isdir(user_path(given)) else []
        if not mine and not packed:
            raise _nothing(given, paths, "images", SUFFIXES, left)
        images += ((root, path) for path in mine)
        tars += ((root, path) for path in packed)
        _count_rest(root, paths, mine, bool(packed), left)
    return Inputs(_with_keys(images, SUFFIXES), _with_keys(tars, TAR_SUFFIXES))


def find_images(
    inputs: Sequence[str | Path], *, not_taken: NotTaken | None = None, exclude: Path | None = None
) -> list[FoundFile]:
    """The images of ``find_inputs``.  Raises: DataError also for an input that holds tars alone."""
    left = NotTaken() if not_taken is None else not_taken
    found = find_inputs(inputs, not_taken=left, exclude=exclude)
    if not found.images:
        raise DataError(f"{', '.join(map(str, inputs))}: no images in it, but {len(found.tars)} tars.")
    for tar in found.tars:
        left.add(str(tar.path), "tars", "only image files are read here")
    return found.images


def find_tars(
    inputs: Sequence[str | Path], *, not_taken: NotTaken | None = None, exclude: Path | None = None
) -> list[FoundFile]:
    """The tars of ``find_inputs``.  Raises: DataError also for an input that holds images alone."""
    left = NotTaken() if not_taken is None else not_taken
    found = find_inputs(inputs, not_taken=left, exclude=exclude)
    if not found.tars:
        raise DataError(
            f"{', '.join(map(str, inputs))}: no .tar in it. `v2flow shard` makes tars from a folder of images."
        )
    for image in found.images:
        left.add(str(image.path), "images", "only tars are read here")
    return found.tars


def find_files(
    inputs: Sequence[str | Path], suffixes: Collection[str], what: str, *, not_taken: NotTaken | None = None
) -> list[FoundFile]:
    """The visible files with one of ``suffixes`` among the inputs, with keys and sorted by them; as ``find_inputs``.

    Raises: DataError for an input that does not exist or has no such file.
    """
    left = NotTaken() if not_taken is None else not_taken
    files: list[tuple[Path, Path]] = []
    for given in inputs:
        root, paths = expand_input(str(given), not_taken=left)
        mine = [path for path in paths if suffix_of(path, suffixes)]
        if not mine:
            raise _nothing(given, paths, what, suffixes, left)
        files += ((root, path) for path in mine)
        for path in paths:
            if not suffix_of(path, suffixes) and path.suffix.lower() not in (".json", ".jsonl", ".parquet"):
                left.add(str(path), f"{path.suffix.lower() or 'plain'} files", f"not {what}")
    return _with_keys(files, suffixes)


def _with_keys(files: Sequence[tuple[Path, Path]], suffixes: Collection[str]) -> list[FoundFile]:
    """Each file once, whichever inputs it lies in, with its key."""
    once = {os.path.abspath(path): (root, path) for root, path in reversed(files)}  # the first input's root counts
    ordered = sorted(once.values(), key=lambda file: os.fsencode(file[1]))
    keys = keys_of(ordered, suffixes)
    found = [FoundFile(path, key) for (_, path), key in zip(ordered, keys)]
    return sorted(found, key=lambda file: file.key)


def _nothing(given: str | Path, paths: Sequence[Path], what: str, suffixes: Iterable[str], left: NotTaken) -> DataError:
    """What to raise for an input without what is looked for; it says what lies there instead."""
    kinds = sorted({path.suffix.lower() or path.name for path in paths})
    there = f" It holds {', '.join(kinds[:8])}{', ...' if len(kinds) > 8 else ''}." if kinds else ""
    there += "".join(f" Not taken: {line}." for line in left.lines()[:4]) if not kinds else ""
    return DataError(printable(f"{given}: no {what} in it; they end in {', '.join(sorted(suffixes))}.{there}"))


def _count_rest(root: Path, paths: Sequence[Path], images: Sequence[Path], tars: bool, left: NotTaken) -> None:
    """Count what is neither an image, a tar, nor something that belongs to one."""
    captioned = {(path.parent, path.stem) for path in images}
    for path in paths:
        suffix = path.suffix.lower()
        if suffix_of(path, SUFFIXES) or is_tar(path) or (tars and _of_a_set(path)):
            continue
        if suffix == ".txt" and (path.parent, path.stem) in captioned:
            continue
        kind = f"{suffix} files" if suffix else "files without a suffix"
        reason = _REASONS.get(suffix, "no image has their name" if suffix == ".txt" else "not images")
        left.add(path.relative_to(root).as_posix(), kind, reason)


def _of_a_set(path: Path) -> bool:
    return path.name == MANIFEST or path.name.endswith((".index.jsonl", ".bad.jsonl"))


def expand_input(
    given: str, *, not_taken: NotTaken | None = None, exclude: Path | None = None
) -> tuple[Path, list[Path]]:
    """Root and visible files of one input: a folder, a file, a glob or a brace list (root: what precedes these).

    Raises: DataError if nothing is there, or the folder cannot be read.
    """
    left = NotTaken() if not_taken is None else not_taken
    path = user_path(given)
    if os.path.isdir(path):
        return path, list(_walk(path, left, exclude, given=True))
    if os.path.isfile(path):  # not Path.is_file, which raises for a name that is too long
        return path.parent, [path]
    if os.path.exists(path):
        raise DataError(f"{printable(given)}: neither a file nor a folder; save what it gives in a file first.")
    patterns = _braces(str(path))
    if len(patterns) == 1 and not glob.has_magic(given):
        link = " It is a link to nothing." if path.is_symlink() else ""
        raise DataError(
            f"{printable(given)}: no such file or folder.{link} Files, folders, globs ('imgs/*.jpg') and brace lists "
            "('set-{000000..000003}.tar') are read; the last two in quotes."
        )
    found: dict[Path, None] = {}
    for pattern in patterns:
        matches = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]
        if not matches or not os.path.exists(matches[0]):
            what = "no file matches" if glob.has_magic(pattern) else "no such file or folder"
            raise DataError(f"{printable(given)}: {what}{'' if pattern == given else f' ({printable(pattern)})'}.")
        for match in map(Path, matches):
            found.update(dict.fromkeys(_walk(match, left, exclude) if match.is_dir() else [match]))
    fixed = itertools.takewhile(lambda part: not glob.has_magic(part) and "{" not in part, path.parts[:-1])
    return Path(*fixed), list(found)


def _braces(text: str) -> list[str]:
    """What a brace list stands for: ``{000..002}.tar`` is three names."""
    try:
        return list(braceexpand(text, escape=False))
    except ValueError:  # the braces do not match: a name as any other
        return [text]


def _walk(root: Path, left: NotTaken, exclude: Path | None, given: bool = False) -> Iterator[Path]:
    """The visible files in and under ``root``; every folder once, links to folders followed after all others.

    So neither a loop of links nor two links to one folder give a file twice, and a folder has its own path rather
    than that of a link to it.

    Raises: DataError where ``root`` itself cannot be read and was ``given`` as such.
    """
    visited: set[tuple[int, int]] = set()
    kept_out = _identity(exclude) if exclude is not None else None
    waiting, links = [root], list[Path]()
    while waiting or links:
        folder, linked = (waiting.pop(), False) if waiting else (links.pop(0), True)
        try:
            identity = _identity(folder, strict=True)
            if identity == kept_out and folder != root:  # the root itself was asked for
                left.add(str(folder), "folders", "it is the output")
                continue
            if identity in visited:
                reason = "a link to a folder that is read already" if linked else "read already"
                left.add(str(folder), "folders", reason)
                continue
            visited.add(identity)  # type: ignore[arg-type]  # strict raises instead of returning None
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            if given and folder == root:
                raise DataError(f"{folder}: cannot be read ({error.strerror}).") from error
            reason = f"the folder cannot be read ({error.strerror}), and may hold images"
            left.lost.append(Failure(str(folder), reason, samples=None))
            continue
        folders: list[Path] = []
        for entry in entries:
            path = Path(folder, entry.name)
            is_folder = os.path.isdir(path) if entry.is_symlink() else entry.is_dir()  # a link may lead to itself
            if entry.name.startswith("."):
                if is_folder or suffix_of(entry.name, SUFFIXES) or is_tar(entry.name):
                    left.add(str(path), f"hidden {'folders' if is_folder else 'files'}", "their names begin with a dot")
            elif is_folder:
                (links if entry.is_symlink() else folders).append(path)
            elif os.path.isfile(path) or not os.path.exists(path):  # a link to nothing is listed when it is read
                yield path
            else:
                left.add(str(path), "special files", "not regular files")
        waiting += reversed(folders)


def _identity(folder: Path, strict: bool = False) -> tuple[int, int] | None:
    """What a folder is, whichever path leads to it; None (unless ``strict``: OSError) where there is none."""
    try:
        stat = os.stat(folder)
    except OSError:
        if strict:
            raise
        return None
    return stat.st_dev, stat.st_ino
