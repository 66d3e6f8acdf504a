"""
Pictures: the curves of compare.py --plot (losses, win_rate, learning rate, gradient norm, a panel
each), and final losses against learning rate, of sweep.py.
"""
import math

import numpy as np
from matplotlib.figure import Figure  # not pyplot: without it no display is needed

from script import UserError

VAL_LOSS = "validation loss (nats/token)"
# Panels: x, y, label of y.
PANELS = (("iter", "val/loss", VAL_LOSS), ("tokens", "val/loss", VAL_LOSS),
          ("seconds", "val/loss", VAL_LOSS), ("iter", "train/loss", "training loss (nats/token)"),
          ("iter", "train/win_rate", "win_rate (grey: healthy)"), ("iter", "lr", "learning rate"),
          ("iter", "grad_norm", "gradient norm"), ("iter", "train/clip_rate", "clip_rate"))
SCALES = {"iter": [(1e3, "thousands of steps"), (1, "steps")],
          "tokens": [(1e9, "billions of tokens"), (1e6, "millions of tokens")],
          "seconds": [(3600, "hours of training"), (60, "minutes of training")]}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe-Ito


def plot(runs, path):
    """Draw PANELS, those for which there are values, into an image file."""
    panels = [p for p in PANELS if any(run.series(*p[:2]).size for run in runs)]
    rows = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(9, 0.5 + 2.7 * rows), dpi=160, layout="constrained")
    for i, panel in enumerate(panels, 1):
        draw(figure.add_subplot(rows, 2, i), runs, *panel)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), ncols=min(len(runs), 3),
                  loc="outside upper center", handlelength=4, frameon=False)
    save(figure, path)


def save(figure, path):
    try:
        figure.savefig(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def draw(axis, runs, x, y, label):
    """One panel: y against x, a line for each run."""
    largest = max(run.series(x, y)[0].max(initial=0) for run in runs)
    unit, x_label = next((s for s in SCALES[x] if largest >= 3 * s[0]), SCALES[x][-1])
    shown = []   # values after the first tenth of each run
    for i, run in enumerate(runs):
        xs, ys = run.series(x, y)
        colour = COLOURS[i % len(COLOURS)]
        if y not in ("val/loss", "lr") and xs.size:   # noisy: a moving median before the values
            axis.plot(xs / unit, ys, color=colour, alpha=0.2, linewidth=0.6, zorder=1)
            view = np.lib.stride_tricks.sliding_window_view
            xs, ys = (np.median(view(v, 1 + len(v) // 25), axis=1) for v in (xs, ys))
        axis.plot(xs / unit, ys, color=colour, linestyle=("-", "--", "-.", ":")[i % 4],
                  marker="osD^vP"[i % 6] if y == "val/loss" else None, markersize=4,
                  markevery=max(1, len(xs) // 12), label=run.name)
        shown += ys[xs >= 0.1 * xs.max(initial=0)].tolist()
    axis.set(xlabel=x_label, ylabel=label)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    low, high = min(shown), max(shown)
    if y == "train/win_rate":
        axis.axhspan(0.1, 0.5, color="#999999", alpha=0.2, linewidth=0)
        axis.set_ylim(0, max(0.6, 1.05 * high))
    elif y == "grad_norm":
        axis.set_ylim(0, 1.2 * high)
    elif y in ("val/loss", "train/loss") and low < high:
        # The first losses, near ln(vocabulary), would flatten the rest.
        axis.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))


def plot_grid(rows, axes, path):
    """
    Final val loss against learning rate into an image file; rows are those of results.csv. A line
    for each optimizer and combination of values on further axes: means over seeds, with a bar from
    the lowest to the highest. A cross at the top is a run that failed. Nothing without a loss.
    """
    further = [a for a in axes if a not in ("learning_rate", "optimizer", "seed")]
    lines = {}   # by name: {learning rate: losses}, learning rates at which a run failed
    for row in rows:
        name = ", ".join([row["optimizer"], *(f"{a} {row[a]}" for a in further)])
        losses, failed = lines.setdefault(name, ({}, set()))
        if row["status"] == "done":
            losses.setdefault(row["learning_rate"], []).append(row["final_val_loss"])
        elif row["status"] == "failed":
            failed.add(row["learning_rate"])
    if not any(losses for losses, _ in lines.values()):
        return
    rates = sorted({row["learning_rate"] for row in rows})
    ticks = [np.format_float_scientific(lr, trim="-", exp_digits=1) for lr in rates]
    figure = Figure(figsize=(6.4, 4.4), dpi=160, layout="constrained")
    axis = figure.add_subplot()
    shown = []
    for i, (name, (losses, failed)) in enumerate(lines.items()):
        colour, x = COLOURS[i % len(COLOURS)], sorted(losses)
        if x:
            low, mean, high = (np.array([f(losses[lr]) for lr in x])
                               for f in (np.min, np.mean, np.max))
            name += f": {mean.min():.3f} at {ticks[rates.index(x[mean.argmin()])]}"
            axis.errorbar(x, mean, [mean - low, high - mean] if "seed" in axes else None,
                          color=colour, linestyle=("-", "--", "-.", ":")[i % 4], label=name,
                          marker="osD^vP"[i % 6], markersize=5, capsize=3)
            shown += mean.tolist()
        axis.plot(sorted(failed), [0.97 - 0.04 * i] * len(failed), "x", color=colour,
                  markersize=7, markeredgewidth=2, transform=axis.get_xaxis_transform())
    note = " (x: a run failed)" * any(failed for _, failed in lines.values())
    axis.set(xscale="log", xlabel="learning rate" + note, ylabel="final " + VAL_LOSS)
    axis.set_xticks(rates, ticks)
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    low = min(shown)
    # The loss at a learning rate far too high would flatten the rest.
    high = min(max(shown), low + 6 * (np.median(shown) - low))
    if low < high:
        axis.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))
    figure.legend(loc="outside upper center", ncols=2, handlelength=4, frameon=False,
                  title="lowest" + " mean over seeds; bars: smallest to largest" * ("seed" in axes))
    save(figure, path)
