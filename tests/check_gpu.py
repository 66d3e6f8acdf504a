"""
Check that this machine's GPU runs the repository, and measure its speed, in under 7 minutes on an
H100: tests/test_cuda.py, bench.py, 50 training steps of each optimizer on random tokens, of AdamW
and SophiaG with the largest batch_size that fits and of AdamW without cuDNN's attention, and where
the time of AdamW's step goes.

    python tests/check_gpu.py [config.py ...] [--key=value ...]

Settings are those of train.py, on top of GPT-2 small's with batch_size=12.
Writes a report to paste into an issue. Exit code: 1 if a check failed, 2 without a GPU.
"""
import gc
import json
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))   # the repository root

import bench
import ddp
import train
from configurator import load_config
from device import pick_device
from records import read_metrics
from script import ROOT, ArgumentParser, UserError, run_script, write_atomically

TIMEOUT = 300   # seconds, for the tests and for the benchmark
AUTO, NO_CUDNN = ", largest batch_size", ", attention without cuDNN"
RUNS = "adamw", "adamw" + AUTO, "adamw" + NO_CUDNN, "sophiag", "sophiag" + AUTO, "lion", "muon"


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
        f"{ROOT}/config/train_gpt2_small_{optimizer}.py", "--batch_size=12",
        "--total_batch_size=120", "--hessian_batch_size=60", "--hessian_interval=10",
        "--max_iters=50", "--warmup_iters=10", "--lr_decay_iters=50",
        "--log_interval=10", "--eval_iters=1", "--wandb_log=False", *words])


def free_memory():
    """Free the model of the previous run, and forget its compiled code."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def train_with(name, words):
    """Train in this process, as one of RUNS. Returns {name: number}; None where it is unknown."""
    free_memory()
    torch.backends.cuda.enable_cudnn_sdp(not name.endswith(NO_CUDNN))
    # Compiled code that is cached on disk keeps the choice of an attention backend.
    torch.compiler.config.force_disable_caches = name.endswith(NO_CUDNN)
    with tempfile.TemporaryDirectory() as out_dir:
        cfg = settings(name.split(",")[0], [*words, f"--out_dir={out_dir}"]
                       + ["--batch_size=None"] * name.endswith(AUTO))
        try:
            train.train(cfg, ddp.World(0, 1, pick_device(cfg.device)))
        finally:
            torch.backends.cuda.enable_cudnn_sdp(True)
            torch.compiler.config.force_disable_caches = False
        records = read_metrics(f"{out_dir}/metrics.jsonl")
        used = json.loads(Path(out_dir, "config.json").read_text())["batch_size"]
    steps = [r for r in records if "lr" in r][1:]   # the first interval includes compilation
    losses = [r["val/loss"] for r in records if "val/loss" in r]
    rate = median(r["tokens_per_sec"] for r in steps)
    return {"batch_size": used,
            "ms_per_step": cfg.tokens_per_step / rate * 1e3, "tokens_per_sec": rate,
            "mfu": median(r["mfu"] for r in steps) if "mfu" in steps[0] else None,
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if cfg.device == "cuda" else None,
            "first_val_loss": losses[0], "last_val_loss": losses[-1],
            "skipped": steps[-1]["train/skipped"]}


def clocks():
    """The GPU's clock, power and reason for a lower clock now, as nvidia-smi shows them."""
    query = "clocks.sm,power.draw,temperature.gpu,clocks_event_reasons.active"
    try:
        return subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
                              capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def kernels(device, function):
    """{number of kernels, ms during which one runs, ms from first to last, allocations} of a call.
    Their difference are gaps, in which the GPU waits for the host. On a CPU: of operations."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
    spans = sorted((e.time_range.start, e.time_range.end) for e in profiler.events()
                   if e.device_type.name.lower() == device.type and e.name != "[memory]")
    busy, end = 0.0, spans[0][0]
    for start, stop in spans:
        busy += max(stop - max(start, end), 0)
        end = max(end, stop)
    memory = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return {"kernels": len(spans), "busy_ms": busy / 1e3, "span_ms": (end - spans[0][0]) / 1e3,
            "allocations": sum(e.nbytes() > 0 for e in memory)}


def step_times(device, step, seconds):
    """Milliseconds of each of the steps that run back to back for `seconds`, and clocks() near the
    end. A step's time ends when the GPU has finished it; the host does not wait for it."""
    def stamp():
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    stamps, started = [stamp()], time.perf_counter()
    while time.perf_counter() - started < seconds or len(stamps) < 10:
        step()
        stamps.append(stamp())
    under_load = clocks()
    if device.type == "cuda":
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in pairwise(stamps)], under_load
    return [(b - a) * 1e3 for a, b in pairwise(stamps)], under_load


