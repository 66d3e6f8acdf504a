"""Disks that are full, checkpoints and data that are damaged, power that fails, two processes."""
import os
import pickle
import resource
import shutil
import subprocess
from functools import partial

import pytest
import torch
from harness import STEP, Run, assert_same, at, signal_self
from test_errors import snapshot


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_data):
    run = Run(tmp_path_factory.mktemp("undisturbed"), tiny_data)
    run.finish()
    return run


@pytest.fixture
def run(tiny_data, tmp_path):
    return Run(tmp_path, tiny_data)


def refused(process, *named):
    """The process ended with exit code 2 and one line that names all of named."""
    assert process.end() == 2, process.output()
    lines = process.output().splitlines()
    errors = [line for line in lines if "error" in line]
    assert lines[-1:] == errors and "Traceback" not in process.output(), process.output()
    assert all(word in errors[0] for word in named), errors


def limit_files(beyond, path):
    """From now on no file grows beyond the size of path, if it has one, + beyond bytes."""
    size = os.path.getsize(path) if os.path.exists(path) else 0
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + beyond, size + beyond))


def test_no_space_for_a_checkpoint(undisturbed, run):
    for step in 15, 5:   # in the second process, 10 is where it starts
        full = at(STEP, step, "before", limit_files, 100_000, "none")
        refused(run.start(fault=full), "cannot write", "ckpt_00000020.pt", "too large", "intact")
        assert run.checkpoints() == [10] and not list(run.out_dir.glob("*.tmp"))
    run.finish()
    assert_same(run, undisturbed)


def test_no_space_for_a_record(tiny_data, tmp_path):
    """metrics.jsonl is the larger of it and the log, which needs space for the error."""
    undisturbed = Run(tmp_path / "undisturbed", tiny_data, log_interval=1)
    undisturbed.finish()
    run = Run(tmp_path, tiny_data, log_interval=1)
    full = at(STEP, 15, "before", limit_files, 100, run.out_dir / "metrics.jsonl")
    refused(run.start(fault=full), "cannot write", "metrics.jsonl", "too large", "intact")
    assert not (run.out_dir / "metrics.jsonl").read_text().endswith("\n")   # a torn line
    run.finish()
    assert_same(run, undisturbed)


def mount(*words):
    return subprocess.run(["mount", *map(str, words)], capture_output=True).returncode == 0


def test_a_disk_that_is_full_or_read_only(undisturbed, run, slow):
    """A real one, with space for two checkpoints."""
    run.out_dir.mkdir()
    if not slow or not mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", run.out_dir):
        pytest.skip("with --slow, for root")
    try:
        refused(run.start(), "cannot write", "ckpt_00000030.pt", "No space left", "intact")
        assert run.checkpoints() == [10, 20] and not list(run.out_dir.glob("*.tmp"))
        assert mount("-o", "remount,ro,size=9m", run.out_dir)
        refused(run.start(), "cannot write", str(run.out_dir), "Read-only file system")
        assert mount("-o", "remount,rw", run.out_dir)
        run.finish()
        assert_same(run, undisturbed)
    finally:
        subprocess.run(["umount", run.out_dir], check=True)


def test_damaged_checkpoints_do_not_push_out_good_ones(tiny_data, tmp_path):
    """In a run that does not learn, so that no checkpoint is kept for being the best."""
    undisturbed = Run(tmp_path / "undisturbed", tiny_data, learning_rate=0.0)
    undisturbed.finish()
    run = Run(tmp_path, tiny_data, learning_rate=0.0)
    run.start(fault=at(STEP, 23, "after", signal_self, "SIGTERM")).end()
    assert run.checkpoints() == [20, 23]
    (run.out_dir / "ckpt_00000023.pt").write_bytes(b"")
    other = torch.load(run.out_dir / "ckpt_00000020.pt")
    torch.save({**other, "version": 999}, run.out_dir / "ckpt_00000098.pt")
    (run.out_dir / "ckpt_00000099.pt").write_bytes(pickle.dumps({"model": "of another program"}))
    (run.out_dir / "ckpt_00000017.pt.tmp").write_bytes(b"begun by a process that was killed")
    process = run.start(fault=at(STEP, 15, "after", signal_self, "SIGKILL"))
    assert process.end() == -9
    for name in "ckpt_00000023.pt", "ckpt_00000098.pt has format version 999", "ckpt_00000099.pt":
        assert name in process.output()
    assert process.output().count("falling back") == 3
    assert f"resuming from {run.out_dir}/ckpt_00000020.pt" in process.output()
    assert "ckpt_00000030.pt" in run.finish()
    assert_same(run, undisturbed)
    assert not list(run.out_dir.glob("*.tmp"))
    assert (run.out_dir / "ckpt_00000098.pt").exists()   # for the program that can read it


def test_data_that_is_cut_under_a_run(undisturbed, tiny_data, tmp_path):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    run = Run(tmp_path, data)
    whole = (data / "train.bin").read_bytes()
    cut = at(STEP, 15, "before", os.truncate, data / "train.bin", 1000)
    refused(run.start(fault=cut), "train.bin", "truncated under this run")
    refused(run.start(), "train.bin", "1,000 bytes")
    (data / "train.bin").write_bytes(bytes(len(whole)))
    refused(run.start(), "train.bin", "other data")
    assert run.checkpoints() == [10]
    (data / "train.bin").write_bytes(whole)
    run.finish()
    assert_same(run, undisturbed)


def test_data_that_is_replaced_under_a_run_is_read_to_the_end(undisturbed, tiny_data, tmp_path):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    run = Run(tmp_path, data)
    (data / "new.bin").write_bytes(bytes(40_000))
    replaced = at(STEP, 15, "before", os.replace, data / "new.bin", data / "train.bin")
    assert run.start(fault=replaced).end() == 0
    assert_same(run, undisturbed)


def lose_power(step, metrics):
    """A fault: in `step`, the process and all of metrics.jsonl that was not fsynced are gone."""
    on_disk = {}   # bytes by inode

    def cut():
        os.truncate(metrics, on_disk.get(os.stat(metrics).st_ino, 0))
        signal_self("SIGKILL")

    fsync = os.fsync

    def noting(descriptor):
        fsync(descriptor)
        on_disk[os.fstat(descriptor).st_ino] = os.fstat(descriptor).st_size
    os.fsync = noting
    at(STEP, step, "after", cut)()


def test_records_before_a_checkpoint_survive_a_power_failure(undisturbed, run):
    for _ in range(2):
        fault = partial(lose_power, 18, run.out_dir / "metrics.jsonl")
        assert run.start(fault=fault).end() == -9
    run.finish()
    assert_same(run, undisturbed)


def test_a_second_process_is_refused_until_the_first_is_gone(undisturbed, run):
    first = run.start(fault=at(STEP, 25, "before", signal_self, "SIGSTOP"))
    first.wait_for("step 24/")
    before = snapshot(run.out_dir)
    for words in [], ["--init_from=resume"]:
        refused(run.start(*words), "another process", str(run.out_dir))
    refused(run.start("--init_from=scratch"), "holds a run")
    assert run.start("--eval_only=True").end() == 0   # writes nothing
    assert snapshot(run.out_dir) == before
    first.send("SIGKILL")
    assert first.end() == -9
    run.finish()
    assert_same(run, undisturbed)
