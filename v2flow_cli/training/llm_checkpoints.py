"""Trainer's checkpoints without pickle: safetensors and JSON, hashed and atomic.

    checkpoints/checkpoint-500/model.safetensors (or adapter_model.safetensors), config.json   the weights
                               optimizer.safetensors, optimizer.json                           with the schedule
                               rng-0.safetensors                                               one for each process
                               unlogged-0.safetensors                                          the same
                               trainer_state.json, sha256.json

FSDP and DeepSpeed write their own shards of optimizer and weights, which are hashed and renamed likewise.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer

from v2flow_cli.errors import ModelError
from v2flow_cli.runtime.permissions import set_default_mode
from v2flow_cli.runtime.publishing import flush
from v2flow_cli.store.files import sha256_of
from v2flow_cli.training.checkpoint import changed_file, rotate

HASHES = "sha256.json"
STAGING = ".partial"


class SafeCheckpoints(Trainer):
    """Trainer with the checkpoints of this module."""

    def _get_output_dir(self, trial: Any) -> str:
        return str(Path(self.args.output_dir, STAGING))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write to a staging folder, which is renamed when every process has finished writing."""
        root, staging = Path(self.args.output_dir), Path(self.args.output_dir, STAGING)
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                seal(staging / f"checkpoint-{self.state.global_step}", root, self.keep)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(staging, ignore_errors=True)
            raise ModelError(
                f"{root}: the checkpoint of step {self.state.global_step} cannot be written ({error}). "
                "Earlier ones are untouched."
            ) from None
        self.accelerator.wait_for_everyone()

    @property
    def keep(self) -> int:
        return self.args.save_total_limit or 1

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Write weights and config; Trainer's own method would also pickle its arguments."""
        if self.args.should_save:
            self.model.save_pretrained(output_dir or self.args.output_dir, state_dict=state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._sharded:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            state = self.optimizer.state_dict()
            tensors = {
                f"{number}/{name}": torch.as_tensor(value).detach().cpu().contiguous().clone()
                for number, values in state["state"].items()
                for name, value in values.items()
            }
            save_file(tensors, Path(output_dir, "optimizer.safetensors"))
            record = {"param_groups": state["param_groups"], "scheduler": self.lr_scheduler.state_dict()}
            Path(output_dir, "optimizer.json").write_text(json.dumps(record), encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self._sharded:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        record = json.loads(Path(checkpoint, "optimizer.json").read_text(encoding="utf-8"))
        state: dict[int, dict[str, Any]] = {}
        for key, tensor in load_file(Path(checkpoint, "optimizer.safetensors")).items():
            number, _, name = key.partition("/")
            state.setdefault(int(number), {})[name] = tensor
        self.optimizer.load_state_dict({"state": state, "param_groups": record["param_groups"]})
        self.lr_scheduler.load_state_dict(record["scheduler"])

    def _save_rng_state(self, output_dir: str) -> None:
        """Save PyTorch's generators; training uses no others (data orders come from seeds)."""
        states = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            states["cuda"] = torch.cuda.get_rng_state()
        os.makedirs(output_dir, exist_ok=True)  # another process may get here before the first
        save_file(states, Path(output_dir, f"rng-{self.args.process_index}.safetensors"))
        save_file(self.unlogged(), Path(output_dir, f"unlogged-{self.args.process_index}.safetensors"))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        path = Path(checkpoint or "", f"rng-{self.args.process_index}.safetensors")
        if checkpoint is None or not path.exists():  # with more processes than before, dropout has new random numbers
            return
        states = load_file(path)
        torch.set_rng_state(states["cpu"])
        if "cuda" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state(states["cuda"])
        self.restore_unlogged(load_file(path.with_name(f"unlogged-{self.args.process_index}.safetensors")))

    def sums_by_name(self) -> dict[str, Tensor]:
        """The sums over the steps of a log line; a subclass adds its own."""
        return {"loss": self._tr_loss.detach()}

    def restore_sums(self, sums: dict[str, Tensor]) -> None:
        """The inverse of ``sums_by_name``."""
        self._tr_loss = sums["loss"].to(self.args.device, copy=True)

    def unlogged(self) -> dict[str, Tensor]:
        """This process's sums for the next log line, and the step of the last one."""
        sums = {name: tensor.clone() for name, tensor in self.sums_by_name().items()}
        return {**sums, "last_logged_step": torch.tensor(self._globalstep_last_logged)}

    def restore_unlogged(self, sums: dict[str, Tensor]) -> None:
        """Restore the result of ``unlogged``, so that the next line is that of an uninterrupted run."""
        self.restore_sums(sums)
        self._globalstep_last_logged = int(sums["last_logged_step"])

    @property
    def _sharded(self) -> bool:
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)


def seal(folder: Path, root: Path, keep: int) -> None:
    """Hash every file of a finished ``folder``, move it into ``root``, and drop all but the newest ``keep`` there.

    It is renamed when all of it is on the disk.
    """
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        set_default_mode(path)
    hashes = {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}
    (folder / HASHES).write_text(json.dumps(hashes, indent=1), encoding="utf-8")
    for path in (*folder.rglob("*"), folder):
        flush(path)
    final = root / folder.name
    if not final.exists() or damage(final):  # of the same step of the same run, it may be the only good one
        shutil.rmtree(final, ignore_errors=True)
        os.replace(folder, final)
        flush(root)
    shutil.rmtree(folder.parent)
    rotate(root, final, keep, damage)


def remove_unsealed(root: Path) -> None:
    """Remove the unfinished checkpoint of a killed run; one process calls it, before the training starts."""
    shutil.rmtree(root / STAGING, ignore_errors=True)


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint; empty if its files match their hashes."""
    try:
        hashes = json.loads((folder / HASHES).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{HASHES}: {error}"
    return changed_file(folder, hashes)
