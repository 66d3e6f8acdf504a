"""
Documents -> train.bin, val.bin and meta.json, the format that dataloader.py reads.

Documents are read in order and tokenized by threads, for tiktoken works outside Python's lock: the
tokens are the same for any number of workers, and memory does not grow with the source. Every few
seconds the tokens so far and the place in the source are put on the disk, so that a preparation
that was stopped, in whatever way, goes on from there when called again.
"""
import hashlib
import json
import math
import os
import shutil
import sys
import time
import zlib
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from script import ArgumentParser, UserError, lock_file, write_atomically  # noqa: E402
from tokenizer import get_tokenizer  # noqa: E402

SPLITS = ("train", "val")
NOT_PLANNED = ("out_dir", "workers", "restart")   # arguments that do not decide the tokens
BATCH_BYTES = 2**20   # text that a worker takes at a time
SAVE_SECONDS = 10


def prepare_arguments(doc, tokenizer):
    """The options that every prepare.py has."""
    has_affinity = hasattr(os, "sched_getaffinity")   # not macOS
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
    parser = ArgumentParser(doc)
    parser.add_argument("--tokenizer", default=tokenizer, help="bytes, gpt2, or another that "
                        "tiktoken knows (now %(default)s)")
    parser.add_argument("--out_dir", default=os.path.dirname(os.path.abspath(sys.argv[0])),
                        help="where the bins go (default: beside this script)")
    parser.add_argument("--workers", type=int, default=cores,
                        help="threads that tokenize (now %(default)s)")
    parser.add_argument("--restart", action="store_true",
                        help="begin anew, over an unfinished preparation")
    return parser


def split_by_hash(val_fraction):
    """split(index, utf8): a document is in val by its text alone, in whatever order it comes."""
    def split(index, utf8):
        return SPLITS[int(digest(utf8), 16) < val_fraction * 2**64]
    return split


def digest(utf8):
    return hashlib.blake2b(utf8, digest_size=8).hexdigest()


