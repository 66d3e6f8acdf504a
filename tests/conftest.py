"""
Shared by all tests: a tiny data set, settings of a tiny run, and functions that run scripts, run
the commands of a page and compare runs.
"""
import json
import multiprocessing
import os
import pickle
import re
import runpy
import shutil
import signal
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

os.environ["OMP_NUM_THREADS"] = "1"   # PyTorch here: two workers share two cores
# nohup and a shell's & ignore these signals; the runs under test would inherit that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
# pytest --hypothesis-profile=thorough tries more cases.
for profile, cases in ("thorough", 1000), ("normal", 60):
    settings.register_profile(profile, max_examples=cases, deadline=None,
                              derandomize=profile == "normal",
                              suppress_health_check=[HealthCheck.function_scoped_fixture,
                                                     HealthCheck.too_slow])
    settings.load_profile(profile)
ROOT = Path(__file__).resolve().parent.parent
# A step takes milliseconds: context 32, 8 sequences per step.
TINY = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, batch_size=4, total_batch_size=8,
            max_iters=40, warmup_iters=5, lr_decay_iters=40, eval_interval=20, eval_iters=2,
            log_interval=1, learning_rate=1e-3, device="cpu", compile=False)
TIMES = {"seconds", "hours", "tokens_per_sec", "mfu"}   # differ between two equal runs


def flags(**settings):
    return [f"--{name}={value}" for name, value in settings.items()]


def command(script, *words, ranks=1):
    """The command line of a script. With several ranks, torchrun starts it."""
    run = [sys.executable]
    if ranks > 1:
        run += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [*run, str(ROOT / script), *map(str, words)]


def code_blocks(path):
    """The shell commands, without comments, and the Python snippets of a Markdown file."""
    text = path.read_text()
    commands = [line.split("#")[0].strip() for block in re.findall(r"```sh\n(.*?)```", text, re.S)
                for line in block.splitlines()]
    return commands, re.findall(r"```python\n(.*?)```", text, re.S)


def shell(line, cwd):
    """Run a shell command, which must succeed. Returns its output."""
    done = subprocess.run(line, shell=True, cwd=cwd, env=environment(), text=True, timeout=300,
                          capture_output=True)
    assert done.returncode == 0, line + "\n" + done.stdout + done.stderr
    return done.stdout


def environment(**changes):
    """The environment of a process. One thread, because the number of threads changes the last
    bits of sums."""
    return {**os.environ, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1", **changes}


FORKS = multiprocessing.get_context("forkserver")


class Fork:
    """
    A process that runs a script, forked from a process that has imported PyTorch, so that it starts
    in a tenth of a second. stdout, stderr: files to append its output to, possibly the same file.
    first: a function that it calls before the script starts.
    """

    def __init__(self, script, words, stdout, stderr, first=None, **env):
        with mock.patch.dict(os.environ, environment(PYTHONPATH=str(ROOT),
                                                     CUDA_VISIBLE_DEVICES="")):
            # every optimizer imports torch._dynamo when it is built
            FORKS.set_forkserver_preload(["pytest", "train", "sample", "compare", "torch._dynamo",
                                          "datasets"])
            forkserver.ensure_running()
        self.process = FORKS.Process(target=_in_fork, args=(script, list(map(str, words)),
                                                            (stdout, stderr), first, env))
        self.process.start()

    def end(self, timeout=120):
        """Wait for the end. Returns the exit code, or minus the signal that killed the process."""
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
    """The environment of each rank of a process group, as torchrun sets it."""
    if size == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]),
                  "WORLD_SIZE": str(size)}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def run(script, *words, ranks=1, cwd=ROOT, timeout=300, **env):
    """Run a script to its end. Returns a CompletedProcess with the text output of all ranks. Each
    rank is a Fork, unless env sets variables: then the script runs in a new Python process."""
    if env:
        return subprocess.run(command(script, *words, ranks=ranks), cwd=cwd,
                              env=environment(**env), text=True, capture_output=True,
                              timeout=timeout)
    with tempfile.TemporaryDirectory() as folder:
        output = [Path(folder) / name for name in ("stdout", "stderr")]
        forks = [Fork(script, words, *output, partial(os.chdir, cwd), **rank)
                 for rank in as_ranks(ranks)]
        code = max((fork.end(timeout) for fork in forks), key=abs)
        return subprocess.CompletedProcess(words, code, *(path.read_text() for path in output))


