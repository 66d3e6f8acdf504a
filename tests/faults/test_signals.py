"""Signals, a second Ctrl-C, a closed terminal, a pipe without a reader, and a full log disk."""
import os
import signal
import subprocess
from functools import partial

import pytest
from conftest import command, environment
from harness import STEP, assert_same, at, run, set_up, signal_self, undisturbed

SIGNALS = "SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"


def test_every_signal_that_stops_a_run_finishes_its_step_and_saves(undisturbed, run, thorough):
    """One run, stopped at several steps by the signals in turn."""
    for i, step in enumerate(range(1, 40) if thorough else (7, 13, 20, 26)):
        name = SIGNALS[i % len(SIGNALS)]
        process = run.start(fault=at(STEP, step - run.newest(), "after", signal_self, name))
        assert process.end() == 0
        assert f"stopped by a signal after step {step};" in process.output()
        assert run.newest() == step
    run.finish()
    assert_same(run, undisturbed)


@pytest.mark.slow
def test_a_signal_during_a_save_finishes_the_save_and_one_more_step(undisturbed, run):
    process = run.start(fault=at("os.replace", 3, "before", signal_self, "SIGTERM"))
    assert process.end() == 0
    assert run.newest() == 11
    run.finish()
    assert_same(run, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("moment", [(STEP, 13, "after"), ("torch.save", 2, "before"),
                                    ("os.fsync", 9, "before"), ("os.replace", 4, "after")], ids=str)
def test_a_second_interrupt_exits_at_once_and_loses_no_checkpoint(undisturbed, run, moment):
    process = run.start(fault=at(*moment, signal_self, "SIGINT", "SIGINT"))
    assert process.end() == 130
    assert "Traceback" not in process.output()
    assert run.checkpoints()[0] == 10
    run.finish()
    assert_same(run, undisturbed)
    assert not list(run.out_dir.glob("*.tmp"))


def use_terminal(path):
    os.setsid()   # makes the terminal opened next the controlling one
    terminal = os.open(path, os.O_RDWR)
    for standard in 0, 1, 2:
        os.dup2(terminal, standard)


def close_terminal(ours, its):
    """Hang up at step 12."""
    while b"step 12/" not in os.read(ours, 10_000):
        pass
    os.close(its)
    os.close(ours)


@pytest.mark.slow
def test_closing_the_terminal_stops_the_run_with_a_checkpoint(undisturbed, run):
    ours, its = os.openpty()
    process = run.start(fault=partial(use_terminal, os.ttyname(its)))
    close_terminal(ours, its)
    assert process.end() == 0
    assert 12 <= run.newest() < 40
    run.finish()
    assert_same(run, undisturbed)


@pytest.mark.slow
def test_under_nohup_a_run_survives_the_closing_of_its_terminal(undisturbed, run):
    ours, its = os.openpty()
    process = run.start(fault=set_up([signal.signal, signal.SIGHUP, signal.SIG_IGN],
                                     [use_terminal, os.ttyname(its)]))
    close_terminal(ours, its)
    assert process.end() == 0
    assert_same(run, undisturbed)


def redirect(path):
    os.dup2(os.open(path, os.O_WRONLY), 1)


@pytest.mark.slow
def test_training_continues_when_its_log_is_on_a_full_disk(undisturbed, run):
    process = run.start(fault=partial(redirect, "/dev/full"))
    assert process.end() == 0 and process.output() == ""
    assert_same(run, undisturbed)


@pytest.mark.slow
def test_training_continues_when_nobody_reads_its_output_pipe(undisturbed, run):
    process = subprocess.Popen(command("train.py", *run.words), env=environment(),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(120) == 0
    assert_same(run, undisturbed)
