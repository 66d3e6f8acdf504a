"""Signals, Ctrl-C twice, and a terminal, a pipe or a log that is gone."""
import os
import signal
import subprocess
from functools import partial

import pytest
from conftest import command, environment
from harness import STEP, Run, assert_same, at, set_up, signal_self


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_data):
    run = Run(tmp_path_factory.mktemp("undisturbed"), tiny_data)
    run.finish()
    return run


@pytest.fixture
def run(tiny_data, tmp_path):
    return Run(tmp_path, tiny_data)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_a_signal_loses_no_step(undisturbed, run, name, slow):
    for step in range(1, 40) if slow else (7, 13):
        process = run.start(fault=at(STEP, step - run.newest(), "after", signal_self, name))
        assert process.end() == 0
        assert f"stopped by a signal after step {step};" in process.output()
        assert run.newest() == step
    run.finish()
    assert_same(run, undisturbed)


def test_a_signal_while_saving_loses_no_step(undisturbed, run):
    process = run.start(fault=at("os.replace", 3, "before", signal_self, "SIGTERM"))
    assert process.end() == 0
    assert run.newest() == 11
    run.finish()
    assert_same(run, undisturbed)


@pytest.mark.parametrize("moment", [(STEP, 13, "after"), ("torch.save", 2, "before"),
                                    ("os.fsync", 9, "before"), ("os.replace", 4, "after")], ids=str)
def test_a_second_interrupt_leaves_at_once_and_loses_no_checkpoint(undisturbed, run, moment):
    process = run.start(fault=at(*moment, signal_self, "SIGINT", "SIGINT"))
    assert process.end() == 130
    assert "Traceback" not in process.output()
    assert run.checkpoints()[0] == 10
    run.finish()
    assert_same(run, undisturbed)
    assert not list(run.out_dir.glob("*.tmp"))


def use_terminal(path):
    os.setsid()   # the terminal that is opened next is then this session's
    terminal = os.open(path, os.O_RDWR)
    for standard in 0, 1, 2:
        os.dup2(terminal, standard)


def close_terminal(ours, its):
    """Hang up in the middle of the run."""
    while b"step 12/" not in os.read(ours, 10_000):
        pass
    os.close(its)
    os.close(ours)


def test_a_terminal_that_closes_is_a_stop(undisturbed, run):
    ours, its = os.openpty()
    process = run.start(fault=partial(use_terminal, os.ttyname(its)))
    close_terminal(ours, its)
    assert process.end() == 0
    assert 12 <= run.newest() < 40
    run.finish()
    assert_same(run, undisturbed)


def test_under_nohup_training_survives_its_terminal(undisturbed, run):
    ours, its = os.openpty()
    process = run.start(fault=set_up([signal.signal, signal.SIGHUP, signal.SIG_IGN],
                                     [use_terminal, os.ttyname(its)]))
    close_terminal(ours, its)
    assert process.end() == 0
    assert_same(run, undisturbed)


def redirect(path):
    os.dup2(os.open(path, os.O_WRONLY), 1)


def test_a_log_on_a_full_disk_does_not_end_training(undisturbed, run):
    process = run.start(fault=partial(redirect, "/dev/full"))
    assert process.end() == 0 and process.output() == ""
    assert_same(run, undisturbed)


def test_a_pipe_without_a_reader_does_not_end_training(undisturbed, run):
    process = subprocess.Popen(command("train.py", *run.words), env=environment(),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(120) == 0
    assert_same(run, undisturbed)
