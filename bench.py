"""
Benchmark the parts of a training run, each against a reference measured at the same time.

    python bench.py config/train_gpt2_small_sophiag.py --batch_size=1 --only=optimizer,step

  optimizer  an update of all parameters, against a copy that moves as many bytes
  step       the parts of a training step, against plain PyTorch and AdamW
  attention  a layer's attention, forward and backward, with each backend of PyTorch
  memory     peak memory, against the estimate that train.py prints
Times are medians. Settings are those of train.py. Tokens are random.
"""
import json
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from itertools import accumulate
from multiprocessing import get_context

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import train
from configurator import load_config
from dataloader import load_meta
from device import pick_device, resolve_compile, resolve_dtype
from init_from import build_model
from memory import choose_batch_size, memory_estimate
from optim import hessian_due, make_optimizer
from script import ArgumentParser, UserError, run_script, write_atomically

PLAIN, OURS, CHOSEN = "plain forward and backward", "forward and backward", "PyTorch's choice"
HESSIAN, HESSIAN_UPDATE = "hessian: forward and backward", "hessian: update"


class Setup:
    """What the sections share. It can be pickled, for the new process of bench_memory."""
    def __init__(self, cfg, vocab_size, repeat=1):
        self.vocab_size, self.repeat = vocab_size, repeat
        self.device = device = pick_device(cfg.device)
        # As on a CPU, at most 12: plain PyTorch needs memory for T x T matrices.
        self.cfg = cfg = choose_batch_size(cfg, torch.device("cpu"), vocab_size)
        self.dtype = dtype = resolve_dtype(cfg.dtype, device)
        self.compiled, _ = resolve_compile(cfg.compile, device)
        self.autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    def model(self):
        """A model with random weights, compiled if training would compile it."""
        model = build_model(self.cfg, self.vocab_size, start=None).to(self.device)
        if self.compiled:
            model.compile_for_training()
        return model

    def optimizer(self, model, name):
        optimizer = make_optimizer(replace(self.cfg, optimizer=name), model, fused=self.compiled)
        optimizer.found_inf = torch.zeros((), device=self.device)   # set, as in training
        return optimizer

    def seconds(self, function):
        """Of a call; on CUDA the GPU's, which is busy until all is launched, as in training."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            function()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(100_000_000)   # clock cycles, about 50 ms
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def median_seconds(self, functions):
        """{name: median seconds} of functions called in turn, after a warm-up call of each."""
        rounds = [[self.seconds(f) for f in functions.values()] for _ in range(self.repeat + 1)]
        return dict(zip(functions, map(statistics.median, zip(*rounds[1:]))))


def plain_loss(model, x, y):
    """The model's loss in eager PyTorch, with T x T attention matrices and all logits."""
    with sdpa_kernel(SDPBackend.MATH):
        logits = model(x)
    return F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())


def training_parts(setup, micro_batches=1):
    """A model and {name: function}: the parts of its training step, on random tokens."""
    cfg, model, scaler = setup.cfg, setup.model(), torch.amp.GradScaler(enabled=False)
    optimizer, adamw = setup.optimizer(model, cfg.optimizer), setup.optimizer(model, "adamw")
    shape = micro_batches * cfg.batch_size, cfg.block_size
    x, y = torch.randint(setup.vocab_size, (2, *shape), device=setup.device)
    gradient = partial(train.accumulate_gradients, model, x, y, batch_size=cfg.batch_size,
                       autocast=setup.autocast, scaler=scaler)
    parts = {PLAIN: partial(gradient, loss_fn=plain_loss),
             OURS: partial(gradient, loss_fn=train.next_token_loss),
             "clip": partial(train.clip_gradients, model, optimizer, scaler, cfg.grad_clip),
             "adamw": adamw.step, cfg.optimizer: optimizer.step}
    if hessian_due(cfg.hessian_interval, cfg):
        parts[HESSIAN] = partial(
            train.estimate_hessian, model, model, (x, y, torch.rand(shape, device=x.device)),
            lambda params: [torch.randn_like(p) for p in params], cfg, setup.autocast, scaler)
        parts[HESSIAN_UPDATE] = partial(optimizer.update_hessian, cfg.squares_gradient)
    return model, parts


@torch.no_grad()
def bench_optimizer(setup):
    """Updates of the model's parameters in float32."""
    model = setup.model()
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-3
    copies = [(p.grad, torch.empty_like(p)) for p in model.parameters()]

    def copy():   # as many passes over memory as an update, which reads 4 tensors and writes 2
        for source, buffer in 3 * copies:
            buffer.copy_(source)

    sophia, lion, muon, adamw = (setup.optimizer(model, name)
                                 for name in ("sophiag", "lion", "muon", "adamw"))
    kind = "fused" if setup.compiled else "eager"
    seconds = setup.median_seconds({
        "copy, 6 passes": copy, f"sophiag {kind}": sophia.step, f"lion {kind}": lion.step,
        f"muon {kind}": muon.step, "adamw fused": adamw.step,
        "sophiag update_hessian": sophia.update_hessian, "sophiag statistics": sophia.statistics})
    for name, s in seconds.items():
        yield name, s * 1e3, "ms", f"{s / seconds['copy, 6 passes']:.2f} x copy"


