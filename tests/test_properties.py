"""
Any input gives a valid result or a one-line UserError. `--hypothesis-profile=thorough` tries more
cases.
"""
import json
import math
import pickle
import tempfile
from argparse import Namespace
from dataclasses import fields

import numpy as np
import pytest
import torch
from conftest import TINY, write_data
from hypothesis import example, given
from hypothesis import strategies as st

import checkpoint
import init_from
import train
from configurator import TYPES, TrainConfig, load_config
from data.documents import find_files, load_documents, read_batches
from dataloader import DataLoader, load_meta
from ddp import World
from records import read_metrics
from script import UserError

NAMES = [f.name for f in fields(TrainConfig)]
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20))
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3)
                    | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=8)
NESTED = b"[" * 100_000   # more than Python's stack takes
NUMBERS = st.sampled_from(["0", "1", "2", "7", "64", "1e-3", "-1", "nan", "inf", "1e999", "9" * 400,
                           "0x10", "1_000", "None", "True", "false", "cpu", "scratch", ""])


def valid(function, *args):
    """The result of function, or None if it raises a one-line UserError."""
    try:
        return function(*args)
    except UserError as error:
        assert str(error).strip() and "\n" not in str(error)
        return None


def well_typed(cfg):
    for name in NAMES:
        value = getattr(cfg, name)
        allowed = TYPES[name].__args__ if hasattr(TYPES[name], "__args__") else (TYPES[name],)
        assert type(value) in allowed, name
        assert not isinstance(value, float) or math.isfinite(value), name


@given(st.lists(st.tuples(st.sampled_from(NAMES), NUMBERS | st.text(max_size=30)), max_size=5),
       st.integers(1, 16))
def test_any_command_line_gives_valid_settings_or_an_error(pairs, ranks):
    cfg = valid(load_config, [f"--{name}={text}" for name, text in pairs], ranks)
    if cfg:
        well_typed(cfg)
        assert cfg.total_batch_size % ((cfg.batch_size or 1) * ranks) == 0
        assert cfg.hessian_batch_size % ranks == 0 and cfg.n_embd % cfg.n_head == 0


@given(st.text(max_size=40).filter(lambda word: word not in ("--help", "-h")))
def test_any_word_gives_valid_settings_or_an_error(word):
    valid(load_config, [word])


@given(pairs=st.lists(st.tuples(st.sampled_from([*NAMES, "_private", "unknown"]), JSON),
                      max_size=5))
def test_any_config_file_gives_valid_settings_or_an_error(pairs, tmp_path):
    path = tmp_path / "config.py"
    lines = [f"{name} = {value!r}\n".replace("nan", "_nan").replace("inf", "_inf")
             for name, value in pairs]
    path.write_text("from math import nan as _nan, inf as _inf\n" + "".join(lines),
                    encoding="utf-8", errors="surrogatepass")
    cfg = valid(load_config, [str(path)])
    if cfg:
        well_typed(cfg)


TINIEST = {**TINY, "n_layer": 1, "n_embd": 8, "block_size": 8, "total_batch_size": 4,
           "batch_size": 2, "max_iters": 2, "warmup_iters": 0, "eval_interval": 2, "eval_iters": 1,
           "hessian_interval": 1, "lr_decay_iters": None}
OF_TYPE = {int: [0, 1, 2**31 - 1, 2**63 - 1, 2**70], bool: [False, True], str: [""],
           float: [0.0, 5e-324, 1 - 2**-53, 1.0, 1e30, 1.7e308]}
OWN = {   # up to what takes milliseconds; beyond, only what is refused at once.
    "n_layer": [0, 1, 6, 2**31], "n_embd": [0, 1, 2, 2**31 - 1, 2**63], "max_iters": [0, 1],
    "block_size": [0, 1, 598, 599, 600, 2**31 - 1, 2**63], "sample_tokens": [0, 1, 9],
    **dict.fromkeys(["batch_size", "total_batch_size", "hessian_batch_size"], [0, 1, 3, 4, 2**31]),
    "wandb_log": [False], "compile": [False, ""], "init_from": ["", "auto", "resume"],
    "optimizer": ["", "sophiag", "adamw", "lion", "muon"], "dtype": ["", "float16", "bfloat16"],
    "hessian_estimator": ["", "gnb", "hutchinson", "empirical_fisher"],
    "device": ["", "auto", "cuda", "mps"], "backend": ["", "nccl", "gloo"]}