def read_json(path):
    """What the file holds, None if there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}); delete it to begin anew") from None


def write_json(path, value):
    content = json.dumps(value, indent=2).encode()
    write_atomically(path, lambda file: file.write(content))


def counts(left_out):
    return ", ".join(f"{n:,} {what}" for what, n in left_out.items())


def write_bins(args, source, split, tail=0.0):
    """
    Write the bins and meta.json into args.out_dir and return meta. source: see documents.py;
    split(index, utf8) -> 'train' or 'val' for a document. tail: share of the tokens, from the end,
    that are val, where split puts no document there. Documents that cannot be used are counted and
    left out. Raises UserError, and then leaves alone what is there.
    """
    if args.workers < 1:
        raise UserError(f"workers must be at least 1, got {args.workers}")
    tokenizer = get_tokenizer(args.tokenizer)
    # What decides the tokens. Stays in meta.json, to tell where they are from.
    plan = {name: value for name, value in vars(args).items() if name not in NOT_PLANNED}
    plan["identity"] = source.identity
    train_path, meta_path = (os.path.join(args.out_dir, f) for f in ("train.bin", "meta.json"))
    meta = read_json(meta_path)
    bins = Unfinished(args.out_dir, plan, tokenizer, args.restart)
    if meta is None:
        if os.path.exists(train_path) and not os.path.exists(bins.state_path):
            raise UserError(f"{train_path} exists, made by something else; move it or choose "
                            f"another --out_dir")
        try:
            os.makedirs(args.out_dir, exist_ok=True)
            meta = bins.complete(source, split, tail, args.workers)
        except OSError as error:
            raise UserError(f"{args.out_dir}: {error}; once that is mended, the same command goes "
                            f"on from where it stopped") from None
    elif {key: meta.get(key) for key in plan} != plan:
        raise UserError(f"{args.out_dir} holds another data set, or one of other settings; choose "
                        f"another --out_dir, or delete {train_path} and {meta_path}")
    for name in SPLITS:
        path = os.path.relpath(os.path.join(args.out_dir, f"{name}.bin"))
        print(f"{path}: {meta[f'{name}_tokens']:,} tokens")
    if meta["left_out"]:
        print("documents left out:", counts(meta["left_out"]))
    print(f"train on them with --dataset={os.path.relpath(args.out_dir)}")
    return meta


def batches(source, place):
    """Yields ([(index, file, raw), ...], the place after them, bytes read)."""
    documents, index, size, read = [], place["documents"], 0, 0
    for file in range(place["file"], source.files):
        taken = place["skip"] if file == place["file"] else 0
        for raw, raw_read in source.documents(file, taken):
            documents.append((index, file, raw))
            taken, index = taken + 1, index + 1
            size, read = size + len(raw or ""), read + raw_read
            if size >= BATCH_BYTES or len(documents) == 4096:
                yield documents, {"file": file, "skip": taken, "documents": index}, read
                documents, size, read = [], 0, 0
    yield documents, {"file": source.files, "skip": 0, "documents": index}, read


class Unfinished:
    """Bins in the making: *.bin.part, and in unfinished.json what they hold and where from."""

    def __init__(self, out_dir, plan, tokenizer, restart):
        self.out_dir, self.plan, self.tokenizer = out_dir, plan, tokenizer
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
        self.state_path = os.path.join(out_dir, "unfinished.json")
        self.files = {}
        self.state = None if restart else read_json(self.state_path)
        if self.state is None:
            self.state = {"plan": plan, "place": {"file": 0, "skip": 0, "documents": 0}, "read": 0,
                          "tokens": dict.fromkeys(SPLITS, 0), "crc32": dict.fromkeys(SPLITS, 0),
                          "left_out": {}, "samples": [], "meta": None}
        elif self.state["plan"] != plan:
            raise UserError(f"{out_dir} holds an unfinished preparation of other data or settings; "
                            f"pass --restart to begin anew, or choose another --out_dir")
        else:
            print(f"going on after {self.state['place']['documents']:,} documents")

    def path(self, split):
        return os.path.join(self.out_dir, f"{split}.bin.part")

    def __enter__(self):
        """Open the parts; what was written after the last save is cut off."""
        for split in SPLITS:
            file = self.files[split] = open(self.path(split), "ab")
            lock_file(file, f"another process is preparing {self.out_dir}; wait for it, or stop it")
            size = self.state["tokens"][split] * self.dtype.itemsize
            if file.tell() < size:
                raise UserError(f"{self.path(split)} is shorter than it was; pass --restart to "
                                f"begin anew")
            file.truncate(size)
        return self

    def __exit__(self, *error):
        for file in self.files.values():
            file.close()

    def complete(self, source, split, tail, workers):
        """Tokenize what is left of the source, verify, and give the files their names."""
        meta = self.state["meta"]
        if meta is None:
            with self:
                self.tokenize(source, split, workers)
                if tail and self.state["tokens"]["train"] and not self.state["tokens"]["val"]:
                    self.move_tail(tail)
            for name, tokens in self.state["tokens"].items():
                if not tokens:
                    left_out = counts(self.state["left_out"]) or "none"
                    keys = f"; text is in {', '.join(source.text_keys)}" * bool(source.text_keys)
                    raise UserError(f"no documents for {name}.bin (left out: {left_out}{keys}); "
                                    f"pass --restart with other settings")
            meta = self.state["meta"] = self.verified()
            write_json(self.state_path, self.state)   # stopped from here on, only renames are left
        for name in SPLITS:
            if os.path.exists(self.path(name)):
                os.replace(self.path(name), self.path(name).removesuffix(".part"))
        write_json(os.path.join(self.out_dir, "meta.json"), meta)
        os.remove(self.state_path)
        return meta

    def tokenize(self, source, split, workers):
        needed = source.text_bytes * self.tokenizer.tokens_per_byte * self.dtype.itemsize
        needed -= sum(self.state["tokens"].values()) * self.dtype.itemsize
        free = shutil.disk_usage(self.out_dir).free
        if needed > free:
            raise UserError(f"the bins will take about {needed / 1e9:.1f} GB, {self.out_dir} has "
                            f"{free / 1e9:.1f} GB free; choose another --out_dir")
        saved, pending = time.monotonic(), deque()
        with (ThreadPoolExecutor(workers) as pool,
              tqdm(total=source.text_bytes, initial=self.state["read"], unit="B", unit_scale=True,
                   desc="tokenize") as bar):

            def append_oldest():
                future, place, read = pending.popleft()
                self.append(*future.result(), place, read)
                bar.update(read)

            try:
                for documents, place, read in batches(source, self.state["place"]):
                    future = pool.submit(self.work, documents, source, split)
                    pending.append((future, place, read))
                    if len(pending) > 2 * workers:
                        append_oldest()
                    if time.monotonic() - saved > SAVE_SECONDS:
                        self.save()
                        saved = time.monotonic()
                while pending:
                    append_oldest()
            finally:
                self.save()

    def work(self, documents, source, split):
        """A worker's part: returns {split: tokens}, Counter of what is wrong with documents, and a
        sample by which to verify the result."""
        ids, bad, sample = {name: [np.empty(0, self.dtype)] for name in SPLITS}, Counter(), None
        for index, file, raw in documents:
            try:
                text = source.text(file, raw)
                utf8 = text.encode()   # json can hold halves of surrogate pairs
                if not utf8:
                    raise ValueError("empty")
            except UnicodeError:
                bad["not UTF-8"] += 1
            except ValueError as error:
                bad[str(error)] += 1
            else:
                name = split(index, utf8)
                new = np.append(self.tokenizer.encode_to_numpy(text), self.tokenizer.eot_id)
                if name == "train" and sample is None:
                    sample = {"document": index + 1, "tokens": len(new), "digest": digest(utf8)}
                ids[name].append(new.astype(self.dtype))
        return {name: np.concatenate(parts) for name, parts in ids.items()}, bad, sample

    def append(self, ids, bad, sample, place, read):
        """Write what a worker returned; place: in the source, after it."""
        state = self.state
        for split, array in ids.items():
            self.files[split].write(array)
        samples = state["samples"]
        if sample and sample["document"] >= 2 * sum(s["document"] for s in samples[-1:]):
            samples = [*samples, dict(sample, start=state["tokens"]["train"])]
        # In one assignment, so that a state that is saved after Ctrl-C or an error is a whole one.
        self.state = {
            **state, "place": place, "read": state["read"] + read, "samples": samples,
            "tokens": {split: state["tokens"][split] + len(ids[split]) for split in SPLITS},
            "crc32": {split: zlib.crc32(ids[split], state["crc32"][split]) for split in SPLITS},
            "left_out": Counter(state["left_out"]) + bad}

    def move_tail(self, fraction):
        """Move the last tokens from train.bin.part to val.bin.part. If this is stopped before the
        save, it is done again; after it, all that is left is to cut off train.bin.part."""
        self.check_samples()
        tokens = np.memmap(self.path("train"), self.dtype, "r")
        count = len(tokens) - math.ceil(fraction * len(tokens))
        if zlib.crc32(tokens) != self.state["crc32"]["train"]:
            raise self.changed("train")
        parts = {"train": tokens[:count], "val": tokens[count:]}
        self.files["val"].write(parts["val"])
        self.state = {
            **self.state, "tokens": {name: len(part) for name, part in parts.items()},
            "crc32": {name: zlib.crc32(part) for name, part in parts.items()},
            "samples": [s for s in self.state["samples"] if s["start"] + s["tokens"] <= count]}
        self.save()
        self.files["train"].truncate(count * self.dtype.itemsize)

    def save(self):
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        write_json(self.state_path, self.state)

    def changed(self, split):
        return UserError(f"{self.path(split)} is not what was written to it; check the disk and "
                         f"pass --restart to begin anew")

    def verified(self):
        """Read everything back. Returns the contents of meta.json; raises UserError unless the
        parts are what was written, and samples decode to what was read."""
        state = self.state
        meta = {**self.plan, "vocab_size": self.tokenizer.vocab_size,
                "eot_id": self.tokenizer.eot_id, "dtype": self.dtype.name,
                "documents": state["place"]["documents"], "left_out": state["left_out"]}
        for split in SPLITS:
            sha256, crc32 = hashlib.sha256(), 0
            with open(self.path(split), "rb") as file:
                while block := file.read(2**24):
                    sha256.update(block)
                    crc32 = zlib.crc32(block, crc32)
            if crc32 != state["crc32"][split]:
                raise self.changed(split)
            meta[f"{split}_tokens"] = state["tokens"][split]
            meta[f"{split}_sha256"] = sha256.hexdigest()
        self.check_samples()
        return meta

    def check_samples(self):
        for sample in self.state["samples"]:
            ids = np.fromfile(self.path("train"), self.dtype, sample["tokens"] - 1,
                              offset=sample["start"] * self.dtype.itemsize)
            if digest(self.tokenizer.decode(ids.tolist()).encode()) != sample["digest"]:
                raise UserError(f"document {sample['document']:,} is not what its tokens decode to")