def bench_step(setup):
    """The parts for one micro-batch, and the whole step that they add up to."""
    cfg, (model, parts) = setup.cfg, training_parts(setup)
    side = 8192 if setup.device.type == "cuda" else 2048   # large enough for full speed
    square = torch.randn(side, side, device=setup.device, dtype=setup.dtype)
    parts["matmul"] = lambda: square @ square
    seconds = setup.median_seconds(parts)
    micro_batch_flops = model.flops_per_token() * cfg.batch_size * cfg.block_size
    rate, matmul_rate = micro_batch_flops / seconds[OURS], 2 * len(square)**3 / seconds["matmul"]
    notes = {PLAIN: f"{seconds[PLAIN] / seconds[OURS]:.2f} x ours",
             OURS: f"{rate / 1e9:,.0f} GFLOP/s, {rate / matmul_rate:.1%} of matmul's"}
    for name, s in seconds.items():
        yield name, s * 1e3, "ms", notes.get(name, "")
    micro_batches = cfg.total_batch_size / cfg.batch_size
    gradient = micro_batches * seconds[OURS] + seconds["clip"]
    step, adamw_step = gradient + seconds[cfg.optimizer], gradient + seconds["adamw"]
    if HESSIAN in parts:
        step += (cfg.hessian_batch_size / cfg.batch_size * seconds[HESSIAN] + seconds["clip"]
                 + seconds[HESSIAN_UPDATE]) / cfg.hessian_interval
    for name, s in {"adamw": adamw_step, cfg.optimizer: step}.items():
        yield (f"whole step, {name}", s * 1e3, "ms",
               f"{cfg.tokens_per_step / s:,.0f} tokens/s, {s / adamw_step:.3f} x adamw")


def bench_attention(setup):
    """A layer's attention with the backend that PyTorch chooses, and with each that can run it."""
    cfg = setup.cfg
    shape = cfg.batch_size, cfg.block_size, 3, cfg.n_head, cfg.n_embd // cfg.n_head
    qkv = torch.randn(shape, device=setup.device, dtype=setup.dtype, requires_grad=True)

    def gradient(backends):
        with sdpa_kernel(backends):
            y = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), is_causal=True)
        y.backward(y.detach())

    functions, backends = {}, SDPBackend.__members__
    for name, allowed in {CHOSEN: list(backends.values()), **backends}.items():
        with suppress(RuntimeError):   # the device, dtype or shape does not support it
            gradient(allowed)
            functions[name] = partial(gradient, allowed)
    seconds = setup.median_seconds(functions)
    for name, s in seconds.items():
        yield name, s * 1e3, "ms", f"{s / seconds[CHOSEN]:.2f} x the choice"


def peak_memory(setup):
    """Peak bytes that PyTorch allocates for a model and its training step."""
    on_gpu = setup.device.type == "cuda"
    with nullcontext() if on_gpu else torch.profiler.profile(profile_memory=True) as profiler:
        # The peak is in the second micro-batch, when .grad holds the first's gradients.
        _, parts = training_parts(setup, micro_batches=2)
        names = [OURS, setup.cfg.optimizer]
        if HESSIAN in parts and setup.cfg.squares_gradient:   # no estimate for Hutchinson
            names += [HESSIAN, HESSIAN_UPDATE]
        for name in 2 * names:   # the first round creates the optimizer's state
            parts[name]()
    if on_gpu:
        return torch.cuda.max_memory_allocated()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate(size for _, size in changes))


def bench_memory(setup):
    """The peak is measured in a new process, where nothing else is compiled or allocated."""
    if setup.device.type == "mps":   # PyTorch does not report a peak there
        return
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        peak = pool.submit(peak_memory, setup).result()
    parts = memory_estimate(setup.cfg, setup.model(), setup.dtype, setup.compiled)
    estimate = sum(parts.values())
    yield f"training step, {setup.cfg.optimizer}", peak / 1e9, "GB", ""
    yield "training step, estimate", estimate / 1e9, "GB", f"{estimate / peak:.3f} x measured"


def main(argv):
    parser = ArgumentParser(__doc__)
    parser.add_argument("--only", default="optimizer,step,attention,memory", metavar="SECTION,...")
    parser.add_argument("--repeat", type=int, default=5, help="measurements behind each median")
    parser.add_argument("--json", metavar="FILE", help="also write the results to FILE")
    args, words = parser.parse_known_args(argv)
    if args.repeat < 1:
        raise UserError(f"repeat must be at least 1, got {args.repeat}")
    cfg = load_config(words)
    setup = Setup(cfg, load_meta(cfg.data_dir)["vocab_size"], args.repeat)
    sections = {"optimizer": bench_optimizer(setup), "step": bench_step(setup),   # generators
                "attention": bench_attention(setup), "memory": bench_memory(setup)}
    chosen = args.only.split(",")
    if unknown := set(chosen) - set(sections):
        raise UserError(f"unknown section {unknown.pop()}; choose from {', '.join(sections)}")
    rows = []
    for section in chosen:
        for name, value, unit, note in sections[section]:
            print(f"{section:10} {name:32} {value:12,.2f} {unit:8} {note}", flush=True)
            rows.append(dict(section=section, name=name, value=value, unit=unit, note=note))
    if args.json:
        report = {"torch": torch.__version__, "device": str(setup.device),
                  "threads": torch.get_num_threads(), "rows": rows}
        write_atomically(args.json, json.dumps(report, indent=1).encode())
        print(f"wrote {args.json}")


if __name__ == "__main__":
    run_script(main)
