"""transformers' Trainer, set up from a recipe, for pretraining and fine-tuning."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState, PrinterCallback, ProgressCallback
from transformers.utils.logging import disable_progress_bar

from v2flow_cli.errors import ModelError
from v2flow_cli.recipe.schema import LMTrainLoop, Optimizer
from v2flow_cli.runtime.allocator import keep_freed_memory
from v2flow_cli.runtime.device import pick_device, pick_dtype, tf32
from v2flow_cli.runtime.processes import losing_contact, maximum, prepare_cpu_launch, sum_in_place, world_size
from v2flow_cli.training.checkpoint import Interrupted, newest_checkpoint, stop_requested
from v2flow_cli.training.guard import UnreadSteps, on_samples, skip_or_stop, what_is_wrong
from v2flow_cli.training.llm_checkpoints import SafeCheckpoints, damage, remove_unsealed
from v2flow_cli.training.muon import Muon
from v2flow_cli.training.optimizer import fuses
from v2flow_cli.training.resume import check_same_ranks, check_same_recipe

Log = Callable[[str], None]
LOG_LINES = 1000  # the last ones, which are kept in memory and in each checkpoint


@dataclass(frozen=True)
class TrainingReport:
    """The figures of a finished run."""

    output: str
    parameters: int
    processes: int
    steps: int  # in all, including resumed parts
    minutes: float  # wall time of the training, including resumed parts
    sequences_per_second: float
    train_loss: float  # nats a token, of the last logged steps
    eval_loss: float | None  # nats a token on the held-out sequences


class LMTrainer(SafeCheckpoints):
    """Trainer that checks every step, with weight decay on matrices only: not on norms, biases and the two tables."""

    clock: RunClock
    first_sample = 0  # the position of a resumed run in the stream of samples
    keys: Sequence[str] = ()  # of the samples of the current step, if they have names
    before: dict[str, Tensor]  # the sums before that step
    finished = False  # the run had already ended when this process started

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.unread = UnreadSteps()
        if self.args.device.type == "cuda" and not self._sharded:
            compile_layers(self.model)

    @property
    def position(self) -> str:
        """Step and process, for messages."""
        return f"step {self.state.global_step}, rank {self.args.process_index}"

    def report(self, output: str, parameters: int, held_out: bool) -> TrainingReport:
        """The figures of the finished run, with the held-out loss if there are such sequences."""
        step, minutes = self.state.global_step, self.clock.seconds / 60
        return TrainingReport(
            output=output,
            parameters=parameters,
            processes=self.args.world_size,
            steps=step,
            minutes=minutes,
            sequences_per_second=self.clock.sequences_per_second(step),
            train_loss=self.clock.last_loss,
            eval_loss=self.evaluate()["eval_loss"] if held_out else None,
        )

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.finished:  # Trainer has restored everything, but would take one more step
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """The micro-batches of a step; the sums before them are stored in case the step is skipped."""
        self.before = self.unlogged()
        return super().get_batch_samples(*args, **kwargs)

    def restore_unlogged(self, sums: dict[str, Tensor]) -> None:
        super().restore_unlogged(sums)
        self.before = sums  # Trainer may have read the next step's micro-batches already

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Check the step before the weights change.  Raises: SharedError for more bad steps than may be skipped."""
        norm = super()._get_grad_norm(model, grad_norm)
        if self._defers_reading:
            return self._leave_out_if_bad(torch.as_tensor(norm))
        if wrong := what_is_wrong(self.position, float(self._tr_loss), float(norm), self.keys, self.args.device):
            self.clock.skip(wrong, Path(self.args.output_dir))
            # Without gradients AdamW changes neither weights nor averages. The log's means are over the other steps.
            model.zero_grad()
            self.restore_unlogged(self.before)
            self._globalstep_last_logged += 1
            return torch.zeros(())
        return norm

    @property
    def _defers_reading(self) -> bool:
        """True if steps are checked on the device, and the results read only for a log line or a checkpoint."""
        return self.args.device.type == "cuda" and not self._sharded

    def _leave_out_if_bad(self, norm: Tensor) -> Tensor:
        """Let the device undo a bad step that may be skipped; the gradient norm for the log, 0 for a bad step."""
        self.unread.add(self.position, {"loss": self._tr_loss.detach().clone(), "grad_norm": norm}, list(self.keys))
        if not self.clock.skip_bad_steps:
            return norm
        bad = sum_in_place((~(torch.isfinite(self._tr_loss) & torch.isfinite(norm))).float()) > 0
        # With 1, torch's fused optimizers and Muon change nothing.
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        optimizer.found_inf = bad.float()
        self.restore_sums({k: torch.where(bad, self.before[k], v) for k, v in self.sums_by_name().items()})
        return torch.where(bad, 0.0, norm)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.control.should_log or self.control.should_save:
            for _, wrong in self.unread.read():
                if wrong:
                    self.clock.skip(wrong, Path(self.args.output_dir))
                    self._globalstep_last_logged += 1
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _prepare_input(self, data: Any) -> Any:
        """Trainer's method, with asynchronous copies of pinned batches."""
        if isinstance(data, Tensor):
            return data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Trainer's optimizer, or Muon for the matrices with weight decay.  Raises: ModelError if they are sharded."""
        optimizer = super().create_optimizer(model)
        if isinstance(optimizer, Muon):
            if self._sharded:
                raise ModelError(
                    "optimizer.kind is muon, which needs whole matrices, but FSDP and DeepSpeed split them. Use adamw."
                )
            optimizer.param_groups[0]["orthogonal"] = True
        return optimizer

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        tables = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        matrices = super().get_decay_parameter_names(model)
        # Trainer also names parameters that are None.
        return [name for name in matrices if name in parameters and id(parameters[name]) not in tables]


