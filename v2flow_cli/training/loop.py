"""The training loop of autoencoders and tokenizers: build, resume, loop, save."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, parse_flag_from_env, set_seed
from torch import Tensor, nn

from v2flow_cli.errors import V2FlowError
from v2flow_cli.recipe import AutoencoderRecipe, TokenizerRecipe, dump_recipe
from v2flow_cli.recipe.schema import TrainLoop
from v2flow_cli.runtime.allocator import keep_freed_memory
from v2flow_cli.runtime.device import pick_dtype, tf32
from v2flow_cli.runtime.processes import (
    losing_contact,
    maximum,
    on_every_rank,
    prepare_cpu_launch,
    raise_everywhere,
    sum_in_place,
)
from v2flow_cli.store.files import write_bytes
from v2flow_cli.store.stream import SampleStream
from v2flow_cli.training.card import write_card
from v2flow_cli.training.checkpoint import Interrupted, load_newest, save_checkpoint, stop_requested
from v2flow_cli.training.crops import CropBatch, crop_loader
from v2flow_cli.training.guard import BadSamples, UnreadSteps, on_samples, skip_or_stop
from v2flow_cli.training.latent_cache import LatentBatch, cached_batches
from v2flow_cli.training.memory import building_model, check_batch_fits
from v2flow_cli.training.meter import Meter
from v2flow_cli.training.objectives.autoencoder import AutoencoderObjective
from v2flow_cli.training.objectives.objective import Objective
from v2flow_cli.training.objectives.tokenizer import TokenizerObjective
from v2flow_cli.training.optimizer import build_optimizer, learning_rate_at, set_learning_rate
from v2flow_cli.training.output import alone_in_output, check_output, publishing_model
from v2flow_cli.training.resident import resident_batches
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
    """The folder of the model and the figures of the run; ``metrics`` are the last logged means."""

    folder: Path
    steps: int
    images: int
    seconds: float
    metrics: dict[str, float]


def build_objective(recipe: AutoencoderRecipe | TokenizerRecipe) -> Objective:
    """The module whose ``forward(images, step)`` returns the loss terms of ``recipe``."""
    if isinstance(recipe, AutoencoderRecipe):
        return AutoencoderObjective(recipe)
    return TokenizerObjective(recipe)


@alone_in_output
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
    ``approximate`` the number of processes may differ, which changes crops and noise. ``at_step`` is called after every
    step, for a progress bar.

    Raises:  ModelError if the output holds a run and ``resume`` is off, or it cannot be written; V2FlowError for a loss
             that is not finite, bad data, or a process that has ended; Interrupted after a signal, when the run is
             saved.
    """
    loop, folder = recipe.train, Path(recipe.output)
    accelerator = _accelerator(loop, folder)
    rank, ranks, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    micro_batch = loop.batch_size // loop.accumulate // ranks
    if micro_batch * loop.accumulate * ranks != loop.batch_size:
        raise V2FlowError(
            f"train.batch_size is {loop.batch_size}; {ranks} processes x {loop.accumulate} accumulation steps need a "
            "multiple of their product."
        )
    checkpoints = folder / "checkpoints"
    check_output(recipe.output, resume)
    check_batch_fits(loop, 3 * recipe.data.crop_size**2, f"crops of {recipe.data.crop_size} px")

    set_seed(loop.seed)  # the same initial weights on every rank
    with building_model():
        objective = build_objective(recipe).to(device)
    objective.train()
    optimizer, names = build_optimizer(objective, recipe.optimizer)
    average = WeightAverage.of(objective, loop.ema_decay)
    state, saved_step = TrainState(), -1
    meter = Meter(folder / "metrics.jsonl", log, enabled=accelerator.is_main_process)
    if resume and (checkpoint := load_newest(checkpoints, log)):
        where, groups, record = checkpoint
        check_same_recipe(where, record["recipe"], dump_recipe(recipe))
        check_same_ranks(where, record["ranks"], ranks, parts="crops and noise", approximate=approximate, log=log)
        objective.load_state_dict(groups["model"])
        average.weights = {k: groups["ema"][k].to(device) for k in average.weights}
        restore_optimizer(optimizer, names, groups["optimizer"])
        state = TrainState(**record["train_state"])
        saved_step = state.step
        meter.resume(record["meter"], state.step)
        log(f"resumed {where} at step {state.step}")
    meter.rewind(state.step)
    bad = BadSamples(folder / "bad_samples.jsonl", recipe.data.error_budget, log, accelerator.is_main_process, device)
    if loop.compile and device.type == "cuda":
        _compile(objective)
    model = accelerator.prepare(objective)
    unread, deferred = UnreadSteps(), _defers_reading(device)

    def read_terms() -> bool:
        """Undo the counts of steps that were not finite, and log the terms of the others; True if all were finite."""
        all_finite = True
        for terms, wrong in unread.read():
            if wrong:
                all_finite = False
                state.step, state.bad_steps = state.step - 1, state.bad_steps + 1
                state.images_seen -= loop.batch_size
                skip_or_stop(wrong, state.bad_steps, loop.skip_bad_steps, checkpoints, log)
            else:
                meter.add(terms, images=loop.batch_size)
        return all_finite

    def save() -> None:
        read_terms()
        on_every_rank(write if accelerator.is_main_process and state.step != saved_step else lambda: None, device)

    def write() -> None:
        optimizer_state = flatten_optimizer(optimizer, names)
        groups = {"model": objective.state_dict(), "ema": average.weights, "optimizer": optimizer_state}
        record = {
            "train_state": state.as_json(),
            "meter": meter.as_json(),
            "recipe": dump_recipe(recipe),
            "ranks": ranks,
        }
        save_checkpoint(checkpoints, state.step, groups, record, loop.keep_checkpoints)

    if accelerator.is_main_process:
        SampleStream(recipe.data.sources, seed=0, output=recipe.output).not_taken.log(log)
        write_bytes(folder / "recipe.yaml", dump_recipe(recipe).encode())
    start = (state.step + state.bad_steps) * loop.accumulate
    batches: Iterator[CropBatch | LatentBatch | V2FlowError]
    if isinstance(objective, TokenizerObjective) and objective.recipe.latents.cache:
        batches = cached_batches(accelerator, objective.recipe, objective.model, micro_batch, start, log)
    elif recipe.data.resident_px:
        batches = resident_batches(accelerator, recipe.data, micro_batch, loop.seed, start, log, recipe.output)
    else:
        loader = crop_loader(
            recipe.data,
            micro_batch,
            seed=loop.seed,
            start=start,
            rank=rank,
            world_size=ranks,
            multiple=objective.size_multiple,
            output=recipe.output,
        )
        batches = iter(loader)
    watch = Watch(accelerator, folder, dump_recipe(recipe), recipe.data, loop.seed)
    run_start, earlier_seconds, saved_seconds = time.monotonic(), state.seconds, state.seconds
    keys: list[str] = []
    # Numbers that only training uses may be rounded, except with `precision: fp32`.
    rounding = tf32(recipe.train.precision != "fp32")
    contact = losing_contact(lambda: on_samples(f"step {state.step}, rank {rank}", keys))
    with rounding, stop_requested() as stop, contact:
        while state.step < loop.steps:
            waiting_since = time.monotonic()
            micro_batches, problem = _next(batches, loop.accumulate)
            meter.waited += time.monotonic() - waiting_since
            state.seconds = earlier_seconds + time.monotonic() - run_start
            lossy = any(batch.failures for batch in micro_batches)
            # Everything that ranks agree on before a step, in one exchange; the slowest rank's clock counts.
            seconds, *flags = maximum([state.seconds, bool(stop), bool(problem), lossy])
            interrupted, failed, lossy = map(bool, flags)
            due = bool(loop.save_minutes) and seconds - saved_seconds > 60 * loop.save_minutes
            due = due or bool(loop.save_every and state.step % loop.save_every == 0)
            if interrupted or (due and state.step):
                save()
                saved_step, saved_seconds = state.step, seconds
            if interrupted:
                raise Interrupted(state.step)
            if loop.max_minutes and seconds > 60 * loop.max_minutes:
                break
            this_step = f"step {state.step}, rank {rank}"
            if failed:
                raise_everywhere(problem and f"{this_step}: {problem}", device)
            keys = [key for batch in micro_batches for key in batch.keys]
            for batch in micro_batches if lossy else ():
                bad.add(batch)

            set_learning_rate(optimizer, learning_rate_at(state.step, recipe.optimizer, loop.steps))
            attempt = state.step + state.bad_steps
            torch.manual_seed(_step_seed(loop.seed, attempt, rank))
            draw = random.Random(_step_seed(loop.seed, attempt, 0))  # shapes are the same on every rank
            before = moving_buffers(objective) if loop.skip_bad_steps else {}
            terms = _forward_backward(accelerator, objective, model, micro_batches, state.step, draw)
            norm = accelerator.clip_grad_norm_(objective.parameters(), recipe.optimizer.clip_norm)
            terms["grad_norm"] = torch.as_tensor(norm)
            unread.add(this_step, terms, keys)
            state.step += 1
            state.images_seen += loop.batch_size
            if not deferred and not read_terms():
                optimizer.zero_grad(set_to_none=True)
                restore_buffers(objective, before)
                continue
            good = _finite_everywhere(terms) if deferred and loop.skip_bad_steps else None
            if good is not None:  # with 1, torch's fused optimizers and Muon change nothing
                optimizer.found_inf = 1 - good.float()  # type: ignore[attr-defined]
                restore_buffers(objective, before, good)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average.update(state.step, good)
            state.seconds = earlier_seconds + time.monotonic() - run_start
            if (state.step % loop.log_every == 0 or state.step == loop.steps) and read_terms():
                figures = _numbers(objective.statistics(state.step))
                watch.figures(meter.write(state, optimizer.param_groups[0]["lr"], figures))
                objective.check(state.step, figures)
            if loop.grid_every and (state.step % loop.grid_every == 0 or state.step == loop.steps):
                watch.grid(objective, state.step)
            at_step(state.step)
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


