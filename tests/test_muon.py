"""Muon against a float64 NumPy reference and torch's own Muon and AdamW, and its interface."""
import copy

import numpy as np
import pytest
import torch

from model import GPT, GPTConfig
from muon import Muon, orthogonalize
from optim import parameter_groups

SHAPES = [(5, 3), (3, 7), (5, 3), (4, 4), (6,), ()]   # the last two are AdamW's
FUSED = [False, pytest.param(True, marks=pytest.mark.slow)]   # compiling is slow
SMALL = GPTConfig(vocab_size=65, block_size=16, n_layer=3, n_head=2, n_embd=32, bias=True)


def gradients(step):
    rng = np.random.default_rng(step)
    return [rng.normal(size=shape) for shape in SHAPES]


def parameters(dtype=torch.float32):
    return [torch.nn.Parameter(torch.tensor(g, dtype=dtype)) for g in gradients(0)]


def groups(params):
    return [{"params": [p for p in params if p.ndim == 2]},
            {"params": [p for p in params if p.ndim != 2], "use_muon": False, "weight_decay": 0.0}]


def run(optimizer, params, steps, first=1):
    for step in range(first, first + steps):
        for p, g in zip(params, gradients(step)):
            p.grad = torch.tensor(g, dtype=p.dtype)
        optimizer.step()