EXTREMES = {**{name: OF_TYPE[type(getattr(load_config([]), name))] for name in NAMES
               if name not in OWN}, **OWN}
SINGLE = [(name, value) for name, values in EXTREMES.items() for value in values]


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A function that trains two steps with changed settings, in this process."""
    data = write_data(tmp_path / "data", np.arange(3000) % 65, np.arange(600) % 65)
    monkeypatch.setattr(train, "StopSignal", lambda: Namespace(requested=False))
    monkeypatch.setattr(checkpoint, "lock", lambda run_dir: None)   # it stays open

    def call(changes):
        with tempfile.TemporaryDirectory(dir=tmp_path) as out_dir:
            knobs = {**TINIEST, "dataset": data, "out_dir": out_dir, **dict(changes)}
            valid(train.main, [f"--{name}={value}" for name, value in knobs.items()])
    yield call
    torch.use_deterministic_algorithms(False)


@pytest.mark.slow
def test_every_extreme_setting_trains_or_is_an_error(start):
    for setting in SINGLE:
        start([setting])


@given(st.lists(st.sampled_from(SINGLE), min_size=2, max_size=2, unique_by=lambda s: s[0]))
def test_pairs_of_extreme_settings_train_or_are_an_error(start, changes):
    start(changes)


def test_no_steps_evaluate_once(start, tmp_path, capsys):
    """Whatever warmup the config has. There is no checkpoint to sample from."""
    for changes in [("max_iters", 0)], [("max_iters", 0), ("eval_only", True)]:
        start([*changes, ("warmup_iters", 100)])
        out = capsys.readouterr().out
        assert out.count("val loss") == 1 and "step 0/0 | val loss" in out and "sample" not in out


META = {"vocab_size": 65, "tokenizer": "bytes", "dtype": "uint16", "eot_id": 64,
        "train_tokens": 500, "val_tokens": 100}


@given(changes=st.dictionaries(st.sampled_from([*META, "other"]), JSON, max_size=3),
       drop=st.sets(st.sampled_from(list(META)), max_size=1))
def test_any_values_in_meta_json_are_valid_or_an_error(changes, drop, tmp_path):
    folder = write_data(tmp_path, np.arange(500) % 65, np.arange(100) % 65)
    meta = {k: v for k, v in {**META, **changes}.items() if k not in drop}
    (folder / "meta.json").write_text(json.dumps(meta))
    found = valid(load_meta, str(folder))
    if found:
        assert type(found["vocab_size"]) is int and found["dtype"] in ("uint16", "uint32")
        assert 0 <= found["eot_id"] < found["vocab_size"]
        valid(make_loader, folder, 16, 4, 1, 0)


@given(content=st.binary(max_size=200))
@example(content=NESTED)
def test_any_bytes_in_meta_json_are_valid_or_an_error(content, tmp_path):
    folder = write_data(tmp_path, [1] * 100, [1] * 100)
    (folder / "meta.json").write_bytes(content)
    valid(load_meta, str(folder))


@given(content=st.binary(max_size=200))
@example(content=b"}r\xff\xff\xff\x7f.")   # would allocate 64 GB in C
@example(content=pickle.dumps({"vocab_size": 1, "itos": {0: "a"}}))
def test_any_bytes_in_meta_pkl_are_valid_or_an_error(content, tmp_path):
    (tmp_path / "meta.pkl").write_bytes(content)
    found = valid(load_meta, str(tmp_path))
    assert found is None or found["vocab_size"] == len(found["tokenizer"]) > 0


def make_loader(folder, block_size, batch, ranks, rank):
    cfg = load_config([f"--dataset={folder}", f"--block_size={block_size}", "--batch_size=1",
                       f"--total_batch_size={batch * ranks}"], ranks)
    return DataLoader(cfg, World(rank, ranks, torch.device("cpu")))


@given(tokens=st.integers(0, 3000), block_size=st.integers(1, 200), batch=st.integers(1, 5),
       ranks=st.integers(1, 4), step=st.integers(0, 10**12))
def test_batches_never_read_past_the_file(tokens, block_size, batch, ranks, step, tmp_path):
    folder = write_data(tmp_path, np.arange(tokens), np.arange(50), vocab_size=3000)
    for rank in range(ranks):
        loader = valid(make_loader, folder, block_size, batch, ranks, rank)
        assert (loader is None) == (tokens // block_size < 2 or block_size > 49)
        if loader is None:
            return
        x, y = loader.train(step)
        assert x.shape == y.shape == (batch, block_size)
        assert torch.equal(x + 1, y) and x.min() >= 0 and y.max() < tokens


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint: its contents and its bytes."""
    folder = tmp_path_factory.mktemp("saved")
    payload = {"model": {"w": torch.arange(6.0)}, "model_args": {"n_layer": 1}, "optimizer": {},
               "step": 7, "config": {"seed": 1}, "tokenizer": "bytes", "data": "d"}
    return payload, open(checkpoint.save(str(folder), payload, 7), "rb").read()


