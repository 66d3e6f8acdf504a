"""bench.py runs every section, and its numbers are of the right kind; how large they are is not a
test's business."""
import gc
import json

import pytest
import torch
from conftest import TINY, flags, run

from bench import STEP, peak_memory, plain_loss, random_model
from configurator import load_config
from device import memory_estimate
from model import GPT, GPTConfig


def test_every_section_reports_positive_numbers(tiny_data, tmp_path):
    done = run("bench.py", *flags(**TINY, dataset=tiny_data), "--repeat=1",
               f"--json={tmp_path}/bench.json", f"--profile={tmp_path}/trace.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "bench.json").read_text())
    rows = {(r["section"], r["name"]): r for r in found["rows"]}
    assert {section for section, _ in rows} == {
        "optimizer", "step", "head", "memory", "data", "generate"}
    for (_, name), row in rows.items():
        assert row["value"] > 0 and name in done.stdout, name
    assert "equal tokens" in rows["generate", "16 tokens, uncached"]["note"]
    assert "of the measurement" in rows["memory", "training step, estimate"]["note"]
    assert "sophiag takes" in rows["step", "whole step, adamw"]["note"]
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_adamw_has_no_hessian_and_missing_data_means_random_tokens(tmp_path):
    done = run("bench.py", *flags(**TINY, dataset=f"{tmp_path}/none", optimizer="adamw"),
               "--only=step", "--repeat=1", "--n_embd=16")
    assert done.returncode == 0, done.stderr
    assert "random tokens" in done.stdout and "hessian:" not in done.stdout


def test_plain_loss_is_the_models():
    """The reference that the step is compared with computes the same thing."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=65, block_size=16, n_layer=2, n_head=2, n_embd=32))
    x, y = torch.randint(0, 65, (2, 3, 16))
    plain, ours = plain_loss(model, x, y), model(x, targets=y)
    torch.testing.assert_close(plain, ours)
    for a, b in zip(*(torch.autograd.grad(loss, model.parameters()) for loss in (plain, ours))):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("optimizer, dtype, batch_size, block_size", [
    ("sophiag", "float32", 8, 256), ("lion", "bfloat16", 8, 256),   # mostly activations
    ("adamw", "float32", 1, 32), ("lion", "float32", 1, 32)])       # mostly weights and the like
def test_memory_estimate_is_near_what_the_allocator_counts(optimizer, dtype, batch_size,
                                                           block_size):
    cfg = load_config(flags(n_layer=6, n_head=4, n_embd=128, block_size=block_size, dtype=dtype,
                            batch_size=batch_size, total_batch_size=16, optimizer=optimizer))
    device = torch.device("cpu")
    gc.collect()   # else what earlier tests left may be freed meanwhile
    measured = peak_memory(STEP, cfg, device, vocab_size=256, compile_model=False)
    model = random_model(cfg, device, vocab_size=256)
    parts = memory_estimate(cfg, model, getattr(torch, dtype), compiled=False)
    assert sum(parts.values()) == pytest.approx(measured, rel=0.15)


def test_one_rank_against_two(tiny_data):
    done = run("bench.py", *flags(**TINY, dataset=tiny_data), "--only=ranks", "--repeat=1")
    assert done.returncode == 0, done.stderr
    assert "1 rank " in done.stdout and "2 ranks" in done.stdout
    assert done.stdout.count(" x, optimizer ") == 2


def test_mistakes_get_one_line():
    for word, named in ("--only=speed", "speed"), ("--repeat=0", "repeat"), ("--lr=1", "lr"):
        done = run("bench.py", word)
        assert done.returncode == 2 and named in done.stderr and done.stderr.count("\n") == 1
