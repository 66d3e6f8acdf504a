"""
Batches are a pure function of (seed, stream, step), and damaged data sets are refused. In most
tests a token is its own position in the file, so x shows the windows.
"""
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, MakesFolder, flags, write_characters, write_data

from configurator import load_config
from dataloader import DataLoader
from ddp import World
from script import UserError
from tokenizer import get_tokenizer

T = 16
TRAIN, VAL = 2021, 600   # tokens: 125 training windows of 16, 37 validation windows


@pytest.fixture(scope="module")
def positions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "positions"
    return write_data(folder, np.arange(TRAIN), np.arange(VAL), vocab_size=60_000)


def loader(data, rank=0, size=1, **settings):
    knobs = {**TINY, "block_size": T, "total_batch_size": 12, "batch_size": 1, "dataset": data,
             "hessian_batch_size": 12 if size > 1 else 8, **settings}
    return DataLoader(load_config(flags(**knobs), size), World(rank, size, torch.device("cpu")))


def starts(batches, stream="train", samples=250):
    """Start positions of a stream's first samples, in order."""
    rows, batch = [], 0
    while len(rows) < samples:
        rows += getattr(batches, stream)(batch)[0][:, 0].tolist()
        batch += 1
    return rows[:samples]


@pytest.mark.parametrize("stream", ["train", "hessian"])
def test_an_epoch_reads_every_window_once(positions, stream):
    found = starts(loader(positions), stream)
    for epoch in found[:125], found[125:]:
        phase = min(epoch)
        assert 0 <= phase < T
        assert sorted(epoch) == list(range(phase, phase + 125 * T, T))   # no gap, no overlap
        assert epoch != sorted(epoch)
    for x, y in [loader(positions).train(3), loader(positions).hessian(3)[:2],
                 *loader(positions).val(1)]:
        assert x.dtype == y.dtype == torch.int64
        assert torch.equal(x, x[:, :1] + torch.arange(T)) and torch.equal(y, x + 1)


def test_a_batch_depends_on_its_number_alone(positions):
    used = loader(positions)
    for step in (900, 0, 31, 12, 500):
        used.train(step), used.hessian(step)
    assert (len(used.train(7)[0]), len(used.hessian(7)[0])) == (12, 8)
    for stream in "train", "hessian":
        for mine, fresh in zip(getattr(used, stream)(7), getattr(loader(positions), stream)(7)):
            assert torch.equal(mine, fresh)
    other = loader(positions, batch_size=4, max_iters=7, optimizer="adamw", learning_rate=1)
    assert torch.equal(other.train(7)[0], used.train(7)[0])


