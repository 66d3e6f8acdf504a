"""The device: which one, its dtype, whether torch.compile works, its peak FLOP/s and memory."""
import os
import re
import shutil
import sysconfig
from contextlib import contextmanager
from importlib.util import find_spec
from textwrap import shorten

import torch

import ddp
from model import rows_per_chunk
from optim import STATE_TENSORS
from script import RankError, UserError

# Dense bfloat16/float16 tensor-core peaks in FLOP/s, with float32 accumulation, from NVIDIA's data
# sheets; for RTX 3090 to 5090 from the architectures' whitepapers. Most sheets print the peak with
# sparsity, which is twice as high. Keys are regular expressions for the card's name in CUDA.
PEAK_FLOPS = {
    "GB200": 2500e12, "B200": 2250e12, "GH200 .*": 989e12, "H200": 989e12, "H200 NVL": 836e12,
    "H100 .*HBM3": 989e12, "H100 NVL": 836e12, "H100 PCIe": 756e12, "A100[ -].*": 312e12,
    "L40S": 362e12, "L4": 121e12, "A10G": 70e12, "RTX A6000": 155e12, "RTX 3090": 71e12,
    "RTX 4090": 165e12, "RTX 5090": 209.5e12, "V100-SXM.*": 125e12, "V100-PCIE.*": 112e12,
    "T4": 65e12}


def pick_device(setting="auto"):
    """
    This rank's torch.device. setting: auto (the first of cuda, mps, cpu that exists) | cuda | mps |
    cpu. Raises UserError.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
                 "cpu": True}
    kind = next(k for k in available if available[k]) if setting == "auto" else setting
    if not available.get(kind):
        raise UserError(f"device={kind} is not available on this machine; use --device=auto")
    if kind != "cuda":
        return torch.device(kind)
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local_rank >= gpus:
        raise UserError(f"local rank {local_rank} has no GPU: this machine has {gpus}; lower "
                        f"torchrun's --nproc_per_node")
    torch.cuda.set_device(local_rank)
    torch.set_float32_matmul_precision("high")   # TF32 where autocast leaves float32
    return torch.device("cuda", local_rank)


def resolve_dtype(setting, device):
    """The autocast dtype. 'auto' is bfloat16 on GPUs that support it, else float32."""
    if setting != "auto":
        return getattr(torch, setting)
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float32


def resolve_compile(setting, device):
    """
    (whether to use torch.compile, the reason if not). 'auto' compiles where the toolchain is
    installed: Triton for CUDA; a C++ compiler and Python's headers for the CPU. Raises UserError if
    compile=True is impossible.
    """
    if setting == "False":
        return False, "compile=False"
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
    return reason is None, reason


def use_deterministic_kernels():
    """
    Call before the device is first used. An operation without a deterministic kernel only warns: on
    CUDA, the sum over classes that samples a Hessian label.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False   # slow, and only for debugging


def peak_flops(device, dtype):
    """Peak FLOP/s of a GPU in dtype. None, after a line that says why, if it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    card = re.sub("^(NVIDIA |Tesla |GeForce )*", "", name)
    peaks = [peak for pattern, peak in PEAK_FLOPS.items() if re.fullmatch(pattern, card)]
    if not peaks or " MIG " in card:
        ddp.print0(f"MFU is left out: PEAK_FLOPS in device.py has no peak for {name}")
    elif dtype == torch.float32:
        ddp.print0("MFU is left out: PEAK_FLOPS in device.py has no peaks for float32")
    else:
        return peaks[0]
    return None


def memory_estimate(cfg, model, dtype, compiled):
    """
    {part: bytes} that PyTorch allocates on one rank at the peak of a step. With P parameters, E of
    them in the token embedding, width C, L layers, N = batch_size x block_size tokens per
    micro-batch and s bytes per number of dtype:
        weights      4 P, plus s P for their copies if dtype is not float32
        gradients    4 P
        state        4 P per tensor of optimizer state
        activations  N L C (14 s + 8): per layer the float32 inputs of two LayerNorms, the inputs of
                     four matmuls (7 C), q, k, v (3 C) and the input of GELU (4 C)
        head         4 E for its weight's gradient, and the float32 logits of a chunk, 3 times
                     if compiled and 6 times if eager
    All exist at the head of each micro-batch but the first. The true peak is higher for an eager
    update of a model with few layers, and for Hutchinson's estimator. CUDA, NCCL and fragmentation
    add to it.
    """
    bytes_each = dtype.itemsize
    parameters, head = model.num_params(), model.lm_head.weight
    tokens = cfg.batch_size * cfg.block_size
    rows = rows_per_chunk(torch.empty(0, dtype=dtype, device=head.device), len(head))
    chunk = 4 * min(rows, tokens) * len(head)
    return {"weights": parameters * (4 + bytes_each * (dtype != torch.float32)),
            "gradients": 4 * parameters,
            "state": 4 * parameters * STATE_TENSORS[cfg.optimizer],
            "activations": tokens * cfg.n_layer * cfg.n_embd * (14 * bytes_each + 8),
            "head": 4 * head.numel() + chunk * (3 if compiled else 6)}


def advise_on_memory(cfg, world_size):
    """What the user can change when a run does not fit into memory."""
    fitting = [size for size in range(1, cfg.batch_size)
               if cfg.total_batch_size % (size * world_size) == 0]
    if not fitting:
        return (f"--batch_size is {cfg.batch_size} and cannot be lowered; choose a smaller model "
                f"or --block_size, or a device with more memory")
    return (f"lower --batch_size, which is {cfg.batch_size}, for example to {fitting[-1]}; the "
            f"update does not change, since gradients accumulate over more micro-steps")


@contextmanager
def explain_out_of_memory(cfg):
    """Turn running out of GPU or CPU memory into a RankError with advice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # cuBLAS and the CPU allocator raise plain RuntimeErrors.
        signs = "out of memory", "ALLOC_FAILED", "can't allocate memory"
        if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in signs):
            raise
        raise RankError(f"out of memory: {advise_on_memory(cfg, ddp.world_size())} "
                        f"({shorten(str(error), 200)})") from None
