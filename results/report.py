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


def ms_per_step(optimizer):
    """Median of the runs that had the machine for themselves."""
    return np.median([float(r["seconds"]) / int(r["max_iters"]) * 1000
                      for r in RUNS["small/speed"] if r["optimizer"] == optimizer])


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


def markdown(rows):
    """A table of rows, dicts with the same keys."""
    lines = [rows[0], dict.fromkeys(rows[0], "---"), *rows]
    lines[0] = {key: key for key in rows[0]}
    return "\n".join("| " + " | ".join(line.values()) + " |" for line in lines)


def final_table(size):
    base, rows = losses(f"{size}/final-adamw"), []
    for arm, name in ARMS.items():
        sweep = f"{size}/final-{arm}"
        found, optimizer = losses(sweep), RUNS[sweep][0]["optimizer"]
        ms, base_ms = ms_per_step(optimizer), ms_per_step("adamw")
        reached = [steps_to(sweep, r["run"], base[SEEDS.index(r["seed"])]) for r in RUNS[sweep]]
        steps = np.mean(reached) if None not in reached else None
        whole = int(RUNS[sweep][0]["max_iters"])
        rows.append({
            "": name, "learning rate": f"{RUNS[sweep][0]['learning_rate']:g}",
            "final val loss": mean_and_spread(found),
            "difference to AdamW": gap(found, base) if arm != "adamw" else "",
            "steps to AdamW's": ("" if arm == "adamw" else "not reached" if steps is None
                                 else f"{steps:,.0f} ({whole / steps:.2f}x)"),
            "time of a step": f"{ms:.0f} ms" + f" ({ms / base_ms - 1:+.0%})" * (arm != "adamw"),
            "win_rate at the end": win_rates(sweep)})
    return markdown(rows)


def ablation_table():
    fixed, steered, adamw = "SophiaG, ρ 0.05", "SophiaG, steered to 0.3", "AdamW"
    sweeps = {fixed: "half-sophiag", steered: "half-steered", adamw: "final-adamw"}
    rows = [(fixed, None), (steered, fixed)]
    for what, sweep, base in (
            ("steered, empirical Fisher (true labels)", "half-fisher", steered),
            ("steered, Hutchinson (Sophia-H)", "half-hutchinson", steered),
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


def rho_runs(arm):
    """Runs of an arm at each ρ, the one of the learning rate's grid among them."""
    runs = list(RUNS[f"small/rho-{arm}"])
    rate = runs[0]["learning_rate"]
    runs += [r for r in RUNS[f"small/lr-{arm}"] if r["learning_rate"] == rate]
    return sorted(runs, key=lambda r: r["rho"])


def rho_table():
    rows = []
    for fixed, steered in zip(rho_runs("sophiag"), rho_runs("steered")):
        end = CURVES[steered["sweep"], steered["run"]][-1]
        rows.append({"ρ at the start": f"{fixed['rho']:g}",
                     "fixed": f"{fixed['final_val_loss']:.4f}",
                     "win_rate at the end": f"{fixed['win_rate']:.2f}",
                     "steered to 0.3": f"{steered['final_val_loss']:.4f}",
                     "ρ at the end": f"{end[4]:.2f}"})
    return markdown(rows)


def new_figure(width=7.5):
    return Figure(figsize=(width, 3.2), dpi=160, layout="constrained")


def finish(axis, **labels):
    axis.set(**labels)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def plot_rates(size, axis):
    """Final loss against learning rate, a line an arm; the lowest is filled."""
    lowest = []
    for arm, name in ARMS.items():
        runs = sorted((r for sweep in RUNS if sweep.startswith(f"{size}/lr-{arm}")
                       for r in RUNS[sweep]), key=lambda r: r["learning_rate"])
        colour, marker, line = STYLES[arm]
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
    for arm, name in ARMS.items():
        sweep = f"{size}/final-{arm}"
        curves = np.array([CURVES[sweep, r["run"]] for r in RUNS[sweep]])   # (seed, evaluation, 5)
        iters, values = curves[0, :, 0], curves[:, :, column]
        if np.isnan(values[:, 1:]).all():
            continue
        colour, marker, line = STYLES[arm]
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
    for arm in "sophiag", "steered":
        runs, (colour, marker, line) = rho_runs(arm), STYLES[arm]
        axis.plot([r["rho"] for r in runs], [r["final_val_loss"] for r in runs], line, color=colour,
                  marker=marker, label=ARMS[arm])
    axis.set_xscale("log")
    finish(axis, xlabel="ρ at the start", ylabel="final val loss (nats/byte)")
    axis.legend(frameon=False)


def main():
    figure = new_figure()
    left, right = figure.subplots(1, 2)
    plot_rates("small", left)
    plot_curves("small", right, 2)
    finish(right, xlabel="steps", ylabel="val loss (nats/byte)", ylim=(1.5, 3))
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=4,
                  frameon=False)
    figure.savefig(os.path.join(RESULTS, "small.png"))
    figure = new_figure()
    left, right = figure.subplots(1, 2)
    plot_rho(left)
    plot_curves("small", right, 3)
    finish(right, xlabel="steps", ylabel="win_rate, mean and range of 3 seeds", ylim=(0, 0.5))
    figure.savefig(os.path.join(RESULTS, "rho.png"))
    final = final_table("small")
    insert(os.path.join(RESULTS, "README.md"),
           {"final": final, "rho": rho_table(), "ablations": ablation_table()})
    insert(os.path.join(os.path.dirname(RESULTS), "README.md"), {"final": final})


if __name__ == "__main__":
    main()
