"""sweep.py: the grid, its results, and that it neither loses nor repeats work."""
import contextlib
import csv
import io
import os
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from conftest import TINY, Fork, flags, records, run

import sweep
from script import UserError

GRID = "--learning_rate=1e-3,1e30", "--seed=1,2"   # with 1e30 the loss is not finite
GOOD, BAD = ([f"learning_rate={lr},seed={seed}" for seed in (1, 2)] for lr in ("0.001", "1e%2B30"))


def words(data, out_dir, *more, **settings):
    return [*flags(**{**TINY, "dataset": data, "out_dir": out_dir, **settings}), *more]


def call(*argv):
    """Run main(argv) in this process and return its output; for calls that train nothing."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as output:
        patch.setattr(sweep, "StopSignal", lambda: SimpleNamespace(name=None, requested=False))
        sweep.main([str(word) for word in argv])
    return output.getvalue()


def table(out_dir):
    """The rows of results.csv by run folder name."""
    with open(out_dir / "results.csv", newline="") as file:
        return {os.path.basename(row["run"]): row for row in csv.DictReader(file)}


def files(folder):
    return {p.relative_to(folder): (p.stat().st_mtime_ns, p.read_bytes())
            for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def swept(tmp_path_factory, tiny_data):
    """A sweep in which half of the runs fail: (CompletedProcess, out_dir)."""
    out_dir = tmp_path_factory.mktemp("sweep") / "out"
    return run("sweep.py", *words(tiny_data, out_dir, *GRID, "--jobs=2")), out_dir


def names(*argv):
    return [r.name for r in sweep.make_grid(["--out_dir=o", *argv])[1]]


def test_runs_are_the_product_of_the_axes_the_last_fastest():
    axes, runs = sweep.make_grid(["--seed=1,2", "--out_dir=o", "--optimizer=sophiag,adamw"])
    assert axes == ["seed", "optimizer"]
    assert [(r.config["seed"], r.config["optimizer"]) for r in runs] == [
        (1, "sophiag"), (1, "adamw"), (2, "sophiag"), (2, "adamw")]
    assert [r.config["weight_decay"] for r in runs] == [0.2, 0.1] * 2
    assert runs[0].path == "o/optimizer=sophiag,seed=1" == runs[0].config["out_dir"]
    assert all(r.config["init_from"] == "auto" for r in runs)


def test_folder_names_do_not_depend_on_the_order_of_arguments():
    wanted = "learning_rate=0.0003,seed=1"
    for argv in (["--seed=1,2", "--learning_rate=3e-4,1e-3"],
                 ["--learning_rate=0.00030,1e-3,2e-3", "--seed=3,2,1"],
                 ["--learning_rate=3e-4,", "--seed=1,"]):
        assert wanted in names(*argv)
    assert names("--dataset=./a/b,c") == ["dataset=.%2Fa%2Fb", "dataset=c"]


def test_later_arguments_override_earlier_ones(tmp_path):
    (tmp_path / "c.py").write_text("max_iters = 7\nwarmup_iters = 1\nseed = 3\n")
    _, runs = sweep.make_grid(["--max_iters=9", str(tmp_path / "c.py"), "--seed=1,2"])
    assert [(r.config["max_iters"], r.config["seed"]) for r in runs] == [(7, 1), (7, 2)]


MISTAKES = {
    "no axis": ("several values", "--seed=1"),
    "no values": ("several values", "--seed=,"),
    "unknown axis": ("sead seed", "--sead=1,2"),
    "one bad value": ("learning_rate many", "--learning_rate=1e-3,many"),
    "a bad combination": ("min_lr=0.01 learning_rate", "--min_lr=1e-2,1e-5"),
    "a value twice": ("learning_rate=0.001 twice", "--learning_rate=1e-3,0.001"),
    "an axis twice": ("seed=3 twice", "--seed=1,2 --seed=3,4"),
    "a file after the axis": ("seed=3 twice", "--seed=1,2 c.py"),
    "out_dir as axis": ("out_dir", "--out_dir=a,b"),
    "finetuning": ("init_from", "--seed=1,2 --init_from=gpt2"),
    "evaluation": ("eval_only", "--seed=1,2 --eval_only=True"),
    "no such run": ("only 0 1", "--seed=1,2 --only=2"),
    "negative only": ("only 0 1", "--seed=1,2 --only=-1"),
    "negative jobs": ("jobs", "--seed=1,2 --jobs=-1"),
    "jobs in words": ("jobs two", "--seed=1,2 --jobs=two"),
    "missing config": ("nowhere.py", "--seed=1,2 nowhere.py"),
    "out_dir below a file": ("c.py", "--seed=1,2 --out_dir=c.py/x"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_started(tmp_path, monkeypatch, mistake):
    named, argv = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.py").write_text("seed = 3\n")
    monkeypatch.setattr(sweep, "start_run", lambda *_: pytest.fail("started"))
    with pytest.raises(UserError) as refused:
        call(*words("data", "out"), *argv.split())
    assert all(word in str(refused.value) for word in named.split()), refused.value
    assert "\n" not in str(refused.value)
    assert [p.name for p in tmp_path.iterdir()] == ["c.py"]


@pytest.mark.slow
def test_other_settings_than_those_of_existing_runs_are_an_error(swept, tiny_data):
    before = files(swept[1])
    for setting in dict(max_iters=50), dict(n_layer=3), dict(log_interval=2):
        with pytest.raises(UserError, match=next(iter(setting))):
            call(*words(tiny_data, swept[1], *GRID, **setting))
    assert files(swept[1]) == before


@pytest.mark.slow
def test_a_damaged_config_json_is_named(swept, tiny_data):
    path = swept[1] / GOOD[0] / "config.json"
    raw = path.read_bytes()
    try:
        path.write_bytes(raw[:50])
        with pytest.raises(UserError, match="config.json"):
            call(*words(tiny_data, swept[1], *GRID, "--jobs=0"))
    finally:
        path.write_bytes(raw)


@pytest.mark.slow
def test_failed_runs_are_reported_and_do_not_stop_the_others(swept):
    done, out_dir = swept
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "2 of 4 runs not done" in done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 5 and lines[-1].startswith("[4/4]") and lines[-1].endswith(" left")
    for name in BAD:
        line = next(line for line in lines if name in line)
        assert "exit code 2: train.py: error: validation loss is nan" in line
        assert "train.py: error" in (out_dir / name / "output.txt").read_text()
    for name in GOOD:
        loss = records(out_dir / name, "val/loss")[-1]["val/loss"]
        assert any(f"{name}: val loss {loss:.4f};" in line for line in lines)


@pytest.mark.slow
def test_results_csv_matches_the_records_of_the_runs(swept):
    rows = table(swept[1])
    assert list(rows) == GOOD + BAD   # the order of the grid
    for name in GOOD:
        row, losses = rows[name], records(swept[1] / name, "val/loss")
        best = min(losses, key=lambda r: r["val/loss"])
        last = records(swept[1] / name, "iter")[-1]
        rate = records(swept[1] / name, "train/win_rate")[-1]["train/win_rate"]
        wanted = dict(
            learning_rate=1e-3, seed=int(name[-1]), optimizer="sophiag", max_iters=40,
            status="done", final_val_loss=losses[-1]["val/loss"],
            stderr=losses[-1]["val/loss_stderr"], best_val_loss=best["val/loss"],
            best_step=best["iter"], steps=40, tokens=40 * 8 * 32, seconds=last["seconds"],
            win_rate=rate, run=str(swept[1] / name))
        assert row == {key: str(value) for key, value in wanted.items()}
    for name in BAD:
        assert (rows[name]["status"], rows[name]["final_val_loss"]) == ("failed", "")
        assert rows[name]["best_step"] == "0"


@pytest.mark.slow
def test_results_png(swept):
    raw = (swept[1] / "results.png").read_bytes()
    assert raw.startswith(b"\x89PNG") and len(raw) > 10_000


@pytest.mark.slow
def test_finished_runs_are_skipped_and_failed_runs_are_retried(swept, tiny_data, monkeypatch):
    tried = []
    before = {name: files(swept[1] / name) for name in GOOD}

    def start(config, environment):
        tried.append(os.path.basename(config["out_dir"]))
        return subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    monkeypatch.setattr(sweep, "start_run", start)
    with pytest.raises(SystemExit, match="2 of 4 runs not done"):
        call(*words(tiny_data, swept[1], *GRID))
    assert tried == BAD
    assert {name: files(swept[1] / name) for name in GOOD} == before
    # A batch_size that train.py chooses is not another setting.
    for chosen in {}, {"batch_size": None}:
        assert "0 to train" in call(*words(tiny_data, swept[1], *GRID, "--jobs=0", **chosen))
    assert [row["status"] for row in table(swept[1]).values()] == ["done"] * 2 + ["failed"] * 2


@pytest.mark.slow
def test_only_trains_one_run_of_an_extended_grid(swept, tiny_data):
    """As in an array job: the other runs and results.csv do not change."""
    before = files(swept[1])
    argv = words(tiny_data, swept[1], "--seed=1,2,3", "--learning_rate=1e-3,")
    done = run("sweep.py", *argv, "--only=2")
    assert done.returncode == 0, done.stderr
    new = "learning_rate=0.001,seed=3"
    assert [r["iter"] for r in records(swept[1] / new)] == list(range(1, 41))
    assert before == {k: v for k, v in files(swept[1]).items() if k.parts[0] != new}
    assert "0 to train" in call(*argv)
    assert list(table(swept[1])) == [*GOOD, new]


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_a_killed_or_stopped_sweep_loses_and_repeats_no_step(tiny_data, tmp_path):
    argv = words(tiny_data, tmp_path, "--learning_rate=1e-3,2e-3", "--jobs=2", max_iters=100)
    places = [tmp_path / f"learning_rate={lr}" for lr in ("0.001", "0.002")]
    stderr = tmp_path / "stderr"

    def begin():
        return Fork("sweep.py", argv, tmp_path / "stdout", stderr, os.setsid)

    def finished():
        return [p for p in places if (p / "metrics.jsonl").exists()
                and any(r["iter"] == 100 for r in records(p, "val/loss"))]

    sweep_process = begin()
    wait_for(lambda: (places[0] / "metrics.jsonl").exists())
    delay = random.uniform(0, 1)
    print(f"killed after {delay} s")
    time.sleep(delay)
    os.killpg(sweep_process.process.pid, signal.SIGKILL)   # with its trainers
    assert sweep_process.end() == -9
    before = {p: files(p) for p in finished()}

    sweep_process = begin()
    wait_for(lambda: (tmp_path / "stdout").read_text().count("to train") == 2)
    time.sleep(random.uniform(0, 4))
    os.kill(sweep_process.process.pid, signal.SIGTERM)     # to itself alone
    code = sweep_process.end()
    statuses = [row["status"] for row in table(tmp_path).values()]
    left = statuses.count("stopped") + statuses.count("missing")
    assert (code, stderr.read_text()) in ((0, ""), (
        1, f"sweep.py: stopped by SIGTERM, {left} of {2 - len(before)} runs not done; call again "
           f"to resume\n"))
    before |= {p: files(p) for p in finished() if p not in before}

    stderr.write_text("")
    assert (begin().end(), stderr.read_text()) == (0, "")
    for place in places:
        assert [r["iter"] for r in records(place)] == list(range(1, 101))
        assert [r["iter"] for r in records(place, "val/loss")] == list(range(0, 101, 20))
    assert before == {p: files(p) for p in before}
    assert {row["status"] for row in table(tmp_path).values()} == {"done"}


def sleeper(*_):
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])


def test_an_error_stops_the_active_runs(monkeypatch):
    started = []
    monkeypatch.setattr(sweep, "start_run", lambda *_: started.append(sleeper()) or started[-1])
    stop = SimpleNamespace(name=None, requested=False)
    with pytest.raises(UserError), contextlib.closing(
            sweep.run_all(dict.fromkeys("abc"), 3, stop)) as ends:
        monkeypatch.setattr(sweep.time, "sleep", lambda _: started[0].kill())
        for _ in ends:
            raise UserError("the disk is full")
    assert len(started) == 3 and all(process.poll() for process in started)


def test_each_job_gets_its_share_of_threads_and_gpus(monkeypatch):
    monkeypatch.setattr(sweep.torch, "get_num_threads", lambda: 9)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    shares = [sweep.slot_environment(slot, 4) for slot in range(4)]
    assert [s["CUDA_VISIBLE_DEVICES"] for s in shares] == ["3", "5", "3", "5"]
    assert {s["OMP_NUM_THREADS"] for s in shares} == {"2"}
    assert sweep.slot_environment(0, 20)["OMP_NUM_THREADS"] == "1"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(sweep.torch.cuda, "device_count", lambda: 0)
    assert sweep.slot_environment(1, 2)["CUDA_VISIBLE_DEVICES"] == ""


def test_jobs_limit_the_number_of_parallel_runs(monkeypatch):
    """Never more than requested, and only in free slots."""
    running = {}

    def start(config, slot):
        assert slot not in running or running[slot].poll() is not None
        running[slot] = subprocess.Popen([sys.executable, "-c", f"raise SystemExit({config})"])
        return running[slot]
    monkeypatch.setattr(sweep, "start_run", start)
    monkeypatch.setattr(sweep, "slot_environment", lambda slot, jobs: slot)
    codes = {name: code for code, name in enumerate("abcde")}
    ends = sweep.run_all(codes, 2, SimpleNamespace(name=None, requested=False))
    assert sorted(ends) == [("a", 0), ("b", 1), ("c", 2), ("d", 3), ("e", 4)]
    assert sorted(running) == [0, 1]


def test_help_fits_a_screen(capsys):
    with pytest.raises(SystemExit):
        sweep.main(["--help"])
    assert len(capsys.readouterr().out.splitlines()) <= 30