def test_orders_differ_between_epochs_streams_and_seeds(positions):
    orders = [tuple((s - min(order)) // T for s in order)
              for batches in (loader(positions), loader(positions, seed=1))
              for found in (starts(batches), starts(batches, "hessian"))
              for order in (found[:125], found[125:])]
    assert all(sorted(order) == list(range(125)) for order in orders)
    assert len(set(orders)) == 8
    agreeing = [sum(a == b for a, b in zip(p, q)) for p in orders for q in orders if p != q]
    assert max(agreeing) < 10   # about 1 of 125 by chance
    phases = {starts(loader(positions, seed=seed), samples=125)[0] % T for seed in range(40)}
    assert len(phases) > 10   # of 16


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_share_a_batch(positions, size):
    whole = loader(positions, hessian_batch_size=12)
    ranks = [loader(positions, rank, size, hessian_batch_size=12) for rank in range(size)]
    for stream in "train", "hessian":
        for step in 0, 10, 11:   # the tenth batch of 12 crosses into the second epoch of 125
            parts = [getattr(rank, stream)(step) for rank in ranks]
            assert {len(x) for x, *_ in parts} == {12 // size}
            for one, many in zip(getattr(whole, stream)(step), zip(*parts)):
                assert torch.equal(one, torch.cat(many))


def test_hessian_noise_is_uniform_and_independent_across_samples(positions):
    batches = loader(positions)
    noise = torch.cat([batches.hessian(update)[2] for update in range(256)])
    assert noise.dtype == torch.float32 and noise.shape == (2048, T)
    assert noise.min() >= 0 and noise.max() < 1
    counts, _ = np.histogram(noise.numpy(), bins=64, range=(0, 1))
    expected = noise.numel() / 64
    assert ((counts - expected) ** 2 / expected).sum() < 130   # chi-square, 63 degrees: p = 1e-6
    deviations = noise.double().numpy() - 0.5
    for shift in 1, 8:   # neighbours within a batch, and the same row of the next one
        correlation = 12 * (deviations[:-shift] * deviations[shift:]).mean()
        assert abs(correlation) < 5 / np.sqrt(noise.numel())
    assert len(torch.unique(noise, dim=0)) == 2048
    other = loader(positions, seed=1).hessian(0)[2]
    assert not torch.isin(other, batches.hessian(0)[2]).any()


def test_hutchinson_direction_depends_only_on_seed_and_update(positions):
    """Not on the rank: the ranks average H u, so all must use the same u."""
    like = [torch.zeros(300, 4), torch.zeros(2000, dtype=torch.float64)]
    found = [loader(positions, rank, 2, seed=seed).direction(update, like)
             for rank, seed, update in ((0, 5, 3), (1, 5, 3), (0, 5, 4), (0, 6, 3))]
    assert [(d.shape, d.dtype) for d in found[0]] == [(t.shape, t.dtype) for t in like]
    one, same, *others = (torch.cat([d.flatten().double() for d in ds]) for ds in found)
    assert torch.equal(one, same)
    assert abs(one.mean()) < 0.1 and abs(one.square().mean() - 1) < 0.15
    for other in others:
        assert abs((one * other).mean()) < 0.1


def val_starts(data, size=1, batch_size=1, **settings):
    """Start positions of the evaluation windows, one list per rank."""
    return [[start for x, _ in loader(data, rank, size, **settings).val(batch_size)
             for start in x[:, 0].tolist()] for rank in range(size)]


def test_evaluation_windows_are_fixed_and_spread(positions):
    everything = list(range(0, 37 * T, T))
    assert val_starts(positions, eval_iters=0) == [everything]
    assert val_starts(positions, eval_iters=100) == [everything]   # val.bin has fewer
    some, = val_starts(positions, eval_iters=1)   # 12 of 37
    assert len(some) == 12 and set(some) <= set(everything)
    assert some[0] == 0 and some[-1] >= 37 * T * 11 // 12 - T
    assert set(np.diff(some)) <= {3 * T, 4 * T}
    used = loader(positions, eval_iters=1)
    first = list(used.val(1))
    used.train(5)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, used.val(1), strict=True))
    for change in dict(seed=2), dict(optimizer="lion"), dict(batch_size=3), dict(batch_size=12):
        assert val_starts(positions, eval_iters=1, **change) == [some]


@pytest.mark.parametrize("size", [2, 3, 4, 6])
def test_ranks_share_the_evaluation(positions, size):
    for eval_iters in 0, 1, 2:
        shares = val_starts(positions, size, eval_iters=eval_iters)
        whole, = val_starts(positions, eval_iters=eval_iters)
        assert sorted(sum(shares, [])) == whole
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_characters_of_nanogpt_have_the_vocabulary_of_their_meta_pkl(tmp_path):
    text = "To be, or not to be:\n\u00fcber 100 \u00e9toiles.\n" * 50
    batches = loader(write_characters(tmp_path, text))
    assert batches.meta["vocab_size"] == len(set(text)) and batches.meta["eot_id"] is None
    tokenizer = get_tokenizer(batches.meta["tokenizer"])
    x, y = batches.train(0)
    for row, next_row in zip(x.tolist(), y.tolist()):
        assert tokenizer.decode(row) in text and tokenizer.decode(row + next_row[-1:]) in text
        assert tokenizer.encode(tokenizer.decode(row)) == row
    with pytest.raises(UserError, match="the vocabulary has no 'q'"):
        tokenizer.encode("quiet")


@pytest.mark.parametrize("meta, named", [
    ({"vocab_size": 65}, "itos"), ({"vocab_size": 3, "itos": {0: "a", 1: "b"}}, "KeyError: 2"),
    ({"vocab_size": 2, "itos": {0: "a", 1: "b", 2: "c"}}, "distinct"),
    ({"vocab_size": 2, "itos": {0: "a", 1: "a"}}, "distinct"),
    ({"vocab_size": 2, "itos": {0: "a", 1: 1}}, "distinct"), ([65], "TypeError"),
    ({"vocab_size": True, "itos": {0: "a"}}, "itos"), ({"vocab_size": 0, "itos": {}}, "itos"),
    (MakesFolder("made_by_meta_pkl"), "posix.mkdir, so loading it could run code")])
