"""
Runs side by side: losses, speed, settings that differ, and whether the comparison is fair.

    python compare.py out/quickstart-sophiag out/quickstart-adamw --plot=compare.png
    python compare.py export.csv     # a panel exported from wandb, charted against iter

The baseline is the first AdamW run, else the first run. Time is that of training steps alone, and
compares optimizers only where the machines are alike.
"""
import csv
import json
import math
import os
from dataclasses import dataclass

import numpy as np

from configurator import FIELDS
from metrics import read_metrics
from script import ArgumentParser, UserError, run_script

# Settings that must be equal for a speed-up to be the optimizer's; with another of the first four
# even the validation losses are not of the same windows.
SHARED = ("dataset", "block_size", "total_batch_size", "eval_iters", "max_iters", "lr_decay_iters",
          "decay_lr", "warmup_iters", "seed", "init_from", "n_layer", "n_head", "n_embd", "dropout",
          "bias", "scale_attn_by_inverse_layer_idx")

NOTE = """\
Differences of val loss; below 0: better than the baseline. Both saw the same windows, so that the
standard error of a difference is below the root of the sum of both squares. Equal steps are equal
tokens. Between evaluations, linear interpolation; before the end of a run its learning rate is
still high, and the loss with it, so that speed-ups (x) come out too small."""


@dataclass
class Run:
    path: str
    config: dict      # empty if not known
    records: list
    name: str = ""    # the shortest end of path that no other run has

    def series(self, x, y):
        """Two arrays, x and y of the records that have both."""
        pairs = [(r[x], r[y]) for r in self.records if x in r and y in r]
        return np.array(pairs, dtype=float).reshape(-1, 2).T

    def first_below(self, loss, x):
        """x at which val loss first is `loss`, interpolated between evaluations; None if never."""
        xs, losses = self.series(x, "val/loss")
        for i in np.flatnonzero(losses <= loss)[:1]:
            return np.interp(-loss, -losses[max(0, i - 1):i + 1], xs[max(0, i - 1):i + 1])

    def ms_per_step(self):
        """Median over stretches of 100 steps: each holds several Hessian estimates, so that their
        cost is in it however often the run logs. None if not known."""
        steps, seconds = self.series("iter", "seconds")
        if not steps.size or steps[0] == steps[-1]:
            return None
        ends = np.unique(np.searchsorted(steps, [*range(0, int(steps[-1]), 100), steps[-1]]))
        return 1000 * np.median(np.diff(seconds[ends]) / np.diff(steps[ends]))


def read_run(folder):
    path, config_path = (os.path.join(folder, n) for n in ("metrics.jsonl", "config.json"))
    records = read_metrics(path)
    if not any("val/loss" in r for r in records):
        raise UserError(f"{path} has no evaluation: not a run directory, or one just begun")
    try:
        with open(config_path, encoding="utf-8") as file:
            config = json.load(file)
        config["optimizer"]   # else not our settings
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {config_path} ({type(error).__name__})") from None
    if config.get("init_from") in ("resume", "auto"):
        config["init_from"] = "scratch"
    return Run(folder, config, records)


def read_export(path):
    """Runs in a CSV file of wandb: columns "iter" or "Step", "NAME - val/loss", and others."""
    runs = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file):
                step = int(float(row.get("iter") or row["Step"]))
                for column, cell in row.items():
                    name, dash, key = column.rpartition(" - ")
                    if dash and cell and math.isfinite(float(cell)):
                        runs.setdefault(name, []).append({"iter": step, key: float(cell)})
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"cannot read {path} as a panel exported from wandb with iter or Step as "
                        f"x axis ({type(error).__name__}: {error})") from None
    runs = {name: r for name, r in runs.items() if any("val/loss" in record for record in r)}
    if not runs:
        raise UserError(f'{path} has no column "NAME - val/loss" with values')
    return [Run(os.path.join(path, name), {}, records) for name, records in runs.items()]


def name_runs(runs):
    parts = [os.path.abspath(run.path).split(os.sep) for run in runs]
    for run, own in zip(runs, parts):
        run.name = next((os.sep.join(own[-n:]) for n in range(1, len(own))
                         if sum(own[-n:] == other[-n:] for other in parts) == 1), run.path)


def count(n):
    size, unit = (1e9, "B") if n >= 1e9 else (1e6, "M")
    return f"{n / size:.4g}{unit}" if n >= size else f"{n:,.0f}"


def duration(seconds):
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def table(rows):
    """Text of rows, dicts with the same keys in the order of the columns; "" without rows."""
    widths = {key: max(len(row[key]) for row in [{key: key}, *rows]) for key in dict(*rows[:1])}
    return "\n".join("  ".join(row[key].ljust(width) for key, width in widths.items()).rstrip()
                     for row in [dict(zip(widths, widths)), *rows])


