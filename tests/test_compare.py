"""compare.py on synthetic runs with results worked out by hand."""
import contextlib
import io
import json
import os
import re
import struct

import pytest
from conftest import run

from compare import main
from script import UserError

CONFIG = dict(
    out_dir="out", init_from="scratch", seed=1, eval_interval=100, eval_iters=2, log_interval=10,
    wandb_run_name="x", dataset="tiny", batch_size=4, total_batch_size=8, block_size=32, n_layer=2,
    n_head=2, n_embd=32, dropout=0.0, bias=False, scale_attn_by_inverse_layer_idx=True,
    optimizer="adamw", learning_rate=1e-3, min_lr=1e-4, max_iters=400, warmup_iters=10,
    lr_decay_iters=400, decay_lr=True, weight_decay=0.1, rho=0.05)
ADAMW = {0: 5.0, 100: 4.0, 200: 3.0, 300: 2.6, 400: 2.5}
# Falls from 2.7 to 2.3 between steps 200 and 300, so it reaches AdamW's final 2.5 at step 250.
SOPHIAG = {0: 5.0, 100: 3.5, 200: 2.7, 300: 2.3, 400: 2.2}


def write_run(folder, losses=ADAMW, ms=100, win_rate=None, hessian_ms=0, **config):
    """Write a run directory. losses: {step: val loss}; every tenth step takes hessian_ms more."""
    folder.mkdir(parents=True)
    config = {**CONFIG, "out_dir": str(folder), "wandb_run_name": folder.name, **config}
    (folder / "config.json").write_text(json.dumps(config))
    lines = []
    for step in range(max(losses) + 1):
        at = {"iter": step, "tokens": step * 256,
              "seconds": (step * ms + step // 10 * hessian_ms) / 1000}
        if step:
            rate = {} if win_rate is None else {"train/win_rate": win_rate(step)}
            lines.append({**at, "train/loss": 5 - step / 200, "lr": 1e-3, "grad_norm": 1.0, **rate})
        if step in losses:
            lines.append({**at, "val/loss": losses[step], "val/loss_stderr": 0.0125})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def compare(*words):
    """Return what compare.py prints."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        main([str(word) for word in words])
    return output.getvalue()


def error_of(*words):
    """Return the error of a call that must fail; it is one line."""
    with pytest.raises(UserError) as raised:
        compare(*words)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def parse_tables(output):
    """All rows of all printed tables, merged: {first cell of a row: {column: cell}}."""
    cells = {}
    for block in output.split("\n\n"):
        head, *rows = block.splitlines()
        starts = [m.start() for m in re.finditer(r"(?<!\S)\S+(?: \S+)*", head)]
        ends = [*starts[1:], None]
        names = [head[a:b].strip() for a, b in zip(starts, ends)]
        for row in rows:
            values = [row[a:b].strip() for a, b in zip(starts, ends)]
            cells.setdefault(values[0], {}).update(zip(names, values))
    return cells


@pytest.fixture
def adamw(tmp_path):
    return write_run(tmp_path / "adamw")


@pytest.fixture
def sophiag(tmp_path):
    """As fast as AdamW except for the Hessian, which adds 10%."""
    return write_run(tmp_path / "sophiag", SOPHIAG, optimizer="sophiag", weight_decay=0.2,
                  win_rate=lambda step: 0.9 if step <= 40 else 0.15 + step / 2000, hessian_ms=100)


def test_summary_of_each_run(sophiag, adamw):
    output = compare(sophiag, adamw)
    rows = parse_tables(output)
    assert {
        "optimizer": "sophiag", "steps": "400", "tokens": "102,400", "time": "0.7 min",
        "final val loss": "2.2000 +- 0.0125", "best val loss": "2.2000 at 400",
        "win_rate": "0.17-0.35", "ms/step": "110.0", "overhead": "+10.0%",
    }.items() <= rows["sophiag"].items()
    assert (rows["adamw"]["win_rate"], rows["adamw"]["ms/step"]) == ("-", "100.0")
    assert max(map(len, output.splitlines())) <= 120


def test_the_best_evaluation_need_not_be_the_last(tmp_path):
    row = parse_tables(compare(write_run(tmp_path / "over", {0: 5, 200: 2.25, 400: 2.5})))["over"]
    assert (row["final val loss"], row["best val loss"]) == ("2.5000 +- 0.0125", "2.2500 at 200")


def test_speed_up_is_interpolated_between_evaluations(sophiag, adamw):
    output = compare(sophiag, adamw)
    row = parse_tables(output)["sophiag"]
    assert "warning" not in output
    assert row["steps to 2.5000"] == "250 (1.60x)"
    assert row["time to 2.5000"] == "0.5 min (1.45x)"     # 40 s against 250 x 0.11 s
    assert row["loss diff at equal steps"] == "-0.3000 at 400"
    # After 40 s sophiag is at step 363.6, 2.3 - 0.1 x 0.636 = 2.2364.
    assert row["loss diff at equal time"] == "-0.2636 at 0.7 min"


def test_the_baseline_is_the_first_adamw_run_or_else_the_first(tmp_path, sophiag, adamw):
    lion = write_run(tmp_path / "lion", SOPHIAG, optimizer="lion")
    assert "vs adamw " in compare(lion, sophiag, adamw)
    assert "vs lion " in compare(lion, sophiag)


def test_a_loss_that_is_never_reached(tmp_path, adamw):
    worse = write_run(tmp_path / "worse", {0: 5.0, 400: 2.75}, optimizer="lion")
    row = parse_tables(compare(worse, adamw))["worse"]
    assert row["steps to 2.5000"] == row["time to 2.5000"] == "not reached"
    assert row["loss diff at equal steps"] == "+0.2500 at 400"


def test_settings_that_differ(sophiag, adamw):
    rows = parse_tables(compare(sophiag, adamw))
    assert rows["weight_decay"] == {"setting": "weight_decay", "sophiag": "0.2", "adamw": "0.1"}
    assert rows["optimizer"]["sophiag"] == "sophiag"
    assert not {"out_dir", "wandb_run_name", "learning_rate"} & rows.keys()


@pytest.mark.parametrize("key, value", [
    ("dataset", "other"), ("block_size", 64), ("total_batch_size", 16), ("max_iters", 200),
    ("lr_decay_iters", 300), ("decay_lr", False), ("eval_iters", 4), ("seed", 2), ("n_layer", 3),
    ("n_head", 1), ("n_embd", 64), ("dropout", 0.1), ("bias", True), ("init_from", "out/other")])
def test_an_unfair_comparison_is_a_warning_and_no_speed_up(tmp_path, adamw, key, value):
    other = write_run(tmp_path / "other", SOPHIAG, optimizer="sophiag", **{key: value})
    output = compare(adamw, other)
    warnings = [line for line in output.splitlines() if line.startswith("warning: ")]
    assert warnings == [f"warning: {key} differs between other and adamw"]
    rows = parse_tables(output)
    assert rows[key] == {"setting": key, "adamw": str(CONFIG[key]), "other": str(value)}
    row = rows["other"]
    assert row["steps to 2.5000"] == row["time to 2.5000"] == "see warning"
    other_loss = key in ("dataset", "block_size", "total_batch_size", "eval_iters")
    assert row["loss diff at equal steps"] == ("-" if other_loss else "-0.3000 at 400")


@pytest.mark.parametrize("key, value", [
    ("learning_rate", 2e-3), ("min_lr", 0.0), ("weight_decay", 0.3), ("rho", 0.1),
    ("warmup_iters", 20), ("batch_size", 8), ("init_from", "auto"), ("grad_clip", 0.5)])
def test_optimizer_settings_may_differ_in_a_fair_comparison(tmp_path, adamw, key, value):
    output = compare(adamw, write_run(tmp_path / "other", SOPHIAG, **{key: value}))
    assert "warning" not in output and "250 (1.60x)" in output
    assert (key in parse_tables(output)) == (key != "init_from")


def test_rounding_is_not_shown(tmp_path, adamw):
    assert 0.011 / 10 != 0.0011
    rows = parse_tables(compare(adamw, write_run(tmp_path / "other", min_lr=0.011 / 10)))
    assert rows["min_lr"]["other"] == "0.0011"


@pytest.mark.parametrize("which", ["adamw", "sophiag"])
def test_an_unfinished_run_gets_no_speed_up(tmp_path, which):
    losses = dict(adamw=ADAMW, sophiag=SOPHIAG)
    losses[which] = {step: loss for step, loss in losses[which].items() if step <= 300}
    output = compare(*(write_run(tmp_path / n, losses[n], optimizer=n) for n in losses))
    assert f"warning: {which} was last evaluated at step 300 of 400\n" in output
    assert output.count("see warning") == 2 and "0x)" not in output
    assert parse_tables(output)["sophiag"]["loss diff at equal steps"] == "-0.3000 at 300"


def test_a_run_that_stopped_before_its_schedule_ends(tmp_path):
    runs = [write_run(tmp_path / name, lr_decay_iters=800) for name in ("one", "two")]
    assert "one was last evaluated at step 400 of 800" in compare(*runs)


def test_runs_with_the_same_folder_name_are_shown_by_their_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in "here/run", "there/run", "alone":
        write_run(tmp_path / path)
    rows = parse_tables(compare("here/run", "there/run/", tmp_path / "alone"))
    assert {"here/run", "there/run/", "alone"} <= rows.keys()


def test_a_truncated_last_line_and_records_of_old_runs(tmp_path, adamw):
    with open(adamw / "metrics.jsonl", "a") as file:
        file.write('{"iter": 4')
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text('{"optimizer": "lion"}')
    (bare / "metrics.jsonl").write_text('{"iter": 0, "val/loss": 3.0}\n')
    rows = parse_tables(compare(adamw, bare))
    assert rows["adamw"]["final val loss"] == "2.5000 +- 0.0125"
    assert (rows["bare"]["final val loss"], rows["bare"]["ms/step"]) == ("3.0000", "-")


@pytest.mark.slow
def test_plot(tmp_path, sophiag, adamw):
    path = tmp_path / "curves.png"
    assert compare(sophiag, adamw, f"--plot={path}").endswith(f"wrote {path}\n")
    raw = path.read_bytes()
    width, height = struct.unpack(">II", raw[16:24])
    assert raw.startswith(b"\x89PNG") and width == 9 * 160 and 1600 < height < 2000
    assert len(raw) > 50_000


def test_a_run_that_just_started_is_plotted_with_the_others(tmp_path, adamw):
    compare(write_run(tmp_path / "new", {0: 5.0}), adamw, f"--plot={tmp_path}/c.svg")
    assert (tmp_path / "c.svg").read_text().count("<svg") == 1


@pytest.mark.parametrize("plot, named", [("nowhere/c.png", "nowhere/c.png"), ("c.doc", "png")])
def test_a_plot_that_cannot_be_written(tmp_path, adamw, plot, named):
    assert named in error_of(adamw, f"--plot={tmp_path}/{plot}")


@pytest.mark.slow
def test_only_plots_need_matplotlib(tmp_path, adamw):
    """A module that cannot be imported shadows matplotlib."""
    (tmp_path / "matplotlib.py").write_text("raise ImportError")
    words = ("compare.py", adamw)
    assert run(*words, PYTHONPATH=str(tmp_path)).returncode == 0
    done = run(*words, f"--plot={tmp_path}/c.png", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2 and "pip install matplotlib" in done.stderr


def test_no_evaluation_yet_is_an_error_of(tmp_path, adamw):
    new = write_run(tmp_path / "new")
    (new / "metrics.jsonl").write_text('{"iter": 10, "train/loss": 5.0}\n')
    assert os.path.join("new", "metrics.jsonl") in error_of(adamw, new)


def test_help_fits_a_screen():
    assert len(run("compare.py", "--help").stdout.splitlines()) <= 24
