"""
Add the runs of a sweep to results/runs.csv, and their curves to results/curves.csv.

    python results/collect.py small/lr-adamw     # from out/study/small/lr-adamw
"""
import csv
import json
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RESULTS = os.path.join(ROOT, "results")
# Of runs.csv: settings, and what sweep.py writes of a run.
KNOBS = ("optimizer", "n_embd", "max_iters", "learning_rate", "seed", "rho", "target_win_rate",
         "hessian_estimator", "hessian_interval", "weight_decay", "grad_clip")
OUTCOME = ("status", "final_val_loss", "stderr", "tokens", "seconds", "win_rate")
CURVES = ("iter", "seconds", "val/loss", "train/win_rate", "train/rho")


def append(path, rows):
    new = not os.path.exists(path)
    with open(path, "a", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, rows[0], lineterminator="\n")
        if new:
            table.writeheader()
        table.writerows(rows)


def main(sweep):
    runs, curves = [], []
    with open(os.path.join(ROOT, "out", "study", sweep, "results.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        folder = os.path.join(ROOT, row["run"])
        with open(os.path.join(folder, "config.json")) as file:
            config = json.load(file)
        runs.append({"sweep": sweep, "run": len(runs), **{k: config[k] for k in KNOBS},
                     **{k: row[k] for k in OUTCOME}})
        with open(os.path.join(folder, "metrics.jsonl")) as file:
            records = map(json.loads, file)
            at_evaluation = {}   # an evaluation is a record of its own, after the step's
            for record in records:
                at_evaluation.setdefault(record["iter"], {}).update(record)
        curves += [{"sweep": sweep, "run": runs[-1]["run"], **{k: r.get(k) for k in CURVES}}
                   for r in at_evaluation.values() if "val/loss" in r]
    append(os.path.join(RESULTS, "curves.csv"), curves)
    append(os.path.join(RESULTS, "runs.csv"), runs)   # last: run.sh passes over what is in it


if __name__ == "__main__":
    main(sys.argv[1])
