"""Figures: training curves of compare.py --plot, and loss against learning rate of sweep.py."""
import math

import numpy as np

from script import UserError

try:
    from matplotlib.figure import Figure  # unlike pyplot, it needs no display
except ImportError:
    raise UserError("plots need matplotlib: pip install matplotlib") from None

VAL_LOSS = "validation loss (nats/token)"
# (x, y, label of y) of each panel
PANELS = (("iter", "val/loss", VAL_LOSS), ("tokens", "val/loss", VAL_LOSS),
          ("seconds", "val/loss", VAL_LOSS), ("iter", "train/loss", "training loss (nats/token)"),
          ("iter", "train/win_rate", "win_rate (grey: healthy)"), ("iter", "lr", "learning rate"),
          ("iter", "grad_norm", "gradient norm"), ("iter", "train/clip_rate", "clip_rate"))
SCALES = {"iter": [(1e3, "thousands of steps"), (1, "steps")],
          "tokens": [(1e9, "billions of tokens"), (1e6, "millions of tokens")],
          "seconds": [(3600, "hours of training"), (60, "minutes of training")]}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe-Ito


def plot_curves(runs, path):
    """Write an image with a panel for each of PANELS that has values, and a line for each run."""
    panels = [p for p in PANELS if any(run.series(*p[:2]).size for run in runs)]
    rows = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(9, 0.5 + 2.7 * rows), dpi=160, layout="constrained")
    for i, panel in enumerate(panels, 1):
        draw_panel(figure.add_subplot(rows, 2, i), runs, *panel)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), ncols=min(len(runs), 3),
                  loc="outside upper center", handlelength=4, frameon=False)
    save_figure(figure, path)


def save_figure(figure, path):
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:   # ValueError: unknown file format
        raise UserError(f"cannot write {path}: {error}") from None


def line_style(i):
    return {"color": COLOURS[i % 7], "linestyle": ("-", "--", "-.", ":")[i % 4],
            "marker": "osD^vP"[i % 6], "markersize": 4}


def draw_panel(axis, runs, x, y, label):
    """One panel: y against x, a line for each run."""
    largest = max(run.series(x, y)[0].max(initial=0) for run in runs)
    unit, x_label = next((s for s in SCALES[x] if largest >= 3 * s[0]), SCALES[x][-1])
    shown = []   # values after the first tenth of each run
    for i, run in enumerate(runs):
        (xs, ys), style = run.series(x, y), line_style(i)
        if y != "val/loss":
            style["marker"] = None
        if y not in ("val/loss", "lr") and xs.size:   # noisy: draw a moving median as well
            axis.plot(xs / unit, ys, color=style["color"], alpha=0.2, linewidth=0.6, zorder=1)
            view = np.lib.stride_tricks.sliding_window_view
            xs, ys = (np.median(view(v, 1 + len(v) // 25), axis=1) for v in (xs, ys))
        axis.plot(xs / unit, ys, **style, markevery=max(1, len(xs) // 12), label=run.name)
        shown += ys[xs >= 0.1 * xs.max(initial=0)].tolist()
    low, high = min(shown) if y.endswith("loss") else 0, max(shown)
    if y == "train/win_rate":
        axis.axhspan(0.1, 0.5, color="#999999", alpha=0.2, linewidth=0)
        high = max(0.6, high)
    format_axis(axis, low, high, xlabel=x_label, ylabel=label)


def format_axis(axis, low, high, **labels):
    """Labels, a light grid, and y limits just outside low and high."""
    axis.set(**labels)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    if low < high:
        axis.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))


def plot_sweep(rows, axes, path):
    """
    Write an image of final val loss against learning rate. rows: of results.csv. There is a line
    for each optimizer and combination of the other axes. With several seeds it shows means, with
    bars from the lowest to the highest loss. A learning rate with a failed run is left out.
    """
    others = [a for a in axes if a not in ("learning_rate", "optimizer", "seed")]
    lines = {}   # {label: {learning rate: final losses}}
    for row in rows:
        if row["status"] in ("done", "failed"):
            label = ", ".join([row["optimizer"], *(f"{a} {row[a]}" for a in others)])
            losses = lines.setdefault(label, {}).setdefault(row["learning_rate"], [])
            losses.append(row["final_val_loss"])   # None if it failed
    rates = sorted({row["learning_rate"] for row in rows})
    ticks = {lr: np.format_float_scientific(lr, trim="-", exp_digits=1) for lr in rates}
    figure = Figure(figsize=(6.4, 4.4), dpi=160, layout="constrained")
    axis = figure.add_subplot(xscale="log")
    shown = []
    for i, (label, losses) in enumerate(lines.items()):
        x = sorted(lr for lr in losses if None not in losses[lr])
        if not x:
            continue
        low, mean, high = (np.array([f(losses[lr]) for lr in x]) for f in (np.min, np.mean, np.max))
        label += f": {mean.min():.3f} at {ticks[x[mean.argmin()]]}"
        axis.errorbar(x, mean, [mean - low, high - mean] if "seed" in axes else None,
                      **line_style(i), label=label, capsize=3)
        shown += mean.tolist()
    if not shown:
        return
    axis.set_xticks(rates, ticks.values())
    axis.minorticks_off()
    # The loss at a learning rate that is far too high would flatten the rest.
    high = min(max(shown), min(shown) + 6 * (np.median(shown) - min(shown)))
    format_axis(axis, min(shown), high, xlabel="learning rate", ylabel="final " + VAL_LOSS)
    figure.legend(loc="outside upper center", ncols=2, handlelength=4, frameon=False,
                  title="lowest" + " mean over seeds; bars: smallest to largest" * ("seed" in axes))
    save_figure(figure, path)
