"""
Tables and figures of the study from study.csv: writes results/*.png, and the tables into
results/README.md and ../README.md, between <!-- name --> and <!-- end -->.

    python results/report.py

A table or figure appears when its runs are done.
"""
import json
import os
import re
import statistics

import numpy as np
import study
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from rules import ABLATIONS, ARMS, FINAL_SEEDS, MORE_SEEDS, SENSITIVITY, Study

RESULTS = os.path.dirname(os.path.abspath(__file__))
NAMES = {"adamw": "AdamW", "lion": "Lion", "sophiag": "SophiaG, fixed ρ",
         "steered": "SophiaG, adapted ρ", "sign": "sign momentum (no Hessian)",
         "sophiag-published": "SophiaG, published constants",
         "lion-published": "Lion, published constants",
         "adamw-published": "AdamW, published constants",
         "adamw-tokens": "AdamW, β2 scaled to the batch"}
STYLES = {"adamw": ("#D55E00", "s", "--"), "lion": ("#009E73", "D", "-."),
          "sophiag": ("#0072B2", "o", "-"), "steered": ("#CC79A7", "^", ":"),
          "sign": ("#999999", "v", "--"), "sophiag-published": ("#56B4E9", "P", "-"),
          "lion-published": ("#E69F00", "X", "-."), "adamw-published": ("#D55E00", "s", ":")}
MISSING = "*Not run yet.*"
TOKENS = {"1k": 1024, "8k": 8192, "32k-seeds": 32768}
LENGTHS = {"1k": 400, "1k-x4": 1600, "1k-x16": 6400}
TITLES = {"1k": "1,024 tokens per step, 400 steps", "8k": "8,192 tokens per step, 400 steps",
          "32k-seeds": "32,768 tokens per step, 400 steps",
          "32k": "32,768 tokens, learning rates of one seed", "1k-x4": "1,024 tokens, 1,600 steps",
          "1k-x16": "1,024 tokens, 6,400 steps", "3M": "3.1M parameters, 1,024 tokens, 800 steps"}
ABLATION_NAMES = {"k=1": "k = 1, same memory in steps", "k=50": "k = 50, same memory in steps",
                  "hutchinson": "Hutchinson's estimator (Sophia-H)",
                  "empirical_fisher": "empirical Fisher (true labels)",
                  "shared_noise": "all sequences share label noise",
                  "clip": "AdamW, gradient norm clipped at 1/6"}
SETTING_NAMES = {"learning_rate": "learning rate", "momentum": "1 / (1 - β1), steps",
                 "second": "memory of the second statistic, steps", "rho": "ρ",
                 "target_win_rate": "target win_rate", "warmup": "warmup, share of steps"}

ROWS = {row["name"]: row for row in study.read(study.RUNS)}
PLAN = Study(ROWS)


def losses(prefix):
    """{seed: final loss} of the runs PREFIX/SEED."""
    found = {seed: PLAN.loss(f"{prefix}/{seed}") for seed in FINAL_SEEDS + MORE_SEEDS}
    return {seed: loss for seed, loss in found.items() if loss is not None}


def done(prefix):
    return losses(prefix).keys() >= set(FINAL_SEEDS)


def gap(found, base):
    """(mean, standard error) of the differences paired by seed."""
    differences = np.array([found[seed] - base[seed] for seed in found if seed in base])
    return differences.mean(), differences.std(ddof=1) / len(differences) ** 0.5


def show_gap(found, base):
    mean, error = gap(found, base)
    counts = abs(mean) > 0.01 and abs(mean) > 2 * error
    return f"**{mean:+.4f}** ± {error:.4f}" if counts else f"{mean:+.4f} ± {error:.4f}"


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


def tuned_table():
    """The point that won each arm's trials."""
    points = {arm: PLAN.tuning(arm) for arm in ARMS}
    columns = ("learning_rate", "momentum", "second", "warmup", "rho", "target_win_rate")
    return [{"": NAMES[arm], **{SETTING_NAMES[c]: f"{point[c]:g}" if c in point else ""
                                for c in columns},
             "loss on seed 1": f"{min(PLAN.loss(n) for n in ROWS if f'8k/tune/{arm}/' in n):.4f}"}
            for arm, point in points.items() if point]


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


