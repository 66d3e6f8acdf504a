"""
The rules of RULES.md as code: the settings of each optimizer, and which runs come next. That
depends only on the results so far. A run's name is setting/piece/arm/value.
"""
import math
import statistics

ARMS = ("adamw", "lion", "sophiag", "steered", "sign", "muon")
# The gate's points, where each arm's search starts: published constants of AdamW and Muon; for the
# others the memory that suits a few hundred steps. warmup is a share of all steps. Memories are in
# steps: momentum 1 / (1 - beta1); second 1 / (1 - beta2), for SophiaG times k.
START = {
    "adamw": {"learning_rate": 8e-3, "momentum": 10, "warmup": 0.1, "second": 20},
    "lion": {"learning_rate": 1.6e-3, "momentum": 10, "warmup": 0.1, "second": 20},
    "sophiag": {"learning_rate": 3.2e-3, "rho": 0.1, "momentum": 10, "warmup": 0.1, "second": 200},
    "steered": {"learning_rate": 3.2e-3, "target_win_rate": 0.5, "momentum": 10, "warmup": 0.1,
                "second": 200},
    "sign": {"learning_rate": 1.6e-3, "momentum": 10, "warmup": 0.1},
    "muon": {"learning_rate": 8e-3, "momentum": 20, "warmup": 0.1, "second": 20}}
LIMITS = {"warmup": (0, 0.9), "momentum": (1, 1000), "target_win_rate": (0, 0.95)}
TUNING_SEED, RATE_SEEDS, FINAL_SEEDS, MORE_SEEDS = 1, (7, 8), (2, 3, 4), (5, 6)
HESSIAN_INTERVAL = 10
# Half of a 95% confidence interval in standard errors, by the number of seeds (Student's t).
CONFIDENCE = {3: 4.30, 4: 3.18, 5: 2.78}
# Constants that arms with a tuned learning rate alone take from the papers.
PUBLISHED = {"adamw-published": {"momentum": 10, "second": 20},
             "lion-published": {"momentum": 20, "second": 50},
             "sophiag-published": {"momentum": 1 / 0.035, "second": 1000, "rho": 0.05}}

# Words of train.py that turn base.py into another setting, and its number of steps.
SMALL_BATCH = ["--batch_size=4", "--total_batch_size=8", "--eval_iters=64"]   # 1,024 tokens


def model(n_layer, n_head, n_embd):
    return [f"--n_layer={n_layer}", f"--n_head={n_head}", f"--n_embd={n_embd}",
            f"--init_std={n_embd**-0.5:.4f}"]


SETTINGS = {
    "8k": (["results/base.py"], 400),
    "1k": (["results/base.py", *SMALL_BATCH], 1600),
    "1k-x4": (["results/base.py", *SMALL_BATCH], 6400),
    # 10 tokens per parameter in 1,600 steps: 5, 16 and 38 sequences per step
    "0.1M": (["results/base.py", *model(2, 2, 64), "--batch_size=5", "--total_batch_size=5",
              "--eval_iters=103"], 1600),
    "0.3M": (["results/base.py", "--batch_size=16", "--total_batch_size=16", "--eval_iters=32"],
             1600),
    "0.8M": (["results/base.py", *model(4, 4, 128), "--batch_size=19", "--total_batch_size=38",
              "--eval_iters=14"], 1600),
    "quick": (["config/quickstart_sophiag.py"], 1200),   # all four differ only in the optimizer
}
TRIALS = {"quick": 8, "8k": 20, "1k": 12, "1k-x4": 8}
# How many points are compared on RATE_SEEDS: the last that led in noisy trials, two at 0.33M.
CONFIRMED = {"1k": 4, "1k-x4": 2, "0.3M": 2}
# Values around the tuned point at 1,024 tokens and 1,600 steps, each on the tuning seed.
SENSITIVITY = {
    "adamw": {"learning_rate": (0.25, 0.5, 2, 4), "momentum": (3, 5, 20, 40),
              "warmup": (0.02, 0.1, 0.3)},
    "lion": {"learning_rate": (0.25, 0.5, 2, 4), "momentum": (3, 5, 20, 40)},
    "sophiag": {"rho": (0.02, 0.5, 2)},
    "steered": {"learning_rate": (0.25, 0.5, 2, 4), "momentum": (3, 5, 20, 40),
                "second": (40, 400, 1600), "warmup": (0.02, 0.1, 0.3),
                "target_win_rate": (0.05, 0.3, 0.7)},
    "muon": {"learning_rate": (0.25, 0.5, 2, 4), "momentum": (3, 5, 20, 40)}}
