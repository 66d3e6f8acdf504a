"""A long run, in slow mode: memory, open files and the time of a step do not grow."""
import os
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import records
from harness import Run

STEPS = 2000


def test_nothing_grows_over_thousands_of_steps(tiny_data, tmp_path, slow, capsys):
    if not slow:
        pytest.skip("with --slow")
    run = Run(tmp_path, tiny_data, max_iters=STEPS, lr_decay_iters=STEPS, eval_interval=50,
              log_interval=10)
    process = run.start()
    folder, samples = Path(f"/proc/{process.process.pid}"), []
    while process.process.is_alive():
        try:
            pages = int((folder / "statm").read_text().split()[1])
            samples.append((process.output().count(" lr "), pages * os.sysconf("SC_PAGE_SIZE"),
                            len(os.listdir(folder / "fd"))))
        except (OSError, IndexError):   # it has just ended
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
    assert files.max() - files.min() <= 3   # a checkpoint, its folder and metrics.jsonl's
    assert last < 1.5 * first
