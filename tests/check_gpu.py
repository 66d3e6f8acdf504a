"""
Check that this machine's GPU runs the repository, and measure its speed. Takes under 10 minutes:
tests/test_cuda.py, bench.py, and 50 training steps of each optimizer on random tokens.

    python tests/check_gpu.py [config.py ...] [--key=value ...]

Settings are those of train.py, on top of GPT-2 small's; with less memory use --batch_size=4.
Writes a report to paste into an issue. Exit code: 1 if a check failed, 2 without a GPU.
"""
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))   # the repository root

import ddp
import train
from configurator import load_config
from device import pick_device
from records import read_metrics
from script import ROOT, ArgumentParser, UserError, run_script, write_atomically

TIMEOUT = 300   # seconds, for the tests and for the benchmark


def git_commit():
    """This code's commit, with '-dirty' after uncommitted changes; None outside a repository."""
    try:
        words = ["git", "-C", ROOT, "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def run_python(lines, problems, *words):
    """Run Python with words; add its output to lines, and a failure to problems."""
    script = next(word for word in words if word.endswith(".py"))
    print(script, "...", flush=True)
    try:
        done = subprocess.run([sys.executable, *words], cwd=ROOT, text=True, timeout=TIMEOUT,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        output, failed = done.stdout, done.returncode != 0
    except subprocess.TimeoutExpired:
        output, failed = f"did not finish in {TIMEOUT} s", True
    lines += ["", *output.strip().splitlines()]
    if failed:
        problems.append(f"{script}: {lines[-1]}")


def write_random_tokens(folder):
    """A data set in GPT-2's vocabulary. Small ids are more frequent, so the loss can fall."""
    for split, count in ("train", 4_000_000), ("val", 400_000):
        tokens = 50257 * np.random.default_rng(count).random(count) ** 4
        tokens.astype("<u2").tofile(f"{folder}/{split}.bin")


def settings(optimizer, words):
    return load_config([
        f"{ROOT}/config/train_gpt2_small_{optimizer}.py", "--total_batch_size=120",
        "--hessian_batch_size=60", "--hessian_interval=10", "--max_iters=50", "--warmup_iters=10",
        "--lr_decay_iters=50", "--log_interval=10", "--eval_iters=1", "--wandb_log=False", *words])


def train_with(optimizer, words):
    """Train in this process. Returns {name: number}; None where a number is unknown."""
    gc.collect()   # frees the model of the previous run
    with tempfile.TemporaryDirectory() as out_dir:
        cfg = settings(optimizer, [*words, f"--out_dir={out_dir}"])
        if cfg.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        train.train(cfg, ddp.World(0, 1, pick_device(cfg.device)))
        records = read_metrics(f"{out_dir}/metrics.jsonl")
    steps = [r for r in records if "lr" in r][1:]   # the first interval includes compilation
    losses = [r["val/loss"] for r in records if "val/loss" in r]
    rate = median(r["tokens_per_sec"] for r in steps)
    return {"ms_per_step": cfg.tokens_per_step / rate * 1e3, "tokens_per_sec": rate,
            "mfu": median(r["mfu"] for r in steps) if "mfu" in steps[0] else None,
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if cfg.device == "cuda" else None,
            "first_val_loss": losses[0], "last_val_loss": losses[-1],
            "skipped": steps[-1]["train/skipped"]}


def check_training(report, lines, problems):
    runs = report["training"]
    for optimizer, run in runs.items():
        lines.append(f"{optimizer}: " + ", ".join(
            f"{name} {value:,.5g}" for name, value in run.items() if value is not None))
        if run["skipped"] or run["last_val_loss"] >= run["first_val_loss"]:
            problems.append(f"{optimizer}: updates were skipped, or the loss did not fall")
    first_losses = [run["first_val_loss"] for run in runs.values()]
    if runs and max(first_losses) - min(first_losses) > 1e-3:
        problems.append(f"the optimizers started from different losses: {first_losses}")
    if {"sophiag", "adamw"} <= runs.keys():
        ratio = runs["sophiag"]["ms_per_step"] / runs["adamw"]["ms_per_step"]
        report["sophiag_overhead"] = ratio - 1
        lines.append(f"a step of SophiaG takes {ratio - 1:+.1%} compared with AdamW's")


def main(argv):
    parser = ArgumentParser(__doc__)
    parser.add_argument("--device", default="cuda", help="cuda | cpu, to try this script")
    parser.add_argument("--tests", default="", metavar="EXPR", help="select tests: pytest's -k")
    parser.add_argument("--report", default="out/check_gpu.md", metavar="FILE")
    args, words = parser.parse_known_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"PyTorch {torch.__version__} finds no CUDA GPU on this machine")
    settings("sophiag", words)   # reports a wrong setting before the tests run
    report = {"gpu": torch.cuda.get_device_name() if args.device == "cuda" else None,
              "gpus": torch.cuda.device_count(), "torch": torch.__version__,
              "cuda": torch.version.cuda, "commit": git_commit()}
    lines, problems = [", ".join(f"{key} {value}" for key, value in report.items())], []
    print(lines[0])
    run_python(lines, problems, "-m", "pytest", "-q", "-rfEs", "--tb=short", "tests/test_cuda.py",
               f"-k={args.tests}", f"--device={args.device}")
    report["tests"], report["training"] = lines[-1], {}
    with tempfile.TemporaryDirectory() as data:
        write_random_tokens(data)
        words += [f"--dataset={data}", f"--device={args.device}"]
        results = Path(data, "bench.json")
        run_python(lines, problems, "bench.py", "config/train_gpt2_small_sophiag.py", *words,
                   "--repeat=3", "--only=optimizer,step,memory", f"--json={results}")
        if results.exists():
            report["bench"] = json.loads(results.read_text())["rows"]
        lines.append("")
        for optimizer in "sophiag", "adamw", "lion":
            try:
                report["training"][optimizer] = train_with(optimizer, words)
            except (UserError, RuntimeError) as error:   # out of memory is a RuntimeError
                problems.append(f"{optimizer}: {(str(error) or repr(error)).splitlines()[0]}")
    check_training(report, lines, problems)
    lines += ["", "failed: " + "; ".join(problems) if problems else "all checks passed"]
    report["problems"], text = problems, "\n".join(lines)
    write_atomically(args.report,
                     f"```\n{text}\n```\n\n```json\n{json.dumps(report)}\n```\n".encode())
    print(f"{text}\nPaste this report, with its JSON, into an issue: {args.report}")
    if problems:
        sys.exit("check_gpu.py: error: " + "; ".join(problems))


if __name__ == "__main__":
    run_script(main)
