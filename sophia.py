"""
SophiaG: second-order clipped stochastic optimization with the Gauss-Newton-Bartlett estimator
(Liu et al., arXiv 2305.14342, Algorithm 3). This file needs only PyTorch: copy it anywhere.
"""
import functools
import importlib.util
import warnings

import torch
from torch.optim import Optimizer
from torch.utils.dlpack import from_dlpack, to_dlpack

OFFICIAL_BS = 5120   # the official implementation's default for bs
LOWEST_RHO, HIGHEST_RHO, LARGEST_FACTOR = 1e-4, 1e2, 10.0   # limits of target_win_rate


def sophiag(theta, g, m, h, *, lr, beta1, rho_b, decay, skip=None):
    """
    One update of a tensor theta and its EMA m, in place, in the paper's notation:

        m     <- beta1 m + (1 - beta1) g
        theta <- theta (1 - lr lambda)
        theta <- theta - lr clip(m / (rho B h + eps), 1)

    clip(x, 1) limits a coordinate to [-1, 1], which equals the official code's
    sign(m) min(|m| / (...), 1). eps keeps the ratio finite while h is zero. A negative h, which
    Hutchinson's estimator can give, counts as zero, as in the paper: max(rho h, eps).
    rho_b is rho B and decay is 1 - lr lambda, precomputed because a compiled loop would repeat the
    multiplication per vector. Settings are floats or 0-dim tensors. If skip is 1, m does not
    change; theta does not either if lr is 0 and decay 1.
    """
    g = g if skip is None else torch.where(skip > 0, m, g)
    m.add_((g - m).mul_(1 - beta1))
    bound = (h * rho_b).clamp_(min=0).add_(1e-15)   # Hutchinson's h may be negative
    theta.mul_(decay).sub_((m / bound).clamp_(-1, 1).mul_(lr))


def average_hessian(h, estimate, *, beta2, skip=None):
    """h <- beta2 h + (1 - beta2) estimate, in place; no change if skip is 1."""
    estimate = estimate if skip is None else torch.where(skip > 0, h, estimate)
    h.add_((estimate - h).mul_(1 - beta2))


def update_hessian(h, g, **settings):
    """h <- beta2 h + (1 - beta2) g g, in place; no change if skip is 1."""
    average_hessian(h, g * g, **settings)


def statistics(theta, m, h, *, rho_b):
    """(4,): the number of coordinates with |m| < rho B h; sums of squares of theta, m and h."""
    wins = (m.abs() < h * rho_b).float()
    terms = [wins, *(t.float().square() for t in (theta, m, h))]
    if theta.numel() % 256 == 0:   # compiled, two-level sums are 1.4x faster on a 2-core CPU
        terms = [t.reshape(-1, 256).sum(1) for t in terms]
    return torch.stack([t.sum() for t in terms])


@functools.cache
def compiled(rule, rows):
    """The rule, compiled for `rows` rows per call and tensors of any length."""
    def rule_for_rows(rows, settings):
        return [rule(*row, **settings) for row in rows]

    # Fusing rows into one loop was slower than one loop per row.
    options = {"cpp.max_horizontal_fusion_size": 1} if rows > 1 else None
    # A code object of its own, hence its own recompile limit.
    rule_for_rows.__code__ = rule_for_rows.__code__.replace()
    return torch.compile(rule_for_rows, dynamic=True, fullgraph=True, options=options)


def local_shard(t):
    """This rank's shard of a DTensor (FSDP2): updates are elementwise. Other tensors unchanged."""
    return t.to_local() if hasattr(t, "to_local") else t


def parameters_and_gradients(group):
    """The group's parameters that have a gradient, and the gradients with the parameters' strides.
    Raises RuntimeError if one is sparse or complex."""
    params = [p for p in group["params"] if p.grad is not None]
    if any(p.grad.is_sparse or torch.is_complex(p) for p in params):
        raise RuntimeError("sparse gradients and complex parameters are not supported")
    return params, [p.grad if p.grad.stride() == p.stride() else torch.empty_like(p).copy_(p.grad)
                    for p in params]


def same_strides(row):
    """Whether the row's tensors have equal strides and no gaps in memory."""
    return (all(t.stride() == row[0].stride() for t in row)
            and torch.ops.aten.is_non_overlapping_and_dense(row[0]))


def flattened(t):
    """t's memory as a tensor (numel,), but not as a view: torch.compile would specialize on the
    offset of a view, such as a gradient's in its DDP bucket."""
    return from_dlpack(to_dlpack(t.detach().as_strided((t.numel(),), (1,))))


