import subprocess
import sys

import pytest

from benchmarks.workload import child_environment

PROGRAM = """
import sys
import torch
from benchmarks import allocator

def faults():
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if sys.argv[1] == "keep":
    allocator.keep_freed_memory()
for _ in range(20):  # until the heap has found its size
    before = faults()
    torch.ones(64 * 2**18)  # 64 MiB
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of the C library of Linux")
def test_kept_memory_is_not_asked_for_again() -> None:
    def last_time(way: str) -> int:
        command = [sys.executable, "-c", PROGRAM, way]
        environment = {**child_environment(), "THP_MEM_ALLOC_ENABLE": "0"}
        return int(subprocess.check_output(command, env=environment))

    assert last_time("keep") < 100 < last_time("return")
