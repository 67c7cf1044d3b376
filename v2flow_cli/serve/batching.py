"""Batches of queued rows: one worker thread computes the rows of the oldest row's task together, oldest first."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

LINGER_SECONDS = 0.01  # wait of an idle worker for more rows


class QueueFull(Exception):
    """The queue is full; ``retry_after`` estimates the seconds until it has room."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(retry_after)
        self.retry_after = retry_after


class Abandoned(Exception):
    """The clients of all rows of the batch have disconnected."""


@dataclass(eq=False)
class _Row:
    task: Hashable
    payload: Any
    future: asyncio.Future[Any]


class Batcher:
    """Calls ``compute(task, payloads, tick)``, which returns one result for each payload, in a separate thread.

    ``compute`` calls ``tick`` regularly; ``tick`` raises Abandoned if all clients of the batch have disconnected. If
    ``compute`` fails for several rows, each is computed alone, so that one bad row does not fail the others.
    ``on_batch`` is called with the task, the number of rows, and the seconds of the batch.
    """

    def __init__(
        self,
        compute: Callable[[Any, list[Any], Callable[[], None]], Sequence[Any]],
        *,
        max_rows: int,
        max_waiting: int,
        on_batch: Callable[[Any, int, float], None] = lambda task, rows, seconds: None,
    ) -> None:
        self.compute, self.max_rows, self.max_waiting, self.on_batch = compute, max_rows, max_waiting, on_batch
        self.waiting: list[_Row] = []
        self.running = 0  # rows
        self._seconds = 1.0  # of a batch, a moving average
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")

    async def submit(self, task: Hashable, payloads: Sequence[Any]) -> list[Any]:
        """The results for ``payloads``, which may be computed in different batches.

        Cancelling removes them from the queue.  Raises: QueueFull; the errors of ``compute``.
        """
        if len(self.waiting) + len(payloads) > self.max_waiting:
            raise QueueFull(self._seconds * (1 + len(self.waiting) / self.max_rows))
        loop = asyncio.get_running_loop()
        rows = [_Row(task, payload, loop.create_future()) for payload in payloads]
        self.waiting += rows
        self._arrived.set()
        try:
            return list(await asyncio.gather(*(row.future for row in rows)))
        finally:
            for row in rows:
                row.future.cancel()
            self.waiting = [row for row in self.waiting if row not in rows]

    async def run(self) -> None:
        """Computes rows until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            if len(self.waiting) < self.max_rows:
                await asyncio.sleep(LINGER_SECONDS)
            batch = self._take()
            if not batch:
                self._arrived.clear()
                continue
            start = time.perf_counter()
            self.running = len(batch)
            outcomes = await loop.run_in_executor(self._thread, self._outcomes, batch)
            self.running = 0
            seconds = time.perf_counter() - start
            self._seconds += 0.2 * (seconds - self._seconds)
            self.on_batch(batch[0].task, len(batch), seconds)
            for row, outcome in zip(batch, outcomes):
                if row.future.done():
                    continue
                if isinstance(outcome, Exception):
                    row.future.set_exception(outcome)
                else:
                    row.future.set_result(outcome)

    def close(self) -> None:
        """Ends the worker thread after its current batch."""
        self._thread.shutdown()

    def _take(self) -> list[_Row]:
        """Removes and returns the next batch."""
        batch = [row for row in self.waiting if row.task == self.waiting[0].task][: self.max_rows]
        self.waiting = [row for row in self.waiting if row not in batch]
        return batch

    def _outcomes(self, batch: list[_Row]) -> list[Any]:
        """A result or an exception for each row."""

        def tick() -> None:
            if all(row.future.cancelled() for row in batch):
                raise Abandoned

        try:
            tick()
            return list(self.compute(batch[0].task, [row.payload for row in batch], tick))
        except Abandoned as error:
            return [error] * len(batch)
        except Exception as error:
            if len(batch) > 1:
                return [outcome for row in batch for outcome in self._outcomes([row])]
            return [error]