def compile_layers(model: Any) -> None:
    """Compile each layer of a causal LM; all layers share one graph. Hooks, loss and output table are not compiled.

    Layers that recompute their activations, and models without a list of layers, stay unchanged.
    """
    for layer in getattr(model.get_decoder(), "layers", None) or ():
        if not getattr(layer, "gradient_checkpointing", False):
            layer.compile(dynamic=False)


class RunClock(TrainerCallback, ExportableState):
    """Logs, and stops after ``max_minutes``, a signal, or too many bad steps; its counts continue after a resume.

    Args:  train, of ``recipe``, which is the dumped recipe.
    """

    def __init__(self, train: LMTrainLoop, recipe: str, log: Log) -> None:
        self.max_minutes, self.skip_bad_steps = train.max_minutes, train.skip_bad_steps
        self.sequences_per_step, self.recipe, self.log = train.batch_size, recipe, log
        self.precision = train.precision
        self.bad_steps = 0  # skipped so far
        self.seconds_before = 0.0  # of the runs that this one continues
        self.save_minutes, self.saved_seconds = train.save_minutes, 0.0  # and the time of the last checkpoint
        self.started = time.monotonic()
        self.last_loss = math.nan
        self.signals: list[int] = []  # received; see ``stop_requested``
        self.interrupted = False

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def state(self) -> dict[str, Any]:
        attributes = {"seconds_before": self.seconds, "recipe": self.recipe, "ranks": world_size()}
        return {"args": {}, "attributes": attributes | {"bad_steps": self.bad_steps}}

    def skip(self, wrong: str, checkpoints: Path) -> None:
        """Count a bad step.  Raises: SharedError if it is one too many."""
        self.bad_steps += 1
        skip_or_stop(wrong, self.bad_steps, self.skip_bad_steps, checkpoints, self.log)

    @property
    def time_is_up(self) -> bool:
        return bool(self.max_minutes) and self.seconds > 60 * self.max_minutes

    def sequences_per_second(self, step: int) -> float:
        return step * self.sequences_per_step / max(self.seconds, 1e-9)

    @classmethod
    def saved_in(cls, state: TrainerState) -> dict[str, Any]:
        """The attributes of ``state`` that a clock stored in a checkpoint."""
        return state.stateful_callbacks[cls.__name__]["attributes"]

    def restore(self, checkpoint: Path, state: TrainerState, approximate: bool, log: Log) -> None:
        """Restore time and loss of a checkpoint's run from its ``state``.

        Raises:  ModelError for another recipe, or, unless ``approximate``, of another number of processes.
        """
        saved = self.saved_in(state)
        check_same_recipe(checkpoint, saved["recipe"], self.recipe)
        random_parts = "dropout and the rounding of sums"
        check_same_ranks(checkpoint, saved["ranks"], world_size(), parts=random_parts, approximate=approximate, log=log)
        self.seconds_before, self.bad_steps = saved["seconds_before"], saved.get("bad_steps", 0)
        self.last_loss = next((logs["loss"] for logs in reversed(state.log_history) if "loss" in logs), math.nan)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.compute_steps(args, state.max_steps)  # else a resumed run saves and logs as often as before
        self.started, self.saved_seconds = time.monotonic(), self.seconds_before

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved_seconds = self.seconds

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.ignore_data_skip:  # a stream, for which Trainer would count the steps since the resume
            state.epoch = state.global_step / state.max_steps
        if state.global_step == state.max_steps:
            control.should_log = True  # also between two multiples of log_every
        # Processes must leave the loop, and save, at the same step: if one of them stops, all stop.
        due = bool(self.save_minutes) and self.seconds - self.saved_seconds > 60 * self.save_minutes
        flags = [self.time_is_up, bool(self.signals), due or control.should_save]
        late, self.interrupted, control.should_save = map(bool, maximum(flags))
        if (late or self.interrupted) and state.global_step < state.max_steps:
            if not self.interrupted:
                self.log(f"time limit: {self.max_minutes:g} minutes, stopping after step {state.global_step}")
                control.should_log = True
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        del state.log_history[:-LOG_LINES]
        if "eval_loss" in logs:
            self.log(f"step {state.global_step}/{state.max_steps}  held-out loss {logs['eval_loss']:.4f}")
        if "loss" not in logs:
            return
        self.last_loss = logs["loss"]
        terms = "  ".join(f"{name} {logs[name]:.3f}" for name in logs if name.endswith("loss"))
        speed = self.sequences_per_second(state.global_step)
        self.log(
            f"step {state.global_step}/{state.max_steps}  {terms}  grad {logs.get('grad_norm', math.nan):.2f}  "
            f"lr {logs['learning_rate']:.2e}  {speed:.1f} sequences/s  {self.seconds / 60:.1f} min"
        )


