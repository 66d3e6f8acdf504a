"""Between two log lines the host reads nothing from the device, so that it can run ahead of it."""
import json

import pytest
from conftest import TINY, flags, records, run, train

SETTINGS = {**TINY, "max_iters": 15, "eval_interval": 100, "hessian_interval": 2, "log_interval": 5}
CASES = {"sophiag": {}, "float16": {"dtype": "float16"}, "steered": {"target_win_rate": 0.3},
         "adamw": {"optimizer": "adamw"}, "adamw, float16": {"optimizer": "adamw",
                                                            "dtype": "float16"},
         "lion": {"optimizer": "lion"}}


def on_fake_device(out_dir, data, *words, **settings):
    """The events between each two log lines of a run with SETTINGS."""
    knobs = {**SETTINGS, "dataset": data, "out_dir": out_dir, **settings}
    done = run("tests/fake_device.py", *words, *flags(**knobs))
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_read_between_log_lines(tiny_data, tmp_path, case):
    """Not by training steps nor by Hessian updates; and the only uploads are batches: one tensor a
    step and two a Hessian update, of which there are 3 in steps 6 to 10 and 2 in 11 to 15."""
    settings = CASES[case]
    found = on_fake_device(tmp_path / "far", tiny_data, **settings)
    updates = (0, 0) if "optimizer" in settings else (3, 2)
    assert found == [{"upload": 5 + 2 * n} for n in updates]
    if "dtype" not in settings:   # autocast leaves the fake device alone
        train(tmp_path / "cpu", tiny_data, **{**SETTINGS, **settings})
        assert [r["train/loss"] for r in records(tmp_path / "far")] == pytest.approx(
            [r["train/loss"] for r in records(tmp_path / "cpu")], abs=1e-5)


def test_every_kind_of_read_is_seen(tiny_data, tmp_path):
    found = on_fake_device(tmp_path, tiny_data, "reading", optimizer="adamw", log_interval=1)
    assert len(found) == 14   # as many as there are ways, and more
    assert all(sum(n for name, n in events.items() if "read" in name) == 1 for events in found)