def short_table():
    """README's: the differences to AdamW at each setting."""
    settings = [s for s in TITLES if finals(s) and s != "32k"]   # 32k-seeds instead
    arms = ARMS[1:]
    rows = []
    for setting in settings:
        base = losses(f"{setting}/final/adamw")
        rows.append({"": TITLES[setting], "AdamW": spread(base), **{
            NAMES[arm]: show_gap(losses(f"{setting}/final/{arm}"), base)
            if arm in finals(setting) else "" for arm in arms}})
    return rows


def ablation_table():
    rows = []
    for name, (arm, *_) in ABLATIONS.items():
        base = losses(f"8k/final/{arm}")
        found = losses(f"8k/ablation/{name}")
        if done(f"8k/ablation/{name}"):
            rows.append({"": ABLATION_NAMES[name], "compared with": NAMES[arm],
                         "final val loss": spread(found), "difference": show_gap(found, base)})
    if done("8k/final/sign"):
        found, base = losses("8k/final/sign"), losses("8k/final/steered")
        rows.insert(0, {"": NAMES["sign"], "compared with": NAMES["steered"],
                        "final val loss": spread(found), "difference": show_gap(found, base)})
    return rows


def schedules(arm):
    """{steps: mean final loss} of an arm's schedules at 8,192 tokens per step."""
    prefixes = {steps: f"8k/steps={steps}/{arm}" for steps in (200, 280, 340, 800)}
    prefixes[400] = f"8k/final/{arm}"
    return {steps: statistics.mean(losses(prefix)[seed] for seed in FINAL_SEEDS)
            for steps, prefix in sorted(prefixes.items()) if done(prefix)}


def step_cost(arm):
    """Time of a step, Hessian updates included, relative to AdamW's; measured by bench.py."""
    name = "lion" if arm == "lion" else "sophiag"
    with open(os.path.join(RESULTS, f"step-{name}.json"), encoding="utf-8") as file:
        times = {row["name"]: row["value"] for row in json.load(file)["rows"]}
    return times[f"whole step, {name}"] / times["whole step, adamw"]


def speedup_table():
    """Final losses of other schedules; from AdamW's, interpolated in log steps, the speed-ups."""
    rows, adamw = [], schedules("adamw")
    for arm in ARMS:
        own = schedules(arm)
        if arm == "adamw" or len(own) < 4 or 800 not in adamw:
            continue
        lengths, found = np.log(list(adamw)), np.array(list(adamw.values()))
        steps = np.exp(np.interp(-own[400], -found, lengths))
        at_equal_time = np.interp(np.log(400 * step_cost(arm)), lengths, found)
        rows.append({"": NAMES[arm],
                     **{f"{n} steps": f"{own[n]:.4f}" if n in own else "" for n in adamw},
                     "speed-up in steps": f"{steps / 400:.2f}x",
                     "time of a step": f"{step_cost(arm):.2f}x",
                     "speed-up in time": f"{steps / 400 / step_cost(arm):.2f}x",
                     "difference at equal time": f"{own[400] - at_equal_time:+.4f}"})
    if rows:
        rows.insert(0, {**dict.fromkeys(rows[0], ""), "": "AdamW",
                        **{f"{n} steps": f"{adamw[n]:.4f}" for n in adamw}})
    return rows


def cost():
    on_cpu = [float(row["seconds"]) for row in ROWS.values() if "NVIDIA" not in row["machine"]]
    return (f"{len(ROWS)} runs. {len(on_cpu)} of them took {sum(on_cpu) / 3600:.1f} hours of "
            f"training steps on one core each; the others ran on a GPU.")


