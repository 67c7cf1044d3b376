"""Images on single threads: the process's own number of torch threads stays what it was, however calls overlap."""

import contextlib
import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from v2flow_cli.runtime.batch_invariant import each_row_alone, on_single_threads


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def in_a_new_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_overlapping_calls_restore_the_thread_counts():
    """Each call starts while another is inside, and ends while a third one is: what one restored, another broke."""
    steps = threading.Barrier(4)
    seen = []

    def compute(image):
        seen.append(torch.get_num_threads())
        steps.wait()  # images of both calls are under way at once
        return image + 1

    def call():
        before = torch.get_num_threads()
        rows = torch.cat(on_single_threads(compute, torch.arange(2.0)[:, None]))
        return before, rows.flatten().tolist(), torch.get_num_threads()

    with ThreadPoolExecutor(2) as pool:
        done = [pool.submit(call) for _ in range(6)]
        assert [future.result() for future in done] == [(3, [1.0, 2.0], 3)] * 6
    assert set(seen) == {1} and len(seen) == 12
    assert torch.get_num_threads() == 3 and in_a_new_thread(torch.get_num_threads) == 3


def test_the_caller_keeps_its_thread_count():
    others = []
    on_single_threads(lambda image: others.append(in_a_new_thread(torch.get_num_threads)) or image, torch.ones(2, 1))
    assert others == [3, 3]


@pytest.mark.parametrize("images", [1, 2, 5])
def test_an_error_restores_the_thread_count(images):
    def fail(image):
        raise ValueError("too much")

    with pytest.raises(ValueError, match="too much"):
        on_single_threads(fail, torch.ones(images, 1))
    assert torch.get_num_threads() == 3 and in_a_new_thread(torch.get_num_threads) == 3


def test_an_error_keeps_no_images_and_no_threads():
    """Also where the garbage collector does not run: a server that waits for its next request creates no garbage."""

    def fail(image):
        raise ValueError("too much")

    def failing_call():
        images = torch.ones(3, 1)
        with contextlib.suppress(ValueError):
            on_single_threads(fail, images)
        return weakref.ref(images)

    on_single_threads(lambda image: image, torch.ones(2, 1))  # this thread's own pool stays
    before = threading.active_count()
    gc.disable()
    try:
        images = in_a_new_thread(failing_call)
        for _ in range(6000):  # the pool's threads need a moment to end
            if images() is None and threading.active_count() == before:
                break
            time.sleep(0.01)
        assert images() is None and threading.active_count() == before
    finally:
        gc.enable()


def test_threads_end_with_their_caller_even_if_its_error_is_referenced():
    def fail(image):
        raise ValueError("too much")

    def failing_call():
        try:
            on_single_threads(fail, torch.ones(2, 1))
        except ValueError as error:
            return error  # with the frames that it passed

    before = threading.active_count()
    error = in_a_new_thread(failing_call)
    for _ in range(6000):
        if threading.active_count() == before:
            break
        time.sleep(0.01)
    assert threading.active_count() == before and str(error) == "too much"


def test_one_thread_uses_no_pool():
    torch.set_num_threads(1)
    ran_in = []
    on_single_threads(lambda image: ran_in.append(threading.get_ident()) or image, torch.ones(3, 1))
    assert set(ran_in) == {threading.get_ident()} and torch.get_num_threads() == 1


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_rounds_equally_in_any_batch(bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 704, bias), torch.nn.Linear(704, 300, bias)).to(dtype)
    rows = torch.randn(9, 1, 256, dtype=dtype)
    with torch.no_grad(), each_row_alone(model):
        alone = torch.cat(on_single_threads(model, rows))
        for size in (2, 5, 9):
            assert torch.equal(torch.cat(on_single_threads(model, rows, size)), alone)
    assert all("forward" not in vars(layer) for layer in model)
    with torch.no_grad():
        torch.testing.assert_close(model(rows), alone, atol=0.05 if dtype == torch.bfloat16 else 1e-5, rtol=0)
