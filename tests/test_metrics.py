"""
metrics.jsonl, wandb and the log lines of a run, skipped steps, and the stop at a loss that is not
finite. Most tests share one run with wandb, resumed once.
"""
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, TINY, command, environment, flags, records, run, train
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

import checkpoint
from configurator import FIELDS
from device import peak_flops
from records import read_metrics
from script import UserError

CLIP = 0.75   # about the median of this run's gradient norms
RUN = dict(max_iters=20, eval_interval=10, hessian_interval=5, lr_decay_iters=30, grad_clip=CLIP)
WANDB_KEYS = {"iter", "tokens", "flops", "hours", "lr", "train/loss", "train/win_rate",
              "train/clip_rate", "grad_norm", "param_norm", "momentum_norm", "hessian_norm"}


@pytest.fixture(scope="module")
def logged(tmp_path_factory, tiny_data):
    """A run of 20 steps with wandb, resumed to 30: (run directory, output of both starts)."""
    out = tmp_path_factory.mktemp("runs") / "blue"
    output = train(out, tiny_data, **RUN, wandb_log=True)
    resume = {**RUN, "max_iters": 30, "init_from": "resume", "wandb_log": True}
    return out, output + train(out, tiny_data, **resume)


def read_wandb(out):
    """wandb's records of each start of a run: [{kind: [record, ...]}]."""
    starts = []
    for path in sorted(out.glob("wandb/offline-run-*/run-*.wandb")):
        inspect = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", path]
        lines = subprocess.run(inspect, capture_output=True, text=True, check=True).stdout
        found = {}
        for record in map(json.loads, lines.splitlines()):
            kind = record["type"]
            found.setdefault(kind, []).append(record[kind])
        starts.append(found)
    return sorted(starts, key=lambda found: found["run"][0]["start_time"])


@pytest.fixture(scope="module")
def wandb_runs(logged):
    return read_wandb(logged[0])


@pytest.mark.slow
def test_wandb_gets_the_records_of_metrics_jsonl(logged, wandb_runs):
    assert len(wandb_runs) == 2
    history = [{k: v for k, v in record["item"].items() if not k.startswith("_")}
               for found in wandb_runs for record in found["history"]]
    assert history == read_metrics(logged[0] / "metrics.jsonl")
    training = [record for record in history if "train/loss" in record]
    assert [record["iter"] for record in training] == list(range(1, 31))
    assert all(record.keys() >= WANDB_KEYS for record in training)
    evaluations = [record for record in history if "val/loss" in record]
    assert [record["iter"] for record in evaluations] == [0, 10, 20, 30]
    assert all(record["tokens"] == record["iter"] * 8 * 32 for record in history)


def test_wandb_gets_the_name_group_settings_and_commit_of_a_run(logged, wandb_runs):
    first, second = (found["run"][0] for found in wandb_runs)
    assert first["run_id"] == second["run_id"]
    assert (first["display_name"], first["run_group"]) == ("blue", "tiny-2x32-32")
    assert first["project"] == "sophia-gpt2"
    config = first["config"]["update"]
    resolved = json.loads((logged[0] / "config.json").read_text())
    assert {**resolved, **config}.keys() == {*resolved, "_wandb"}
    for name, value in {**TINY, **RUN, "compile": "False", "beta1": 0.965, "min_lr": 1e-4}.items():
        assert config[name] == value
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True,
                          text=True)
    assert first.get("git", {}).get("commit", "") == head.stdout.strip()


def test_wandb_charts_against_iter_tokens_flops_and_hours(logged, wandb_runs):
    for found in wandb_runs:
        metrics = {m.get("name") or m["glob_name"]: m for m in found["metric"]}
        assert metrics.keys() == {"iter", "tokens", "flops", "hours", "*", "val/loss"}
        assert metrics["*"]["step_metric"] == metrics["val/loss"]["step_metric"] == "iter"
        assert metrics["val/loss"]["summary"] == {"min": True}
    losses = [r["val/loss"] for r in records(logged[0], "val/loss")]
    summary = [record["update"]["val/loss"] for record in wandb_runs[1]["summary"]
               if "val/loss" in record["update"]]
    assert summary[-1]["min"] == min(losses[2:])   # of the second start
    for r in records(logged[0], "iter"):
        assert r["flops"] / max(r["tokens"], 1) in (0, records(logged[0])[0]["flops"] / 256)
        assert r["hours"] == pytest.approx(r["seconds"] / 3600, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [None, "disabled"])