def summary(run, base):
    """What a run came to: dict of table cells."""
    steps, losses = run.series("iter", "val/loss")
    last = [r for r in run.records if "val/loss" in r][-1]
    best, stderr = losses.argmin(), last.get("val/loss_stderr")
    logged, win_rates = run.series("iter", "train/win_rate")
    win_rates = win_rates[logged > 0.1 * steps[-1]]   # without the warmup
    ms, base_ms = run.ms_per_step(), base.ms_per_step()
    return {
        "run": run.name, "optimizer": run.config.get("optimizer", "-"), "steps": count(steps[-1]),
        "tokens": count(last["tokens"]) if "tokens" in last else "-",
        "time": duration(last["seconds"]) if "seconds" in last else "-",
        "final val loss": f"{losses[-1]:.4f}" + (f" +- {stderr:.4f}" if stderr else ""),
        "best val loss": f"{losses[best]:.4f} at {count(steps[best])}",
        "win_rate": f"{min(win_rates):.2f}-{max(win_rates):.2f}" if win_rates.size else "-",
        "ms/step": f"{ms:.1f}" if ms else "-",
        "overhead": f"{ms / base_ms - 1:+.1%}" if ms and base_ms and run is not base else "-"}


def differences(runs):
    """A row of table cells for each setting that is not the same in all runs."""
    configs = [run.config for run in runs if run.config]
    keys = [k for k in FIELDS if k != "out_dir" and not k.startswith("wandb")
            and any(c.get(k) != configs[0].get(k) for c in configs)]
    return [{"differs": key, **{
        run.name: f"{v:g}" if isinstance(v := run.config.get(key, "-"), float) else str(v)
        for run in runs}} for key in keys]


def against(run, base):
    """A run measured by the baseline: dict of table cells, and warnings, each a reason why a
    speed-up would not be the optimizer's."""
    unequal = [k for k in SHARED if run.config and base.config and
               run.config.get(k) != base.config.get(k)]
    warnings = [f"{run.name}: {key}={run.config.get(key)}, {base.name}: {base.config.get(key)}"
                for key in unequal]
    for r in base, run:
        done = r.series("iter", "val/loss")[0][-1]
        end = max(r.config.get("max_iters", 0),
                  r.config.get("lr_decay_iters", 0) if r.config.get("decay_lr") else 0)
        if not r.config:
            warnings.append(f"{r.name}: an export, without the settings that show what is fair")
        elif done < end:
            warnings.append(f"{r.name}: evaluated up to step {count(done)} of {count(end)}")
    target = base.series("iter", "val/loss")[1][-1]
    gaps, reach = {}, {}
    for x, what, show in ("iter", "steps", count), ("seconds", "time", duration):
        ours, theirs = run.series(x, "val/loss"), base.series(x, "val/loss")
        gaps[f"at equal {what}"] = "-"
        if ours.size and theirs.size and not set(unequal) & set(SHARED[:4]):
            end = min(ours[0, -1], theirs[0, -1])
            gap = np.interp(end, *ours) - np.interp(end, *theirs)
            gaps[f"at equal {what}"] = f"{gap:+.4f} at {show(end)}"
        ours, theirs = run.first_below(target, x), base.first_below(target, x)
        cell = "not reached" if ours is None else show(ours)
        cell += f" ({theirs / ours:.2f}x)" if ours and theirs else ""
        reach[f"{what} to {target:.4f}"] = "see warning" if warnings else cell
    return {f"against {base.name}": run.name, **gaps, **reach}, warnings


def main(argv):
    parser = ArgumentParser(__doc__)
    parser.add_argument("runs", nargs="+", help="run directories, CSV files exported from wandb")
    parser.add_argument("--plot", metavar="FILE", help="draw the curves: .png, .pdf or .svg")
    args = parser.parse_args(argv)
    if args.plot and not args.plot.endswith((".png", ".pdf", ".svg")):
        raise UserError(f"--plot takes a file name in .png, .pdf or .svg, got {args.plot}")
    runs = []
    for path in args.runs:
        runs += read_export(path) if path.endswith(".csv") else [read_run(path)]
    name_runs(runs)
    base = next((run for run in runs if run.config.get("optimizer") == "adamw"), runs[0])
    measured = [against(run, base) for run in runs if run is not base]
    warnings = dict.fromkeys(f"warning: {line}" for _, lines in measured for line in lines)
    parts = [table([summary(run, base) for run in runs]), table(differences(runs)),
             "\n".join(warnings), table([row for row, _ in measured])]
    print("\n\n".join(part for part in parts if part))
    if measured:
        print(NOTE)
    if args.plot:
        try:
            from plot import plot  # only when asked for: importing matplotlib takes a second
        except ImportError:
            raise UserError("--plot needs matplotlib: pip install matplotlib") from None
        plot(runs, args.plot)
        print(f"wrote {args.plot}")


if __name__ == "__main__":
    run_script(main)
