"""results/rules.py plans what RULES.md says, whatever the runs give; study.py runs the plan."""
import math
import sys
from collections import defaultdict

import pytest
from conftest import ROOT

from configurator import load_config

sys.path.append(str(ROOT / "results"))
import rules  # noqa: E402
import study  # noqa: E402


def config(words):
    """The settings that a run's words give to train.py."""
    path, *rest = words[words[0] == "results/shared_noise.py":]
    return load_config([str(ROOT / path), *rest])


def loss(cfg):
    """Lowest at a learning rate of 1/3 percent for all, with a part that each beta1 has alone."""
    return abs(math.log(cfg.learning_rate / 3.3e-3)) + (1 - cfg.beta1 - 0.1) ** 2


@pytest.fixture(scope="module")
def steps():
    """[(what is planned, what has been run)] as the study goes on, with that loss for each run."""
    rows, steps = {}, []
    while True:
        plan = rules.make_plan(rows).plan
        steps.append((plan, set(rows)))
        new = [name for name in plan if name not in rows]
        if not new:
            return steps
        for name in new[:7]:
            found = str(loss(config(plan[name])))
            rows[name] = {"final_val_loss": "" if "lion/03" in name else found}


def names(plan, *parts):
    return [name for name in plan if name.startswith("/".join(parts) + "/")]


def test_every_arm_has_as_many_trials_on_a_seed_that_is_no_finals(steps):
    plan = steps[-1][0]
    for setting, trials in ("quick", 8), ("8k", 20), ("1k", 12), ("1k-x4", 8):
        arms = rules.ARMS if setting in ("8k", "1k") else ("adamw", "lion", "steered", "muon")
        assert {name.split("/")[2] for name in names(plan, setting, "tune")} == set(arms)
        for arm in arms:
            found = names(plan, setting, "tune", arm)
            assert len({tuple(plan[name]) for name in found}) == len(found) == trials
            assert {plan[name][-1] for name in found} == {"--seed=1"}


def test_the_gate_comes_before_tuning_and_tuning_before_finals(steps):
    assert all(name.startswith("gate/") for name in steps[0][0])
    for plan, done in steps:
        if names(plan, "8k", "tune"):
            assert len([name for name in done if name.startswith("gate/")]) == 8
        for setting in rules.TRIALS:
            if names(plan, setting, "final"):
                trials = names(plan, setting, "tune")
                assert done.issuperset(trials) and len(trials) >= 4 * rules.TRIALS[setting]


def test_a_run_that_is_done_stays_as_it_was_planned(steps):
    for (plan, done), (later, _) in zip(steps, steps[1:]):
        assert all(later[name] == plan[name] for name in done & plan.keys())


def test_finals_are_at_the_best_learning_rate(steps):
    plan = steps[-1][0]
    for setting in "8k", "1k", "1k-x4", "0.1M", "0.3M":
        for arm in "adamw", "steered", "muon":
            rates = defaultdict(set)
            for name in names(plan, setting, "lr", arm) + names(plan, setting, "confirm", arm):
                cfg = config(plan[name])
                assert cfg.seed in (7, 8)
                rates[cfg.learning_rate].add(cfg.seed)
            assert 3 <= len(rates) <= 8 and set(map(len, rates.values())) == {2}
            finals = [config(plan[name]) for name in names(plan, setting, "final", arm)]
            assert {cfg.seed for cfg in finals} >= {2, 3, 4}
            best = min(rates, key=lambda rate: abs(math.log(rate / 3.3e-3)))
            assert {cfg.learning_rate for cfg in finals} == {best}
    for arm in "adamw", "steered", "muon":   # the largest size keeps the points of the one before
        small, large = (config(plan[f"{setting}/final/{arm}/2"]) for setting in ("0.3M", "0.8M"))
        for setting in "learning_rate", "beta1", "beta2", "warmup_iters":
            assert getattr(large, setting) == getattr(small, setting)


