"""bench.py: every section runs and reports positive numbers. Tests do not judge their size."""
import json

import pytest
import torch
from conftest import TINY, flags, run

from bench import plain_loss
from model import GPT, GPTConfig


@pytest.mark.slow
def test_every_section_reports_positive_numbers(tiny_data, tmp_path):
    done = run("bench.py", *flags(**TINY, dataset=tiny_data), "--repeat=1",
               f"--json={tmp_path}/bench.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "bench.json").read_text())
    rows = {(r["section"], r["name"]): r for r in found["rows"]}
    assert {section for section, _ in rows} == {"optimizer", "step", "attention", "memory"}
    for (_, name), row in rows.items():
        assert row["value"] > 0 and name in done.stdout, name
    for section, name, reference in (
            ("optimizer", "sophiag eager", "x copy"), ("step", "whole step, sophiag", "x adamw"),
            ("step", "plain forward and backward", "x ours"),
            ("attention", "PyTorch's choice", "1.00 x"), ("attention", "MATH", "x the choice"),
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


def test_mistakes_get_one_line():
    for word, named in ("--only=speed", "speed"), ("--repeat=0", "repeat"), ("--lr=1", "lr"):
        done = run("bench.py", word)
        assert done.returncode == 2 and named in done.stderr and done.stderr.count("\n") == 1