def train(out_dir, data, *words, ranks=1, **settings):
    """Run train.py with TINY settings, changed by settings. It must succeed. Returns its output."""
    knobs = {**TINY, "dataset": data, "out_dir": out_dir, **settings}
    done = run("train.py", *flags(**knobs), *words, ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def records(out_dir, key="train/loss"):
    """The records of a run's metrics.jsonl that contain key."""
    with open(Path(out_dir) / "metrics.jsonl") as file:
        return [r for r in map(json.loads, file) if key in r]


def assert_same_run(a, b):
    """Two run directories hold the same records and the same newest checkpoint, bit for bit. Times
    and settings may differ."""
    import checkpoint  # PyTorch is slow to import
    found = []
    for out_dir in a, b:
        newest = checkpoint.load(checkpoint.find_latest(str(out_dir))[0])
        del newest["metrics"]["seconds"], newest["config"]
        log = [{k: v for k, v in r.items() if k not in TIMES} for r in records(out_dir, "iter")]
        found.append({"records": log, "checkpoint": newest})
    assert_equal(*found)


def assert_equal(a, b, where="found"):
    """Two nested structures of dicts, lists, tensors and plain values have the same types, values
    and, in tensors, bits."""
    import torch
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (left, right) in enumerate(zip(a, b)):
            assert_equal(left, right, f"{where}[{i}]")
    elif torch.is_tensor(a):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), where
        left, right = (t.reshape(-1).view(torch.uint8) for t in (a, b))
        assert torch.equal(left, right), where
    else:
        assert a == b, where


def snapshot(folder):
    """{path: bytes, or False for a folder} of everything in folder."""
    return {str(path): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


class MakesFolder:
    """An object that creates a folder when it is unpickled, as a malicious checkpoint could."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def between_log_lines(log_step, begin, end):
    """Wrap Metrics.log_step: call begin() after each call, and end() before each call but the
    first."""
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
    """Write a data set of the given token ids, in the format of prepare.py. Returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, tokens in ("train", train_tokens), ("val", val_tokens):
        np.asarray(tokens, dtype="<u2").tofile(folder / f"{split}.bin")
    meta = {"tokenizer": "bytes", "vocab_size": vocab_size, "eot_id": vocab_size - 1,
            "dtype": "uint16", "train_tokens": len(train_tokens), "val_tokens": len(val_tokens),
            **meta}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def write_characters(folder, text):
    """Write text as nanoGPT's data/shakespeare_char/prepare.py does. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    characters = sorted(set(text))
    stoi, itos = {c: i for i, c in enumerate(characters)}, dict(enumerate(characters))
    ids = np.array([stoi[c] for c in text], dtype=np.uint16)
    ids[:len(ids) * 9 // 10].tofile(folder / "train.bin")
    ids[len(ids) * 9 // 10:].tofile(folder / "val.bin")
    with open(folder / "meta.pkl", "wb") as file:
        pickle.dump({"vocab_size": len(characters), "itos": itos, "stoi": stoi}, file)
    return folder


def pytest_addoption(parser):
    parser.addoption("--thorough", action="store_true",
                     help="tests/faults: more faults, a long run, real disks (needs root)")
    parser.addoption("--device", default="cuda", help="where tests/test_cuda.py runs: cuda | cpu")


@pytest.fixture(scope="session")
def thorough(pytestconfig):
    return pytestconfig.getoption("--thorough")


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the repository, so that commands write nothing into the original."""
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
    """20,000 training tokens, vocabulary 65. Each token depends on the one before, so a model can
    learn."""
    rng = np.random.default_rng(0)
    successors = rng.integers(0, 65, (65, 4))
    tokens = [0]
    for choice in rng.integers(0, 4, 23_999):
        tokens.append(successors[tokens[-1], choice])
    return write_data(tmp_path_factory.mktemp("data") / "tiny", tokens[:20_000], tokens[20_000:])
