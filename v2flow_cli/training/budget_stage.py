"""One training of a budget, in a process of its own: ``python -m v2flow_cli.training.budget_stage REQUEST.json``.

The first steps of a stage are a measurement: they run with a schedule that has no end, so that the learning rate warms
up and stays. By the time that they took, the stage's number of steps is set, and the same run goes on with it. The
number lies in the request's file from then on, so a stage that was killed resumes with it, exactly.
"""

from __future__ import annotations

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
from v2flow_cli.training.checkpoint import Interrupted

ENDLESS = 10**9  # steps of a schedule whose end is not known yet
PROBE_STEPS = 3  # after the first one
PROBE_SHARE, PROBE_SECONDS = 0.05, 30.0  # of a stage's time, that these and more steps take at least
PROBE_MOST = 0.5  # of a stage's time, after which the measurement ends whatever there is
MARGIN = 0.95  # of the time that is left after it, for steps that are slower than the first
EXIT_FAILED, EXIT_INTERRUPTED = 1, 130

Log = Callable[[str], None]


@dataclass
class StageRun:
    """What is known of one training of a budget, and kept in a file from one process to the next."""

    recipe: str  # path
    overrides: list[str]
    seconds: float  # wall time for it, the start of its process included
    planned_seconds: float = 0.0  # its share when the budget began; less is left where earlier stages were late
    steps: int = 0  # planned; 0: not known yet
    accumulate: int = 0  # micro-batches a step, where memory asked for more than the recipe has; 0: the recipe's
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
class Trained:
    """What a training came to: steps and wall time with the resumed parts, figures by name, and its pace now."""

    steps: int
    seconds: float
    figures: dict[str, float]
    seconds_per_step: float


# Recipe, log, and either None or the (least, most) seconds of a measurement, after which the run is saved and left.
Engine = Callable[[Recipe, Log, tuple[float, float] | None], Trained]


def train_stage(run: StageRun, save: Callable[[], None], log: Log, engine: Engine | None = None) -> None:
    """Train the recipe of ``run`` in the time that it has; ``run`` holds what came of it, and ``save`` keeps it.

    Raises:  V2FlowError where not one step fits into the time or into memory, and what the training raises.
    """
    started = time.monotonic()
    recipe = load_recipe(run.recipe, run.overrides)
    engine = engine or run_recipe
    before, cut_off = run.steps_done, run.steps > 0 and not run.done
    if not run.steps:
        probe = min(PROBE_SECONDS, PROBE_SHARE * run.seconds), PROBE_MOST * run.seconds
        found = _with_memory(run, save, recipe, ENDLESS, 0.0, probe, log, engine)
        run.seconds_per_step = found.seconds_per_step
        took = time.monotonic() - started
        setup = max(0.0, took - found.steps * found.seconds_per_step)
        left = run.seconds - took - setup  # the run goes on in a moment, and starts anew
        run.steps = found.steps + max(0, int(MARGIN * left / run.seconds_per_step))
        _record(run, recipe, found)
        if run.planned_seconds < run.seconds_per_step:
            run.steps = 0  # so that more minutes measure it again
            save()
            raise V2FlowError(
                f"one step takes {run.seconds_per_step:.1f} s, but its share of the budget is "
                f"{run.planned_seconds:.1f} s. Give more --minutes."
            )
        log(f"{run.seconds_per_step:.3g} s a step: {run.steps:,} steps in {run.seconds / 60:.1f} minutes")
    elif run.done:  # a second run with more minutes: the first one has measured it
        run.steps = before + max(1, int(MARGIN * run.seconds / max(run.seconds_per_step, 1e-9)))
        log(f"goes on from step {before:,} to step {run.steps:,}")
    run.done = False
    save()
    # Slower steps than the first must not take other stages' time. A stage that was killed takes the steps it had left.
    most = 0.0 if cut_off else max(1e-3, run.trained_seconds + run.seconds - (time.monotonic() - started))
    found = _with_memory(run, save, recipe, run.steps, most, None, log, engine)
    run.done = True
    _record(run, recipe, found)
    save()


def _record(run: StageRun, recipe: Recipe, found: Trained) -> None:
    run.steps_done, run.trained_seconds, run.figures = found.steps, found.seconds, found.figures
    run.images = found.steps * recipe.train.batch_size


def _with_memory(
    run: StageRun,
    save: Callable[[], None],
    recipe: Recipe,
    steps: int,
    seconds: float,
    probe: tuple[float, float] | None,
    log: Log,
    engine: Engine,
) -> Trained:
    """Train to ``steps`` or ``seconds``; where memory is too small the micro-batch is halved, and the batch is not."""
    while True:
        accumulate = run.accumulate or recipe.train.accumulate
        loop = dataclasses.replace(
            recipe.train, steps=steps, max_minutes=seconds / 60, accumulate=accumulate, budgeted=True
        )
        try:
            return engine(dataclasses.replace(recipe, train=cast(Any, loop)), log, probe)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _is_memory(error):
                raise
            reason = str(error).strip().splitlines()[0]
        batch = recipe.train.batch_size
        if batch % (2 * accumulate):
            raise V2FlowError(
                f"too little memory even for micro-batches of {batch // accumulate} ({reason}). Make the recipe's "
                "crops, model or train.batch_size smaller."
            )
        run.accumulate = 2 * accumulate
        save()
        log(
            f"too little memory for {batch // accumulate} at a time: {batch // run.accumulate} at a time, "
            f"{run.accumulate} times a step, which keeps the recipe's batch of {batch}"
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _is_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def run_recipe(recipe: Recipe, log: Log, probe: tuple[float, float] | None) -> Trained:
    """Train ``recipe``, of whichever kind, from its newest checkpoint."""
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
    return Trained(report.steps, report.minutes * 60, figures, report.minutes * 60 / max(1, report.steps))


def _train(recipe: AutoencoderRecipe | TokenizerRecipe, log: Log, probe: tuple[float, float] | None) -> Trained:
    from v2flow_cli.training.loop import train

    started, ends, measured = time.monotonic(), list[float](), False

    def at_step(step: int) -> None:
        nonlocal measured
        if probe is None or measured:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # else the host is some steps ahead
        ends.append(time.monotonic())
        least, most = probe
        # The first step compiles and warms up: it is no measure of the others.
        enough = len(ends) > PROBE_STEPS and ends[-1] - ends[0] >= least
        if enough or (len(ends) > 1 and ends[-1] - started >= most):
            measured = True
            signal.raise_signal(signal.SIGTERM)  # the loop saves, and leaves without writing a model

    try:
        done = train(recipe, resume=True, log=log, at_step=at_step)
    except Interrupted as stop:
        if not measured:
            raise
        return Trained(stop.step, ends[-1] - started, {}, (ends[-1] - ends[0]) / (len(ends) - 1))
    return Trained(done.steps, done.seconds, done.metrics, done.seconds / max(1, done.steps))


def _log(message: str) -> None:
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
