"""
The study's runs: which there are, which settings each optimizer gets, and the runner.

    python results/study.py             # every run that study.csv lacks, two at a time
    python results/study.py 8k/final    # only runs whose names begin so
    python results/study.py --commands  # print the runs that are known so far, run nothing

A run's name is its setting, piece, optimizer and values. What is run next depends only on the
results so far: the tuning rule of README.md is the code of `tuning`, `learning_rates` and `best`.
A row of study.csv holds the words of train.py that made it.
"""
import csv
import json
import os
import shutil
import subprocess
import sys
import time

import torch
from collect import append

RESULTS = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(RESULTS)
RUNS, CURVES = (os.path.join(RESULTS, name) for name in ("study.csv", "study_curves.csv"))
JOBS = int(os.environ.get("JOBS", 2))   # runs at a time, one thread each

ARMS = {"adamw": ["--optimizer=adamw"],
        "lion": ["--optimizer=lion"],
        "sophiag": ["--optimizer=sophiag"],
        "steered": ["--optimizer=sophiag"],   # target_win_rate in place of rho
        "sign": ["--optimizer=sophiag", "--hessian_interval=1000000"]}   # h stays 0
# Where the random trials of a setting lie: from, to, and the factor of a local trial. Memories are
# in steps: 1 / (1 - beta1), 1 / (1 - beta2), and hessian_interval / (1 - beta2) for SophiaG.
MOMENTUM, WARMUP = (3, 40, 1.5), (0.025, 0.5, 2)
SPACE = {
    "adamw": {"learning_rate": (2e-3, 3.2e-2, 1.5), "momentum": MOMENTUM, "warmup": WARMUP,
              "second": (5, 200, 2)},
    "lion": {"learning_rate": (4e-4, 6.4e-3, 1.5), "momentum": MOMENTUM, "warmup": WARMUP,
             "second": (5, 200, 2)},
    "sophiag": {"learning_rate": (8e-4, 1.28e-2, 1.5), "momentum": MOMENTUM,
                "rho": (0.02, 2, 2), "warmup": WARMUP, "second": (20, 400, 2)},
    "steered": {"learning_rate": (8e-4, 1.28e-2, 1.5), "momentum": MOMENTUM,
                "target_win_rate": (0.1, 0.8, 1.5), "warmup": WARMUP, "second": (20, 400, 2)},
    "sign": {"learning_rate": (4e-4, 6.4e-3, 1.5), "momentum": MOMENTUM, "warmup": WARMUP}}
RANDOM_TRIALS, TRIALS = 12, 20
TUNING_SEED, FINAL_SEEDS = 1, (2, 3, 4)
HESSIAN_INTERVAL = 10

# Words of train.py that make another setting of base.py, and its steps.
SETTINGS = {
    "8k": ([], 400),
    "1k": (["--batch_size=4", "--total_batch_size=8", "--eval_iters=64"], 400),
    "32k": (["--total_batch_size=256", "--eval_iters=2"], 400),
}


def round2(value):
    return float(f"{value:.2g}")


def words(setting, arm, point, seed):
    """Of train.py, for an arm at a point, a dict like SPACE's, with warmup as a share of steps."""
    flags, steps = SETTINGS[setting]
    interval = 1 if arm in ("adamw", "lion") else HESSIAN_INTERVAL
    point = dict(point)
    settings = {"learning_rate": point.pop("learning_rate"),
                "beta1": max(round(1 - 1 / point.pop("momentum"), 4), 0.0),
                "warmup_iters": round(point.pop("warmup") * steps)}
    if "second" in point:
        settings["beta2"] = max(round(1 - interval / point.pop("second"), 4), 0.0)
    settings |= point
    return ["results/base.py", *flags, f"--max_iters={steps}",
            f"--eval_interval={steps // 4}", *ARMS[arm],
            *(f"--{name}={value:g}" for name, value in settings.items()), f"--seed={seed}"]


def clean(point):
    return {name: round2(value) for name, value in point.items()}


