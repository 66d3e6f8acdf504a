"""SophiaG against a float64 NumPy reference of the paper's algorithm, and its interface."""
import copy
import warnings

import numpy as np
import pytest
import torch

from sophia import SophiaG, sophiag

SHAPES = [(7,), (5, 3), (2, 3, 4), ()]
SETTINGS = dict(lr=3e-3, betas=(0.9, 0.95), rho=0.03, weight_decay=0.2)
FUSED = [False, pytest.param(True, marks=pytest.mark.slow)]   # compiling is slow


def reference(thetas, grads_at, hessian_grads_at, steps, k, bs, lr, betas, rho, weight_decay,
              sign=1):
    """Algorithm 3 of arXiv 2305.14342 in float64. h is updated after steps k, 2k, ..."""
    thetas = [t.astype(np.float64) for t in thetas]
    ms, hs = [np.zeros_like(t) for t in thetas], [np.zeros_like(t) for t in thetas]
    for step in range(1, steps + 1):
        for i, g in enumerate(grads_at(step)):
            thetas[i] = thetas[i] - lr * weight_decay * thetas[i]
            ms[i] = betas[0] * ms[i] + (1 - betas[0]) * sign * g
            ratio = np.minimum(np.abs(ms[i]) / (rho * bs * hs[i] + 1e-15), 1.0)
            thetas[i] = thetas[i] - lr * np.sign(ms[i]) * ratio
        if step % k == 0:
            for i, g in enumerate(hessian_grads_at(step)):
                hs[i] = betas[1] * hs[i] + (1 - betas[1]) * g * g
    return thetas, ms, hs


def gradients(kind):
    """A function of the step that returns gradients. About half of their updates are clipped."""
    def at(step):
        rng = np.random.default_rng([kind, step])
        return [rng.normal(size=shape) * 10 ** rng.uniform(-2, 0, shape) for shape in SHAPES]
    return at


def run(optimizer, params, steps, k, dtype, first=1):
    for step in range(first, first + steps):
        for p, g in zip(params, gradients(1)(step)):
            p.grad = torch.tensor(g, dtype=dtype)
        optimizer.step()
        if step % k == 0:
            for p, g in zip(params, gradients(2)(step)):
                p.grad = torch.tensor(g, dtype=dtype)
            optimizer.update_hessian()


def make(dtype, **changes):
    params = [torch.nn.Parameter(torch.tensor(t, dtype=dtype)) for t in gradients(3)(0)]
    return params, SophiaG(params, **{**SETTINGS, "bs": 20, **changes})


def relative_error(actual, wanted):
    return max(np.max(np.abs(a.detach().double().numpy() - w)) / max(np.max(np.abs(w)), 1e-30)
               for a, w in zip(actual, wanted))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("changes", [{}, {"maximize": True}, {"weight_decay": 0.0}, {"rho": 3.0}])
