"""
Tables and figures of the study from runs.csv and curves.csv: writes results/*.png, and the tables
into results/README.md, and one of them into ../README.md, between <!-- name --> and <!-- end -->.

    python results/report.py
"""
import csv
import os
import re
from collections import defaultdict

import numpy as np
from matplotlib.figure import Figure

RESULTS = os.path.dirname(os.path.abspath(__file__))
ARMS = {"adamw": "AdamW", "lion": "Lion", "sophiag": "SophiaG", "steered": "SophiaG, steered ρ"}
STYLES = dict(zip(ARMS, (("#D55E00", "s", "--"), ("#009E73", "D", "-."), ("#0072B2", "o", "-"),
                         ("#CC79A7", "^", ":"))))
NUMBERS = ("learning_rate", "rho", "target_win_rate", "final_val_loss", "win_rate", "grad_clip")
SIZES = {"warm": ("0.3M", "small"), "medium": ("3.1M", "medium")}   # title, where its speed is
FINALS = SIZES | {"bpe": ("0.3M, GPT-2's tokens (nats a token)", "bpe")}
SETTINGS = {"small": "1,024 tokens a step, warmup 100", "warm": "1,024 tokens, warmup 500",
            "long": "1,024 tokens, warmup 1,000", "batch": "4,096 tokens, warmup 100"}
SEEDS = ("2", "3", "4")   # 1 chose the learning rates