def optimizer_class(settings: Optimizer) -> tuple[type[Muon], dict[str, Any]] | None:
    """Trainer's ``optimizer_cls_and_kwargs``; None for its own AdamW."""
    if settings.kind != "muon":
        return None
    return Muon, {"lr": settings.learning_rate, "betas": settings.betas, "fused": fuses(pick_device())}


# Positions. On a CPU plain attention was faster at 84, 150 and 300; its memory grows with their square.
EAGER_LONGEST = 512


def choose_attention(model: PreTrainedModel, longest: int, device: torch.device) -> None:
    """Use transformers' plain ("eager") attention to train ``model`` on a CPU on at most ``longest`` positions each.

    torch's fused function saves memory on long sequences; on short ones with padding a CPU takes longer for it
    (docs/train.md).
    """
    if device.type == "cpu" and longest <= EAGER_LONGEST:
        model.set_attn_implementation("eager")


def training_arguments(
    optimizer: Optimizer, train: LMTrainLoop, output: str | Path, **overrides: Any
) -> TrainingArguments:
    """Trainer settings of a recipe; checkpoints go to ``output``/checkpoints."""
    prepare_cpu_launch()
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if train.batch_size % (train.accumulate * processes):
        raise ModelError(
            f"train.batch_size is {train.batch_size}; expected a multiple of accumulate x processes "
            f"({train.accumulate} x {processes})."
        )
    device = pick_device()
    keep_freed_memory(device)
    arguments = TrainingArguments(
        output_dir=str(Path(output) / "checkpoints"),
        max_steps=train.steps,
        per_device_train_batch_size=train.batch_size // train.accumulate // processes,
        per_device_eval_batch_size=train.batch_size // train.accumulate // processes,
        gradient_accumulation_steps=train.accumulate,
        learning_rate=optimizer.learning_rate,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        weight_decay=optimizer.weight_decay,
        warmup_steps=optimizer.warmup_steps,
        lr_scheduler_type="cosine" if optimizer.schedule == "cosine" else "constant_with_warmup",
        max_grad_norm=optimizer.clip_norm,
        bf16=pick_dtype(train.precision, device) == torch.bfloat16,
        use_cpu=device.type == "cpu",  # without it Trainer refuses bf16 on a CPU
        seed=train.seed,
        data_seed=train.seed,
        logging_steps=train.log_every,
        logging_nan_inf_filter=False,
        save_steps=train.save_every or train.steps,  # RunClock saves by minutes
        eval_strategy="steps" if train.eval_every else "no",
        eval_steps=train.eval_every or None,
        save_total_limit=train.keep_checkpoints,
        disable_tqdm=True,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        **overrides,
    )
    if arguments.n_gpu > 1:
        # One process with several GPUs would use torch's DataParallel; several GPUs need a launcher.
        arguments._n_gpu = 1
    return arguments


