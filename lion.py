"""Lion: evolved sign momentum (Chen et al., arXiv 2302.06675, Algorithm 2)."""
import torch
from torch.optim import Optimizer

from sophia import apply_rule, parameters_and_gradients


def lion(theta, g, m, *, lr, beta1, beta2, decay, skip=None):
    """
    One update of a tensor theta and its EMA m, in place, in the paper's notation:

        theta <- theta - lr (sign(beta1 m + (1 - beta1) g) + lambda theta)
        m     <- beta2 m + (1 - beta2) g

    decay is 1 - lr lambda. Settings are floats or 0-dim tensors. If skip is 1, m does not change;
    theta does not either if lr is 0 and decay 1.
    """
    difference = (g if skip is None else torch.where(skip > 0, m, g)) - m
    theta.mul_(decay).sub_((m + difference * (1 - beta1)).sign_().mul_(lr))
    m.add_(difference.mul_(1 - beta2))


class Lion(Optimizer):
    """
    Args:
        params: parameters or parameter groups.
        lr (float or Tensor): learning rate; every coordinate moves by exactly lr per step, apart
            from weight decay. The paper advises 3-10 times less than AdamW's.
        betas: for the update and for the momentum. The paper's language models use (0.95, 0.98).
        weight_decay: decoupled. The paper advises 3-10 times AdamW's, which keeps
            lr * weight_decay the same.
        maximize: ascend instead of descend.
        fused: True compiles each update to one pass over memory; torch.compile takes seconds, once
            for all sizes. None does so on CUDA if Triton is installed. False never does.

    State of a parameter: `exp_avg`. A step does not wait for the device, so a CUDA graph can
    capture it. As with torch.optim's fused optimizers, `step` changes nothing if the attribute
    `found_inf`, a 0-dim float tensor, is 1.
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
            group["fused"] = self.defaults.get("fused")   # depends on the machine, not the run

    @torch.no_grad()
    def step(self, closure=None):
        """Update the parameters from their gradients; returns the closure's loss, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params, grads = parameters_and_gradients(group)
            if not params:
                continue
            if group["maximize"]:
                grads = torch._foreach_neg(grads)
            for p in params:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
            exp_avgs = [self.state[p]["exp_avg"] for p in params]
            beta1, beta2 = group["betas"]
            lr, skip = group["lr"], {}
            if self.found_inf is not None:
                lr, skip = lr * (1 - self.found_inf), {"skip": self.found_inf}
            apply_rule(lion, group["fused"], params, grads, exp_avgs, lr=lr, beta1=beta1,
                       beta2=beta2, decay=1 - lr * group["weight_decay"], **skip)
        return loss