def read(name):
    with open(os.path.join(RESULTS, name), encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


RUNS, CURVES = defaultdict(list), defaultdict(list)
for row in read("runs.csv"):
    RUNS[row["sweep"]].append({**row, **{k: float(row[k] or "nan") for k in NUMBERS}})
for row in read("curves.csv"):
    values = (float(v or "nan") for v in list(row.values())[2:])
    CURVES[row["sweep"], row["run"]].append(tuple(values))   # iter, seconds, loss, win_rate, rho
LOSS, WIN_RATE = 2, 3   # columns of CURVES


def losses(sweep, rho=None, seeds=SEEDS):
    """Final losses of a sweep, one for each seed, of the runs that began at this ρ if one is given;
    None unless all are there."""
    by_seed = {r["seed"]: r["final_val_loss"] for r in RUNS.get(sweep, [])
               if rho in (None, r["rho"])}
    return np.array([by_seed[s] for s in seeds]) if set(seeds) <= set(by_seed) else None


def mean_and_spread(values):
    return f"{values.mean():.4f} ± {values.std(ddof=1):.4f}"


def gap(values, base):
    """Difference to the baseline, seed by seed: its mean and standard error."""
    d = values - base
    return f"{d.mean():+.4f} ± {d.std(ddof=1) / len(d) ** 0.5:.4f}"


def step_time(speed, optimizer):
    """Median of the runs that had the machine for themselves, and in which ratio to AdamW's."""
    ms = defaultdict(list)
    for r in RUNS[speed]:
        ms[r["optimizer"]].append(float(r["seconds"]) / int(r["max_iters"]) * 1000)
    mine, adamw = np.median(ms[optimizer]), np.median(ms["adamw"])
    return f"{mine:,.0f} ms" + ("" if optimizer == "adamw" else f" ({mine / adamw - 1:+.0%})")


def win_rates(sweep):
    """Smallest and largest at the end of a run; "" where there is none."""
    found = [r["win_rate"] for r in RUNS.get(sweep, []) if r["win_rate"] == r["win_rate"]]
    return f"{min(found):.2f}-{max(found):.2f}" if found else ""


def steps_to(sweep, run, loss):
    """Step at which a run first is at `loss`, interpolated between evaluations, or None."""
    iters, _, found, *_ = np.array(CURVES[sweep, run]).T
    below = np.flatnonzero(found <= loss)
    if not below.size:
        return None
    i = slice(max(0, below[0] - 1), below[0] + 1)
    return np.interp(-loss, -found[i], iters[i])


def mean_steps(sweep, losses):
    """Steps to losses, one for each of SEEDS: the mean over seeds."""
    by_seed = {r["seed"]: r["run"] for r in RUNS[sweep]}
    steps = [steps_to(sweep, by_seed[s], loss) for s, loss in zip(SEEDS, losses)]
    return "not reached" if None in steps else f"{np.mean(steps):,.0f}"


def markdown(rows):
    """A table of rows, dicts with the same keys; two columns of one title differ in spaces."""
    lines = [rows[0], dict.fromkeys(rows[0], "---"), *rows]
    lines[0] = {key: key for key in rows[0]}
    return "\n".join("| " + " | ".join(line.values()) + " |" for line in lines)


def arms(size, part="final"):
    """(name, sweep, style) of each arm that has runs of this part of the study."""
    return [(name, sweep, STYLES[arm]) for arm, name in ARMS.items()
            if (sweep := f"{size}/{part}-{arm}") in RUNS]


def final_table():
    rows = []
    for size, (title, speed) in FINALS.items():
        base_sweep = f"{size}/final-adamw"
        base = losses(base_sweep)
        for name, sweep, _ in arms(size):
            found, optimizer = losses(sweep), RUNS[sweep][0]["optimizer"]
            is_base = optimizer == "adamw"
            rows.append({
                "": f"**{title}**, {name}" if is_base else name,
                "learning rate": f"{RUNS[sweep][0]['learning_rate']:g}",
                "final val loss": mean_and_spread(found),
                "difference to AdamW": "" if is_base else gap(found, base),
                "AdamW is there at step": "" if is_base else mean_steps(base_sweep, found),
                "win_rate at the end": win_rates(sweep),
                "time of a step": step_time(f"{speed}/speed", optimizer)})
    return markdown(rows)


def settings_table():
    """A row for each schedule and batch of the small model, its losses by optimizer."""
    rows = []
    for size, title in SETTINGS.items():
        rows.append({"": title})
        for arm, name in ARMS.items():
            cell, final, rates = "", f"{size}/final-{arm}", f"{size}/lr-{arm}"
            if final in RUNS:
                cell = f"{mean_and_spread(losses(final))} at {RUNS[final][0]['learning_rate']:g}"
            elif rates in RUNS:
                best = min(RUNS[rates], key=lambda r: r["final_val_loss"])
                cell = f"({best['final_val_loss']:.4f} at {best['learning_rate']:g})"
            rows[-1][name] = cell
    return markdown(rows)


BUDGETS = (   # size, sweeps of AdamW and of the others, seeds
    ("warm", "final", "final", SEEDS), ("warm", "time", "final", SEEDS),
    ("warm", "twice", "final", SEEDS), ("warm", "twice", "twice", SEEDS),
    ("warm", "four", "four", SEEDS), ("warm", "low", "four", SEEDS),
    ("medium", "final", "final", SEEDS))


def budget_table():
    """Equal steps, equal time, and more steps."""
    rows = []
    for size, adamw, others, seeds in BUDGETS:
        base = losses(f"{size}/{adamw}-adamw", seeds=seeds)
        settings = RUNS[f"{size}/{adamw}-adamw"][0]
        row = {"": SIZES[size][0], "AdamW's steps": f"{int(settings['max_iters']):,}",
               "its learning rate": f"{settings['learning_rate']:g}",
               "its final val loss": mean_and_spread(base),
               "the others' steps": f"{int(RUNS[f'{size}/{others}-sophiag'][0]['max_iters']):,}"}
        for arm in "lion", "sophiag":
            found = losses(f"{size}/{others}-{arm}", seeds=seeds)
            row[ARMS[arm]] = "" if found is None else gap(found, base)
        rows.append(row)
    return markdown(rows)


ABLATIONS = (   # name, sweeps in "small" and "warm", compared with
    ("SophiaG, ρ 0.05", "half-sophiag", "again-sophiag", None),
    ("SophiaG, steered to 0.1", "half-target", "final-steered", "SophiaG, ρ 0.05"),
    ("SophiaG, steered to 0.3", "half-steered", None, "SophiaG, ρ 0.05"),
    ("k = 1", "half-k1", "k1", "SophiaG, ρ 0.05"),
    ("k = 100", "half-k100", "k100", "SophiaG, ρ 0.05"),
    ("h = 0: sign of the momentum", "half-sign", "sign", "SophiaG, ρ 0.05"),
    ("steered, Hutchinson (Sophia-H)", "half-hutchinson", "hutchinson", "steered GNB"),
    ("steered, empirical Fisher (true labels)", "half-fisher", "fisher", "steered GNB"),
    ("all sequences share label noise", "half-shared", "shared", "SophiaG, ρ 0.05"),
    ("AdamW, 8e-3", "final-adamw", "final-adamw", None),
    ("AdamW, gradient clipped at 1/6", "clip-adamw", "clip", "AdamW, 8e-3"))


def ablation_table():
    """Differences to what each is compared with, at two schedules. Steered arms are compared with
    GNB steered to the same win_rate: 0.3 with the short warmup, 0.1 with the long one."""
    sweeps = {name: (f"small/{small}", f"warm/{warm}") for name, small, warm, _ in ABLATIONS}
    sweeps["steered GNB"] = "small/half-steered", "warm/final-steered"
    rows = []
    for name, *_, base in ABLATIONS:
        rows.append({"": name, "compared with": base or ""})
        for i, title in enumerate(("warmup 100, learning rate 2e-4", "warmup 500, 8e-4")):
            found = losses(sweeps[name][i])
            cell = "" if found is None else (
                gap(found, losses(sweeps[base][i])) if base else mean_and_spread(found))
            rows[-1][title] = cell
            rows[-1]["win_rate" + " " * i] = win_rates(sweeps[name][i])
    return markdown(rows)


# Sweeps with runs from each ρ: their learning rate, and, where 0.05 is not among those of the
# first, the sweep that has it. Percentages are of the best of the "fixed" before them.
RHO = {"fixed": (8e-4, "warm/rho-sophiag", "warm/lr-sophiag"),
       "steered to 0.3": (8e-4, "warm/target-0.3"),
       "steered to 0.1": (8e-4, "warm/rho-steered", "warm/lr-steered"),
       "warmup 100: fixed": (2e-4, "small/rho-sophiag", "small/lr-sophiag"),
       "to 0.3": (2e-4, "small/rho-steered", "small/lr-steered"),
       "to 0.15": (2e-4, "small/target-0.15"), "to 0.1": (2e-4, "small/target-0.1")}


def rho_runs(what):
    """In the order of ρ."""
    rate, *sweeps = RHO[what]
    return sorted((r for sweep in sweeps for r in RUNS[sweep] if r["learning_rate"] == rate),
                  key=lambda r: r["rho"])


def rho_table():
    columns, rows = {what: rho_runs(what) for what in RHO}, []
    for i, first in enumerate(columns["fixed"]):
        rows.append({"ρ at the start": f"{first['rho']:g}"})
        for what, runs in columns.items():
            r = runs[i]
            assert r["rho"] == first["rho"], f"{what}: not the same ρ"
            if "fixed" in what:
                best = min(run["final_val_loss"] for run in runs)
            rows[-1][what] = f"{r['final_val_loss']:.4f} ({r['final_val_loss'] / best - 1:+.1%})"
            if "fixed" in what:
                rows[-1]["win_rate" + " " * len(rows[-1])] = f"{r['win_rate']:.2f}"
    return markdown(rows)


STARTS = (   # of ρ: sweeps over SEEDS, and the ρ at the start
    ("fixed", "warm/final-sophiag", 0.05), ("fixed", "warm/tuned-sophiag", 0.5),
    ("steered to 0.3", "warm/starts-low", 0.005), ("steered to 0.3", "warm/starts-low", 0.05),
    ("steered to 0.3", "warm/starts-high", 0.5), ("steered to 0.3", "warm/starts-high", 5),
    ("steered to 0.1", "warm/final-steered", 0.05))


def starts_table():
    """What was best on seed 1, and what steers towards it, on SEEDS."""
    adamw, found = losses("warm/final-adamw"), [losses(sweep, rho) for _, sweep, rho in STARTS]
    best = min(x.mean() for x, (what, *_) in zip(found, STARTS) if what == "fixed")
    return markdown([{"ρ": what, "at the start": f"{rho:g}", "final val loss": mean_and_spread(x),
                      "to the best fixed": f"{x.mean() / best - 1:+.1%}",
                      "difference to AdamW": gap(x, adamw)}
                     for x, (what, _, rho) in zip(found, STARTS)])


def cost():
    runs = [r for sweep in RUNS.values() for r in sweep]
    hours = sum(float(r["seconds"]) for r in runs) / 3600
    return (f"{len(runs)} runs: {hours:.1f} hours of training steps on one core each, evaluations "
            f"not counted;\ntwo at a time.")


def new_figure(rows=1, columns=2):
    figure = Figure(figsize=(3.8 * columns, 0.3 + 2.9 * rows), dpi=160, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def finish(axis, **labels):
    axis.set(**labels)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def save(figure, axis, name):
    """With one legend, of what is in axis."""
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=4,
                  frameon=False)
    figure.savefig(os.path.join(RESULTS, name))


def plot_rates(size, title, axis):
    """Final loss against learning rate, a line an arm; the lowest is filled."""
    lowest = []
    for name, sweep, (colour, marker, line) in arms(size, "lr"):
        runs = sorted(RUNS[sweep], key=lambda r: r["learning_rate"])
        xs, ys = ([r[k] for r in runs] for k in ("learning_rate", "final_val_loss"))
        axis.plot(xs, ys, line, color=colour, marker=marker, markerfacecolor="white",
                  label=name)
        i = int(np.nanargmin(ys))
        axis.plot(xs[i], ys[i], marker, color=colour)
        lowest.append(ys[i])
    axis.set(xscale="log", ylim=(min(lowest) - 0.03, max(lowest) + 0.35))
    finish(axis, title=title, xlabel="peak learning rate (filled: the best)",
           ylabel="final val loss (nats/byte)")


def plot_curves(size, axis, column):
    for name, sweep, (colour, marker, line) in arms(size):
        curves = np.array([CURVES[sweep, r["run"]] for r in RUNS[sweep]])   # (seed, evaluation, 5)
        iters, values = curves[0, :, 0], curves[:, :, column]
        if np.isnan(values[:, 1:]).all():
            continue
        axis.plot(iters, values.mean(0), line, color=colour, marker=marker, markersize=4,
                  label=name)
        axis.fill_between(iters, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)


def plot_losses():
    """Learning rates and curves of the finals, a row for each size."""
    figure, axes = new_figure(rows=len(SIZES))
    for (size, (title, _)), (left, right) in zip(SIZES.items(), axes):
        plot_rates(size, f"{title} parameters, seed 1", left)
        plot_curves(size, right, LOSS)
        low = losses(f"{size}/final-adamw").min()
        finish(right, title=f"{title}: mean and range of 3 seeds", xlabel="steps",
               ylabel="val loss (nats/byte)", ylim=(low - 0.05, low + 1.2))
    save(figure, axes[0, 0], "losses.png")


def plot_warmups():
    """Learning rates of the small model at other batches and warmups; not of a mere two."""
    figure, (axes,) = new_figure(columns=3)
    for size, axis in zip(("small", "warm", "batch"), axes):
        plot_rates(size, SETTINGS[size], axis)
    save(figure, axes[0], "warmup.png")


def plot_rho():
    """Final loss against the ρ at the start, fixed and steered; win_rate on the way."""
    figure, (axes,) = new_figure(columns=3)
    styles = {"fixed": STYLES["sophiag"], "to 0.3": STYLES["steered"],
              "to 0.15": ("#E69F00", "v", "-."), "to 0.1": ("#56B4E9", "D", "--")}
    names = list(RHO)
    for axis, group, title in ((axes[0], names[:3], "warmup 500, learning rate 8e-4"),
                               (axes[1], names[3:], "warmup 100, learning rate 2e-4")):
        for what in group:
            label = what.removeprefix("warmup 100: ").removeprefix("steered ")
            colour, marker, line = styles[label]
            runs = rho_runs(what)
            axis.plot([r["rho"] for r in runs], [r["final_val_loss"] for r in runs], line,
                      color=colour, marker=marker,
                      label=label if label == "fixed" else f"steered {label}")
        axis.set_xscale("log")
        finish(axis, title=title, xlabel="ρ at the start", ylabel="final val loss (nats/byte)")
        axis.legend(frameon=False)
    plot_curves("warm", axes[2], WIN_RATE)
    finish(axes[2], title="ρ 0.05, and steered to 0.1: 3 seeds", xlabel="steps",
           ylabel="win_rate", ylim=(0, 0.5))
    axes[2].legend(frameon=False)
    figure.savefig(os.path.join(RESULTS, "rho.png"))


def insert(path, tables):
    with open(path, encoding="utf-8") as file:
        text = file.read()
    for name, table in tables.items():
        text, found = re.subn(rf"(<!-- {name} -->\n).*?(?=<!-- end -->)",
                              lambda m, table=table: m[1] + table + "\n", text, flags=re.S)
        assert found == 1, f"{path} has {found} places for {name}"
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def main():
    plot_losses()
    plot_warmups()
    plot_rho()
    finals = final_table()
    insert(os.path.join(RESULTS, "README.md"),
           {"finals": finals, "budgets": budget_table(), "warmup": settings_table(),
            "rho": rho_table(), "starts": starts_table(), "ablations": ablation_table(),
            "cost": cost()})
    insert(os.path.join(os.path.dirname(RESULTS), "README.md"), {"finals": finals})


if __name__ == "__main__":
    main()
