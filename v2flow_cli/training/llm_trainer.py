"""What pretraining and fine-tuning share: transformers' Trainer, set up from a recipe, and the saved folder."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState, PrinterCallback, ProgressCallback
from transformers.utils.logging import disable_progress_bar

from v2flow_cli.errors import ModelError
from v2flow_cli.recipe.schema import LMTrainLoop, Optimizer
from v2flow_cli.runtime.device import pick_device, pick_dtype, tf32
from v2flow_cli.runtime.processes import losing_contact, maximum, prepare_cpu_launch, sum_in_place, world_size
from v2flow_cli.store.files import publishing
from v2flow_cli.training.checkpoint import Interrupted, stop_requested
from v2flow_cli.training.guard import UnreadSteps, on_samples, skip_or_stop, what_is_wrong
from v2flow_cli.training.llm_checkpoints import SafeCheckpoints, newest_checkpoint, remove_unsealed
from v2flow_cli.training.muon import Muon
from v2flow_cli.training.optimizer import fuses
from v2flow_cli.training.resume import check_same_ranks, check_same_recipe

Log = Callable[[str], None]


@dataclass(frozen=True)
class TrainingReport:
    """What a finished run can say of itself."""

    output: str
    parameters: int
    processes: int
    steps: int  # taken in all, resumed parts included
    minutes: float  # wall time of the training, resumed parts included
    sequences_per_second: float
    train_loss: float  # nats a token, of the last logged steps
    eval_loss: float | None  # nats a token on the held-out sequences


class LMTrainer(SafeCheckpoints):
    """Trainer that judges every step, and decays matrices only: neither norms and biases nor the two tables."""

    clock: RunClock
    first_sample = 0  # where a resumed run goes on in the stream of training samples
    keys: Sequence[str] = ()  # of the samples of the step at hand, where they have names
    before: dict[str, Tensor]  # what was summed up before that step
    finished = False  # the run had ended before this process was started

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.unread = UnreadSteps()
        if self.args.device.type == "cuda" and not self._sharded:
            compile_layers(self.model)

    @property
    def place(self) -> str:
        """Step and process, for messages."""
        return f"step {self.state.global_step}, rank {self.args.process_index}"

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.finished:  # Trainer has put everything in its place, and would take a step before it noticed
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """The micro-batches of a step; what was summed up before them is kept, should the step be skipped."""
        self.before = self.unlogged()
        return super().get_batch_samples(*args, **kwargs)

    def restore_unlogged(self, sums: dict[str, Tensor]) -> None:
        super().restore_unlogged(sums)
        self.before = sums  # Trainer may have read the next step's micro-batches already

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The last word before the weights move.  Raises: SharedError for more bad steps than may be skipped."""
        norm = super()._get_grad_norm(model, grad_norm)
        if self._defers_reading:
            return self._leave_out_if_bad(torch.as_tensor(norm))
        if wrong := what_is_wrong(self.place, float(self._tr_loss), float(norm), self.keys, self.args.device):
            self.clock.skip(wrong, Path(self.args.output_dir))
            # Without gradients AdamW leaves weights and averages as they are. The log's means are over the other steps.
            model.zero_grad()
            self.restore_unlogged(self.before)
            self._globalstep_last_logged += 1
            return torch.zeros(())
        return norm

    @property
    def _defers_reading(self) -> bool:
        """Whether steps are judged on the device, and what it found is read only when a line or a checkpoint is due."""
        return self.args.device.type == "cuda" and not self._sharded

    def _leave_out_if_bad(self, norm: Tensor) -> Tensor:
        """Let the device undo a bad step that may be skipped; returns the gradient norm for the log, then 0."""
        self.unread.add(self.place, {"loss": self._tr_loss.detach().clone(), "grad_norm": norm}, list(self.keys))
        if not self.clock.skip_bad_steps:
            return norm
        bad = sum_in_place((~(torch.isfinite(self._tr_loss) & torch.isfinite(norm))).float()) > 0
        # torch's fused optimizers and Muon leave everything as it is where this is 1.
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
        """Trainer's, but the host goes on while pinned batches are copied."""
        if isinstance(data, Tensor):
            return data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Trainer's, or Muon for the matrices that are decayed.  Raises: ModelError where they lie in shards."""
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
    """Fuse each layer of a causal LM, which all are one graph; hooks, loss and output table stay outside.

    Layers that recompute their activations, and models whose layers are not found, stay as they are.
    """
    for layer in getattr(model.get_decoder(), "layers", None) or ():
        if not getattr(layer, "gradient_checkpointing", False):
            layer.compile(dynamic=False)


