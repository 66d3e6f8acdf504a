"""Between two log lines the host never waits for the device."""
import json

import pytest
from conftest import TINY, flags, records, run, train

SETTINGS = {**TINY, "max_iters": 15, "eval_interval": 100, "hessian_interval": 2, "log_interval": 5}
CASES = {"sophiag": {}, "float16": {"dtype": "float16"}, "steered": {"target_win_rate": 0.3},
         "adamw": {"optimizer": "adamw"}, "adamw, float16": {"optimizer": "adamw",
                                                            "dtype": "float16"},
         "lion": {"optimizer": "lion"}, "muon": {"optimizer": "muon"}}


def on_fake_device(out_dir, data, *words, **settings):
    """Run with SETTINGS on the fake device. Returns the events between each two log lines."""
    knobs = {**SETTINGS, "dataset": data, "out_dir": out_dir, **settings}
    done = run("tests/fake_device.py", *words, *flags(**knobs))
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * bool(settings))
                                  for case, settings in CASES.items()])
def test_the_host_reads_nothing_between_log_lines(tiny_data, tmp_path, case):
    """Neither in training steps nor in Hessian updates. Only batches are uploaded: one tensor per
    step and two per Hessian update. Steps 6 to 10 have 3 updates, steps 11 to 15 have 2."""
    settings = CASES[case]
    found = on_fake_device(tmp_path / "far", tiny_data, **settings)
    updates = (0, 0) if "optimizer" in settings else (3, 2)
    assert found == [{"upload": 5 + 2 * n} for n in updates]
    if "dtype" not in settings:   # autocast does not act on the fake device
        train(tmp_path / "cpu", tiny_data, **{**SETTINGS, **settings})
        assert [r["train/loss"] for r in records(tmp_path / "far")] == pytest.approx(
            [r["train/loss"] for r in records(tmp_path / "cpu")], abs=1e-5)


def test_the_fake_device_notices_every_kind_of_read(tiny_data, tmp_path):
    found = on_fake_device(tmp_path, tiny_data, "reading", optimizer="adamw", log_interval=1)
    assert len(found) == 14   # more than there are kinds
    assert all(sum(n for name, n in events.items() if "read" in name) == 1 for events in found)
