"""Progress bars do not wait for tqdm's own lock, which a forked process may have held when it was killed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# In a process of its own: nothing can release tqdm's lock again.
PROGRAM = """
import os, signal, time
from tqdm import tqdm

lock = tqdm.get_lock()
reader, writer = os.pipe()
child = os.fork()
if child == 0:
    lock.acquire()
    os.write(writer, b"1")
    time.sleep(60)
assert os.read(reader, 1) == b"1"
os.kill(child, signal.SIGKILL)
os.waitpid(child, 0)

from kandinsky22.pipelines.progress_bars import checked_options, new_bar

for disable in (True, False):
    assert list(new_bar(range(3), None, checked_options({"disable": disable}))) == [0, 1, 2]
    with new_bar(None, 2, {"disable": disable}) as bar:
        bar.update(2)
os._exit(0)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, which is safe on Linux only")
def test_bars_do_not_wait_for_a_killed_process() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", PROGRAM], env=environment, check=True, timeout=60)
