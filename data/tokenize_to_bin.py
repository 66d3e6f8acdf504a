"""
Tokenize documents into train.bin, val.bin and meta.json, the format that dataloader.py reads.

Threads tokenize in parallel, because tiktoken releases the GIL. The tokens do not depend on the
number of workers, and memory use does not grow with the source. Progress is saved every few
seconds: run the same command again to resume after an interruption.
"""
import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from tqdm import tqdm

from script import ArgumentParser, UserError, lock_file, write_atomically
from tokenizer import get_tokenizer

SPLITS = ("train", "val")
NOT_RECORDED = ("out_dir", "workers", "restart")   # not in meta.json: they do not change the tokens
BATCH_BYTES = 2**20   # text that a worker tokenizes at a time
SAVE_SECONDS = 10


def make_parser(doc, tokenizer):
    """Argument parser with the options that every prepare.py has."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = ArgumentParser(doc)
    parser.add_argument("--tokenizer", default=tokenizer,
                        help="bytes, gpt2 or another tiktoken encoding (default: %(default)s)")
    parser.add_argument("--out_dir", default=os.path.dirname(os.path.abspath(sys.argv[0])),
                        help="output folder (default: the folder of this script)")
    parser.add_argument("--workers", type=int, default=cores,
                        help="tokenizer threads (default: %(default)s)")
    parser.add_argument("--restart", action="store_true",
                        help="discard the progress of an interrupted run and start over")
    return parser


def split_by_hash(val_fraction):
    """Choose validation documents by the hash of their text alone."""
    def assign_split(index, utf8):
        digest = hashlib.blake2b(utf8, digest_size=8).hexdigest()
        return "val" if int(digest, 16) < val_fraction * 2**64 else "train"
    return assign_split


def read_json(path):
    """Contents of a JSON file, or None if it does not exist."""
    if not os.path.exists(path):
        return None
    try:
        return json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}); delete it to start over") from None


def write_json(path, value):
    write_atomically(path, json.dumps(value, indent=2).encode())


def format_counts(left_out):
    return ", ".join(f"{n:,} {reason}" for reason, n in left_out.items()) or "none"


def write_bins(args, source, assign_split, val_tail=0.0):
    """Write the bins and meta.json to args.out_dir, which must not hold another data set. Unusable
    documents are counted and left out. assign_split(index, utf8) returns 'train' or 'val'. If it
    puts no document in val, the last `val_tail` of the tokens move there. Raises UserError."""
    if args.workers < 1:
        raise UserError(f"workers must be at least 1, got {args.workers}")
    settings = {name: value for name, value in vars(args).items() if name not in NOT_RECORDED}
    settings["identity"] = source.identity
    train_path, meta_path = (os.path.join(args.out_dir, f) for f in ("train.bin", "meta.json"))
    meta = read_json(meta_path)
    if meta is None:
        writer = BinWriter(args, settings, source, assign_split)
        if os.path.exists(train_path) and not os.path.exists(writer.state_path):
            raise UserError(f"{train_path} exists without a meta.json, so another program made it; "
                            f"move it or choose another --out_dir")
        try:
            os.makedirs(args.out_dir, exist_ok=True)
            meta = writer.run(val_tail)
        except OSError as error:
            raise UserError(f"{args.out_dir}: {error}; fix this, then run the same command again "
                            f"to resume") from None
    elif any(meta.get(name) != value for name, value in settings.items()):
        raise UserError(f"{args.out_dir} holds another data set or other settings; choose another "
                        f"--out_dir, or delete {train_path} and {meta_path}")
    print(f"train.bin: {meta['train_tokens']:,} tokens, val.bin: {meta['val_tokens']:,} tokens; "
          f"documents left out: {format_counts(meta['left_out'])}")
    print(f"train on this data set with --dataset={os.path.relpath(args.out_dir)}")


def read_batches(source, position):
    """Yield ([(index, file, raw), ...], the position after them, their size)."""
    documents, index, size = [], position["documents"], 0
    for file in range(position["file"], source.files):
        skip = position["skip"] if file == position["file"] else 0
        for done, raw in enumerate(source.documents(file, skip), skip + 1):
            documents.append((index, file, raw))
            index, size = index + 1, size + len(raw or "")
            if size >= BATCH_BYTES or len(documents) == 4096:
                yield documents, {"file": file, "skip": done, "documents": index}, size
                documents, size = [], 0
    yield documents, {"file": source.files, "skip": 0, "documents": index}, size


def map_in_threads(function, items, workers):
    """Like map(), in threads. Results keep their order; few items are read ahead."""
    pending = deque()
    with ThreadPoolExecutor(workers) as pool:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


class BinWriter:
    """Writes {train,val}.bin.part, and unfinished.json to resume from after an interruption."""

    def __init__(self, args, settings, source, assign_split):
        self.out_dir, self.workers, self.settings = args.out_dir, args.workers, settings
        self.source, self.assign_split = source, assign_split
        self.tokenizer = get_tokenizer(args.tokenizer)
        self.dtype = np.dtype("<u2" if self.tokenizer.vocab_size <= 2**16 else "<u4")
        self.paths = {split: os.path.join(args.out_dir, f"{split}.bin.part") for split in SPLITS}
        self.state_path = os.path.join(args.out_dir, "unfinished.json")
        self.state = None if args.restart else read_json(self.state_path)
        if self.state is None:
            self.state = {"settings": settings, "tokens": dict.fromkeys(SPLITS, 0), "size": 0,
                          "position": {"file": 0, "skip": 0, "documents": 0}, "left_out": {},
                          "meta": None}
        elif self.state.get("settings") != settings:
            raise UserError(f"{args.out_dir} holds an interrupted run on other data or settings; "
                            f"pass --restart to discard it, or choose another --out_dir")
        else:
            print(f"resuming after {self.state['position']['documents']:,} documents")

    def run(self, val_tail):
        """Tokenize the rest of the source and rename the parts. Returns meta."""
        if self.state["meta"] is None:
            with ExitStack() as stack:
                self.files = {s: stack.enter_context(self.open_part(s)) for s in SPLITS}
                self.tokenize()
                if val_tail and self.state["tokens"]["train"] and not self.state["tokens"]["val"]:
                    self.move_tail_to_val(val_tail)
                self.state["meta"] = self.make_meta()
                self.save()   # from here on, only renames are left
        for path in self.paths.values():
            if os.path.exists(path):
                os.replace(path, path.removesuffix(".part"))
        write_json(os.path.join(self.out_dir, "meta.json"), self.state["meta"])
        os.remove(self.state_path)
        return self.state["meta"]

    def open_part(self, split):
        """Open and lock a part; truncate what was written after the last save."""
        file = open(self.paths[split], "ab")
        lock_file(file, f"another process is preparing {self.out_dir}; wait for it, or stop it")
        size = self.state["tokens"][split] * self.dtype.itemsize
        if file.tell() < size:
            raise UserError(f"{file.name} is shorter than it was; pass --restart to start over")
        file.truncate(size)
        return file

    def tokenize(self):
        text_bytes, tokens = self.source.text_bytes, sum(self.state["tokens"].values())
        needed = (text_bytes * self.tokenizer.tokens_per_byte - tokens) * self.dtype.itemsize
        free = shutil.disk_usage(self.out_dir).free
        if needed > free:
            raise UserError(f"the bins will take about {needed / 1e9:.1f} GB, {self.out_dir} has "
                            f"{free / 1e9:.1f} GB free; choose another --out_dir")
        batches, saved = read_batches(self.source, self.state["position"]), time.monotonic()
        try:
            with tqdm(desc="tokenize", initial=self.state["size"], total=text_bytes, unit="B",
                      unit_scale=True) as bar:
                for result in map_in_threads(self.tokenize_batch, batches, self.workers):
                    self.write(*result)
                    bar.update(self.state["size"] - bar.n)
                    if time.monotonic() - saved > SAVE_SECONDS:
                        self.save()
                        saved = time.monotonic()
        finally:
            self.save()

    def tokenize_batch(self, batch):
        """Runs in a thread. Returns {split: token ids}, the number of documents left out by reason,
        and the batch's position and size."""
        documents, position, size = batch
        ids, left_out = {split: [np.empty(0, self.dtype)] for split in SPLITS}, Counter()
        for index, file, raw in documents:
            try:
                text = self.source.text(file, raw)
                utf8 = text.encode()   # fails on lone surrogates, which JSON can hold
                if not utf8:
                    raise ValueError("empty")
            except UnicodeError:
                left_out["not UTF-8"] += 1
            except ValueError as error:
                left_out[str(error)] += 1
            else:
                tokens = np.append(self.tokenizer.encode_to_numpy(text), self.tokenizer.eot_id)
                ids[self.assign_split(index, utf8)].append(tokens.astype(self.dtype))
        return {split: np.concatenate(ids[split]) for split in SPLITS}, left_out, position, size

    def write(self, ids, left_out, position, size):
        """Append what tokenize_batch returned to the parts."""
        for split in SPLITS:
            self.files[split].write(ids[split])
        old = self.state
        # One assignment, so that an interruption cannot leave a half-updated state to be saved.
        self.state = {
            **old, "position": position, "size": old["size"] + size,
            "tokens": {split: old["tokens"][split] + len(ids[split]) for split in SPLITS},
            "left_out": Counter(old["left_out"]) + left_out}

    def move_tail_to_val(self, fraction):
        """Move the last tokens from train to val. If interrupted before the save, it starts over;
        after the save, open_part truncates train."""
        tokens = np.memmap(self.paths["train"], self.dtype, "r")
        count = len(tokens) - math.ceil(fraction * len(tokens))
        ids = {"train": tokens[:count], "val": tokens[count:]}
        self.files["val"].write(ids["val"])
        self.state = {**self.state, "tokens": {split: len(ids[split]) for split in SPLITS}}
        self.save()
        self.files["train"].truncate(count * self.dtype.itemsize)

    def save(self):
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        write_json(self.state_path, self.state)

    def make_meta(self):
        """Contents of meta.json. Raises UserError unless both parts have tokens."""
        left_out, keys = self.state["left_out"], ", ".join(self.source.text_keys)
        meta = {**self.settings, "vocab_size": self.tokenizer.vocab_size,
                "eot_id": self.tokenizer.eot_id, "dtype": self.dtype.name,
                "documents": self.state["position"]["documents"], "left_out": left_out}
        for split, tokens in self.state["tokens"].items():
            if not tokens:
                hint = f"; text is in {keys}" if keys else ""
                raise UserError(f"no documents for {split}.bin (left out: {format_counts(left_out)}"
                                f"{hint}); pass --restart with other settings")
            meta[f"{split}_tokens"] = tokens
            with open(self.paths[split], "rb") as file:
                meta[f"{split}_sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        return meta
