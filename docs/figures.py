"""
Draw the figures of docs/: toy.png shows five optimizers on a loss with two parameters,
clipping.png which coordinates of a SophiaG run are clipped, quickstart.png the quickstart's curves.

    python docs/figures.py [out/quickstart-sophiag]
"""
import os
import sys

import numpy as np
import torch
from matplotlib.figure import Figure

DOCS = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(DOCS))
import checkpoint  # noqa: E402
from compare import read_run  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from optim import parameter_groups  # noqa: E402
from plot import COLOURS, VAL_LOSS, draw_panel, save_figure  # noqa: E402
from script import ArgumentParser, UserError, run_script  # noqa: E402
from sophia import SophiaG  # noqa: E402

STEPS, START = 40, (0.35, 0.0)
RATES = np.geomspace(0.01, 0.5, 21)
METHODS = ("gradient descent", "sign descent", "Adam", "Newton", "Sophia")
KINDS = {"token embedding": ".wte.", "position embedding": ".wpe.", "attention": ".attn.",
         "MLP": ".mlp.", "norms": ".ln_"}   # part of a parameter's name


def toy_loss(theta):
    """Sharp in x, with minima at -1 and 1 and a maximum at 0. Flat in y, with a minimum at 4."""
    x, y = theta
    return 4 * (x ** 2 - 1) ** 2 + 0.05 * (y - 4) ** 2


def toy_path(method, lr):
    """The points (STEPS + 1, 2) that a method visits from START. No method uses momentum, so they
    differ only in their step sizes. Newton ignores lr."""
    theta = torch.tensor(START, dtype=torch.float64, requires_grad=True)
    sophiag = dict(lr=lr, bs=1, betas=(0.0, 0.9), weight_decay=0.0, fused=False)
    optimizer = {
        "gradient descent": lambda: torch.optim.SGD([theta], lr=lr),
        "sign descent": lambda: SophiaG([theta], rho=0.0, **sophiag),
        "Adam": lambda: torch.optim.Adam([theta], lr=lr, betas=(0.0, 0.95)),
        "Newton": lambda: torch.optim.SGD([theta], lr=1.0),
        "Sophia": lambda: SophiaG([theta], rho=lr, **sophiag),   # unclipped: a Newton step
    }[method]()
    path = [theta.detach().numpy().copy()]
    for _ in range(STEPS):
        gradient = torch.autograd.grad(toy_loss(theta), theta)[0]
        curvature = torch.autograd.functional.hessian(toy_loss, theta).diagonal()
        if method == "Sophia":
            theta.grad = curvature
            optimizer.update_hessian(square=False)
        theta.grad = gradient / curvature if method == "Newton" else gradient
        optimizer.step()
        path.append(theta.detach().numpy().copy())
    return np.array(path)


def best_path(method):
    """The path at the learning rate of RATES with the lowest mean loss."""
    paths = [toy_path(method, lr) for lr in (RATES if method != "Newton" else [1.0])]
    with np.errstate(over="ignore", invalid="ignore"):   # high rates diverge
        means = [np.mean(toy_loss(path.T)) for path in paths]
    return paths[int(np.nanargmin(means))]


def draw_toy(path):
    figure = Figure(figsize=(9, 5.8), dpi=160, layout="constrained")
    axes = figure.subplots(2, 3).flatten()
    grid = np.meshgrid(np.linspace(-1.45, 1.45, 200), np.linspace(-0.4, 4.8, 200))
    losses = axes[5]
    for axis, method, colour in zip(axes, METHODS, COLOURS):
        points = best_path(method)
        axis.contourf(*grid, np.sqrt(toy_loss(grid)), 14, cmap="Greys", vmax=7)
        axis.plot(*points.T, "o-", color=colour, markersize=3.5, linewidth=1.3)
        axis.plot(*START, "s", color="black", markersize=6)
        axis.plot((-1, 1), (4, 4), "*", color="white", markeredgecolor="black", markersize=12)
        axis.set(title=method, xlim=(-1.45, 1.45), ylim=(-0.4, 4.8), xticks=(-1, 0, 1),
                 xlabel="sharp direction")
        losses.plot(np.maximum(toy_loss(points.T), 1e-9), color=colour, label=method,
                    linestyle=("-", "--", "-.", ":", "-")[METHODS.index(method)], linewidth=1.8)
    for axis in axes[0], axes[3]:
        axis.set_ylabel("flat direction")
    losses.set(title="loss", xlabel="steps", yscale="log", ylim=(1e-5, 2e3))
    losses.grid(alpha=0.3)
    losses.spines[["top", "right"]].set_visible(False)
    losses.legend(fontsize=8, frameon=False, ncols=2, loc="upper center", handlelength=2.6)
    save_figure(figure, path)


