"""
Tables and figures of the study from study.csv: writes results/*.png, and the tables into
results/README.md, between <!-- name --> and <!-- end -->.

    python results/report.py

A table or figure appears when its runs are done.
"""
import json
import os
import re
import statistics
from collections import Counter

import numpy as np
import study
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from rules import ABLATIONS, ARMS, FINAL_SEEDS, MORE_SEEDS, SENSITIVITY, make_plan, paired

RESULTS = os.path.dirname(os.path.abspath(__file__))
NAMES = {"adamw": "AdamW", "lion": "Lion", "muon": "Muon", "sophiag": "SophiaG, fixed ρ",
         "steered": "SophiaG, adapted ρ", "sign": "sign momentum (no Hessian)",
         "sophiag-published": "SophiaG, published constants",
         "lion-published": "Lion, published constants",
         "adamw-published": "AdamW, published constants"}
STYLES = {"adamw": ("#D55E00", "s", "--"), "lion": ("#009E73", "D", "-."),
          "sophiag": ("#0072B2", "o", "-"), "steered": ("#CC79A7", "^", ":"),
          "sign": ("#999999", "v", "--"), "muon": ("#000000", "X", "-")}
MISSING = "*Not run yet.*"
LENGTHS = {"8k": "400 x\n8,192", "1k": "1,600 x\n1,024", "1k-x4": "6,400 x\n1,024"}
SIZES = {"0.1M": "0.1M", "0.3M": "0.33M", "0.8M": "0.79M"}
TITLES = {"8k": "400 steps of 8,192 tokens", "1k": "1,600 steps of 1,024 tokens",
          "1k-x4": "6,400 steps of 1,024 tokens", "0.1M": "0.1M parameters, 1,600 steps",
          "0.3M": "0.33M parameters, 1,600 steps", "0.8M": "0.79M parameters, 1,600 steps"}
ABLATION_NAMES = {"k=1": "k = 1, same memory in steps", "k=50": "k = 50, same memory in steps",
                  "hutchinson": "Hutchinson's estimator (Sophia-H)",
                  "empirical_fisher": "empirical Fisher (true labels)",
                  "shared_noise": "all sequences share label noise"}
SETTING_NAMES = {"learning_rate": "learning rate", "momentum": "1 / (1 - β1), steps",
                 "second": "memory of the second statistic, steps", "rho": "ρ",
                 "target_win_rate": "target win_rate", "warmup": "warmup, share of steps"}
BIGRAM = 2.45   # nats per byte of val.bin, from train.bin's counts of byte pairs
SQRT = "1 / sqrt(width)"

ROWS = {row["name"]: row for row in study.read(study.RUNS)}
PLAN = make_plan(ROWS)


def losses(prefix):
    """{seed: final loss} of the runs PREFIX/SEED."""
    found = {seed: PLAN.loss(f"{prefix}/{seed}") for seed in FINAL_SEEDS + MORE_SEEDS}
    return {seed: loss for seed, loss in found.items() if loss is not None}


def done(prefix):
    return losses(prefix).keys() >= set(FINAL_SEEDS)


def show_gap(found, base):
    mean, error, certain = paired(found, base)
    bold = "**" * (certain and abs(mean) > 0.01)
    return f"{bold}{mean:+.4f}{bold} ± {error:.4f}"


def spread(found):
    values = np.array(list(found.values()))
    return f"{values.mean():.4f} ± {values.std(ddof=1):.4f}"


def value_of(prefix, setting):
    """A setting of the run PREFIX/SEED, from its words."""
    words = ROWS[f"{prefix}/{FINAL_SEEDS[0]}"]["words"].split()
    return next((w.partition("=")[2] for w in words if w.startswith(f"--{setting}=")), "")


def finals(setting):
    """The arms whose finals at a setting are all there, AdamW first."""
    return [arm for arm in NAMES if done(f"{setting}/final/{arm}")] \
        if done(f"{setting}/final/adamw") else []


def markdown(rows):
    lines = [dict(zip(rows[0], rows[0])), dict.fromkeys(rows[0], "---"), *rows]
    return "\n".join("| " + " | ".join(line.values()) + " |" for line in lines)


def points(setting):
    """The tuned point of each arm whose tuning is done."""
    return {arm: point for arm, point in PLAN.tuned.get(setting, {}).items() if point}


def tuned_table():
    columns = ("learning_rate", "momentum", "second", "warmup", "rho", "target_win_rate")
    return [{"": f"**{TITLES[setting]}**, {NAMES[arm]}" if arm == "adamw" else NAMES[arm],
             **{SETTING_NAMES[c]: f"{point[c]:g}" if c in point else "" for c in columns},
             "loss on seed 1": f"{PLAN.trial_loss(setting, arm, point):.4f}"}
            for setting in LENGTHS for arm, point in points(setting).items()]


