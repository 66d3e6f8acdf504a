"""
Distributed helpers: rank, process group, and the collectives that we use. A process without
torchrun is a world of one rank, and every function works there too.
"""
import gc
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from textwrap import shorten

import numpy as np
import torch
import torch.distributed as dist

from script import LostRankError, UserError

TIMEOUT = timedelta(minutes=30)   # a rank that waits longer than this for the others gives up


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device

    @property
    def is_rank0(self):
        return self.rank == 0


def world_size():
    """Number of ranks, from torchrun's environment: known before the process group exists."""
    return int(os.environ.get("WORLD_SIZE", 1))


def restart_count():
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def restarted():
    """Whether torchrun restarted any rank after a failure. Each node keeps its own count."""
    return all_reduce_max(restart_count()) > 0


def setup(device, backend="auto"):
    """
    Join the process group, if there is one. backend: auto | nccl | gloo. With NCCL the group also
    has gloo, so that ranks can exchange a CPU tensor without waiting for the GPU. Raises UserError.
    """
    if backend == "nccl" and device.type != "cuda":
        raise UserError(f"backend=nccl needs CUDA, but this rank uses {device.type}; use "
                        f"--backend=auto")
    if world_size() == 1:
        return World(0, 1, device)
    if device.type == "mps":
        raise UserError("PyTorch does not support more than one rank on mps; use --device=cpu")
    nccl = device.type == "cuda" and backend != "gloo"
    store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun's store survives a restart, and so do the addresses of the ranks that died. On
        # several nodes, whose counts may differ, users set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
        store = dist.PrefixStore(f"start_{restart_count()}", store)
    dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", store=store, rank=rank,
                            world_size=size, timeout=TIMEOUT, device_id=device if nccl else None)
    return World(dist.get_rank(), dist.get_world_size(), device)


def cleanup():
    """
    Leave the process group. DDP modules must be gone by then: the last reference to the group, if a
    module's destructor drops it, waits with the GIL for a gloo thread that may need the GIL.
    """
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


@contextmanager
def explain_lost_rank():
    """Turn gloo's error after another rank died or hung into a LostRankError. NCCL's errors can
    have other causes and pass unchanged."""
    try:
        yield
    except RuntimeError as error:
        if "gloo/transport" not in str(error):
            raise
        reason = shorten(str(error), 200)
        raise LostRankError(f"another rank died, or did not answer for {TIMEOUT}; its output says "
                            f"why. Resume with --init_from=auto ({reason})") from None


def print0(text):
    """Print on rank 0. A closed terminal or pipe, or a full disk, does not stop training."""
    if int(os.environ.get("RANK", 0)) == 0:
        try:
            print(text, flush=True)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def all_reduce_sum(values):
    """Sum over ranks of a tensor, in place on its device."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def all_reduce_mean(values):
    """Mean over ranks of a tensor, in place on its device."""
    return all_reduce_sum(values).div_(world_size())


def all_reduce_max(number):
    """Maximum over ranks of a Python number. Exchanged on the CPU, without waiting for the GPU."""
    if not dist.is_initialized():
        return number
    value = torch.tensor(number)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.item()


def broadcast_from_rank0(function):
    """Call function() on rank 0 alone. Every rank gets the small Python object that it returns, or
    the UserError that it raises."""
    if not dist.is_initialized():
        return function()
    box = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = function()
        except UserError as error:
            box[1] = str(error)
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    if box[1] is not None:
        raise UserError(box[1])
    return box[0]


def seed_step(seed, step, rank):
    """
    Seed dropout from (seed, step, rank), so that a resumed run draws the same numbers as an
    uninterrupted one and checkpoints need no generator state.
    """
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))
