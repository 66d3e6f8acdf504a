"""Memory, open files and time per step do not grow in a long run. Runs with --thorough only."""
import os
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import records
from harness import Run

pytestmark = pytest.mark.slow

STEPS = 2000


def test_memory_files_and_step_time_do_not_grow_over_2000_steps(tiny_data, tmp_path, thorough,
                                                                capsys):
    if not thorough:
        pytest.skip("needs --thorough")
    run = Run(tmp_path, tiny_data, max_iters=STEPS, lr_decay_iters=STEPS, eval_interval=50,
              log_interval=10)
    process = run.start()
    folder, samples = Path(f"/proc/{process.process.pid}"), []
    while process.process.is_alive():
        try:
            pages = int((folder / "statm").read_text().split()[1])
            samples.append((process.output().count(" lr "), pages * os.sysconf("SC_PAGE_SIZE"),
                            len(os.listdir(folder / "fd"))))
        except (OSError, IndexError):   # the process has just ended
            break
        time.sleep(0.05)
    assert process.end() == 0, process.output()
    logged, memory, files = np.array(samples).T
    warm = logged * 10 > STEPS / 10
    steps, memory, files = logged[warm] * 10, memory[warm] / 2**20, files[warm]
    slope = np.polyfit(steps, memory, 1)[0] * 1000
    seconds = np.diff([r["seconds"] for r in records(run.out_dir)]) / 10
    first, last = (np.median(part) * 1000 for part in np.array_split(seconds, 4)[::3])
    with capsys.disabled():
        print(f"\n{len(steps)} samples: {memory[0]:.1f} to {memory[-1]:.1f} MiB, {slope:+.3f} MiB "
              f"in 1000 steps; {files.min()} to {files.max()} files; {first:.2f} ms a step in the "
              f"first quarter, {last:.2f} in the last")
    assert slope < 1
    assert files.max() - files.min() <= 3   # a checkpoint, its folder, metrics.jsonl
    assert last < 1.5 * first
