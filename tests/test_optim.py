"""Parameter groups, choice of the optimizer, learning rate schedule and statistics."""
import math

import pytest
import torch

from configurator import load_config
from model import GPT, GPTConfig
from optim import hessian_due, lr_at, make_optimizer, parameter_groups, statistics

SMALL = GPTConfig(vocab_size=65, block_size=8, n_layer=2, n_head=2, n_embd=16, bias=True)


def config(*words):
    return load_config(["--n_layer=2", "--n_head=2", "--n_embd=16", *words])


def test_weight_decay_applies_to_linear_layers_only_and_not_to_the_tied_head():
    model = GPT(SMALL)
    decay, rest = parameter_groups(model, 0.3)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in decay["params"]} == {
        f"transformer.h.{i}.{layer}.weight" for i in range(2)
        for layer in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    assert len(decay["params"]) + len(rest["params"]) == len(names)
    assert any(p is model.lm_head.weight for p in rest["params"])


@pytest.mark.parametrize("name, kind, betas, decay", [
    ("sophiag", "SophiaG", (0.965, 0.99), 0.2), ("adamw", "AdamW", (0.9, 0.95), 0.1),
    ("lion", "Lion", (0.95, 0.98), 0.6), ("muon", "Muon", (0.9, 0.95), 0.1)])
def test_each_optimizer_gets_its_published_settings(name, kind, betas, decay):
    optimizer = make_optimizer(config(f"--optimizer={name}"), GPT(SMALL), fused=False)
    assert type(optimizer).__name__ == kind
    group = optimizer.param_groups[0]
    assert group["betas"] == betas and group["weight_decay"] == decay and group["lr"] == 6e-4
    if name == "sophiag":   # B: tokens of the Hessian batch, half of the batch
        assert group["bs"] == 240 * 1024 and group["rho"] == 0.05
        other = config("--hessian_estimator=hutchinson", "--target_win_rate=0.3")
        group = make_optimizer(other, GPT(SMALL), fused=False).param_groups[0]
        assert group["bs"] == 1 and group["target_win_rate"] == 0.3


def test_the_learning_rate_warms_up_decays_as_a_cosine_and_stays_at_min_lr():
    cfg = config("--learning_rate=1.0", "--min_lr=0.1", "--warmup_iters=9", "--max_iters=50",
                 "--lr_decay_iters=29")
    assert lr_at(0, cfg) == pytest.approx(0.1) and lr_at(8, cfg) == pytest.approx(0.9)
    assert lr_at(9, cfg) == pytest.approx(1.0)
    for step in 14, 19, 24:
        wanted = 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 9) / 20)) / 2
        assert lr_at(step, cfg) == pytest.approx(wanted)
    assert lr_at(29, cfg) == lr_at(49, cfg) == pytest.approx(0.1)
    constant = config("--learning_rate=1.0", "--warmup_iters=0", "--decay_lr=False")
    assert lr_at(0, constant) == lr_at(99_999, constant) == 1.0


def test_the_hessian_is_due_every_k_steps_and_only_for_sophiag():
    due = [s for s in range(1, 31) if hessian_due(s, config("--hessian_interval=10"))]
    assert due == [10, 20, 30]
    assert not any(hessian_due(s, config("--optimizer=adamw")) for s in range(1, 31))


@pytest.mark.parametrize("name", ["sophiag", "adamw", "lion", "muon"])
def test_statistics_are_the_norms_of_parameters_and_state(name):
    model = GPT(SMALL)
    optimizer = make_optimizer(config(f"--optimizer={name}"), model, fused=False)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    if name == "sophiag":
        optimizer.update_hessian()
    found = statistics(optimizer)

    def norm(key):
        return torch.cat([s[key].flatten() for s in optimizer.state.values()]).norm()

    wanted = {"param_norm": torch.cat([p.detach().flatten() for p in model.parameters()]).norm(),
              "momentum_norm": norm("exp_avg")}
    if name == "sophiag":
        wanted |= {"hessian_norm": norm("hessian"), "train/win_rate": optimizer.win_rate()}
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value)
