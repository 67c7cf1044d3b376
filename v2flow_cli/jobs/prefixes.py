"""How many tokens an image gets: all, the first K, or the fewest that reach a PSNR."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from v2flow_cli.errors import DataError
from v2flow_cli.jobs.decode import image_seed
from v2flow_cli.tokenizer import V2FlowTokenizer
from v2flow_cli.tokenizer.prefix import doublings
from v2flow_cli.tokenizer.preprocess import psnr, to_uint8


@dataclass(frozen=True)
class Prefixes:
    """The settings of ``encode --tokens`` and ``--max-error``; without both, every token is kept.

    tokens: keep the first so many, or encode at that length if the tokenizer has several; min_psnr_db: keep the fewest
    that reach this PSNR.
    """

    tokens: int | None = None
    min_psnr_db: float | None = None

    def longest(self, tokenizer: V2FlowTokenizer, height: int, width: int) -> int:
        """The longest sequence that is written for an image of ``height`` x ``width`` pixels.

        Raises:  DataError for a tokenizer without prefixes, or without that many tokens.
        """
        whole, *others = tokenizer.lengths(height, width)
        if self.tokens is None and self.min_psnr_db is None:
            return whole
        if not tokenizer.flexible:
            if self.tokens in (whole, *others) and self.min_psnr_db is None:
                return self.tokens
            option = "--max-error" if self.tokens is None else f"--tokens {self.tokens}"
            possible = " or ".join(str(length) for length in sorted((whole, *others)))
            raise DataError(
                f"{option}: this tokenizer writes {possible} tokens an image. Prefixes need a tokenizer of "
                "flexible length, such as that of recipes/flextok/small.yaml."
            )
        if self.tokens is not None and not 1 <= self.tokens <= whole:
            raise DataError(f"--tokens {self.tokens}: this tokenizer has 1 to {whole} tokens an image.")
        return self.tokens or whole


def shortest_prefixes(
    tokenizer: V2FlowTokenizer, images: Tensor, token_ids: Tensor, keys: Sequence[str], min_psnr_db: float
) -> list[int | None]:
    """For each image the length of the shortest prefix of its ids (B, L) that reaches ``min_psnr_db``; None if none.

    Each prefix is decoded with the defaults of ``v2flow decode``, including seed 0 and the key. The lengths 1, 2, 4,
    ... and L are tried until one is good enough, then a bisection between it and the one before it follows: at most
    2 log2 L images per image. The PSNR need not rise with every token, so an even shorter prefix may suffice.
    """
    reference = to_uint8(images)
    height, width = images.shape[-2:]
    longest = token_ids.shape[1]
    seeds = [image_seed(0, key) for key in keys]

    def good(rows: list[int], lengths: list[int]) -> list[bool]:
        decoded = tokenizer.decode(
            token_ids[rows], lengths=lengths, height=height, width=width, seeds=[seeds[i] for i in rows]
        )
        return (psnr(reference[rows], to_uint8(decoded)) >= min_psnr_db).tolist()

    bad_at, good_at = [0] * len(keys), [0] * len(keys)  # the longest length that failed, the shortest that was good
    open_ = list(range(len(keys)))
    for length in doublings(longest):
        results = good(open_, [length] * len(open_)) if open_ else []
        for i, reached in zip(open_, results):
            (good_at if reached else bad_at)[i] = length
        open_ = [i for i, reached in zip(open_, results) if not reached]
    while open_ := [i for i in range(len(keys)) if good_at[i] - bad_at[i] > 1]:
        middle = [(good_at[i] + bad_at[i]) // 2 for i in open_]
        for i, length, reached in zip(open_, middle, good(open_, middle)):
            (good_at if reached else bad_at)[i] = length
    return [length or None for length in good_at]