def finals_table():
    rows = []
    for setting, title in TITLES.items():
        base = losses(f"{setting}/final/adamw")
        for arm in finals(setting):
            prefix = f"{setting}/final/{arm}"
            found, win_rate = losses(prefix), ROWS[f"{prefix}/{FINAL_SEEDS[0]}"]["win_rate"]
            rows.append({
                "": f"**{title}**, AdamW" if arm == "adamw" else NAMES[arm],
                "learning rate": value_of(prefix, "learning_rate"),
                "final val loss": spread(found),
                "difference to AdamW": "" if arm == "adamw" else show_gap(found, base),
                "seeds": str(len(found)),
                "win_rate at the end": f"{float(win_rate):.2f}" if win_rate else ""})
    return rows


def ablation_table():
    prefixes = {NAMES["sign"]: "1k/final/sign",
                **{ABLATION_NAMES[name]: f"1k/ablation/{name}" for name in ABLATIONS}}
    return [{"": title, "final val loss": spread(losses(prefix)),
             "difference to SophiaG, adapted ρ": show_gap(losses(prefix),
                                                          losses("1k/final/steered"))}
            for title, prefix in prefixes.items() if done(prefix) and done("1k/final/steered")]


def step_cost(arm):
    """Time of a step, Hessian updates included, relative to AdamW's; measured by bench.py."""
    name = arm if arm in ("lion", "muon") else "sophiag"
    with open(os.path.join(RESULTS, f"step-{name}.json"), encoding="utf-8") as file:
        times = {row["name"]: row["value"] for row in json.load(file)["rows"]}
    return times[f"whole step, {name}"] / times["whole step, adamw"]


def speedup_table():
    """Steps that AdamW needs for each arm's loss, interpolated in log steps between schedules of
    its own, over the arm's 400."""
    prefixes = {300: "8k/steps=300/adamw", 400: "8k/final/adamw", 600: "8k/steps=600/adamw",
                800: "8k/steps=800/adamw"}
    if not all(done(prefix) for prefix in prefixes.values()):
        return []
    curve = {steps: statistics.mean(losses(prefix)[seed] for seed in FINAL_SEEDS)
             for steps, prefix in prefixes.items()}
    lengths, found = np.log(list(curve)), np.array(list(curve.values()))
    rows = [{"": f"AdamW, {steps} steps", "final val loss": f"{loss:.4f}", "speed-up in steps": "",
             "time of a step": "", "speed-up in time": ""} for steps, loss in curve.items()]
    for arm in finals("8k"):
        if arm in ("lion", "sophiag", "steered", "muon"):
            own = statistics.mean(losses(f"8k/final/{arm}")[seed] for seed in FINAL_SEEDS)
            ratio = np.exp(np.interp(-own, -found, lengths)) / 400
            outside = "below " if own > found[0] else "above " if own < found[-1] else ""
            rows.append({"": NAMES[arm], "final val loss": f"{own:.4f}",
                         "speed-up in steps": f"{outside}{ratio:.2f}x",
                         "time of a step": f"{step_cost(arm):.2f}x",
                         "speed-up in time": f"{outside}{ratio / step_cost(arm):.2f}x"})
    return rows


def cost():
    machines = Counter(row["machine"] for row in ROWS.values()).most_common()
    hours = sum(float(row["seconds"]) for row in ROWS.values()) / 3600
    return (f"{len(ROWS)} runs took {hours:.1f} hours of training steps, one core or GPU each: "
            + ", ".join(f"{count} on {machine}" for machine, count in machines) + ".")


def new_axis(figure, rows, columns, index, x_label, **sharing):
    ax = figure.add_subplot(rows, columns, index, **sharing)
    ax.set(xlabel=x_label)
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def gap_figure():
    """Final loss minus AdamW's, against the length of the run and the size of the model."""
    panels = [({s: place for s, place in places.items() if finals(s)}, label) for places, label in (
        (LENGTHS, "length: steps x tokens per step"),
        (SIZES, "parameters (1,600 steps, 10 tokens per parameter)"))]
    panels = [panel for panel in panels if panel[0]]
    figure = Figure(figsize=(9, 4.2), dpi=160, layout="constrained")
    handles, ax = {}, None
    for i, (places, label) in enumerate(panels, 1):
        ax = new_axis(figure, 1, len(panels), i, label, sharey=ax)
        ax.set_xticks(range(len(places)), places.values())
        ax.set_xlim(-0.4, len(places) - 0.6)
        handles[NAMES["adamw"]] = ax.axhline(0, color=STYLES["adamw"][0], linestyle="--")
        if i == 1:
            ax.set_ylabel("loss minus AdamW's (nats/byte)")
        for number, arm in enumerate(ARMS[1:]):
            shift = 0.04 * (number - 2)   # so that error bars stay apart
            gaps = {x: paired(losses(f"{s}/final/{arm}"), losses(f"{s}/final/adamw"))
                    for x, s in enumerate(places) if arm in finals(s)}
            found = [(x + shift, mean, error) for x, (mean, error, _) in gaps.items()]
            if found:
                colour, marker, line = STYLES[arm]
                handles[NAMES[arm]] = ax.errorbar(*zip(*found), color=colour, marker=marker,
                                                  linestyle=line, capsize=3)
    figure.legend(handles.values(), handles.keys(), ncols=3, loc="outside upper center",
                  frameon=False)
    return figure


