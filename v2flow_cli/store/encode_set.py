"""Sets of images to sets of tokens: what ``v2flow encode`` does, without the command line.

Images are read and decoded a few batches ahead in threads; the set is never in memory, a shard's ids are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from v2flow_cli.errors import DataError, TokenFileError
from v2flow_cli.store.files import check_absent, map_ahead
from v2flow_cli.store.images import FoundFile, open_image
from v2flow_cli.store.shards import SampleIndex, captions_of, index_shard, read_member
from v2flow_cli.store.token_file import TokenManifest, load_samples, save_samples, save_token_ids
from v2flow_cli.tokenizer import V2FlowTokenizer

Tick = Callable[[int], None]


@dataclass(frozen=True)
class Failure:
    """Something that was left out, and why."""

    source: str
    reason: str


@dataclass
class EncodeReport:
    """What an encoding wrote, kept and left out."""

    manifest: TokenManifest
    images: int = 0  # encoded by this call
    files: int = 0  # token files written by this call
    kept_files: int = 0  # finished ones of an earlier call
    failures: list[Failure] = field(default_factory=list)


class SetEncoder:
    """Images to ids in batches, the bad ones put aside.

    Args:   image_size, side in pixels (default: the tokenizer's); batch_size, images; workers, threads that
            decode; dtype, what the tokenizer computes in.
    Raises: DataError for an image size that the tokenizer cannot take.
    """

    def __init__(
        self,
        tokenizer: V2FlowTokenizer,
        *,
        image_size: int | None = None,
        batch_size: int = 8,
        workers: int = 2,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.tokenizer, self.batch_size, self.workers, self.dtype = tokenizer, batch_size, workers, dtype
        self.image_size = image_size or tokenizer.config.image_size
        try:
            length = tokenizer.num_tokens(self.image_size, self.image_size)
        except ValueError as error:
            raise DataError(f"--res {self.image_size}: {error}") from error
        size = (self.image_size, self.image_size)
        self.empty_manifest = TokenManifest(tokenizer.digest, size, tokenizer.config.codebook_size, length)

    def encode(
        self, items: Iterable[tuple[str, str, Path | bytes]], failures: list[Failure], tick: Tick
    ) -> Iterator[tuple[str, np.ndarray]]:
        """(key, ids (L,) int64) of each good (key, name, image) in order; bad ones go to ``failures``."""
        batch: list[tuple[str, Tensor]] = []
        ahead = 2 * self.batch_size + self.workers
        for key, name, pixels in map_ahead(self._load, items, self.workers, ahead):
            if isinstance(pixels, DataError):
                failures.append(Failure(name, str(pixels).removeprefix(f"{name}: ")))
                tick(1)
                continue
            batch.append((key, pixels))
            if len(batch) == self.batch_size:
                yield from self._encode_batch(batch, tick)
                batch = []
        if batch:
            yield from self._encode_batch(batch, tick)

    def _load(self, item: tuple[str, str, Path | bytes]) -> tuple[str, str, Tensor | DataError]:
        key, name, source = item
        try:
            image = open_image(source, name)
        except DataError as error:
            return key, name, error
        return key, name, self.tokenizer.image_processor.preprocess_one(image, self.image_size)

    def _encode_batch(self, batch: list[tuple[str, Tensor]], tick: Tick) -> Iterator[tuple[str, np.ndarray]]:
        device = self.tokenizer.device
        images = torch.stack([pixels for _, pixels in batch]).to(device)  # (B, 3, H, W)
        with (
            torch.inference_mode(),
            torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32),
        ):
            token_ids = self.tokenizer.encode(images).cpu().numpy()  # (B, L)
        tick(len(batch))
        yield from zip((key for key, _ in batch), token_ids)


def encode_files(
    encoder: SetEncoder, images: Sequence[FoundFile], out: Path, *, force: bool, tick: Tick
) -> EncodeReport:
    """One ``.npy`` (L,) per image, the input's tree mirrored under ``out``, and the manifest.

    Raises: DataError for an output that exists; TokenFileError where ``out`` holds other tokens (both unless
            ``force``). Bad images end in the report's failures.
    """
    targets = {image.key: out / f"{image.key}.npy" for image in images}
    check_absent(targets.values(), force)
    report = EncodeReport(_manifest_of(out, encoder, force) or encoder.empty_manifest)
    items = ((image.key, str(image.path), image.path) for image in images)
    files = dict(report.manifest.files)
    try:
        for key, token_ids in encoder.encode(items, report.failures, tick):
            save_token_ids(targets[key], token_ids, report.manifest.codebook_size)
            files[key] = 1
            report.images += 1
    finally:  # an interrupted run leaves a manifest of what it wrote
        report.files = report.images
        report.manifest = dataclasses.replace(report.manifest, files=files)
        if report.images:
            report.manifest.save(out)
    return report


def encode_shards(
    encoder: SetEncoder, shards: Sequence[FoundFile], out: Path, *, force: bool, tick: Tick
) -> EncodeReport:
    """One ``.npy`` (N, L) per shard with keys and captions beside it, and the manifest.

    Shards that an earlier run of the same tokenizer and size finished are kept, unless ``force``.
    Raises: DataError for an output that exists and is not of such a run; TokenFileError where ``out`` holds
            other tokens. Bad images and damaged shards end in the report's failures.
    """
    existing = _manifest_of(out, encoder, force)
    if existing is None:
        check_absent((out / f"{shard.key}.npy" for shard in shards), force)
    report = EncodeReport(encoder.empty_manifest if existing is None else existing)
    report.manifest.save(out)  # from here on a re-run knows the files as its own
    for shard in shards:
        target = out / f"{shard.key}.npy"
        try:
            samples = [sample for sample in index_shard(shard.path) if sample.image is not None]
            if not force and shard.key in report.manifest.files and target.exists():
                report.failures += _left_out(shard, samples, target)
                report.kept_files += 1
                tick(len(samples))
                continue
            rows = _encode_shard(encoder, shard, samples, report.failures, tick)
        except DataError as error:
            report.failures.append(Failure(str(shard.path), str(error).removeprefix(f"{shard.path}: ")))
            continue
        save_samples(target, [(key, captions) for key, captions, _ in rows])
        save_token_ids(target, np.stack([ids for _, _, ids in rows]), report.manifest.codebook_size)
        files = {**report.manifest.files, shard.key: len(rows)}
        report.manifest = dataclasses.replace(report.manifest, files=files)
        report.manifest.save(out)
        report.images += len(rows)
        report.files += 1
    return report


def _left_out(shard: FoundFile, samples: Sequence[SampleIndex], target: Path) -> list[Failure]:
    """What the run that finished ``shard`` had to leave out.  Raises: DataError if the shard has changed."""
    done = {key for key, _ in load_samples(target) or ()}
    keys = [sample.key for sample in samples]
    if not done <= set(keys):
        raise DataError(f"{shard.path}: holds other keys than {target}. Use --force to encode it again.")
    return [Failure(f"{shard.path}/{key}", "left out by an earlier run") for key in keys if key not in done]


def _encode_shard(
    encoder: SetEncoder, shard: FoundFile, samples: Sequence[SampleIndex], failures: list[Failure], tick: Tick
) -> list[tuple[str, tuple[str, ...], np.ndarray]]:
    """(key, captions, ids (L,)) of each good image.  Raises: DataError if there is none."""
    captions: dict[str, tuple[str, ...]] = {}

    def items() -> Iterator[tuple[str, str, bytes]]:
        with open(shard.path, "rb") as file:
            for sample in samples:
                assert sample.image is not None  # the caller keeps no other
                captions[sample.key] = captions_of(file, sample)
                content = read_member(file, sample.members[sample.image])
                yield sample.key, f"{shard.path}/{sample.key}", content

    rows = [(key, captions[key], ids) for key, ids in encoder.encode(items(), failures, tick)]
    if not rows:
        raise DataError(f"{shard.path}: no image in it that could be encoded.")
    return rows


def _manifest_of(out: Path, encoder: SetEncoder, force: bool) -> TokenManifest | None:
    """The manifest in ``out`` if it is of the same tokens; None where there is none or it may go."""
    existing = TokenManifest.load(out)
    if existing is None or existing.same_tokens(encoder.empty_manifest):
        return existing
    if force:
        return None
    raise TokenFileError(
        f"{out}: holds tokens of tokenizer {existing.tokenizer_digest} at {existing.image_size[0]} px; "
        f"these are of {encoder.tokenizer.digest} at {encoder.image_size} px. Use another -o, or --force."
    )
