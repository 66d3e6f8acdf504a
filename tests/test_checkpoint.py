"""
Checkpoints are written completely or not at all, verified when read, and cannot run code. The last
two and the best are kept.
"""
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import MakesFolder, assert_equal

import checkpoint
from script import UserError


def payload(step=10):
    """The contents of a small checkpoint. Its numbers depend on the step."""
    generator = torch.Generator().manual_seed(step)
    weight = torch.nn.Parameter(torch.randn(64, generator=generator))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.randn(64, generator=generator)
    optimizer.step()
    return {"model": {"w": weight.detach(), "half": weight.detach().bfloat16()}, "step": step,
            "optimizer": optimizer.state_dict(), "model_args": {"n_layer": 2, "bias": False},
            "config": {"optimizer": "adamw", "min_lr": 1e-5}, "tokenizer": "bytes", "data": "",
            "best_step": step, "best_val_loss": float("inf"), "metrics": {"wandb_id": None}}


def error_of_load(path):
    """The message of load's UserError, which is one line and names path."""
    with pytest.raises(UserError) as caught:
        checkpoint.load(str(path))
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


def steps(folder):
    return [int(Path(path).stem[5:]) for path in checkpoint.list_checkpoints(folder)]


def test_load_returns_exactly_what_was_saved(tmp_path):
    path = checkpoint.save(tmp_path, payload(), best_step=10)
    assert path == checkpoint.path_of(tmp_path, 10) == str(tmp_path / "ckpt_00000010.pt")
    loaded = checkpoint.load(path)
    assert loaded.pop("version") == checkpoint.FORMAT_VERSION
    assert_equal(loaded, payload())
    with pytest.raises(AssertionError):
        assert_equal(loaded, payload(11))
    checkpoint.save(tmp_path, {**payload(11), "step": 10}, best_step=10)
    assert_equal(loaded, payload())   # still mapped from the old file, which was replaced
    assert os.listdir(tmp_path) == ["ckpt_00000010.pt"]


def test_the_last_two_and_the_best_are_kept(tmp_path):
    (tmp_path / "ckpt_final.pt").touch()   # a file of the user
    kept = []
    for step, best in (10, 10), (20, 20), (30, 20), (40, 20), (50, 20), (60, 60), (70, 60):
        checkpoint.save(tmp_path, payload(step), best)
        kept.append(steps(tmp_path))
    assert kept == [[10], [20, 10], [30, 20], [40, 30, 20], [50, 40, 20], [60, 50], [70, 60]]
    assert (tmp_path / "ckpt_final.pt").exists()


def test_checkpoints_are_listed_newest_first_and_other_files_are_not(tmp_path):
    for name in "00000009.pt", "99999999.pt", "100000000.pt", "00000020.pt.tmp", "1.pt", "a.pt":
        (tmp_path / f"ckpt_{name}").touch()
    (tmp_path / "xckpt_00000300.pt").touch()
    assert steps(tmp_path) == [100_000_000, 99_999_999, 9]
    assert checkpoint.list_checkpoints(tmp_path / "missing") == []


def no_space(*args):
    raise OSError(28, "No space left on device")


def half(file):
    file.write(b"half")
    raise RuntimeError("PytorchStreamWriter failed writing file")   # how torch reports a full disk


@pytest.mark.parametrize("fault", ["fsync", "replace", "write"])
def test_a_failed_save_leaves_the_old_files_and_no_other(tmp_path, monkeypatch, fault):
    for step in 10, 20, 30:
        checkpoint.save(tmp_path, payload(step), 10)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    if fault == "write":
        monkeypatch.setattr(torch, "save", lambda contents, file: half(file))
    else:
        monkeypatch.setattr(os, fault, no_space)
    for step in 30, 40:   # over an old one, then a new one
        with pytest.raises(UserError, match=f"cannot write .*ckpt_000000{step}.pt"):
            checkpoint.save(tmp_path, {**payload(11), "step": step}, step)
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_flipped_byte_is_an_error_unless_it_changes_nothing(tmp_path):
    path = Path(checkpoint.save(tmp_path, payload(), 10))
    whole = path.read_bytes()
    tensor = whole.index(payload()["model"]["w"].numpy().tobytes())
    inside = range(tensor, tensor + 4 * 64, 5)
    for place in [*inside, *range(0, len(whole), 3)]:
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        try:
            loaded = checkpoint.load(str(path))
        except UserError as error:
            assert str(path) in str(error)
            continue
        assert place not in inside
        del loaded["version"]   # the byte was padding or a date
        assert_equal(loaded, payload())


