"""
Train a grid of runs, one for each combination of values, and collect their losses.

    python sweep.py config/quickstart_sophiag.py --learning_rate=3e-4,1e-3 --out_dir=out/sweep

Arguments are train.py's. A setting with commas is an axis of the grid ("--seed=1," has one value).
Each run has a folder in out_dir, named by its values. Writes results.csv, with a row for each run,
and results.png, final val loss against learning rate. Call the same command again, also with more
values, to continue: it skips finished runs, resumes stopped ones and retries failed ones.
"""
import csv
import io
import itertools
import os
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from urllib.parse import quote

import torch

from compare import Run, format_duration, read_config
from configurator import load_config
from plot import plot_sweep
from records import read_metrics
from script import ROOT, ArgumentParser, StopSignal, UserError, run_script, write_atomically


def make_grid(words):
    """The names of the axes, and a Run for each grid point; the last axis varies fastest."""
    axes, choices, runs = [], [], {}
    for word in words:
        name, _, text = word.removeprefix("--").partition("=")
        choices.append([word])
        if word.startswith("--") and "," in text:
            axes.append(name)
            choices[-1] = [f"--{name}={value}" for value in text.split(",") if value]
    for point in itertools.product(*choices):
        cfg = load_config(point)
        if "out_dir" in axes or cfg.init_from not in ("scratch", "auto") or cfg.eval_only:
            raise UserError("a sweep trains from scratch into one out_dir; init_from and eval_only "
                            "cannot be set, and out_dir takes one value")
        # Parsed values, axes sorted: the name survives reordered arguments and added values.
        name = ",".join(f"{axis}={quote(str(getattr(cfg, axis)), '')}" for axis in sorted(axes))
        if name in runs:
            raise UserError(f"{name} is in the grid twice: give each axis and each value once, and "
                            f"config files first")
        path = os.path.join(cfg.out_dir, name)
        own = dict(out_dir=path, init_from="auto", wandb_run_name=name)
        runs[name] = Run(path, {**asdict(cfg), **own}, [], name)
    if not axes or not runs:
        raise UserError("no grid: give a setting several values, e.g. --learning_rate=3e-4,1e-3")
    return axes, list(runs.values())


def check_folder(run):
    """Raise UserError if the run's folder holds a run with other settings."""
    if not os.path.exists(os.path.join(run.path, "config.json")):
        return
    found = read_config(run.path)
    for key, value in run.config.items():   # None: train.py has chosen it
        own = key in ("out_dir", "init_from", "wandb_run_name")
        if not own and value not in (None, found.get(key)):
            raise UserError(f"{run.path} holds a run with {key}={found.get(key)}, not {value}; "
                            f"choose another --out_dir")


def last_line(run):
    """The last line of the run's output.txt, "exit code ..." if the run failed."""
    path = Path(run.path, "output.txt")
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return ["", *text.splitlines()][-1]


def read_result(run, axes):
    """A row of results.csv, from the files that the run has written so far."""
    run.records = read_metrics(os.path.join(run.path, "metrics.jsonl"))
    evaluations = [r for r in run.records if "val/loss" in r]
    done = [r for r in evaluations if r["iter"] == run.config["max_iters"]]
    final, last = [{}, *done][-1], [{}, *run.records][-1]
    best = min(evaluations, key=lambda r: r["val/loss"], default={})
    failed = last_line(run).startswith("exit code")
    return {
        **{name: run.config[name] for name in (*axes, "optimizer", "max_iters")},
        "status": "done" if done else "failed" if failed else "stopped" if last else "missing",
        "final_val_loss": final.get("val/loss"), "stderr": final.get("val/loss_stderr"),
        "best_val_loss": best.get("val/loss"), "best_step": best.get("iter"),
        "steps": last.get("iter"), "tokens": last.get("tokens"), "seconds": last.get("seconds"),
        "win_rate": [None, *run.series("iter", "train/win_rate")[1]][-1], "run": run.path}


def write_results(rows, folder):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([rows[0], *(row.values() for row in rows)])
    write_atomically(os.path.join(folder, "results.csv"), text.getvalue().encode())