def test_fifty_steps_equal_the_papers_algorithm_in_float64(dtype, tolerance, changes):
    params, optimizer = make(dtype, **changes)
    settings = {**SETTINGS, **changes}
    sign = -1 if settings.pop("maximize", False) else 1
    thetas, ms, hs = reference([p.detach().numpy() for p in params], gradients(1), gradients(2),
                               50, 10, 20, sign=sign, **settings)
    run(optimizer, params, 50, 10, dtype)
    states = [optimizer.state[p] for p in params]
    assert relative_error(params, thetas) < tolerance
    assert relative_error([s["exp_avg"] for s in states], ms) < tolerance
    assert relative_error([s["hessian"] for s in states], hs) < tolerance
    assert all(s["step"] == 50 for s in states)


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.bfloat16, 0.03)])
def test_fused_equals_eager(dtype, tolerance):
    """For a view, a non-contiguous parameter, one without a gradient, several of the same length,
    and two groups. A new lr does not recompile."""
    torch.compiler.reset()   # torch.compile limits the graphs of each function
    def build(fused):
        base = torch.linspace(-1, 1, 6144, dtype=dtype)
        ps = [torch.nn.Parameter(t.clone()) for t in (base, base.view(64, 96), base[:1], base)]
        ps += [torch.nn.Parameter(base.clone().view(96, 64).t()),
               torch.nn.Parameter(base.clone()[7:5000])]
        ps += [torch.nn.Parameter(base[i:i + 768].clone()) for i in range(6)]
        groups = [{"params": ps[:2]}, {"params": ps[2:], "weight_decay": 0.0, "lr": 1e-3}]
        return ps, SophiaG(groups, **SETTINGS, bs=20, fused=fused)

    outcomes, watched, steps = [], [], 6
    for fused in False, True:
        ps, optimizer = build(fused)
        generator = torch.Generator().manual_seed(0)
        for step in range(steps):
            if step == 4:   # every graph has been compiled by now
                graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            optimizer.param_groups[0]["lr"] = 1e-3 * (step + 1)
            for i, p in enumerate(ps):
                grad = torch.randn(p.shape, generator=generator).to(dtype)
                p.grad = None if i == 3 else grad
            optimizer.step()
            if step % 2 == 0:
                optimizer.update_hessian()
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
        watched.append(optimizer.statistics())
        outcomes.append([*(p.detach() for p in ps),
                         *(s["hessian"] for s in optimizer.state.values())])
    assert 0 < watched[0]["win_rate"] < 1
    torch.testing.assert_close(watched[1], watched[0], rtol=max(tolerance, 1e-6), atol=1e-6)
    for eager, compiled in zip(*outcomes):
        torch.testing.assert_close(compiled, eager, rtol=tolerance, atol=tolerance)


def test_statistics_are_norms_of_parameters_and_state():
    params, optimizer = make(torch.float64)
    run(optimizer, params, 20, 10, torch.float64)
    found = optimizer.statistics()
    states = [optimizer.state[p] for p in params]
    for name, tensors in (("param_norm", params), ("momentum_norm", [s["exp_avg"] for s in states]),
                          ("hessian_norm", [s["hessian"] for s in states])):
        norm = torch.cat([t.detach().flatten() for t in tensors]).norm()
        torch.testing.assert_close(found[name], norm.float())
    assert found["win_rate"] == optimizer.win_rate()


def test_the_compared_steps_clip_some_coordinates_and_not_all():
    """Otherwise test_fifty_steps would not test both branches."""
    params, optimizer = make(torch.float64)
    run(optimizer, params, 50, 10, torch.float64)
    assert 0.1 < optimizer.win_rate() < 0.9


def test_a_step_without_hessian_moves_each_coordinate_by_lr():
    p = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    p.grad = torch.tensor([1e-9, -3.0, 0.5, 0.0], dtype=torch.float64)
    SophiaG([p], lr=0.1, weight_decay=0.0).step()
    assert p.tolist() == [-0.1, 0.1, -0.1, 0.0]


def test_functional_update_takes_a_tensor_lr():
    results = []
    for lr in (3e-3, torch.tensor(3e-3)):
        tensors = [torch.linspace(-1, 1, 9) + i for i in range(3)] + [torch.ones(9)]
        sophiag(*tensors, lr=lr, beta1=0.9, rho_b=0.5, decay=1 - lr * 0.1)
        results.append(tensors[0])
    torch.testing.assert_close(*results)


def test_groups_use_their_own_settings_and_parameters_without_a_gradient_do_not_move():
    a, b, c = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = SophiaG([{"params": [a]}, {"params": [b, c], "lr": 0.5, "weight_decay": 0.0}],
                        lr=0.1, weight_decay=1.0)
    a.grad = b.grad = torch.ones(2)
    optimizer.step()
    torch.testing.assert_close(a.detach(), torch.full((2,), 1 - 0.1 - 0.1))
    torch.testing.assert_close(b.detach(), torch.full((2,), 0.5))
    assert c.tolist() == [1, 1] and c not in optimizer.state