def reference_orthogonalize(x):
    """Jordan's iteration on the singular values, which is what it does to the matrix."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    s = s / np.linalg.norm(x)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ vt


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("maximize", [False, True])
def test_fifty_steps_equal_the_papers_formulas_in_float64(dtype, tolerance, maximize):
    lr, mu, (beta1, beta2), decay = 3e-3, 0.95, (0.9, 0.95), 0.1
    params = parameters(dtype)
    thetas = [p.detach().double().numpy().copy() for p in params]
    ms, vs = ([np.zeros_like(t) for t in thetas] for _ in range(2))
    for step in range(1, 51):
        for i, g in enumerate(gradients(step)):
            g = -g if maximize else g
            if g.ndim == 2:
                ms[i] = mu * ms[i] + g   # the papers' sum
                update = 0.2 * max(g.shape)**0.5 * reference_orthogonalize(g + mu * ms[i])
                thetas[i] = thetas[i] * (1 - lr * decay) - lr * update
            else:
                ms[i] = beta1 * ms[i] + (1 - beta1) * g
                vs[i] = beta2 * vs[i] + (1 - beta2) * g**2
                denominator = np.sqrt(vs[i] / (1 - beta2**step)) + 1e-8
                thetas[i] = thetas[i] - lr * ms[i] / (1 - beta1**step) / denominator
    optimizer = Muon(groups(params), lr=lr, momentum=mu, betas=(beta1, beta2), weight_decay=decay,
                     maximize=maximize)
    run(optimizer, params, 50)
    for p, theta in zip(params, thetas):
        assert np.max(np.abs(p.detach().numpy() - theta)) < tolerance * np.max(np.abs(theta))


def losses(optimizers, model, steps=50):
    x = torch.randint(65, (8, 17), generator=torch.Generator().manual_seed(0))
    found = []
    for _ in range(steps):
        model.zero_grad()
        loss = model(x[:, :-1], targets=x[:, 1:])
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        found.append(loss.item())
    return torch.tensor(found)


def test_fifty_steps_of_a_gpt_equal_torchs_muon_and_adamw():
    """torch's Muon multiplies in bfloat16, which has 8 bits, so the tolerance is theirs."""
    torch.manual_seed(0)
    models = [GPT(SMALL) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    ours, theirs = (parameter_groups(model, 0.1) for model in models)
    curves = [losses(optimizers, model) for model, optimizers in zip(models, (
        [Muon([ours[0], {**ours[1], "use_muon": False}], lr=2e-3)],
        [torch.optim.Muon(theirs[0]["params"], lr=2e-3, weight_decay=0.1, momentum=0.95,
                          adjust_lr_fn="match_rms_adamw"),
         torch.optim.AdamW(theirs[1]["params"], lr=2e-3, betas=(0.9, 0.95), weight_decay=0)]))]
    torch.testing.assert_close(*curves, rtol=1e-3, atol=0)
    for p, q in zip(ours[0]["params"], theirs[0]["params"]):   # moved by 2e-3 x 50 x 0.2
        assert (p - q).norm() < 0.02 * q.norm()


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_a_batch_is_orthogonalized_as_its_matrices_one_by_one(shape):
    u = torch.randn(7, *shape, dtype=torch.float64)
    one_by_one = torch.stack([orthogonalize(x[None])[0] for x in u])
    torch.testing.assert_close(orthogonalize(u), one_by_one, rtol=1e-12, atol=1e-12)


def test_a_zero_gradient_and_a_parameter_without_one_do_not_move_a_matrix():
    moved, zero, idle = (torch.nn.Parameter(torch.ones(3, 2)) for _ in range(3))
    moved.grad, zero.grad = torch.eye(3)[:, :2], torch.zeros(3, 2)
    Muon([moved, zero, idle], weight_decay=0.0).step()
    assert not moved.equal(torch.ones(3, 2))
    assert zero.equal(torch.ones(3, 2)) and idle.equal(torch.ones(3, 2))


def test_state_dict_round_trip_continues_exactly():
    params = parameters()
    optimizer = Muon(groups(params), weight_decay=0.5)
    run(optimizer, params, 5)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    restored = Muon(groups(copies), lr=1.0, momentum=0.5)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for pair in (optimizer, params), (restored, copies):
        run(*pair, 5, first=6)
    assert all(torch.equal(p, q) for p, q in zip(params, copies))


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_fused_equals_eager(dtype, tolerance):
    outcomes = []
    for fused in False, True:
        params = parameters(dtype)
        run(Muon(groups(params), lr=3e-3, weight_decay=0.1, fused=fused), params, 10)
        outcomes.append(params)
    for eager, compiled in zip(*outcomes):
        torch.testing.assert_close(compiled, eager, rtol=tolerance, atol=tolerance)


def test_a_tensor_lr_and_a_closure_work():
    outcomes = []
    for lr in 0.5, torch.tensor(0.5):
        p = torch.nn.Parameter(torch.eye(2))
        optimizer = Muon([p], lr=lr)

        def closure(p=p, optimizer=optimizer):
            optimizer.zero_grad()
            loss = (p ** 2).sum()
            loss.backward()
            return loss

        assert optimizer.step(closure) == 2.0
        outcomes.append(p.detach())
    assert torch.equal(*outcomes) and not torch.equal(outcomes[0], torch.eye(2))


def test_other_shapes_sparse_and_complex_gradients_and_impossible_settings_are_refused():
    for shape in (3,), (2, 2, 2), ():
        with pytest.raises(ValueError, match="use_muon=False"):
            Muon([torch.nn.Parameter(torch.ones(shape))])
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        Muon(embedding.parameters()).step()
    z = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    z.grad = torch.ones_like(z)
    with pytest.raises(RuntimeError, match="complex"):
        Muon([z]).step()
    for bad in {"lr": -1}, {"momentum": 1.0}, {"betas": (1.0, 0.9)}, {"weight_decay": -1}:
        with pytest.raises(ValueError, match="Invalid"):
            Muon([torch.nn.Parameter(torch.ones(1, 1))], **bad)


def test_sharded_matrices_are_refused(tmp_path):
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0,
                                         world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        p = torch.nn.Parameter(DTensor.from_local(torch.ones(2, 2), mesh, [Shard(0)]))
        with pytest.raises(ValueError, match="whole matrices and got a .* use_muon=False"):
            Muon([p])
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("fused", FUSED)
def test_found_inf_skips_a_step(fused):
    results = []
    for skip in False, True:
        params = parameters()
        optimizer = Muon(groups(params), lr=0.1, weight_decay=0.1, fused=fused)
        for step, bad in enumerate((0.0, 1.0, 0.0)):
            for p, g in zip(params, gradients(step)):
                p.grad = torch.tensor(g, dtype=p.dtype) * (torch.nan if bad else 1)
            if skip or not bad:
                optimizer.found_inf = torch.tensor(bad)
                optimizer.step()
        state = [s[name] for s in optimizer.state.values() for name in sorted(s)]
        results.append([p.detach() for p in params] + state)
    for a, b in zip(*results):
        assert a.isfinite().all() and torch.equal(a, b)