def apply_rule(rule, fused, *lists, unroll=True, **settings):
    """
    [rule(*row, **settings) for row in zip(*lists)], in another order and without empty rows. fused:
    compile the rule to one pass over memory; None does so on CUDA if Triton is installed. Settings
    become tensors then, since each new float would trigger a recompile. unroll: four tensors of
    equal length share a call, which costs 100 us on a CPU.
    """
    rows = [[local_shard(t) for t in row] for row in zip(*lists)]
    if fused is None:
        fused = has_triton() and all(row[0].is_cuda for row in rows)
    eager = [row for row in rows if not (fused and same_strides(row))]
    if fused and eager:
        warn_once("some parameters have gaps in memory, or strides unlike their state's; slower, "
                  "uncompiled operations update them")
    results = [rule(*row, **settings) for row in eager if row[0].numel()]
    if len(eager) == len(rows):
        return results
    precise = torch.promote_types(rows[0][0].dtype, torch.float32)
    tensors = {name: torch.as_tensor(value, dtype=precise) for name, value in settings.items()}
    by_length = {}
    for row in rows:
        if row[0].numel() and same_strides(row):
            by_length.setdefault(row[0].numel(), []).append([flattened(t) for t in row])
    for rows in by_length.values():
        while rows:
            n = 4 if unroll and len(rows) >= 4 else 1
            first, rows = rows[:n], rows[n:]
            try:
                results += compiled(rule, n)(first, tensors)
            except torch._dynamo.exc.FailOnRecompileLimitHit:
                warn_once("torch.compile reached its recompile limit; slower, uncompiled "
                          "operations take over. TORCH_LOGS=recompiles shows the cause")
                results += [rule(*row, **tensors) for row in first]
    return results


def sum_over_shards(values, layout):
    """Sum over ranks of values computed on shards of DTensors with this layout, (device mesh,
    placements). Unchanged if layout is None."""
    if layout is None:
        return values
    from torch.distributed.tensor import DTensor, Partial, Replicate  # slow to import
    mesh, placements = layout
    kinds = [Partial() if placement.is_shard() else Replicate() for placement in placements]
    return DTensor.from_local(values, mesh, kinds).full_tensor()


@functools.cache
def warn_once(text):
    warnings.warn(f"fused optimizer: {text}", stacklevel=4)


@functools.cache
def has_triton():
    return importlib.util.find_spec("triton") is not None