def test_non_contiguous_and_bfloat16_parameters_are_updated():
    base = torch.ones(4, 6)
    view = torch.nn.Parameter(base.t())
    half = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    view.grad, half.grad = torch.ones(6, 4), torch.ones(3, dtype=torch.bfloat16)
    optimizer = SophiaG([view, half], lr=0.25, weight_decay=0.0)
    optimizer.step()
    assert (base == 0.75).all() and (half == 0.75).all()
    assert optimizer.state[half]["hessian"].dtype == torch.bfloat16


def test_bs_given_to_step_overrides_the_constructors():
    outcomes = []
    for constructor, call in [(None, 20), (20, None), (5, 20), (20, 5)]:
        params, optimizer = make(torch.float64, bs=constructor)
        run(optimizer, params, 1, 1, torch.float64)
        for p in params:
            p.grad = torch.full_like(p, 1e-3)
        optimizer.step(bs=call)
        outcomes.append(params[1].detach())
    assert torch.equal(outcomes[0], outcomes[1]) and torch.equal(outcomes[0], outcomes[2])
    assert not torch.equal(outcomes[0], outcomes[3])


def test_without_bs_the_official_default_is_used_with_one_warning():
    params, optimizer = make(torch.float64, bs=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(optimizer, params, 9, 10, torch.float64)     # without a Hessian, bs does not matter
    other, given = make(torch.float64, bs=5120)
    run(given, other, 21, 10, torch.float64)
    with pytest.warns(UserWarning, match="bs") as caught:
        run(optimizer, params, 12, 10, torch.float64, first=10)
    assert len(caught) == 1
    assert all(torch.equal(p, q) for p, q in zip(params, other))


def test_win_rate_counts_coordinates_below_the_bound():
    p = torch.nn.Parameter(torch.zeros(4))
    optimizer = SophiaG([p], rho=0.5, bs=10)
    assert optimizer.win_rate() is None
    p.grad = torch.ones(4)
    optimizer.step()
    optimizer.state[p]["exp_avg"] = torch.tensor([1.0, -1.0, 0.1, -6.0])
    optimizer.state[p]["hessian"] = torch.tensor([0.1, 1.0, 0.1, 1.0])
    # |m| < rho B h: 1 < 0.5 no, 1 < 5 yes, 0.1 < 0.5 yes, 6 < 5 no
    assert optimizer.win_rate() == 0.5
    assert optimizer.win_rate(bs=100) == 1.0


def test_state_dict_round_trip_continues_exactly():
    params, optimizer = make(torch.float32)
    run(optimizer, params, 15, 10, torch.float32)
    saved = copy.deepcopy(optimizer.state_dict())
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    restored = SophiaG(copies, lr=1.0)
    restored.load_state_dict(saved)
    for pair in (optimizer, params), (restored, copies):
        run(*pair, 15, 10, torch.float32, first=16)
    assert all(torch.equal(p, q) for p, q in zip(params, copies))


@pytest.mark.parametrize("step_shape", [(), (1,)])
def test_an_official_state_dict_loads_and_training_continues(step_shape):
    """The official class has no bs and, with capturable, a step of shape (1,)."""
    params, optimizer = make(torch.float32)
    run(optimizer, params, 12, 10, torch.float32)
    official = copy.deepcopy(optimizer.state_dict())
    for group in official["param_groups"]:
        del group["bs"]
    for state in official["state"].values():
        state["step"] = state["step"].reshape(step_shape)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    restored = SophiaG(copies, **SETTINGS, bs=20)
    restored.load_state_dict(official)
    for pair in (optimizer, params), (restored, copies):
        run(*pair, 12, 10, torch.float32, first=13)
    assert all(torch.equal(p, q) for p, q in zip(params, copies))


def test_an_official_state_dict_warns_if_bs_is_never_given():
    params, optimizer = make(torch.float32)
    run(optimizer, params, 10, 10, torch.float32)
    official = copy.deepcopy(optimizer.state_dict())
    for group in official["param_groups"]:
        del group["bs"]
    restored = SophiaG(params, **SETTINGS)
    restored.load_state_dict(official)
    with pytest.warns(UserWarning, match="5120"):
        restored.step()


def test_capturable_keeps_step_on_the_parameters_device_and_can_be_copied():
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer = SophiaG([p], lr=torch.tensor(0.5), weight_decay=0.0, capturable=True)
    optimizer.step()
    assert optimizer.state[p]["step"].device == p.device and p.tolist() == [0.5, 0.5]
    assert copy.deepcopy(optimizer).state_dict()["param_groups"][0]["capturable"]


def test_step_runs_a_closure_with_gradients_and_returns_its_loss():
    p = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = SophiaG([p], lr=0.5, weight_decay=0.0)

    def closure():
        optimizer.zero_grad()
        loss = (p ** 2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 4.0 and p.item() == 1.5


def test_sparse_and_complex_gradients_are_refused():
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        SophiaG(embedding.parameters()).step()
    z = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
    z.grad = torch.ones_like(z)
    with pytest.raises(RuntimeError, match="complex"):
        SophiaG([z]).step()


@pytest.mark.parametrize("bad", [{"lr": -1}, {"betas": (1.0, 0.9)}, {"rho": -0.1},
                                 {"weight_decay": -1}, {"bs": 0},
                                 {"target_win_rate": 1.0, "bs": 1}, {"target_win_rate": 0.3},
                                 {"target_win_rate": -0.1, "bs": 1}])
def test_impossible_settings_are_refused(bad):
    with pytest.raises(ValueError, match="Invalid"):
        SophiaG([torch.nn.Parameter(torch.ones(1))], **bad)


@pytest.mark.parametrize("fused", FUSED)
def test_found_inf_skips_a_step_and_a_hessian_update(fused):
    """found_inf=1 is the same as no call, and found_inf=0 the same as None, bit for bit."""
    results = []
    for skip in False, True:
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(64, 3)), torch.nn.Parameter(torch.randn(7))]
        optimizer = SophiaG(params, lr=0.1, rho=0.1, weight_decay=0.1, bs=100, fused=fused)
        for bad in 0.0, 0.0, 1.0, 0.0, 1.0:
            for p in params:
                p.grad = torch.randn(p.shape) * (torch.nan if bad else 1)
            if skip or not bad:
                optimizer.found_inf = torch.tensor(bad) if skip else None
                optimizer.update_hessian()
                optimizer.step()
        results.append([t for p in params for t in (p.detach(), optimizer.state[p]["exp_avg"],
                                                    optimizer.state[p]["hessian"])])
    for a, b in zip(*results):
        assert a.isfinite().all() and torch.equal(a, b)