def _export(objective: Objective, folder: Path, card: str) -> None:
    """Write the finished model atomically.  Raises: ModelError if it cannot be written."""
    with publishing_model(folder) as partial:
        objective.export(partial)
        (partial / "README.md").write_text(card, encoding="utf-8")


def _accelerator(loop: TrainLoop, folder: Path) -> Accelerator:
    prepare_cpu_launch()
    # Only Accelerator reads the flag; without it PartialState treats each process on CPUs as the only one.
    device = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device
    keep_freed_memory(device)
    dtype = pick_dtype(loop.precision, device)
    AcceleratorState._reset_state()  # an earlier training of this process may have had another precision
    # If no image, or every image, of a step sees the dummy D, some weights have no gradient. Buffers are frozen tables,
    # or statistics that every rank computes from the vectors of all ranks, so none has to be sent.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
    return Accelerator(
        mixed_precision="bf16" if dtype is torch.bfloat16 else "no",
        kwargs_handlers=[unused],
        **tracker_options(loop.tracker, folder),
    )


def _forward_backward(
    accelerator: Accelerator,
    objective: Objective,
    model: nn.Module,
    micro_batches: Sequence[CropBatch | LatentBatch],
    step: int,
    draw: random.Random,
) -> dict[str, Tensor]:
    """Compute the gradients of one step by ``model``, ``objective`` or DDP around it; the mean loss terms."""
    totals: dict[str, Tensor] = {}
    count, few_shapes = len(micro_batches), accelerator.device.type == "cuda"
    for number, batch in enumerate(micro_batches, start=1):
        inputs = batch.inputs(accelerator.device)
        plan = objective.plan(step, inputs, draw, few_shapes)
        sync = nullcontext() if number == count else accelerator.no_sync(model)
        with sync, accelerator.autocast():
            terms = model(**inputs, **plan)
            accelerator.backward(terms["loss"] / count)
        for name, value in terms.items():
            totals[name] = totals.get(name, 0.0) + value.detach() / count
    return totals


