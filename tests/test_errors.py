"""
Every user mistake, end to end: one line that names the mistake, exit code 2, and no file changed.
"""
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, MakesFolder, command, environment, flags, run, snapshot

GOOD = flags(**{**TINY, "dataset": "./data", "out_dir": "new", "max_iters": 4, "warmup_iters": 1,
                "eval_interval": 2})   # no mistake


def cut(raw):
    return raw[:len(raw) // 2]


NEWEST, OLDER = "run/ckpt_00000004.pt", "run/ckpt_00000002.pt"
CODE = MakesFolder("made_by_a_checkpoint")   # in the working directory
RESUME = "--out_dir=run --init_from=resume --max_iters=6 "
FINETUNE = "--init_from=run "

# {mistake: (words in the error, arguments after GOOD, {file: new text, edit or None to delete})}
TRAIN = {
    "unknown flag": ("n_layers n_layer", "--n_layers=3", {}),
    "unknown name in a file": ("c.py learningrate learning_rate", "c.py",
                               {"c.py": "learningrate = 1e-3"}),
    "flag of a wrong type": ("max_iters many", "--max_iters=many", {}),
    "flag without a value": ("--seed=VALUE", "--seed", {}),
    "file value of a wrong type": ("c.py bias yes", "c.py", {"c.py": "bias = 'yes'"}),
    "missing config": ("nowhere.py", "nowhere.py", {}),
    "config is a folder": ("empty", "empty", {}),
    "syntax error in a config": ("c.py 2 SyntaxError", "c.py", {"c.py": "seed = 1\nseed = ("}),
    "config that raises": ("c.py 1 ZeroDivisionError", "c.py", {"c.py": "seed = 1 // 0"}),
    "missing data set": ("nowhere pystdlib", "--dataset=./nowhere", {}),
    "unknown data set": ("nowhere pystdlib", "--dataset=nowhere", {}),
    "no train.bin": ("data/train.bin", "", {"data/train.bin": None}),
    "no val.bin": ("data/val.bin", "", {"data/val.bin": None}),
    "half a token": ("train.bin 40,001", "", {"data/train.bin": lambda raw: raw + b"\0"}),
    "fewer tokens than meta.json says": ("val.bin 4,000", "", {"data/val.bin": cut}),
    "damaged meta.json": ("data/meta.json", "", {"data/meta.json": cut}),
    "meta.json of another kind": ("data/meta.json", "", {"data/meta.json": "[1, 2]"}),
    "token count that is text": ("data/", "", {
        "data/meta.json": lambda raw: raw.replace(b"20000", b'"all"')}),
    "width and heads": ("n_embd=33 n_head=2", "--n_embd=33", {}),
    "indivisible batch": ("total_batch_size=9 batch_size=4", "--total_batch_size=9", {}),
    "empty Hessian batch": ("hessian_batch_size 0", "--hessian_batch_size=0", {}),
    "warmup beyond the schedule": ("warmup_iters=41 4", "--warmup_iters=41", {}),
    "block larger than the data": ("block_size=5000 val.bin 4,000", "--block_size=5000", {}),
    "unknown optimizer": ("sgd sophiag", "--optimizer=sgd", {}),
    "unknown dtype": ("float8 bfloat16", "--dtype=float8", {}),
    "no CUDA here": ("device=cuda", "--device=cuda", {}),
    "nccl without CUDA": ("backend=nccl", "--backend=nccl", {}),
    "negative seed": ("seed -1", "--seed=-1", {}),
    "seed beyond 64 bits": ("seed", f"--seed={2**70}", {}),
    "nothing to resume": ("new init_from=scratch", "--init_from=resume", {}),
    "only damaged checkpoints": (NEWEST, RESUME, {NEWEST: cut, OLDER: None}),
    "auto with only damaged ones": (NEWEST[4:], "--out_dir=run --init_from=auto",
                                    {NEWEST: cut, OLDER: None}),
    "only a checkpoint with code": (NEWEST, RESUME, {NEWEST: CODE, OLDER: None}),
    "finetuning a checkpoint with code": (NEWEST, f"--init_from={NEWEST}", {NEWEST: CODE}),
    "finetuning only damaged ones": (NEWEST, FINETUNE, {NEWEST: cut, OLDER: cut}),
    "finetuning nothing": ("nowhere", "--init_from=nowhere", {}),
    "finetuning an empty folder": ("empty", "--init_from=empty", {}),
    "finetuning another depth": ("n_layer=2", FINETUNE + "--n_layer=3", {}),
    "finetuning a longer context": ("block_size=64 32", FINETUNE + "--block_size=64", {}),
    "finetuning another vocabulary": ("vocabulary 65 66", FINETUNE, {
        "data/meta.json": lambda raw: raw.replace(b": 65", b": 66")}),
    "resuming with another optimizer": ("sophiag adamw", RESUME + "--optimizer=adamw", {}),
    "resuming with another seed": ("seed=1337 7", RESUME + "--seed=7", {}),
    "resuming on other data": ("data ./more/train.bin", RESUME + "--dataset=./more",
                               {"more/train.bin": lambda raw: raw[2:] + raw[:2]}),
    "damaged metrics": ("metrics.jsonl, line 1", RESUME,
                        {"run/metrics.jsonl": lambda raw: raw[10:]}),
    "out_dir holds a run": ("run init_from=resume", "--out_dir=run", {}),
    "out_dir below a file": ("data/meta.json/run", "--out_dir=data/meta.json/run", {}),
    "out_dir is a file": ("data/meta.json", "--out_dir=data/meta.json", {}),
}
OTHERS = {
    "empty folder": ("sample.py", "empty", "empty", {}),
    "missing run": ("sample.py", "nowhere", "nowhere", {}),
    "not a checkpoint": ("sample.py", "meta.json", "data/meta.json", {}),
    "checkpoint with code": ("sample.py", NEWEST, NEWEST, {NEWEST: CODE}),
    "only damaged checkpoints": ("sample.py", NEWEST, "run", {NEWEST: cut, OLDER: cut}),
    "missing prompt file": ("sample.py", "nowhere.txt", "run --prompt=FILE:nowhere.txt", {}),
    "negative temperature": ("sample.py", "temperature", "run --temperature=-1", {}),
    "no CUDA for sampling": ("sample.py", "device=cuda", "run --device=cuda", {}),
    "unknown device": ("sample.py", "device tpu", "run --device=tpu", {}),
    "not a number": ("sample.py", "num_samples many", "run --num_samples=many", {}),
    "no metrics": ("compare.py", "empty/metrics.jsonl", "run empty", {}),
    "damaged records": ("compare.py", "metrics.jsonl line 2", "run",
                        {"run/metrics.jsonl": lambda raw: b'{"iter": 0}\n{\n' + raw}),
    "no settings": ("compare.py", "config.json", "run", {"run/config.json": None}),
    "damaged settings": ("compare.py", "config.json", "run", {"run/config.json": cut}),
}


@pytest.fixture(scope="module")
def good_place(tmp_path_factory, tiny_data):
    """A folder with two data sets, data/ and more/, with empty/, and with run/, a run with two
    checkpoints."""
    place = tmp_path_factory.mktemp("good") / "place"
    for name in "data", "more":
        shutil.copytree(tiny_data, place / name)
    (place / "empty").mkdir()
    done = run("train.py", *GOOD, "--out_dir=run", cwd=place)
    assert done.returncode == 0, done.stderr
    return place


@pytest.fixture
def place(good_place, tmp_path, monkeypatch):
    """The working directory: a copy of good_place."""
    shutil.copytree(good_place, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return Path()


def make_mistake(place, edits):
    for name, edit in edits.items():
        path = place / name
        if edit is None:
            path.unlink()
        elif isinstance(edit, str):
            path.write_text(edit)
        elif callable(edit):
            path.write_bytes(edit(path.read_bytes()))
        else:
            torch.save(edit, path)


def check(script, done, named):
    """The CompletedProcess ended with one line of error that contains all words of named."""
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    assert done.stderr.startswith(f"{script}: error: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.returncode == 2
    assert all(word in done.stderr for word in named.split()), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("mistake", TRAIN)
def test_a_mistake_with_train_is_one_line_and_changes_no_file(place, mistake):
    named, words, edits = TRAIN[mistake]
    make_mistake(place, edits)
    before = snapshot(place)
    check("train.py", run("train.py", *GOOD, *words.split(), cwd="."), named)
    assert snapshot(place) == before


@pytest.mark.parametrize("mistake", OTHERS)
def test_a_mistake_with_sample_or_compare_is_one_line_and_changes_no_file(place, mistake):
    script, named, words, edits = OTHERS[mistake]
    make_mistake(place, edits)
    before = snapshot(place)
    check(script, run(script, *words.split(), cwd="."), named)
    assert snapshot(place) == before


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_token_beyond_the_vocabulary_is_one_line(place, split):
    """It shows when the token is read. By then the new run exists, but no old file has changed."""
    path = place / "data" / f"{split}.bin"
    path.write_bytes(b"\x41\x00" * (path.stat().st_size // 2))   # token 65; the last valid id is 64
    before = snapshot(place)
    check("train.py", run("train.py", *GOOD, cwd="."), f"{split}.bin 65")
    assert before.items() <= snapshot(place).items()
    assert not list(place.glob("new/ckpt_*"))


@pytest.mark.slow
@pytest.mark.parametrize("script, word, named", [
    ("train.py", "--seeds=1", "seeds"), ("sample.py", "nowhere", "nowhere"),
    ("compare.py", "nowhere", "nowhere")])
def test_a_fork_prints_the_same_error_as_a_new_process(script, word, named):
    own = subprocess.run(command(script, word), env=environment(), capture_output=True, text=True)
    check(script, own, named)
    fork = run(script, word)
    assert ((fork.returncode, fork.stdout, fork.stderr)
            == (own.returncode, own.stdout, own.stderr))


def root_cause(done):
    """(rank, text) of the root cause in torchrun's summary."""
    assert done.returncode == 1
    report = done.stderr.split("Root Cause")[1]
    pattern = r" rank +: (\d+) .* traceback : (.*?)\s*\n==="
    return re.search(pattern, report, re.S).groups()


@pytest.mark.slow
@pytest.mark.parametrize("error, shown", [
    ("UserError('no tokens')", "error: no tokens"),
    ("KeyError('mistake of ours')", r"Traceback .*, in main\n.*KeyError: 'mistake of ours'")])
def test_torchruns_summary_shows_an_error_of_a_rank_other_than_0(tmp_path, error, shown):
    script = tmp_path / "failing.py"
    script.write_text(f"""import os, time
from script import UserError, run_script
def main(argv):
    if os.environ["RANK"] == "1":
        raise {error}
    time.sleep(60)
run_script(main)
""")
    done = subprocess.run(command(script, ranks=2), env=environment(PYTHONPATH=str(ROOT)),
                          capture_output=True, text=True)
    rank, text = root_cause(done)
    assert rank == "1" and re.fullmatch(shown, text, re.S), text


@pytest.mark.slow
@pytest.mark.parametrize("words, end", [("", "at step 4"), (RESUME, "at step 6"),
                                        (FINETUNE, "at step 4")])
def test_without_a_mistake_the_commands_succeed(place, words, end):
    """Otherwise the tests above could pass for another reason."""
    done = run("train.py", *GOOD, *words.split(), cwd=".")
    assert (done.returncode, done.stderr) == (0, "") and f"finished {end}" in done.stdout
    for script in ("sample.py", "run", "--prompt=!", "--max_new_tokens=1"), ("compare.py", "run"):
        done = run(*script, cwd=".")
        assert (done.returncode, done.stderr) == (0, "")
