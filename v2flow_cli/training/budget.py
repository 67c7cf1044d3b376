"""A set of models within a wall time: the work of ``v2flow budget``.

Every stage runs in its own process, and starts when the stages that it needs are done; independent stages run at the
same time. Its time is its share of the time left at that moment. ``budget.json`` in the budget's folder records the
finished commands: the same command continues after any stop, and with more minutes after the end.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import yaml

from v2flow_cli.errors import DataError, ModelError, V2FlowError
from v2flow_cli.recipe import FinetuneRecipe, LMRecipe, Recipe, dump_recipe
from v2flow_cli.recipe.budget import Budget, Stage, ancestors, is_continued
from v2flow_cli.runtime.device import cpu_cores
from v2flow_cli.store.files import write_bytes
from v2flow_cli.store.lock import locked
from v2flow_cli.store.paths import not_writable
from v2flow_cli.training.budget_stage import StageRun
from v2flow_cli.training.resume import check_same_recipe
from v2flow_cli.training.schedule import planned_windows, window

STATE = "budget.json"  # {command stage: its seconds}; each training has its own file, budget-NAME.json
LEAST = 0.1  # the part of its share that a stage gets even if earlier stages were late
PATIENCE = 60.0  # seconds to save after a signal
Log = Callable[[str], None]


@dataclass(frozen=True)
class StageFigures:
    """One row of the table at the end."""

    stage: str
    steps: int  # 0 for a command
    images_per_s: float | None  # sequences for an LLM
    peak_share: float | None  # of the device's peak in dense bf16 products, if it is known
    figure: str  # the name and value of the last loss or metric
    seconds: float  # of this and earlier runs


@dataclass
class _Running:
    stage: Stage
    process: subprocess.Popen[str]
    started: float
    reader: threading.Thread
    last_lines: list[str] = field(default_factory=list)  # of its output


def run_budget(budget: Budget, minutes: float, log: Log) -> list[StageFigures]:
    """Run the unfinished stages of ``budget`` within ``minutes`` of wall time; the figures of all stages.

    Raises:  as ``check_inputs``; V2FlowError, with the name of the stage that failed, after the others are saved; and
             KeyboardInterrupt, likewise.
    """
    to_do = stages_to_do(budget)
    check_inputs(budget, to_do)
    planned = planned_seconds(budget, minutes)
    end = time.monotonic() + 60 * minutes
    done = {name for name in budget.stages if name not in to_do}
    for name in (name for name in budget.stages if name in done):
        log(f"{name}: done by an earlier run")
    running: dict[str, _Running] = {}
    # The stages inherit the lock, so that no second run starts a stage that outlives a killed budget.
    with locked(budget.folder) as lock, _stopping(running):
        while len(done) < len(budget.stages):
            # All ancestors: a stage that is done already may itself depend on one that has to run again.
            waiting = [name for name in to_do if name not in done and name not in running]
            ready = [name for name in waiting if ancestors(budget.stages, name) <= done]
            for name in ready:
                left = [n for n in to_do if n not in done]
                seconds = window(budget.stages, left, name, max(0.0, end - time.monotonic()))
                seconds = max(seconds, LEAST * planned[name])
                threads = max(1, cpu_cores() // (len(running) + len(ready)))
                running[name] = _start(budget, budget.stages[name], seconds, planned[name], threads, lock, log)
            time.sleep(0.05)
            for name, job in list(running.items()):
                if job.process.poll() is None:
                    continue
                job.reader.join()
                del running[name]
                _finish(budget, job)
                done.add(name)
    return figures(budget)


def stages_to_do(budget: Budget) -> list[str]:
    """The stages that a run would start: unfinished ones, and those that more minutes continue."""
    finished = _commands_done(budget)

    def is_done(stage: Stage) -> bool:
        if stage.recipe is None:
            return stage.name in finished
        return _state(budget, stage).exists() and StageRun.load(_state(budget, stage)).done

    stages = budget.stages
    return [name for name, stage in stages.items() if not is_done(stage) or is_continued(stages, name)]


def planned_seconds(budget: Budget, minutes: float) -> dict[str, float]:
    """Wall time of each stage that a run would start, if each takes its share."""
    to_do = stages_to_do(budget)
    return planned_windows(budget.stages, to_do, 60 * minutes) if to_do else {}


def check_inputs(budget: Budget, to_do: Iterable[str]) -> None:
    """Check the folder, and the data and outputs of the trainings, before any of them starts.

    Raises:  DataError for a folder that cannot be written, and for missing data that no stage writes; ModelError for
             an output that holds the run of another recipe.
    """
    if problem := not_writable(budget.folder):
        raise DataError(f"folder {budget.folder}: {problem}.")
    recipes = {name: stage.recipe for name, stage in budget.stages.items() if stage.recipe is not None}
    outputs = [Path(recipe.output) for recipe in recipes.values()]
    # The output of a command is one of its words.
    outputs += [Path(word) for stage in budget.stages.values() for word in stage.run if not word.startswith("-")]
    for name in to_do:
        recipe = recipes.get(name)
        if recipe is None:
            continue
        key, sources = _sources(recipe)
        for source in sources:
            if not any(Path(source) == output or output in Path(source).parents for output in outputs):
                if not Path(source).exists() and not glob.glob(source, recursive=True):
                    raise DataError(
                        f"{budget.stages[name].recipe_path}: the data {source} does not exist, and no stage of this "
                        f"run writes it. Name yours with --set {name}.{key}=[PATH]."
                    )
        _check_output(budget, budget.stages[name])


def _check_output(budget: Budget, stage: Stage) -> None:
    assert stage.recipe is not None
    folder = Path(stage.recipe.output)
    begun = (folder / "checkpoints").is_dir() and any((folder / "checkpoints").iterdir())
    if not begun and not (folder / "config.json").exists():
        return
    saved = folder / "recipe.yaml"
    state = _state(budget, stage)
    if not state.exists():
        raise ModelError(
            f"{folder}: already holds a run, which is not one of this budget. Choose another folder with "
            f"--set {stage.name}.output=FOLDER, or move that run away."
        )
    if saved.exists():
        old = yaml.safe_load(saved.read_text(encoding="utf-8"))
        new = yaml.safe_load(dump_recipe(stage.recipe))
        new["train"]["budgeted"] = old["train"]["budgeted"] = True
        check_same_recipe(folder, yaml.safe_dump(old), yaml.safe_dump(new))


def _sources(recipe: Recipe) -> tuple[str, tuple[str, ...]]:
    """The key of a recipe's training data, and its value."""
    if isinstance(recipe, LMRecipe):
        return "text", recipe.text
    if isinstance(recipe, FinetuneRecipe):
        return "data.token_sets", recipe.data.token_sets
    return "data.sources", recipe.data.sources