class SophiaG(Optimizer):
    """
    Args:
        params: parameters or parameter groups.
        lr (float or Tensor): learning rate. Without decay, no coordinate changes by more per step.
        betas: decay rates of the EMAs of gradients, m, and of squared sampled-label gradients, h.
        rho: clipping threshold. A larger rho clips fewer coordinates (see `win_rate`). With
            target_win_rate, the initial value.
        weight_decay: decoupled, as in AdamW.
        bs (int): B, the number of labels (for a language model, tokens) per gradient given to
            `update_hessian`, over all ranks and micro-batches. `step(bs=...)` overrides it.
        maximize: ascend instead of descend.
        capturable: keep the step counters on the parameters' device, as in torch.optim, so that a
            CUDA graph can capture a step. With lr a tensor, the graph follows its changes.
        fused: True compiles each update to one pass over memory; torch.compile takes seconds, once
            for all sizes. None does so on CUDA if Triton is installed. False never does.
        target_win_rate (float): None or 0 keeps rho fixed. Otherwise each `update_hessian` does
                rho <- rho target_win_rate / win_rate
            by a factor of at most 10, within 1e-4 and 100. rho is then a tensor in the parameter
            groups. It does not overshoot if m's density is highest at zero, since win_rate then
            grows at most as fast as rho. Needs bs. A loaded state_dict sets rho; this argument
            alone decides whether rho adapts.

    State of a parameter: `step`, `exp_avg`, `hessian`. A state_dict of the official class loads.
    No bias correction. Until the first `update_hessian`, h is zero and a step is -lr sign(m).

    As with torch.optim's fused optimizers, `step` and `update_hessian` change nothing if the
    attribute `found_inf`, a 0-dim float tensor, is 1. They do not wait for the device.

        every step:     loss(x, y).backward();            optimizer.step()
        every k steps:  loss(x, sampled y).backward();    optimizer.update_hessian()
    """

    _hessian_in_use = False
    _warned = False
    found_inf = None

    def __init__(self, params, lr=1e-4, betas=(0.965, 0.99), rho=0.04, weight_decay=1e-1, *,
                 bs=None, maximize=False, capturable=False, fused=None, target_win_rate=None):
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
        if target_win_rate and not (0.0 < target_win_rate < 1.0 and bs is not None):
            raise ValueError(f"Invalid target_win_rate: {target_win_rate}; it must be below 1 and "
                             f"needs bs, which is {bs}")
        super().__init__(params, dict(lr=lr, betas=betas, rho=rho, weight_decay=weight_decay,
                                      bs=bs, maximize=maximize, capturable=capturable,
                                      fused=fused, target_win_rate=target_win_rate))

    def __setstate__(self, state):
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("bs", self.defaults.get("bs"))   # official checkpoints have none
            group.setdefault("maximize", False)
            group.setdefault("capturable", False)
            group["fused"] = self.defaults.get("fused")       # depends on the machine, not the run
            group["target_win_rate"] = self.defaults.get("target_win_rate")
        for p, s in self.state.items():
            if not torch.is_tensor(s["step"]):
                s["step"] = torch.tensor(float(s["step"]))
            s.setdefault("hessian", torch.zeros_like(p))   # official, before its first update
        self._hessian_in_use = any(bool(local_shard(s["hessian"]).any())
                                   for s in self.state.values())

    def _state(self, params, group):
        """A list of the parameters' tensors for each of step, exp_avg and hessian, created if
        missing."""
        for p in params:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), device=p.device if group["capturable"] else "cpu")
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["hessian"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return ([self.state[p][name] for p in params] for name in ("step", "exp_avg", "hessian"))

    def _rho(self, group):
        """The group's rho; if it adapts, a tensor on the parameters' device, created here once."""
        if group["target_win_rate"]:
            group["rho"] = torch.as_tensor(group["rho"], dtype=torch.float32,
                                           device=group["params"][0].device)
        return group["rho"]

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
            params, grads = parameters_and_gradients(group)
            if not params:
                continue
            if group["maximize"]:
                grads = torch._foreach_neg(grads)
            steps, exp_avgs, hessians = self._state(params, group)
            torch._foreach_add_(steps, 1)
            lr, skip = group["lr"], {}
            if self.found_inf is not None:
                lr, skip = lr * (1 - self.found_inf), {"skip": self.found_inf}
            apply_rule(sophiag, group["fused"], params, grads, exp_avgs, hessians, lr=lr,
                       beta1=group["betas"][0], rho_b=self._rho(group) * self._bs(group, bs),
                       decay=1 - lr * group["weight_decay"], **skip)
        return loss

    @torch.no_grad()
    def update_hessian(self, square=True):
        """
        h <- beta2 h + (1 - beta2) g*g. The gradient g in .grad must be that of the mean
        cross-entropy against labels sampled from the model's own softmax (GNB, paper section 2.3).
        B g*g is then an unbiased estimate of the Gauss-Newton diagonal; `step` multiplies by B.
        square=False: h <- beta2 h + (1 - beta2) .grad, which must be an estimate of the Hessian
        diagonal, such as Hutchinson's (Sophia-H, paper algorithm 1). B is 1 then.
        Also adapts rho, if target_win_rate is set.
        """
        self._hessian_in_use = True
        rule = update_hessian if square else average_hessian
        skip = {} if self.found_inf is None else {"skip": self.found_inf}
        for group in self.param_groups:
            params, grads = parameters_and_gradients(group)
            _, _, hessians = self._state(params, group)
            if grads:
                apply_rule(rule, group["fused"], hessians, grads, beta2=group["betas"][1], **skip)
        target = self.defaults.get("target_win_rate")
        if target and self.state:
            factor = target / self.statistics()["win_rate"]
            factor = factor.clamp(1 / LARGEST_FACTOR, LARGEST_FACTOR)
            if self.found_inf is not None:
                factor = factor ** (1 - self.found_inf)
            for group in self.param_groups:
                if group["params"]:
                    self._rho(group).mul_(factor).clamp_(LOWEST_RHO, HIGHEST_RHO)

    @torch.no_grad()
    def statistics(self, bs=None):
        """
        0-dim float32 tensors by name; {} before the first step. Does not wait for the device.
          win_rate: proportion of coordinates whose update is not clipped, |m| < rho B h. A larger
            rho gives a larger win_rate. Healthy runs stay within 0.1 and 0.5 after an early peak.
            Some articles call the clipped proportion, 1 - win_rate, by this name.
          param_norm, momentum_norm, hessian_norm: norms of theta, m and h.
          rho: its current value, if target_win_rate adapts it.
        """
        sums, total = [], 0
        for group in self.param_groups:
            by_layout = {}   # parameters with equal sharding share an all-reduce
            for p in group["params"]:
                if p in self.state:
                    layout = (p.device_mesh, p.placements) if hasattr(p, "to_local") else None
                    by_layout.setdefault(layout, []).append(p)
                    total += p.numel()
            for layout, params in by_layout.items():
                states = [self.state[p] for p in params]
                rows = apply_rule(statistics, group["fused"], params,
                                  [s["exp_avg"] for s in states], [s["hessian"] for s in states],
                                  unroll=False, rho_b=self._rho(group) * self._bs(group, bs))
                rows.append(torch.zeros(4, device=params[0].device))   # all shards may be empty
                sums.append(sum_over_shards(torch.stack(rows).sum(0), layout))
        if not sums:
            return {}
        wins, *squares = torch.stack(sums).sum(0)
        names = "param_norm", "momentum_norm", "hessian_norm"
        found = {"win_rate": wins / total, **dict(zip(names, (s.sqrt() for s in squares)))}
        if self.defaults.get("target_win_rate"):
            found["rho"] = self.param_groups[0]["rho"].clone()
        return found

    def win_rate(self, bs=None):
        """The win_rate of `statistics`, or None before the first step."""
        return self.statistics(bs).get("win_rate")
