"""
Lion: evolved sign momentum (Chen et al., arXiv 2302.06675, Algorithm 2). It shares the fused step
of sophia.py.
"""
import torch
from torch.optim import Optimizer

from sophia import apply, has_triton, in_memory_order


def lion(theta, g, m, *, lr, beta1, beta2, decay, skip=None):
    """
    One update of a tensor theta and its EMA m, in place, in the paper's notation:

        theta <- theta - lr (sign(beta1 m + (1 - beta1) g) + lambda theta)
        m     <- beta2 m + (1 - beta2) g

    decay is 1 - lr lambda. Settings are floats or 0-dim tensors. Where skip is 1, m stays, and
    theta too if lr is 0 and decay 1.
    """
    difference = (g if skip is None else torch.where(skip > 0, m, g)) - m
    theta.mul_(decay).sub_((m + difference * (1 - beta1)).sign_().mul_(lr))
    m.add_(difference.mul_(1 - beta2))


class Lion(Optimizer):
    """
    Args:
        params: parameters or parameter groups.
        lr (float or Tensor): learning rate; every coordinate moves by exactly lr in each step,
            weight decay aside. The paper advises 3-10 times less than AdamW's.
        betas: weights of the interpolation and of the momentum. The paper uses (0.95, 0.98) for
            language models.
        weight_decay: decoupled; the paper advises 3-10 times AdamW's, so that lr * weight_decay
            stays.
        maximize: ascend instead of descend.
        fused: True runs each update as one pass over memory, compiled by torch.compile in seconds,
            once for all sizes; None does so on CUDA where Triton is installed; False never.

    State of a parameter: `exp_avg`. Nothing waits for the device, so a step can be captured in a
    CUDA graph as it is. As with torch.optim's fused optimizers, where an attribute `found_inf`, a
    0-dim float tensor, is 1, `step` changes nothing.
    """

    found_inf = None

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, *, maximize=False,
                 fused=None):
        if not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        for i, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
        if not weight_decay >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay,
                                      maximize=maximize, fused=fused))

    def __setstate__(self, state):
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("maximize", False)
            group["fused"] = self.defaults.get("fused")   # belongs to the machine, not the run

    @torch.no_grad()
    def step(self, closure=None):
        """Update the parameters from their gradients; returns the closure's loss, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            if any(p.grad.is_sparse for p in params):
                raise RuntimeError("Lion does not support sparse gradients")
            if any(torch.is_complex(p) for p in params):
                raise RuntimeError("Lion does not support complex parameters")
            grads = [in_memory_order(p.grad, p) for p in params]
            if group["maximize"]:
                grads = torch._foreach_neg(grads)
            for p in params:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
            exp_avgs = [self.state[p]["exp_avg"] for p in params]
            beta1, beta2 = group["betas"]
            fused = group["fused"]
            if fused is None:
                fused = has_triton() and all(p.is_cuda for p in params)
            lr, skip = group["lr"], {}
            if self.found_inf is not None:
                lr, skip = lr * (1 - self.found_inf), {"skip": self.found_inf}
            apply(lion, fused, params, grads, exp_avgs, lr=lr, beta1=beta1, beta2=beta2,
                  decay=1 - lr * group["weight_decay"], **skip)
        return loss
