"""The published figures: Table 1 of arXiv 2503.07493, measured by its authors on ImageNet-1K test images."""

from __future__ import annotations

from dataclasses import dataclass

SOURCE = "V2Flow (arXiv 2503.07493), Table 1: ImageNet-1K test images"


@dataclass(frozen=True)
class PublishedRow:
    """One row of the table.  psnr in dB; a lower lpips is better."""

    system: str
    tokens: int
    codebook_size: int
    psnr: float
    ssim: float
    lpips: float


PUBLISHED: dict[int, tuple[PublishedRow, ...]] = {  # by image size in pixels
    256: (
        PublishedRow("Taming-VQGAN", 256, 16_384, 19.68, 0.50, 0.29),
        PublishedRow("IBQ", 256, 16_384, 21.25, 0.58, 0.23),
        PublishedRow("LlamaGen", 256, 16_384, 20.86, 0.57, 0.24),
        PublishedRow("TiTok", 64, 4_096, 18.65, 0.44, 0.34),
        PublishedRow("TiTok", 128, 4_096, 19.97, 0.51, 0.28),
        PublishedRow("TiTok", 256, 4_096, 21.44, 0.59, 0.24),
        PublishedRow("Open-MAGVIT2", 256, 262_144, 21.76, 0.60, 0.21),
        PublishedRow("Cosmos-DI", 256, 64_000, 20.38, 0.52, 0.28),
        PublishedRow("V2Flow (paper)", 256, 16_384, 22.37, 0.65, 0.20),
    ),
    512: (
        PublishedRow("Taming-VQGAN", 1024, 16_384, 21.73, 0.58, 0.29),
        PublishedRow("IBQ", 1024, 16_384, 23.33, 0.64, 0.23),
        PublishedRow("LlamaGen", 1024, 16_384, 23.02, 0.64, 0.24),
        PublishedRow("Open-MAGVIT2", 1024, 262_144, 23.80, 0.65, 0.22),
        PublishedRow("Cosmos-DI", 1024, 64_000, 22.57, 0.61, 0.27),
        PublishedRow("V2Flow (paper)", 1024, 16_384, 23.28, 0.65, 0.22),
    ),
}
