import os
import signal
import subprocess
import sys
import time

import pytest

from v2flow_cli.errors import DataError
from v2flow_cli.store.lock import locked

pytest.importorskip("fcntl")

HOLDER = """
import sys, time, multiprocessing
from pathlib import Path
from v2flow_cli.store.lock import locked

with locked(Path(sys.argv[1])):
    if sys.argv[2] == "fork":
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        print(child.pid, flush=True)
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder, kind):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder), kind], stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline()) if kind == "fork" else None
    assert process.stdout.readline() == "held\n"
    return process, child


def eventually_free(folder):
    """Waits until a new process has closed its descriptors, or an old one has ended."""
    for _ in range(1000):
        try:
            with locked(folder):
                return
        except DataError:
            time.sleep(0.01)
    raise AssertionError("still locked")


def test_a_second_run_is_refused_until_the_first_ends_and_no_file_is_left(tmp_path):
    folder = tmp_path / "new" / "folder"
    with locked(folder):
        with pytest.raises(DataError, match="another run is writing here"), locked(folder):
            pass
    with locked(folder):
        pass
    assert list(folder.iterdir()) == []


def test_a_killed_process_releases_the_lock(tmp_path):
    process, _ = holder(tmp_path, "alone")
    with pytest.raises(DataError), locked(tmp_path):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    with locked(tmp_path):
        pass


def test_a_forked_worker_does_not_keep_the_lock(tmp_path):
    process, child = holder(tmp_path, "fork")
    process.kill()
    process.wait()
    try:
        eventually_free(tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_program_that_inherits_the_descriptor_keeps_the_lock(tmp_path):
    with locked(tmp_path) as descriptor:
        stage = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(descriptor,))
    with pytest.raises(DataError), locked(tmp_path):
        pass
    stage.communicate(b"\n")
    eventually_free(tmp_path)
