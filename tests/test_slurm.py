"""config/slurm.sbatch, as Slurm would run it on two nodes."""
import os
import signal
import subprocess
import sys
import time

from conftest import ROOT, TINY, environment, flags, records

SRUN = """#!/bin/bash
# The command on each of two nodes, to which signals are passed on.
"$@" & first=$!
"$@" & second=$!
trap 'kill -USR1 $first $second' USR1
wait $first; wait $first; wait $second
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo localhost; else echo "$@" >> {queue}; fi
"""
TORCHRUN = f"""#!/bin/bash
exec {sys.executable} -m torch.distributed.run "$@"
"""


def test_a_job_on_two_nodes_is_requeued_when_its_time_is_up_and_then_finishes(tiny_data, tmp_path):
    queue, out = tmp_path / "queue", tmp_path / "run"
    for name, text in ("srun", SRUN), ("scontrol", SCONTROL), ("torchrun", TORCHRUN):
        (tmp_path / name).write_text(text.format(queue=queue))
        (tmp_path / name).chmod(0o755)
    slurm = environment(PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_JOB_NODELIST="node[1-2]",
                        SLURM_NNODES="2", SLURM_GPUS_ON_NODE="1", SLURM_JOB_ID=str(os.getpid()))

    def job(max_iters):
        words = flags(**{**TINY, "max_iters": max_iters, "dataset": tiny_data, "out_dir": out})
        return subprocess.Popen(["bash", "config/slurm.sbatch", *words], cwd=ROOT, env=slurm,
                                text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    first = job(100_000)
    deadline = time.monotonic() + 100
    while not (out / "metrics.jsonl").exists() or len(records(out)) < 5:
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()[0]
        time.sleep(0.1)
    first.send_signal(signal.SIGUSR1)
    output = first.communicate(timeout=100)[0]
    assert "2 ranks" in output and "stopped by a signal" in output
    assert queue.read_text() == f"requeue {os.getpid()}\n"
    steps = records(out)[-1]["iter"]
    output = job(steps + 5).communicate(timeout=100)[0]
    assert "resuming from" in output and f"finished at step {steps + 5}" in output
    assert queue.read_text().count("requeue") == 1
