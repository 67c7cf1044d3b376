"""Finds the images, tars and files of inputs (files, folders, globs, brace lists), alike for every command."""

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

_CONVERT = "the format is not supported; convert them to JPEG or PNG"
_UNPACK = "the archive is not supported; unpack them, or make a .tar"
_REASONS = dict.fromkeys(
    ".heic .heif .hif .jxl .jp2 .j2k .svg .psd .psb .ai .eps .ico .tga .exr .hdr .xcf .raw .cr2 .cr3 .crw .nef .nrw "
    ".arw .srf .sr2 .dng .raf .orf .rw2 .pef .srw .x3f .3fr .erf .kdc .mrw .mos .iiq".split(),
    _CONVERT,
) | dict.fromkeys(".zip .7z .rar .zst .xz .bz2 .gz .lz4".split(), _UNPACK)


@dataclass(frozen=True)
class InputFile:
    """An input file and its key; see ``names.keys_of``."""

    path: Path
    key: str


@dataclass(frozen=True)
class Inputs:
    """The images and the tars among inputs, both sorted by key."""

    images: list[InputFile]
    tars: list[InputFile]

    def check_one_kind(self, source: str) -> None:
        """Raises: DataError for both images and tars."""
        if self.images and self.tars:
            raise DataError(f"{source}: holds both images and tars. Name one kind at a time: the tars, or the images.")


def find_inputs(
    inputs: Sequence[str | Path], *, not_taken: NotTaken | None = None, exclude: Path | None = None
) -> Inputs:
    """The images and tars among files, folders (searched recursively), globs and brace lists.

    Hidden files are left out; linked folders are searched, each folder once. Shards that a manifest lists are among the
    tars even if their files are missing.

    Args:   not_taken, to which all other files are added; exclude, a folder that is not searched: the output.
    Raises: DataError for an input that does not exist, or that holds neither images nor tars.
    """
    left = NotTaken() if not_taken is None else not_taken
    images: list[tuple[Path, Path]] = []
    tars: list[tuple[Path, Path]] = []
    for source in inputs:
        root, paths = expand_input(str(source), not_taken=left, exclude=exclude)
        image_paths = [path for path in paths if suffix_of(path, SUFFIXES)]
        tar_paths = [path for path in paths if is_tar(path)]
        tar_paths += missing_shards(root, tar_paths) if os.path.isdir(user_path(source)) else []
        if not image_paths and not tar_paths:
            raise _nothing(source, paths, "images", SUFFIXES, left)
        images += ((root, path) for path in image_paths)
        tars += ((root, path) for path in tar_paths)
        _count_rest(root, paths, image_paths, bool(tar_paths), left)
    return Inputs(_with_keys(images, SUFFIXES), _with_keys(tars, TAR_SUFFIXES))


def find_images(
    inputs: Sequence[str | Path], *, not_taken: NotTaken | None = None, exclude: Path | None = None
) -> list[InputFile]:
    """The images of ``find_inputs``.  Raises: DataError also for inputs that hold only tars."""
    left = NotTaken() if not_taken is None else not_taken
    files = find_inputs(inputs, not_taken=left, exclude=exclude)
    if not files.images:
        raise DataError(f"{', '.join(map(str, inputs))}: no images in it, but {len(files.tars)} tars.")
    for tar in files.tars:
        left.add(str(tar.path), "tars", "only image files are read here")
    return files.images


def find_tars(
    inputs: Sequence[str | Path], *, not_taken: NotTaken | None = None, exclude: Path | None = None
) -> list[InputFile]:
    """The tars of ``find_inputs``.  Raises: DataError also for inputs that hold only images."""
    left = NotTaken() if not_taken is None else not_taken
    files = find_inputs(inputs, not_taken=left, exclude=exclude)
    if not files.tars:
        raise DataError(
            f"{', '.join(map(str, inputs))}: no .tar in it. `v2flow shard` makes tars from a folder of images."
        )
    for image in files.images:
        left.add(str(image.path), "images", "only tars are read here")
    return files.tars


def find_files(
    inputs: Sequence[str | Path], suffixes: Collection[str], what: str, *, not_taken: NotTaken | None = None
) -> list[InputFile]:
    """The visible files with one of ``suffixes`` among the inputs, with keys and sorted by them; as ``find_inputs``.

    Raises: DataError for an input that does not exist or has no such file.
    """
    left = NotTaken() if not_taken is None else not_taken
    files: list[tuple[Path, Path]] = []
    for source in inputs:
        root, paths = expand_input(str(source), not_taken=left)
        matches = [path for path in paths if suffix_of(path, suffixes)]
        if not matches:
            raise _nothing(source, paths, what, suffixes, left)
        files += ((root, path) for path in matches)
        for path in paths:
            if not suffix_of(path, suffixes) and path.suffix.lower() not in (".json", ".jsonl", ".parquet"):
                left.add(str(path), f"{path.suffix.lower() or 'plain'} files", f"not {what}")
    return _with_keys(files, suffixes)


def _with_keys(files: Sequence[tuple[Path, Path]], suffixes: Collection[str]) -> list[InputFile]:
    """Each file with its key, once even if several inputs contain it."""
    once = {os.path.abspath(path): (root, path) for root, path in reversed(files)}  # the first input's root counts
    ordered = sorted(once.values(), key=lambda file: os.fsencode(file[1]))
    keys = keys_of(ordered, suffixes)
    keyed = [InputFile(path, key) for (_, path), key in zip(ordered, keys)]
    return sorted(keyed, key=lambda file: file.key)


