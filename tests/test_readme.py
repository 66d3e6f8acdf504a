"""README: its commands and snippets run, and its table shows the numbers of the configs."""
import contextlib
import importlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pyarrow
import pytest
import torch
import torch.distributed.run
from conftest import ROOT, code_blocks, environment, flags, run, shell
from pyarrow import parquet

from configurator import load_config
from dataloader import load_meta
from memory import memory_estimate
from model import GPT, GPTConfig

README = (ROOT / "README.md").read_text()
COMMANDS, SNIPPETS = code_blocks(ROOT / "README.md")
QUICK = " --max_iters=2 --warmup_iters=1 --eval_iters=1"
SHORT = dict(n_layer=1, n_head=2, n_embd=32, block_size=32, batch_size=1, total_batch_size=8,
             max_iters=2, eval_iters=1, device="cpu", compile=False, wandb_log=False)


def command(word):
    """The only command of the README that contains word, with this Python."""
    found, = [line for line in COMMANDS if word in line]
    torchrun = f"{sys.executable} -m torch.distributed.run"
    return re.sub("^python", sys.executable, re.sub("^torchrun", torchrun, found))


def make(target):
    """A make command that uses this Python and installs nothing."""
    return (f"make --no-print-directory -o .venv/installed -o .venv/installed-tests "
            f"PY={sys.executable} {target}")


def test_every_command_is_tested_here():
    words = ("make quickstart", "openwebtext", "python train.py config/train_gpt2", "--standalone",
             "--nnodes", "higher-lr", "sweep.py", "compare.py", "--top_k", "export.py", "bench.py",
             "book.txt", "--dataset=book", "sample.py out/book")
    assert len({command(word) for word in words}) == len(COMMANDS) == len(words)


@pytest.mark.slow
def test_openwebtext_can_be_prepared_from_local_files(copy, tmp_path):
    texts = [f"document {i}" for i in range(3000)]
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "0.parquet")
    assert "val.bin" in shell(f"{command('openwebtext')} --source={tmp_path}", copy)


@pytest.mark.slow
def test_ones_own_text_becomes_a_model_in_three_commands(copy):
    (copy / "book.txt").write_text("It was the best of times, it was the worst of times.\n" * 3774)
    assert "--dataset=data/book" in shell(command("book.txt"), copy)
    assert 20_003 <= load_meta(str(copy / "data/book"))["val_tokens"] < 20_010   # a tenth
    assert "finished at step 2" in shell(command("--dataset=book") + QUICK, copy)
    assert "tokens in" in shell(command("sample.py out/book") + " --max_new_tokens=5", copy)


def test_help_fits_on_a_screen(capsys):
    scripts = [p.stem for p in ROOT.glob("*.py") if "\ndef main(argv)" in p.read_text()]
    assert len(scripts) >= 5
    for name in scripts:
        with contextlib.suppress(SystemExit):
            importlib.import_module(name).main(["--help"])
        lines = capsys.readouterr().out.splitlines()
        assert 8 <= len(lines) <= 55 and max(map(len, lines)) <= 100, name


def run_quickstart(copy):
    return shell(make("quickstart") + f" ARGS='{QUICK}'", copy)


@pytest.fixture(scope="module")
def quickstart(copy):
    """The output of a short `make quickstart`, which leaves its runs in the copy's out/."""
    return run_quickstart(copy)


@pytest.mark.slow
def test_quickstart_compares_two_runs_and_samples_and_a_second_call_resumes(copy, quickstart):
    assert "make quickstart" in COMMANDS
    again = run_quickstart(copy)
    assert "resuming from" not in quickstart and again.count("resuming from") == 2
    for output in quickstart, again:
        row = r"quickstart-(sophiag|adamw) +(sophiag|adamw) +2 +4,096 .*\d\.\d{4}"
        assert [m[0] for m in re.findall(row, output)] == ["sophiag", "adamw"]
        assert "tokens in" in output


@pytest.mark.slow
def test_the_other_commands_run_after_a_quickstart(copy, quickstart):
    """As forks, which start faster. A sweep trains the first run of its grid."""
    data = f" --dataset={copy}/data/pystdlib"
    for word, more, wanted in [
            ("higher-lr", QUICK + data, "finished at step 2"),
            ("sweep.py", QUICK + data + " --n_layer=1 --only=0", "[1/1]"),
            ("compare.py", "", "final val loss"),
            ("--top_k", " --max_new_tokens=5", "tokens in"),
            ("export.py", "", "wrote exported"),
            ("bench.py", " --compile=False --n_layer=1 --n_embd=48 --repeat=1", "sophiag")]:
        _, script, *words = shlex.split(command(word) + more)
        done = run(script, *words, cwd=copy)
        assert done.returncode == 0 and wanted in done.stdout, done.stdout + done.stderr


