"""One training of a budget, in its own process: ``python -m v2flow_cli.training.budget_stage REQUEST.json``.

The first steps of a stage are a measurement, with an endless schedule: the learning rate warms up and stays constant.
Their time determines the stage's number of steps, and the same run continues with it. The number is then stored in the
request's file, so that a killed stage resumes with it exactly. With less time than it had, a stage resumes with as many
steps as fit, and its schedule ends with them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from v2flow_cli.errors import V2FlowError
from v2flow_cli.recipe import AutoencoderRecipe, FinetuneRecipe, LMRecipe, TokenizerRecipe, load_recipe
from v2flow_cli.recipe.schema import Recipe
from v2flow_cli.store.files import write_bytes
from v2flow_cli.training.checkpoint import Interrupted, newest_checkpoint, newest_record
from v2flow_cli.training.latent_cache import IN_MEMORY

ENDLESS = 10**9  # steps of a schedule whose end is not yet known
PROBE_STEPS = 3  # after the first one
PROBE_SHARE, PROBE_SECONDS = 0.05, 30.0  # of a stage's time: the shortest measurement
PROBE_MOST = 0.5  # of a stage's time: the longest measurement
MARGIN = 0.95  # of the remaining time, because later steps may be slower
EXIT_FAILED, EXIT_INTERRUPTED = 1, 130

Log = Callable[[str], None]


@dataclass
class StageRun:
    """The state of one training of a budget, stored in a file between processes."""

    recipe: str  # path
    overrides: list[str]
    seconds: float  # its wall time, including the start of its process
    planned_seconds: float = 0.0  # its share when the budget began; ``seconds`` is less if earlier stages were late
    steps: int = 0  # planned; 0: not yet known
    accumulate: int = 0  # micro-batches a step, if memory requires more than the recipe has; 0: the recipe's
    done: bool = False
    steps_done: int = 0
    images: int = 0  # or sequences
    trained_seconds: float = 0.0
    seconds_per_step: float = 0.0
    figures: dict[str, float] = dataclasses.field(default_factory=dict)
    flop_per_image: float = 0.0  # forward and backward; 0: not known
    peak: float = 0.0  # FLOP/s of the card in dense bf16; 0: not known

    @classmethod
    def load(cls, path: Path) -> StageRun:
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def save(self, path: Path) -> None:
        write_bytes(path, json.dumps(dataclasses.asdict(self), indent=1).encode())


@dataclass(frozen=True)
class StageResult:
    """The result of a training: steps and wall time including resumed parts, figures by name, seconds per step."""

    steps: int
    seconds: float
    figures: dict[str, float]
    seconds_per_step: float


# Recipe, log, and either None or the (least, most) seconds of a measurement, after which the run is saved and stops.
Engine = Callable[[Recipe, Log, tuple[float, float] | None], StageResult]


def train_stage(run: StageRun, save: Callable[[], None], log: Log, engine: Engine | None = None) -> None:
    """Train the recipe of ``run`` within its time; updates ``run`` and calls ``save``.

    Raises:  V2FlowError if not a single step fits into the time or into memory, and the errors of the training.
    """
    started = time.monotonic()
    recipe = load_recipe(run.recipe, run.overrides)
    engine = engine or run_recipe
    step, seconds = run.steps_done, run.trained_seconds
    if not run.steps:
        if _caches_on_disk(recipe):  # the first start computes the latents and takes longer than the later ones
            _with_memory(run, save, recipe, ENDLESS, 0.0, (0.0, 0.0), log, engine)
        begun = time.monotonic()
        probe = min(PROBE_SECONDS, PROBE_SHARE * run.seconds), PROBE_MOST * run.seconds
        result = _with_memory(run, save, recipe, ENDLESS, 0.0, probe, log, engine)
        run.seconds_per_step = result.seconds_per_step
        now = time.monotonic()
        setup = max(0.0, now - begun - result.steps * result.seconds_per_step)
        left = run.seconds - (now - started) - setup  # the run is set up again to continue
        run.steps = result.steps + max(0, int(MARGIN * left / run.seconds_per_step))
        _record(run, recipe, result)
        seconds = run.trained_seconds
        if run.planned_seconds < run.seconds_per_step:
            run.steps = 0  # so that more minutes measure it again
            save()
            raise _no_step_fits(run)
        log(f"{run.seconds_per_step:.3g} s a step: {run.steps:,} steps in {run.seconds / 60:.1f} minutes")
    elif run.done:  # a second run with more minutes: the first one measured the speed
        run.steps = step + max(1, int(MARGIN * run.seconds / max(run.seconds_per_step, 1e-9)))
        log(f"continues from step {step:,} to step {run.steps:,}")
    else:  # it was stopped
        step, seconds = saved_position(recipe)
        _shorten(run, step, log)
    run.done = False
    save()
    # Steps that are slower than the first must not use other stages' time.
    limit = max(1e-3, seconds + run.seconds - (time.monotonic() - started))
    result = _with_memory(run, save, recipe, run.steps, limit, None, log, engine)
    run.done = True
    _record(run, recipe, result)
    save()


def _caches_on_disk(recipe: Recipe) -> bool:
    return isinstance(recipe, TokenizerRecipe) and recipe.latents.cache not in ("", *IN_MEMORY)


def _shorten(run: StageRun, step: int, log: Log) -> None:
    """Plan fewer steps for a stage that was stopped at ``step`` if those left do not fit into its new time.

    In the time that it had before they fit, so that its schedule stays the same.

    Raises:  V2FlowError if not a single step fits; its number of steps is then kept for a run with more time.
    """
    left, second = run.steps - step, run.seconds_per_step
    if left * second <= run.seconds:
        return
    if run.planned_seconds < second:
        raise _no_step_fits(run)
    fits = max(1, int(MARGIN * run.seconds / second))
    if fits < left:
        log(
            f"{fits:,} of the {left:,} steps left fit into {run.seconds / 60:.1f} minutes at {second:.3g} s a step: "
            f"its schedule ends at step {step + fits:,} instead of {run.steps:,}"
        )
        run.steps = step + fits


def _no_step_fits(run: StageRun) -> V2FlowError:
    return V2FlowError(
        f"one step takes {run.seconds_per_step:.1f} s, but its share of the budget is {run.planned_seconds:.1f} s. "
        "Use more --minutes."
    )


def saved_position(recipe: Recipe) -> tuple[int, float]:
    """Step and seconds of the checkpoint from which a run of ``recipe`` resumes; (0, 0.0) without one.

    Raises:  ModelError if all checkpoints are damaged.
    """
    root = Path(recipe.output, "checkpoints")
    if isinstance(recipe, AutoencoderRecipe | TokenizerRecipe):
        newest = newest_record(root)
        return (0, 0.0) if newest is None else (newest[1]["step"], newest[1]["state"]["train_state"]["seconds"])
    from transformers import TrainerState

    from v2flow_cli.training.llm_checkpoints import damage
    from v2flow_cli.training.llm_trainer import RunClock

    checkpoint = newest_checkpoint(root, damage, lambda message: None)  # the resumed run logs the damaged ones
    if checkpoint is None:
        return 0, 0.0
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    return state.global_step, RunClock.saved_in(state)["seconds_before"]


def _record(run: StageRun, recipe: Recipe, result: StageResult) -> None:
    run.steps_done, run.trained_seconds, run.figures = result.steps, result.seconds, result.figures
    run.images = result.steps * recipe.train.batch_size


def _with_memory(
    run: StageRun,
    save: Callable[[], None],
    recipe: Recipe,
    steps: int,
    seconds: float,
    probe: tuple[float, float] | None,
    log: Log,
    engine: Engine,
) -> StageResult:
    """Train to ``steps`` or ``seconds``; if memory is too small, halve the micro-batch but not the batch."""
    while True:
        accumulate = run.accumulate or recipe.train.accumulate
        loop = dataclasses.replace(
            recipe.train, steps=steps, max_minutes=seconds / 60, accumulate=accumulate, budgeted=True
        )
        try:
            return engine(dataclasses.replace(recipe, train=cast(Any, loop)), log, probe)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            reason = str(error).strip().splitlines()[0]
        batch = recipe.train.batch_size
        if batch % (2 * accumulate):
            raise V2FlowError(
                f"too little memory even for micro-batches of {batch // accumulate} ({reason}). Reduce the recipe's "
                "crops, model or train.batch_size."
            )
        run.accumulate = 2 * accumulate
        save()
        log(
            f"too little memory for micro-batches of {batch // accumulate}: now {run.accumulate} micro-batches of "
            f"{batch // run.accumulate} per step, with the recipe's batch of {batch}"
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def run_recipe(recipe: Recipe, log: Log, probe: tuple[float, float] | None) -> StageResult:
    """Train a ``recipe`` of any kind from its newest checkpoint."""
    if isinstance(recipe, AutoencoderRecipe | TokenizerRecipe):
        return _train(recipe, log, probe)
    if probe is not None:
        recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, max_minutes=probe[0] / 60))
    if isinstance(recipe, FinetuneRecipe):
        from v2flow_cli.training.objectives.drawing import finetune

        report = finetune(recipe, log=log, resume=True)
    else:
        from v2flow_cli.training.objectives.language_model import pretrain

        assert isinstance(recipe, LMRecipe)
        report = pretrain(recipe, log=log, resume=True)
    figures = {"loss": report.train_loss}
    if report.eval_loss is not None:
        figures["held-out loss"] = report.eval_loss
    return StageResult(report.steps, report.minutes * 60, figures, report.minutes * 60 / max(1, report.steps))


def _train(recipe: AutoencoderRecipe | TokenizerRecipe, log: Log, probe: tuple[float, float] | None) -> StageResult:
    from v2flow_cli.training.loop import train

    started, ends, measured = time.monotonic(), list[float](), False

    def at_step(step: int) -> None:
        nonlocal measured
        if probe is None or measured:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # else the host runs some steps ahead
        ends.append(time.monotonic())
        least, most = probe
        # The first step compiles and warms up, so it does not count.
        enough = len(ends) > PROBE_STEPS and ends[-1] - ends[0] >= least
        if enough or (len(ends) > 1 and ends[-1] - started >= most):
            measured = True
            signal.raise_signal(signal.SIGTERM)  # the loop saves and stops without writing a model

    try:
        result = train(recipe, resume=True, log=log, at_step=at_step)
    except Interrupted as stop:
        if not measured:
            raise
        return StageResult(stop.step, ends[-1] - started, {}, (ends[-1] - ends[0]) / (len(ends) - 1))
    return StageResult(result.steps, result.seconds, result.metrics, result.seconds / max(1, result.steps))


def _log(message: str) -> None:
    with contextlib.suppress(OSError):  # of a budget that was killed: the stage goes on, and the next run finds it
        print(message, file=sys.stderr, flush=True)


def main(path: Path) -> int:
    """Run the request at ``path``; its exit code."""
    run = StageRun.load(path)
    try:
        train_stage(run, lambda: run.save(path), _log)
        if torch.cuda.is_available():
            from v2flow_cli.training.flops import peak_flop_per_s, training_flop

            run.peak = peak_flop_per_s(torch.device("cuda", torch.cuda.current_device()))
            run.flop_per_image = training_flop(load_recipe(run.recipe, run.overrides)) if run.peak else 0.0
            run.save(path)
    except Interrupted as stop:
        _log(str(stop))
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except V2FlowError as error:
        _log(f"error: {error}")
        return EXIT_FAILED
    return 0


def _quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()


if __name__ == "__main__":
    _quiet()
    raise SystemExit(main(Path(sys.argv[1])))
