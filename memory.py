"""The memory of a run: an estimate, the batch size that fits, what to do if it runs out."""
from contextlib import contextmanager
from dataclasses import replace
from textwrap import shorten

import torch

import ddp
from device import resolve_compile, resolve_dtype
from init_from import build_model
from model import rows_per_chunk
from optim import STATE_TENSORS, parameter_groups
from script import RankError

# Share of the free memory that an estimate may fill. Estimates were 1% to 12% too high on an H200.
# If one were 12% too low, 5% of the memory would remain for workspaces and fragmentation.
USABLE = 0.85


def memory_estimate(cfg, model, dtype, compiled):
    """
    {part: bytes} that PyTorch allocates on one rank at the peak of a step. With P parameters, E of
    them in the token embedding, width C, L layers, N = batch_size x block_size tokens per
    micro-batch and s bytes per number of dtype:
        weights      4 P, plus s P for their copies if dtype is not float32
        gradients    4 P
        state        4 P per tensor of optimizer state; Muon has one per matrix, else two
        activations  N L C (14 s + 8): per layer the float32 inputs of two LayerNorms, the inputs of
                     four matmuls (7 C), q, k, v (3 C) and the input of GELU (4 C)
        head         4 E for its weight's gradient, and the float32 logits of a chunk, 3 times
                     if compiled and 6 times if eager
    All exist at the head of each micro-batch but the first. The true peak is higher if an
    update needs more than the activations, as an eager one or Muon's does with tiny batches, and
    for Hutchinson's estimator. CUDA, NCCL and fragmentation add to it.
    """
    bytes_each = dtype.itemsize
    parameters, head = model.num_params(), model.lm_head.weight
    tokens = cfg.batch_size * cfg.block_size
    rows = rows_per_chunk(torch.empty(0, dtype=dtype, device=head.device), len(head))
    chunk = 4 * min(rows, tokens) * len(head)
    return {"weights": parameters * (4 + bytes_each * (dtype != torch.float32)),
            "gradients": 4 * parameters,
            "state": 4 * sum(tensors * p.numel() for tensors, group in zip(
                STATE_TENSORS[cfg.optimizer], parameter_groups(model, 0)) for p in group["params"]),
            "activations": tokens * cfg.n_layer * cfg.n_embd * (14 * bytes_each + 8),
            "head": 4 * head.numel() + chunk * (3 if compiled else 6)}


def choose_batch_size(cfg, device, vocab_size, before=None):
    """
    cfg with a batch_size, if it has none: the largest divisor of a rank's share of total_batch_size
    whose estimate is at most USABLE of the memory that is free on every rank's GPU. A run that
    resumes keeps that of its checkpoint, `before`, if it fits: another one would change the last
    bits. At most 12 on other devices, and for Hutchinson's estimator, whose peak is not estimated.
    """
    if cfg.batch_size is not None:
        return cfg
    share = cfg.total_batch_size // ddp.world_size()
    sizes = [size for size in range(share, 0, -1) if share % size == 0]
    if device.type != "cuda" or not cfg.squares_gradient:
        return replace(cfg, batch_size=next(size for size in sizes if size <= 12))
    with torch.device("meta"):   # shapes without memory
        model = build_model(cfg, vocab_size, start=None)
    dtype, (compiled, _) = resolve_dtype(cfg.dtype, device), resolve_compile(cfg.compile, device)
    peaks = {size: sum(memory_estimate(replace(cfg, batch_size=size), model, dtype,
                                       compiled).values()) for size in sizes}
    free = -ddp.all_reduce_max(-torch.cuda.mem_get_info(device)[0])   # the least of all ranks
    fitting = [size for size in sizes if peaks[size] <= USABLE * free] or [1]
    size = before if before in fitting else fitting[0]
    ddp.print0(f"batch_size: {size}{', as before' * (size == before)}; it needs about "
               f"{peaks[size] / 1e9:.2f} of {free / 1e9:.2f} GB free")
    return replace(cfg, batch_size=size)


def advise_on_memory(cfg, world_size):
    """What the user can change when a run does not fit into memory."""
    fitting = [size for size in range(1, cfg.batch_size)
               if cfg.total_batch_size % (size * world_size) == 0]
    if not fitting:
        return (f"--batch_size is {cfg.batch_size} and cannot be lowered; choose a smaller model "
                f"or --block_size, or a device with more memory")
    return (f"lower --batch_size, which is {cfg.batch_size}, for example to {fitting[-1]}; the "
            f"update does not change, since gradients accumulate over more micro-steps")


def describe_memory(cfg, model, device, dtype, compiled):
    """The start-up lines about memory: the estimate and, on CUDA, the card's size."""
    parts = memory_estimate(cfg, model, dtype, compiled)
    total = sum(parts.values())
    sizes = " + ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
    text = f"memory: about {total / 1e9:.2f} GB per rank = {sizes}"
    if device.type == "cuda":
        _, card = torch.cuda.mem_get_info(device)
        advice = f"; too small: {advise_on_memory(cfg, ddp.world_size())}" * (total > card)
        text += f"\nGPU: {torch.cuda.get_device_name(device)}, {card / 1e9:.2f} GB{advice}"
    return text


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
