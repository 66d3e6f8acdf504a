"""
How fast the parts of a run are on this machine: medians of interleaved repetitions.

    python bench.py config/train_gpt2_small_sophiag.py --batch_size=1 [--key=value ...]
    python bench.py --only=optimizer,generate --repeat=5 --json=bench.json

Sections: optimizer, step, data, generate, tokenize. Settings and files are train.py's; without the
data set, tokens are random. --profile=trace.json writes a trace of the training step for Perfetto.
"""
import contextlib
import json
import resource
import statistics
import sys
import time

import torch

import ddp
from configurator import UserError, load_config, run_script
from dataloader import DataLoader
from metrics import peak_flops
from model import GPT, GPTConfig
from optim import hessian_due, make_optimizer, parameter_groups
from tokenizer import TOKENIZERS, get_tokenizer
from train import (
    MODEL_KNOBS,
    accumulate_gradients,
    clip_gradients,
    next_token_loss,
    sampled_label_loss,
)


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


def peak_memory_gb(device):
    """Peak so far: of the process on a CPU, of PyTorch's allocations on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024   # ru_maxrss is in bytes there
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def plain_sophiag(params, state, lr=6e-4, beta1=0.965, rho=0.05, bs=491_520, weight_decay=0.2):
    """The formula, one eager operation after another, tensor by tensor."""
    for p in params:
        m, h = state[p]
        p.mul_(1 - lr * weight_decay)
        m.mul_(beta1).add_(p.grad, alpha=1 - beta1)
        ratio = (m.abs() / (rho * bs * h + 1e-15)).clamp(max=1)
        p.add_(m.sign() * ratio, alpha=-lr)


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
    with torch.no_grad():
        found = medians({"copy, 6 passes": copy_six_passes,
                         **{name: o.step for name, o in optimizers.items()},
                         "plain formula": lambda: plain_sophiag(params, state),
                         "read of m and h": read_m_and_h,
                         "sophiag update_hessian": sophia.update_hessian,
                         "sophiag statistics": sophia.statistics}, repeat, device)
    for name, seconds in found.items():
        yield name, seconds * 1e3, "ms", f"{seconds / found['copy, 6 passes']:.2f} x copy"


def bench_step(cfg, device, repeat, vocab_size, data, compile_model, trace):
    """Parts of a training step, and of a Hessian update, for one micro-batch on this rank."""
    dtype = ddp.pick_dtype(cfg.dtype, device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    model = random_model(cfg, device, vocab_size)
    optimizer = make_optimizer(cfg, model, fused=compile_model)
    if compile_model:
        model.compile_for_training()
    shape = cfg.batch_size, cfg.block_size
    x, y = torch.randint(vocab_size, (2, *shape), device=device)
    noise = torch.rand(shape, device=device)

    def forward():
        with torch.no_grad(), autocast:
            model(x, targets=y)

    def pass_of(targets, loss):
        return lambda: accumulate_gradients(model, x, targets, loss, cfg.batch_size, autocast,
                                            scaler)

    functions = {"forward": forward,
                 "forward and backward": pass_of(y, next_token_loss),
                 "clip": lambda: clip_gradients(model, optimizer, scaler, cfg.grad_clip),
                 "optimizer": optimizer.step}
    has_hessian = hessian_due(cfg.hessian_interval, cfg)
    if has_hessian:
        functions |= {"hessian: forward and backward": pass_of(noise, sampled_label_loss),
                      "hessian: update": optimizer.update_hessian}
    steps = iter(range(10**9))
    if data is not None:
        functions["data, a whole step's"] = lambda: data.train(next(steps))
    found = medians(functions, repeat, device)
    for name, seconds in found.items():
        yield name, seconds * 1e3, "ms", ""
    micro_steps = cfg.total_batch_size / cfg.batch_size
    plain = (micro_steps * found["forward and backward"] + found["clip"] + found["optimizer"]
             + found.get("data, a whole step's", 0))
    extra = 0.0
    if has_hessian:
        hessian_micro_steps = cfg.hessian_batch_size / cfg.batch_size
        extra = (hessian_micro_steps * found["hessian: forward and backward"] + found["clip"]
                 + found["hessian: update"]) / cfg.hessian_interval
        yield "hessian, share of a step", 100 * extra / plain, "%", f"every {cfg.hessian_interval}"
    rate = cfg.tokens_per_step / (plain + extra)
    yield "whole step", 1e3 * (plain + extra), "ms", f"{rate:,.0f} tokens/s"
    flops = model.flops_per_token() * rate
    peak = peak_flops(device, dtype)
    yield "model FLOPs", flops / 1e12, "TFLOP/s", f"mfu {flops / peak:.1%}" if peak else ""
    yield "peak memory", peak_memory_gb(device), "GB", ""
    if trace:
        with torch.profiler.profile() as profiler:
            functions["forward and backward"]()
            functions["optimizer"]()
        profiler.export_chrome_trace(trace)


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


def bench_tokenize(repeat, device):
    text = open(contextlib.__file__, encoding="utf-8").read() * 20
    for name in TOKENIZERS:
        try:
            tokenizer = get_tokenizer(name)
        except UserError as error:   # no network, no cached vocabulary
            print(f"tokenize   {name}: {error}")
            continue
        seconds = medians({name: lambda t=tokenizer: t.encode(text)}, repeat, device)[name]
        yield name, seconds * 1e3, "ms", f"{len(text.encode()) / seconds / 1e6:.1f} MB/s"


def main(argv):
    own = {"only": "optimizer,step,data,generate,tokenize", "json": "", "repeat": "5",
           "profile": ""}
    rest = []
    for word in argv:
        name, equals, value = word.removeprefix("--").partition("=")
        if word in ("--help", "-h"):
            return print(__doc__.strip())
        if name in own and equals:
            own[name] = value
        else:
            rest.append(word)
    wanted = own["only"].split(",")
    if not own["repeat"].isdigit() or own["repeat"] == "0":
        raise UserError(f"repeat must be a positive number, got {own['repeat']}")
    if unknown := set(wanted) - {"optimizer", "step", "data", "generate", "tokenize"}:
        raise UserError(f"no section {unknown.pop()}; see --help")
    repeat = int(own["repeat"])
    cfg = load_config(rest)
    world = ddp.join(cfg.device)
    device, fused = world.device, ddp.pick_compile(cfg.compile, world.device) is None
    try:
        data = DataLoader(cfg, world)
    except UserError as error:
        print(f"random tokens: {error}")
        data = None
    vocab_size = data.meta["vocab_size"] if data else GPTConfig.vocab_size
    sections = {
        "optimizer": lambda: bench_optimizer(cfg, device, repeat, vocab_size, fused),
        "step": lambda: bench_step(cfg, device, repeat, vocab_size, data, fused, own["profile"]),
        "data": lambda: bench_data(data, repeat, device) if data else (),
        "generate": lambda: bench_generate(cfg, device, vocab_size),
        "tokenize": lambda: bench_tokenize(repeat, device)}
    rows = []
    for section in wanted:
        for name, value, unit, note in sections[section]():
            print(f"{section:10} {name:32} {value:12,.2f} {unit:8} {note}", flush=True)
            rows.append(dict(section=section, name=name, value=value, unit=unit, note=note))
    if own["json"]:
        with open(own["json"], "w", encoding="utf-8") as file:
            json.dump({"torch": torch.__version__, "device": str(device),
                       "threads": torch.get_num_threads(), "rows": rows}, file, indent=1)
        print(f"wrote {own['json']}")


if __name__ == "__main__":
    run_script(main)
