"""
How fast the parts of a run are on this machine: medians of interleaved repetitions.

    python bench.py config/train_gpt2_small_sophiag.py --batch_size=1 [--key=value ...]
    python bench.py --only=optimizer,generate --repeat=5 --json=bench.json
    python bench.py config/quickstart_sophiag.py --batch_size=4 --only=ranks

Sections: optimizer, step, head, memory, data, generate; and, when asked for, ranks (train.py with
one rank against two, a thread or GPU each). Settings and files are train.py's; without the data
set, tokens are random.
"""
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch
import torch.nn.functional as F
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import ddp
import train
from configurator import load_config
from dataloader import DataLoader
from device import memory_estimate, peak_flops, pick_device, resolve_compile, resolve_dtype
from metrics import read_metrics
from model import GPT, GPTConfig
from optim import hessian_due, make_optimizer, parameter_groups
from script import ROOT, ArgumentParser, UserError, run_script
from train import (
    MODEL_KNOBS,
    accumulate_gradients,
    clip_gradients,
    estimate_hessian,
    next_token_loss,
)

STEP = "training step"


def medians(functions, repeat, device):
    """{name: median seconds} of functions called in turn, after one call each to warm up."""
    times = {name: [] for name in functions}
    for i in range(repeat + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if i:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(t) for name, t in times.items()}


def plain_sophiag(params, state, lr=6e-4, beta1=0.965, rho=0.05, bs=491_520, weight_decay=0.2):
    """The formula, one eager operation after another, tensor by tensor."""
    for p in params:
        m, h = state[p]
        p.mul_(1 - lr * weight_decay)
        m.mul_(beta1).add_(p.grad, alpha=1 - beta1)
        ratio = (m.abs() / (rho * bs * h + 1e-15)).clamp(max=1)
        p.add_(m.sign() * ratio, alpha=-lr)


def plain_loss(model, x, y):
    """The model's loss as one would write it down: attention as a T x T matrix, GELU by its
    formula, all logits at once."""
    C, T, layers = model.config.n_embd, x.shape[1], model.transformer
    root = math.sqrt(C // model.config.n_head)
    future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
    h = layers.wte(x) + layers.wpe(torch.arange(T, device=x.device))
    for block in layers.h:
        q, k, v = (t.unflatten(2, (model.config.n_head, -1)).transpose(1, 2)
                   for t in block.attn.c_attn(block.ln_1(h)).split(C, dim=2))
        scale = 1 if block.attn.scale is None else block.attn.scale   # 1 / (layer + 1)
        attention = q @ k.transpose(2, 3) * scale / root
        attention = attention.masked_fill(future, -torch.inf).softmax(-1)
        h = h + block.attn.c_proj((attention @ v).transpose(1, 2).flatten(2))
        u = block.mlp.c_fc(block.ln_2(h))
        u = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u ** 3)))
        h = h + block.mlp.c_proj(u)
    logits = model.lm_head(layers.ln_f(h))[..., :model.config.vocab_size]
    return F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())


def random_model(cfg, device, vocab_size):
    torch.manual_seed(cfg.seed)
    shape = {name: getattr(cfg, name) for name in MODEL_KNOBS}
    return GPT(GPTConfig(vocab_size, cfg.block_size, dropout=cfg.dropout, **shape)).to(device)


