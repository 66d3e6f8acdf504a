"""
Checkpoints: ckpt_00001000.pt (of step 1,000) in a run directory. Written whole or not at all,
verified before they are believed; the last two and the best are kept.
"""
import os
import pickle
import re
import zipfile
from contextlib import suppress
from pathlib import Path

import torch

from script import UserError, lock_file, write_atomically

FORMAT_VERSION = 1
KEEP = 2   # newest ones; the best is kept besides
KEYS = ("model", "model_args", "optimizer", "step", "config", "tokenizer", "data")


def path_of(run_dir, step):
    return os.path.join(run_dir, f"ckpt_{step:08d}.pt")


def list_checkpoints(run_dir):
    """Paths of a run's checkpoints, newest first."""
    names = os.listdir(run_dir) if os.path.isdir(run_dir) else []
    found = sorted((n for n in names if re.fullmatch(r"ckpt_\d{8,}\.pt", n)),
                   key=lambda n: int(n[5:-3]), reverse=True)
    return [os.path.join(run_dir, n) for n in found]


def check_unused(run_dir):
    """Raise UserError if run_dir has checkpoints that a new run would replace."""
    existing = list_checkpoints(run_dir)
    if existing:
        raise UserError(f"{run_dir} holds a run already ({os.path.basename(existing[0])}); go on "
                        f"with --init_from=resume, or choose another --out_dir")


def lock(run_dir):
    """
    Make run_dir and claim it until this process ends, in whatever way. Raises UserError if another
    process has claimed it.
    """
    with suppress(OSError):   # no writing: config.json will tell
        os.makedirs(run_dir, exist_ok=True)
        # Never closed. A file in it, since NFS locks only what is open for writing.
        descriptor = os.open(os.path.join(run_dir, "lock"), os.O_RDWR | os.O_CREAT, 0o666)
        lock_file(descriptor, f"another process is training in {run_dir}; stop it first, or choose "
                          f"another --out_dir")


def save(run_dir, payload, best_step):
    """
    Write payload, a dict with KEYS, as the checkpoint of payload["step"], then delete the ones that
    are no longer wanted. Returns its path; raises UserError if the disk refuses.
    """
    path = path_of(run_dir, payload["step"])
    write_atomically(path, lambda file: torch.save(dict(payload, version=FORMAT_VERSION), file))
    existing = list_checkpoints(run_dir)
    # Newer ones are those that could not be loaded: they must not push out what can.
    unwanted = existing[existing.index(path) + KEEP:]
    unwanted += map(str, Path(run_dir).glob("ckpt_*.pt.tmp"))   # of processes that were killed
    for old in unwanted:
        if old != path_of(run_dir, best_step):
            with suppress(OSError):   # a file too many is no reason to stop
                os.remove(old)
    return path


def read(path):
    """
    The dict that torch.save wrote, on the CPU, after its checksums have been verified. Nothing in
    the file can run code (weights_only). Raises UserError for what is damaged or not a dict.
    """
    try:
        with zipfile.ZipFile(path) as archive:   # torch.load itself does not compare checksums
            damaged = archive.testzip()
        if damaged is not None:
            raise UserError(f"{path} is damaged: bad checksum in {damaged}")
        payload = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read checkpoint {path}: {error.strerror}") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path} is refused: it holds more than tensors and plain values, and "
                        f"loading it could run code") from None
    except Exception as error:   # what a damaged archive raises depends on the damaged byte
        raise UserError(f"{path} is damaged or not a checkpoint "
                        f"({type(error).__name__})") from None
    if not isinstance(payload, dict):
        raise UserError(f"{path} is not a checkpoint")
    return payload


def check(payload, path):
    """Raise UserError unless payload, read from path, is a whole checkpoint of ours."""
    if any(key not in payload for key in KEYS):
        raise UserError(f"{path} is not a checkpoint of train.py")
    if payload.get("version") != FORMAT_VERSION:
        raise UserError(f"{path} has format version {payload.get('version')}, this code reads "
                        f"{FORMAT_VERSION}")


def load(path):
    """A checkpoint of ours as a dict with KEYS. Raises UserError if path is not one."""
    payload = read(path)
    check(payload, path)
    return payload


def find_latest(run_dir):
    """
    (path, problems): the newest checkpoint that can be loaded, and a line for each newer one that
    cannot. (None, []) if there are no checkpoints; UserError if there are only bad ones.
    """
    problems = []
    for path in list_checkpoints(run_dir):
        try:
            load(path)
            return path, problems
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError(f"no checkpoint in {run_dir} can be loaded: {problems[0]}")
    return None, []


def find_best(run):
    """Path of a run's best checkpoint; run itself if it is a file. Raises UserError."""
    if not os.path.isdir(run):
        return run
    latest, problems = find_latest(run)
    for problem in problems:
        print(problem)
    if latest is None:
        raise UserError(f"no checkpoint in {run}")
    best = path_of(run, load(latest)["best_step"])
    return best if os.path.exists(best) else latest