def test_make_test_lints_and_runs_all_tests_and_make_quick_runs_a_subset(copy):
    assert "`make test`" in README and "`make quick`" in README
    assert "make test" in (ROOT / ".ci/run").read_text()
    assert "make test" in (ROOT / ".github/workflows/test.yml").read_text()
    for target, modules in ("test", ["ruff", "pytest"]), ("quick", ["pytest"]), ("lint", ["ruff"]):
        plan = shell(make(f"-n {target}"), copy).splitlines()
        assert [line.split()[1:3] for line in plan] == [["-m", module] for module in modules]
        assert ("not slow" in plan[-1]) == (target == "quick")


@pytest.mark.slow
def test_gpt2_trains_on_one_device_and_on_several(copy, tiny_data, tmp_path):
    for word, ranks in ("python train.py config/train_gpt2", 1), ("--standalone", 2):
        config = re.search(r"config/\S+", command(word))[0]
        cfg = load_config([str(ROOT / config)], world_size=8)
        assert cfg.total_batch_size == 480 and cfg.hessian_batch_size == 240
        line = command(word).replace("--nproc_per_node=8", "--nproc_per_node=2")
        words = flags(**SHORT, dataset=tiny_data, out_dir=tmp_path / str(ranks))
        output = shell(" ".join([line, *words]), copy)
        assert "finished at step 2" in output and f" = {ranks} rank" in output


def test_the_command_for_two_nodes_is_valid():
    """Two nodes train in the test below."""
    words = shlex.split(command("--nnodes"))[3:]
    args = torch.distributed.run.get_args_parser().parse_args(words)
    assert (args.nnodes, args.rdzv_backend, args.rdzv_endpoint) == ("2", "c10d", "HOST:29500")
    assert load_config(args.training_script_args, 16).max_iters == 100_000


SRUN = """#!{python}
import os, signal, subprocess, sys
tasks = [subprocess.Popen(sys.argv[2:]) for _ in range(int(os.environ["SLURM_NNODES"]))]
signal.signal(signal.SIGUSR1, lambda number, frame: [task.send_signal(number) for task in tasks])
sys.exit(max(abs(task.wait()) for task in tasks))
"""
SCONTROL = """#!/bin/sh
case "$1 $2" in "show hostnames") printf 'localhost\\nother\\n';; *) echo "$@" >> requeued;; esac
"""


@pytest.mark.slow
def test_a_slurm_job_of_two_nodes_is_requeued_and_resumes(copy, tiny_data, tmp_path):
    """With config/slurm.sbatch and an srun that starts both agents here. The first job reaches its
    time limit, the second finishes the run, and the third has a wrong setting."""
    for name, text in ("srun", SRUN.replace("{python}", sys.executable)), ("scontrol", SCONTROL):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    job = os.getpid()   # gives this test its own port
    folders = tmp_path, Path(sys.executable).parent, os.environ["PATH"]
    env = environment(PATH=":".join(map(str, folders)), SLURM_JOB_ID=str(job), SLURM_NNODES="2",
                      SLURM_JOB_NODELIST="node[1-2]", SLURM_GPUS_ON_NODE="1")
    (copy / "requeued").unlink(missing_ok=True)
    log = tmp_path / "log"

    def sbatch(max_iters, **wrong):
        words = flags(**{**SHORT, "max_iters": max_iters, **wrong}, dataset=tiny_data,
                      log_interval=1, warmup_iters=0, out_dir=tmp_path / "run")
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
    assert sbatch(stopped + 2, total_batch_size=9).wait(120) != 0   # torchrun does not repeat it
    assert log.read_text().count("train.py: error: total_batch_size=9 is not divisible") == 1
    assert (copy / "requeued").read_text() == f"requeue {job}\n"


def test_the_snippet_trains_with_sophiag(capsys):
    exec(compile(SNIPPETS[0], "README", "exec"), {})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "10", "20", "30", "40"]


def test_the_table_shows_the_settings_of_the_configs():
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
        parts = memory_estimate(replace(cfg, batch_size=12), model, torch.bfloat16, compiled=True)
        assert memory == f"{sum(parts.values()) / 1e9:.0f} GB" and cfg.batch_size is None


def test_contributing_lists_every_script_below_the_scripts_that_it_imports():
    table = (ROOT / "CONTRIBUTING.md").read_text().split("| file |")[1].split("\n\n")[0]
    listed = []   # the scripts of the rows above, and in a row those before "then"
    for group in re.split(r"\n|, then", table):
        names = re.findall(r"`(\w+)\.py`", group)
        for name in names:
            source = (ROOT / f"{name}.py").read_text()
            imported = set(re.findall(r"^ *(?:from|import) (\w+)", source, re.M))
            assert imported & {p.stem for p in ROOT.glob("*.py")} <= set(listed), name
        listed += names
    assert sorted(listed) == sorted(p.stem for p in ROOT.glob("*.py"))
