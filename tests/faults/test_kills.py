"""kill -9 at random moments and between any two steps of writing a checkpoint."""
import random
import time

import pytest
from conftest import records
from harness import ALWAYS_SAVING, STEP, Run, assert_same, at, finished_run, signal_self

pytestmark = pytest.mark.slow

# Calls in a process that saves at every step. os.replace renames config.json, then metrics.jsonl,
# then each checkpoint. os.remove deletes an old checkpoint.
MOMENTS = [("torch.save", 3, "before"),      # after evaluation and its log line
           ("torch.save", 2, "after"),       # the temporary file is written but not flushed
           ("os.replace", 4, "before"),      # the temporary file is complete
           ("os.replace", 4, "after"),       # the checkpoint has its name; the old one still exists
           ("os.remove", 2, "before"),
           ("os.remove", 2, "after"),
           ("os.replace", 1, "before"),      # the process resumed and has written nothing
           ("os.replace", 1, "after"),       # config.json is new, metrics.jsonl old
           ("os.replace", 2, "after"),       # both are new
           ("os.fsync", 9, "before")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_data):
    return finished_run(tmp_path_factory.mktemp("undisturbed"), tiny_data, **ALWAYS_SAVING)


def checkpoints_after_kill(process, run, before):
    """Wait until SIGKILL has ended the process. Of the checkpoints `before`, the newest is still
    there, or newer ones, and never fewer than two. Returns the steps of those on disk."""
    assert process.end() == -9, process.output()
    after = run.checkpoints()
    assert before[-1:] <= after[-1:]
    assert len(after) >= min(len(before), 2)
    return after


def test_a_run_killed_at_random_moments_equals_an_undisturbed_one(undisturbed, tiny_data, tmp_path,
                                                                  thorough):
    for trial in range(20 if thorough else 1):
        chance = random.Random(trial)
        run = Run(tmp_path / str(trial), tiny_data, **ALWAYS_SAVING)
        saved = []
        for _ in range(5):
            process = run.start()
            last = saved[-1] if saved else 0
            process.wait_for(f"step {last + chance.randint(1, 7)}/40 | val")
            time.sleep(chance.uniform(0, 0.02))
            process.send("SIGKILL")
            saved = checkpoints_after_kill(process, run, saved)
        run.finish()
        assert_same(run, undisturbed)


def test_a_run_killed_at_every_stage_of_a_save_equals_an_undisturbed_one(undisturbed, tiny_data,
                                                                         tmp_path):
    run = Run(tmp_path, tiny_data, **ALWAYS_SAVING)
    saved = []
    for moment in MOMENTS:
        process = run.start(fault=at(*moment, signal_self, "SIGKILL"))
        saved = checkpoints_after_kill(process, run, saved)
    run.finish()
    assert_same(run, undisturbed)
    assert not list(run.out_dir.glob("*.tmp"))


@pytest.mark.parametrize("knobs", [
    dict(optimizer="adamw"), dict(optimizer="lion"),
    dict(hessian_estimator="hutchinson", target_win_rate=0.3, hessian_interval=3)],
    ids=lambda knobs: "-".join(map(str, knobs.values())))
def test_every_optimizer_and_an_adapting_rho_resume_exactly(tiny_data, tmp_path, knobs):
    undisturbed = finished_run(tmp_path / "undisturbed", tiny_data, **knobs)
    run = Run(tmp_path, tiny_data, **knobs)
    for step, name, code in (17, "SIGKILL", -9), (6, "SIGTERM", 0), (16, "SIGKILL", -9):
        assert run.start(fault=at(STEP, step, "after", signal_self, name)).end() == code
    assert run.checkpoints() == [20, 30]   # of 10, 16, 20, 30 the last two are kept
    run.finish()
    assert_same(run, undisturbed)
    if "target_win_rate" in knobs:
        rhos = [r["train/rho"] for r in records(run.out_dir, "train/rho")]
        assert len(set(rhos)) == len(rhos) == 13
