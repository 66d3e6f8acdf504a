"""
Tools of the fault tests. A Run is a run directory. A test starts train.py in it several times,
mostly with a fault, until training finishes. The result must equal an undisturbed run bit for bit.

A fault is a function that the process calls before train.py starts. It lowers a limit, or makes the
process kill itself at the n-th call of some function.
"""
import importlib
import os
import runpy
import signal
import sys
import time
from functools import partial

import pytest
from conftest import ROOT, TINY, Fork, as_ranks, assert_same_run, flags

import checkpoint

STEP = "ddp.seed_step"   # called once per step, before the step changes anything
TIMEOUT = 120   # seconds after which a test gives up
# Dropout, because its random state must be resumed too; log lines that miss the checkpoints.
SETTINGS = {**TINY, "dropout": 0.1, "log_interval": 3, "eval_interval": 10, "eval_iters": 1,
            "grad_clip": 0.5}
ALWAYS_SAVING = {"eval_interval": 1}


class Process(Fork):
    """A process of train.py that writes its output to one file."""

    def __init__(self, log, words, fault=None, **env):
        self.log = log
        log.touch()
        super().__init__("train.py", words, log, log, fault, **env)

    def output(self):
        return self.log.read_text(errors="replace")

    def wait_for(self, text):
        """Wait until the process has printed text."""
        give_up = time.monotonic() + TIMEOUT
        while text not in self.output():
            assert self.process.is_alive() and time.monotonic() < give_up, (text, self.output())
            time.sleep(0.001)

    def send(self, name):
        os.kill(self.process.pid, getattr(signal, name))


class Run:
    """A run directory in folder. settings override SETTINGS."""

    def __init__(self, folder, data, **settings):
        self.folder, self.out_dir = folder, folder / "run"
        self.words = flags(**{**SETTINGS, "dataset": data, "out_dir": self.out_dir, **settings})
        self.starts = 0
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, *words, fault=None, **env):
        """Start train.py and return its Process. It resumes if there is a checkpoint."""
        self.starts += 1
        log = self.folder / f"log{self.starts}"
        return Process(log, [*self.words, "--init_from=auto", *words], fault, **env)

    def start_ranks(self, *words, faults=(None, None)):
        """Start one rank of train.py per fault, in one process group: a list of Process."""
        return [self.start(*words, fault=fault, **rank)
                for rank, fault in zip(as_ranks(len(faults)), faults)]

    def finish(self, *words):
        """Train to the end without a fault; returns the output."""
        process = self.start(*words)
        assert process.end() == 0, process.output()
        return process.output()

    def checkpoints(self):
        """The steps of all loadable checkpoints, oldest first."""
        return [checkpoint.load(path)["step"]
                for path in reversed(checkpoint.list_checkpoints(self.out_dir))]

    def newest(self):
        """The step of the newest loadable checkpoint, or 0."""
        return max(self.checkpoints(), default=0)


def finished_run(folder, data, **settings):
    """A Run that was trained to the end without a fault."""
    run = Run(folder, data, **settings)
    run.finish()
    return run


def finish_ranks(run):
    """Train to the end on two ranks without a fault."""
    ranks = run.start_ranks()
    assert [rank.end() for rank in ranks] == [0, 0], [rank.output() for rank in ranks]


def assert_same(run, undisturbed):
    assert_same_run(run.out_dir, undisturbed.out_dir)


def assert_refused(process, *named, code=2):
    """The process exits with code, and its last line is an error that contains all of named."""
    assert process.end() == code, process.output()
    lines = process.output().splitlines()
    errors = [line for line in lines if "error" in line]
    assert lines[-1:] == errors and "Traceback" not in process.output(), process.output()
    assert all(word in errors[0] for word in named), errors


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_data):
    """A finished run without a fault."""
    return finished_run(tmp_path_factory.mktemp("undisturbed"), tiny_data)


@pytest.fixture
def run(tiny_data, tmp_path):
    """A run directory with nothing in it yet."""
    return Run(tmp_path, tiny_data)


# ---------------------------------------------------------------- faults

def set_up(*calls):
    """A fault made of several: each call is [function, *arguments]."""
    return partial(_call_all, calls)


def _call_all(calls):
    for function, *words in calls:
        function(*words)


def at(name, number, when, act, *words):
    """A fault: call act(*words) before or after the process's number-th call of the function name,
    for example "os.replace"."""
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
    """The line lets a test wait until everything before the signal is done and written."""
    for name in names:
        print("sends itself", name, flush=True)
        signal.raise_signal(getattr(signal, name))


if __name__ == "__main__":   # torchrun starts this; in start n = 0, 1, ... rank n % 2 is killed
    start, kills = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(sys.argv[1])
    if start < kills and int(os.environ["RANK"]) == start % 2:
        at(STEP, 15, "before", signal_self, "SIGKILL")()
    sys.argv[:2] = [str(ROOT / "train.py")]
    runpy.run_path(sys.argv[0], run_name="__main__")
