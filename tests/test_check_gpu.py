"""tests/check_gpu.py on a CPU with a tiny model. These tests say nothing about GPUs."""
import json
import re
import subprocess
import sys

import check_gpu
import pytest
from conftest import ROOT, environment, flags, run

TINY = flags(n_layer=1, n_head=2, n_embd=32, block_size=16, batch_size=2, total_batch_size=4,
             hessian_batch_size=2, compile=False, dtype="float32", learning_rate=5e-3,
             max_iters=20, lr_decay_iters=20, warmup_iters=2)


def check(report, *words):
    done = run("tests/check_gpu.py", "--device=cpu", f"--report={report}", *TINY, *words)
    text, data = re.fullmatch(r"```\n(.*)\n```\n\n```json\n(.*)\n```\n", report.read_text(),
                              re.S).groups()
    assert text in done.stdout
    return done, json.loads(data)


@pytest.mark.slow
def test_a_good_machine_gets_a_report(tmp_path):
    done, report = check(tmp_path / "report.md", "--tests=cached_generation")
    assert done.returncode == 0 and "all checks passed" in done.stdout, done.stdout + done.stderr
    assert report["problems"] == [] and report["tests"].startswith("1 passed")
    runs = report["training"]
    assert runs.keys() == set(check_gpu.RUNS)
    assert {name: r["batch_size"] for name, r in runs.items()} == {
        name: 4 if name.endswith(check_gpu.AUTO) else 2 for name in runs}
    assert all(r["last_val_loss"] < r["first_val_loss"] and r["skipped"] == 0
               and r["tokens_per_sec"] * r["ms_per_step"] == pytest.approx(4 * 16 * 1e3)
               for r in runs.values())
    assert report["sophiag_overhead"] == pytest.approx(
        runs["sophiag"]["ms_per_step"] / runs["adamw"]["ms_per_step"] - 1)
    assert {r["section"] for r in report["bench"]} == {"optimizer", "step", "attention",
                                                      "memory"}
    step = report["step"]
    assert step.keys() >= {"clocks under load", "ms, second half of the steps",
                           "whole step, kernels"}
    assert all(value > 0 for name, value in step.items() if not name.startswith("clocks"))
    assert step["whole step, busy_ms"] <= step["whole step, span_ms"]
    assert step["whole step, kernels"] > step["adamw, kernels"]


def test_each_reason_of_a_failure_is_named(tmp_path, monkeypatch, capsys):
    """With fake results: the CUDA tests fail, AdamW's loss rises and Lion runs out of memory."""
    def fail_tests(lines, problems, *words):
        lines.append("1 failed")
        problems += ["tests/test_cuda.py: 1 failed"] * ("pytest" in words)

    def train_with(name, words):
        if name == "lion":
            raise RuntimeError("out of memory")
        return {"ms_per_step": 1, "skipped": 0, "first_val_loss": 5,
                "last_val_loss": 6 if name == "adamw" else 4}

    monkeypatch.setattr(check_gpu, "run_python", fail_tests)
    monkeypatch.setattr(check_gpu, "train_with", train_with)
    monkeypatch.setattr(check_gpu, "explain_step", lambda words, seconds: {"ms": 1})
    with pytest.raises(SystemExit) as exited:
        check_gpu.main(["--device=cpu", f"--report={tmp_path}/report.md", *TINY])
    assert exited.value.code == (
        "check_gpu.py: error: tests/test_cuda.py: 1 failed; lion: out of memory; "
        "adamw: updates were skipped, or the loss did not fall")
    assert "failed: " in capsys.readouterr().out


def test_mistakes_are_found_before_the_tests():
    done = run("tests/check_gpu.py", "--device=cpu", "--n_layers=1")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1


def test_without_a_gpu_it_says_so_in_one_line():
    done = subprocess.run(["make", "--no-print-directory", "-o", ".venv/installed-tests",
                           f"PY={sys.executable}", "check-gpu"], cwd=ROOT, text=True,
                          capture_output=True, env=environment(CUDA_VISIBLE_DEVICES=""))
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and done.stdout == ""
    assert "no CUDA GPU" in lines[0] and "Error 2" in lines[1] and len(lines) == 2   # make's own
