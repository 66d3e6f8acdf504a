"""
What the tests share: a tiny data set, the settings of a tiny run, ways to run scripts and the
commands of a page as a user does.
"""
import json
import multiprocessing
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

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


def code_blocks(path):
    """What a Markdown file tells its reader to run: shell commands without their comments, and
    Python snippets."""
    text = path.read_text()
    commands = [line.split("#")[0].strip() for block in re.findall(r"```sh\n(.*?)```", text, re.S)
                for line in block.splitlines()]
    return commands, re.findall(r"```python\n(.*?)```", text, re.S)


def shell(line, cwd):
    done = subprocess.run(line, shell=True, cwd=cwd, env=environment(), text=True, timeout=300,
                          capture_output=True)
    assert done.returncode == 0, line + "\n" + done.stdout + done.stderr
    return done.stdout


def environment(**changes):
    """One thread, since sums over another number of threads are not bitwise the same."""
    return {**os.environ, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1", **changes}


FORKS = multiprocessing.get_context("forkserver")


class Fork:
    """
    A script in a fork of a process that has imported PyTorch: it starts in a tenth of a second, and
    otherwise is a process like another. What it prints is added to files, which may be one. first:
    a function that it calls before the script begins.
    """

    def __init__(self, script, words, stdout, stderr, first=None, **env):
        with mock.patch.dict(os.environ, environment(PYTHONPATH=str(ROOT),
                                                     CUDA_VISIBLE_DEVICES="")):
            # torch._dynamo: what every optimizer imports when it is made
            FORKS.set_forkserver_preload(["pytest", "train", "sample", "compare", "torch._dynamo"])
            forkserver.ensure_running()
        self.process = FORKS.Process(target=_in_fork, args=(script, list(map(str, words)),
                                                            (stdout, stderr), first, env))
        self.process.start()

    def end(self, timeout=120):
        """Wait for the end: the exit code, or minus the signal that killed it."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"did not end in {timeout} s")
        return self.process.exitcode


def _in_fork(script, words, output, first, env):
    for standard, path in zip((1, 2), output):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), standard)
    os.environ.update(env)
    if first:
        first()
    sys.argv = [str(ROOT / script), *words]
    runpy.run_path(sys.argv[0], run_name="__main__")


def as_ranks(size):
    """The environment of each rank of a group, as torchrun would set it up."""
    if size == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]),
                  "WORLD_SIZE": str(size)}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def run(script, *words, ranks=1, cwd=ROOT, timeout=300, **env):
    """Run a script to its end: a CompletedProcess with text output, of all ranks. With an
    environment of its own it is a process from the start, else a Fork for each rank."""
    if env:
        return subprocess.run(command(script, *words), cwd=cwd, env=environment(**env), text=True,
                              capture_output=True, timeout=timeout)
    with tempfile.TemporaryDirectory() as folder:
        output = [Path(folder) / name for name in ("stdout", "stderr")]
        forks = [Fork(script, words, *output, partial(os.chdir, cwd), **rank)
                 for rank in as_ranks(ranks)]
        code = max((fork.end(timeout) for fork in forks), key=abs)
        return subprocess.CompletedProcess(words, code, *(path.read_text() for path in output))


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


def between_log_lines(log_step, begin, end):
    """Metrics.log_step, followed by begin() and, from the second call on, preceded by end()."""
    begun = False

    def wrapped(*args):
        nonlocal begun
        if begun:
            end()
        log_step(*args)
        begun = True
        begin()
    return wrapped


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
    parser.addoption("--device", default="cuda", help="where tests/test_cuda.py runs: cuda | cpu")


@pytest.fixture(scope="session")
def slow(pytestconfig):
    return pytestconfig.getoption("--slow")


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository's files in a folder of their own, so that runs leave nothing here."""
    folder = tmp_path_factory.mktemp("copy") / "repo"
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True,
                            capture_output=True, check=True).stdout.splitlines()
    for name in listed:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


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