class Study:
    """The runs' plan as a function of the rows of study.csv, by name."""

    def __init__(self, rows):
        self.rows = rows
        self.plan = {}   # name: words, of all runs whose settings are known by now

    def loss(self, name):
        """The final loss of a run, infinite if it failed; None if it was not run yet."""
        row = self.rows.get(name)
        return None if row is None else float(row["final_val_loss"] or "inf")

    def add(self, name, words):
        """Plan a run; returns its loss, or None as long as there is none."""
        self.plan[name] = words
        return self.loss(name)

    def tuning(self, arm):
        """
        The arm's best point of TRIALS trials at the base setting, or None while one is missing.
        First RANDOM_TRIALS points of a Sobol sequence over SPACE in logarithms, then a local
        search: for each setting in turn one step up from the best point and, if that is no better,
        one step down.
        """
        space = SPACE[arm]
        sobol = torch.quasirandom.SobolEngine(len(space), scramble=True, seed=0)
        trials = []   # (loss, point)

        def trial(point):
            loss = self.add(f"8k/tune/{arm}/{len(trials):02}",
                            words("8k", arm, point, TUNING_SEED))
            trials.append((loss, point))
            return loss

        for shares in sobol.draw(RANDOM_TRIALS).tolist():
            trial(clean({name: low * (high / low) ** share
                         for share, (name, (low, high, _)) in zip(shares, space.items())}))
        if any(loss is None for loss, _ in trials):
            return None
        best_loss, best = min(trials, key=lambda t: t[0])
        while True:
            for name, (_, _, factor) in space.items():
                for step in factor, 1 / factor:
                    if len(trials) == TRIALS:
                        return best
                    point = clean({**best, name: best[name] * step})
                    point["warmup"] = min(point["warmup"], 0.9)
                    point["momentum"] = max(point["momentum"], 1.1)
                    if "target_win_rate" in point:
                        point["target_win_rate"] = min(point["target_win_rate"], 0.95)
                    loss = trial(point)
                    if loss is None:
                        return None
                    if loss < best_loss:
                        best_loss, best = loss, point
                        break

    def learning_rates(self, setting, arm, point):
        """
        point with the best of five learning rates, a factor of 2 apart about its own, and of up to
        eight while the best is at an edge; None while one is missing.
        """
        exponents = [-2, -1, 0, 1, 2]
        while True:
            losses = {}
            for e in exponents:
                lr = round2(point["learning_rate"] * 2.0**e)
                loss = self.add(f"{setting}/lr/{arm}/{lr:g}", words(
                    setting, arm, {**point, "learning_rate": lr}, TUNING_SEED))
                losses[e] = lr, loss
            if any(loss is None for _, loss in losses.values()):
                return None
            best = min(losses, key=lambda e: losses[e][1])
            if best not in (min(exponents), max(exponents)) or len(exponents) == 8:
                return {**point, "learning_rate": losses[best][0]}
            exponents.append(best + (1 if best > 0 else -1))

    def finals(self, setting, arm, point):
        for seed in FINAL_SEEDS:
            self.add(f"{setting}/final/{arm}/{seed}", words(setting, arm, point, seed))


def make_plan(rows):
    study = Study(rows)
    tuned = {arm: study.tuning(arm) for arm in ARMS}
    if None in tuned.values():   # no final before every arm is tuned
        return study
    for setting in SETTINGS:
        for arm, point in tuned.items():
            if setting != "8k":
                point = study.learning_rates(setting, arm, point)
            if point:
                study.finals(setting, arm, point)
    return study


def read(path):
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def machine():
    """The processor, whose kind decides the last digits."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        found = dict(line.split(":", 1) for line in file.read().split("\n\n")[0].splitlines())
    found = {name.strip(): value.strip() for name, value in found.items()}
    return f"{found['model name']} {found['cpu family']}/{found['model']}"


def start(name, words):
    folder = os.path.join(ROOT, "out", "study", name)
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "output.txt"), "ab") as output:
        return subprocess.Popen(
            [sys.executable, "train.py", *words, f"--out_dir={folder}", "--init_from=auto"],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=output, stderr=output)


def diverged(name):
    with open(os.path.join(ROOT, "out", "study", name, "output.txt"), encoding="utf-8") as file:
        return "gradient was not finite" in file.read()


def collect(name, words, code):
    """Rows of study.csv and study_curves.csv from a run that has ended."""
    folder = os.path.join(ROOT, "out", "study", name)
    at = {}   # an evaluation is a record of its own, after the step's
    with open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8") as file:
        for record in map(json.loads, file):
            at.setdefault(record["iter"], {}).update(record)
    curve = [r for r in at.values() if "val/loss" in r]
    last = curve[-1]
    if code == 0:
        append(CURVES, [{"name": name, "iter": r["iter"], "val_loss": r["val/loss"],
                         "win_rate": r.get("train/win_rate"), "rho": r.get("train/rho")}
                        for r in curve])
    append(RUNS, [{"name": name, "final_val_loss": last["val/loss"] if code == 0 else None,
                   "stderr": last["val/loss_stderr"], "win_rate": last.get("train/win_rate"),
                   "rho": last.get("train/rho"), "steps": last["iter"],
                   "seconds": round(max(r.get("seconds", 0) for r in at.values()), 1),
                   "machine": machine(), "words": " ".join(words)}])
    shutil.rmtree(folder)


def main(argv):
    only = next((word for word in argv if not word.startswith("--")), "")
    running = {}   # name: (process, words)
    while True:
        rows = {row["name"]: row for row in read(RUNS)}
        plan = {name: words for name, words in make_plan(rows).plan.items()
                if name.startswith(only)}
        if "--commands" in argv:
            print("\n".join(f"{name}: OMP_NUM_THREADS=1 python train.py {' '.join(words)}"
                            for name, words in plan.items()))
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
