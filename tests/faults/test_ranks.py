"""Ranks that die, hang or restart, also on another number of ranks."""
import os
import shutil
import subprocess
from datetime import timedelta

import numpy as np
import pytest
from conftest import ROOT, as_ranks, command, environment, records
from harness import (
    STEP,
    Run,
    assert_refused,
    assert_same,
    at,
    finish_ranks,
    finished_run,
    run,
    set_up,
    signal_self,
    undisturbed,
)

import ddp

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two_undisturbed_ranks(tmp_path_factory, tiny_data):
    """A finished run of two ranks without a fault."""
    run = Run(tmp_path_factory.mktemp("two_ranks"), tiny_data)
    finish_ranks(run)
    return run


def shorten_timeout():
    ddp.TIMEOUT = timedelta(seconds=3)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_rank_ends_the_others_with_one_line_and_the_run_resumes(two_undisturbed_ranks, run,
                                                                         lost):
    faults = [at(STEP, 15, "before", signal_self, "SIGKILL"), None]
    ranks = run.start_ranks(faults=faults[::-1] if lost else faults)
    assert_refused(ranks[1 - lost], "another rank died", "--init_from=auto", "gloo",
                   code=1)
    assert ranks[lost].end() == -9
    finish_ranks(run)
    assert_same(run, two_undisturbed_ranks)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_hanging_rank_ends_the_others_with_one_line_and_the_run_resumes(two_undisturbed_ranks,
                                                                          run, lost):
    hang = set_up([shorten_timeout], [at(STEP, 15, "before", signal_self, "SIGSTOP")])
    faults = [hang, shorten_timeout]
    ranks = run.start_ranks(faults=faults[::-1] if lost else faults)
    assert_refused(ranks[1 - lost], "another rank", "did not answer for 0:00:03", code=1)
    ranks[lost].send("SIGKILL")
    assert ranks[lost].end() == -9
    finish_ranks(run)
    assert_same(run, two_undisturbed_ranks)


def test_a_signal_to_one_rank_stops_all_ranks_after_the_same_step(two_undisturbed_ranks, run):
    for rank in run.start_ranks(faults=[None, at(STEP, 13, "after", signal_self, "SIGTERM")]):
        assert rank.end() == 0
    assert run.newest() == 13
    finish_ranks(run)
    assert_same(run, two_undisturbed_ranks)


def test_a_rank_that_cannot_read_its_data_reports_it(two_undisturbed_ranks, tiny_data, tmp_path):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    run = Run(tmp_path, data)
    ranks = run.start_ranks(faults=[None, at(STEP, 15, "before", os.truncate,
                                             data / "train.bin", 1000)])
    ends = [rank.end() for rank in ranks]
    assert ends[1] == 2 and ends[0] in (1, 2)   # 2: rank 0 has read the shortened file as well
    assert "train.py: rank 1: error:" in ranks[1].output()
    assert "truncated under this run" in ranks[1].output()
    shutil.copy(tiny_data / "train.bin", data)
    finish_ranks(run)
    assert_same(run, two_undisturbed_ranks)


def test_a_second_process_group_cannot_use_the_run_directory(two_undisturbed_ranks, run):
    first = run.start_ranks(faults=[at(STEP, 25, "before", signal_self, "SIGSTOP"), None])
    first[0].wait_for("sends itself SIGSTOP")
    second = run.start_ranks()
    assert_refused(second[0], "another process", str(run.out_dir))
    assert second[1].end() == 2 and second[1].output() == ""
    first[0].send("SIGCONT")
    assert [rank.end() for rank in first] == [0, 0]
    assert_same(run, two_undisturbed_ranks)


@pytest.mark.parametrize("before, after", [(1, 2), (2, 1)])
def test_a_run_resumed_on_another_number_of_ranks_has_the_same_losses(tiny_data, tmp_path, before,
                                                                      after):
    """Without dropout, because each rank draws its own."""
    undisturbed = finished_run(tmp_path / "undisturbed", tiny_data, dropout=0.0)
    run = Run(tmp_path, tiny_data, dropout=0.0)
    stop = at(STEP, 13, "after", signal_self, "SIGTERM")
    for rank in [run.start(fault=stop)] if before == 1 else run.start_ranks(faults=[stop, None]):
        assert rank.end() == 0
    if after == 1:
        run.finish()
    else:
        finish_ranks(run)
    ours, wanted = (records(r.out_dir, "iter") for r in (run, undisturbed))
    assert [r["iter"] for r in ours] == [r["iter"] for r in wanted]
    for key in "train/loss", "val/loss":
        a, b = (np.array([r[key] for r in found if key in r]) for found in (ours, wanted))
        assert np.abs(a - b).max() < 1e-5


def test_torchrun_restarts_a_run_after_a_rank_was_killed(two_undisturbed_ranks, run, thorough):
    """Rank 0, which holds the lock, is killed first."""
    kills = 3 if thorough else 1
    words = command("tests/faults/harness.py", kills, *run.words, ranks=2)
    words.insert(words.index("--standalone"), f"--max-restarts={kills}")
    done = subprocess.run(words, env=environment(PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}"),
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("resuming from") == kills
    assert_same(run, two_undisturbed_ranks)


def test_torchrun_on_two_nodes_restarts_a_run_after_a_rank_was_killed(two_undisturbed_ranks, run,
                                                                      thorough):
    if not thorough:
        pytest.skip("needs --thorough")
    words = command("tests/faults/harness.py", 1, *run.words, ranks=1)
    endpoint = f"localhost:{as_ranks(2)[0]['MASTER_PORT']}"
    words[1:1] = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
                  "--max-restarts=3", "--rdzv_backend=c10d", f"--rdzv_endpoint={endpoint}"]
    env = environment(PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}",
                      TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    nodes = [subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              text=True) for _ in range(2)]
    outputs = [node.communicate(timeout=300) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert "resuming from" in outputs[0][0] + outputs[1][0]
    assert_same(run, two_undisturbed_ranks)


def test_a_restart_by_torchrun_does_not_resume_a_run_with_other_settings(undisturbed, run):
    run.start("--init_from=scratch", fault=at(STEP, 13, "after", signal_self, "SIGTERM")).end()
    words = ["--init_from=scratch", "--learning_rate=1e-4"]
    assert_refused(run.start(*words), "holds a run")
    assert_refused(run.start(*words, TORCHELASTIC_RESTART_COUNT="1"), "holds a run")
    again = run.start("--init_from=scratch", TORCHELASTIC_RESTART_COUNT="1")
    assert again.end() == 0
    assert_same(run, undisturbed)
