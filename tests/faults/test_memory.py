"""A run that does not fit into memory."""
import os
import re
import resource

import pytest
from harness import STEP, Run, at
from test_disks import refused

from configurator import load_config
from device import advise_on_memory


def limit_memory(beyond):
    """From now on this process cannot have more than `beyond` bytes of address space in addition.
    """
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + beyond, size + beyond))


@pytest.mark.parametrize("ranks", [1, 2])
def test_out_of_memory_names_the_batch_size(tiny_data, tmp_path, ranks):
    """Here the last rank alone is out of memory. With the batch size that the line advises, the
    same run goes to its end."""
    run = Run(tmp_path, tiny_data, max_iters=2, batch_size=2048, total_batch_size=2048 * ranks)
    full = at(STEP, 1, "before", limit_memory, 2**25)
    processes = run.start_ranks(faults=[None] * (ranks - 1) + [full])
    refused(processes[-1], "out of memory", "--batch_size", "2048", "the update does not change")
    for other in processes[:-1]:
        assert other.end() == 2 and "another rank died" in other.output()
    advised = re.search(r"for example to (\d+)", processes[-1].output())[1]
    for process in run.start_ranks(f"--batch_size={advised}", faults=[None] * ranks):
        assert process.end() == 0, process.output()


def test_a_batch_of_one_cannot_be_lowered():
    cfg = load_config(["--batch_size=1"])
    assert "--batch_size is 1 and cannot be lowered" in advise_on_memory(cfg, 1)
    assert "for example to 10;" in advise_on_memory(load_config(["--batch_size=12"]), 8)
