"""
Whether this machine's GPU runs all of this, and how fast: tests/test_cuda.py, the benchmark, and 50
steps of training by each optimizer, on random tokens. Under 10 minutes. Writes a report, to be
pasted into an issue, and exits with 1 and the reasons if anything is wrong, with 2 without a GPU.

    python check_gpu.py [config.py ...] [--key=value ...]

Settings are train.py's, added to GPT-2 small's; a card with less memory needs --batch_size=4.
"""
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile

import numpy as np
import torch

import ddp
import train
from configurator import load_config
from device import pick_device
from metrics import git_commit, read_metrics
from script import ROOT, ArgumentParser, UserError, run_script, write_atomically

LIMIT = 300   # seconds, for the tests and again for the benchmark
SETTINGS = ["--total_batch_size=120", "--hessian_batch_size=60", "--max_iters=50",
            "--lr_decay_iters=50", "--warmup_iters=10", "--log_interval=10",
            "--hessian_interval=10", "--eval_iters=1", "--wandb_log=False"]


def call(*words):
    """Output and exit code of Python with these words; 124 if it takes too long."""
    try:
        done = subprocess.run([sys.executable, *words], cwd=ROOT, text=True, timeout=LIMIT,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except subprocess.TimeoutExpired:
        return f"did not end in {LIMIT} s", 124
    return done.stdout, done.returncode


def write_tokens(folder):
    """A data set of random tokens in GPT-2's vocabulary; small ids are frequent, to be learned."""
    for split, count in ("train", 4_000_000), ("val", 400_000):
        tokens = 50257 * np.random.default_rng(count).random(count) ** 4
        tokens.astype("<u2").tofile(os.path.join(folder, f"{split}.bin"))


def settings(optimizer, words):
    return load_config([f"{ROOT}/config/train_gpt2_small_{optimizer}.py", *SETTINGS, *words])


def train_with(optimizer, device, words):
    """A run of train.py's loop: {what: number, or None where it is not known}."""
    gc.collect()   # of the run before
    with tempfile.TemporaryDirectory() as out_dir:
        cfg = settings(optimizer, [*words, f"--out_dir={out_dir}"])
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        train.train(cfg, ddp.World(0, 1, device))
        records = read_metrics(os.path.join(out_dir, "metrics.jsonl"))
    steps = [r for r in records if "lr" in r][1:]   # the first log line has the compiler's time
    losses = [r["val/loss"] for r in records if "val/loss" in r]
    rate = statistics.median(r["tokens_per_sec"] for r in steps)
    return {"ms_per_step": cfg.tokens_per_step / rate * 1e3, "tokens_per_sec": rate,
            "mfu": statistics.median(r["mfu"] for r in steps) if "mfu" in steps[0] else None,
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None,
            "first_val_loss": losses[0], "last_val_loss": losses[-1],
            "skipped": steps[-1]["train/skipped"]}


def main(argv):
    parser = ArgumentParser(__doc__)
    parser.add_argument("--device", default="cuda", help="cuda | cpu, to try this script")
    parser.add_argument("--tests", default="", metavar="EXPR", help="which tests: pytest's -k")
    parser.add_argument("--report", default="out/check_gpu.md", metavar="FILE")
    args, words = parser.parse_known_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"PyTorch {torch.__version__} finds no CUDA GPU on this machine")
    steps = settings("sophiag", words).max_iters   # mistakes are found before the tests
    device = pick_device(args.device)
    gpu = torch.cuda.get_device_name(device) if args.device == "cuda" else None
    report = {"gpu": gpu, "gpus": torch.cuda.device_count(), "torch": torch.__version__,
              "cuda": torch.version.cuda, "commit": git_commit()}
    lines, problems = [", ".join(f"{key} {value}" for key, value in report.items())], []
    print(lines[0], "\ntests/test_cuda.py ...", flush=True)
    output, code = call("-m", "pytest", "-q", "-rfEs", "--tb=short", "tests/test_cuda.py",
                        f"-k={args.tests}", f"--device={args.device}")
    report["tests"] = output.strip().splitlines()[-1]
    lines.append(f"tests: {report['tests']}")
    if code:
        print(output)
        problems.append(f"tests/test_cuda.py: {report['tests']}")
    report["training"] = training = {}
    with tempfile.TemporaryDirectory() as data:
        write_tokens(data)
        words += [f"--dataset={data}", f"--device={args.device}"]
        print("bench.py ...", flush=True)
        output, code = call("bench.py", "config/train_gpt2_small_sophiag.py", *words, "--repeat=3",
                            "--only=optimizer,step,memory", f"--json={data}/bench.json")
        lines += ["", *output.strip().splitlines()]
        if code:
            problems.append(f"bench.py: {lines[-1]}")
        else:
            with open(f"{data}/bench.json", encoding="utf-8") as file:
                report["bench"] = json.load(file)["rows"]
        for optimizer in "sophiag", "adamw", "lion":
            try:
                training[optimizer] = train_with(optimizer, device, words)
            except (UserError, RuntimeError) as error:   # out of memory is a RuntimeError
                problems.append(f"{optimizer}: {(str(error) or repr(error)).splitlines()[0]}")
    lines += ["", f"{steps} steps    ms/step   tokens/s     MFU  peak GB  val loss"]
    for optimizer, run in training.items():
        mfu, peak = ("-" if run[key] is None else f"{run[key]:.3f}" for key in ("mfu", "peak_gb"))
        lines.append(f"{optimizer:9} {run['ms_per_step']:9,.0f} {run['tokens_per_sec']:10,.0f} "
                     f"{mfu:>7} {peak:>8}  {run['first_val_loss']:.4f} to "
                     f"{run['last_val_loss']:.4f}")
        if run["skipped"]:
            problems.append(f"{optimizer}: {run['skipped']:.0f} updates were skipped")
        if run["last_val_loss"] >= run["first_val_loss"]:
            problems.append(f"{optimizer}: the loss does not fall")
    starts = [run["first_val_loss"] for run in training.values()]
    if starts and max(starts) - min(starts) > 1e-3:
        problems.append(f"optimizers start from different losses: {starts}")
    if {"sophiag", "adamw"} <= training.keys():
        ratio = training["sophiag"]["ms_per_step"] / training["adamw"]["ms_per_step"]
        report["sophiag_overhead"] = ratio - 1
        lines.append(f"a step of SophiaG takes {ratio - 1:+.1%} compared with AdamW's")
    lines += ["", "failed: " + "; ".join(problems) if problems else "all is well"]
    report["problems"], text = problems, "\n".join(lines)
    write_atomically(args.report, lambda file: file.write(
        f"```\n{text}\n```\n\n```json\n{json.dumps(report)}\n```\n".encode()))
    print(f"{text}\nTo be pasted into an issue, with its JSON: {args.report}")
    if problems:
        sys.exit("check_gpu.py: error: " + "; ".join(problems))


if __name__ == "__main__":
    run_script(main)
