import os
import subprocess
import sys

import pytest
import torch

from v2flow_cli.runtime.allocator import keep_freed_memory

CODE = """
import torch
from v2flow_cli.runtime.allocator import keep_freed_memory
print(keep_freed_memory(torch.device("cpu")))
block = torch.zeros(2**25)  # 128 MiB
address = block.data_ptr()
maps = [line.split() for line in open("/proc/self/maps")]
heap = next(fields for fields in maps if fields[-1] == "[heap]")
print(int(heap[0].split("-")[0], 16) <= address < int(heap[0].split("-")[1], 16))
"""


@pytest.mark.skipif(os.confstr("CS_GNU_LIBC_VERSION") is None, reason="needs glibc")
@pytest.mark.parametrize(("env", "kept"), [({}, "True"), ({"MALLOC_MMAP_THRESHOLD_": "131072"}, "False")])
def test_large_tensors_lie_on_the_heap_unless_the_environment_says_otherwise(env, kept):
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=os.environ | env, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [kept, kept]


def test_other_devices_are_left_alone():
    assert keep_freed_memory(torch.device("meta")) is False