def _defers_reading(device: torch.device) -> bool:
    """True if the host runs ahead of the device, so that it should read numbers only for the log."""
    return device.type == "cuda"


def _finite_everywhere(terms: Mapping[str, Tensor]) -> Tensor:
    """Whether loss and gradient of a step are finite on all ranks, as a tensor () on the device."""
    good = torch.isfinite(terms["loss"]) & torch.isfinite(terms["grad_norm"])
    return sum_in_place((~good).float()) == 0


def _numbers(figures: Mapping[str, Tensor]) -> dict[str, float]:
    """Tensors () as numbers, in one transfer."""
    values = torch.stack([value.float() for value in figures.values()]).tolist() if figures else []
    return dict(zip(figures, values))


def _compile(objective: nn.Module) -> None:
    """Compile the step into one graph for each of the few shapes that ``plan`` allows."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    objective.forward = torch.compile(objective.forward, dynamic=False)  # type: ignore[method-assign]


def _next(
    batches: Iterator[CropBatch | LatentBatch | V2FlowError], count: int
) -> tuple[list[CropBatch | LatentBatch], str]:
    """The next ``count`` batches, or fewer and the reason."""
    micro_batches: list[CropBatch | LatentBatch] = []
    for _ in range(count):
        try:
            batch = next(batches)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            reason = str(error).splitlines()[0]
            return micro_batches, f"{reason} Continue with --resume; if memory ran out, lower data.workers."
        if isinstance(batch, V2FlowError):
            return micro_batches, str(batch)
        micro_batches.append(batch)
    return micro_batches, ""


def _step_seed(seed: int, step: int, rank: int) -> int:
    return (seed * 1_000_003 + step) * 4099 + rank
