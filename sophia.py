"""
SophiaG: second-order clipped stochastic optimization with the Gauss-Newton-Bartlett estimator
(Liu et al., arXiv 2305.14342, Algorithm 3). This file stands alone: copy it into any project.
"""
import warnings

import torch
from torch.optim import Optimizer

EPS = 1e-15          # keeps m / (rho B h) finite while h is zero
OFFICIAL_BS = 5120   # the official implementation's default, kept for those who never say


def sophiag(params, grads, exp_avgs, hessians, *, lr, beta1, rho, bs, weight_decay):
    """
    One update of lists of tensors, in place, in the paper's notation:

        theta <- theta (1 - lr lambda)
        m     <- beta1 m + (1 - beta1) g
        theta <- theta - lr clip(m / (rho B h + eps), 1)

    clip(x, 1) limits each coordinate to [-1, 1]; it equals the sign(m) min(|m| / (...), 1) of the
    official code because the denominator is positive. lr is a float or a 0-dim tensor.
    """
    torch._foreach_mul_(params, 1 - lr * weight_decay)
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    bound = torch._foreach_mul(hessians, rho * bs)
    torch._foreach_add_(bound, EPS)
    update = torch._foreach_div(exp_avgs, bound)
    torch._foreach_clamp_min_(update, -1.0)
    torch._foreach_clamp_max_(update, 1.0)
    torch._foreach_mul_(update, -lr)
    torch._foreach_add_(params, update)


class SophiaG(Optimizer):
    """
    Args:
        params: parameters or parameter groups.
        lr (float or Tensor): learning rate; it is also the largest change of a coordinate in one
            step, weight decay aside.
        betas: decay of exp_avg, the EMA m of gradients, and of hessian, the EMA h of squared
            sampled-label gradients.
        rho: clipping threshold. Larger rho clips fewer coordinates (see `win_rate`).
        weight_decay: decoupled, as in AdamW.
        bs (int): B, the number of labels (tokens, for a language model) behind each gradient
            given to `update_hessian`, summed over ranks and micro-batches. `step(bs=...)`
            overrides it.
        maximize: ascend instead of descend.
        capturable: keep the step counters on the parameters' device, as torch.optim does, so
            that a step can be captured in a CUDA graph (with lr a tensor, it can change there).

    State of a parameter: `step`, `exp_avg`, `hessian`. A state_dict of the official class loads.
    There is no bias correction; until the first `update_hessian` h is zero and a step is
    -lr sign(m).

        every step:     loss(x, y).backward();            optimizer.step()
        every k steps:  loss(x, sampled y).backward();    optimizer.update_hessian()
    """

    _hessian_in_use = False
    _warned = False

    def __init__(self, params, lr=1e-4, betas=(0.965, 0.99), rho=0.04, weight_decay=1e-1, *,
                 bs=None, maximize=False, capturable=False):
        if not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        for i, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
        if not rho >= 0.0:
            raise ValueError(f"Invalid rho parameter: {rho}")
        if not weight_decay >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        if bs is not None and not bs > 0:
            raise ValueError(f"Invalid bs (labels in a Hessian batch): {bs}")
        super().__init__(params, dict(lr=lr, betas=betas, rho=rho, weight_decay=weight_decay,
                                      bs=bs, maximize=maximize, capturable=capturable))

    def __setstate__(self, state):
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("bs", self.defaults.get("bs"))   # official checkpoints have none
            group.setdefault("maximize", False)
            group.setdefault("capturable", False)
        for p, s in self.state.items():
            if not torch.is_tensor(s["step"]):
                s["step"] = torch.tensor(float(s["step"]))
            s.setdefault("hessian", torch.zeros_like(p))      # official, before its first update
        self._hessian_in_use = any(bool(s["hessian"].any()) for s in self.state.values())

    def _tensors(self, group):
        """Lists (params, grads, exp_avgs, hessians, steps) of the parameters that have a gradient,
        whose state is made where there is none."""
        lists = [], [], [], [], []
        for p in group["params"]:
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                raise RuntimeError("SophiaG does not support sparse gradients")
            if torch.is_complex(p):
                raise RuntimeError("SophiaG does not support complex parameters")
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), device=p.device if group["capturable"] else "cpu")
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["hessian"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            values = p, p.grad, state["exp_avg"], state["hessian"], state["step"]
            for tensors, value in zip(lists, values):
                tensors.append(value)
        return lists

    def _bs(self, group, bs):
        bs = group["bs"] if bs is None else bs
        if bs is not None:
            return bs
        if self._hessian_in_use and not self._warned:
            self._warned = True
            warnings.warn(
                f"SophiaG: bs, the number of labels in a Hessian batch, was not given; using "
                f"{OFFICIAL_BS}. rho has its published meaning only with the true number: pass "
                f"SophiaG(..., bs=...) or step(bs=...).", stacklevel=4)
        return OFFICIAL_BS

    @torch.no_grad()
    def step(self, closure=None, bs=None):
        """Update the parameters from their gradients; returns the closure's loss, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params, grads, exp_avgs, hessians, steps = self._tensors(group)
            if not params:
                continue
            if group["maximize"]:
                grads = torch._foreach_neg(grads)
            torch._foreach_add_(steps, 1)
            sophiag(params, grads, exp_avgs, hessians, lr=group["lr"], beta1=group["betas"][0],
                    rho=group["rho"], bs=self._bs(group, bs), weight_decay=group["weight_decay"])
        return loss

    @torch.no_grad()
    def update_hessian(self):
        """
        h <- beta2 h + (1 - beta2) g*g, where the gradients now in .grad must be those of the mean
        cross-entropy against labels drawn from the model's own softmax (GNB, paper section 2.3).
        B g*g then estimates the Gauss-Newton diagonal without bias; B enters in `step`.
        """
        self._hessian_in_use = True
        for group in self.param_groups:
            _, grads, _, hessians, _ = self._tensors(group)
            if grads:
                beta2 = group["betas"][1]
                torch._foreach_mul_(hessians, beta2)
                torch._foreach_addcmul_(hessians, grads, grads, value=1 - beta2)

    @torch.no_grad()
    def win_rate(self, bs=None):
        """
        Proportion of coordinates whose update is not clipped, |m| < rho B h, as a 0-dim float32
        tensor on the parameters' device (no synchronization), or None before the first step.
        Larger rho gives a larger win_rate; healthy runs stay within 0.1 and 0.5 after an early
        peak. Some articles call it the clipped proportion, which is 1 - win_rate.
        """
        wins, total = [], 0
        for group in self.param_groups:
            states = [self.state[p] for p in group["params"] if p in self.state]
            if not states:
                continue
            threshold = group["rho"] * self._bs(group, bs)
            bounds = torch._foreach_mul([s["hessian"] for s in states], threshold)
            for bound, s in zip(bounds, states):
                wins.append((s["exp_avg"].abs() < bound).sum())
                total += bound.numel()
        return torch.stack(wins).sum().float() / total if wins else None