def gate_figure():
    """Validation loss of untuned runs; on the left also with GPT-2's initialization."""
    curves = {}
    for row in study.read(study.CURVES):
        if row["name"].startswith("gate/"):
            curves.setdefault(row["name"], []).append((int(row["iter"]), float(row["val_loss"])))
    figure = Figure(figsize=(9, 3.6), dpi=160, layout="constrained")
    for i, arms in enumerate((("adamw", "steered"), ARMS), 1):
        ax = new_axis(figure, 1, 2, i, "step")
        ax.axhline(BIGRAM, color="#999999", linewidth=1)
        ax.text(400, BIGRAM + 0.02, "bigram model", ha="right", color="#777777")
        for arm in arms:
            colour, _, line = STYLES[arm]
            label = NAMES[arm] + f", {SQRT}" * (i == 1)
            ax.plot(*zip(*curves[f"gate/{arm}"]), color=colour, linestyle=line, label=label)
            if i == 1:
                ax.plot(*zip(*curves[f"gate/{arm}-0.02"]), color=colour, linewidth=0.8,
                        linestyle=line, marker=".", label=f"{NAMES[arm]}, 0.02")
        ax.set(ylim=(1.2, 3.4), ylabel="validation loss (nats/byte)")
        ax.legend(frameon=False, fontsize=8)
    return figure


def changes_of(name):
    return next(changes[name] for changes in SENSITIVITY.values() if name in changes)


def sensitivity_lines(name):
    """{arm: [(value, loss minus the tuned point's)]} of the arms that varied a setting."""
    lines = {}
    for arm in SENSITIVITY:
        prefix = f"1k/sensitivity/{arm}/{name}="
        found = {float(n.removeprefix(prefix)): PLAN.loss(n) for n in ROWS if n.startswith(prefix)}
        if found:
            point = points("1k")[arm]
            best = PLAN.trial_loss("1k", arm, point)
            found[point[name]] = best
            lines[arm] = sorted((value, loss - best) for value, loss in found.items())
    return lines


def sensitivity_figure():
    """Loss minus the tuned point's against each setting, on seed 1."""
    names = dict.fromkeys(name for changes in SENSITIVITY.values() for name in changes)
    found = {name: lines for name in names if (lines := sensitivity_lines(name))}
    rows = -(-len(found) // 3)
    figure = Figure(figsize=(9, 2.8 * rows), dpi=160, layout="constrained")
    handles, ax = {}, None
    for i, (name, lines) in enumerate(found.items(), 1):
        ticks = [1e-4, 1e-3, 1e-2] if name == "learning_rate" else list(changes_of(name))
        ax = new_axis(figure, rows, 3, i, SETTING_NAMES[name], sharey=ax)
        ax.set_xscale("log")
        ax.set_xticks(ticks, [f"{t:,}" for t in ticks])
        ax.xaxis.set_minor_locator(NullLocator())
        for arm, line in lines.items():
            colour, marker, style = STYLES[arm]
            handles[NAMES[arm]], = ax.plot(*zip(*line), color=colour, marker=marker, markersize=4,
                                           linestyle=style)
        if i % 3 == 1:
            ax.set_ylabel("loss minus the tuned loss")
    figure.legend(handles.values(), handles.keys(), ncols=4, loc="outside upper center",
                  frameon=False)
    return figure


def fill(blocks):
    """Replace what stands between <!-- name --> and <!-- end --> by the block of that name."""
    path = os.path.join(RESULTS, "README.md")
    with open(path, encoding="utf-8") as file:
        text = file.read()
    for name, block in blocks.items():
        text = re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)",
                      lambda m, block=block: m[1] + block + "\n" + m[2], text, flags=re.S)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def main():
    tables = {"tuned": tuned_table(), "finals": finals_table(), "ablations": ablation_table(),
              "speedup": speedup_table()}
    blocks = {name: markdown(rows) if rows else MISSING for name, rows in tables.items()}
    figures = {"gap": (gap_figure, bool(finals("8k"))),
               "gate": (gate_figure, all(f"gate/{arm}" in ROWS for arm in ARMS)),
               "sensitivity": (sensitivity_figure, any("/sensitivity/" in n for n in ROWS))}
    for name, (draw, ready) in figures.items():
        blocks[name] = f"![{draw.__doc__}]({name}.png)" if ready else MISSING
        if ready:
            draw().savefig(os.path.join(RESULTS, f"{name}.png"))
    fill(blocks | {"cost": cost()})


if __name__ == "__main__":
    main()
