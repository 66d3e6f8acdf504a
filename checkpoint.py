"""Checkpoints, RUN/ckpt_STEP.pt: atomic writes, verified reads. Keeps the last two and the best."""
import os
import pickle
import re
import zipfile
from contextlib import suppress
from pathlib import Path

import torch

from script import UserError, lock_file, write_atomically

FORMAT_VERSION = 1
KEEP = 2   # latest checkpoints to keep, besides the best
KEYS = ("model", "model_args", "optimizer", "step", "config", "tokenizer", "data")


def path_of(run_dir, step):
    return os.path.join(run_dir, f"ckpt_{step:08d}.pt")


def list_checkpoints(run_dir):
    """Paths of a run's checkpoints, latest first."""
    names = os.listdir(run_dir) if os.path.isdir(run_dir) else []
    found = sorted((n for n in names if re.fullmatch(r"ckpt_\d{8,}\.pt", n)),
                   key=lambda n: int(n[5:-3]), reverse=True)
    return [os.path.join(run_dir, n) for n in found]


def check_unused(run_dir):
    """Raise UserError if run_dir has checkpoints, which a new run would overwrite."""
    existing = list_checkpoints(run_dir)
    if existing:
        raise UserError(f"{run_dir} holds a run already ({os.path.basename(existing[0])}); resume "
                        f"it with --init_from=resume, or choose another --out_dir")


def lock(run_dir):
    """Create run_dir and lock it until this process ends. UserError if another process has it."""
    with suppress(OSError):   # not writable: writing config.json will report it
        os.makedirs(run_dir, exist_ok=True)
        # Never closed. NFS locks only files that are open for writing, hence a file.
        descriptor = os.open(os.path.join(run_dir, "lock"), os.O_RDWR | os.O_CREAT, 0o666)
        lock_file(descriptor, f"another process is training in {run_dir}; stop it first, or choose "
                          f"another --out_dir")


def save(run_dir, payload, best_step):
    """
    Write payload, a dict with KEYS, as the checkpoint of payload["step"], then delete old ones.
    Returns its path. Raises UserError if the disk is full or not writable.
    """
    path = path_of(run_dir, payload["step"])
    write_atomically(path, lambda file: torch.save(dict(payload, version=FORMAT_VERSION), file))
    existing = list_checkpoints(run_dir)
    # Later checkpoints could not be loaded: they must not displace valid ones.
    unwanted = existing[existing.index(path) + KEEP:]
    unwanted += map(str, Path(run_dir).glob("ckpt_*.pt.tmp"))   # left by killed processes
    for old in unwanted:
        if old != path_of(run_dir, best_step):
            with suppress(OSError):   # an extra file does no harm
                os.remove(old)
    return path


def read(path):
    """
    The dict that torch.save wrote, on the CPU, with verified checksums. Loading cannot run code
    from the file (weights_only). Raises UserError if the file is damaged or holds no dict.
    """
    try:
        with zipfile.ZipFile(path) as archive:   # torch.load does not verify checksums
            damaged = archive.testzip()
        if damaged is not None:
            raise UserError(f"{path} is damaged: bad checksum in {damaged}")
        payload = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read checkpoint {path}: {error.strerror}") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path} is refused: it holds more than tensors and plain values, so "
                        f"loading it could run code") from None
    except Exception as error:   # the exception depends on the damaged byte
        raise UserError(f"{path} is damaged or not a checkpoint "
                        f"({type(error).__name__})") from None
    if not isinstance(payload, dict):
        raise UserError(f"{path} is not a checkpoint")
    return payload


def check(payload, path):
    """Raise UserError unless payload, read from path, is a checkpoint of train.py."""
    if any(key not in payload for key in KEYS):
        raise UserError(f"{path} is not a checkpoint of train.py")
    if payload.get("version") != FORMAT_VERSION:
        raise UserError(f"{path} has format version {payload.get('version')}, this code reads "
                        f"{FORMAT_VERSION}")


def load(path):
    """A checkpoint of train.py: a dict with KEYS. Raises UserError."""
    payload = read(path)
    check(payload, path)
    return payload


def find_latest(run_dir):
    """
    (path, problems): the latest checkpoint that can be loaded, and one line for each later one that
    cannot. (None, []) if there are no checkpoints. Raises UserError if all are damaged.
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
