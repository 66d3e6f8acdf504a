"""results/study.py: the plan follows the rules of results/RULES.md, whatever the runs give."""
import math
import sys
from collections import defaultdict

import pytest
from conftest import ROOT

from configurator import load_config

sys.path.append(str(ROOT / "results"))
import study  # noqa: E402


def loss(cfg):
    """Lowest at a learning rate of 1/3 percent for all, with a part that each beta1 has alone."""
    return abs(math.log(cfg.learning_rate / 3.3e-3)) + (1 - cfg.beta1 - 0.1) ** 2


@pytest.fixture(scope="module")
def steps():
    """[(what is planned, what has been run)] as the study goes on, with that loss for each run."""
    rows, steps = {}, []
    while True:
        plan = study.make_plan(rows).plan
        steps.append((plan, set(rows)))
        new = [name for name in plan if name not in rows]
        if not new:
            return steps
        for name in new[:7]:
            cfg = load_config([str(ROOT / plan[name][0]), *plan[name][1:]])
            rows[name] = {"final_val_loss": "" if "lion/03" in name else str(loss(cfg))}


def names(plan, *parts):
    return [name for name in plan if name.startswith("/".join(parts) + "/")]


def test_every_arm_has_as_many_trials_on_a_seed_that_is_no_finals(steps):
    plan = steps[-1][0]
    for arm in study.ARMS:
        trials = names(plan, "8k", "tune", arm)
        assert len(trials) == 20
        assert {plan[name][-1] for name in trials} == {"--seed=1"}
        assert len({tuple(plan[name]) for name in trials[:12]}) == 12


def test_no_final_is_planned_before_all_trials_are_run(steps):
    for plan, done in steps:
        if any("/final/" in name for name in plan):
            assert len([name for name in done if "/tune/" in name]) == 20 * len(study.ARMS)


def test_a_run_that_is_done_stays_as_it_was_planned(steps):
    for (plan, done), (later, _) in zip(steps, steps[1:]):
        assert all(later[name] == plan[name] for name in done & plan.keys())


def test_finals_are_at_the_best_of_at_least_five_learning_rates(steps):
    plan = steps[-1][0]
    for setting in "1k", "32k":
        for arm in study.ARMS:
            rates = defaultdict(list)
            for name in names(plan, setting, "lr", arm):
                cfg = load_config([str(ROOT / plan[name][0]), *plan[name][1:]])
                rates[loss(cfg)].append(cfg.learning_rate)
            finals = [plan[name] for name in names(plan, setting, "final", arm)]
            assert [words[-1] for words in finals] == ["--seed=2", "--seed=3", "--seed=4"]
            chosen = {load_config([str(ROOT / w[0]), *w[1:]]).learning_rate for w in finals}
            assert 5 <= len(names(plan, setting, "lr", arm)) <= 8
            assert chosen == {rates[min(rates)][0]}