class RunClock(TrainerCallback, ExportableState):
    """Logs, and stops after ``max_minutes``, a signal, or too many bad steps; goes on counting after a resume.

    Args:  train, of the ``recipe`` that is dumped beside it.
    """

    def __init__(self, train: LMTrainLoop, recipe: str, log: Log) -> None:
        self.max_minutes, self.skip_bad_steps = train.max_minutes, train.skip_bad_steps
        self.sequences_per_step, self.recipe, self.log = train.batch_size, recipe, log
        self.precision = train.precision
        self.bad_steps = 0  # skipped so far
        self.seconds_before = 0.0  # of the runs that this one continues
        self.save_minutes, self.saved_seconds = train.save_minutes, 0.0  # and when the last checkpoint was due
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
        """Count a bad step.  Raises: SharedError where it is one too many."""
        self.bad_steps += 1
        skip_or_stop(wrong, self.bad_steps, self.skip_bad_steps, checkpoints, self.log)

    @property
    def time_is_up(self) -> bool:
        return bool(self.max_minutes) and self.seconds > 60 * self.max_minutes

    def sequences_per_second(self, step: int) -> float:
        return step * self.sequences_per_step / max(self.seconds, 1e-9)

    def go_on_from(self, checkpoint: Path, state: TrainerState, approximate: bool, log: Log) -> None:
        """Take time and loss of the run that a checkpoint's ``state`` belongs to.

        Raises:  ModelError for one of another recipe, or, unless ``approximate``, of another number of processes.
        """
        saved = state.stateful_callbacks[type(self).__name__]["attributes"]
        check_same_recipe(checkpoint, saved["recipe"], self.recipe)
        drawn = "dropout and the rounding of sums"
        check_same_ranks(checkpoint, saved["ranks"], world_size(), drawn=drawn, approximate=approximate, log=log)
        self.seconds_before, self.bad_steps = saved["seconds_before"], saved.get("bad_steps", 0)
        self.last_loss = next((logs["loss"] for logs in reversed(state.log_history) if "loss" in logs), math.nan)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started, self.saved_seconds = time.monotonic(), self.seconds_before

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved_seconds = self.seconds

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.ignore_data_skip:  # a stream, of which Trainer would count the steps since the resume
            state.epoch = state.global_step / state.max_steps
        if state.global_step == state.max_steps:
            control.should_log = True  # also between two multiples of log_every
        # Processes must leave the loop, and save, at the same step: what stops one of them stops all.
        due = bool(self.save_minutes) and self.seconds - self.saved_seconds > 60 * self.save_minutes
        flags = [self.time_is_up, bool(self.signals), due or control.should_save]
        late, self.interrupted, control.should_save = map(bool, maximum(flags))
        if (late or self.interrupted) and state.global_step < state.max_steps:
            if not self.interrupted:
                self.log(f"time limit: {self.max_minutes:g} minutes, stopping after step {state.global_step}")
                control.should_log = True
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
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
    """What Trainer takes as ``optimizer_cls_and_kwargs``; None for its own AdamW."""
    if settings.kind != "muon":
        return None
    return Muon, {"lr": settings.learning_rate, "betas": settings.betas, "fused": fuses(pick_device())}


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
        save_steps=train.save_every or train.steps,  # those by minutes are the clock's
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
        # One process with several GPUs would split batches by torch's DataParallel; a launcher is the way to use them.
        arguments._n_gpu = 1
    return arguments


