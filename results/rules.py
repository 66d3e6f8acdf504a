"""
The rules of RULES.md as code: the settings of each optimizer, and which runs come next. That
depends only on the results so far. A run's name is setting/piece/arm/value.
"""
import math
import statistics

ARMS = ("adamw", "lion", "sophiag", "steered", "sign")
# Where each arm's search starts: the best of a few pilot runs. warmup is a share of all steps.
# Memories are in steps: momentum 1 / (1 - beta1); second 1 / (1 - beta2), for SophiaG times k.
START = {
    "adamw": {"learning_rate": 8e-3, "momentum": 10, "warmup": 0.25, "second": 20},
    "lion": {"learning_rate": 1.6e-3, "momentum": 5, "warmup": 0.25, "second": 10},
    "sophiag": {"learning_rate": 3.2e-3, "rho": 0.2, "momentum": 10, "warmup": 0.25, "second": 100},
    "steered": {"learning_rate": 3.2e-3, "target_win_rate": 0.5, "momentum": 10, "warmup": 0.25,
                "second": 100},
    "sign": {"learning_rate": 1.6e-3, "momentum": 10, "warmup": 0.25}}
LIMITS = {"warmup": (0, 0.9), "momentum": (1, 1000), "target_win_rate": (0, 0.95)}
TRIALS = 20
TUNING_SEED, FINAL_SEEDS, MORE_SEEDS, RETUNING_SEEDS = 1, (2, 3, 4), (5, 6), (7, 8, 9)
HESSIAN_INTERVAL = 10
# Arms at 1,024 tokens per step that differ from an arm's tuned point, besides the learning rate:
# published constants, and a second statistic over as many tokens as at 8,192 per step.
VARIANTS = {"sophiag-published": {"momentum": 1 / 0.035, "second": 1000, "rho": 0.05},
            "lion-published": {"momentum": 20, "second": 50},
            "adamw-published": {"momentum": 10, "second": 20},
            "adamw-tokens": {"second": 80}}

# Words of train.py that turn base.py into another setting, and its number of steps.
SMALL_BATCH = ["--batch_size=4", "--total_batch_size=8", "--eval_iters=64"]
LARGE_BATCH = ["--batch_size=256", "--total_batch_size=256", "--eval_iters=2",
               "--deterministic=True"]
SETTINGS = {
    "8k": (["results/base.py"], 400),
    "1k": (["results/base.py", *SMALL_BATCH], 400),
    "1k-x4": (["results/base.py", *SMALL_BATCH], 1600),
    "1k-x16": (["results/base.py", *SMALL_BATCH], 6400),
    "3M": (["results/base.py", *SMALL_BATCH, "--n_layer=4", "--n_head=4", "--n_embd=256"], 800),
    "32k": (["results/base.py", *LARGE_BATCH], 400),
    "32k-seeds": (["results/base.py", *LARGE_BATCH], 400),   # learning rates of three seeds
    "8k-gpu": (["results/base.py", "--batch_size=64", "--deterministic=True"], 400),
    "quick": (["config/quickstart_sophiag.py"], 1200),   # all three differ only in the optimizer
}
# Values around the tuned point, each on the tuning seed.
SENSITIVITY = {
    "adamw": {"learning_rate": (0.25, 0.5, 2, 4), "momentum": (3, 5, 20, 40),
              "warmup": (0.025, 0.1)},
    "lion": {"learning_rate": (0.25, 0.5, 2, 4), "momentum": (3, 5, 20, 40)},
    "sophiag": {"rho": (0.02, 0.5, 2), "second": (10, 40, 100, 400, 1000)},
    "steered": {"learning_rate": (0.25, 0.5, 2, 4), "momentum": (3, 5, 20, 40),
                "second": (10, 40, 100, 400, 1000), "warmup": (0.025, 0.1),
                "target_win_rate": (0.05, 0.3, 0.7)}}
# Words that change the steered arm, or AdamW, at its tuned point.
ABLATIONS = {
    "k=1": ("steered", 1, []), "k=50": ("steered", 50, []),
    "hutchinson": ("steered", 10, ["--hessian_estimator=hutchinson"]),
    "empirical_fisher": ("steered", 10, ["--hessian_estimator=empirical_fisher"]),
    "shared_noise": ("steered", 10, []),
    "clip": ("adamw", 10, ["--grad_clip=0.16667"])}


def round2(value):
    return float(f"{value:.2g}")


def words(setting, arm, point, seed, steps=None, interval=HESSIAN_INTERVAL):
    """The command line of train.py for an arm at a point, which is a dict like START's."""
    flags, length = SETTINGS[setting]
    steps = steps or length
    optimizer = arm if arm in ("adamw", "lion") else "sophiag"
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
    return [*flags, f"--max_iters={steps}", f"--eval_interval={steps // 4}",
            f"--optimizer={optimizer}", *every,
            *(f"--{name}={value:g}" for name, value in settings.items()), f"--seed={seed}"]