def _nothing(
    source: str | Path, paths: Sequence[Path], what: str, suffixes: Iterable[str], left: NotTaken
) -> DataError:
    """The error for an input without the files that are needed; it lists the files that the input has."""
    kinds = sorted({path.suffix.lower() or path.name for path in paths})
    content = f" It holds {', '.join(kinds[:8])}{', ...' if len(kinds) > 8 else ''}." if kinds else ""
    content += "".join(f" Not taken: {line}." for line in left.lines()[:4]) if not kinds else ""
    return DataError(printable(f"{source}: no {what} in it; they end in {', '.join(sorted(suffixes))}.{content}"))


def _count_rest(root: Path, paths: Sequence[Path], images: Sequence[Path], tars: bool, left: NotTaken) -> None:
    """Count the files that are no image, no tar, and do not belong to one."""
    captioned = {(path.parent, path.stem) for path in images}
    for path in paths:
        suffix = path.suffix.lower()
        if suffix_of(path, SUFFIXES) or is_tar(path) or (tars and _belongs_to_shards(path)):
            continue
        if suffix == ".txt" and (path.parent, path.stem) in captioned:
            continue
        kind = f"{suffix} files" if suffix else "files without a suffix"
        reason = _REASONS.get(suffix, "no image has the same name" if suffix == ".txt" else "not images")
        left.add(path.relative_to(root).as_posix(), kind, reason)


def _belongs_to_shards(path: Path) -> bool:
    return path.name == MANIFEST or path.name.endswith((".index.jsonl", ".bad.jsonl"))


def expand_input(
    source: str, *, not_taken: NotTaken | None = None, exclude: Path | None = None
) -> tuple[Path, list[Path]]:
    """Root and visible files of one input: a folder, a file, a glob or a brace list (root: its fixed first folders).

    Raises: DataError if it does not exist, or the folder cannot be read.
    """
    left = NotTaken() if not_taken is None else not_taken
    path = user_path(source)
    if os.path.isdir(path):
        return path, list(_walk(path, left, exclude, strict=True))
    if os.path.isfile(path):  # not Path.is_file, which raises for a name that is too long
        return path.parent, [path]
    if os.path.exists(path):
        raise DataError(f"{printable(source)}: neither a file nor a folder; save its content in a file first.")
    patterns = _braces(str(path))
    if len(patterns) == 1 and not glob.has_magic(source):
        link = " It is a link whose target is missing." if path.is_symlink() else ""
        raise DataError(
            f"{printable(source)}: no such file or folder.{link} Files, folders, globs ('imgs/*.jpg') and brace lists "
            "('set-{000000..000003}.tar') are read; the last two in quotes."
        )
    files: dict[Path, None] = {}
    for pattern in patterns:
        matches = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]
        if not matches or not os.path.exists(matches[0]):
            what = "no file matches" if glob.has_magic(pattern) else "no such file or folder"
            raise DataError(f"{printable(source)}: {what}{'' if pattern == source else f' ({printable(pattern)})'}.")
        for match in map(Path, matches):
            files.update(dict.fromkeys(_walk(match, left, exclude) if match.is_dir() else [match]))
    fixed = itertools.takewhile(lambda part: not glob.has_magic(part) and "{" not in part, path.parts[:-1])
    return Path(*fixed), list(files)


def _braces(text: str) -> list[str]:
    """The names of a brace list: ``{000..002}.tar`` is three names."""
    try:
        return list(braceexpand(text, escape=False))
    except ValueError:  # unbalanced braces: an ordinary name
        return [text]


def _walk(root: Path, left: NotTaken, exclude: Path | None, strict: bool = False) -> Iterator[Path]:
    """The visible files in and under ``root``; every folder once, linked folders after all others.

    No file appears twice, neither in a loop of links nor through two links to one folder, and a folder has its own path
    rather than that of a link.

    Raises: DataError if ``strict`` and ``root`` itself cannot be read.
    """
    visited: set[tuple[int, int]] = set()
    excluded = _identity(exclude) if exclude is not None else None
    waiting, links = [root], list[Path]()
    while waiting or links:
        folder, linked = (waiting.pop(), False) if waiting else (links.pop(0), True)
        try:
            identity = _identity(folder, strict=True)
            if identity == excluded and folder != root:  # the root itself is an input
                left.add(str(folder), "folders", "it is the output")
                continue
            if identity in visited:
                reason = "a link to a folder that was read already" if linked else "read already"
                left.add(str(folder), "folders", reason)
                continue
            visited.add(identity)  # type: ignore[arg-type]  # strict raises instead of returning None
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            if strict and folder == root:
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
            elif os.path.isfile(path) or not os.path.exists(path):  # a broken link is reported when it is read
                yield path
            else:
                left.add(str(path), "special files", "not regular files")
        waiting += reversed(folders)


def _identity(folder: Path, strict: bool = False) -> tuple[int, int] | None:
    """Device and inode of a folder; None (if ``strict``: OSError) if there is none."""
    try:
        stat = os.stat(folder)
    except OSError:
        if strict:
            raise
        return None
    return stat.st_dev, stat.st_ino