def slot_environment(slot, jobs):
    """Environment variables of one of `jobs` parallel processes: an equal share of the threads,
    and one GPU. Slots share GPUs if there are fewer GPUs than jobs."""
    all_gpus = ",".join(map(str, range(torch.cuda.device_count())))
    gpus = (os.environ.get("CUDA_VISIBLE_DEVICES") or all_gpus).split(",")
    return {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // jobs)),
            "CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]}


def start_run(config, environment):
    """Start train.py; its output is appended to output.txt in its out_dir. Returns the Popen."""
    # Every setting is a flag, so later edits of a config file do not affect the sweep.
    words = [f"--{name}={value}" for name, value in config.items()]
    try:
        os.makedirs(config["out_dir"], exist_ok=True)
        with open(os.path.join(config["out_dir"], "output.txt"), "ab") as output:
            return subprocess.Popen([sys.executable, os.path.join(ROOT, "train.py"), *words],
                                    env={**os.environ, **environment}, stdin=subprocess.DEVNULL,
                                    stdout=output, stderr=output)
    except OSError as error:
        raise UserError(f"cannot start {config['out_dir']}: {error.strerror}") from None


def run_all(configs, jobs, stop):
    """Train configs, {key: settings}, `jobs` at a time; yields (key, exit code) as runs end. After
    stop.requested or an exception, waits until the active runs have saved and exited."""
    waiting, running = list(configs), {}   # keys; {slot: (key, process)}
    jobs = min(jobs, len(configs))
    try:
        while (waiting or running) and not stop.requested:
            for slot in range(jobs):
                if waiting and slot not in running:
                    key = waiting.pop(0)
                    running[slot] = key, start_run(configs[key], slot_environment(slot, jobs))
            time.sleep(0.1)
            for slot, (key, process) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    yield key, process.returncode
    finally:
        for _, process in running.values():
            process.terminate()   # not SIGINT: after Ctrl-C, a second one would skip the save
        for _, process in running.values():
            process.wait()


def main(argv):
    parser = ArgumentParser(__doc__)
    parser.usage = "sweep.py [config.py ...] [--key=value[,value ...] ...] [--jobs=N] [--only=I]"
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="parallel runs, which "
                        "share the threads and GPUs (default: 1); 0: only write results.csv")
    parser.add_argument("--only", type=int, metavar="I", help="train only run I of the grid, from "
                        "0, and write no results; in array jobs: --only=$SLURM_ARRAY_TASK_ID")
    args, words = parser.parse_known_args(argv)
    axes, runs = make_grid(words)
    if args.jobs < 0 or args.only not in (None, *range(len(runs))):
        raise UserError(f"jobs must not be negative, only must be from 0 to {len(runs) - 1}")
    for run in runs:
        check_folder(run)
    rows, folder = [read_result(run, axes) for run in runs], os.path.dirname(runs[0].path)
    chosen = range(len(runs)) if args.only is None else [args.only]
    todo = [i for i in chosen if rows[i]["status"] != "done"] if args.jobs else []
    save = write_results if args.only is None else lambda *_: None   # array tasks would collide
    save(rows, folder)   # before training, so an unwritable folder is an early error
    print(f"{len(runs)} runs in {folder}, {len(todo)} to train", flush=True)
    stop, began = StopSignal(), time.monotonic()
    with closing(run_all({i: runs[i].config for i in todo}, args.jobs, stop)) as ends:
        for n, (i, code) in enumerate(ends, 1):
            if code:
                with open(os.path.join(runs[i].path, "output.txt"), "a", encoding="utf-8") as file:
                    file.write(f"exit code {code}: {last_line(runs[i])}\n")
            rows[i] = read_result(runs[i], axes)
            save(rows, folder)
            loss, seconds_per_run = rows[i]["final_val_loss"], (time.monotonic() - began) / n
            outcome = last_line(runs[i]) if loss is None else f"val loss {loss:.4f}"
            print(f"[{n}/{len(todo)}] {runs[i].name}: {outcome}; "
                  f"{format_duration(seconds_per_run * (len(todo) - n))} left", flush=True)
    rows = [read_result(run, axes) for run in runs]   # including runs that a signal stopped
    save(rows, folder)
    if args.only is None and len({run.config["learning_rate"] for run in runs}) > 1:
        plot_sweep(rows, axes, os.path.join(folder, "results.png"))
    if left := sum(rows[i]["status"] != "done" for i in todo):
        reason = f"stopped by {stop.name}, " * bool(stop.name)
        sys.exit(f"sweep.py: {reason}{left} of {len(chosen)} runs not done; call again to resume")


if __name__ == "__main__":
    run_script(main)