# Interval and words that change the steered arm at its tuned point there.
ABLATIONS = {
    "k=1": (1, []), "k=50": (50, []),
    "hutchinson": (HESSIAN_INTERVAL, ["--hessian_estimator=hutchinson"]),
    "empirical_fisher": (HESSIAN_INTERVAL, ["--hessian_estimator=empirical_fisher"]),
    "shared_noise": (HESSIAN_INTERVAL, [])}


def round2(value):
    return float(f"{value:.2g}")


def words(setting, arm, point, seed, steps=None, interval=HESSIAN_INTERVAL, evaluations=4):
    """The command line of train.py for an arm at a point, which is a dict like START's."""
    flags, length = SETTINGS[setting]
    steps = steps or length
    optimizer = arm if arm in ("adamw", "lion", "muon") else "sophiag"
    point = dict(point)
    settings = {"learning_rate": point.pop("learning_rate"),
                "beta1": max(round(1 - 1 / point.pop("momentum"), 4), 0.0),
                "warmup_iters": round(point.pop("warmup") * steps)}
    if "second" in point:
        every = interval if optimizer == "sophiag" else 1
        settings["beta2"] = max(round(1 - every / point.pop("second"), 4), 0.0)
    settings |= point
    if arm == "sign":
        interval = 1000000   # h stays 0
    every = [f"--hessian_interval={interval}"] * (interval != HESSIAN_INTERVAL)
    return [*flags, f"--max_iters={steps}", f"--eval_interval={steps // evaluations}",
            f"--optimizer={optimizer}", *every,
            *(f"--{name}={value:g}" for name, value in settings.items()), f"--seed={seed}"]


def paired(found, base):
    """(mean, standard error, whether 0 is outside the 95% confidence interval) of the differences
    between losses {seed: loss}, over the seeds that both have."""
    gaps = [found[seed] - base[seed] for seed in found if seed in base]
    if not all(map(math.isfinite, gaps)):   # a run diverged
        return sum(gaps), math.nan, True
    mean, error = statistics.mean(gaps), statistics.stdev(gaps) / len(gaps) ** 0.5
    return mean, error, abs(mean) > CONFIDENCE[len(gaps)] * error