def test_training_continues_without_a_wandb_key(tiny_data, tmp_path, mode):
    env = {k: v for k, v in environment(HOME=str(tmp_path)).items() if not k.startswith("WANDB_")}
    env |= {"WANDB_MODE": mode} if mode else {}
    knobs = {**TINY, "dataset": tiny_data, "out_dir": tmp_path / "run", "max_iters": 2}
    done = subprocess.run(command("train.py", *flags(**knobs, wandb_log=True)), env=env,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "finished at step 2" in done.stdout, done.stderr
    assert len(records(tmp_path / "run")) == 2
    offline = list((tmp_path / "run").glob("wandb/offline-run-*"))
    assert ("logging offline" in done.stdout, len(offline)) == ((True, 1) if mode is None else
                                                               (False, 0))


@pytest.mark.slow
def test_sample_text_is_recorded_and_does_not_change_training(tiny_data, tmp_path):
    """After a resume, wandb's table has the rows of both starts."""
    settings = dict(eval_interval=10, dropout=0.1)
    train(tmp_path / "without", tiny_data, **settings, max_iters=20)
    for end, start in (10, "scratch"), (20, "resume"):
        output = train(tmp_path / "with", tiny_data, **settings, max_iters=end, init_from=start,
                       wandb_log=True, sample_tokens=12)
    samples = records(tmp_path / "with", "sample")
    assert [r["iter"] for r in samples] == [0, 10, 20]
    assert "step 20/20 | sample" in output and not records(tmp_path / "without", "sample")
    assert [r["train/loss"] for r in records(tmp_path / "with")] == [
        r["train/loss"] for r in records(tmp_path / "without")]
    tables = [json.loads(p.read_text()) for p in (tmp_path / "with").glob(
        "wandb/offline-run-*/files/media/table/*.json")]
    assert max(tables, key=lambda t: len(t["data"])) == {
        "columns": ["iter", "text"], "data": [[r["iter"], r["sample"]] for r in samples]}


@pytest.mark.slow
def test_the_wandb_sweep_config_trains(tmp_path, tiny_data):
    """With the command line that wandb's agent makes of config/sweep_sophiag.yaml."""
    sweep = yaml.safe_load((ROOT / "config/sweep_sophiag.yaml").read_text())
    assert set(sweep["parameters"]) <= set(FIELDS) and sweep["method"] == "grid"
    assert sweep["metric"] == {"name": "val/loss", "goal": "minimize"}
    chosen = {"args": {name: {"value": p["values"][0]} for name, p in sweep["parameters"].items()}}
    args = create_sweep_command_args(chosen)["args"] + flags(
        dataset=tiny_data, max_iters=2, warmup_iters=1, eval_iters=1, block_size=32)
    words = [w for word in create_sweep_command(sweep["command"])
             for w in (args if word == "${args}" else [word])]
    env = environment(WANDB_RUN_ID="abc123", PYTHONPATH=str(ROOT),
                      PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    shutil.copytree(ROOT / "config", tmp_path / "config")
    (tmp_path / sweep["program"]).symlink_to(ROOT / sweep["program"])
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "out/sweep-abc123/config.json").read_text())
    assert (config["learning_rate"], config["target_win_rate"]) == (4e-4, 0.15)
    assert read_wandb(tmp_path / "out/sweep-abc123")[0]["run"][0]["run_id"] == "abc123"


def test_logged_numbers_have_plausible_sizes(logged):
    assert len(records(logged[0])) == 30
    for record in records(logged[0]):
        assert 0 < record["train/loss"] < math.log(128) + 0.5
        assert 0 < record["grad_norm"] < 10 and 0 < record["momentum_norm"] < 10
        assert 10 < record["param_norm"] < 20
        assert 0 <= record["train/win_rate"] <= 1
        # The first Hessian estimate comes after step 5 and before the record of step 5.
        assert (record["hessian_norm"] > 0) == (record["iter"] >= 5)
        assert record["hessian_norm"] > 0 or record["train/win_rate"] == 0
        assert record["tokens_per_sec"] > 0
    evaluations = records(logged[0], "val/loss")
    assert evaluations[-1]["val/loss"] < evaluations[0]["val/loss"]
    assert all(0 < record["val/loss_stderr"] < 0.1 for record in evaluations)


def test_clip_rate_is_the_share_of_clipped_steps(logged, tiny_data, tmp_path):
    clipped = [float(record["grad_norm"] > CLIP) for record in records(logged[0])]
    assert 3 < sum(clipped) < 27   # else the test would prove nothing
    assert [record["train/clip_rate"] for record in records(logged[0])] == clipped
    train(tmp_path, tiny_data, **RUN, log_interval=4)   # the same run, logged less often
    rates = [sum(clipped[i:i + 4]) / 4 for i in range(0, 20, 4)]
    assert [record["train/clip_rate"] for record in records(tmp_path)] == rates
    assert [record["iter"] for record in records(tmp_path)] == [4, 8, 12, 16, 20]
    same = "train/loss", "grad_norm", "lr", "param_norm", "train/win_rate"
    for sparse, dense in zip(records(tmp_path), records(logged[0])[3::4]):
        assert all(sparse[name] == dense[name] for name in same)


