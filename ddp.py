"""
Ranks: who this process is, which device it has, and the few things that ranks tell each other.
One process without torchrun is a world of one rank, and every function here works there too.
"""
import gc
import os
import shutil
import signal
import sys
import sysconfig
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from textwrap import shorten

import numpy as np
import torch
import torch.distributed as dist

from configurator import RankError, UserError, less_memory

TIMEOUT = timedelta(minutes=30)   # a rank that waits longer than this for the others gives up


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self):
        return self.rank == 0


def world_size():
    """Ranks of this job, known from the environment before anything is set up."""
    return int(os.environ.get("WORLD_SIZE", 1))


def restart_count():
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def restarted():
    """Whether torchrun started any rank again after a failure; nodes count for themselves."""
    return largest(restart_count()) > 0


def join(device="auto", backend="auto"):
    """
    Choose this rank's device and join the process group, if there is one. device: auto | cuda |
    mps | cpu; backend: auto | nccl | gloo. With CUDA the group has gloo beside nccl, so that ranks
    can agree on a CPU tensor without waiting for the device. Raises UserError.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
                 "cpu": True}
    kind = next(k for k in available if available[k]) if device == "auto" else device
    if not available.get(kind):
        raise UserError(f"device={kind} is not available on this machine; use --device=auto")
    if backend == "nccl" and kind != "cuda":
        raise UserError(f"backend=nccl needs CUDA, this rank has {kind}; use --backend=auto")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"local rank {local_rank} has no GPU, there are "
                            f"{torch.cuda.device_count()}; lower torchrun's --nproc_per_node")
        torch.cuda.set_device(local_rank)
        torch.set_float32_matmul_precision("high")   # TF32 where autocast leaves float32
    chosen = torch.device("cuda", local_rank) if kind == "cuda" else torch.device(kind)
    if world_size() == 1:
        return World(0, 1, chosen)
    if kind == "mps":
        raise UserError("several ranks on mps are not supported by PyTorch; use --device=cpu")
    on_gpu = kind == "cuda" and backend != "gloo"
    store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun's store outlives the ranks: the addresses of those that a restart replaced are
        # still in it. On several nodes, which may count differently, the user must have torchrun
        # make a new store each time: TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
        store = dist.PrefixStore(f"start_{restart_count()}", store)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", store=store, rank=rank,
                            world_size=size, timeout=TIMEOUT,
                            device_id=chosen if on_gpu else None)
    return World(dist.get_rank(), dist.get_world_size(), chosen)


@contextmanager
def naming_lost_ranks():
    """Make what gloo raises when another rank has died or hangs a RankError. NCCL's errors, which
    can have other causes, stay as they are."""
    try:
        yield
    except RuntimeError as error:
        if "gloo/transport" not in str(error):
            raise
        raise RankError(f"another rank died, or did not answer for {TIMEOUT}; what it printed says "
                        f"why. Go on with --init_from=auto ({shorten(str(error), 200)})") from None


@contextmanager
def naming_batch_size(cfg):
    """Turn running out of memory, on a GPU or the CPU, into a RankError that says what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # RuntimeErrors of cuBLAS and of the CPU allocator have no class of their own.
        signs = "out of memory", "ALLOC_FAILED", "can't allocate memory"
        if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in signs):
            raise
        raise RankError(f"out of memory: {less_memory(cfg, world_size())} "
                        f"({shorten(str(error), 200)})") from None


def say(text):
    """Print on rank 0 alone. When the terminal or the reader of a pipe is gone, or the disk with
    the log is full, training goes on unheard."""
    if int(os.environ.get("RANK", 0)) == 0:
        try:
            print(text, flush=True)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def leave():
    """
    Leave the process group. DDP modules must be gone by then: the destructor of one that holds the
    last reference to the group waits, with the GIL, for a gloo thread that may want the GIL.
    """
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def pick_dtype(dtype, device):
    """The autocast dtype: 'auto' is bfloat16 where the GPU has it, else float32."""
    if dtype != "auto":
        return getattr(torch, dtype)
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float32


def pick_compile(setting, device):
    """
    None to compile, else why not. 'auto' compiles where the toolchain is there: Triton for CUDA, a
    C++ compiler and Python's headers for the CPU. Raises UserError if 'True' cannot be.
    """
    if setting == "False":
        return "compile=False"
    reason = None
    if device.type == "cuda":
        reason = None if find_spec("triton") else "Triton is not installed"
    elif device.type == "cpu":
        header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
        if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")):
            reason = "there is no C++ compiler"
        elif not os.path.exists(header):
            reason = "Python's headers are not installed"
    else:
        reason = f"torch.compile is not used on {device.type}"
    if reason and setting == "True":
        raise UserError(f"compile=True is not possible: {reason}")
    return reason


def be_deterministic():
    """
    Ask PyTorch for kernels that give the same bits each time, before the device is first used. What
    has none warns: on CUDA that is the sum over classes by which a Hessian label is drawn.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False   # for debugging, and slow


def mean(value):
    """Mean over ranks of a 0-dim tensor, in place on its device."""
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


def total(values):
    """Sum over ranks of a tensor, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def largest(number):
    """Largest of the ranks' numbers. Exchanged on the CPU: the device is not waited for."""
    if not dist.is_initialized():
        return number
    value = torch.tensor(number)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.item()


def from_main(function):
    """
    What function() returns, a small Python object, or the UserError it raises, on rank 0: handed to
    every rank. Only rank 0 calls it.
    """
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
    Seed dropout as a function of (seed, step, rank): a resumed run draws what the uninterrupted one
    would have drawn, and there is no generator state to keep.
    """
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))


class StopSignal:
    """
    SIGTERM, SIGINT, SIGUSR1 (Slurm's warning) and SIGHUP (the terminal is gone) ask for a stop
    after the step under way; a second SIGINT interrupts at once. Under nohup SIGHUP is ignored.
    """

    def __init__(self):
        self.name = None
        for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"):
            number = getattr(signal, name, None)   # Windows lacks the last two
            # torchrun takes no notice of nohup, passes SIGHUP on and kills who does not leave.
            if number and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN
                               and not dist.is_torchelastic_launched()):
                signal.signal(number, self._on_signal)

    def _on_signal(self, number, frame):
        self.name = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def seen_by_any_rank(self):
        """Whether any rank has been asked: all must leave after the same step."""
        return largest(int(self.name is not None)) > 0