def bench_optimizer(cfg, device, repeat, vocab_size, fused):
    """Optimizer steps over the model's parameters in float32."""
    model = random_model(cfg, device, vocab_size)
    params = list(model.parameters())
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    settings = [f"--n_layer={cfg.n_layer}", f"--n_head={cfg.n_head}", f"--n_embd={cfg.n_embd}"]
    optimizers = {}
    for name in "sophiag", "lion":
        for label, choice in ("eager", False), *([("fused", True)] if fused else []):
            optimizers[f"{name} {label}"] = make_optimizer(
                load_config([*settings, f"--optimizer={name}"]), model, fused=choice)
    for label, choice in ("foreach", dict(foreach=True)), ("fused", dict(fused=True)):
        optimizers[f"adamw {label}"] = torch.optim.AdamW(parameter_groups(model, 0.1), lr=6e-4,
                                                         **choice)
    for name, optimizer in optimizers.items():
        if name != "adamw foreach":   # the only one that cannot skip an update, as training asks
            optimizer.found_inf = torch.zeros((), device=device)
    state = {p: (torch.zeros_like(p), torch.rand_like(p)) for p in params}
    buffers = [torch.empty_like(p) for p in params]

    def copy_six_passes():
        for p, buffer in zip(params, buffers):
            m, h = state[p]
            for source in p.grad, m, h:
                buffer.copy_(source)

    def read_m_and_h():
        return [t.sum() for pair in state.values() for t in pair]

    sophia = optimizers["sophiag fused" if fused else "sophiag eager"]
    steps = {name: o.step for name, o in optimizers.items()}
    in_one_pass = {name: step for name, step in steps.items() if "fused" in name}
    others = {name: step for name, step in steps.items() if name not in in_one_pass}
    with torch.no_grad():
        # Apart from the others, whose temporary tensors might slow down what comes next.
        found = medians({"copy, 6 passes": copy_six_passes, **in_one_pass,
                         "read of m and h": read_m_and_h,
                         "sophiag update_hessian": sophia.update_hessian,
                         "sophiag statistics": sophia.statistics}, repeat, device)
        found |= medians({**others, "plain formula": lambda: plain_sophiag(params, state)}, repeat,
                         device)
    for name, seconds in found.items():
        yield name, seconds * 1e3, "ms", f"{seconds / found['copy, 6 passes']:.2f} x copy"