def clip_ratios(run_dir):
    """
    {kind of parameter: |m| / (rho B h) of its coordinates}, from the newest checkpoint of a run. A
    coordinate is clipped if its ratio is 1 or more.
    """
    path, _ = checkpoint.find_latest(run_dir)
    if path is None:
        raise UserError(f"no checkpoint in {run_dir}; to train one: python "
                        f"data/pystdlib/prepare.py && python train.py config/quickstart_sophiag.py")
    saved = checkpoint.load(path)
    if saved["config"]["optimizer"] != "sophiag":
        raise UserError(f"{path} was trained with {saved['config']['optimizer']}, which does not "
                        f"clip coordinates; give a SophiaG run")
    model = GPT(GPTConfig(**saved["model_args"]))
    names = {id(p): name for name, p in model.named_parameters()}
    found = {kind: [] for kind in KINDS}
    for group, ours in zip(saved["optimizer"]["param_groups"], parameter_groups(model, 0.0)):
        for index, p in zip(group["params"], ours["params"]):
            state = saved["optimizer"]["state"][index]
            bound = float(group["rho"]) * group["bs"] * state["hessian"].double().clamp(min=0)
            kind = next(k for k, part in KINDS.items() if part in names[id(p)])
            found[kind].append((state["exp_avg"].double().abs() / bound).flatten())
    return {kind: torch.cat(ratios).numpy() for kind, ratios in found.items()}


def draw_clipping(ratios, path):
    figure = Figure(figsize=(9, 3.7), dpi=160, layout="constrained")
    bars, densities = figure.subplots(1, 2, width_ratios=(1, 1.15))
    for y, (kind, ratio) in enumerate(ratios.items()):
        win_rate = np.mean(ratio < 1)
        bars.barh(y, win_rate, color=COLOURS[y], height=0.7)
        bars.barh(y, 1 - win_rate, left=win_rate, color="#DDDDDD", height=0.7)
        bars.text(0.98, y, f"{win_rate:.0%}", va="center", ha="right")
        logs = np.log10(np.clip(ratio, 1e-4, 1e4))
        density, edges = np.histogram(logs, bins=60, range=(-4, 4), density=True)
        densities.stairs(density, edges, color=COLOURS[y], label=kind, linewidth=1.8,
                         linestyle=("-", "--", "-.", ":", "-")[y])
    names = [f"{kind}\n{len(ratio):,}" for kind, ratio in ratios.items()]
    bars.set_yticks(range(len(ratios)), names)
    bars.invert_yaxis()
    bars.set(xlim=(0, 1), xlabel="proportion of coordinates", title="coloured: not clipped")
    bars.set_xticks(np.linspace(0, 1, 6), [f"{x:.0%}" for x in np.linspace(0, 1, 6)])
    densities.axvline(0, ymax=0.74, color="black", linewidth=1)
    densities.set(xlim=(-4, 4), xlabel=r"$|m|\,/\,(\rho B h)$", ylabel="density",
                  title="left of the line: not clipped")
    densities.set_xticks(range(-4, 5, 2), [f"$10^{{{x}}}$" for x in range(-4, 5, 2)])
    densities.set_ylim(0, 1.35 * densities.get_ylim()[1])
    densities.legend(fontsize=8, frameon=False, ncols=2, loc="upper center", handlelength=2.6)
    for axis in bars, densities:
        axis.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def draw_quickstart(folder, path):
    """Validation loss and win_rate of the quickstart runs in folder."""
    runs = []
    for name in "SophiaG", "AdamW", "Lion", "Muon":
        if os.path.isdir(run_dir := os.path.join(folder, f"quickstart-{name.lower()}")):
            runs.append(read_run(run_dir))
            runs[-1].name = name
    figure = Figure(figsize=(4.8, 5.2), dpi=160, layout="constrained")
    losses, win_rates = figure.subplots(2, 1, height_ratios=(1.5, 1))
    draw_panel(losses, runs, "iter", "val/loss", VAL_LOSS.replace("token", "byte"))
    draw_panel(win_rates, runs[:1], "iter", "train/win_rate", "SophiaG's win_rate")
    losses.legend(frameon=False)
    save_figure(figure, path)


def main(argv):
    parser = ArgumentParser(__doc__)
    parser.add_argument("run", nargs="?", default="out/quickstart-sophiag", help="of SophiaG")
    args = parser.parse_args(argv)
    ratios = clip_ratios(args.run)
    draw_toy(os.path.join(DOCS, "toy.png"))
    draw_clipping(ratios, os.path.join(DOCS, "clipping.png"))
    draw_quickstart(os.path.dirname(os.path.normpath(args.run)),
                    os.path.join(DOCS, "quickstart.png"))


if __name__ == "__main__":
    run_script(main)
