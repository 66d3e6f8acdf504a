"""
A grid of runs: train.py for each combination of values; their losses in one table and picture.

    python sweep.py config/quickstart_sophiag.py --learning_rate=3e-4,1e-3 --out_dir=out/sweep

Words are train.py's; a setting with commas is an axis of the grid (also "--seed=1,": of one value,
to be extended). Each run has a folder in out_dir, named by its values. The same command again, also
with more values, skips what is finished, resumes what was stopped, tries again what failed. It
writes results.csv, a row for each run, and results.png, final val loss against learning rate.
"""
import csv
import io
import itertools
import json
import os
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import asdict
from urllib.parse import quote

import torch

from compare import Run, duration
from configurator import load_config
from metrics import read_metrics
from plot import plot_grid
from script import ROOT, ArgumentParser, StopSignal, UserError, run_script, write_atomically


def make_grid(words):
    """Names of the axes, and a Run for each point, the last axis fastest. A folder's name is of
    parsed values, in alphabetical order, and stays when words change places or values join."""
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
            raise UserError("a sweep trains from scratch into one folder: no init_from, no "
                            "eval_only, one value of out_dir")
        name = ",".join(f"{axis}={quote(str(getattr(cfg, axis)), '')}" for axis in sorted(axes))
        if name in runs:
            raise UserError(f"{name} is in the grid twice: give each axis and each value once, and "
                            f"config files before them")
        path = os.path.join(cfg.out_dir, name)
        own = dict(out_dir=path, init_from="auto", wandb_run_name=name)
        runs[name] = Run(path, {**asdict(cfg), **own}, [], name)
    if not axes or not runs:
        raise UserError("no grid: give a setting several values, e.g. --learning_rate=3e-4,1e-3")
    return axes, list(runs.values())


def check_folder(run):
    """Raise UserError if the run's folder holds one with other settings."""
    path = os.path.join(run.path, "config.json")
    if not os.path.exists(path):
        return
    try:
        with open(path, encoding="utf-8") as file:
            found = dict(json.load(file))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read {path} ({type(error).__name__})") from None
    for key, value in run.config.items():
        if key not in ("out_dir", "init_from", "wandb_run_name") and found.get(key) != value:
            raise UserError(f"{run.path} holds a run with {key}={found.get(key)}, not {value}; "
                            f"choose another --out_dir")


def last_line(run):
    """Of the run's output: "exit code ..." if it failed."""
    path = os.path.join(run.path, "output.txt")
    if not os.path.exists(path):
        return ""
    with open(path, encoding="utf-8", errors="replace") as file:
        return ["", *file.read().splitlines()][-1]


def result(run, axes):
    """A row of results.csv, from what the run has left on the disk so far."""
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


def slot_environment(slot, jobs):
    """Environment of the slot-th of jobs processes at a time: its part of the threads that one
    alone would use, and a GPU of its own while there are enough."""
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if gpus == [""]:
        gpus = [str(i) for i in range(torch.cuda.device_count())] or gpus
    return {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // jobs)),
            "CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]}


def start_run(config, environment):
    """A process of train.py; what it prints is added to output.txt in its out_dir."""
    # Every setting is a flag: a config file that is edited meanwhile changes no run.
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
    """
    Train with each of configs, a dict of dicts of all settings, jobs at a time; yields (key, exit
    code) as they end. On a signal, which stop has then seen, and on an error, those that run are
    asked to save and leave, and waited for.
    """
    waiting, running = list(configs), {}   # keys; key and process by slot
    jobs = min(jobs, len(configs))         # fewer have a larger share each
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
            process.terminate()   # SIGTERM: after Ctrl-C, a second SIGINT would interrupt at once
        for _, process in running.values():
            process.wait()


def main(argv):
    parser = ArgumentParser(__doc__)
    parser.usage = "sweep.py [config.py ...] [--key=value[,value ...] ...] [--jobs=N] [--only=I]"
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time, which "
                        "share threads and GPUs (default: 1); 0: write the table, train nothing")
    parser.add_argument("--only", type=int, metavar="I", help="train the I-th run of the grid, "
                        "from 0, and write no table: for array jobs, --only=$SLURM_ARRAY_TASK_ID")
    args, words = parser.parse_known_args(argv)
    axes, runs = make_grid(words)
    if args.jobs < 0 or args.only not in (None, *range(len(runs))):
        raise UserError(f"jobs must not be negative, only must be from 0 to {len(runs) - 1}")
    for run in runs:
        check_folder(run)
    rows, folder = [result(run, axes) for run in runs], os.path.dirname(runs[0].path)
    chosen = range(len(runs)) if args.only is None else [args.only]
    todo = [i for i in chosen if rows[i]["status"] != "done"] if args.jobs else []

    def save():
        if args.only is None:   # tasks of an array would write over each other's table
            text = io.StringIO()
            table = csv.DictWriter(text, rows[0], lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
            write_atomically(os.path.join(folder, "results.csv"),
                             lambda file: file.write(text.getvalue().encode()))

    save()   # before anything starts: the folder can be written
    print(f"{len(runs)} runs in {folder}, {len(todo)} to train", flush=True)
    stop, began = StopSignal(), time.monotonic()
    with closing(run_all({i: runs[i].config for i in todo}, args.jobs, stop)) as ends:
        for n, (i, code) in enumerate(ends, 1):
            if code:
                with open(os.path.join(runs[i].path, "output.txt"), "a", encoding="utf-8") as file:
                    file.write(f"exit code {code}: {last_line(runs[i])}\n")
            rows[i] = result(runs[i], axes)
            save()
            loss, pace = rows[i]["final_val_loss"], (time.monotonic() - began) / n
            print(f"[{n}/{len(todo)}] {runs[i].name}: "
                  f"{last_line(runs[i]) if loss is None else f'val loss {loss:.4f}'}; "
                  f"{duration(pace * (len(todo) - n))} left", flush=True)
    rows[:] = [result(run, axes) for run in runs]   # also those that a signal stopped
    save()
    if args.only is None and len({run.config["learning_rate"] for run in runs}) > 1:
        plot_grid(rows, axes, os.path.join(folder, "results.png"))
    if undone := sum(rows[i]["status"] != "done" for i in todo):
        reason = f"stopped by {stop.name}, " * bool(stop.name)
        sys.exit(f"sweep.py: {reason}not done: {undone} of {len(chosen)}; the same command goes on")


if __name__ == "__main__":
    run_script(main)