def passes(cfg, device, vocab_size, compile_model, micro_batches=1):
    """The model and {name: function}, the passes over micro-batches of random tokens."""
    dtype = resolve_dtype(cfg.dtype, device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    model = random_model(cfg, device, vocab_size)
    if compile_model:
        model.compile_for_training()
    shape = micro_batches * cfg.batch_size, cfg.block_size
    x, y = torch.randint(vocab_size, (2, *shape), device=device)
    noise = torch.rand(shape, device=device)

    def forward():
        with torch.no_grad(), autocast:
            model(x, targets=y)

    def pass_of(loss):
        return lambda: accumulate_gradients(model, x, y, loss, cfg.batch_size, autocast, scaler)

    def direction(params):
        return [torch.randn_like(p) for p in params]

    def hessian():
        estimate_hessian(model, model, (x, y, noise), direction, cfg, autocast, scaler)

    return model, {"forward": forward,
                   "plain forward and backward": pass_of(plain_loss),
                   "forward and backward": pass_of(next_token_loss),
                   "hessian: forward and backward": hessian}


def bench_step(cfg, device, repeat, vocab_size, data, compile_model, trace):
    """Parts of a training step, and of a Hessian update, for one micro-batch on this rank."""
    model, functions = passes(cfg, device, vocab_size, compile_model)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    optimizer = make_optimizer(cfg, model, fused=compile_model)
    adamw = torch.optim.AdamW(parameter_groups(model, 0.1), fused=True)
    dtype = resolve_dtype(cfg.dtype, device)
    square = torch.randn(2048, 2048, device=device, dtype=dtype)
    functions |= {"clip": lambda: clip_gradients(model, optimizer, scaler, cfg.grad_clip),
                  "adamw": adamw.step, cfg.optimizer: optimizer.step,
                  "matmul": lambda: square @ square}
    has_hessian = hessian_due(cfg.hessian_interval, cfg)
    if has_hessian:
        functions["hessian: update"] = lambda: optimizer.update_hessian(cfg.squares_gradient)
    else:
        del functions["hessian: forward and backward"]
    steps = iter(range(10**9))
    if data is not None:
        functions["data, a whole step's"] = lambda: data.train(next(steps))
    found = medians(functions, repeat, device)
    both = found["forward and backward"]
    rate = 2 * len(square) ** 3 / found["matmul"]
    flops = model.flops_per_token() * cfg.batch_size * cfg.block_size / both
    plain = found["plain forward and backward"]
    notes = {"plain forward and backward": f"{plain / both:.2f} x ours",
             "forward and backward": f"{flops / 1e9:,.0f} GFLOP/s, {flops / rate:.1%} of matmul's",
             "matmul": f"{rate / 1e9:,.0f} GFLOP/s"}
    for name, seconds in found.items():
        yield name, seconds * 1e3, "ms", notes.get(name, "")
    common = (cfg.total_batch_size / cfg.batch_size * both + found["clip"]
              + found.get("data, a whole step's", 0))
    whole = common + found[cfg.optimizer]
    if has_hessian:
        hessian_micro_steps = cfg.hessian_batch_size / cfg.batch_size
        whole += (hessian_micro_steps * found["hessian: forward and backward"] + found["clip"]
                  + found["hessian: update"]) / cfg.hessian_interval
    yield (f"whole step, {cfg.optimizer}", 1e3 * whole, "ms",
           f"{cfg.tokens_per_step / whole:,.0f} tokens/s")
    if cfg.optimizer != "adamw":
        yield ("whole step, adamw", 1e3 * (common + found["adamw"]), "ms",
               f"{cfg.optimizer} takes {whole / (common + found['adamw']) - 1:+.2%}")
    flops = model.flops_per_token() * cfg.tokens_per_step / whole
    peak = peak_flops(device, dtype)
    yield "model FLOPs", flops / 1e12, "TFLOP/s", f"mfu {flops / peak:.1%}" if peak else ""
    if trace:
        with torch.profiler.profile() as profiler:
            functions["forward and backward"]()
            functions[cfg.optimizer]()
        profiler.export_chrome_trace(trace)


def bench_head(cfg, device, repeat, vocab_size, compile_model):
    """Forward and backward of the head alone, from hidden states (tokens, C) to their gradient and
    the weight's, against all logits at once and against PyTorch's own chunked loss."""
    model = random_model(cfg, device, vocab_size)
    if compile_model:
        model.compile_for_training()
    dtype = resolve_dtype(cfg.dtype, device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    weight, tokens = model.lm_head.weight, cfg.batch_size * cfg.block_size
    h = torch.randn(tokens, cfg.n_embd, device=device, requires_grad=True)
    y = torch.randint(vocab_size, (tokens,), device=device)
    cross_entropy = torch.compile(F.cross_entropy) if compile_model else F.cross_entropy

    def timed(loss):
        def both():
            weight.grad = h.grad = None
            with autocast:
                value = loss()
            value.backward()
        return both

    found = medians({
        "ours": timed(lambda: model.head_loss(h, y)),
        "all logits": timed(lambda: cross_entropy(F.linear(h, weight).float(), y)),
        "F.linear_cross_entropy": timed(lambda: F.linear_cross_entropy(h.to(dtype),
                                                                       weight.to(dtype), y)),
    }, repeat, device)
    for name, seconds in found.items():
        yield name, seconds * 1e3, "ms", f"{seconds / found['ours']:.2f} x ours"


def allocated_peak(function, device):
    """Most bytes that PyTorch had allocated on the device at a time while function() ran."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated()
    with torch.profiler.profile(profile_memory=True) as profiler:
        function()
    with tempfile.TemporaryDirectory() as folder:
        trace = os.path.join(folder, "trace.json")
        profiler.export_chrome_trace(trace)
        with open(trace, encoding="utf-8") as file:
            events = [e for e in json.load(file)["traceEvents"] if e["name"] == "[memory]"]
    first = min(events, key=lambda e: e["ts"])["args"]
    before = first["Total Allocated"] - first["Bytes"]   # of what was profiled earlier
    return max(e["args"]["Total Allocated"] for e in events) - before


def peak_memory(name, cfg, device, vocab_size, compile_model):
    """Peak in bytes, model included, of a pass or of STEP: two micro-batches and the update, then
    as much for the Hessian. Each is done twice, since the first time has no state yet."""
    def run():
        model, functions = passes(cfg, device, vocab_size, compile_model, 1 + (name == STEP))
        calls = [functions.get(name)]
        if name == STEP:
            optimizer = make_optimizer(cfg, model, fused=compile_model)
            optimizer.found_inf = torch.zeros((), device=device)
            calls = [functions["forward and backward"], optimizer.step]
            if hessian_due(cfg.hessian_interval, cfg) and cfg.squares_gradient:
                calls += [functions["hessian: forward and backward"], optimizer.update_hessian]
        for call in 2 * calls:
            call()

    return allocated_peak(run, device)


def bench_memory(cfg, device, vocab_size, compile_model):
    """Each in a process of its own, where nothing else has been compiled or allocated."""
    if device.type == "mps":   # PyTorch keeps no peak there
        return
    names = ["plain forward and backward", "forward and backward"]
    if hessian_due(cfg.hessian_interval, cfg):
        names.append("hessian: forward and backward")
    names.append(STEP)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        peaks = pool.starmap(peak_memory, [(name, cfg, device, vocab_size, compile_model)
                                           for name in names], chunksize=1)
    for name, peak in zip(names[:-1], peaks):
        yield name, peak / 1e9, "GB", f"{peak / peaks[0]:.2f} x plain"
    yield f"{STEP}, {cfg.optimizer}", peaks[-1] / 1e9, "GB", ""
    parts = memory_estimate(cfg, random_model(cfg, device, vocab_size),
                            resolve_dtype(cfg.dtype, device), compile_model)
    estimate = sum(parts.values())
    yield (f"{STEP}, estimate", estimate / 1e9, "GB",
           f"{estimate / peaks[-1] - 1:+.1%} of the measurement")


def train_and_time_the_optimizer(words):
    """train.py, on one rank of several, and then a line: the median time of an optimizer step."""
    times = []

    def clock(sign):
        def hook(*_):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(sign * time.perf_counter())
        return hook

    register_optimizer_step_pre_hook(clock(-1))
    register_optimizer_step_post_hook(clock(1))
    train.main(words)
    ddp.print0(json.dumps({"optimizer": statistics.median(map(sum, zip(times[::2], times[1::2])))}))


def bench_ranks(words, repeat):
    """Throughput of train.py with one rank and with two, in turn, and the optimizer's share."""
    rates, shares = {1: [], 2: []}, {1: [], 2: []}
    for ranks in [1, 2] * repeat:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                       f"--nproc_per_node={ranks}", os.path.join(ROOT, "bench.py"), "--one-rank",
                       *words, f"--out_dir={folder}", "--max_iters=21", "--lr_decay_iters=21",
                       "--warmup_iters=1", "--log_interval=10", "--eval_iters=1"]
            done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"},
                                  capture_output=True, text=True)
            if done.returncode:
                reason = done.stderr.rpartition("error: ")[2].partition("\n")[0]
                raise UserError(f"train.py with {ranks} ranks failed: {reason}")
            log = read_metrics(os.path.join(folder, "metrics.jsonl"))
            last = [r for r in log if "tokens_per_sec" in r][-1]
        rates[ranks].append(last["tokens_per_sec"])
        seconds = json.loads(done.stdout.splitlines()[-1])["optimizer"]
        step = last["tokens"] / last["iter"] / last["tokens_per_sec"]
        shares[ranks].append(seconds / step)
    one = statistics.median(rates[1])
    for ranks, found in rates.items():
        rate, share = statistics.median(found), statistics.median(shares[ranks])
        yield (f"{ranks} rank{'s' * (ranks > 1)}", rate, "tokens/s",
               f"{rate / one:.2f} x, optimizer {share:.1%} of a step")


