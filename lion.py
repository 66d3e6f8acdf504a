"""
Lion: evolved sign momentum (Chen et al., arXiv 2302.06675, Algorithm 2). This file stands alone:
copy it into any project.
"""
import torch
from torch.optim import Optimizer


def lion(params, grads, exp_avgs, *, lr, beta1, beta2, weight_decay):
    """
    One update of lists of tensors, in place, in the paper's notation:

        theta <- theta - lr (sign(beta1 m + (1 - beta1) g) + lambda theta)
        m     <- beta2 m + (1 - beta2) g

    lr is a float or a 0-dim tensor.
    """
    torch._foreach_mul_(params, 1 - lr * weight_decay)
    update = torch._foreach_lerp(exp_avgs, grads, 1 - beta1)
    torch._foreach_sign_(update)
    torch._foreach_mul_(update, -lr)
    torch._foreach_add_(params, update)
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta2)


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

    State of a parameter: `exp_avg`. Nothing waits for the device, so a step can be captured in a
    CUDA graph as it is.
    """

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, *, maximize=False):
        if not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        for i, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
        if not weight_decay >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay,
                                      maximize=maximize))

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
            grads = [p.grad for p in params]
            if group["maximize"]:
                grads = torch._foreach_neg(grads)
            for p in params:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
            exp_avgs = [self.state[p]["exp_avg"] for p in params]
            beta1, beta2 = group["betas"]
            lion(params, grads, exp_avgs, lr=group["lr"], beta1=beta1, beta2=beta2,
                 weight_decay=group["weight_decay"])
        return loss