def steered(rho, groups=1, **settings):
    """(parameters, SophiaG) in `groups` groups, with target_win_rate 0.3. m and h are such that the
    ratios |m| / h spread over several orders of magnitude."""
    rng = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.zeros(1000)) for _ in range(2)]
    size = len(params) // groups
    optimizer = SophiaG([{"params": params[i:i + size]} for i in range(0, 2, size)], rho=rho,
                        **{"bs": 10, "target_win_rate": 0.3, "betas": (0.9, 0.0), **settings})
    for p in params:
        p.grad = torch.randn(1000, generator=rng)
    optimizer.step()
    for p in params:
        p.grad = torch.randn(1000, generator=rng).mul_(1.5).exp_()
    return params, optimizer


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("rho", [0.0002, 0.005, 0.05, 0.5, 5.0])
def test_rho_adapts_until_the_win_rate_is_its_target(rho, groups):
    """Within 25 updates, and without overshooting by more than chance."""
    params, optimizer = steered(rho, groups)
    rates = []
    for _ in range(25):
        optimizer.update_hessian()
        rates.append(optimizer.win_rate().item())
    assert rates[-1] == pytest.approx(0.3, abs=0.01)
    away = 1 if rates[0] > 0.3 else -1
    assert all(away * (rate - 0.3) > -0.01 for rate in rates)
    rhos = [group["rho"] for group in optimizer.param_groups]
    assert all(r == rhos[0] for r in rhos) and optimizer.statistics()["rho"] == rhos[0]


