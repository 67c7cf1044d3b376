"""The training loop: build, resume, loop, save. The same for autoencoders and tokenizers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from safetensors import SafetensorError
from torch import Tensor, nn

from v2flow_cli.errors import ModelError, V2FlowError
from v2flow_cli.recipe import AutoencoderRecipe, TokenizerRecipe, dump_recipe
from v2flow_cli.recipe.schema import TrainLoop
from v2flow_cli.runtime.device import pick_dtype, tf32
from v2flow_cli.runtime.processes import losing_contact, maximum, prepare_cpu_launch, raise_everywhere
from v2flow_cli.store.files import publishing, write_bytes
from v2flow_cli.training.card import write_card
from v2flow_cli.training.checkpoint import Interrupted, load_newest, save_checkpoint, stop_requested
from v2flow_cli.training.crops import CropBatch, crop_loader
from v2flow_cli.training.guard import BadSamples, on_samples, skip_or_stop, what_is_wrong
from v2flow_cli.training.latent_cache import LatentBatch, cached_batches
from v2flow_cli.training.meter import Meter
from v2flow_cli.training.objectives.autoencoder import AutoencoderObjective
from v2flow_cli.training.objectives.tokenizer import TokenizerObjective
from v2flow_cli.training.optimizer import build_optimizer, learning_rate_at, set_learning_rate
from v2flow_cli.training.output import check_output
from v2flow_cli.training.resume import check_same_ranks, check_same_recipe
from v2flow_cli.training.state import (
    TrainState,
    WeightAverage,
    flatten_optimizer,
    moving_buffers,
    restore_buffers,
    restore_optimizer,
)
from v2flow_cli.training.watch import Watch, tracker_options

Log = Callable[[str], None]


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


def train(
    recipe: AutoencoderRecipe | TokenizerRecipe,
    *,
    resume: bool,
    log: Log,
    approximate: bool = False,
    at_step: Callable[[int], None] = lambda step: None,
) -> Trained:
    """Train ``recipe`` to its last step (or ``max_minutes``) and save the averaged model in ``recipe.output``.

    With ``resume`` the newest good checkpoint is continued: 4 steps equal 2, save, resume, 2, bit for bit. With
    ``approximate`` that may be on another number of processes, which changes crops and noise. ``at_step`` hears of
    every step, for a bar.

    Raises:  ModelError when the output holds a run and ``resume`` is off, or cannot be written; V2FlowError on a loss
             that is not finite, bad data, or a process that has gone; Interrupted after a signal, when the run is
             saved.
    """
    loop, folder = recipe.train, Path(recipe.output)
    accelerator = _accelerator(loop, folder)
    rank, ranks = accelerator.process_index, accelerator.num_processes
    micro_batch = loop.batch_size // loop.accumulate // ranks
    if micro_batch * loop.accumulate * ranks != loop.batch_size:
        raise V2FlowError(
            f"train.batch_size is {loop.batch_size}; {ranks} processes x {loop.accumulate} accumulation steps need a "
            "multiple of their product."
        )
    checkpoints = folder / "checkpoints"
    check_output(recipe.output, resume)

    set_seed(loop.seed)  # the same initial weights on every rank
    objective = build_objective(recipe).to(accelerator.device)
    objective.train()
    optimizer, names = build_optimizer(objective, recipe.optimizer)
    average = WeightAverage.of(objective, loop.ema_decay)
    state, saved_step = TrainState(), -1
    meter = Meter(folder / "metrics.jsonl", log, enabled=accelerator.is_main_process)
    if resume and (found := load_newest(checkpoints, log)):
        where, groups, record = found
        check_same_recipe(where, record["recipe"], dump_recipe(recipe))
        check_same_ranks(where, record["ranks"], ranks, drawn="crops and noise", approximate=approximate, log=log)
        objective.load_state_dict(groups["model"])
        average.weights = {k: groups["ema"][k].to(accelerator.device) for k in average.weights}
        restore_optimizer(optimizer, names, groups["optimizer"])
        state = TrainState(**record["train_state"])
        saved_step = state.step
        meter.resume(record["meter"], state.step)
        log(f"resumed {where} at step {state.step}")
    meter.rewind(state.step)
    bad = BadSamples(
        folder / "bad_samples.jsonl", recipe.data.error_budget, log, accelerator.is_main_process, accelerator.device
    )
    model = accelerator.prepare(objective)

    def save() -> None:
        problem = ""
        if accelerator.is_main_process and state.step != saved_step:
            groups = {
                "model": objective.state_dict(),
                "ema": average.weights,
                "optimizer": flatten_optimizer(optimizer, names),
            }
            record = {
                "train_state": state.as_json(),
                "meter": meter.as_json(),
                "recipe": dump_recipe(recipe),
                "ranks": ranks,
            }
            try:
                save_checkpoint(checkpoints, state.step, groups, record, loop.keep_checkpoints)
            except ModelError as error:
                problem = str(error)
        raise_everywhere(problem, accelerator.device)

    if accelerator.is_main_process:
        write_bytes(folder / "recipe.yaml", dump_recipe(recipe).encode())
    start = (state.step + state.bad_steps) * loop.accumulate
    batches: Iterator[CropBatch | LatentBatch | V2FlowError]
    if isinstance(objective, TokenizerObjective) and objective.recipe.latents.cache:
        batches = cached_batches(accelerator, objective.recipe, objective.model.latents, micro_batch, start, log)
    else:
        where = dict(start=start, rank=rank, world_size=ranks)
        loader = crop_loader(recipe.data, micro_batch, seed=loop.seed, multiple=objective.size_multiple, **where)
        batches = iter(loader)
    watch = Watch(accelerator, folder, dump_recipe(recipe), recipe.data, loop.seed)
    run_start, earlier_seconds, saved_seconds = time.monotonic(), state.seconds, state.seconds
    keys: list[str] = []
    # What only training reads may be rounded; `precision: fp32` asks for float32 in it too.
    rounding = tf32(recipe.train.precision != "fp32")
    contact = losing_contact(lambda: on_samples(f"step {state.step}, rank {rank}", keys))
    with rounding, stop_requested() as stop, contact:
        while state.step < loop.steps and not (loop.max_minutes and state.seconds > 60 * loop.max_minutes):
            set_learning_rate(optimizer, learning_rate_at(state.step, recipe.optimizer, loop.steps))
            torch.manual_seed(_step_seed(loop.seed, state.step + state.bad_steps, rank))
            before = moving_buffers(objective) if loop.skip_bad_steps else {}
            keys.clear()
            terms, waited = _forward_backward(accelerator, model, batches, loop.accumulate, state.step, keys, bad)
            norm = accelerator.clip_grad_norm_(objective.parameters(), recipe.optimizer.clip_norm)
            if wrong := what_is_wrong(f"step {state.step}, rank {rank}", terms["loss"], norm, keys):
                state.bad_steps += 1
                skip_or_stop(wrong, state.bad_steps, loop.skip_bad_steps, checkpoints, log)
                optimizer.zero_grad(set_to_none=True)
                restore_buffers(objective, before)
                continue
            terms["grad_norm"] = norm
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            state.step += 1
            state.images_seen += loop.batch_size
            average.update(objective, state.step)
            figures = {**terms, **objective.after_step(state.step)}
            # The slowest rank's clock, so that all ranks leave the loop at the same step.
            [state.seconds] = maximum([earlier_seconds + time.monotonic() - run_start], accelerator.device)
            meter.add(figures, images=loop.batch_size, waited=waited)
            if state.step % loop.log_every == 0 or state.step == loop.steps:
                watch.figures(meter.write(state, optimizer.param_groups[0]["lr"]))
            if loop.grid_every and (state.step % loop.grid_every == 0 or state.step == loop.steps):
                watch.grid(objective, state.step)
            at_step(state.step)
            interrupted = any(maximum([float(bool(stop))], accelerator.device))
            due = bool(loop.save_minutes) and state.seconds - saved_seconds > 60 * loop.save_minutes
            if interrupted or due or (loop.save_every and state.step % loop.save_every == 0):
                save()
                saved_step, saved_seconds = state.step, state.seconds
            if interrupted:
                raise Interrupted(state.step)
        save()
    average.copy_to(objective)
    if accelerator.is_main_process:
        objective.eval()
        text = write_card(
            recipe,
            steps=state.step,
            images=state.images_seen,
            seconds=state.seconds,
            processes=ranks,
            precision=accelerator.mixed_precision if accelerator.mixed_precision != "no" else "fp32",
            metrics=meter.last,
        )
        _export(objective, folder, text)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return Trained(folder, state.step, state.images_seen, state.seconds, meter.last)


def _export(objective: AutoencoderObjective | TokenizerObjective, folder: Path, card: str) -> None:
    """The finished model, whole or not at all.  Raises: ModelError where it cannot be written."""
    try:
        with publishing(folder, ".exporting-") as partial:
            objective.export(partial)
            (partial / "README.md").write_text(card, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder}: the model cannot be written ({error}). Make room, then --resume.") from None


def _accelerator(loop: TrainLoop, folder: Path) -> Accelerator:
    prepare_cpu_launch()
    dtype = pick_dtype(loop.precision, PartialState().device)
    AcceleratorState._reset_state()  # an earlier training in this process may have had another precision
    # A step in which no image, or every image, sees the dummy D leaves some weights without a gradient.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    return Accelerator(
        mixed_precision="bf16" if dtype is torch.bfloat16 else "no",
        kwargs_handlers=[unused],
        **tracker_options(loop.tracker, folder),
    )


def _forward_backward(
    accelerator: Accelerator,
    model: nn.Module,
    batches: Iterator[CropBatch | LatentBatch | V2FlowError],
    accumulate: int,
    step: int,
    keys: list[str],
    bad: BadSamples,
) -> tuple[dict[str, Tensor], float]:
    """Gradients of one step; returns the mean loss terms and the seconds spent waiting for data.

    Args:   keys, which the step's sample keys are added to; bad, which its bad samples are.
    """
    totals: dict[str, Tensor] = {}
    waited = 0.0
    for micro in range(accumulate):
        start = time.monotonic()
        batch, problem = _next(batches)
        waited += time.monotonic() - start
        raise_everywhere(problem and f"step {step}, rank {accelerator.process_index}: {problem}", accelerator.device)
        bad.add(batch)
        keys.extend(batch.keys)
        sync = nullcontext() if micro == accumulate - 1 else accelerator.no_sync(model)
        with sync, accelerator.autocast():
            terms = model(step=step, **batch.inputs(accelerator.device))
            accelerator.backward(terms["loss"] / accumulate)
        for name, value in terms.items():
            totals[name] = totals.get(name, 0.0) + value.detach() / accumulate
    return totals, waited


def _next(batches: Iterator[CropBatch | LatentBatch | V2FlowError]) -> tuple[CropBatch | LatentBatch, str]:
    """The next batch, or an empty one and why there is none."""
    nothing = CropBatch(torch.empty(0), [], [], 0)
    try:
        batch = next(batches)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        return nothing, f"{str(error).splitlines()[0]} Resume with --resume; where memory ran out, lower data.workers."
    return (nothing, str(batch)) if isinstance(batch, V2FlowError) else (batch, "")


def _step_seed(seed: int, step: int, rank: int) -> int:
    return (seed * 1_000_003 + step) * 4099 + rank
