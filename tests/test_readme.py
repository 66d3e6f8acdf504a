"""What the README says: its commands run, its code runs, its table is the configs'."""
import contextlib
import importlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pytest
import torch
from conftest import ROOT, code_blocks, environment, flags, shell
from conftest import run as ranks_run
from pyarrow import parquet

from configurator import load_config
from dataloader import load_meta
from device import memory_estimate
from model import GPT, GPTConfig

README = (ROOT / "README.md").read_text()
COMMANDS, SNIPPETS = code_blocks(ROOT / "README.md")
SHORT = dict(n_layer=1, n_head=2, n_embd=32, block_size=32, batch_size=1, total_batch_size=8,
             max_iters=2, eval_iters=1, device="cpu", compile=False, wandb_log=False)


def run(line):
    return line.replace("python", sys.executable, 1)


def made(line):
    """A make command, with this Python in place of the .venv that it would install."""
    return line.replace("make", f"make -o .venv/installed PY={sys.executable}", 1)


def test_commands_are_those_that_are_tested_here():
    assert [c.split()[0] for c in COMMANDS] == (
        ["make"] * 2 + ["python"] * 4 + ["torchrun"] * 4 + ["python"] * 6)


def test_data_is_prepared(copy, tmp_path):
    texts = [f"document {i}" for i in range(3000)]
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "0.parquet")
    assert "val.bin" in shell(f"{run(COMMANDS[2])} --source={tmp_path}", copy)


def test_ones_own_text_becomes_a_model_in_three_commands(copy):
    """A file of 200 KB, and the run as it is but for its length."""
    (copy / "book.txt").write_text("It was the best of times, it was the worst of times.\n" * 3774)
    prepare, train, sample = map(run, COMMANDS[3:6])
    assert "--dataset=data/book" in shell(prepare, copy)
    assert load_meta(str(copy / "data/book"))["val_tokens"] == 20_003   # a tenth
    quick = " --max_iters=2 --warmup_iters=1 --eval_iters=1"
    assert "finished at step 2" in shell(train + quick, copy)
    assert "tokens in" in shell(sample + " --max_new_tokens=5", copy)


def test_help_fits_a_screen(capsys):
    scripts = [p.stem for p in ROOT.glob("*.py") if "\ndef main(argv)" in p.read_text()]
    assert len(scripts) >= 5
    for name in scripts:
        with contextlib.suppress(SystemExit):
            importlib.import_module(name).main(["--help"])
        lines = capsys.readouterr().out.splitlines()
        assert 8 <= len(lines) <= 55 and max(map(len, lines)) <= 100, name


def test_quickstart_prints_both_losses_and_a_sample_and_can_be_called_again(copy):
    line = made(COMMANDS[0]) + " ARGS='--max_iters=2 --warmup_iters=1 --eval_iters=1'"
    for _ in range(2):
        output = shell(line, copy)
        row = r"quickstart-(sophiag|adamw) +(sophiag|adamw) +2 +4,096 .*\d\.\d{4}"
        assert [m[0] for m in re.findall(row, output)] == ["sophiag", "adamw"]
        assert "tokens in" in output
    assert output.count("resuming from") == 2


def test_make_test_runs_pytest_and_ci_runs_make_test(copy):
    assert COMMANDS[1] == "make test" and "make test" in (ROOT / ".ci/run").read_text()
    plan = shell("make -n --no-print-directory -o .venv/installed-tests test", copy)
    assert [line.split()[1:3] for line in plan.splitlines()] == [["-m", "ruff"], ["-m", "pytest"]]


@pytest.mark.parametrize("command", [c for c in COMMANDS if "--standalone" in c])
def test_torchrun_lines_start(copy, tiny_data, tmp_path, command):
    config = re.search(r"config/\S+", command)[0]
    cfg = load_config([str(ROOT / config)], world_size=8)
    assert cfg.total_batch_size == 480 and cfg.hessian_batch_size == 240
    words = command.replace("torchrun", f"{sys.executable} -m torch.distributed.run")
    words = words.replace("--nproc_per_node=8", "--nproc_per_node=2").split()
    words += flags(**SHORT, dataset=tiny_data, out_dir=tmp_path)
    assert "finished at step 2" in shell(" ".join(words), copy)