def explain_step(words, seconds):
    """Where the time of AdamW's step goes: its parts timed one by one, as bench.py does, whole
    steps after a pause, and whole steps after `seconds` of work. Returns {name: value}."""
    free_memory()
    cfg = settings("adamw", words)
    setup = bench.Setup(cfg, 50257, repeat=5)
    micro_batches = cfg.total_batch_size // cfg.batch_size
    _, one = bench.training_parts(setup)
    one = setup.median_seconds({name: one[name] for name in (bench.OURS, "clip", "adamw")})
    free_memory()
    _, parts = bench.training_parts(setup, micro_batches)
    parts = {name: parts[name] for name in (bench.OURS, "clip", "adamw")}

    def step():
        for part in parts.values():
            part()

    for _ in range(3):   # compile, create state
        step()
    alone = setup.median_seconds(parts)
    time.sleep(seconds / 3)   # the GPU cools down
    idle = clocks()
    times, under_load = step_times(setup.device, step, seconds)
    found = {"ms, sum of parts for one micro-batch": 1e3 * (
                 micro_batches * one[bench.OURS] + one["clip"] + one["adamw"]),
             "ms, sum of parts for all micro-batches": 1e3 * sum(alone.values()),
             "ms, first 5 steps after a pause": median(times[:5]),
             "ms, second half of the steps": median(times[len(times) // 2:]),
             "clocks after the pause": idle, "clocks under load": under_load}
    for name, part in {**parts, "whole step": step}.items():
        found |= {f"{name}, {key}": value for key, value in kernels(setup.device, part).items()}
    return found


def check_training(report, lines, problems):
    runs = report["training"]
    for name, run in runs.items():
        lines.append(f"{name}: " + ", ".join(
            f"{key} {value:,.5g}" for key, value in run.items() if value is not None))
        if run["skipped"] or run["last_val_loss"] >= run["first_val_loss"]:
            problems.append(f"{name}: updates were skipped, or the loss did not fall")
    first_losses = [run["first_val_loss"] for run in runs.values()]
    if runs and max(first_losses) - min(first_losses) > 1e-3:
        problems.append(f"the runs started from different losses: {first_losses}")
    for kind in "", AUTO:
        if {f"sophiag{kind}", f"adamw{kind}"} <= runs.keys():
            ratio = runs[f"sophiag{kind}"]["ms_per_step"] / runs[f"adamw{kind}"]["ms_per_step"]
            report[f"sophiag_overhead{kind}"] = ratio - 1
            lines.append(f"a step of SophiaG{kind} takes {ratio - 1:+.1%} compared with AdamW's")


def main(argv):
    parser = ArgumentParser(__doc__)
    parser.add_argument("--device", default="cuda", help="cuda | cpu, to try this script")
    parser.add_argument("--tests", default="", metavar="EXPR", help="select tests: pytest's -k")
    parser.add_argument("--report", default="out/check_gpu.md", metavar="FILE")
    args, words = parser.parse_known_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"PyTorch {torch.__version__} finds no CUDA GPU on this machine")
    settings("sophiag", words)   # reports a wrong setting before the tests run
    started = time.perf_counter()
    report = {"gpu": torch.cuda.get_device_name() if args.device == "cuda" else None,
              "gpus": torch.cuda.device_count(), "torch": torch.__version__,
              "cuda": torch.version.cuda, "commit": git_commit()}
    lines, problems = [", ".join(f"{key} {value}" for key, value in report.items())], []
    print(lines[0])
    run_python(lines, problems, "-m", "pytest", "-q", "-rfEs", "--tb=short", "tests/test_cuda.py",
               f"-k={args.tests}", f"--device={args.device}")
    report["tests"], report["training"], report["step"] = lines[-1], {}, {}
    report["seconds"] = {"tests": time.perf_counter() - started}
    with tempfile.TemporaryDirectory() as data:
        write_random_tokens(data)
        words += [f"--dataset={data}", f"--device={args.device}"]
        results = Path(data, "bench.json")
        run_python(lines, problems, "bench.py", "config/train_gpt2_small_sophiag.py",
                   "--repeat=3", "--only=optimizer,step,attention,memory",
                   "--batch_size=12", *words, f"--json={results}")
        if results.exists():
            report["bench"] = json.loads(results.read_text())["rows"]
        report["seconds"]["tests, bench"] = time.perf_counter() - started
        lines.append("")
        for name in (*RUNS, "step"):
            try:
                if name == "step":
                    report["step"] = explain_step(words, 10 if args.device == "cuda" else 0.1)
                else:
                    report["training"][name] = train_with(name, words)
            except (UserError, RuntimeError) as error:   # out of memory is a RuntimeError
                problems.append(f"{name}: {(str(error) or repr(error)).splitlines()[0]}")
    check_training(report, lines, problems)
    lines += ["", "AdamW's step:"] + [
        f"{name}: {value if isinstance(value, str) else f'{value:,.5g}'}"
        for name, value in report["step"].items()]
    report["seconds"]["all"] = time.perf_counter() - started
    lines.append(f"this took {report['seconds']['all']:.0f} s")
    lines += ["", "failed: " + "; ".join(problems) if problems else "all checks passed"]
    report["problems"], text = problems, "\n".join(lines)
    write_atomically(args.report,
                     f"```\n{text}\n```\n\n```json\n{json.dumps(report)}\n```\n".encode())
    print(f"{text}\nPaste this report, with its JSON, into an issue: {args.report}")
    if problems:
        sys.exit("check_gpu.py: error: " + "; ".join(problems))


if __name__ == "__main__":
    run_script(main)