class Study:
    """Plans runs from the rows of study.csv, {name: row}."""

    def __init__(self, rows):
        self.rows = rows
        self.plan = {}   # {name: words} of all runs whose settings are known so far
        self.tuned = {}   # {setting: {arm: its tuned point, None while a run is missing}}

    def loss(self, name):
        """The final loss of a run: infinite if it diverged, None if it has not run yet."""
        row = self.rows.get(name)
        return None if row is None else float(row["final_val_loss"] or "inf")

    def add(self, name, words):
        """Plan a run. Returns its loss, or None if it has not run yet."""
        self.plan[name] = words
        return self.loss(name)

    def gate(self):
        """Whether the untuned runs are there. Two more show GPT-2's standard deviation of 0.02."""
        found = []
        for arm in ARMS:
            gate = words("8k", arm, START[arm], TUNING_SEED, evaluations=20)
            found.append(self.add(f"gate/{arm}", gate))
            if arm in ("adamw", "steered"):
                found.append(self.add(f"gate/{arm}-0.02", [*gate, "--init_std=0.02"]))
        return None not in found

    def tuning(self, setting, arm, start):
        """
        The points that led during the arm's TRIALS trials, the best last, or None while a trial is
        missing. Coordinate search from start: each setting in turn goes up by a factor and, if that
        is no better, down. The factor is 2 in the first round and its root in each later one.
        """
        losses = {}   # by point

        def trial(point):
            """The loss of a point, None if it is not known yet, infinite if it was tried before."""
            key = tuple(point.values())
            if key in losses:
                return math.inf
            losses[key] = self.add(f"{setting}/tune/{arm}/{len(losses):02}",
                                   words(setting, arm, point, TUNING_SEED))
            return losses[key]

        leaders, factor = [start], 2.0
        best_loss = trial(start)
        while best_loss is not None:
            for name in start:
                for step in factor, 1 / factor:
                    if len(losses) == TRIALS[setting]:
                        return leaders
                    low, high = LIMITS.get(name, (0, math.inf))
                    value = round2(min(max(leaders[-1][name] * step, low), high))
                    loss = trial({**leaders[-1], name: value})
                    if loss is None:
                        return None
                    if loss < best_loss:
                        leaders.append({**leaders[-1], name: value})
                        best_loss = loss
                        break
            factor **= 0.5
        return None

    def two_seeds(self, name, setting, arm, point):
        """The mean loss of a point over RATE_SEEDS, or None while a run is missing."""
        found = [self.add(f"{name}/{seed}", words(setting, arm.partition("-")[0], point, seed))
                 for seed in RATE_SEEDS]
        return None if None in found else statistics.mean(found)

    def confirm(self, setting, arm, leaders):
        """(point, its loss over RATE_SEEDS): the best of the last CONFIRMED leaders of the trials,
        or (None, None) while a run is missing. Where one is enough: the last, and None."""
        last = list(enumerate(leaders))[-CONFIRMED.get(setting, 1):]
        if len(last) == 1:
            return leaders[-1], None
        losses = [self.two_seeds(f"{setting}/confirm/{arm}/{i}", setting, arm, point)
                  for i, point in last]
        if None in losses:
            return None, None
        best = min(range(len(last)), key=losses.__getitem__)
        return last[best][1], losses[best]

    def learning_rate(self, setting, arm, point, factor=2**0.5, known=None):
        """
        The point with its best learning rate by the mean loss over RATE_SEEDS, or None while a run
        is missing. Tries the point's own, whose loss may be known, and its neighbours, a factor
        apart, and up to six while the best is at an edge.
        """
        exponents = [-1, 0, 1]
        while True:
            losses = {}
            for e in exponents:
                lr = round2(point["learning_rate"] * factor**e)
                losses[e] = lr, known if e == 0 and known else self.two_seeds(
                    f"{setting}/lr/{arm}/{lr:g}", setting, arm, {**point, "learning_rate": lr})
            if any(loss is None for _, loss in losses.values()):
                return None
            best = min(losses, key=lambda e: losses[e][1])
            if best not in (min(exponents), max(exponents)) or len(exponents) == 6:
                return {**point, "learning_rate": losses[best][0]}
            exponents.append(best + (1 if best > 0 else -1))

    def finals(self, setting, points):
        """Runs of every arm in points on the final seeds, and on two more where the sign of the gap
        to AdamW is not certain."""
        def loss_of(arm, seed):
            return self.add(f"{setting}/final/{arm}/{seed}",
                            words(setting, arm.partition("-")[0], points[arm], seed))

        losses = {arm: {seed: loss_of(arm, seed) for seed in FINAL_SEEDS} for arm in points}
        for arm in points:
            found = *losses[arm].values(), *losses["adamw"].values()
            if arm == "adamw" or None in found:
                continue
            if not paired(losses[arm], losses["adamw"])[2]:
                for seed in MORE_SEEDS:
                    loss_of("adamw", seed)
                    loss_of(arm, seed)

    def compare(self, setting, points, factor=2**0.5, known=None):
        """Choose every arm's learning rate on two more seeds, then run the finals. known: losses
        of the points on these seeds, by arm. Returns the points, or None while a run before the
        finals is missing."""
        found = {arm: self.learning_rate(setting, arm, point, factor, (known or {}).get(arm))
                 for arm, point in points.items()}
        if None in found.values():
            return None
        self.finals(setting, found)
        return found

    def length(self, setting, start):
        """Tune the arms in start and compare them. Returns the chosen points, or None while a run
        before the finals is missing."""
        leaders = {arm: self.tuning(setting, arm, point) for arm, point in start.items()}
        found = {arm: self.confirm(setting, arm, points) if points else (None, None)
                 for arm, points in leaders.items()}
        self.tuned[setting] = {arm: point for arm, (point, _) in found.items()}
        if None in self.tuned[setting].values():   # no final before every arm is tuned
            return None
        return self.compare(setting, self.tuned[setting],
                            known={arm: loss for arm, (_, loss) in found.items()})

    def trial_loss(self, setting, arm, point):
        """The loss of the trial at a point that led."""
        wanted = words(setting, arm, point, TUNING_SEED)
        return next(self.loss(name) for name, planned in self.plan.items()
                    if name.startswith(f"{setting}/tune/{arm}/") and planned == wanted)

    def published(self, points):
        """Compare the published constants, with the warmups in points, to AdamW."""
        found = {"adamw": points["adamw"]}
        for name, constants in PUBLISHED.items():
            point = points[name.partition("-")[0]]
            point = {k: point[k] for k in ("learning_rate", "warmup")} | constants
            found[name] = self.learning_rate("1k", name, point, 2)
        if None not in found.values():
            self.finals("1k", found)

    def sensitivity(self, points):
        for arm, changes in SENSITIVITY.items():
            for name, values in changes.items():
                for value in values:
                    if name == "learning_rate":
                        value = round2(value * points[arm][name])
                    self.add(f"1k/sensitivity/{arm}/{name}={value:g}", words(
                        "1k", arm, {**points[arm], name: value}, TUNING_SEED))

    def ablations(self, points):
        for name, (interval, flags) in ABLATIONS.items():
            script = ["results/shared_noise.py"] if name == "shared_noise" else []
            for seed in FINAL_SEEDS:
                self.add(f"1k/ablation/{name}/{seed}", [*script, *words(
                    "1k", "steered", points["steered"], seed, interval=interval), *flags])

    def schedules(self, point):
        """AdamW with other numbers of steps, each with a schedule of its own."""
        for steps in 300, 600, 800:
            for seed in FINAL_SEEDS:
                self.add(f"8k/steps={steps}/adamw/{seed}", words("8k", "adamw", point, seed, steps))


def make_plan(rows):
    study = Study(rows)
    if not study.gate():
        return study
    for arm in "adamw", "lion", "steered", "muon":
        study.tuning("quick", arm, START[arm])
    base = study.length("8k", START)
    if not base:
        return study
    medium = study.length("1k", base)
    if not medium:
        return study
    if not study.length("1k-x4", {a: medium[a] for a in ("adamw", "lion", "steered", "muon")}):
        return study
    sized = {arm: medium[arm] for arm in ("adamw", "steered", "muon")}
    study.schedules(base["adamw"])
    study.compare("0.1M", sized, factor=2)
    # AdamW's beta1 differs between 1,024 and 8,192 tokens per step, SophiaG's does not.
    longer = {**medium["adamw"], "momentum": base["adamw"]["momentum"]}
    point, loss = study.confirm("0.3M", "adamw", [longer, medium["adamw"]])
    larger = point and study.compare("0.3M", sized | {"adamw": point}, 2, {"adamw": loss})
    study.ablations(medium)
    study.sensitivity(study.tuned["1k"])   # on seed 1, like the trials
    study.published(medium)
    if larger:
        study.finals("0.8M", larger)
    return study
