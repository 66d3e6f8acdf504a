"""
Run the study: rules.py says which runs come next, study.csv holds their results.

    python results/study.py             # every run that study.csv lacks, two at a time
    python results/study.py 8k/final    # only runs whose names begin with 8k/final
    python results/study.py --commands  # print the commands of all runs planned so far

A row of study.csv holds the words of the command that made it.
"""
import csv
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time

import torch
from rules import make_plan

RESULTS = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(RESULTS)
RUNS, CURVES = (os.path.join(RESULTS, name) for name in ("study.csv", "study_curves.csv"))
JOBS = int(os.environ.get("JOBS", 2))   # runs at a time, one thread each


def read(path):
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def append(path, rows):
    new = not os.path.exists(path)
    with open(path, "a", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, rows[0], lineterminator="\n")
        if new:
            table.writeheader()
        table.writerows(rows)


def machine():
    """The GPU's or the processor's model, which determines the last digits of a loss."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        found = dict(line.split(":", 1) for line in file.read().split("\n\n")[0].splitlines())
    found = {name.strip(): value.strip() for name, value in found.items()}
    return f"{found['model name']} {found['cpu family']}/{found['model']}"


def start(name, words):
    """Start or resume a run. If its folder holds the run of an earlier plan, delete that first."""
    folder = os.path.join(ROOT, "out", "study", name)
    planned = os.path.join(folder, "words.txt")
    if os.path.exists(planned):
        with open(planned, encoding="utf-8") as file:
            if file.read() != " ".join(words):
                shutil.rmtree(folder)
    os.makedirs(folder, exist_ok=True)
    with open(planned, "w", encoding="utf-8") as file:
        file.write(" ".join(words))
    script = [] if words[0] == "results/shared_noise.py" else ["train.py"]
    with open(os.path.join(folder, "output.txt"), "ab") as output:
        return subprocess.Popen(
            [sys.executable, *script, *words, f"--out_dir={folder}", "--init_from=auto"],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=output, stderr=output)


def diverged(name):
    with open(os.path.join(ROOT, "out", "study", name, "output.txt"), encoding="utf-8") as file:
        return "gradient was not finite" in file.read()


def collect(name, words, code):
    """Append the rows of a finished run to study.csv and study_curves.csv."""
    folder = os.path.join(ROOT, "out", "study", name)
    at = {}   # {iter: record}; a step and its evaluation have separate records
    with open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8") as file:
        for record in map(json.loads, file):
            at.setdefault(record["iter"], {}).update(record)
    curve = [r for r in at.values() if "val/loss" in r]
    last = curve[-1]
    if code == 0 and f"--max_iters={last['iter']}" not in words:
        sys.exit(f"{name} was stopped at step {last['iter']}; run study.py again to resume")
    # The median speed leaves out pauses.
    rates = [r["tokens_per_sec"] for r in at.values() if "tokens_per_sec" in r] or [math.inf]
    if code == 0:
        append(CURVES, [{"name": name, "iter": r["iter"], "val_loss": r["val/loss"],
                         "win_rate": r.get("train/win_rate"), "rho": r.get("train/rho")}
                        for r in curve])
    append(RUNS, [{"name": name, "final_val_loss": last["val/loss"] if code == 0 else None,
                   "stderr": last["val/loss_stderr"], "win_rate": last.get("train/win_rate"),
                   "rho": last.get("train/rho"), "steps": last["iter"],
                   "seconds": round(last["tokens"] / statistics.median(rates), 1),
                   "machine": machine(), "words": " ".join(words)}])
    shutil.rmtree(folder)


def main(argv):
    only = next((word for word in argv if not word.startswith("--")), "")
    running = {}   # name: (process, words)
    while True:
        rows = {row["name"]: row for row in read(RUNS)}
        plan = make_plan(rows).plan
        for name, words in plan.items():
            if name in rows and rows[name]["words"] != " ".join(words):
                sys.exit(f"{name}: the plan now has other words for this run; to run it again, "
                         "delete its rows in study.csv and study_curves.csv")
        plan = {name: words for name, words in plan.items() if name.startswith(only)}
        if "--commands" in argv:
            for name, words in plan.items():
                script = "" if words[0] == "results/shared_noise.py" else "train.py "
                print(f"{name}: OMP_NUM_THREADS=1 python {script}{' '.join(words)}")
            return
        waiting = [name for name in plan if name not in rows and name not in running]
        while waiting and len(running) < JOBS:
            name = waiting.pop(0)
            running[name] = start(name, plan[name]), plan[name]
        if not running:
            print(f"{len(plan)} runs are done")
            return
        while all(process.poll() is None for process, _ in running.values()):
            time.sleep(0.2)
        for name, (process, words) in list(running.items()):
            if process.poll() is not None:
                del running[name]
                if process.returncode and not diverged(name):
                    sys.exit(f"{name} ended with {process.returncode}; see out/study/{name}")
                collect(name, words, process.returncode)
                row = read(RUNS)[-1]
                print(f"{name}: {row['final_val_loss']} in {row['seconds']} s, "
                      f"{len(waiting)} known to wait", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