def panel(figure, rows, columns, index, x_label, ticks):
    ax = figure.add_subplot(rows, columns, index)
    ax.set(xscale="log", xlabel=x_label)
    ax.set_xticks(ticks, [f"{t:,}" for t in ticks])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def gap_figure():
    """Gap to AdamW against tokens per step, and against the number of steps."""
    panels = [(places, label, arms) for places, label, arms in (
        (TOKENS, "tokens per step (400 steps)", ARMS),
        (LENGTHS, "steps (1,024 tokens each)", ARMS),
        (LENGTHS, "steps, with published constants", [a for a in NAMES if "published" in a]))
        if any(len(finals(place)) > 1 for place in places)]
    figure = Figure(figsize=(3.6 * len(panels), 3.8), dpi=160, layout="constrained")
    handles = {}
    for i, (places, label, arms) in enumerate(panels, 1):
        ticks = list(places.values())
        ax = panel(figure, 1, len(panels), i, label, ticks)
        ax.set_xlim(ticks[0] / 1.5, ticks[-1] * 1.5)
        ax.axhline(0, color=STYLES["adamw"][0], linestyle="--", linewidth=1)
        if i == 1:
            ax.set_ylabel("loss minus AdamW's (nats/byte)")
        for number, arm in enumerate(arms):
            shift = 1.06 ** (number - 2)   # so that error bars stay apart
            points = [(x * shift, *gap(losses(f"{s}/final/{arm}"), losses(f"{s}/final/adamw")))
                      for s, x in places.items() if arm != "adamw" and arm in finals(s)]
            if points:
                colour, marker, line = STYLES[arm]
                xs, means, errors = zip(*points)
                handles[NAMES[arm]] = ax.errorbar(xs, means, errors, color=colour, marker=marker,
                                                  linestyle=line, capsize=3, label=NAMES[arm])
    figure.legend(handles.values(), handles.keys(), ncols=3, loc="outside upper center",
                  frameon=False)
    return figure


def changes_of(name):
    return next(changes[name] for changes in SENSITIVITY.values() if name in changes)


def sensitivity_lines(name):
    """{arm: [(value, loss minus the tuned point's)]} of the arms that varied a setting."""
    lines = {}
    for arm in SENSITIVITY:
        prefix = f"8k/sensitivity/{arm}/{name}="
        found = {float(n.removeprefix(prefix)): PLAN.loss(n) for n in ROWS if n.startswith(prefix)}
        if found:
            best = min(PLAN.loss(n) for n in ROWS if n.startswith(f"8k/tune/{arm}/"))
            found[PLAN.tuning(arm)[name]] = best
            lines[arm] = sorted((value, loss - best) for value, loss in found.items())
    return lines


def sensitivity_figure():
    """Loss minus the tuned point's against each setting, on seed 1."""
    names = dict.fromkeys(name for changes in SENSITIVITY.values() for name in changes)
    found = {name: lines for name in names if (lines := sensitivity_lines(name))}
    rows = -(-len(found) // 3)
    figure = Figure(figsize=(9, 2.8 * rows), dpi=160, layout="constrained")
    handles = {}
    for i, (name, lines) in enumerate(found.items(), 1):
        ticks = [1e-4, 1e-3, 1e-2] if name == "learning_rate" else list(changes_of(name))
        ax = panel(figure, rows, 3, i, SETTING_NAMES[name], ticks)
        for arm, line in lines.items():
            colour, marker, style = STYLES[arm]
            handles[NAMES[arm]], = ax.plot(*zip(*line), color=colour, marker=marker, markersize=4,
                                           linestyle=style)
        ax.set_ylim(-0.06, 1.35)
        if i % 3 == 1:
            ax.set_ylabel("loss minus the tuned loss")
    figure.legend(handles.values(), handles.keys(), ncols=4, loc="outside upper center",
                  frameon=False)
    return figure


def fill(path, blocks):
    """Replace what stands between <!-- name --> and <!-- end --> by the block of that name."""
    with open(path, encoding="utf-8") as file:
        text = file.read()
    for name, block in blocks.items():
        text = re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)",
                      lambda m, block=block: m[1] + block + "\n" + m[2], text, flags=re.S)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def main():
    tables = {"tuned": tuned_table(), "finals": finals_table(), "ablations": ablation_table(),
              "speedup": speedup_table(), "short": short_table()}
    blocks = {name: markdown(rows) if rows else MISSING for name, rows in tables.items()}
    figures = {"gap": (gap_figure, bool(finals("8k"))),
               "sensitivity": (sensitivity_figure, any("8k/sensitivity/" in n for n in ROWS))}
    for name, (draw, ready) in figures.items():
        blocks[name] = f"![{draw.__doc__}]({name}.png)" if ready else MISSING
        if ready:
            draw().savefig(os.path.join(RESULTS, f"{name}.png"))
    for path in "README.md", "../README.md":
        fill(os.path.join(RESULTS, path), blocks | {"cost": cost()})


if __name__ == "__main__":
    main()
