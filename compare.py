"""
Compare training runs: losses, speed, settings that differ, and the speed-up over a baseline.

    python compare.py out/quickstart-sophiag out/quickstart-adamw --plot=compare.png

The baseline is the first AdamW run, or the first run if there is none. Times count training steps
only. They compare optimizers only if the machines are alike.
"""
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configurator import FIELDS
from records import read_metrics
from script import ArgumentParser, UserError, run_script

# If these differ, the runs evaluate on different windows and their val losses are not comparable.
EVALUATION_SETTINGS = ("dataset", "block_size", "total_batch_size", "eval_iters")
# If any of these differ, a speed-up may not be due to the optimizer.
SHARED_SETTINGS = EVALUATION_SETTINGS + (
    "max_iters", "lr_decay_iters", "decay_lr", "seed", "init_from", "n_layer", "n_head", "n_embd",
    "init_std", "dropout", "bias", "scale_attn_by_inverse_layer_idx")

NOTE = """\
Loss diff: val loss minus the baseline's, interpolated between evaluations. Its standard error is
below the root of the sum of squares of both, because all runs evaluate on the same windows.
Speed-ups (x) are underestimates: in mid-run the learning rate is still high, and so is the loss."""


@dataclass
class Run:
    path: str
    config: dict      # of config.json
    records: list     # of metrics.jsonl
    name: str = ""

    def series(self, x, y):
        """Two float arrays: x and y of every record that has both."""
        pairs = [(r[x], r[y]) for r in self.records if x in r and y in r]
        return np.array(pairs, dtype=float).reshape(-1, 2).T

    def x_at_loss(self, loss, x):
        """x at which val loss first reaches `loss`, interpolated between evaluations, or None."""
        xs, losses = self.series(x, "val/loss")
        for i in np.flatnonzero(losses <= loss)[:1]:
            return np.interp(-loss, -losses[max(0, i - 1):i + 1], xs[max(0, i - 1):i + 1])

    def ms_per_step(self):
        """Median over windows of 100 steps, each with several Hessian updates. None if unknown."""
        steps, seconds = self.series("iter", "seconds")
        if not steps.size or steps[0] == steps[-1]:
            return None
        ends = np.unique(np.searchsorted(steps, [*range(0, int(steps[-1]), 100), steps[-1]]))
        return 1000 * np.median(np.diff(seconds[ends]) / np.diff(steps[ends]))


def read_config(folder):
    """The settings of a run, from its config.json. Raises UserError."""
    path = os.path.join(folder, "config.json")
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
        config["optimizer"]   # missing if train.py did not write this file
        return config
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {path} ({type(error).__name__})") from None


def read_run(folder):
    path = os.path.join(folder, "metrics.jsonl")
    run = Run(folder, {}, read_metrics(path))
    if not any("val/loss" in r for r in run.records):
        raise UserError(f"{path} has no evaluation: not a run directory, or the run just started")
    run.config = read_config(folder)
    if run.config.get("init_from") in ("resume", "auto"):
        run.config["init_from"] = "scratch"
    return run


def format_count(n):
    """4,096, 4.915M or 49.15B."""
    size, unit = (1e9, "B") if n >= 1e9 else (1e6, "M")
    return f"{n / size:.4g}{unit}" if n >= size else f"{n:,.0f}"


def format_duration(seconds):
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def format_setting(value):
    """Text; 0.011 / 10 becomes 0.0011."""
    return str(float(f"{value:.10g}") if isinstance(value, float) else value)


