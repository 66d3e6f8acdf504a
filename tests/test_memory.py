"""memory.py: the estimate against what the allocator counts, the start-up lines, the advice."""
import gc
import re

import pytest
import torch
from conftest import flags

from bench import HESSIAN, HESSIAN_UPDATE, OURS, Setup, peak_memory
from configurator import load_config
from memory import advise_on_memory, describe_memory, memory_estimate
from model import GPT, GPTConfig


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


@pytest.mark.parametrize("gigabytes, fits", [(12, True), (8, False)])
def test_a_gpu_too_small_for_the_estimate_gets_advice(monkeypatch, gigabytes, fits):
    """GPT-2 small: weights, gradients and two state tensors take 4 bytes per number."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, gigabytes * 10**9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test")
    monkeypatch.setenv("WORLD_SIZE", "8")
    with torch.device("meta"):
        model = GPT(GPTConfig())
    cfg = load_config(["--batch_size=12"], 8)
    line, gpu = describe_memory(cfg, model, torch.device("cuda"), torch.bfloat16,
                                compiled=True).splitlines()
    total, weights, gradients, state, activations, head = map(float, re.findall(r"\d+\.\d+", line))
    assert total == pytest.approx(weights + gradients + state + activations + head, abs=0.03)
    assert (gradients, state) == (0.5, 0.99) and fits == (total < gigabytes)
    assert gpu.startswith(f"GPU: NVIDIA Test, {gigabytes}.00 GB")
    assert ("lower --batch_size, which is 12, for example to 10" in gpu) == (not fits)


def test_the_advice_for_a_batch_size_of_one_is_not_to_lower_it():
    cfg = load_config(["--batch_size=1"])
    assert "--batch_size is 1 and cannot be lowered" in advise_on_memory(cfg, 1)
    assert "for example to 10;" in advise_on_memory(load_config(["--batch_size=12"]), 8)
