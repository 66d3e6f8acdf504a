"""train.py end to end: ranks, resume, precisions, compile, and the Hessian estimates over ranks."""
import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, assert_same_run, flags, records, run, snapshot, train, write_data
from hessian_estimates import build
from test_model import exact_gauss_newton_diagonal
from torch.nn.attention import SDPBackend, sdpa_kernel

import checkpoint
import lion
import muon
import sophia

OPTIMIZERS = ("sophiag", "adamw", "lion", "muon")
ESTIMATORS = ("gnb", "hutchinson", "empirical_fisher")


# ---------------------------------------------------------------- ranks

@pytest.fixture(scope="module")
def one_and_two_ranks(tiny_data, tmp_path_factory):
    """A folder of runs of 30 steps: each optimizer on 1 and on 2 ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    for optimizer in OPTIMIZERS:
        for ranks in 1, 2:
            train(folder / f"{optimizer}-{ranks}", tiny_data, ranks=ranks, optimizer=optimizer,
                  max_iters=30, batch_size=2, eval_interval=30, rho=1.0)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_and_two_ranks_give_the_same_losses(one_and_two_ranks, optimizer):
    one, two = (records(one_and_two_ranks / f"{optimizer}-{n}") for n in (1, 2))
    assert len(one) == len(two) == 30
    losses = np.array([[r["train/loss"] for r in run] for run in (one, two)])
    assert losses[0, 0] - losses[0, -1] > 0.1   # without learning, the comparison would mean little
    assert np.abs(losses[0] - losses[1]).max() < 1e-5
    if optimizer == "sophiag":   # the first Hessian estimate comes after step 10
        assert one[-1]["train/win_rate"] > 0.01
        norms = np.array([[r["hessian_norm"] for r in run[9:]] for run in (one, two)])
        assert np.abs(norms[0] / norms[1] - 1).max() < 1e-4
    val = [records(one_and_two_ranks / f"{optimizer}-{n}", "val/loss")[-1] for n in (1, 2)]
    assert abs(val[0]["val/loss"] - val[1]["val/loss"]) < 1e-5
    assert abs(val[0]["val/loss_stderr"] - val[1]["val/loss_stderr"]) < 1e-5


@pytest.mark.slow
def test_adapting_rho_and_hutchinsons_estimate_do_not_depend_on_ranks(tiny_data, tmp_path):
    """Each rank adapts rho by itself. If their states differed, the losses would diverge."""
    for ranks in 1, 2:
        train(tmp_path / str(ranks), tiny_data, ranks=ranks, max_iters=30, batch_size=2,
              eval_interval=30, hessian_interval=3, hessian_estimator="hutchinson",
              hessian_batch_size=6, target_win_rate=0.3, rho=0.01)
    one, two = (records(tmp_path / ranks) for ranks in "12")
    for key, tolerance in ("train/loss", 1e-5), ("train/rho", 1e-2), ("hessian_norm", 1e-4):
        for a, b in zip(one, two):
            assert a.get(key) == pytest.approx(b.get(key), rel=tolerance)
    assert 0.2 < one[-1]["train/win_rate"] < 0.4


@pytest.mark.slow
def test_all_optimizers_start_from_the_same_weights(one_and_two_ranks):
    """The first evaluation and the loss of the first step come before any update."""
    firsts = {(records(one_and_two_ranks / f"{name}-1", "val/loss")[0]["val/loss"],
               records(one_and_two_ranks / f"{name}-1")[0]["train/loss"]) for name in OPTIMIZERS}
    assert len(firsts) == 1


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_run_uses_the_settings_it_is_given(tiny_data, tmp_path, optimizer):
    settings = {"optimizer": optimizer, "init_from": "auto", "eval_interval": 10}
    train(tmp_path, tiny_data, max_iters=10, target_win_rate=0.3, **settings)
    train(tmp_path, tiny_data, max_iters=20, beta1=0.5, beta2=0.6, weight_decay=0.3, rho=0.2,
          **settings)
    saved = checkpoint.load(checkpoint.find_latest(str(tmp_path))[0])
    group = saved["optimizer"]["param_groups"][0]
    beta1 = group["momentum"] if optimizer == "muon" else group["betas"][0]
    assert (beta1, group["betas"][1], group["weight_decay"]) == (0.5, 0.6, 0.3)
    assert optimizer != "sophiag" or group["rho"] == 0.2


@pytest.fixture(scope="module")
def estimates(tmp_path_factory):
    """{(estimator, ranks, number of estimates): their mean and its standard error} of the trainer's
    estimates over 4 micro-steps. All windows are equal, so one exact diagonal is the target. Key
    "shared": the estimates of two ranks that wrongly draw labels with the same noise."""
    folder = tmp_path_factory.mktemp("estimates")
    data = write_data(folder / "constant", [7] * 400, [7] * 100, vocab_size=64)
    few = [(estimator, ranks, 5) for estimator in ESTIMATORS for ranks in (1, 2)]
    cases = {case: () for case in [*few, ("gnb", 1, 400), ("hutchinson", 1, 300)]}
    cases["gnb", 2, 100] = ("shared",)
    found = {}
    for (estimator, ranks, number), shared in cases.items():
        out = folder / "found.npz"
        done = run("tests/hessian_estimates.py", estimator, data, out, number, *shared, ranks=ranks)
        assert done.returncode == 0, done.stderr
        found[shared[0] if shared else (estimator, ranks, number)] = dict(np.load(out))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_hessian_estimates_do_not_depend_on_ranks(estimates, estimator):
    """Labels and directions are drawn per sample and per update, not per rank."""
    one, two = (estimates[estimator, ranks, 5]["mean"] for ranks in (1, 2))
    assert np.linalg.norm(one - two) < 1e-6 * np.linalg.norm(one)


@pytest.mark.slow
def test_the_gauss_newton_bartlett_estimate_is_unbiased(estimates):
    """Were labels drawn with the same noise on both ranks, as by generators with one seed, the
    estimate would be twice as large."""
    exact = exact_gauss_newton_diagonal(build(), torch.full((1, 4), 7)).double().numpy()
    found = estimates["gnb", 1, 400]
    used = exact > exact.max() * 1e-4
    z = ((found["mean"] - exact) / found["error"])[used]
    assert used.sum() > 300
    assert abs(found["mean"].sum() / exact.sum() - 1) < 0.1
    assert np.abs(z).max() < 6 and abs(z.mean()) < 1
    assert abs(estimates["shared"]["mean"].sum() / exact.sum() / 2 - 1) < 0.1


def exact_hessian_diagonal(model, idx, targets):
    """The Hessian diagonal of the mean cross-entropy, by autograd, all rows at once."""
    params = list(model.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        loss = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten())
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, params,
                                                                   create_graph=True)])
    directions = torch.eye(len(gradient), dtype=gradient.dtype)
    rows = torch.autograd.grad(gradient, params, directions, is_grads_batched=True)
    return torch.cat([row.flatten(1) for row in rows], 1).diagonal()


@pytest.mark.slow
def test_the_hutchinson_estimate_is_unbiased(estimates):
    """The z-scores of all coordinates are those of chance. The diagonal has negative entries."""
    sevens = torch.full((1, 4), 7)
    exact = exact_hessian_diagonal(build().double(), sevens, sevens).numpy()
    found = estimates["hutchinson", 1, 300]
    z = (found["mean"] - exact) / np.maximum(found["error"], 1e-9)
    assert (exact < -exact.max() * 1e-3).sum() > 30
    assert np.abs(z).max() < 6 and abs(z.mean()) < 0.2 and 0.8 < z.std() < 1.2
    assert abs(found["mean"].sum() / exact.sum() - 1) < 0.2


@pytest.mark.slow
def test_the_empirical_fisher_squares_the_gradient_of_the_true_labels(estimates):
    model, sevens = build(), torch.full((4, 4), 7)
    model(sevens, targets=sevens).backward()
    g = torch.cat([p.grad.flatten() for p in model.parameters()]).double().numpy()
    for ranks in 1, 2:
        mean = estimates["empirical_fisher", ranks, 5]["mean"]
        np.testing.assert_allclose(mean, 16 * g * g, rtol=1e-4, atol=1e-6 * (16 * g * g).max())


# ---------------------------------------------------------------- resume; see also faults/

def test_resuming_a_finished_run_changes_nothing(tiny_data, tmp_path):
    train(tmp_path, tiny_data, max_iters=4)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    output = train(tmp_path, tiny_data, max_iters=4, init_from="auto")
    assert "finished at step 4" in output
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_auto_starts_from_scratch_without_a_checkpoint(tiny_data, tmp_path):
    assert "finished at step 2" in train(tmp_path / "new", tiny_data, max_iters=2,
                                         init_from="auto")


# ---------------------------------------------------------------- other ways to run

@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_losses_are_close_to_float32(tiny_data, tmp_path, dtype):
    settings = dict(max_iters=30, eval_interval=30, hessian_interval=5)
    train(tmp_path / "float32", tiny_data, **settings)
    assert dtype in train(tmp_path / dtype, tiny_data, dtype=dtype, **settings)
    ours, wanted = (records(tmp_path / d) for d in (dtype, "float32"))
    for a, b in zip(ours, wanted):
        assert abs(a["train/loss"] - b["train/loss"]) < 0.05
    assert ours[-1]["hessian_norm"] == pytest.approx(wanted[-1]["hessian_norm"], rel=0.1)


@pytest.mark.slow
def test_compiled_training_is_close_to_eager_and_repeats_bit_for_bit(tiny_data, tmp_path):
    settings = dict(max_iters=12, eval_interval=12)
    train(tmp_path / "eager", tiny_data, **settings)
    for name in "compiled", "again":
        output = train(tmp_path / name, tiny_data, **{**settings, "compile": True})
        assert "float32, compiled" in output
    for a, b in zip(records(tmp_path / "compiled"), records(tmp_path / "eager")):
        assert a["train/loss"] == pytest.approx(b["train/loss"], abs=1e-4)
    assert_same_run(tmp_path / "compiled", tmp_path / "again")


@pytest.mark.slow
def test_two_ranks_compile_no_more_than_one_and_exchange_gradients_during_backward(tiny_data,
                                                                                   tmp_path):
    """30 steps of 12 layers, with Hessian updates and log lines. DDP's buckets hold each layer's
    gradients at another offset, and DDP rebuilds them after the first step."""
    settings = {**TINY, "n_layer": 12, "max_iters": 30, "eval_interval": 30, "log_interval": 5,
                "hessian_interval": 5, "compile": True, "dataset": tiny_data}
    graphs = {}
    for ranks in 1, 2:
        words = flags(**{**settings, "out_dir": tmp_path / str(ranks),
                         "total_batch_size": 8 * ranks})
        done = run("tests/compiled_ranks.py", *words, ranks=ranks)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "fused optimizer" not in done.stderr and "recompile_limit" not in done.stderr
        found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        graphs[ranks] = {f["graphs"] for f in found}
    assert graphs[2] == graphs[1] and max(graphs[1]) < 12   # not one per layer
    # One graph for all layers would give all gradients at its end: a share above 0.9.
    assert max(f["share"] for f in found) < 0.75


@pytest.mark.parametrize("optimizer", [
    "sophiag", *(pytest.param(name, marks=pytest.mark.slow) for name in ("adamw", "lion", "muon"))])
def test_the_same_run_twice_is_identical_bit_for_bit(tiny_data, tmp_path, optimizer):
    for name in "one", "two":
        train(tmp_path / name, tiny_data, optimizer=optimizer, max_iters=25, dropout=0.1,
              deterministic=name == "two")   # changes nothing on a CPU
    assert_same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_the_first_lines_show_the_batch_and_the_hessian_batch(tiny_data, tmp_path):
    output = train(tmp_path, tiny_data, max_iters=40, batch_size=2, total_batch_size=12, ranks=2,
                   n_layer=1, beta2=0.5)
    assert ("12 sequences = 384 tokens per step = 2 ranks x batch_size 2 x 3 micro-steps; Hessian: "
            "6 sequences every 10 steps, averaged over 20 steps (50% of the run)") in output
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["hessian_batch_size"] == 6 and config["beta1"] == 0.965


@pytest.mark.slow
def test_hessian_micro_batches_of_unequal_size_weigh_sequences_equally(tiny_data, tmp_path):
    """6 sequences give the same estimate as micro-batches of 4 + 2 and of 1."""
    for size in 4, 1:
        train(tmp_path / str(size), tiny_data, max_iters=20, batch_size=size, hessian_batch_size=6)
    a, b = (records(tmp_path / str(size))[-1] for size in (4, 1))
    assert a["hessian_norm"] == pytest.approx(b["hessian_norm"], rel=1e-4)


def test_eval_only_prints_the_loss_and_writes_nothing(tiny_data, tmp_path):
    train(tmp_path, tiny_data, max_iters=3)
    before = snapshot(tmp_path)
    output = train(tmp_path, tiny_data, max_iters=3, init_from="resume", eval_only=True)
    assert f"val loss {records(tmp_path, 'val/loss')[-1]['val/loss']:.4f}" in output
    assert snapshot(tmp_path) == before


@pytest.mark.slow
def test_finetuning_starts_from_the_weights_of_a_run_or_a_checkpoint_file(tiny_data, tmp_path):
    train(tmp_path / "base", tiny_data)
    last = records(tmp_path / "base", "val/loss")[-1]["val/loss"]
    for source in tmp_path / "base", tmp_path / "base" / "ckpt_00000040.pt":
        out = tmp_path / f"from-{source.suffix[1:]}"
        train(out, tiny_data, init_from=source, optimizer="adamw", max_iters=2)
        assert records(out, "val/loss")[0]["val/loss"] == pytest.approx(last, abs=1e-6)
    output = train(tmp_path / "short", tiny_data, init_from=tmp_path / "base", block_size=16,
                   max_iters=1)
    assert "finished at step 1" in output


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_gpt2_small_configs_train_on_a_cpu(tiny_data, tmp_path, optimizer):
    """With a narrow model, so that it takes seconds."""
    done = run("train.py", ROOT / f"config/train_gpt2_small_{optimizer}.py",
               f"--dataset={tiny_data}", f"--out_dir={tmp_path}", "--wandb_log=False",
               "--compile=False", "--device=cpu", "--batch_size=1", "--total_batch_size=2",
               "--n_layer=2", "--n_embd=96", "--max_iters=2", "--eval_iters=1",
               "--block_size=128", "--log_interval=1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "finished at step 2" in done.stdout
    assert len(records(tmp_path)) == 2


def test_sophia_needs_only_torch_and_lion_and_muon_only_sophia():
    """Users copy sophia.py alone, or lion.py or muon.py together with it."""
    for module in sophia, lion, muon:
        wanted = {"torch"} if module is sophia else {"torch", "sophia"}
        source = open(module.__file__).read()
        imported = {line.split()[1].split(".")[0] for line in source.splitlines()
                    if line.startswith(("import ", "from "))}
        assert imported - sys.stdlib_module_names == wanted