def test_log_lines_show_the_recorded_numbers(logged):
    lines = logged[1].splitlines()
    pattern = (r"step (\d+)/(20|30) \| loss (\d\.\d{4}) \| lr (\d\.\d\de-0\d) \| "
               r"win_rate ([01]\.\d{3}) \| grad_norm (\d\.\d\d) \| [\d,]+ tok/s \| "
               r"eta \d:\d\d:\d\d")
    found = [match.groups() for line in lines if (match := re.fullmatch(pattern, line))]
    assert found == [
        (str(r["iter"]), "20" if r["iter"] <= 20 else "30", f"{r['train/loss']:.4f}",
         f"{r['lr']:.2e}", f"{r['train/win_rate']:.3f}", f"{r['grad_norm']:.2f}")
        for r in records(logged[0])]
    for r in records(logged[0], "val/loss"):
        assert any(line.startswith(f"step {r['iter']}/") and f"val loss {r['val/loss']:.4f}" in line
                   for line in lines)
    assert "finished at step 30" in lines[-1]


def test_adamw_logs_no_win_rate_and_no_hessian(tiny_data, tmp_path):
    output = train(tmp_path, tiny_data, optimizer="adamw", max_iters=5, log_interval=5)
    record, = records(tmp_path)
    assert not {"train/win_rate", "hessian_norm"} & record.keys()
    assert record.keys() >= WANDB_KEYS - {"train/win_rate", "hessian_norm"}
    assert "| win_rate" not in output and "Hessian:" not in output
    assert not (tmp_path / "wandb").exists()


def strict(text):
    """Parse JSON, without the NaN and Infinity that only Python accepts."""
    def no_constant(name):
        raise AssertionError(f"{name} in {text}")
    return json.loads(text, parse_constant=no_constant)


# train.py whose loss and gradient are nan on the last rank alone, in the given training steps and
# Hessian estimates.
BROKEN = """
import os, train
sound, calls = train.accumulate_gradients, [0, 0]
last_rank = int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1

def broken(model, x, y, loss_fn, *rest):
    hessian = loss_fn is train.sampled_label_loss
    calls[hessian] += 1
    if not (last_rank and calls[hessian] in ({steps}, {updates})[hessian]):
        return sound(model, x, y, loss_fn, *rest)
    return sound(model, x, y, lambda *args: loss_fn(*args) * float("nan"), *rest)

train.accumulate_gradients = broken
train.run_script(train.main)
"""


def broken_run(folder, ranks, steps, updates=(), **knobs):
    script = folder / "broken.py"
    script.write_text(BROKEN.replace("{steps}", str(steps)).replace("{updates}", str(updates)))
    return run(script, *flags(**{**TINY, "out_dir": folder / "out", **knobs}), ranks=ranks)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer, ranks", [("sophiag", 1), ("adamw", 1), ("lion", 1),
                                              ("muon", 1), ("sophiag", 2)])
def test_a_non_finite_gradient_of_one_rank_skips_the_step_on_every_rank(tiny_data, tmp_path,
                                                                        optimizer, ranks):
    done = broken_run(tmp_path, ranks, (7, 8), updates=(2,), dataset=tiny_data, optimizer=optimizer,
                      max_iters=20, hessian_interval=5)
    assert done.returncode == 0 and "finished at step 20" in done.stdout, done.stderr
    log = records(tmp_path / "out", "iter")
    for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines():
        strict(line)
    by_step = {r["iter"]: r for r in log if "lr" in r}
    count = [2, 3] if optimizer == "sophiag" else [2, 2]
    assert [by_step[i]["train/skipped"] for i in (6, 7, 8, 9, 20)] == [0, 1, 2, 2, count[1]]
    assert "train/loss" not in by_step[7] and "grad_norm" not in by_step[8]
    for key in "param_norm", "momentum_norm":   # neither step changed anything
        assert by_step[6][key] == by_step[7][key] == by_step[8][key] != by_step[9][key]
    if optimizer == "sophiag":
        assert by_step[9]["hessian_norm"] == by_step[10]["hessian_norm"]
        assert by_step[14]["hessian_norm"] != by_step[15]["hessian_norm"]
    assert by_step[20]["train/loss"] < by_step[6]["train/loss"]
    saved = checkpoint.load(checkpoint.find_latest(tmp_path / "out")[0])
    assert all(t.isfinite().all() for t in saved["model"].values())


