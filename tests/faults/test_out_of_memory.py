"""Running out of memory gives an error that names a batch size that fits."""
import os
import re
import resource

import pytest
from harness import STEP, Run, assert_refused, at

pytestmark = pytest.mark.slow


def limit_memory(beyond):
    """From now on, this process's address space can grow by at most `beyond` bytes."""
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + beyond, size + beyond))


@pytest.mark.parametrize("ranks", [1, 2])
def test_out_of_memory_advises_a_batch_size_that_fits(tiny_data, tmp_path, ranks):
    """Only the last rank runs out of memory."""
    run = Run(tmp_path, tiny_data, max_iters=2, batch_size=2048, total_batch_size=2048 * ranks)
    full = at(STEP, 1, "before", limit_memory, 2**25)
    processes = run.start_ranks(faults=[None] * (ranks - 1) + [full])
    assert_refused(processes[-1], "out of memory", "--batch_size", "2048",
                   "the update does not change")
    for other in processes[:-1]:
        assert other.end() == 1 and "another rank died" in other.output()
    advised = re.search(r"for example to (\d+)", processes[-1].output())[1]
    for process in run.start_ranks(f"--batch_size={advised}", faults=[None] * ranks):
        assert process.end() == 0, process.output()
