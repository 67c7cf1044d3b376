"""The training loop: build, resume, loop, save. The same for autoencoders and tokenizers."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from torch import Tensor, nn

from v2flow_cli.errors import ModelError, V2FlowError
from v2flow_cli.recipe import AutoencoderRecipe, TokenizerRecipe, dump_recipe
from v2flow_cli.recipe.schema import Optimizer, TrainLoop
from v2flow_cli.store.checkpoint import list_checkpoints, load_newest, save_checkpoint
from v2flow_cli.store.files import write_bytes
from v2flow_cli.tokenizer.hardware import pick_dtype
from v2flow_cli.train.autoencoder import AutoencoderObjective
from v2flow_cli.train.card import write_card
from v2flow_cli.train.crops import CropBatch, crop_loader
from v2flow_cli.train.state import TrainState, WeightAverage, flatten_optimizer, restore_optimizer
from v2flow_cli.train.tokenizer import TokenizerObjective

Log = Callable[[str], None]


class Interrupted(Exception):
    """SIGTERM or Ctrl-C arrived; the run was saved at ``step``."""

    def __init__(self, step: int) -> None:
        super().__init__(f"interrupted and saved at step {step}")
        self.step = step


@dataclass(frozen=True)
class Trained:
    """Where the model lies and what the run came to; ``metrics`` are the last logged means."""

    folder: Path
    steps: int
    images: int
    seconds: float
    metrics: dict[str, float]


def build_objective(recipe: AutoencoderRecipe | TokenizerRecipe) -> AutoencoderObjective | TokenizerObjective:
    """The module whose ``forward(images, step)`` returns the loss terms of ``recipe``."""
    if isinstance(recipe, AutoencoderRecipe):
        return AutoencoderObjective(recipe)
    return TokenizerObjective(recipe)


def train(recipe: AutoencoderRecipe | TokenizerRecipe, *, resume: bool, log: Log) -> Trained:
    """Train ``recipe`` to its last step (or ``max_minutes``) and save the averaged model in ``recipe.output``.

    With ``resume`` the newest good checkpoint is continued: 4 steps equal 2, save, resume, 2, bit for bit.

    Raises:  ModelError when the output holds a run and ``resume`` is off; V2FlowError on a non-finite loss;
             Interrupted after a signal, when the run is saved.
    """
    loop, folder = recipe.train, Path(recipe.output)
    accelerator = _accelerator(loop)
    rank, ranks = accelerator.process_index, accelerator.num_processes
    micro_batch = loop.batch_size // loop.accumulate // ranks
    if micro_batch * loop.accumulate * ranks != loop.batch_size:
        raise V2FlowError(
            f"train.batch_size is {loop.batch_size}; {ranks} processes x {loop.accumulate} accumulation steps need a "
            "multiple of their product."
        )
    checkpoints = folder / "checkpoints"
    _guard_output(folder, checkpoints, resume)

    set_seed(loop.seed)  # the same initial weights on every rank
    objective = build_objective(recipe).to(accelerator.device)
    objective.train()
    optimizer, names = build_optimizer(objective, recipe.optimizer)
    average = WeightAverage.of(objective, loop.ema_decay)
    state = TrainState()
    if resume and (found := load_newest(checkpoints)):
        where, groups, counters = found
        _check_same_recipe(where, counters, recipe, ranks)
        objective.load_state_dict(groups["model"])
        average.weights = {k: groups["ema"][k].to(accelerator.device) for k in average.weights}
        restore_optimizer(optimizer, names, groups["optimizer"])
        state = TrainState(**counters["train_state"])
        log(f"resumed {where} at step {state.step}")
    model = accelerator.prepare(objective)

    def save() -> None:
        if accelerator.is_main_process:
            groups = {
                "model": objective.state_dict(),
                "ema": average.weights,
                "optimizer": flatten_optimizer(optimizer, names),
            }
            record = {"train_state": state.as_json(), "recipe": dump_recipe(recipe), "ranks": ranks}
            save_checkpoint(checkpoints, state.step, groups, record, loop.keep_checkpoints)
        accelerator.wait_for_everyone()

    if accelerator.is_main_process:
        write_bytes(folder / "recipe.yaml", dump_recipe(recipe).encode())
    batches = iter(
        crop_loader(
            recipe.data,
            micro_batch,
            seed=loop.seed,
            start=(state.step + state.bad_steps) * loop.accumulate,
            rank=rank,
            world_size=ranks,
        )
    )
    meter = Meter(folder / "metrics.jsonl", log, enabled=accelerator.is_main_process)
    run_start, earlier_seconds = time.monotonic(), state.seconds
    with _stop_requested() as stop:
        while state.step < loop.steps and not (loop.max_minutes and state.seconds > 60 * loop.max_minutes):
            set_learning_rate(optimizer, learning_rate_at(state.step, recipe.optimizer, loop.steps))
            torch.manual_seed(_step_seed(loop.seed, state.step + state.bad_steps, rank))
            terms, keys, waited = _forward_backward(accelerator, model, batches, loop.accumulate, state.step)
            if not _all_finite(accelerator, terms["loss"]):
                state.bad_steps += 1
                optimizer.zero_grad(set_to_none=True)
                if state.bad_steps > loop.skip_bad_steps:
                    raise V2FlowError(
                        f"step {state.step}, rank {rank}: the loss is not finite ({terms['loss'].item()}) on samples "
                        f"{', '.join(keys[:8])}. Resume from {checkpoints} with a lower optimizer.learning_rate, or "
                        "allow train.skip_bad_steps."
                    )
                continue
            terms["grad_norm"] = accelerator.clip_grad_norm_(objective.parameters(), recipe.optimizer.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            state.step += 1
            state.images_seen += loop.batch_size
            average.update(objective, state.step)
            terms.update(objective.after_step(state.step))
            # The slowest rank's clock, so that all ranks leave the loop at the same step.
            state.seconds = _largest(accelerator, earlier_seconds + time.monotonic() - run_start)
            meter.add(terms, images=loop.batch_size, waited=waited)
            if state.step % loop.log_every == 0 or state.step == loop.steps:
                meter.write(state, optimizer.param_groups[0]["lr"])
            interrupted = _any_rank(accelerator, bool(stop))
            if interrupted or state.step % loop.save_every == 0:
                save()
            if interrupted:
                raise Interrupted(state.step)
        save()
    average.copy_to(objective)
    if accelerator.is_main_process:
        objective.eval()
        objective.export(folder)
        text = write_card(
            recipe,
            steps=state.step,
            images=state.images_seen,
            seconds=state.seconds,
            processes=ranks,
            precision=accelerator.mixed_precision if accelerator.mixed_precision != "no" else "fp32",
            metrics=meter.last,
        )
        write_bytes(folder / "README.md", text.encode())
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return Trained(folder, state.step, state.images_seen, state.seconds, meter.last)


def build_optimizer(
    objective: AutoencoderObjective | TokenizerObjective, settings: Optimizer
) -> tuple[torch.optim.AdamW, dict[int, str]]:
    """AdamW with weight decay on matrices only, and the name of each parameter by ``id``."""
    free = objective.no_decay()
    decayed, plain, names = [], [], {}
    for name, parameter in objective.named_parameters():
        if not parameter.requires_grad:
            continue
        names[id(parameter)] = name
        is_matrix = parameter.ndim >= 2 and not name.startswith(free)
        (decayed if is_matrix else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas), names


def learning_rate_at(step: int, settings: Optimizer, steps: int) -> float:
    """Linear warm-up, then constant or a half cosine to 2% of the peak at the last step."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.learning_rate
    progress = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    return settings.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value