def run(
    trainer: LMTrainer, clock: RunClock, output: str | Path, resume: bool, log: Log, approximate: bool = False
) -> None:
    """Train to the end, from the newest good checkpoint when resuming; a finished run is only loaded.

    With ``approximate`` that checkpoint may be of another number of processes.

    Raises:  Interrupted after SIGTERM or Ctrl-C, when the run is saved; ModelError where all checkpoints are damaged,
             or of another run; V2FlowError on a loss or gradient that is not finite, and when another process has
             gone.
    """
    if trainer.is_deepspeed_enabled and clock.skip_bad_steps:
        raise ModelError(
            f"train.skip_bad_steps is {clock.skip_bad_steps}; DeepSpeed moves the weights before a step can be judged. "
            "Set it to 0, or launch with FSDP."
        )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(clock)
    trainer.clock = clock
    disable_progress_bar()
    checkpoint = newest_checkpoint(Path(output, "checkpoints"), log) if resume else None
    if trainer.args.should_save:
        remove_unsealed(Path(output, "checkpoints"))
    if checkpoint:
        log(f"resuming from {checkpoint}")
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        clock.go_on_from(checkpoint, state, approximate, log)
        late = bool(clock.max_minutes) and clock.seconds_before > 60 * clock.max_minutes
        trainer.finished = late or state.global_step >= trainer.args.max_steps
        trainer.first_sample = state.global_step * clock.sequences_per_step
    contact = losing_contact(lambda: on_samples(trainer.place, trainer.keys))
    with tf32(clock.precision != "fp32"), stop_requested() as clock.signals, contact:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if clock.interrupted and trainer.state.global_step < trainer.args.max_steps:
        raise Interrupted(trainer.state.global_step)


def save_folder(
    trainer: Trainer,
    model: PreTrainedModel,
    tokenizer: Any,
    output: str | Path,
    save_dtype: str,
    files: Mapping[str, str | bytes],
) -> None:
    """The plain Hugging Face folder: config, safetensors, text tokenizer and the given ``files``.

    ``model`` is the trainer's model, or what its adapters were merged into. Everything is written under a
    temporary name in ``output`` first, so that an interrupted save leaves no half file.
    Raises:  ModelError where it cannot be written.
    """
    state_dict = trainer.accelerator.get_state_dict(trainer.model_wrapped) if model is trainer.model else None
    if not trainer.is_world_process_zero():
        return
    dtype = torch.bfloat16 if save_dtype == "bf16" else torch.float32
    state_dict = {name: tensor.to(dtype) for name, tensor in (state_dict or model.state_dict()).items()}
    # Copies are no longer one tensor in memory, by which save_pretrained would know a tied table.
    for copy, source in model.all_tied_weights_keys.items():
        if copy in state_dict and source in state_dict and torch.equal(state_dict[copy], state_dict[source]):
            del state_dict[copy]
    model.to(dtype)  # save_pretrained writes the model's own dtype into the config
    model.config.use_cache = True  # Trainer turns it off
    if hasattr(model.config, "v2flow"):
        model.config.v2flow["weights_digest"] = weights_digest(state_dict)
    try:
        with publishing(Path(output), ".saving-") as partial:
            model.save_pretrained(partial, state_dict=state_dict)
            tokenizer.save_pretrained(partial)
            for name, content in files.items():
                (partial / name).write_bytes(content.encode() if isinstance(content, str) else content)
    except Exception as error:  # safetensors and tokenizers have kinds of their own for a full disk
        raise ModelError(f"{output}: the model cannot be written ({error}). Make room, then --resume.") from error


def weights_digest(state_dict: Mapping[str, torch.Tensor]) -> str:
    """16 hex digits over names and values: which weights a picture was drawn with."""
    sha = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        sha.update(name.encode())
        sha.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def estimate(
    train: LMTrainLoop, parameters: int, trained: int, sequence: int, vocab_size: int, config: Any
) -> dict[str, int | float]:
    """Rough memory and time of a run, for ``--dry-run``; the speed is that of one matrix product here and now.

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
