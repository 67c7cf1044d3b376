"""The range of every number in a recipe, by its field's name; checked before ``rules.py``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

LARGEST_SEED = 2**32 - 1  # of numpy's generators
LARGEST = 2**53  # the largest number to which a float counts exactly

LARGEST_SIZE = 2**24  # of a dimension of weights; the bytes of a convolution's weights then fit into 64 bits
MOST_SAMPLING_STEPS = 10_000  # of a decoder

_AT_LEAST_1 = (
    "accumulate batch_size block_size cache_crops crop_size image_size keep_checkpoints log_every max_caption_tokens "
    "max_positions max_tokens patch_size repeats shuffle_shards shuffle_window steps"
)
_SIZES = (
    "code_size codebook_size decoder_width encoder_width hidden_size intermediate_size latent_channels num_heads "
    "num_kv_heads num_layers rank vocab_size"
)
_SAMPLING_STEPS = "num_flow_steps num_mask_steps"
_SHARES = "error_budget label_share mask_ratio_min max_scale min_scale pixel_share share token_noise top_p usage_floor"
_SHARES_BELOW_1 = (
    "betas caption_dropout dropout ema_decay guidance_dropout held_out_share image_to_text_share usage_decay"
)
_ABOVE_0 = "logit_scale mlp_ratio time_shift"
_ANY = "apg_momentum apg_parallel"

# (least, most, whether least is allowed, whether most is allowed, the expected value in words)
_Range = tuple[float, float, bool, bool, str]
_DEFAULT: _Range = (0, LARGEST, True, True, "a number from 0 up")
_RANGES: dict[str, _Range] = {
    **dict.fromkeys(_AT_LEAST_1.split(), (1, LARGEST, True, True, "at least 1")),
    **dict.fromkeys(_SIZES.split(), (1, LARGEST_SIZE, True, True, f"a whole number from 1 to {LARGEST_SIZE:,}")),
    **dict.fromkeys(
        _SAMPLING_STEPS.split(),
        (1, MOST_SAMPLING_STEPS, True, True, f"a whole number from 1 to {MOST_SAMPLING_STEPS:,}"),
    ),
    **dict.fromkeys(_SHARES.split(), (0, 1, True, True, "a share in [0, 1]")),
    **dict.fromkeys(_SHARES_BELOW_1.split(), (0, 1, True, False, "a share in [0, 1)")),
    **dict.fromkeys(_ABOVE_0.split(), (0, LARGEST, False, True, "a number above 0")),
    **dict.fromkeys(_ANY.split(), (-LARGEST, LARGEST, True, True, "a finite number")),
    "seed": (0, LARGEST_SEED, True, True, f"a whole number from 0 to {LARGEST_SEED}"),
}


def out_of_range(tree: Any, prefix: str = "") -> Iterator[str]:
    """One sentence for each number of a recipe, or section, that is not finite or not in its range.

    Also for a text with a zero byte, which no path or name can have, and for an empty output.
    """
    for field in dataclasses.fields(tree):
        value, where = getattr(tree, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from out_of_range(value, f"{where}.")
            continue
        several = isinstance(value, tuple)
        for part in value if several else (value,):
            if isinstance(part, str) and "\0" in part:
                yield f"{where} is {value!r}; expected text without a zero byte"
            if field.name == "output" and not part.strip():
                yield f"{where} is {part!r}; expected a folder"
            if isinstance(part, int | float) and not isinstance(part, bool):
                least, most, with_least, with_most, expected = _RANGES.get(field.name, _DEFAULT)
                above = part >= least if with_least else part > least
                below = part <= most if with_most else part < most
                if not (above and below and math.isfinite(part)):
                    yield f"{where} is {list(value) if several else value}; expected {expected}"
                    break
