"""kill -9, at random moments and between any two steps of writing a checkpoint."""
import random
import time

import pytest
from harness import ALWAYS_SAVING, STEP, Run, assert_same, at, signal_self

# Calls of a process that saves at each step. os.replace: of config.json, metrics.jsonl, then one a
# checkpoint. os.remove: from the process's first or third checkpoint on.
MOMENTS = [("torch.save", 3, "before"),      # evaluated and logged, not saved
           ("torch.save", 2, "after"),       # the temporary file is not flushed
           ("os.replace", 4, "before"),      # it is whole and has no name yet
           ("os.replace", 4, "after"),       # it has its name, an old one is not deleted
           ("os.remove", 2, "before"),
           ("os.remove", 2, "after"),
           ("os.replace", 1, "before"),      # resuming: nothing written yet
           ("os.replace", 1, "after"),       # config.json is new, metrics.jsonl old
           ("os.replace", 2, "after"),       # both are new
           ("os.fsync", 9, "before")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_data):
    run = Run(tmp_path_factory.mktemp("undisturbed"), tiny_data, **ALWAYS_SAVING)
    run.finish()
    return run


def killed(process, run, before):
    """The process has died of SIGKILL, and what was complete before is not lost."""
    assert process.end() == -9, process.output()
    after = run.checkpoints()
    assert before[-1:] <= after[-1:]
    assert len(after) >= min(len(before), 2)
    return after


def test_killed_at_random_moments(undisturbed, tiny_data, tmp_path, slow):
    for trial in range(20 if slow else 1):
        chance = random.Random(trial)
        run = Run(tmp_path / str(trial), tiny_data, **ALWAYS_SAVING)
        saved = []
        for _ in range(5):
            process = run.start()
            last = saved[-1] if saved else 0
            process.wait_for(f"step {last + chance.randint(1, 7)}/40 | val")
            time.sleep(chance.uniform(0, 0.02))
            process.send("SIGKILL")
            saved = killed(process, run, saved)
        run.finish()
        assert_same(run, undisturbed)


def test_killed_between_the_steps_of_a_save(undisturbed, tiny_data, tmp_path):
    run = Run(tmp_path, tiny_data, **ALWAYS_SAVING)
    saved = []
    for moment in MOMENTS:
        process = run.start(fault=at(*moment, signal_self, "SIGKILL"))
        saved = killed(process, run, saved)
    run.finish()
    assert_same(run, undisturbed)
    assert not list(run.out_dir.glob("*.tmp"))


@pytest.mark.parametrize("knobs", [
    dict(optimizer="adamw"), dict(optimizer="lion"),
    dict(hessian_estimator="hutchinson", target_win_rate=0.3, hessian_interval=3)],
    ids=lambda knobs: "-".join(map(str, knobs.values())))
def test_every_optimizer_and_what_it_steers_is_resumed(tiny_data, tmp_path, knobs):
    undisturbed = Run(tmp_path / "undisturbed", tiny_data, **knobs)
    undisturbed.finish()
    run = Run(tmp_path, tiny_data, **knobs)
    for step, name, code in (17, "SIGKILL", -9), (6, "SIGTERM", 0), (16, "SIGKILL", -9):
        assert run.start(fault=at(STEP, step, "after", signal_self, name)).end() == code
    assert run.checkpoints() == [20, 30]   # 10, 16, 20, 30
    run.finish()
    assert_same(run, undisturbed)
    if "target_win_rate" in knobs:
        rhos = [r["train/rho"] for r in run.records() if "train/rho" in r]
        assert len(set(rhos)) == len(rhos) == 13
