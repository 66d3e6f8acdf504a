"""
Training that is broken on purpose. A Run is a run directory in which train.py is started again and
again, mostly with a fault, until it ends; it must then be bit for bit the run that nobody
disturbed.

A fault is a function called in the process before train.py runs: it changes limits, or has the
process kill itself at a certain call of a certain function.
"""
import importlib
import os
import runpy
import signal
import sys
import time
from functools import partial

import torch
from conftest import ROOT, TINY, Fork, as_ranks, flags, records

import checkpoint

STEP = "ddp.seed_step"   # a function that is called once in each step, before anything moves
TIMEOUT = 120   # seconds after which a test gives up
# Dropout, whose random numbers must be resumed too; log lines that do not fall on checkpoints.
SETTINGS = {**TINY, "dropout": 0.1, "log_interval": 3, "eval_interval": 10, "eval_iters": 1,
            "grad_clip": 0.5}
ALWAYS_SAVING = {"eval_interval": 1}
TIMES = {"seconds", "hours", "tokens_per_sec"}


class Process(Fork):
    """train.py with its output in one file."""

    def __init__(self, log, words, fault=None, **env):
        self.log = log
        log.touch()
        super().__init__("train.py", words, log, log, fault, **env)

    def output(self):
        return self.log.read_text(errors="replace")

    def wait_for(self, text):
        """Return as soon as text has been printed."""
        give_up = time.monotonic() + TIMEOUT
        while text not in self.output():
            assert self.process.is_alive() and time.monotonic() < give_up, (text, self.output())
            time.sleep(0.001)

    def send(self, name):
        os.kill(self.process.pid, getattr(signal, name))


class Run:
    """A run directory under folder. settings: changes of SETTINGS."""

    def __init__(self, folder, data, **settings):
        self.folder, self.out_dir = folder, folder / "run"
        self.words = flags(**{**SETTINGS, "dataset": data, "out_dir": self.out_dir, **settings})
        self.starts = 0
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, *words, fault=None, **env):
        """Start train.py, which resumes if there is something to resume from: a Process."""
        self.starts += 1
        log = self.folder / f"log{self.starts}"
        return Process(log, [*self.words, "--init_from=auto", *words], fault, **env)

    def start_ranks(self, *words, faults=(None, None)):
        """Start train.py once for each of faults, as ranks of one group: a list of Process."""
        return [self.start(*words, fault=fault, **rank)
                for rank, fault in zip(as_ranks(len(faults)), faults)]

    def finish(self, *words):
        """Train to the end, undisturbed; returns the output."""
        process = self.start(*words)
        assert process.end() == 0, process.output()
        return process.output()

    def checkpoints(self):
        """Steps of the checkpoints that can be loaded, oldest first."""
        return [checkpoint.load(path)["step"]
                for path in reversed(checkpoint.list_checkpoints(self.out_dir))]

    def newest(self):
        """Step of the newest checkpoint that can be loaded, 0 if there is none."""
        return max(self.checkpoints(), default=0)

    def records(self):
        return [{k: v for k, v in record.items() if k not in TIMES}
                for record in records(self.out_dir, "iter")]

    def final(self):
        """Everything in the last checkpoint but the times."""
        found = checkpoint.load(checkpoint.find_latest(self.out_dir)[0])
        del found["metrics"]["seconds"], found["config"]
        return found


def assert_same(run, undisturbed):
    """All records, and weights, optimizer state and whatever else the last checkpoint holds."""
    assert run.records() == undisturbed.records()
    assert_equal(run.final(), undisturbed.final())


def assert_equal(a, b, where="checkpoint"):
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (left, right) in enumerate(zip(a, b)):
            assert_equal(left, right, f"{where}[{i}]")
    else:
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b, where


# ---------------------------------------------------------------- faults

def set_up(*calls):
    """A fault: each of calls, [function, *arguments]."""
    return partial(_call_all, calls)


def _call_all(calls):
    for function, *words in calls:
        function(*words)


def at(name, number, when, act, *words):
    """A fault: act(*words) in the process, before or after its number-th call of a function such
    as "os.replace"."""
    return partial(_wrap, *name.split("."), number, when, act, words)


def _wrap(module, name, number, when, act, words):
    module = importlib.import_module(module)
    function, calls = getattr(module, name), 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == number and when == "before":
            act(*words)
        result = function(*args, **kwargs)
        if calls == number and when == "after":
            act(*words)
        return result
    setattr(module, name, counted)


def signal_self(*names):
    for name in names:
        signal.raise_signal(getattr(signal, name))


if __name__ == "__main__":   # under torchrun: in start number n, from 0, rank n % 2 is killed
    start, kills = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(sys.argv[1])
    if start < kills and int(os.environ["RANK"]) == start % 2:
        at(STEP, 15, "before", signal_self, "SIGKILL")()
    sys.argv[:2] = [str(ROOT / "train.py")]
    runpy.run_path(sys.argv[0], run_name="__main__")