def test_two_nodes_meet(copy, tiny_data, tmp_path):
    command = next(c for c in COMMANDS if "--nnodes=2" in c)
    command = command.replace("torchrun", f"{sys.executable} -m torch.distributed.run")
    command = command.replace("--nproc_per_node=8", "--nproc_per_node=1")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        command = command.replace("HOST:29500", f"localhost:{free.getsockname()[1]}")
    words = command.split() + flags(**SHORT, dataset=tiny_data, out_dir=tmp_path)
    nodes = [subprocess.Popen(words, cwd=copy, env=environment(), text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    outputs = [node.communicate(timeout=300) for node in nodes]
    assert all(node.returncode == 0 for node in nodes), outputs
    assert "2 ranks" in outputs[0][0] + outputs[1][0]


SRUN = """#!{python}
import os, signal, subprocess, sys
tasks = [subprocess.Popen(sys.argv[1:]) for _ in range(int(os.environ["SLURM_NNODES"]))]
signal.signal(signal.SIGUSR1, lambda number, frame: [task.send_signal(number) for task in tasks])
sys.exit(max(abs(task.wait()) for task in tasks))
"""
SCONTROL = """#!/bin/sh
case "$1 $2" in "show hostnames") printf 'localhost\\nother\\n';; *) echo "$@" >> requeued;; esac
"""


def test_slurm_job_of_two_nodes_is_requeued_and_resumes(copy, tiny_data, tmp_path):
    """config/slurm.sbatch as it is; srun starts both agents here. The time limit comes in the first
    run, and the training ends in the second."""
    for name, text in ("srun", SRUN.replace("{python}", sys.executable)), ("scontrol", SCONTROL):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    job = os.getpid()   # its port is then free of other tests'
    folders = tmp_path, Path(sys.executable).parent, os.environ["PATH"]
    env = environment(PATH=":".join(map(str, folders)), SLURM_JOB_ID=str(job), SLURM_NNODES="2",
                      SLURM_JOB_NODELIST="node[1-2]", SLURM_GPUS_ON_NODE="1")
    (copy / "requeued").unlink(missing_ok=True)
    log = tmp_path / "log"

    def sbatch(max_iters):
        words = flags(**{**SHORT, "max_iters": max_iters}, dataset=tiny_data, log_interval=1,
                      warmup_iters=0, out_dir=tmp_path / "run")
        with open(log, "a") as file:
            return subprocess.Popen(["bash", "config/slurm.sbatch", *words], cwd=copy, env=env,
                                    stdout=file, stderr=file)

    first = sbatch(10**6)
    give_up = time.monotonic() + 120
    while "step 3/" not in log.read_text():
        assert first.poll() is None and time.monotonic() < give_up, log.read_text()
        time.sleep(0.05)
    first.send_signal(signal.SIGUSR1)
    assert first.wait(120) != 0
    assert (copy / "requeued").read_text() == f"requeue {job}\n"
    stopped = int(re.search(r"stopped by a signal after step (\d+)", log.read_text())[1])
    second = sbatch(stopped + 2)
    assert second.wait(120) == 0, log.read_text()
    assert f"ckpt_{stopped:08}.pt" in re.search("resuming from (.*)", log.read_text())[1]
    assert f"finished at step {stopped + 2}" in log.read_text()
    assert (copy / "requeued").read_text() == f"requeue {job}\n"


def test_other_commands_run_after_a_quickstart(copy):
    train, sample, compare, export, bench, sweep = map(run, COMMANDS[-6:])
    quick = " --max_iters=2 --warmup_iters=1 --eval_iters=1"
    for name in "sophiag", "adamw":
        shell(f"{sys.executable} data/pystdlib/prepare.py && {sys.executable} train.py "
              f"config/quickstart_{name}.py --init_from=auto {quick}", copy)
    assert "finished at step 2" in shell(train + quick, copy)
    assert "tokens in" in shell(sample + " --max_new_tokens=5", copy)
    assert "final val loss" in shell(compare, copy)
    assert "wrote exported" in shell(export, copy)
    assert "[6/6]" in shell(sweep + quick + " --n_layer=1", copy)
    assert "sophiag" in shell(bench + " --compile=False --n_layer=1 --n_embd=48 --repeat=1", copy)


def test_first_snippet_trains_with_sophiag(capsys):
    exec(compile(SNIPPETS[0], "README", "exec"), {})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "10", "20", "30", "40"]


def test_second_snippet_updates_the_hessian_under_a_bare_step():
    names = {}
    exec(compile(SNIPPETS[1], "README", "exec"), names)
    model, optimizer = names["model"], names["optimizer"]
    for step in range(1, 31):
        model(names["torch"].randint(0, 100, (8, 64))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        used = [bool(s["hessian"].any()) for s in optimizer.state.values()]
        assert all(used) == (step >= 10)


def test_third_snippet_shards_a_model_over_two_ranks(tmp_path):
    (tmp_path / "fsdp.py").write_text(SNIPPETS[2])
    done = ranks_run(tmp_path / "fsdp.py", ranks=2)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == lines[1] and lines[2] == lines[3] and len(lines) == 4   # of the whole model
    assert [line.split()[0] for line in lines] == ["10", "10", "20", "20"]


def test_table_of_settings_is_that_of_the_configs():
    lines = re.findall(r"^\| (small|medium|large|xl), (.*) \|$", README, re.M)
    assert [size for size, _ in lines] == ["small", "medium", "large", "xl"]
    for size, line in lines:
        _, shape, *rates, rho, decay, memory = line.split(" | ")
        for name, lr in zip(("adamw", "lion", "sophiag"), rates):
            path = ROOT / f"config/train_gpt2_{size}_{name}.py"
            assert path.exists() == (lr != "-")
            if path.exists():
                cfg = load_config([str(path)])
                assert cfg.learning_rate == float(lr)
                assert f"{cfg.n_layer} / {cfg.n_head} / {cfg.n_embd}" == shape
        assert (cfg.rho, cfg.weight_decay) == (float(rho), float(decay))
        with torch.device("meta"):
            model = GPT(GPTConfig(n_layer=cfg.n_layer, n_head=cfg.n_head, n_embd=cfg.n_embd))
        parts = memory_estimate(cfg, model, torch.bfloat16, compiled=True)
        assert memory == f"{sum(parts.values()) / 1e9:.0f} GB" and cfg.batch_size == 12


def test_files_table_names_every_script():
    named = set(re.findall(r"`([\w/*]+\.py)`", README.split("## Files")[1]))
    assert {p.name for p in ROOT.glob("*.py")} == {n for n in named if "/" not in n}