def run(
    trainer: LMTrainer, clock: RunClock, output: str | Path, resume: bool, log: Log, approximate: bool = False
) -> None:
    """Train to the end, from the newest good checkpoint when resuming; a finished run is only loaded.

    With ``approximate`` that checkpoint may be of another number of processes.

    Raises:  Interrupted after SIGTERM or Ctrl-C, when the run is saved; ModelError if all checkpoints are damaged, or
             of another run; V2FlowError for a loss or gradient that is not finite, and if another process has ended.
    """
    if trainer.is_deepspeed_enabled and clock.skip_bad_steps:
        raise ModelError(
            f"train.skip_bad_steps is {clock.skip_bad_steps}; DeepSpeed changes the weights before a step can be "
            "checked. Set it to 0, or launch with FSDP."
        )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(clock)
    trainer.clock = clock
    disable_progress_bar()
    checkpoint = newest_checkpoint(Path(output, "checkpoints"), damage, log) if resume else None
    if trainer.args.should_save:
        remove_unsealed(Path(output, "checkpoints"))
    if checkpoint:
        log(f"resuming from {checkpoint}")
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        clock.restore(checkpoint, state, approximate, log)
        late = bool(clock.max_minutes) and clock.seconds_before > 60 * clock.max_minutes
        trainer.finished = late or state.global_step >= trainer.args.max_steps
        trainer.first_sample = state.global_step * clock.sequences_per_step
    contact = losing_contact(lambda: on_samples(trainer.position, trainer.keys))
    with tf32(clock.precision != "fp32"), stop_requested() as clock.signals, contact:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if clock.interrupted and trainer.state.global_step < trainer.args.max_steps:
        raise Interrupted(trainer.state.global_step)


def estimate(
    train: LMTrainLoop, parameters: int, trained: int, sequence: int, vocab_size: int, config: Any
) -> dict[str, int | float]:
    """Rough memory and time of a run, for ``--dry-run``; the speed is that of one matrix product on this machine.

    Args:  sequence, tokens a sample; config, of the model. Counts of parameters are over all ranks.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 4096 if device == "cuda" else 512
    matrix = torch.randn(size, size, device=device)
    (matrix @ matrix).sum().item()  # the first one also starts the library
    start = time.perf_counter()
    (matrix @ matrix).sum().item()
    flops = 2 * size**3 / (time.perf_counter() - start)
    tokens = train.batch_size * sequence
    # About 16 activations of the hidden width a layer stay for the backward pass; logits count three times.
    activations = config.num_hidden_layers * config.hidden_size * (2 if train.gradient_checkpointing else 16)
    bytes_used = 4 * parameters + 12 * trained + 4 * tokens // train.accumulate * (activations + 3 * vocab_size)
    return {
        "parameters": parameters,
        "trained_parameters": trained,
        "tokens_per_sample": sequence,
        "tokens_per_step": tokens,
        "steps": train.steps,
        "memory_gib": bytes_used / 2**30,
        "minutes": 6 * parameters * tokens * train.steps / flops / 60,
    }