class Meter:
    """Means of every loss term between two log lines; JSONL in the output folder, a short line in the log."""

    def __init__(self, path: Path, log: Log, enabled: bool) -> None:
        self.path, self.log, self.enabled = path, log, enabled
        self.last: dict[str, float] = {}
        self._reset()

    def _reset(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.images, self.waited, self.start = 0, 0.0, time.monotonic()

    def add(self, terms: dict[str, Any], images: int, waited: float) -> None:
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)
            self.counts[name] = self.counts.get(name, 0) + 1
        self.images += images
        self.waited += waited

    def write(self, state: TrainState, learning_rate: float) -> None:
        elapsed = max(time.monotonic() - self.start, 1e-9)
        self.last = {f"train/{name}": self.sums[name] / self.counts[name] for name in self.sums}
        record = {
            "step": state.step,
            "images_seen": state.images_seen,
            **self.last,
            "learning_rate": learning_rate,
            "images_per_second": self.images / elapsed,
            "data_wait_share": self.waited / elapsed,
            "seconds": round(state.seconds, 1),
        }
        if torch.cuda.is_available():
            record["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if self.enabled:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(record) + "\n")
            shown = "  ".join(f"{k.removeprefix('train/')} {v:.4g}" for k, v in self.last.items())
            self.log(f"step {state.step}  {shown}  {record['images_per_second']:.1f} img/s")
        self._reset()


def _accelerator(loop: TrainLoop) -> Accelerator:
    precision = loop.precision
    if precision == "auto":
        device = Accelerator().device
        precision = "bf16" if pick_dtype("auto", device) is torch.bfloat16 else "fp32"
    # A step in which no image, or every image, sees the dummy D leaves some weights without a gradient.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    return Accelerator(mixed_precision="bf16" if precision == "bf16" else "no", kwargs_handlers=[unused])


def _forward_backward(
    accelerator: Accelerator, model: nn.Module, batches: Iterator[CropBatch], accumulate: int, step: int
) -> tuple[dict[str, Tensor], list[str], float]:
    """Gradients of one step; returns the mean loss terms, the sample keys and the seconds spent waiting for data."""
    totals: dict[str, Tensor] = {}
    keys: list[str] = []
    waited = 0.0
    for micro in range(accumulate):
        start = time.monotonic()
        batch = next(batches)
        waited += time.monotonic() - start
        keys.extend(batch.keys)
        sync = nullcontext() if micro == accumulate - 1 else accelerator.no_sync(model)
        with sync, accelerator.autocast():
            terms = model(batch.images.to(accelerator.device, non_blocking=True), step)
            accelerator.backward(terms["loss"] / accumulate)
        for name, value in terms.items():
            totals[name] = totals.get(name, 0.0) + value.detach() / accumulate
    return totals, keys, waited


def _all_finite(accelerator: Accelerator, loss: Tensor) -> bool:
    """True when the loss is finite on every rank; all ranks get the same answer."""
    bad = (~torch.isfinite(loss.detach())).float()
    return accelerator.reduce(bad, reduction="sum").item() == 0


def _any_rank(accelerator: Accelerator, flag: bool) -> bool:
    return _largest(accelerator, float(flag)) > 0


def _largest(accelerator: Accelerator, value: float) -> float:
    """The largest of all ranks' values, on every rank."""
    if accelerator.num_processes == 1:
        return value
    return accelerator.gather(torch.tensor([value], device=accelerator.device)).max().item()


def _step_seed(seed: int, step: int, rank: int) -> int:
    return (seed * 1_000_003 + step) * 4099 + rank


def _guard_output(folder: Path, checkpoints: Path, resume: bool) -> None:
    if not resume and (list_checkpoints(checkpoints) or (folder / "model.safetensors").exists()):
        raise ModelError(f"{folder}: already holds a run. Continue it with --resume, or give another `output`.")


def _check_same_recipe(where: Path, counters: dict[str, Any], recipe: Any, ranks: int) -> None:
    if counters["ranks"] != ranks:
        raise ModelError(
            f"{where}: saved by {counters['ranks']} processes, resumed by {ranks}: the order of the data would change. "
            f"Launch {counters['ranks']} processes."
        )
    changed = [
        line.strip()
        for line in set(dump_recipe(recipe).splitlines()) ^ set(counters["recipe"].splitlines())
        if line.split(":")[0].strip() not in FREE_TO_CHANGE
    ]
    if changed:
        raise ModelError(
            f"{where}: the recipe is not the one of this run ({'; '.join(sorted(changed)[:6])}). Resume with the "
            "recipe beside the checkpoints, or start anew in another `output`."
        )


# Keys that a resumed run may change without changing what it computes at a given step.
FREE_TO_CHANGE = {
    "max_minutes",
    "log_every",
    "save_every",
    "save_dtype",
    "keep_checkpoints",
    "skip_bad_steps",
    "workers",
    "output",
}


@contextmanager
def _stop_requested() -> Iterator[list[int]]:
    """A list that becomes non-empty when SIGTERM or SIGINT arrives; the step in progress is finished first."""
    received: list[int] = []
    previous = {}

    def handler(number: int, frame: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait
        received.append(number)

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, handler)
    except ValueError:  # not the main thread: a notebook or a test runner keeps its own handlers
        pass
    try:
        yield received
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