def bench_data(data, repeat, device):
    found = medians({"train": lambda: data.train(0), "hessian": lambda: data.hessian(0)}, repeat,
                    device)
    for name, seconds in found.items():
        yield f"{name} batch", seconds * 1e3, "ms", f"{1 / seconds:,.1f} batches/s"


def bench_generate(cfg, device, vocab_size, tokens=512):
    """Generation of one sequence, once with and once without the cache of keys and values."""
    model = random_model(cfg, device, vocab_size).eval()
    prompt = torch.randint(vocab_size, (1, 16), device=device)
    tokens = min(tokens, cfg.block_size - 16)

    def uncached():
        idx = prompt
        with torch.no_grad():
            for _ in range(tokens):
                idx = torch.cat((idx, model(idx)[:, -1:].argmax(-1)), dim=1)
        return idx

    results, times = [], []
    for generate in (lambda: model.generate(prompt, tokens, temperature=0)), uncached:
        started = time.perf_counter()
        results.append(generate())
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    same = "equal tokens" if torch.equal(*results) else "tokens differ"
    yield f"{tokens} tokens, cached", times[0] * 1e3, "ms", f"{tokens / times[0]:,.1f} tokens/s"
    yield f"{tokens} tokens, uncached", times[1] * 1e3, "ms", f"{times[1] / times[0]:.1f} x, {same}"


