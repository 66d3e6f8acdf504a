"""memory.py: the estimate against what the allocator counts, the batch size, the advice."""
import gc
import re
from dataclasses import replace

import pytest
import torch
from conftest import TINY, flags, records, run, train
from fake_gpu import fake_gpu

import ddp
from bench import Setup, peak_memory
from configurator import load_config
from memory import advise_on_memory, choose_batch_size, describe_memory, memory_estimate
from model import GPT, GPTConfig


@pytest.mark.slow
@pytest.mark.parametrize("optimizer, dtype, batch_size, block_size", [
    ("sophiag", "float32", 8, 256), ("lion", "bfloat16", 8, 256),   # mostly activations
    ("muon", "float32", 8, 256),
    ("adamw", "float32", 1, 32), ("lion", "float32", 1, 32)])       # mostly weights and state
def test_memory_estimate_is_near_what_the_allocator_counts(optimizer, dtype, batch_size,
                                                           block_size):
    cfg = load_config(flags(n_layer=6, n_head=4, n_embd=128, block_size=block_size, dtype=dtype,
                            batch_size=batch_size, total_batch_size=16, optimizer=optimizer,
                            device="cpu", compile=False))
    setup = Setup(cfg, vocab_size=256)
    gc.collect()   # memory of earlier tests could be freed during the measurement
    measured = peak_memory(setup)
    parts = memory_estimate(cfg, setup.model(), getattr(torch, dtype), compiled=False)
    assert sum(parts.values()) == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("gigabytes, fits", [(12, True), (8, False)])
def test_a_gpu_too_small_for_the_estimate_gets_advice(monkeypatch, gigabytes, fits):
    """GPT-2 small: weights, gradients and two state tensors take 4 bytes per number."""
    gpu = fake_gpu(monkeypatch, "NVIDIA Test", total_gb=gigabytes)
    monkeypatch.setenv("WORLD_SIZE", "8")
    with torch.device("meta"):
        model = GPT(GPTConfig())
    cfg = load_config(["--batch_size=12"], 8)
    line, card = describe_memory(cfg, model, gpu, torch.bfloat16, compiled=True).splitlines()
    total, weights, gradients, state, activations, head = map(float, re.findall(r"\d+\.\d+", line))
    assert total == pytest.approx(weights + gradients + state + activations + head, abs=0.03)
    assert (gradients, state) == (0.5, 0.99) and fits == (total < gigabytes)
    assert card.startswith(f"GPU: NVIDIA Test, {gigabytes}.00 GB")
    assert ("lower --batch_size, which is 12, for example to 10" in card) == (not fits)


def test_the_advice_for_a_batch_size_of_one_is_not_to_lower_it():
    cfg = load_config(["--batch_size=1"])
    assert "--batch_size is 1 and cannot be lowered" in advise_on_memory(cfg, 1)
    assert "for example to 10;" in advise_on_memory(load_config(["--batch_size=12"]), 8)


# ---------------------------------------------------------------- batch_size=None

def chosen(monkeypatch, free_gb, before=None, ranks=1, **settings):
    """The batch size that is chosen on a fake GPU with GPT-2's vocabulary, in bfloat16."""
    gpu = fake_gpu(monkeypatch, free_gb=free_gb)
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    cfg = load_config(flags(**{"dtype": "bfloat16", "compile": False, **settings}), ranks)
    return choose_batch_size(cfg, gpu, 50257, before).batch_size


def estimate(batch_size, **settings):
    """Bytes that are estimated for this batch size, with the settings of `chosen`."""
    with torch.device("meta"):
        model = GPT(GPTConfig())
    cfg = load_config(flags(compile=False, batch_size=batch_size, **settings))
    return sum(memory_estimate(cfg, model, torch.bfloat16, compiled=False).values())


def test_the_largest_batch_size_whose_estimate_fits_is_chosen(monkeypatch, capsys):
    """GPT-2 small, 480 sequences per step. 85% of the free memory count."""
    divisors = [n for n in range(1, 481) if 480 % n == 0]
    for size, larger in zip(divisors, divisors[1:]):
        least = estimate(size) / 0.85 / 1e9
        assert chosen(monkeypatch, least + 1e-6) == size
        assert chosen(monkeypatch, estimate(larger) / 0.85 / 1e9 - 1e-6) == size
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 2 and all(f"batch_size: {size}; it needs" in line for line in lines)
    assert chosen(monkeypatch, 10_000) == 480
    assert chosen(monkeypatch, 1) == 1   # nothing fits: train.py says so and tries


def test_ranks_share_the_batch_and_the_smallest_free_memory_decides(monkeypatch):
    assert chosen(monkeypatch, 10_000, ranks=8) == 60
    alone = chosen(monkeypatch, 20, ranks=8)
    assert alone < 60
    monkeypatch.setattr(ddp, "all_reduce_max", lambda number: max(number, -20 * 10**9))
    assert chosen(monkeypatch, 10_000, ranks=8) == alone


def test_a_resumed_run_keeps_its_batch_size_if_it_fits(monkeypatch, capsys):
    assert chosen(monkeypatch, 10_000, before=12) == 12
    assert "batch_size: 12, as before; " in capsys.readouterr().out
    assert chosen(monkeypatch, 10_000, before=7) == 480   # no divisor: another number of ranks
    small = chosen(monkeypatch, 20)
    assert chosen(monkeypatch, 20, before=480) == small < 480


def test_an_explicit_batch_size_stays_and_other_devices_take_at_most_12(monkeypatch, capsys):
    assert chosen(monkeypatch, 20, before=12, batch_size=480) == 480
    assert chosen(monkeypatch, 10_000, hessian_estimator="hutchinson") == 12   # has no estimate
    for kind in "cpu", "mps":
        for total, wanted in (480, 12), (9, 9), (26, 2), (7, 7), (13, 1):
            cfg = load_config(flags(total_batch_size=total))
            assert cfg.batch_size is None
            assert choose_batch_size(cfg, torch.device(kind), 50257) == replace(cfg,
                                                                                batch_size=wanted)
    assert capsys.readouterr().out == ""


def test_a_run_that_torchrun_restarts_resumes_if_another_batch_size_fits_now(tiny_data, tmp_path):
    train(tmp_path, tiny_data, max_iters=20)
    knobs = {**TINY, "dataset": tiny_data, "out_dir": tmp_path, "max_iters": 20, "batch_size": 2}
    done = run("train.py", *flags(**knobs), TORCHELASTIC_RESTART_COUNT="1")
    assert done.returncode == 0 and "resuming from" in done.stdout, done.stderr


def test_a_run_without_a_batch_size_trains_and_writes_the_choice(tiny_data, tmp_path):
    output = train(tmp_path, tiny_data, batch_size=None, total_batch_size=36, max_iters=2)
    assert "1 rank x batch_size 12 x 3 micro-steps" in output
    assert '"batch_size": 12' in (tmp_path / "config.json").read_text()
    assert len(records(tmp_path)) == 2
    done = run("train.py", "--total_batch_size=9", ranks=2)
    assert "total_batch_size=9 is not divisible by batch_size=1 x 2 ranks" in done.stderr
