"""
What the tests share: a tiny data set, the settings of a tiny run, and a way to run scripts as a
user does.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

# pytest --hypothesis-profile=slow tries more.
for profile, cases in ("slow", 1000), ("normal", 60):
    settings.register_profile(profile, max_examples=cases, deadline=None,
                              derandomize=profile == "normal",
                              suppress_health_check=[HealthCheck.function_scoped_fixture,
                                                     HealthCheck.too_slow])
    settings.load_profile(profile)
ROOT = Path(__file__).resolve().parent.parent
# Small enough for a step in milliseconds; context 32, 8 sequences a step.
TINY = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, batch_size=4, total_batch_size=8,
            max_iters=40, warmup_iters=5, lr_decay_iters=40, eval_interval=20, eval_iters=2,
            log_interval=1, learning_rate=1e-3, device="cpu", compile=False)


def flags(**settings):
    return [f"--{name}={value}" for name, value in settings.items()]


def command(script, *words, ranks=1):
    """The command line of a script, under torchrun if there are several ranks."""
    run = [sys.executable]
    if ranks > 1:
        run += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [*run, str(ROOT / script), *map(str, words)]


def environment(**changes):
    """One thread, since sums over another number of threads are not bitwise the same."""
    return {**os.environ, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1", **changes}


def run(script, *words, ranks=1, cwd=ROOT, timeout=300, **env):
    """Run a script to its end: a CompletedProcess with text output."""
    return subprocess.run(command(script, *words, ranks=ranks), cwd=cwd, env=environment(**env),
                          capture_output=True, text=True, timeout=timeout)


def train(out_dir, data, *words, ranks=1, **settings):
    """Run train.py with TINY settings; it must succeed. Returns its output."""
    knobs = {**TINY, "dataset": data, "out_dir": out_dir, **settings}
    done = run("train.py", *flags(**knobs), *words, ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def records(out_dir, key="train/loss"):
    """The records of a run's metrics.jsonl that have key."""
    with open(Path(out_dir) / "metrics.jsonl") as file:
        return [r for r in map(json.loads, file) if key in r]


def write_data(folder, train_tokens, val_tokens, vocab_size=65, **meta):
    """A data set of given token ids, in the format of prepare.py."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, tokens in ("train", train_tokens), ("val", val_tokens):
        np.asarray(tokens, dtype="<u2").tofile(folder / f"{split}.bin")
    meta = {"tokenizer": "bytes", "vocab_size": vocab_size, "eot_id": vocab_size - 1,
            "dtype": "uint16", "train_tokens": len(train_tokens), "val_tokens": len(val_tokens),
            **meta}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="break training many more times")


@pytest.fixture(scope="session")
def slow(pytestconfig):
    return pytestconfig.getoption("--slow")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """20,000 training tokens in which each depends on the one before, so that there is something to
    learn; vocabulary 65."""
    rng = np.random.default_rng(0)
    successors = rng.integers(0, 65, (65, 4))
    tokens = [0]
    for choice in rng.integers(0, 4, 23_999):
        tokens.append(successors[tokens[-1], choice])
    return write_data(tmp_path_factory.mktemp("data") / "tiny", tokens[:20_000], tokens[20_000:])