def test_truncated_files_are_refused(tmp_path):
    path = Path(checkpoint.save(tmp_path, payload(), 10))
    whole = path.read_bytes()
    for length in [0, 1, len(whole) - 1, *range(2, len(whole), 61)]:
        path.write_bytes(whole[:length])
        error_of_load(path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "ckpt_00000010.pt"
    assert "No such file" in error_of_load(path)
    path.mkdir()
    error_of_load(path)
    path.rmdir()
    without_optimizer = {k: v for k, v in payload().items() if k != "optimizer"}
    for other in torch.zeros(3), {"model": {}}, [payload()], without_optimizer:
        torch.save(other, path)
        assert "not a checkpoint" in error_of_load(path)
    torch.save(payload(), path, _use_new_zipfile_serialization=False)   # has no checksums
    error_of_load(path)
    path.write_text("Not a checkpoint.\n" * 100)
    error_of_load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "a zip file")
    error_of_load(path)


@pytest.mark.parametrize("version", [{}, {"version": checkpoint.FORMAT_VERSION + 1},
                                     {"version": "1"}], ids=str)
def test_another_format_version_is_refused(tmp_path, version):
    path = tmp_path / "ckpt_00000010.pt"
    torch.save({**payload(), **version}, path)
    assert f"version {version.get('version')}" in error_of_load(path)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_loading_a_checkpoint_runs_no_code_from_it(tmp_path, form):
    path, mark = tmp_path / "ckpt_00000010.pt", tmp_path / "mark"
    contents = {**payload(), "version": checkpoint.FORMAT_VERSION, "metrics": MakesFolder(mark)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(contents))
    else:
        torch.save(contents, path, _use_new_zipfile_serialization=form == "zip")
    message = error_of_load(path)
    assert not mark.exists()
    if form == "zip":
        assert "could run code" in message
        torch.load(path, weights_only=False)
        assert mark.exists()   # without our check it does run


def test_find_latest_returns_the_newest_good_checkpoint_and_names_the_bad_ones(tmp_path):
    assert checkpoint.find_latest(tmp_path) == (None, [])
    paths = {step: Path(checkpoint.save(tmp_path, payload(step), 10)) for step in (10, 20, 30)}
    assert checkpoint.find_latest(tmp_path) == (str(paths[30]), [])
    paths[30].write_bytes(paths[30].read_bytes()[:-100])
    torch.save(MakesFolder(tmp_path / "mark"), paths[20])
    path, messages = checkpoint.find_latest(tmp_path)
    assert path == str(paths[10])
    assert [str(p) in m for p, m in zip((paths[30], paths[20]), messages)] == [True, True]
    paths[10].write_bytes(b"")
    with pytest.raises(UserError, match="can be loaded.*ckpt_00000030.pt"):
        checkpoint.find_latest(tmp_path)
    assert not (tmp_path / "mark").exists()


def test_a_folder_that_holds_a_run_is_refused(tmp_path):
    checkpoint.check_unused(tmp_path)
    checkpoint.check_unused(tmp_path / "missing")
    (tmp_path / "config.json").write_text("{}")   # its run wrote no checkpoint
    checkpoint.check_unused(tmp_path)
    checkpoint.save(tmp_path, payload(), 10)
    with pytest.raises(UserError, match="holds a run already.*resume"):
        checkpoint.check_unused(tmp_path)
