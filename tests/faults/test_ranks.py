"""Ranks that die, hang, come back or come back as another number of ranks."""
import os
import shutil
import subprocess
from datetime import timedelta

import numpy as np
import pytest
from conftest import ROOT, as_ranks, command, environment
from harness import STEP, Run, assert_same, at, set_up, signal_self
from test_disks import refused

import ddp


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_data):
    """Runs by number of ranks."""
    folder = tmp_path_factory.mktemp("undisturbed")
    runs = {ranks: Run(folder / str(ranks), tiny_data) for ranks in (1, 2)}
    runs[1].finish()
    finish(runs[2])
    return runs


@pytest.fixture
def run(tiny_data, tmp_path):
    return Run(tmp_path, tiny_data)


def finish(run):
    ranks = run.start_ranks()
    assert [rank.end() for rank in ranks] == [0, 0], [rank.output() for rank in ranks]


def be_impatient():
    ddp.TIMEOUT = timedelta(seconds=3)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_is_killed_ends_the_others_with_a_line(undisturbed, run, lost):
    faults = [at(STEP, 15, "before", signal_self, "SIGKILL"), None]
    ranks = run.start_ranks(faults=faults[::-1] if lost else faults)
    refused(ranks[1 - lost], "another rank died", "--init_from=auto", "gloo")
    assert ranks[lost].end() == -9
    finish(run)
    assert_same(run, undisturbed[2])


@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_hangs_ends_the_others_with_a_line(undisturbed, run, lost):
    hang = set_up([be_impatient], [at(STEP, 15, "before", signal_self, "SIGSTOP")])
    faults = [hang, be_impatient]
    ranks = run.start_ranks(faults=faults[::-1] if lost else faults)
    refused(ranks[1 - lost], "another rank", "did not answer for 0:00:03")
    ranks[lost].send("SIGKILL")
    assert ranks[lost].end() == -9
    finish(run)
    assert_same(run, undisturbed[2])


def test_a_signal_to_one_rank_stops_all_after_the_same_step(undisturbed, run):
    for rank in run.start_ranks(faults=[None, at(STEP, 13, "after", signal_self, "SIGTERM")]):
        assert rank.end() == 0
    assert run.newest() == 13
    finish(run)
    assert_same(run, undisturbed[2])


def test_the_rank_that_cannot_read_its_data_says_so(undisturbed, tiny_data, tmp_path):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    run = Run(tmp_path, data)
    ranks = run.start_ranks(faults=[None, at(STEP, 15, "before", os.truncate,
                                             data / "train.bin", 1000)])
    ends = [rank.end() for rank in ranks]
    assert ends == [2, 2]
    assert "train.py: rank 1: error:" in ranks[1].output()
    assert "truncated under this run" in ranks[1].output()
    shutil.copy(tiny_data / "train.bin", data)
    finish(run)
    assert_same(run, undisturbed[2])


def test_a_second_group_is_refused(undisturbed, run):
    first = run.start_ranks(faults=[at(STEP, 25, "before", signal_self, "SIGSTOP"), None])
    first[0].wait_for("step 24/")
    second = run.start_ranks()
    refused(second[0], "another process", str(run.out_dir))
    assert second[1].end() == 2 and second[1].output() == ""
    first[0].send("SIGCONT")
    assert [rank.end() for rank in first] == [0, 0]
    assert_same(run, undisturbed[2])


@pytest.mark.parametrize("before, after", [(1, 2), (2, 1)])
def test_another_number_of_ranks_goes_on_with_the_same_losses(tiny_data, tmp_path, before, after):
    """Without dropout, which each rank draws for itself."""
    undisturbed = Run(tmp_path / "undisturbed", tiny_data, dropout=0.0)
    undisturbed.finish()
    run = Run(tmp_path, tiny_data, dropout=0.0)
    stop = at(STEP, 13, "after", signal_self, "SIGTERM")
    for rank in [run.start(fault=stop)] if before == 1 else run.start_ranks(faults=[stop, None]):
        assert rank.end() == 0
    if after == 1:
        run.finish()
    else:
        finish(run)
    ours, wanted = (r.records() for r in (run, undisturbed))
    assert [r["iter"] for r in ours] == [r["iter"] for r in wanted]
    for key in "train/loss", "val/loss":
        a, b = (np.array([r[key] for r in found if key in r]) for found in (ours, wanted))
        assert np.abs(a - b).max() < 1e-5


def test_torchrun_starts_again_after_a_rank_was_killed(undisturbed, run, slow):
    """First rank 0, which holds the lock."""
    kills = 3 if slow else 1
    words = command("tests/faults/harness.py", kills, *run.words, ranks=2)
    words.insert(words.index("--standalone"), f"--max-restarts={kills}")
    done = subprocess.run(words, env=environment(PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}"),
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("resuming from") == kills
    assert_same(run, undisturbed[2])


def test_torchrun_on_two_nodes_starts_again_after_a_rank_was_killed(undisturbed, run, slow):
    if not slow:
        pytest.skip("with --slow")
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
    assert_same(run, undisturbed[2])


def test_torchrun_does_not_go_on_with_another_run_that_it_was_refused(undisturbed, run):
    run.start("--init_from=scratch", fault=at(STEP, 13, "after", signal_self, "SIGTERM")).end()
    words = ["--init_from=scratch", "--learning_rate=1e-4"]
    refused(run.start(*words), "holds a run")
    refused(run.start(*words, TORCHELASTIC_RESTART_COUNT="1"), "holds a run")
    again = run.start("--init_from=scratch", TORCHELASTIC_RESTART_COUNT="1")
    assert again.end() == 0
    assert_same(run, undisturbed[1])
