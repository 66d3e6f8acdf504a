"""
Muon: momentum orthogonalized by Newton-Schulz iterations, for the matrices of hidden layers (Keller
Jordan, "Muon: An optimizer for hidden layers in neural networks", December 2024). Its scale is that
of Liu et al., "Muon is scalable for LLM training", arXiv 2502.16982.
"""
import math

import torch
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from sophia import apply_rule, parameters_and_gradients

NEWTON_SCHULZ, ITERATIONS = (3.4445, -4.7750, 2.0315), 5   # Jordan's


def nesterov(m, g, u, *, mu, skip=None):
    """
    m <- mu m + (1 - mu) g, then u <- mu m + (1 - mu) g, in place. The papers' sum mu m + g is
    1 / (1 - mu) times as large, which orthogonalization removes. If skip is 1, m stays.
    """
    g = g if skip is None else torch.where(skip > 0, m, g)
    m.add_((g - m).mul_(1 - mu))
    u.copy_(m + (g - m) * (1 - mu))


def orthogonalize(u):
    """Roughly U V^T for each matrix U S V^T in u (n, rows, columns): five quintic iterations bring
    most singular values between 0.7 and 1.2."""
    a, b, c = NEWTON_SCHULZ
    tall = u.shape[-2] > u.shape[-1]
    x = u / u.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)   # singular values of at most 1
    for _ in range(ITERATIONS):
        gram = x.mT @ x if tall else x @ x.mT   # the smaller of the two
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, *((x, polynomial) if tall else (polynomial, x)), beta=a)
    return x


def descend(theta, o, *, lr, decay):
    """theta <- decay theta - lr o, in place. decay is 1 - lr lambda, with lr before its scaling."""
    theta.mul_(decay).sub_(o * lr)


class Muon(Optimizer):
    """
    Muon for the matrices of hidden layers, and AdamW for embeddings, the head, norms and biases, in
    one optimizer:

        Muon([{"params": matrices}, {"params": others, "use_muon": False}], lr=6e-4)

    For a matrix theta (rows, columns) with gradient g and momentum m:

        m     <- mu m + (1 - mu) g
        o     =  orthogonalize(mu m + (1 - mu) g)
        theta <- theta (1 - lr lambda) - lr 0.2 sqrt(max(rows, columns)) o

    The scale gives o the root mean square of AdamW's updates, about 0.2, so AdamW's learning rate
    and weight decay suit both parts. torch.optim.Muon(adjust_lr_fn="match_rms_adamw") is the same
    without batches: here matrices of equal shape are orthogonalized in one. Products are bfloat16
    on a GPU. On a CPU they keep the parameters' dtype: not every CPU is fast in bfloat16.

    Args:
        params: parameter groups, or parameters, which must be matrices. A group with
            use_muon=False is AdamW's.
        lr (float or Tensor): learning rate of both.
        momentum: mu.
        betas: AdamW's.
        weight_decay: decoupled, of both.
        maximize: ascend instead of descend.
        fused: True compiles each elementwise part to one pass over memory. None does so on CUDA if
            Triton is installed. False never does. AdamW always uses PyTorch's fused step.

    State of a matrix: `exp_avg`. AdamW's: `step`, `exp_avg`, `exp_avg_sq`. A step does not wait for
    the device. As with torch.optim's fused optimizers, `step` changes nothing if the attribute
    `found_inf`, a 0-dim float tensor, is 1. Matrices sharded by FSDP2 are refused.
    """

    found_inf = None

    def __init__(self, params, lr=1e-3, momentum=0.95, betas=(0.9, 0.95), weight_decay=0.1, *,
                 maximize=False, fused=None):
        if not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        for i, beta in enumerate((momentum, *betas)):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid {('momentum', 'beta1', 'beta2')[i]}: {beta}")
        if not weight_decay >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        # capturable: a loaded state_dict keeps `step` on the device.
        super().__init__(params, dict(lr=lr, momentum=momentum, betas=betas, maximize=maximize,
                                      weight_decay=weight_decay, fused=fused, use_muon=True,
                                      capturable=True))

    def add_param_group(self, group):
        super().add_param_group(group)   # which fills in group's defaults
        for p in group["params"]:
            if group["use_muon"] and (p.ndim != 2 or hasattr(p, "to_local")):
                raise ValueError(f"Muon needs whole matrices and got a {type(p).__name__} of shape "
                                 f"{tuple(p.shape)}; put it into a group with use_muon=False")

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
            if group["maximize"] and params:
                grads = torch._foreach_neg(grads)
            update = self._update_matrices if group["use_muon"] else self._update_others
            update(group, params, grads)
        return loss

    def _state(self, params, *names):
        """A list of state tensors for each name, created if missing."""
        for p in params:
            for name in names:
                if name not in self.state[p]:
                    self.state[p][name] = (torch.zeros((), device=p.device) if name == "step"
                                           else torch.zeros_like(p))
        return ([self.state[p][name] for p in params] for name in names)

    def _update_matrices(self, group, params, grads):
        lr, skip = group["lr"], {}
        if self.found_inf is not None:
            lr, skip = lr * (1 - self.found_inf), {"skip": self.found_inf}
        by_shape = {}
        for row in zip(params, grads, *self._state(params, "exp_avg")):
            by_shape.setdefault((row[0].shape, row[0].device), []).append(row)
        for (shape, device), rows in by_shape.items():
            thetas, gs, ms = zip(*rows)
            dtype = torch.bfloat16 if device.type == "cuda" else thetas[0].dtype
            u = torch.empty(len(rows), *shape, dtype=dtype, device=device)
            apply_rule(nesterov, group["fused"], ms, gs, u.unbind(), mu=group["momentum"], **skip)
            apply_rule(descend, group["fused"], thetas, orthogonalize(u).unbind(),
                       lr=lr * (0.2 * math.sqrt(max(shape))),
                       decay=1 - lr * group["weight_decay"])

    def _update_others(self, group, params, grads):
        exp_avgs, exp_avg_sqs, steps = self._state(params, "exp_avg", "exp_avg_sq", "step")
        adamw(params, grads, exp_avgs, exp_avg_sqs, [], steps, fused=True, amsgrad=False,
              found_inf=self.found_inf, beta1=group["betas"][0], beta2=group["betas"][1],
              lr=group["lr"], weight_decay=group["weight_decay"], eps=1e-8, maximize=False)
