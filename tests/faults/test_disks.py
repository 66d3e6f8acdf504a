"""Full disks, damaged checkpoints and data, power failures, and two processes in one folder."""
import os
import pickle
import resource
import shutil
import subprocess
from functools import partial

import pytest
import torch
from conftest import snapshot
from harness import (
    STEP,
    Run,
    assert_refused,
    assert_same,
    at,
    finished_run,
    run,
    signal_self,
    undisturbed,
)

pytestmark = pytest.mark.slow


def limit_files(beyond, path):
    """From now on, no file can become larger than path is now, plus `beyond` bytes."""
    size = os.path.getsize(path) if os.path.exists(path) else 0
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + beyond, size + beyond))


def test_a_disk_too_full_for_a_checkpoint_is_one_error_and_the_run_resumes_later(undisturbed, run):
    for step in 15, 5:   # the second process starts at step 10
        full = at(STEP, step, "before", limit_files, 100_000, "none")
        assert_refused(run.start(fault=full), "cannot write", "ckpt_00000020.pt", "too large",
                       "intact")
        assert run.checkpoints() == [10] and not list(run.out_dir.glob("*.tmp"))
    run.finish()
    assert_same(run, undisturbed)


def test_a_disk_too_full_for_a_log_record_is_one_error_and_the_run_resumes_later(tiny_data,
                                                                                tmp_path):
    """log_interval=1 makes metrics.jsonl larger than the log, so that the error still fits."""
    undisturbed = finished_run(tmp_path / "undisturbed", tiny_data, log_interval=1)
    run = Run(tmp_path, tiny_data, log_interval=1)
    full = at(STEP, 15, "before", limit_files, 100, run.out_dir / "metrics.jsonl")
    assert_refused(run.start(fault=full), "cannot write", "metrics.jsonl", "too large", "intact")
    assert not (run.out_dir / "metrics.jsonl").read_text().endswith("\n")   # a torn line
    run.finish()
    assert_same(run, undisturbed)


def mount(*words):
    return subprocess.run(["mount", *map(str, words)], capture_output=True).returncode == 0


def test_a_run_survives_a_disk_that_is_really_full_and_then_read_only(undisturbed, run, thorough):
    """A mounted disk with space for two checkpoints."""
    run.out_dir.mkdir()
    if not thorough or not mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", run.out_dir):
        pytest.skip("needs --thorough and root")
    try:
        assert_refused(run.start(), "cannot write", "ckpt_00000030.pt", "No space left", "intact")
        assert run.checkpoints() == [10, 20] and not list(run.out_dir.glob("*.tmp"))
        assert mount("-o", "remount,ro,size=9m", run.out_dir)
        assert_refused(run.start(), "cannot write", str(run.out_dir), "Read-only file system")
        assert mount("-o", "remount,rw", run.out_dir)
        run.finish()
        assert_same(run, undisturbed)
    finally:
        subprocess.run(["umount", run.out_dir], check=True)


def test_a_run_skips_damaged_checkpoints_and_never_deletes_a_good_one_for_them(tiny_data,
                                                                              tmp_path):
    """The run does not learn, so no checkpoint is kept because it is the best."""
    undisturbed = finished_run(tmp_path / "undisturbed", tiny_data, learning_rate=0.0)
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
    assert (run.out_dir / "ckpt_00000098.pt").exists()   # another version may read it


def test_data_truncated_during_a_run_is_one_error_and_the_run_resumes_later(undisturbed, tiny_data,
                                                                           tmp_path):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    run = Run(tmp_path, data)
    whole = (data / "train.bin").read_bytes()
    cut = at(STEP, 15, "before", os.truncate, data / "train.bin", 1000)
    assert_refused(run.start(fault=cut), "train.bin", "truncated under this run")
    assert_refused(run.start(), "train.bin", "1,000 bytes")
    (data / "train.bin").write_bytes(bytes(len(whole)))
    assert_refused(run.start(), "train.bin", "other data")
    assert run.checkpoints() == [10]
    (data / "train.bin").write_bytes(whole)
    run.finish()
    assert_same(run, undisturbed)


def test_a_running_process_keeps_reading_the_data_file_it_opened(undisturbed, tiny_data, tmp_path):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    run = Run(tmp_path, data)
    (data / "new.bin").write_bytes(bytes(40_000))
    replaced = at(STEP, 15, "before", os.replace, data / "new.bin", data / "train.bin")
    assert run.start(fault=replaced).end() == 0
    assert_same(run, undisturbed)


def lose_power(step, metrics):
    """A fault: in `step`, the process dies and metrics.jsonl loses all bytes not fsynced."""
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


def test_a_power_failure_loses_no_record_older_than_the_checkpoint(undisturbed, run):
    for _ in range(2):
        fault = partial(lose_power, 18, run.out_dir / "metrics.jsonl")
        assert run.start(fault=fault).end() == -9
    run.finish()
    assert_same(run, undisturbed)


def test_a_second_process_cannot_use_the_run_directory_of_a_running_one(undisturbed, run):
    first = run.start(fault=at(STEP, 25, "before", signal_self, "SIGSTOP"))
    first.wait_for("sends itself SIGSTOP")
    before = snapshot(run.out_dir)
    for words in [], ["--init_from=resume"]:
        assert_refused(run.start(*words), "another process", str(run.out_dir))
    assert_refused(run.start("--init_from=scratch"), "holds a run")
    assert run.start("--eval_only=True").end() == 0   # writes nothing
    assert snapshot(run.out_dir) == before
    first.send("SIGKILL")
    assert first.end() == -9
    run.finish()
    assert_same(run, undisturbed)
