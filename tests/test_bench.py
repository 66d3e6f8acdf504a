"""bench.py: every section runs and reports positive numbers. Tests do not judge their size."""
import gc
import json

import pytest
import torch
from conftest import TINY, flags, run

from bench import HESSIAN, HESSIAN_UPDATE, OURS, Setup, peak_memory, plain_loss
from configurator import load_config
from device import memory_estimate
from model import GPT, GPTConfig


@pytest.mark.slow
def test_every_section_reports_positive_numbers(tiny_data, tmp_path):
    done = run("bench.py", *flags(**TINY, dataset=tiny_data), "--repeat=1",
               f"--json={tmp_path}/bench.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "bench.json").read_text())
    rows = {(r["section"], r["name"]): r for r in found["rows"]}
    assert {section for section, _ in rows} == {"optimizer", "step", "head", "memory"}
    for (_, name), row in rows.items():
        assert row["value"] > 0 and name in done.stdout, name
    for section, name, reference in (
            ("optimizer", "sophiag eager", "x copy"), ("step", "whole step, sophiag", "x adamw"),
            ("step", "plain forward and backward", "x ours"), ("head", "all logits", "x ours"),
            ("memory", "forward and backward", "x plain"),
            ("memory", "training step, estimate", "x measured")):
        assert reference in rows[section, name]["note"]


def test_adamw_has_no_hessian_and_no_data_is_needed():
    done = run("bench.py", *flags(**TINY, dataset="openwebtext", optimizer="adamw"),
               "--only=step", "--repeat=1", "--n_embd=16")
    assert done.returncode == 0, done.stderr
    assert "whole step, adamw" in done.stdout and "hessian:" not in done.stdout


def test_plain_loss_is_the_models():
    """The reference computes the same loss and gradients as the model."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=65, block_size=16, n_layer=2, n_head=2, n_embd=32))
    x, y = torch.randint(0, 65, (2, 3, 16))
    plain, ours = plain_loss(model, x, y), model(x, targets=y)
    torch.testing.assert_close(plain, ours)
    for a, b in zip(*(torch.autograd.grad(loss, model.parameters()) for loss in (plain, ours))):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer, dtype, batch_size, block_size", [
    ("sophiag", "float32", 8, 256), ("lion", "bfloat16", 8, 256),   # mostly activations
    ("adamw", "float32", 1, 32), ("lion", "float32", 1, 32)])       # mostly weights and state
def test_memory_estimate_is_near_what_the_allocator_counts(optimizer, dtype, batch_size,
                                                           block_size):
    cfg = load_config(flags(n_layer=6, n_head=4, n_embd=128, block_size=block_size, dtype=dtype,
                            batch_size=batch_size, total_batch_size=16, optimizer=optimizer,
                            device="cpu", compile=False))
    setup = Setup(cfg, vocab_size=256)
    names = [OURS, optimizer] + [HESSIAN, HESSIAN_UPDATE] * (optimizer == "sophiag")
    gc.collect()   # memory of earlier tests could be freed during the measurement
    measured = peak_memory(names, setup)
    parts = memory_estimate(cfg, setup.model(), getattr(torch, dtype), compiled=False)
    assert sum(parts.values()) == pytest.approx(measured, rel=0.15)


def test_mistakes_get_one_line():
    for word, named in ("--only=speed", "speed"), ("--repeat=0", "repeat"), ("--lr=1", "lr"):
        done = run("bench.py", word)
        assert done.returncode == 2 and named in done.stderr and done.stderr.count("\n") == 1