@pytest.mark.slow
def test_training_stops_after_20_non_finite_gradients_in_a_row(tiny_data, tmp_path):
    done = broken_run(tmp_path, 2, tuple(range(25, 60)), dataset=tiny_data, optimizer="adamw",
                      max_iters=60, eval_interval=10, log_interval=4, wandb_log=True)
    assert done.returncode and "Traceback" not in done.stdout
    assert re.search(r"error: the gradient was not finite in 20 steps in a row, up to 44; "
                     r"checkpoints in \S+ are intact", done.stderr)
    alert, = read_wandb(tmp_path / "out")[-1]["alert"]
    assert alert["title"] == "training gave up" and "up to 44" in alert["text"]
    saved = checkpoint.load(checkpoint.find_latest(tmp_path / "out")[0])
    assert saved["step"] == 40 and all(t.isfinite().all() for t in saved["model"].values())


def test_weights_with_a_non_finite_loss_are_not_saved(logged, tiny_data, tmp_path):
    """The weights are finite, but so large that the evaluation's loss is nan."""
    for path in [*logged[0].glob("ckpt_*"), logged[0] / "metrics.jsonl"]:
        shutil.copy(path, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("ckpt_*")}
    done = run("train.py", *flags(**{
        **TINY, "dataset": tiny_data, "out_dir": tmp_path, "init_from": "resume", "max_iters": 50,
        "learning_rate": 1e30, "grad_clip": 0, "warmup_iters": 0, "eval_interval": 5}))
    assert done.returncode == 2
    assert re.fullmatch(r"train\.py: error: validation loss is nan at step 35; .*\n", done.stderr)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("ckpt_*")} == before


def test_loss_max_shows_a_spike_between_log_lines(logged, tiny_data, tmp_path):
    """train/loss_max is the maximum since the last log line, also after a resume between two log
    lines."""
    for end, start in (10, "scratch"), (20, "resume"):
        train(tmp_path, tiny_data, **{**RUN, "max_iters": end}, log_interval=4, init_from=start)
    losses = [r["train/loss"] for r in records(logged[0])]
    assert [r["train/loss_max"] for r in records(tmp_path)] == [
        max(losses[i:i + 4]) for i in range(0, 20, 4)]


@pytest.mark.slow
@pytest.mark.parametrize("rho, advice", [(1e-9, "below 0.05: raise"), (1e9, "above 0.9: lower"),
                                         (None, None)])
def test_advice_on_rho_is_given_once(tiny_data, tmp_path, rho, advice):
    knobs = dict(rho=rho) if rho else dict(optimizer="adamw")
    output = train(tmp_path, tiny_data, **knobs, hessian_interval=1, eval_iters=1)
    assert output.count("win_rate has been") == (advice is not None)
    assert advice is None or f"win_rate has been {advice} rho" in output


@pytest.mark.parametrize("card, teraflops", [
    ("NVIDIA B200", 2250), ("NVIDIA GB200", 2500), ("NVIDIA H200", 989), ("NVIDIA H200 NVL", 836),
    ("NVIDIA GH200 480GB", 989), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 NVL", 836),
    ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100 80GB PCIe", 312),
    ("NVIDIA L40S", 362), ("NVIDIA L4", 121), ("NVIDIA A10G", 70), ("NVIDIA RTX A6000", 155),
    ("NVIDIA GeForce RTX 3090", 71), ("NVIDIA GeForce RTX 4090", 165),
    ("NVIDIA GeForce RTX 5090", 209.5), ("Tesla V100-SXM2-16GB", 125), ("Tesla T4", 65),
    # Other cards with similar names.
    ("NVIDIA L40", None), ("NVIDIA A10", None), ("NVIDIA RTX A1000", None), ("NVIDIA GB300", None),
    ("NVIDIA GeForce RTX 3090 Ti", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None)])
def test_an_unknown_gpu_prints_that_mfu_is_left_out(monkeypatch, capsys, card, teraflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
    cuda = torch.device("cuda")
    assert peak_flops(cuda, torch.bfloat16) == (teraflops and teraflops * 1e12)
    said = capsys.readouterr().out
    assert said == ("" if teraflops else "MFU is left out: PEAK_FLOPS in device.py has no peak "
                    f"for {card}\n")
    assert peak_flops(cuda, torch.float32) is None
    assert ("float32" if teraflops else card) in capsys.readouterr().out
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None
    assert capsys.readouterr().out == ""


def test_read_metrics_ignores_a_torn_last_line_and_refuses_other_damage(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    whole = '{"iter": 1, "train/loss": 4.5}\n{"iter": 2, "train/loss": 4.25}\n'
    expected = [{"iter": 1, "train/loss": 4.5}, {"iter": 2, "train/loss": 4.25}]
    for torn in "", '{"iter": 3, "train/lo', "{":
        path.write_text(whole + torn)
        assert read_metrics(path) == expected
    path.write_text('{"iter": 0}\n{"iter": 1, "tr\n' + whole)
    with pytest.raises(UserError, match="metrics.jsonl, line 2 is damaged"):
        read_metrics(path)
