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
SIZES = ("small", "warm", "batch")
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


def losses(sweep):
    """Final losses of a sweep over SEEDS, (3,); None unless all are there."""
    by_seed = {r["seed"]: r["final_val_loss"] for r in RUNS[sweep]}
    return np.array([by_seed[s] for s in SEEDS]) if set(SEEDS) <= set(by_seed) else None


def mean_and_spread(values):
    return f"{values.mean():.4f} ± {values.std(ddof=1):.4f}"


def gap(values, base):
    """Difference to the baseline, seed by seed: its mean and standard error."""
    d = values - base
    return f"{d.mean():+.4f} ± {d.std(ddof=1) / len(d) ** 0.5:.4f}"


def ms_per_step(size, optimizer):
    """Median of the runs that had the machine for themselves."""
    return np.median([float(r["seconds"]) / int(r["max_iters"]) * 1000
                      for r in RUNS[f"{size}/speed"] if r["optimizer"] == optimizer])


def win_rates(sweep):
    """Smallest and largest at the end of a run; "" where there is none."""
    found = [r["win_rate"] for r in RUNS[sweep] if r["win_rate"] == r["win_rate"]]
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
    """A table of rows, dicts with the same keys."""
    lines = [rows[0], dict.fromkeys(rows[0], "---"), *rows]
    lines[0] = {key: key for key in rows[0]}
    return "\n".join("| " + " | ".join(line.values()) + " |" for line in lines)


def arms(size, part="final"):
    """(name, sweep, style) of each arm that has runs of this part of the study."""
    return [(name, sweep, STYLES[arm]) for arm, name in ARMS.items()
            if (sweep := f"{size}/{part}-{arm}") in RUNS]


def final_table(size):
    base_sweep, rows = f"{size}/final-adamw", []
    base = losses(base_sweep)
    for name, sweep, _ in arms(size):
        found, optimizer = losses(sweep), RUNS[sweep][0]["optimizer"]
        is_base = optimizer == "adamw"
        rows.append({
            "": name, "learning rate": f"{RUNS[sweep][0]['learning_rate']:g}",
            "final val loss": mean_and_spread(found),
            "difference to AdamW": "" if is_base else gap(found, base),
            "steps to AdamW's loss": "" if is_base else mean_steps(sweep, base),
            "AdamW's steps to its loss": "" if is_base else mean_steps(base_sweep, found),
            "win_rate at the end": win_rates(sweep)})
        if f"{size}/speed" in RUNS:
            ms, base_ms = ms_per_step(size, optimizer), ms_per_step(size, "adamw")
            more = "" if is_base else f" ({ms / base_ms - 1:+.0%})"
            rows[-1]["time of a step"] = f"{ms:.0f} ms{more}"
    return markdown(rows)


def ablation_table():
    fixed, steered, adamw = "SophiaG, ρ 0.05", "SophiaG, steered to 0.3", "AdamW"
    sweeps = {fixed: "half-sophiag", steered: "half-steered", adamw: "final-adamw"}
    rows = [(fixed, None), (steered, fixed)]
    for what, sweep, base in (
            ("steered, empirical Fisher (true labels)", "half-fisher", steered),
            ("steered, Hutchinson (Sophia-H)", "half-hutchinson", steered),
            ("SophiaG, steered to 0.1", "half-target", fixed),
            ("ρ 0.05, k = 100", "half-k100", fixed),
            ("h = 0: sign of the momentum", "half-sign", fixed),
            ("ρ 0.05, all sequences share label noise", "half-shared", fixed),
            ("AdamW, gradient clipped at 1/6", "clip-adamw", adamw)):
        sweeps[what] = sweep
        rows.append((what, base))
    found = {what: losses(f"small/{sweep}") for what, sweep in sweeps.items()}
    return markdown([{"": what, "final val loss": mean_and_spread(found[what]),
                      "win_rate at the end": win_rates(f"small/{sweeps[what]}"),
                      "compared with": base or "",
                      "difference": gap(found[what], found[base]) if base else ""}
                     for what, base in rows])


