"""The number of tokens of the images of a set, by input."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from v2flow_cli.store.find import InputFile
from v2flow_cli.store.paths import user_path
from v2flow_cli.store.token_file import load_token_ids
from v2flow_cli.store.token_manifest import TokenManifest
from v2flow_cli.tokenizer.prefix import doublings

BAR_WIDTH = 40  # characters


@dataclass(frozen=True)
class LengthHistogram:
    """Images by number of tokens.  counts: images with at most ``up_to`` tokens and more than the bin before."""

    input: str
    images: int
    mean_tokens: float
    counts: Mapping[int, int]  # by ``up_to``: 1, 2, 4, ... and the maximum of an image

    def lines(self) -> Iterator[str]:
        """A heading, then a line with a bar for each bin."""
        yield f"{self.input}: {self.images:,} images, {self.mean_tokens:.1f} tokens on average"
        low, most = 1, max(self.counts.values())
        for up_to, count in self.counts.items():
            name = f"{low}" if low == up_to else f"{low}-{up_to}"
            bar = "#" * round(BAR_WIDTH * count / most)
            yield f"{name:>9}  {count:>{len(f'{most:,}')},}  {bar}".rstrip()
            low = up_to + 1


def inputs_of(inputs: Sequence[str], files: Sequence[InputFile]) -> dict[str, str]:
    """The input of each file, as the user wrote it, by the file's key; with a glob all inputs count as one."""
    paths = [os.path.abspath(user_path(text)) for text in inputs]
    if not all(map(os.path.exists, paths)):
        return dict.fromkeys((file.key for file in files), " ".join(inputs))

    def origin(path: str) -> str:
        return next(text for text, root in zip(inputs, paths) if path == root or path.startswith(root + os.sep))

    return {file.key: origin(os.path.abspath(file.path)) for file in files}


def length_histograms(folder: Path, manifest: TokenManifest, origins: Mapping[str, str]) -> list[LengthHistogram]:
    """One histogram for each input, of all token files of ``folder``, also those of earlier runs.

    Args:    origins, see ``inputs_of``.
    Raises:  TokenFileError for a damaged file.
    """
    lengths: dict[str, list[np.ndarray]] = {}
    for name in manifest.files:
        ids = np.atleast_2d(load_token_ids(folder / f"{name}.npy", manifest.codebook_size, *manifest.lengths))
        lengths.setdefault(origins[name], []).append((ids < manifest.codebook_size).sum(1))
    ends = doublings(manifest.tokens_per_image)
    histograms = []
    for origin in sorted(lengths, key=[*origins.values()].index):
        values = np.concatenate(lengths[origin])
        bins = np.bincount(np.searchsorted(ends, values), minlength=len(ends))
        histograms.append(LengthHistogram(origin, len(values), float(values.mean()), dict(zip(ends, bins.tolist()))))
    return histograms