def test_another_meta_pkl_is_refused_and_runs_no_code(tmp_path, monkeypatch, meta, named):
    monkeypatch.chdir(tmp_path)
    folder = write_characters(tmp_path / "data", "abc" * 200)
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    with pytest.raises(UserError, match="meta.pkl is refused") as caught:
        loader(folder)
    assert named in str(caught.value) and not (tmp_path / "made_by_meta_pkl").exists()


def test_bins_of_nanogpt_are_gpt2_tokens(tmp_path):
    folder = write_data(tmp_path, [0, 50_256] * 40, [50_257] * 40)
    (folder / "meta.json").unlink()
    batches = loader(folder)
    assert (batches.meta["tokenizer"], batches.meta["vocab_size"]) == ("gpt2", 50_257)
    assert batches.train(0)[0].max() == 50_256
    with pytest.raises(UserError, match="val.bin.* 50257, beyond"):
        list(batches.val(1))


def test_uint32_bins(tmp_path):
    folder = write_data(tmp_path, [0] * 200, [0] * 200, vocab_size=200_000, dtype="uint32")
    for split in "train", "val":
        (np.arange(200, dtype="<u4") + 100_000).tofile(folder / f"{split}.bin")
    x, y = loader(folder).train(0)
    assert x.min() >= 100_000 and torch.equal(y, x + 1)


def test_a_token_beyond_the_vocabulary_is_refused(tmp_path):
    folder = write_data(tmp_path, [64, 65] * 100, [65] * 200, vocab_size=65)
    batches = loader(folder)
    for stream in batches.train, batches.hessian, lambda _: list(batches.val(1)):
        with pytest.raises(UserError, match=r"(train|val)\.bin holds token id 65"):
            stream(0)


def test_a_file_truncated_during_the_run_is_detected(tmp_path):
    batches = loader(write_data(tmp_path, np.arange(2000), np.arange(400), vocab_size=60_000))
    batches.train(0)
    os.truncate(tmp_path / "train.bin", 100)
    with pytest.raises(UserError, match="train.bin ends before.*truncated"):
        batches.train(1)


GONE = "(gone)"
WRONG_META = [
    "", "{", "[]", "null", "3", '"x"', "{}", "\xff\xfe",
    {"tokenizer": GONE}, {"vocab_size": GONE}, {"eot_id": GONE}, {"dtype": GONE},
    {"vocab_size": 0}, {"vocab_size": -5}, {"vocab_size": "65"}, {"vocab_size": 65.5},
    {"vocab_size": True}, {"vocab_size": None}, {"eot_id": 65}, {"eot_id": -1}, {"tokenizer": 3},
    {"dtype": "int64"}, {"dtype": ["uint16"]}, {"train_tokens": 99}, {"train_tokens": "many"},
    {"val_tokens": None}, {"val_tokens": [100]}]


@pytest.mark.parametrize("wrong", WRONG_META, ids=repr)
def test_damaged_meta(tmp_path, wrong):
    folder = write_data(tmp_path, [1] * 100, [1] * 100)
    loader(folder)
    if isinstance(wrong, dict):
        good = json.loads((folder / "meta.json").read_text())
        wrong = json.dumps({k: v for k, v in {**good, **wrong}.items() if v is not GONE})
    (folder / "meta.json").write_bytes(wrong.encode("latin-1"))
    with pytest.raises(UserError, match="prepare.py again") as caught:
        loader(folder)
    assert str(folder) in str(caught.value)


def resident_bytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_resident_memory_does_not_grow_with_the_file(tmp_path):
    folder = write_data(tmp_path, np.ones(26_000_000, np.uint16), [1] * 2000)   # 52 MB
    batches = loader(folder, block_size=1024, total_batch_size=64)
    batches.train(0)
    before = resident_bytes()
    for step in range(1, 26_000_000 // (64 * 1024)):   # one epoch reads the whole file
        batches.train(step)
    assert resident_bytes() - before < 15e6
    mapped = np.memmap(folder / "train.bin", np.uint16, "r")
    assert mapped.sum() == 26_000_000
    assert resident_bytes() - before > 40e6   # a memory map does grow: the measurement works
