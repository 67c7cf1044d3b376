"""Output of all commands: results on stdout, everything else on stderr, errors as one sentence."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress, Task

from v2flow_cli.cli.endings import EXIT_PIPE, detach
from v2flow_cli.errors import SharedError, V2FlowError, reason_of

EXIT_FAILED = 1
ERROR_BUDGET = 0.001  # share of bad samples up to which a command over a set succeeds


class Tick(Protocol):
    def __call__(self, advance: int = 1) -> None: ...


def is_main_process() -> bool:
    """True in the first process of a launch, the only one that prints."""
    return os.environ.get("RANK", "0") == "0"


def log(message: str) -> None:
    """One plain line on stderr."""
    if is_main_process():
        _write_log(message)


def _write_log(message: str) -> None:
    # File names may contain control characters, which are escaped.
    text = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in message)
    print(text, file=sys.stderr, flush=True)


def report_error(error: V2FlowError) -> None:
    """Print an error on stderr, from any process; a SharedError only from the first."""
    if is_main_process():
        log(f"error: {error}")
    elif not isinstance(error, SharedError):
        _write_log(f"rank {os.environ['RANK']}: error: {error}")


def result(text: str) -> None:
    """One line of the command's result on stdout.

    Raises:  SystemExit for a closed pipe; V2FlowError if stdout cannot be written, as on a full disk.
    """
    if not is_main_process():
        return
    try:
        print(text, flush=True)
    except BrokenPipeError:
        detach(sys.stdout)
        raise SystemExit(EXIT_PIPE) from None
    except OSError as error:
        detach(sys.stdout)
        raise V2FlowError(f"stdout: the result cannot be written ({reason_of(error)}).") from error


def result_json(payload: Any) -> None:
    """One JSON object on one line of stdout; NaN and infinity become null.

    If stdout cannot encode it, characters that are not ASCII are escaped.
    """
    payload = _finite(payload)
    text = json.dumps(payload, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(payload, allow_nan=False)
    result(text)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def failures_json(failures: Iterable[Any]) -> list[dict[str, Any]]:
    """Failures for ``--json``: a file, or a shard and the key of a sample in it, and the reason."""
    return [failure.as_json() for failure in failures]


def log_left_out(failures: Iterable[Any], not_taken: Any = None) -> None:
    """Log every failure, and the files of ``not_taken``."""
    for failure in failures:
        log(f"left out: {failure.name}: {failure.reason}")
    if not_taken is not None:
        not_taken.log(log)


@contextlib.contextmanager
def progress(label: str, total: int | None) -> Iterator[Tick]:
    """A bar with rate and ETA on a terminal; plain lines (about ten in all) elsewhere."""
    if not is_main_process():
        yield lambda advance=1: None
        return
    if sys.stderr.isatty():
        with _bar() as bar:
            task = bar.add_task(label, total=total)
            yield lambda advance=1: bar.advance(task, advance)
        return
    done, every = 0, max(1, (total or 1000) // 10)

    def tick(advance: int = 1) -> None:
        nonlocal done
        before, done = done, done + advance
        if done // every > before // every or done == total:
            log(f"{label}: {done}/{total}" if total else f"{label}: {done}")

    yield tick


@contextlib.contextmanager
def steps_bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, which is set to a step number; nothing elsewhere, because a training logs lines."""
    if not is_main_process() or not sys.stderr.isatty():
        yield lambda step: None
        return
    with _bar() as bar:
        task = bar.add_task(label, total=total, start=False)

        def at_step(step: int) -> None:
            if not bar.tasks[0].started:  # the steps before a resume do not count for the rate
                bar.update(task, completed=step)
                bar.start_task(task)
            bar.update(task, completed=step)

        yield at_step


def _bar() -> Progress:
    """A bar with rate and time left on stderr; lines that are logged meanwhile scroll above it.

    A narrow terminal has no room for the bar itself, and a long label takes several lines: no figure is cut.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.table import Column
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text("" if task.speed is None else f"{task.speed:.3g}/s", style="progress.data.speed")

    console = Console(stderr=True)
    label = TextColumn("{task.description}", table_column=Column(overflow="fold"))
    figures = [kind(table_column=Column(no_wrap=True)) for kind in (MofNCompleteColumn, Rate, TimeRemainingColumn)]
    return Progress(label, *([BarColumn()] if console.width >= 60 else []), *figures, console=console, transient=True)


def fail(message: str) -> None:
    """Print ``message`` as an error on stderr and exit with 1."""
    log(f"error: {message}")
    raise SystemExit(EXIT_FAILED)
