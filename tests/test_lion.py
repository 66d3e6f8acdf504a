"""Lion against a float64 NumPy reference of the paper's Algorithm 2, and its interface."""
import copy

import numpy as np
import pytest
import torch

from lion import Lion

SHAPES = [(7,), (5, 3), ()]
FUSED = [False, pytest.param(True, marks=pytest.mark.slow)]   # compiling is slow


def gradients(step):
    rng = np.random.default_rng(step)
    return [rng.normal(size=shape) for shape in SHAPES]


def run(optimizer, params, steps, dtype, first=1):
    for step in range(first, first + steps):
        for p, g in zip(params, gradients(step)):
            p.grad = torch.tensor(g, dtype=dtype)
        optimizer.step()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("maximize", [False, True])
def test_fifty_steps_equal_the_papers_algorithm_in_float64(dtype, tolerance, maximize):
    lr, (beta1, beta2), decay = 3e-3, (0.95, 0.98), 0.6
    params = [torch.nn.Parameter(torch.tensor(g, dtype=dtype)) for g in gradients(0)]
    thetas = [p.detach().double().numpy().copy() for p in params]
    ms = [np.zeros_like(t) for t in thetas]
    for step in range(1, 51):
        for i, g in enumerate(gradients(step)):
            g = -g if maximize else g
            update = np.sign(beta1 * ms[i] + (1 - beta1) * g) + decay * thetas[i]
            thetas[i] = thetas[i] - lr * update
            ms[i] = beta2 * ms[i] + (1 - beta2) * g
    optimizer = Lion(params, lr=lr, betas=(beta1, beta2), weight_decay=decay, maximize=maximize)
    run(optimizer, params, 50, dtype)
    for p, theta, m in zip(params, thetas, ms):
        assert np.max(np.abs(p.detach().numpy() - theta)) < tolerance * np.max(np.abs(theta))
        exp_avg = optimizer.state[p]["exp_avg"].numpy()
        assert np.max(np.abs(exp_avg - m)) < tolerance * np.max(np.abs(m))


def test_state_dict_round_trip_continues_exactly():
    params = [torch.nn.Parameter(torch.tensor(g, dtype=torch.float32)) for g in gradients(0)]
    optimizer = Lion(params, weight_decay=0.5)
    run(optimizer, params, 5, torch.float32)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    restored = Lion(copies, lr=1.0)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for pair in (optimizer, params), (restored, copies):
        run(*pair, 5, torch.float32, first=6)
    assert all(torch.equal(p, q) for p, q in zip(params, copies))


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_fused_equals_eager(dtype, tolerance):
    outcomes = []
    for fused in False, True:
        base = torch.linspace(-1, 1, 6000, dtype=dtype)
        params = [torch.nn.Parameter(t) for t in (
            base.clone(), base.clone().view(60, 100).t(), base[:9].clone(),
            *base.clone().split(1200))]
        optimizer = Lion(params, lr=3e-3, weight_decay=0.6, fused=fused)
        generator = torch.Generator().manual_seed(0)
        for _ in range(10):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).to(dtype)
            optimizer.step()
        outcomes.append(params)
    for eager, compiled in zip(*outcomes):
        torch.testing.assert_close(compiled, eager, rtol=tolerance, atol=tolerance)


def test_a_tensor_lr_and_a_closure_work_and_parameters_without_a_gradient_do_not_move():
    p, idle = torch.nn.Parameter(torch.tensor([2.0])), torch.nn.Parameter(torch.ones(1))
    optimizer = Lion([p, idle], lr=torch.tensor(0.5))

    def closure():
        optimizer.zero_grad()
        loss = (p ** 2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 4.0
    assert p.item() == 1.5 and idle.item() == 1.0


def test_sparse_and_complex_gradients_and_impossible_settings_are_refused():
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        Lion(embedding.parameters()).step()
    z = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
    z.grad = torch.ones_like(z)
    with pytest.raises(RuntimeError, match="complex"):
        Lion([z]).step()
    for bad in {"lr": -1}, {"betas": (1.0, 0.9)}, {"weight_decay": -1}:
        with pytest.raises(ValueError, match="Invalid"):
            Lion([torch.nn.Parameter(torch.ones(1))], **bad)


@pytest.mark.parametrize("fused", FUSED)
def test_found_inf_skips_a_step(fused):
    results = []
    for skip in False, True:
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(50))
        optimizer = Lion([p], lr=0.1, weight_decay=0.1, fused=fused)
        for bad in 0.0, 1.0, 0.0:
            p.grad = torch.randn(50) * (torch.nan if bad else 1)
            if skip or not bad:
                optimizer.found_inf = torch.tensor(bad) if skip else None
                optimizer.step()
        results.append((p.detach(), optimizer.state[p]["exp_avg"]))
    for a, b in zip(*results):
        assert a.isfinite().all() and torch.equal(a, b)
