"""The optimizer: choice by name, parameter groups, schedule. No other file tests its name."""
import math

import torch
import torch.nn as nn

from lion import Lion
from muon import Muon
from sophia import SophiaG

# Tensors of state per parameter of each of parameter_groups.
STATE_TENSORS = {"sophiag": (2, 2), "adamw": (2, 2), "lion": (1, 1), "muon": (1, 2)}
MUON_ADAMW_BETA1 = 0.9   # of muon's AdamW; beta1 is Muon's momentum, beta2 that AdamW's


def parameter_groups(model, weight_decay):
    """Two groups: Linear weights decay; embeddings with the tied head, norms and biases do not."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)} - embeddings
    params = [p for p in model.parameters() if p.requires_grad]
    return [{"params": [p for p in params if id(p) in linear], "weight_decay": weight_decay},
            {"params": [p for p in params if id(p) not in linear], "weight_decay": 0.0}]


def make_optimizer(cfg, model, fused):
    """
    The optimizer cfg.optimizer over the model's parameters, already on their device. fused: compile
    the step of SophiaG, Lion or Muon; AdamW uses PyTorch's fused step.
    """
    groups = parameter_groups(model, cfg.weight_decay)
    common = dict(lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2))
    if cfg.optimizer == "sophiag":
        return SophiaG(groups, **common, rho=cfg.rho, fused=fused,
                       bs=cfg.hessian_tokens if cfg.squares_gradient else 1,
                       target_win_rate=cfg.target_win_rate)
    if cfg.optimizer == "lion":
        return Lion(groups, **common, fused=fused)
    if cfg.optimizer == "muon":
        matrices, others = groups
        return Muon([matrices, {**others, "use_muon": False}], lr=cfg.learning_rate,
                    momentum=cfg.beta1, betas=(MUON_ADAMW_BETA1, cfg.beta2), fused=fused)
    return torch.optim.AdamW(groups, **common, fused=True)


def resume_optimizer(optimizer, state):
    """Load a checkpoint's state with this run's settings, which the user may have changed."""
    for saved, own in zip(state["param_groups"], optimizer.state_dict()["param_groups"]):
        adapted = {"rho": saved["rho"]} if own.get("target_win_rate") else {}
        saved.update(own | adapted)
    optimizer.load_state_dict(state)


def hessian_due(step, cfg):
    """Whether a Hessian estimate follows update number `step`, from 1."""
    return cfg.optimizer == "sophiag" and step % cfg.hessian_interval == 0


def lr_at(step, cfg):
    """
    Learning rate of update number `step`, from 0: linear warmup from a value above zero, a cosine
    to min_lr at lr_decay_iters, then min_lr.
    """
    if step < cfg.warmup_iters:
        return cfg.learning_rate * (step + 1) / (cfg.warmup_iters + 1)
    if not cfg.decay_lr:
        return cfg.learning_rate
    if step >= cfg.lr_decay_iters:
        return cfg.min_lr
    progress = (step - cfg.warmup_iters) / (cfg.lr_decay_iters - cfg.warmup_iters)
    return cfg.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (cfg.learning_rate - cfg.min_lr)


@torch.no_grad()
def statistics(optimizer):
    """
    {name: 0-dim tensor} to log: norms of the parameters, of the momentum and, for SophiaG, of the
    Hessian, and train/win_rate. Does not wait for the device.
    """
    if isinstance(optimizer, SophiaG):
        found = optimizer.statistics()
        return {f"train/{name}" if name in ("win_rate", "rho") else name: value
                for name, value in found.items()}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    exp_avgs = [state["exp_avg"] for state in optimizer.state.values()]
    return {name: torch.stack(torch._foreach_norm(tensors)).norm()
            for name, tensors in (("param_norm", params), ("momentum_norm", exp_avgs))}