def main(argv):
    if "--one-rank" in argv:   # bench_ranks under torchrun
        return train_and_time_the_optimizer([word for word in argv if word != "--one-rank"])
    parser = ArgumentParser(__doc__)
    parser.usage = "bench.py [config.py ...] [--key=value ...] [--only=...] [--repeat=N] ..."
    parser.add_argument("--only", default="optimizer,step,head,memory,data,generate",
                        metavar="SECTIONS")
    parser.add_argument("--repeat", type=int, default=5, metavar="N")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    parser.add_argument("--profile", metavar="FILE", help="write a trace of the training step, for "
                        "Perfetto")
    args, rest = parser.parse_known_args(argv)
    repeat = args.repeat
    if repeat < 1:
        raise UserError(f"repeat must be a positive number, got {repeat}")
    cfg = load_config(rest)
    device = pick_device(cfg.device)
    fused, _ = resolve_compile(cfg.compile, device)
    try:
        data = DataLoader(cfg, ddp.World(0, 1, device))
    except UserError as error:
        print(f"random tokens: {error}")
        data = None
    vocab_size = data.meta["vocab_size"] if data else GPTConfig.vocab_size
    sections = {
        "optimizer": lambda: bench_optimizer(cfg, device, repeat, vocab_size, fused),
        "step": lambda: bench_step(cfg, device, repeat, vocab_size, data, fused, args.profile),
        "head": lambda: bench_head(cfg, device, repeat, vocab_size, fused),
        "memory": lambda: bench_memory(cfg, device, vocab_size, fused),
        "data": lambda: bench_data(data, repeat, device) if data else (),
        "generate": lambda: bench_generate(cfg, device, vocab_size),
        "ranks": lambda: bench_ranks(rest, repeat)}
    wanted = args.only.split(",")
    if unknown := set(wanted) - set(sections):
        raise UserError(f"no section {unknown.pop()}; see --help")
    rows = []
    for section in wanted:
        for name, value, unit, note in sections[section]():
            print(f"{section:10} {name:32} {value:12,.2f} {unit:8} {note}", flush=True)
            rows.append(dict(section=section, name=name, value=value, unit=unit, note=note))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"torch": torch.__version__, "device": str(device),
                       "threads": torch.get_num_threads(), "rows": rows}, file, indent=1)
        print(f"wrote {args.json}")


if __name__ == "__main__":
    run_script(main)