def test_adapting_rho_follows_its_formula_and_stays_in_bounds():
    params, optimizer = steered(0.05)
    optimizer.update_hessian()
    at_start = SophiaG(params, rho=0.05, bs=10)
    at_start.load_state_dict(optimizer.state_dict() | {"param_groups": at_start.state_dict()
                                                       ["param_groups"]})
    wanted = 0.05 * 0.3 / at_start.win_rate().item()
    assert optimizer.param_groups[0]["rho"] == pytest.approx(wanted, rel=1e-6)
    for target, start, bound in (1 - 1e-9, 90.0, 100.0), (1e-9, 2e-4, 1e-4):
        params, optimizer = steered(start, target_win_rate=target)
        for p in params:   # the target cannot be reached
            p.grad.fill_(1e-20 if start > 1 else 1e10)
        for _ in range(3):
            optimizer.update_hessian()
        assert optimizer.param_groups[0]["rho"] == pytest.approx(bound)


@pytest.mark.parametrize("fused", FUSED)
def test_a_skipped_hessian_update_does_not_change_rho(fused):
    _, optimizer = steered(0.05, fused=fused)
    optimizer.update_hessian()
    before = optimizer.param_groups[0]["rho"].item()
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.update_hessian()
    assert optimizer.param_groups[0]["rho"].item() == before
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.update_hessian()
    assert optimizer.param_groups[0]["rho"].item() != before


def test_the_constructor_decides_whether_a_loaded_rho_adapts():
    params, optimizer = steered(0.05)
    optimizer.update_hessian()
    saved = copy.deepcopy(optimizer.state_dict())
    rho = optimizer.param_groups[0]["rho"].item()
    fixed = SophiaG(params, rho=7.0, bs=10)
    fixed.load_state_dict(saved)
    again = SophiaG(params, rho=7.0, bs=10, target_win_rate=0.3)
    again.load_state_dict(saved)
    from_fixed = SophiaG(params, rho=7.0, bs=10, target_win_rate=0.3)
    from_fixed.load_state_dict(SophiaG(params, rho=rho, bs=10).state_dict() | {
        "state": saved["state"]})
    for other in fixed, again, from_fixed:
        assert other.param_groups[0]["rho"] == pytest.approx(rho, rel=1e-7)
        other.update_hessian()
    optimizer.update_hessian()
    assert fixed.param_groups[0]["rho"] == rho and "rho" not in fixed.statistics()
    assert again.param_groups[0]["rho"] == optimizer.param_groups[0]["rho"] != rho
    assert from_fixed.param_groups[0]["rho"] == optimizer.param_groups[0]["rho"]


@pytest.mark.parametrize("fused", FUSED)
def test_a_negative_estimate_of_the_hessian_counts_as_zero(fused):
    p = torch.nn.Parameter(torch.zeros(4))
    optimizer = SophiaG([p], lr=0.1, betas=(0.0, 0.5), rho=0.5, bs=1, weight_decay=0.0, fused=fused)
    p.grad = torch.tensor([4.0, -4.0, -4.0, 0.0])
    optimizer.update_hessian(square=False)
    assert optimizer.state[p]["hessian"].tolist() == [2.0, -2.0, -2.0, 0.0]
    p.grad = torch.tensor([0.5, 0.5, -1e-6, 3.0])   # bound: 1, then 0
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor([-0.05, -0.1, 0.1, -0.1]))
    assert optimizer.win_rate() == 0.25
