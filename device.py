"""The device: which one, its dtype, whether torch.compile works, its peak FLOP/s."""
import os
import re
import shutil
import sysconfig
from importlib.util import find_spec
from textwrap import shorten

import torch

import ddp
from script import UserError

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
    problem = explain_unused_gpu() if setting in ("auto", "cuda") else None
    if not available.get(kind):
        raise UserError(f"device={kind} is not available on this machine; "
                        f"{problem or 'use --device=auto'}")
    if problem:
        ddp.print0(f"device=auto takes the {kind}: {problem}")
    if kind != "cuda":
        return torch.device(kind)
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local_rank >= gpus:
        raise UserError(f"local rank {local_rank} has no GPU: this machine has {gpus}; lower "
                        f"torchrun's --nproc_per_node")
    torch.cuda.set_device(local_rank)
    torch.set_float32_matmul_precision("high")   # TF32 where autocast leaves float32
    return torch.device("cuda", local_rank)


def explain_unused_gpu():
    """Why PyTorch cannot use this machine's NVIDIA GPU, and what to do. None if it can, if there is
    no driver, or if CUDA_VISIBLE_DEVICES hides the GPU."""
    fine = torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if fine or not (os.path.exists("/proc/driver/nvidia") or shutil.which("nvidia-smi")):
        return None
    try:
        torch.cuda.init()
        reason = "it finds none"
    except (AssertionError, RuntimeError) as error:   # a build without CUDA; an old driver
        reason = shorten(str(error), 200)
    return (f"PyTorch {torch.__version__} cannot use the NVIDIA GPU ({reason}); install one for a "
            f"CUDA version that the driver supports, or update the driver: docs/gpu.md")


def resolve_dtype(setting, device):
    """The autocast dtype. 'auto': on CUDA bfloat16, or float16 without it; elsewhere float32."""
    if setting != "auto":
        return getattr(torch, setting)
    if device.type != "cuda":
        return torch.float32
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float16


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


def require_determinism(compiled):
    """
    Make operations without a deterministic kernel errors. Call before the device is first used. In
    eager code, which has one on CUDA (the cumulative sum that samples Hessian labels), they only
    warn; PyTorch then also keeps FlashAttention's backward pass, which is not deterministic.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=not compiled)
    torch.backends.cuda.enable_cudnn_sdp(False)   # warns of nothing
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
