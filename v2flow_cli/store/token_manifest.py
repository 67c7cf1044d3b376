"""The ``manifest.json`` of a token folder: the tokenizer's digest, sizes, and files. ``token_file`` has the files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from v2flow_cli.errors import DataError, TokenFileError
from v2flow_cli.store.files import write_bytes

FORMAT = "v2flow-tokens"
FORMAT_VERSION = 3  # 2 if lengths vary but all images are square, 1 if neither: older readers can still read those
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class TokenManifest:
    """The tokenizer, sizes and files of the tokens in a folder."""

    tokenizer_digest: str  # V2FlowTokenizer.token_digest
    image_size: tuple[int, int]  # height and width in pixels of the encoded images
    codebook_size: int  # K: ids lie in [0, K)
    tokens_per_image: int  # L; the maximum if lengths vary
    files: dict[str, int] = field(default_factory=dict)  # path under the folder without .npy -> images in it
    variable_length: bool = False  # images have 1 to tokens_per_image tokens
    min_psnr_db: float | None = None  # the PSNR by which the lengths were chosen, if they were
    sources: dict[str, str] = field(default_factory=dict)  # of files that come from tars: the tar's fingerprint
    keep_aspect: bool = False  # each image has its own size, with an area near that of ``image_size``
    refine_steps: int = 0  # gradient steps after the encoder (``encode --refine``)
    refined_by: str = ""  # V2FlowTokenizer.digest, if there were any: they depend on the decoder too

    @property
    def count(self) -> int:
        """Images in all files."""
        return sum(self.files.values())

    @property
    def lengths(self) -> tuple[int, bool]:
        """(L, whether lengths vary up to it), for ``load_token_ids``."""
        return self.tokens_per_image, self.variable_length

    def same_tokens(self, other: TokenManifest) -> bool:
        """True if both describe ids of the same tokenizer, image size and length."""
        return self._identity() == other._identity()

    def _identity(self) -> tuple[Any, ...]:
        lengths = self.tokens_per_image, self.variable_length, self.min_psnr_db
        tokenizer = self.tokenizer_digest, self.codebook_size, self.refine_steps, self.refined_by
        return *tokenizer, self.image_size, self.keep_aspect, *lengths

    @property
    def description(self) -> str:
        """What ``same_tokens`` compares, for messages."""
        shapes = ", in their own shapes" if self.keep_aspect else ""
        length = f", {'up to ' if self.variable_length else ''}{self.tokens_per_image} tokens an image"
        target = f" for {self.min_psnr_db:g} dB" if self.min_psnr_db is not None else ""
        refined = f", refined in {self.refine_steps} steps by model {self.refined_by}" if self.refine_steps else ""
        return f"tokenizer {self.tokenizer_digest} at {self.image_size[0]} px{shapes}{length}{target}{refined}"

    def check_square(self, where: str | Path) -> None:
        """Raises: TokenFileError for images that keep their shapes, because a language model draws squares."""
        if self.keep_aspect:
            raise TokenFileError(
                f"{where}: its images keep their shapes (`encode --aspect keep`), but a language model draws squares. "
                "Encode them with --aspect square."
            )

    def check_tokenizer(self, digest: str, where: str | Path) -> None:
        """Raises: TokenFileError if the ids are not those of the tokenizer with ``digest``."""
        if self.tokenizer_digest != digest:
            raise TokenFileError(
                f"{where}: encoded by tokenizer {self.tokenizer_digest}, but this tokenizer is {digest}. "
                "Use the --model that encoded them."
            )

    def save(self, folder: Path) -> None:
        """Write ``folder/manifest.json``.  Raises: DataError if a manifest of something else exists there."""
        check_manifest_is_ours(folder)
        write_bytes(folder / MANIFEST, json.dumps(self.record(), indent=1, ensure_ascii=False).encode())

    def record(self) -> dict[str, Any]:
        """The manifest as a JSON object."""
        return {
            "format": FORMAT,
            "format_version": 3 if self.keep_aspect else 2 if self.variable_length else 1,
            "tokenizer_digest": self.tokenizer_digest,
            "image_size": list(self.image_size),
            "codebook_size": self.codebook_size,
            "tokens_per_image": self.tokens_per_image,
            **({"variable_length": True, "min_psnr_db": self.min_psnr_db} if self.variable_length else {}),
            **({"aspect": "keep"} if self.keep_aspect else {}),
            **({"refine_steps": self.refine_steps, "refined_by": self.refined_by} if self.refine_steps else {}),
            "count": self.count,
            "files": self.files,
            **({"sources": self.sources} if self.sources else {}),
        }

    @classmethod
    def load(cls, folder: Path) -> TokenManifest | None:
        """The manifest in ``folder``; None if there is none, or a file of that name with another purpose.

        Raises: TokenFileError if it is damaged, inconsistent, or of a newer format version.
        """
        path = folder / MANIFEST
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise TokenFileError(f"{path}: cannot be read as JSON ({error}).") from error
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            return None
        return cls.of_record(record, path)

    @classmethod
    def of_record(cls, record: dict[str, Any], path: Path) -> TokenManifest:
        """The inverse of ``record``, for an object read from ``path``.  Raises: TokenFileError as ``load``."""
        version: Any = record.get("format_version")
        if not is_count(version):
            raise TokenFileError(f"{path}: format_version is {version!r}; expected {FORMAT_VERSION}.")
        if version > FORMAT_VERSION:
            raise TokenFileError(
                f"{path}: format version {version}; this v2flow reads up to {FORMAT_VERSION}. Update v2flow."
            )
        digest: Any = record.get("tokenizer_digest")
        size: Any = record.get("image_size")
        files: Any = record.get("files")
        size = [size, size] if is_count(size) else size
        problem = None
        if not isinstance(digest, str):
            problem = f"tokenizer_digest is {digest!r}; expected a string"
        elif not isinstance(size, list) or len(size) != 2 or not all(map(is_count, size)):
            problem = f"image_size is {size!r}; expected [height, width] in pixels"
        elif not isinstance(files, dict) or not all(map(is_count, files.values())):
            problem = "files is not a mapping of names to counts"
        else:
            for name in ("codebook_size", "tokens_per_image"):
                if not is_count(record.get(name)):
                    problem = f"{name} is {record.get(name)!r}; expected a positive integer"
        if problem:
            raise TokenFileError(f"{path}: {problem}. Encode the images again.")
        variable: Any = record.get("variable_length", False)
        least: Any = record.get("min_psnr_db")
        if type(variable) is not bool or not (least is None or isinstance(least, float | int)):
            raise TokenFileError(
                f"{path}: variable_length is {variable!r} and min_psnr_db {least!r}; expected true or false, and a "
                "number or null. Encode the images again."
            )
        sources: Any = record.get("sources", {})
        if not isinstance(sources, dict) or set(map(type, sources.values())) - {str}:
            raise TokenFileError(f"{path}: sources is not a mapping of names to fingerprints. Encode the images again.")
        aspect: Any = record.get("aspect", "square")
        if aspect not in ("square", "keep"):
            raise TokenFileError(f"{path}: aspect is {aspect!r}; expected square or keep. Encode the images again.")
        refined: Any = (record.get("refine_steps", 0), record.get("refined_by", ""))
        if not (refined[0] == 0 or is_count(refined[0])) or not isinstance(refined[1], str):
            raise TokenFileError(
                f"{path}: refine_steps is {refined[0]!r} and refined_by {refined[1]!r}; expected a number and a "
                "digest. Encode the images again."
            )
        counts = record["codebook_size"], record["tokens_per_image"]
        shapes = aspect == "keep"
        manifest = cls(digest, (size[0], size[1]), *counts, files, variable, least, sources, shapes, *refined)
        if record.get("count") != manifest.count:
            raise TokenFileError(f"{path}: count is {record.get('count')!r}; files add up to {manifest.count}.")
        return manifest


def load_manifest(folder: Path) -> TokenManifest:
    """The manifest of the tokens in ``folder``.  Raises: TokenFileError as ``TokenManifest.load``, and for none."""
    manifest = TokenManifest.load(folder)
    if manifest is None:
        raise TokenFileError(f"{folder}: no token manifest in it; expected the output of `v2flow encode`.")
    return manifest


def check_manifest_is_ours(folder: Path) -> None:
    """Raises: DataError if ``folder/manifest.json`` is not that of a token set: it must not be overwritten."""
    if (folder / MANIFEST).exists() and TokenManifest.load(folder) is None:
        raise DataError(
            f"{folder / MANIFEST}: exists, and is not the manifest of a set of tokens. It would be overwritten. Use "
            "another -o, or move it away."
        )


def is_count(value: Any) -> bool:
    """True for a whole number above 0."""
    return type(value) is int and value > 0


def find_manifest(
    file: Path, load: Callable[[Path], TokenManifest | None] = TokenManifest.load
) -> TokenManifest | None:
    """The manifest that lists ``file`` (an ``.npy``), in its folder or one above it; None if there is none.

    Args:   load, as TokenManifest.load, possibly with a cache.
    Raises: TokenFileError for a damaged or newer manifest in one of these folders.
    """
    file = file.absolute()
    for folder in file.parents:
        manifest = load(folder)
        if manifest is not None:
            listed = file.relative_to(folder).with_suffix("").as_posix() in manifest.files
            return manifest if listed else None
    return None