def format_table(rows):
    """Aligned text of rows: dicts of str with the same keys, which become the header."""
    lines = [list(row) for row in rows[:1]] + [list(row.values()) for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def summarize_run(run, base):
    """A table row."""
    steps, losses = run.series("iter", "val/loss")
    last = [r for r in run.records if "val/loss" in r][-1]
    best, stderr = losses.argmin(), last.get("val/loss_stderr")
    logged, win_rates = run.series("iter", "train/win_rate")
    win_rates = win_rates[logged > 0.1 * steps[-1]]   # without the warmup
    ms, base_ms = run.ms_per_step(), base.ms_per_step()
    return {
        "run": run.name, "optimizer": run.config.get("optimizer", "-"),
        "steps": f"{steps[-1]:,.0f}",
        "tokens": format_count(last["tokens"]) if "tokens" in last else "-",
        "time": format_duration(last["seconds"]) if "seconds" in last else "-",
        "final val loss": f"{losses[-1]:.4f}" + (f" +- {stderr:.4f}" if stderr else ""),
        "best val loss": f"{losses[best]:.4f} at {steps[best]:,.0f}",
        "win_rate": f"{min(win_rates):.2f}-{max(win_rates):.2f}" if win_rates.size else "-",
        "ms/step": f"{ms:.1f}" if ms else "-",
        "overhead": f"{ms / base_ms - 1:+.1%}" if ms and base_ms and run is not base else "-"}


def differing_settings(runs, keys):
    """The keys whose values differ between the runs."""
    return [k for k in keys if any(r.config.get(k) != runs[0].config.get(k) for r in runs)]


def check_fairness(run, base):
    """Warnings: each is a reason why a speed-up may not be due to the optimizer."""
    warnings = [f"{key} differs between {run.name} and {base.name}"
                for key in differing_settings([run, base], SHARED_SETTINGS)]
    for r in base, run:
        last = r.series("iter", "val/loss")[0][-1]
        ends = ("max_iters", "lr_decay_iters") if r.config.get("decay_lr") else ("max_iters",)
        end = max(r.config.get(key, 0) for key in ends)
        if last < end:
            warnings.append(f"{r.name} was last evaluated at step {last:,.0f} of {end:,}")
    return warnings


def compare_to_baseline(run, base, fair):
    """A table row: loss differences, and if fair, steps and time to the baseline's final loss."""
    same_windows = not differing_settings([run, base], EVALUATION_SETTINGS)
    target = base.series("iter", "val/loss")[1][-1]
    diffs, reached = {}, {}
    for x, what, show in ("iter", "steps", format_count), ("seconds", "time", format_duration):
        ours, theirs = run.series(x, "val/loss"), base.series(x, "val/loss")
        cell = "-"
        if same_windows and ours.size and theirs.size:
            end = min(ours[0, -1], theirs[0, -1])
            cell = f"{np.interp(end, *ours) - np.interp(end, *theirs):+.4f} at {show(end)}"
        diffs[f"loss diff at equal {what}"] = cell
        ours, theirs = run.x_at_loss(target, x), base.x_at_loss(target, x)
        cell = "not reached" if ours is None else show(ours)
        cell += f" ({theirs / ours:.2f}x)" if ours and theirs else ""
        reached[f"{what} to {target:.4f}"] = cell if fair else "see warning"
    return {f"vs {base.name}": run.name, **diffs, **reached}


def main(argv):
    parser = ArgumentParser(__doc__)
    parser.add_argument("runs", nargs="+", help="run directories")
    parser.add_argument("--plot", metavar="FILE", help="draw the curves: .png, .pdf, .svg, ...")
    args = parser.parse_args(argv)
    runs = [read_run(path) for path in args.runs]
    names = [os.path.basename(os.path.normpath(run.path)) for run in runs]
    for run, name in zip(runs, names):
        run.name = name if names.count(name) == 1 else run.path
    base = next((run for run in runs if run.config.get("optimizer") == "adamw"), runs[0])
    others = [run for run in runs if run is not base]
    warnings = {run.name: check_fairness(run, base) for run in others}
    keys = [k for k in FIELDS if k != "out_dir" and not k.startswith("wandb")]
    blocks = [
        format_table([summarize_run(run, base) for run in runs]),
        format_table([{"setting": k, **{r.name: format_setting(r.config.get(k, "-")) for r in runs}}
                      for k in differing_settings(runs, keys)]),
        "\n".join(dict.fromkeys(f"warning: {w}" for ws in warnings.values() for w in ws)),
        format_table([compare_to_baseline(run, base, not warnings[run.name]) for run in others])]
    print("\n\n".join(block for block in blocks if block))
    if others:
        print(NOTE)
    if args.plot:
        from plot import plot_curves  # importing matplotlib takes a second
        plot_curves(runs, args.plot)
        print(f"wrote {args.plot}")


if __name__ == "__main__":
    run_script(main)
