"""Shapes of published models, to plan a run without downloading them, or to time it on random weights."""

from __future__ import annotations

from typing import Any

_DC_CHANNELS = {"encoder_block_out_channels": (128, 256, 512, 512, 1024, 1024)}
_DC_CHANNELS["decoder_block_out_channels"] = _DC_CHANNELS["encoder_block_out_channels"]
_DC_BLOCKS = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
_SCALES_OF_SANA = ((), (), (), (5,), (5,), (5,))

# Specs for `tokenizer.latents.Latents`, by hub id; their scale is 1, because it is stored with the weights.
AUTOENCODERS: dict[str, dict[str, Any]] = {
    # diffusers' script that converts the DC-AE checkpoints
    "mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers": {
        "class": "AutoencoderDC",
        "latent_channels": 32,
        "encoder_block_types": _DC_BLOCKS,
        "decoder_block_types": _DC_BLOCKS,
        "encoder_layers_per_block": (2, 2, 2, 3, 3, 3),
        "decoder_layers_per_block": (3, 3, 3, 3, 3, 3),
        "encoder_qkv_multiscales": _SCALES_OF_SANA,
        "decoder_qkv_multiscales": _SCALES_OF_SANA,
        "downsample_block_type": "conv",
        "upsample_block_type": "interpolate",
        **_DC_CHANNELS,
    },
    "mit-han-lab/dc-ae-f32c32-in-1.0-diffusers": {
        "class": "AutoencoderDC",
        "latent_channels": 32,
        "encoder_block_types": _DC_BLOCKS,
        "decoder_block_types": _DC_BLOCKS,
        "encoder_layers_per_block": (0, 4, 8, 2, 2, 2),
        "decoder_layers_per_block": (0, 5, 10, 2, 2, 2),
        "encoder_qkv_multiscales": ((),) * 6,
        "decoder_qkv_multiscales": ((),) * 6,
        "decoder_norm_types": ("batch_norm",) * 3 + ("rms_norm",) * 3,
        "decoder_act_fns": ("relu",) * 3 + ("silu",) * 3,
        **_DC_CHANNELS,
    },
    "stabilityai/sd-vae-ft-mse": {
        "class": "AutoencoderKL",
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": 4,
    },
    "ostris/vae-kl-f8-d16": {
        "class": "AutoencoderKL",
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": 16,
    },
    "madebyollin/taesd": {"class": "AutoencoderTiny"},
}

# (words, width) of the input table, by hub id: rows beyond the text tokenizer's words are left out.
VOCABULARIES: dict[str, tuple[int, int]] = {
    "meta-llama/Llama-2-7b-hf": (32_000, 4096),
    "meta-llama/Llama-3.1-8B": (128_256, 4096),
    "Qwen/Qwen2.5-7B": (151_665, 3584),
    "Qwen/Qwen3-8B": (151_669, 4096),
    "microsoft/Phi-3-mini-4k-instruct": (32_011, 3072),
    "mistralai/Mixtral-8x7B-v0.1": (32_000, 4096),
}