class Study:
    """Plans runs from the rows of study.csv, {name: row}."""

    def __init__(self, rows):
        self.rows = rows
        self.plan = {}   # {name: words} of all runs whose settings are known so far

    def loss(self, name):
        """The final loss of a run: infinite if it diverged, None if it has not run yet."""
        row = self.rows.get(name)
        return None if row is None else float(row["final_val_loss"] or "inf")

    def add(self, name, words):
        """Plan a run. Returns its loss, or None if it has not run yet."""
        self.plan[name] = words
        return self.loss(name)

    def tuning(self, arm):
        """
        The arm's best point of TRIALS trials at the base setting, or None while one is missing.
        Coordinate search from START: each setting in turn goes up by a factor and, if that is no
        better, down. The factor is 2 in the first round and its root in each later one.
        """
        losses = {}   # by point

        def trial(point):
            """The loss of a point, None if it is not known yet, infinite if it was tried before."""
            key = tuple(point.values())
            if key in losses:
                return math.inf
            losses[key] = self.add(f"8k/tune/{arm}/{len(losses):02}",
                                   words("8k", arm, point, TUNING_SEED))
            return losses[key]

        best, factor = START[arm], 2.0
        best_loss = trial(best)
        while best_loss is not None:
            for name in best:
                for step in factor, 1 / factor:
                    if len(losses) == TRIALS:
                        return best
                    low, high = LIMITS.get(name, (0, math.inf))
                    value = round2(min(max(best[name] * step, low), high))
                    loss = trial({**best, name: value})
                    if loss is None:
                        return None
                    if loss < best_loss:
                        best, best_loss = {**best, name: value}, loss
                        break
            factor **= 0.5
        return None

    def learning_rates(self, setting, arm, point, seeds=(TUNING_SEED,)):
        """
        The point with its best learning rate by the mean loss over seeds, or None while a run is
        missing. Tries five values a factor of 2 apart around the point's own, and up to eight while
        the best is at an edge.
        """
        exponents = [-2, -1, 0, 1, 2]
        while True:
            losses = {}
            for e in exponents:
                lr = round2(point["learning_rate"] * 2.0**e)
                found = [self.add(
                    f"{setting}/lr/{arm}/{lr:g}" + f"/{seed}" * (len(seeds) > 1), words(
                        setting, arm.partition("-")[0], {**point, "learning_rate": lr}, seed))
                    for seed in seeds]
                losses[e] = lr, None if None in found else statistics.mean(found)
            if any(loss is None for _, loss in losses.values()):
                return None
            best = min(losses, key=lambda e: losses[e][1])
            if best not in (min(exponents), max(exponents)) or len(exponents) == 8:
                return {**point, "learning_rate": losses[best][0]}
            exponents.append(best + (1 if best > 0 else -1))

    def finals(self, setting, points):
        """Runs of every arm in points on the final seeds, and on two more where the gap to AdamW is
        below twice its standard error."""
        def loss_of(arm, seed):
            return self.add(f"{setting}/final/{arm}/{seed}",
                            words(setting, arm.partition("-")[0], points[arm], seed))

        losses = {arm: [loss_of(arm, seed) for seed in FINAL_SEEDS] for arm in points}
        for arm in points:
            found = *losses[arm], *losses["adamw"]
            if arm == "adamw" or None in found or math.inf in found:   # inf: a run diverged
                continue
            gaps = [a - b for a, b in zip(losses[arm], losses["adamw"])]
            if abs(statistics.mean(gaps)) < 2 * statistics.stdev(gaps) / len(gaps) ** 0.5:
                for seed in MORE_SEEDS:
                    loss_of("adamw", seed)
                    loss_of(arm, seed)

    def setting(self, setting, points, seeds=(TUNING_SEED,)):
        """Tune the learning rate of every arm again, then run the finals of each arm whose own and
        AdamW's are known. Returns the best points, or None while a run is missing."""
        found = {arm: self.learning_rates(setting, arm, point, seeds)
                 for arm, point in points.items()}
        best = {arm: point for arm, point in found.items() if point}
        if "adamw" in best:
            self.finals(setting, best)
        return best if len(best) == len(points) else None

    def sensitivity(self, points):
        for arm, changes in SENSITIVITY.items():
            for name, values in changes.items():
                for value in values:
                    if name == "learning_rate":
                        value = round2(value * points[arm][name])
                    self.add(f"8k/sensitivity/{arm}/{name}={value:g}", words(
                        "8k", arm, {**points[arm], name: value}, TUNING_SEED))

    def ablations(self, points):
        for name, (arm, interval, flags) in ABLATIONS.items():
            script = ["results/shared_noise.py"] if name == "shared_noise" else []
            for seed in FINAL_SEEDS:
                self.add(f"8k/ablation/{name}/{seed}", [*script, *words(
                    "8k", arm, points[arm], seed, interval=interval), *flags])

    def lengths(self, points):
        """Other numbers of steps, each with a full schedule of its own."""
        for arm in points:
            for steps in 200, 280, 340, 800:
                for seed in FINAL_SEEDS:
                    self.add(f"8k/steps={steps}/{arm}/{seed}",
                             words("8k", arm, points[arm], seed, steps))


def make_plan(rows):
    study = Study(rows)
    tuned = {arm: study.tuning(arm) for arm in ARMS}
    if None in tuned.values():   # no final before every arm is tuned
        return study

    def points(*arms):
        return {arm: tuned[arm] for arm in arms}

    variants = {arm: {**tuned[arm.partition("-")[0]], **VARIANTS[arm]} for arm in VARIANTS}
    study.finals("8k", tuned)
    small_batch = study.setting("1k", tuned | variants)
    for arm in "adamw", "lion", "steered":
        study.learning_rates("quick", arm, tuned[arm])
    study.lengths(points("adamw", "lion", "sophiag", "steered"))
    study.ablations(tuned)
    longer = study.setting("1k-x4", tuned | variants)
    study.sensitivity(tuned)
    if small_batch:
        study.setting("3M", {
            arm: small_batch[arm] for arm in ("adamw", "lion", "steered")})
    if longer:
        study.setting("1k-x16", {"adamw": longer["adamw-tokens"], **{arm: longer[arm] for arm in (
            "lion", "steered", "sophiag-published", "lion-published")}})
        study.learning_rates("1k-x16", "adamw-published", longer["adamw-published"])
    study.setting("32k", tuned)
    study.setting("32k-seeds", points("adamw", "lion", "sophiag", "steered"), RETUNING_SEEDS)
    study.finals("8k-gpu", points("adamw", "steered"))
    return study