def test_the_last_leaders_of_noisy_trials_are_compared_on_two_more_seeds():
    leaders = [{"learning_rate": 1e-3, "momentum": 10, "warmup": w} for w in (0.1, 0.2, 0.3, 0.4)]
    rows = {}
    plan = rules.Study(rows)
    assert plan.confirm("1k", "lion", leaders) == (None, None) and len(plan.plan) == 8
    for name, words in plan.plan.items():
        cfg = config(words)
        assert cfg.seed in (7, 8)
        rows[name] = {"final_val_loss": str(abs(cfg.warmup_iters / 1600 - 0.2) + cfg.seed)}
    assert plan.confirm("1k", "lion", leaders) == (leaders[1], 7.5)
    assert rules.Study(rows).confirm("8k", "lion", leaders) == (leaders[-1], None)


def test_a_close_gap_to_adamw_gets_two_more_seeds():
    losses = {"adamw": (1.30, 1.31, 1.32), "lion": (1.31, 1.29, 1.33), "sign": (1.40, 1.41, 1.42)}
    rows = {f"8k/final/{arm}/{seed}": {"final_val_loss": str(loss)}
            for arm, found in losses.items() for seed, loss in zip((2, 3, 4), found)}
    plan = rules.Study(rows)
    plan.finals("8k", {arm: {"learning_rate": 1e-3, "momentum": 10, "warmup": 0.1}
                       for arm in losses})
    assert set(plan.plan) - set(rows) == {f"8k/final/{arm}/{seed}"
                                          for arm in ("adamw", "lion") for seed in (5, 6)}


def test_a_diverged_final_stays_in_the_plan_without_more_seeds():
    rows = {f"8k/final/{arm}/{seed}": {"final_val_loss": "1.3"}
            for arm in ("adamw", "lion") for seed in (2, 3, 4)}
    rows["8k/final/lion/2"] = {"final_val_loss": ""}
    plan = rules.Study(rows)
    plan.finals("8k", {arm: {"learning_rate": 1e-3, "momentum": 10, "warmup": 0.1}
                       for arm in ("adamw", "lion")})
    assert plan.plan.keys() == rows.keys()


def test_memories_in_steps_become_betas():
    point = {"learning_rate": 1e-3, "momentum": 10, "second": 200, "warmup": 0.1}
    for arm, interval, beta2 in ("adamw", 10, 0.995), ("steered", 10, 0.95), ("steered", 50, 0.75):
        cfg = config(rules.words("8k", arm, point, 1, interval=interval))
        assert (cfg.beta1, cfg.beta2, cfg.warmup_iters) == (0.9, beta2, 40)


def test_a_run_of_an_earlier_plan_is_not_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "ROOT", tmp_path)
    monkeypatch.setattr(study.subprocess, "Popen", lambda *args, **kwargs: None)
    checkpoint = tmp_path / "out/study/8k/final/lion/2/ckpt.pt"
    study.start("8k/final/lion/2", ["--beta2=0.9", "--seed=2"])
    checkpoint.touch()
    study.start("8k/final/lion/2", ["--beta2=0.9", "--seed=2"])
    assert checkpoint.exists()
    study.start("8k/final/lion/2", ["--beta2=0.95", "--seed=2"])
    assert not checkpoint.exists()


def test_a_row_of_an_earlier_plan_is_refused(tmp_path, monkeypatch):
    lines = (ROOT / "results/study.csv").read_text().splitlines(keepends=True)
    changed = lines[1].replace("--seed=", "--seed=9")
    (tmp_path / "study.csv").write_text(lines[0] + changed + "".join(lines[2:]))
    monkeypatch.setattr(study, "RUNS", str(tmp_path / "study.csv"))
    with pytest.raises(SystemExit, match=f"^{lines[1].split(',')[0]}: .* delete its rows in"):
        study.main(["--commands"])


def test_the_committed_rows_are_those_of_the_plan():
    rows = {row["name"]: row for row in study.read(study.RUNS)}
    plan = {name: " ".join(words) for name, words in rules.make_plan(rows).plan.items()}
    assert {name: row["words"] for name, row in rows.items()}.items() <= plan.items()
