"""Options that several commands share; those of the decoder take their types from ``recipe/schema.py``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer

from v2flow_cli.recipe.ranges import MOST_SAMPLING_STEPS
from v2flow_cli.recipe.schema import SAMPLING_OPTIONS, DrawSampling, Guidance, GuidanceSchedule, Solver

N = TypeVar("N", int, float)

# Models, machines, output.
Tokenizer = Annotated[
    str | None,
    typer.Option(
        "--model", help="Tokenizer: folder, hub id, or flexible (FlexTok's parts). Default: the one inside the package."
    ),
]
ImageTokenizer = Annotated[
    str | None,
    typer.Option(help="Image tokenizer: folder, hub id, or flexible. Default: the one inside the package."),
]
Tokenizers = Annotated[
    list[str] | None,
    typer.Option(
        help="Tokenizer: folder, hub id, default or flexible; may be repeated. Default: the one inside the package."
    ),
]
Llm = Annotated[str | None, typer.Option(help="LLM: folder or hub id. Default: the one inside the package.")]
Seed = Annotated[int, typer.Option(help="Seed of the noise; each image's seed is derived from it and its name.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images at a time.")]
DeviceBatchSize = Annotated[int | None, typer.Option(min=1, help="Images at a time. Default: 8, more on a GPU.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str, typer.Option(help="auto (bf16 if it is fast), fp32 or bf16.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite files that exist.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Refine = Annotated[
    int | None,
    typer.Option(
        metavar="STEPS",
        min=0,
        help="Gradient steps on each image for ids that decode better: slower. Default: the model's, if a number of "
        "tokens is given.",
    ),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Stop after this many images.")]
Images = Annotated[
    list[str] | None,
    typer.Argument(help="Image files, folders, globs or WebDataset tars. Default: five sample photos."),
]
Aspect = Annotated[
    Literal["square", "keep"],
    typer.Option(help="square: the centre crop. keep: the whole picture, of the same area."),
]
ErrorBudget = Annotated[
    float, typer.Option(min=0, max=1, help="Share of bad images up to which the exit code is 0; all are listed.")
]
Csv = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the table: one line a system.")]
Report = Annotated[Path | None, typer.Option(metavar="FILE.html", help="Write a page with all results.")]

# Trainings.
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key, such as train.steps=100; repeatable."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in the recipe's output folder.")]
Approximate = Annotated[
    bool, typer.Option("--approximate", help="Allow --resume with another number of processes, which is not exact.")
]
Push = Annotated[
    str | None, typer.Option(metavar="REPO", help="Upload the finished model to the hub, as OWNER/NAME, private.")
]
Public = Annotated[bool, typer.Option("--public", help="Make the repository of --push public.")]

# How an LLM samples; the default of each is the LLM's.
TopK = Annotated[
    int | None, typer.Option(min=0, help="Keep the k most likely tokens; 0 keeps all. Default: the LLM's.")
]
TopP = Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Keep this probability mass. Default: the LLM's.")]
LlmCfg = Annotated[
    float | None, typer.Option(min=0.0, help="Guidance scale of the LLM; 1 means none. Default: the LLM's.")
]
MostTokens = Annotated[
    int | None,
    typer.Option(min=1, help="Largest number of tokens of a picture (LLMs of flexible length). Default: all."),
]

# How a decoder samples; the default of each is the model's.
Decoder = Annotated[
    str | None,
    typer.Option(help="faithful (PSNR, SSIM) or sharp (texture), if the model has both. Default: the model's."),
]
Cfg = Annotated[float | None, typer.Option(min=0.0, help="Guidance scale; 1 means none. Default: the model's.")]
Rounds = Annotated[
    int | None, typer.Option(min=1, max=MOST_SAMPLING_STEPS, help="Unmasking rounds. Default: the model's.")
]
Steps = Annotated[
    int | None, typer.Option(min=1, max=MOST_SAMPLING_STEPS, help="ODE steps in each round. Default: the model's.")
]
SolverName = Annotated[Solver | None, typer.Option("--solver", help="ODE solver. Default: the model's.")]
Schedule = Annotated[
    GuidanceSchedule | None,
    typer.Option("--schedule", help="linear raises the guidance from 1 during sampling. Default: the model's."),
]
GuidanceKind = Annotated[
    Guidance | None,
    typer.Option("--guidance", help="apg limits colour and contrast shifts at high --cfg. Default: the model's."),
]
Noise = Annotated[
    float | None,
    typer.Option(min=0.0, help="Factor on the initial noise; 0 gives the mean. Default: the model's."),
]


def sampling(**values: Any) -> dict[str, Any]:
    """The values of decoder options by the names of ``Sampling``; None takes the model's value."""
    return {SAMPLING_OPTIONS[name]: value for name, value in values.items()}


def llm_sampling(stored: DrawSampling, **values: Any) -> DrawSampling:
    """The LLM's ``stored`` sampling with the values of options; None keeps the stored one."""
    return dataclasses.replace(stored, **{name: value for name, value in values.items() if value is not None})


def numbers(option: str, text: str, least: float, kind: type[N] = int) -> list[N]:  # type: ignore[assignment]
    """The different numbers, from ``least`` on, of a comma-separated option.  Raises: typer.BadParameter."""
    try:
        values: list[N] = [kind(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(least <= value < 2**63 for value in values) or len({*values}) < len(values):  # NaN fails
        raise typer.BadParameter(f"{text}: expected different numbers from {least} on, with commas", param_hint=option)
    return values


def only_with(option: str, is_set: bool, other: str, other_is_set: bool) -> None:
    """Raises: typer.BadParameter for an option that has no effect without another one."""
    if is_set and not other_is_set:
        raise typer.BadParameter(f"does nothing without {other}; add that, or leave this out.", param_hint=option)


def write_to(path: Path | None, content: bytes) -> None:
    """Write ``content`` to the path of an option, if it is set."""
    from v2flow_cli.store.files import write_bytes

    if path is not None:
        write_bytes(path, content)
