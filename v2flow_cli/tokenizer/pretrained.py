"""Model folders as transformers lays them out, without its ``PreTrainedModel``.

Importing that class takes twice as long as importing torch (it imports torch._dynamo, torch.distributed.tensor,
torchvision and scipy, none of which a tokenizer uses). ``AutoModel`` needs no more of a model than ``config_class`` and
``from_pretrained``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.configuration_utils import PretrainedConfig
from transformers.utils.hub import PushToHubMixin

from v2flow_cli.errors import ModelError
from v2flow_cli.runtime.publishing import check_published, publishing

WEIGHTS = "model.safetensors"
AUTO_OPTIONS = ("adapter_kwargs", "code_revision", "force_download", "trust_remote_code", "_commit_hash", "_from_auto")

Model = TypeVar("Model", bound="PretrainedModule")


class PretrainedModule(nn.Module, PushToHubMixin):
    """A module whose ``config`` builds it, with ``from_pretrained``, ``save_pretrained`` and ``push_to_hub``."""

    config_class: ClassVar[type[PretrainedConfig]]
    config: Any

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The data type of the first floating-point parameter."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    @classmethod
    def from_pretrained(
        cls: type[Model],
        folder: str | Path,
        *,
        config: PretrainedConfig | None = None,
        dtype: torch.dtype = torch.float32,
        name: str | None = None,
        **options: Any,
    ) -> Model:
        """The model in a folder, in eval mode; no random number is drawn.

        Args:    config, instead of the folder's; dtype of all floating-point weights; name, the folder's name in
                 messages; options, only those that ``AutoModel`` adds.
        Raises:  ModelError if weights are missing, unexpected or of another shape; OSError and the errors of
                 safetensors for files that are missing or damaged; TypeError for another option.
        """
        unknown = sorted(options.keys() - set(AUTO_OPTIONS))
        if unknown:
            raise TypeError(f"{cls.__name__}.from_pretrained has no option {unknown[0]}.")
        folder = Path(folder)
        check_published(folder)
        if config is None:
            config = cls.config_class.from_pretrained(folder)
        config.name_or_path = name or str(folder)
        weights = cls._load_weights(folder, config)
        with torch.random.fork_rng(devices=[]):  # the initial values must not change the random numbers of a training
            model = cls(config)
        model._check_fit(weights, config.name_or_path)
        model.to(dtype).load_state_dict(weights)
        return model.eval()

    @classmethod
    def _load_weights(cls, folder: Path, config: PretrainedConfig) -> dict[str, Tensor]:
        return load_file(folder / WEIGHTS)

    def _check_fit(self, weights: Mapping[str, Tensor], name: str) -> None:
        mine = self.state_dict()
        wrong = {
            "missing": mine.keys() - weights.keys(),
            "unexpected": weights.keys() - mine.keys(),
            "of another shape": {k for k in mine.keys() & weights.keys() if mine[k].shape != weights[k].shape},
        }
        for kind, names in wrong.items():
            if names:
                listed = ", ".join(sorted(names)[:3])
                raise ModelError(f"{name}: the weights do not fit the config ({kind}: {listed}).")

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write ``config.json`` and ``model.safetensors``; those of a model that is there stay until both are whole."""
        with publishing(Path(save_directory)) as folder:
            self._write(folder)

    def _write(self, folder: Path) -> None:
        """All files of the model, into an empty folder."""
        self.config.dtype = str(self.dtype).removeprefix("torch.")
        self.config.architectures = [type(self).__name__]
        self.config.save_pretrained(folder)
        weights = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
