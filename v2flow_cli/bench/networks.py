"""The networks of LPIPS, rFID and feature distances, loaded if their weights are available."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from v2flow_cli.bench.perceptual import Features, Inception, Lpips
from v2flow_cli.errors import ModelError
from v2flow_cli.store.network_weights import JudgeWeights

T = TypeVar("T")


@dataclass(frozen=True)
class MetricNetworks:
    """The networks; None if their weights are missing, with a note. ``features`` needs the option ``--features``."""

    lpips: Lpips | None = None
    inception: Inception | None = None
    features: Features | None = None
    notes: tuple[str, ...] = ()


def load_networks(
    device: torch.device,
    lpips_net: str | None = None,
    fid: bool | None = None,
    folder: Path | None = None,
    download: bool = False,
    features: Path | None = None,
) -> MetricNetworks:
    """LPIPS (alex unless ``lpips_net`` is another) and Inception, from ``folder``, the cache, or by ``download``.

    ``features``: the file of the network of feature distances, if any.

    Raises:  ModelError for missing weights that ``lpips_net``, ``fid``, ``features`` or ``download`` require.
    """
    weights, notes = JudgeWeights(folder, download), []

    def load(make: Callable[[], T], required: bool) -> T | None:
        try:
            return make()
        except ModelError as error:
            if required or download:
                raise
            notes.append(f"left out: {error}")
            return None

    lpips = load(lambda: Lpips(lpips_net or "alex", weights, device), lpips_net is not None)
    inception = None if fid is False else load(lambda: Inception(weights, device), fid is True)
    return MetricNetworks(lpips, inception, Features(features, device) if features else None, tuple(notes))
