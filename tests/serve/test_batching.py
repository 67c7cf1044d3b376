"""The queue, without models and HTTP."""

import asyncio
import threading

import pytest

from v2flow_cli.serve.batching import Batcher, QueueFull


class Held:
    """A compute that records its batches and waits until it is released."""

    def __init__(self):
        self.batches, self.free = [], threading.Event()

    def __call__(self, task, payloads, tick):
        self.batches.append((task, payloads))
        self.free.wait(600)
        tick()
        if "bad" in payloads:
            raise RuntimeError("bad")
        return [f"{task}{payload}" for payload in payloads]


def run(scenario, **settings):
    """``scenario(batcher, held)`` beside the batcher's worker."""

    async def main():
        held = Held()
        batcher = Batcher(held, **{"max_rows": 4, "max_waiting": 8, **settings})
        worker = asyncio.create_task(batcher.run())
        try:
            return await asyncio.wait_for(scenario(batcher, held), 600)
        finally:
            held.free.set()
            worker.cancel()
            batcher.close()

    return asyncio.run(main())


async def started(held, batches):
    while len(held.batches) < batches:
        await asyncio.sleep(0.001)


def test_rows_of_the_oldest_task_are_computed_together():
    async def scenario(batcher, held):
        first = asyncio.create_task(batcher.submit("a", [0]))
        await started(held, 1)
        rest = [asyncio.create_task(batcher.submit(*job)) for job in (("b", [1, 2]), ("a", [3]), ("b", [4, 5, 6]))]
        await asyncio.sleep(0)
        held.free.set()
        assert await asyncio.gather(first, *rest) == [["a0"], ["b1", "b2"], ["a3"], ["b4", "b5", "b6"]]
        assert held.batches == [("a", [0]), ("b", [1, 2, 4, 5]), ("a", [3]), ("b", [6])]

    run(scenario)


def test_a_full_queue_refuses_with_retry_after():
    async def scenario(batcher, held):
        jobs = [asyncio.create_task(batcher.submit("a", [0]))]
        await started(held, 1)
        jobs.append(asyncio.create_task(batcher.submit("a", list(range(8)))))
        await asyncio.sleep(0)
        with pytest.raises(QueueFull) as full:
            await batcher.submit("a", [9])
        assert full.value.retry_after > 0
        held.free.set()
        assert [len(rows) for rows in await asyncio.gather(*jobs)] == [1, 8]
        assert await batcher.submit("a", [9]) == ["a9"]

    run(scenario)


def test_cancelled_rows_leave_the_queue_and_the_batch():
    async def scenario(batcher, held):
        running = asyncio.create_task(batcher.submit("a", [0]))
        await started(held, 1)
        waiting = asyncio.create_task(batcher.submit("a", list(range(8))))
        await asyncio.sleep(0)
        assert len(batcher.waiting) == 8 and batcher.running == 1
        for job in (running, waiting):
            job.cancel()
            with pytest.raises(asyncio.CancelledError):
                await job
        assert batcher.waiting == []
        held.free.set()
        assert await batcher.submit("b", [1]) == ["b1"]
        assert [task for task, _ in held.batches] == ["a", "b"]

    run(scenario)


def test_a_bad_row_fails_alone():
    async def scenario(batcher, held):
        held.free.set()
        jobs = [batcher.submit("a", [1]), batcher.submit("a", ["bad"]), batcher.submit("a", [2, 3])]
        good, bad, others = await asyncio.gather(*jobs, return_exceptions=True)
        assert good == ["a1"] and others == ["a2", "a3"]
        assert isinstance(bad, RuntimeError)

    run(scenario)