# Sweeps with runs from each ρ; where 0.05 is not among those of the first, the second has it.
RHO = {"fixed": ("small/rho-sophiag", "small/lr-sophiag"),
       "to 0.3": ("small/rho-steered", "small/lr-steered"),
       "to 0.15": ("small/target-0.15",), "to 0.1": ("small/target-0.1",)}


def rho_runs(what):
    """In the order of ρ."""
    rate = RUNS[RHO[what][0]][0]["learning_rate"]
    runs = [r for sweep in RHO[what] for r in RUNS[sweep] if r["learning_rate"] == rate]
    return sorted(runs, key=lambda r: r["rho"])


def rho_table():
    columns = {what: rho_runs(what) for what in RHO}
    best = min(r["final_val_loss"] for r in columns["fixed"])
    rows = []
    for runs in zip(*columns.values()):
        rows.append({"ρ at the start": f"{runs[0]['rho']:g}"})
        for what, r in zip(columns, runs):
            title = what if what == "fixed" else f"steered {what}"
            rows[-1][title] = f"{r['final_val_loss']:.4f} ({r['final_val_loss'] / best - 1:+.1%})"
            if what == "fixed":
                rows[-1]["its win_rate at the end"] = f"{r['win_rate']:.2f}"
            else:
                assert r["rho"] == runs[0]["rho"]
    return markdown(rows)


def cost():
    runs = [r for sweep in RUNS.values() for r in sweep]
    hours = sum(float(r["seconds"]) for r in runs) / 3600
    return (f"{len(runs)} runs: {hours:.1f} hours of training steps on one core each, evaluations "
            f"not counted;\ntwo at a time.")


def new_figure(width=7.5):
    return Figure(figsize=(width, 3.2), dpi=160, layout="constrained")


def finish(axis, **labels):
    axis.set(**labels)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def plot_rates(size, axis):
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
    finish(axis, xlabel="peak learning rate (filled: the best)",
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


def insert(path, tables):
    with open(path, encoding="utf-8") as file:
        text = file.read()
    for name, table in tables.items():
        text, found = re.subn(rf"(<!-- {name} -->\n).*?(?=<!-- end -->)",
                              lambda m, table=table: m[1] + table + "\n", text, flags=re.S)
        assert found == 1, f"{path} has {found} places for {name}"
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def plot_rho(axis):
    """Final loss against the ρ at the start, fixed and steered."""
    for what, style in zip(RHO, (STYLES["sophiag"], STYLES["steered"], ("#E69F00", "v", "-."),
                                 ("#56B4E9", "D", "--"))):
        runs, (colour, marker, line) = rho_runs(what), style
        axis.plot([r["rho"] for r in runs], [r["final_val_loss"] for r in runs], line, color=colour,
                  marker=marker, label=what if what == "fixed" else f"steered {what}")
    axis.set_xscale("log")
    finish(axis, xlabel="ρ at the start", ylabel="final val loss (nats/byte)")
    axis.legend(frameon=False)


def plot_size(size):
    """Learning rates and curves of one setting."""
    figure = new_figure()
    left, right = figure.subplots(1, 2)
    plot_rates(size, left)
    plot_curves(size, right, 2)
    low = losses(f"{size}/final-adamw").min()
    finish(right, xlabel="steps", ylabel="val loss (nats/byte)", ylim=(low - 0.05, low + 1.4))
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=4,
                  frameon=False)
    figure.savefig(os.path.join(RESULTS, f"{size}.png"))


def main():
    for size in SIZES:
        plot_size(size)
    figure = new_figure()
    left, right = figure.subplots(1, 2)
    plot_rho(left)
    plot_curves("small", right, 3)
    finish(right, xlabel="steps", ylabel="win_rate, mean and range of 3 seeds", ylim=(0, 0.5))
    figure.savefig(os.path.join(RESULTS, "rho.png"))
    finals = {f"{size} final": final_table(size) for size in SIZES}
    insert(os.path.join(RESULTS, "README.md"),
           {**finals, "rho": rho_table(), "ablations": ablation_table(),
            "cost": cost()})
    insert(os.path.join(os.path.dirname(RESULTS), "README.md"),
           {"small final": finals["small final"]})


if __name__ == "__main__":
    main()