def _state(budget: Budget, stage: Stage) -> Path:
    return budget.folder / f"budget-{stage.name}.json"


def _load_run(budget: Budget, stage: Stage) -> StageRun:
    file = _state(budget, stage)
    return StageRun.load(file) if file.exists() else StageRun(str(stage.recipe_path), [], 0.0)


def _commands_done(budget: Budget) -> dict[str, float]:
    try:
        return dict(json.loads((budget.folder / STATE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ModelError(f"{budget.folder / STATE}: not JSON ({error}). Remove it to run the commands again.") from None


def _start(
    budget: Budget, stage: Stage, seconds: float, planned: float, threads: int, lock: int | None, log: Log
) -> _Running:
    log(f"{stage.name}: starts, with {seconds / 60:.1f} minutes")
    if stage.recipe is None:
        names = {"v2flow": [sys.executable, "-m", "v2flow_cli"], "python": [sys.executable]}
        words = [word.replace("{minutes}", f"{seconds / 60:.4f}") for word in stage.run]
        command = [*names.get(words[0], words[:1]), *words[1:]]
    else:
        file, run = _state(budget, stage), _load_run(budget, stage)
        run.recipe, run.overrides = str(stage.recipe_path), list(stage.overrides)
        run.seconds, run.planned_seconds = seconds, planned
        run.save(file)
        command = [sys.executable, "-m", "v2flow_cli.training.budget_stage", str(file)]
    environment = os.environ | ({} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(threads)})
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=environment,
            pass_fds=() if lock is None else (lock,),
            start_new_session=True,  # Ctrl-C goes to this process, which then stops the stages
        )
    except OSError as error:
        raise V2FlowError(f"stage {stage.name}: {command[0]} cannot be run ({error.strerror}).") from None
    job = _Running(stage, process, time.monotonic(), threading.Thread())
    assert process.stderr is not None
    job.reader = threading.Thread(target=_copy_output, args=(process.stderr, job, budget, log), daemon=True)
    job.reader.start()
    return job


def _copy_output(lines: TextIO, job: _Running, budget: Budget, log: Log) -> None:
    """Copy the output of a stage to the log and to its own file.

    A file that cannot be written ends nothing: a stage whose output is not read would wait forever.
    """
    path, written = budget.folder / f"budget-{job.stage.name}.log", True
    for line in lines:
        job.last_lines = [*job.last_lines, line.strip()][-20:]
        log(f"{job.stage.name}: {line.rstrip()}")
        if written:
            try:
                with open(path, "a", encoding="utf-8") as file:
                    file.write(line)
            except OSError as error:
                written = False
                log(f"{path}: cannot be written ({error.strerror}); the output of the stage is shown here alone")


def _finish(budget: Budget, job: _Running) -> None:
    if job.process.returncode:
        errors = [line.removeprefix("error: ") for line in job.last_lines if line.startswith("error: ")]
        lines = errors or job.last_lines
        reason = lines[-1] if lines else f"it ended with exit code {job.process.returncode}."
        raise V2FlowError(f"stage {job.stage.name}: {reason}")
    if job.stage.recipe is None:
        seconds = _commands_done(budget) | {job.stage.name: time.monotonic() - job.started}
        write_bytes(budget.folder / STATE, json.dumps(seconds, indent=1).encode())


@contextlib.contextmanager
def _stopping(running: dict[str, _Running]) -> Iterator[None]:
    """At the end of the block, also after an error, stop all running stages; each of them saves."""
    try:
        yield
    finally:
        for job in running.values():
            with contextlib.suppress(ProcessLookupError):
                job.process.send_signal(signal.SIGTERM)
        for job in running.values():
            try:
                job.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                job.process.kill()
                job.process.wait()
            job.reader.join()


def figures(budget: Budget) -> list[StageFigures]:
    """One row for each stage, with its figures so far."""
    rows = []
    seconds_of = _commands_done(budget)
    for name, stage in budget.stages.items():
        if stage.recipe is None:
            rows.append(StageFigures(name, 0, None, None, "", seconds_of.get(name, 0.0)))
            continue
        run = _load_run(budget, stage)
        speed = run.images / run.trained_seconds if run.trained_seconds else None
        share = speed * run.flop_per_image / run.peak if speed and run.flop_per_image and run.peak else None
        rows.append(StageFigures(name, run.steps_done, speed, share, _main_figure(run.figures), run.trained_seconds))
    return rows


def _main_figure(values: dict[str, float]) -> str:
    """The most informative of a run's last figures."""
    for key in ("psnr", "held-out loss", "loss"):
        for name, value in values.items():
            if name.split("/")[-1] == key:
                return f"{key} {value:.4g}"
    return ""