@given(data=st.data())
def test_a_changed_checkpoint_is_an_error_or_loads_unchanged(saved, tmp_path, data):
    payload, content = saved
    at = data.draw(st.integers(0, len(content) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "swap"]))
    changed = {"flip": lambda: content[:at] + bytes([content[at] ^ data.draw(st.integers(1, 255))])
               + content[at + 1:],
               "cut": lambda: content[:at],
               "insert": lambda: content[:at] + data.draw(st.binary(min_size=1)) + content[at:],
               "swap": lambda: content[at:] + content[:at]}[kind]()
    path = tmp_path / "ckpt_00000007.pt"
    path.write_bytes(changed)
    found = valid(checkpoint.load, str(path))
    if found is not None:   # the change was in unused bytes
        assert torch.equal(found["model"]["w"], payload["model"]["w"])
        assert {k: found[k] for k in payload if k != "model"} == {
            k: v for k, v in payload.items() if k != "model"}


@given(content=st.binary(max_size=300))
def test_any_bytes_as_a_checkpoint_are_an_error(content, tmp_path):
    path = tmp_path / "ckpt_00000001.pt"
    path.write_bytes(content)
    assert valid(checkpoint.load, str(path)) is None


@given(content=st.binary(max_size=200) | st.lists(JSON.map(json.dumps), max_size=4).map(
    lambda lines: "\n".join(lines).encode("utf-8", "surrogatepass")))
@example(content=NESTED + b"\n{}\n")
def test_any_bytes_in_metrics_jsonl_give_valid_records_or_an_error(content, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    for record in valid(read_metrics, str(path)) or []:
        assert isinstance(record["iter"], int)


@given(changes=st.dictionaries(
    st.sampled_from(["n_layer", "n_head", "n_embd", "n_positions", "vocab_size", "model_type",
                     "activation_function", "scale_attn_by_inverse_layer_idx"]), JSON, max_size=2))
def test_any_hugging_face_config_loads_or_is_an_error(changes, tmp_path):
    from safetensors.torch import save_file
    save_file({"wte.weight": torch.zeros(65, 4), "wpe.weight": torch.zeros(8, 4)},
              tmp_path / "model.safetensors")
    config = {"n_layer": 0, "n_head": 1, "n_embd": 4, "n_positions": 8, "vocab_size": 65, **changes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    valid(init_from.load_weights, str(tmp_path), 65, False)


@given(content=st.binary(max_size=200), suffix=st.sampled_from(
    [".jsonl", ".txt", ".parquet", ".jsonl.gz", ".txt.zst"]))
@example(content=NESTED, suffix=".jsonl")
@example(content=b'{"text": "good"}\n' + NESTED + b'\n{"text": "\xff"}', suffix=".jsonl")
def test_any_bytes_as_documents_give_text_or_an_error(content, suffix, tmp_path):
    path = tmp_path / f"file{suffix}"
    path.write_bytes(content)
    source = valid(lambda: load_documents(find_files(str(path)))[0])
    for batch in valid(lambda: list(read_batches(source))) or [] if source else []:
        assert all(isinstance(text, str) and text.encode().decode() == text for text in batch)


def test_arguments_are_never_evaluated_as_code(tmp_path):
    """Arguments stay text, whatever they contain."""
    target = tmp_path / "made"
    for word in f"--out_dir=__import__('os').mkdir({str(target)!r})", "--seed=().__class__":
        cfg = valid(load_config, [word])
        assert not target.exists() and (cfg is None or cfg.out_dir.startswith("__import__"))
    assert Namespace(**vars(load_config(["--rho=1e-2"]))).rho == 0.01
