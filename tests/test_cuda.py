"""
Promises on CUDA, one test each, skipped without a CUDA device. `pytest --device=cpu
tests/test_cuda.py` runs the same tests on a CPU, with gloo instead of NCCL and without CUDA graphs.
"""
import math
import resource
import shutil
import signal
import subprocess
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import (
    ROOT,
    TINY,
    assert_same_run,
    between_log_lines,
    command,
    environment,
    flags,
    records,
    run,
)
from torch.nn.parallel import DistributedDataParallel as DDP
from transformers import AutoModelForCausalLM

import checkpoint
import ddp
import export
import train
from configurator import load_config
from device import pick_device
from lion import Lion
from metrics import Metrics
from model import GPT, GPTConfig
from muon import Muon
from sophia import SophiaG

OPTIMIZERS = ("sophiag", "adamw", "lion", "muon")
SETTINGS = {**TINY, "max_iters": 20, "eval_interval": 10, "hessian_interval": 5, "compile": True,
            "dtype": "bfloat16"}


@pytest.fixture(scope="module")
def device(pytestconfig):
    kind = pytestconfig.getoption("--device")
    if kind == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    return pick_device(kind)


@pytest.fixture(autouse=True)
def signals():
    """Restore the signal handlers that train.py replaces."""
    names = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP
    handlers = [signal.getsignal(name) for name in names]
    yield
    for name, handler in zip(names, handlers):
        signal.signal(name, handler)


def train_here(out_dir, data, device, **settings):
    """Run train.py's loop in this process. Returns the records of its training steps."""
    knobs = {**SETTINGS, "dataset": data, "out_dir": out_dir, "device": device.type, **settings}
    cfg = load_config(flags(**knobs))
    train.train(cfg, ddp.setup(pick_device(cfg.device)))
    return records(out_dir)


@pytest.fixture(scope="module")
def trained(device, tiny_data, tmp_path_factory):
    """{optimizer: run directory}: 20 steps on the device, compiled, in bfloat16."""
    folder = tmp_path_factory.mktemp("trained")
    for optimizer in OPTIMIZERS:
        train_here(folder / optimizer, tiny_data, device, optimizer=optimizer)
    return {optimizer: folder / optimizer for optimizer in OPTIMIZERS}


def assert_close(found, wanted):
    """Equal up to bfloat16's precision: 0.02 of a loss near 4.85, 1% and 10% of a norm."""
    assert [r["iter"] for r in found] == [r["iter"] for r in wanted]
    for a, b in zip(found, wanted):
        assert a["train/loss"] == pytest.approx(b["train/loss"], abs=0.02)
        assert a["param_norm"] == pytest.approx(b["param_norm"], rel=0.01)
        assert a.get("hessian_norm", 0) == pytest.approx(b.get("hessian_norm", 0), rel=0.1)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_bfloat16_compiled_agrees_with_float32_on_a_cpu(trained, tiny_data, tmp_path, optimizer):
    wanted = train_here(tmp_path, tiny_data, torch.device("cpu"), optimizer=optimizer,
                        compile=False, dtype="float32")
    assert len(wanted) == 20 and wanted[-1]["train/loss"] < wanted[0]["train/loss"] - 0.05
    assert_close(records(trained[optimizer]), wanted)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_checkpoint_from_the_device_resumes_on_a_cpu(trained, tiny_data, tmp_path, optimizer):
    for name in "ckpt_00000010.pt", "metrics.jsonl":
        shutil.copy(trained[optimizer] / name, tmp_path)
    resumed = train_here(tmp_path, tiny_data, torch.device("cpu"), optimizer=optimizer,
                         compile=False, dtype="float32", init_from="resume")
    assert_close(resumed, records(trained[optimizer]))
    for state in checkpoint.load(tmp_path / "ckpt_00000020.pt")["optimizer"]["state"].values():
        assert float(state.get("step", 20)) == 20


def test_a_run_on_the_device_exports_to_transformers(trained, device, tmp_path):
    export.main([str(trained["sophiag"]), f"--out={tmp_path}/hf"])
    saved = checkpoint.load(trained["sophiag"] / "ckpt_00000020.pt")
    ours = GPT(GPTConfig(**saved["model_args"])).to(device).eval()
    ours.load_state_dict(saved["model"])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()   # on the CPU
    x = torch.randint(ours.config.vocab_size, (2, ours.config.block_size))
    with torch.no_grad():   # the tolerance is TF32's
        torch.testing.assert_close(theirs(x).logits[..., :ours.config.vocab_size],
                                   ours(x.to(device)).cpu(), rtol=0, atol=0.01)


def updated(make, device, step_of, steps=6):
    """Parameters, state and statistics after `steps` steps, the last one skipped by found_inf."""
    rng = torch.Generator().manual_seed(0)
    shapes = [(64, 96), (96, 64), (6144,), (7,), (), *[(768,)] * 5]
    params = [torch.nn.Parameter(torch.randn(shape, generator=rng).to(device)) for shape in shapes]
    params.append(torch.nn.Parameter(torch.randn(96, 64, generator=rng).to(device).t()))
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer = make(params)
    optimizer.found_inf = torch.zeros((), device=device)
    step = step_of(optimizer)
    for i in range(steps):
        optimizer.found_inf.fill_(i == steps - 1)
        for p in params:
            p.grad.copy_(torch.randn(p.shape, generator=rng).to(device))
        if torch.is_tensor(optimizer.param_groups[0]["lr"]):
            optimizer.param_groups[0]["lr"].fill_(1e-3 * (i + 1))
        if isinstance(optimizer, SophiaG) and i % 2 == 0:
            optimizer.update_hessian()
        step()
    state = [s[name] for s in optimizer.state.values() for name in sorted(s)]
    statistics = optimizer.statistics() if isinstance(optimizer, SophiaG) else {}
    return [t.detach().cpu() for t in [*params, *state, *statistics.values()]]


def assert_same_updates(found, wanted, atol=1e-5):
    """Equal to 1% of a step, because m / (rho B h) magnifies the rounding of m where h is small.
    Muon multiplies in bfloat16 on a GPU: half of a step's 2e-4."""
    assert len(found) == len(wanted) > 20 and wanted[0].abs().max() > 1
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=atol)


def make_muon(params, **settings):
    matrices, others = ([p for p in params if (p.ndim == 2) == wanted] for wanted in (True, False))
    return Muon([{"params": matrices}, {"params": others, "use_muon": False}], weight_decay=0.1,
                **{"lr": 1e-3, **settings})


MAKERS = {"sophiag": partial(SophiaG, lr=1e-3, rho=0.05, weight_decay=0.1, bs=100),
          "lion": partial(Lion, lr=1e-3, weight_decay=0.1), "muon": make_muon}


@pytest.mark.parametrize("optimizer", MAKERS)
def test_fused_updates_equal_eager_ones(device, optimizer):
    eager, fused = (updated(partial(MAKERS[optimizer], fused=choice), device, lambda o: o.step)
                    for choice in (False, True))
    tolerance = 1e-4 if optimizer == "muon" else 1e-5
    assert_same_updates(fused, eager, tolerance)
    on_cpu = updated(partial(MAKERS[optimizer], fused=False), torch.device("cpu"),
                     lambda o: o.step)
    assert_same_updates(eager, on_cpu, tolerance)


def captured(optimizer):
    """optimizer.step as a CUDA graph, or as it is where there is no CUDA. Parameters and state are
    those of before: the steps that warm up are skipped, gradients being zero and found_inf 1."""
    params = optimizer.param_groups[0]["params"]
    if not params[0].is_cuda:
        return optimizer.step
    optimizer.found_inf.fill_(1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):   # create the state and compile
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    for state in optimizer.state.values():
        if "step" in state:   # Muon's matrices have none
            state["step"].zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph.replay


@pytest.mark.parametrize("optimizer, fused", [("sophiag", False), ("sophiag", True),
                                              ("muon", False)])
def test_a_captured_step_equals_an_eager_one(device, optimizer, fused):
    """The learning rate changes between replays."""
    def make(params, **settings):
        return MAKERS[optimizer](params, **settings, lr=torch.tensor(1e-3, device=device))

    capturable = {"capturable": True} if optimizer == "sophiag" else {}   # Muon always is
    found = updated(partial(make, fused=fused, **capturable), device, captured)
    assert_same_updates(found, updated(partial(make, fused=False), device, lambda o: o.step))


@pytest.mark.parametrize("optimizer, dtype", [*((name, "bfloat16") for name in OPTIMIZERS),
                                              ("sophiag", "float16")])
def test_the_host_does_not_wait_between_log_lines(device, tiny_data, tmp_path, monkeypatch,
                                                  optimizer, dtype):
    """In steps 11-20 and 21-30, after compilation. PyTorch raises an error at a wait."""
    modes = iter(["error", "default"] * 2 + ["default"])   # at log lines: after, before, after...

    def next_mode():
        mode = next(modes)
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode(mode)

    monkeypatch.setattr(Metrics, "log_step",
                        between_log_lines(Metrics.log_step, next_mode, next_mode))
    try:
        log = train_here(tmp_path, tiny_data, device, optimizer=optimizer, dtype=dtype,
                         log_interval=10, eval_interval=100, max_iters=30)
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert [r["iter"] for r in log] == [10, 20, 30] and not list(modes)


def peak(device, function):
    """Peak memory in bytes of the second call; on a CPU, of the process so far."""
    function()
    if device.type != "cuda":
        function()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    torch.cuda.reset_peak_memory_stats()
    function()
    return torch.cuda.max_memory_allocated()


def test_a_hessian_pass_peaks_no_higher_than_a_training_pass(device):
    """With GPT-2's vocabulary and width. 2% covers the allocator's rounding; a CPU's figure also
    contains the compiler's memory."""
    rows, length = (8, 1024) if device.type == "cuda" else (1, 512)
    cfg = load_config(flags(batch_size=rows, total_batch_size=rows, n_layer=4, dtype="bfloat16"))
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=length, n_layer=cfg.n_layer)).to(device)
    model.compile_for_training()
    autocast = torch.autocast(device.type, torch.bfloat16)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    x, y = torch.randint(50257, (2, rows, length), device=device)
    noise = torch.rand(rows, length, device=device)
    training = peak(device, lambda: train.accumulate_gradients(
        model, x, y, train.next_token_loss, rows, autocast, scaler))
    hessian = peak(device, lambda: train.estimate_hessian(
        model, model, (x, y, noise), None, cfg, autocast, scaler))
    assert 0 < hessian < (1.02 if device.type == "cuda" else 1.1) * training


@pytest.mark.parametrize("optimizer", ["sophiag", "adamw"])
def test_float16_recovers_from_overflow_in_both_passes(device, tiny_data, tmp_path, monkeypatch,
                                                       optimizer):
    """The loss scale starts at 2**30, so losses overflow until it has been halved often enough."""
    monkeypatch.setattr(torch.amp, "GradScaler",
                        partial(torch.amp.GradScaler, init_scale=2.0 ** 30))
    log = train_here(tmp_path, tiny_data, device, optimizer=optimizer, dtype="float16",
                     hessian_interval=2, max_iters=40, warmup_iters=0)
    hessian = optimizer == "sophiag"
    assert [r["train/skipped"] for r in log[:4]] == ([1, 3, 4, 6] if hessian else [1, 2, 3, 4])
    assert log[-1]["train/skipped"] < 20
    assert log[0]["param_norm"] == log[3]["param_norm"]   # these steps changed nothing
    if hessian:
        assert log[3]["hessian_norm"] == 0 < log[-1]["hessian_norm"]
    assert log[-1]["train/loss"] < log[0]["train/loss"] - 0.05
    saved = checkpoint.load(tmp_path / "ckpt_00000040.pt")
    assert all(t.isfinite().all() for t in saved["model"].values())
    assert math.log2(saved["scaler"]["scale"]) == 30 - log[-1]["train/skipped"]


def test_a_deterministic_run_resumes_bit_for_bit(device, tiny_data, tmp_path):
    """Each start is a new process, which cuBLAS needs to be deterministic. Attention's backward
    pass adds up the parts of 8 blocks of keys, in any order if it is not deterministic."""
    length = 1024 if device.type == "cuda" else 32
    for name, end, start in ("whole", 20, "scratch"), ("parts", 10, "scratch"), ("parts", 20,
                                                                                 "resume"):
        knobs = {**SETTINGS, "dataset": tiny_data, "device": device.type, "dropout": 0.1,
                 "deterministic": True, "out_dir": tmp_path / name, "max_iters": end,
                 "block_size": length}
        done = run("train.py", *flags(**knobs, init_from=start), PYTHONPATH=str(ROOT))
        assert done.returncode == 0, done.stdout + done.stderr
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_the_default_batch_size_is_the_whole_batch_of_a_small_model_on_a_gpu(device, tiny_data,
                                                                           tmp_path):
    log = train_here(tmp_path, tiny_data, device, batch_size=None, total_batch_size=64, max_iters=2,
                     dtype="auto")
    assert len(log) == 2 and log[-1]["train/skipped"] == 0
    saved = checkpoint.load(tmp_path / "ckpt_00000002.pt")["config"]["batch_size"]
    assert saved == (64 if device.type == "cuda" else 8)


def test_cached_generation_equals_uncached(device):
    """Each token chosen with cached keys and values is, up to TF32's rounding, the most likely one
    after a full pass over the tokens before it."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=65, block_size=128, n_layer=4, n_head=4, n_embd=64))
    model = model.to(device).eval()
    with torch.no_grad():
        for p in model.transformer.h.parameters():
            p.mul_(5)   # otherwise every token repeats the last one
    idx = model.generate(torch.randint(65, (4, 8), device=device), 120, temperature=0)
    assert idx.shape == (4, 128) and len(idx[:, 8:].unique()) > 10
    with torch.no_grad():
        logits = model(idx)[:, 7:-1]
    chosen = logits.gather(2, idx[:, 8:, None]).squeeze(2)
    assert (logits.amax(2) - chosen).max() < 0.01 * logits.std()


def test_the_process_group_of_the_device_averages_gradients_and_runs_our_collectives(device):
    """One rank, with NCCL and gloo in one group."""
    cpu = device.type == "cpu"
    dist.init_process_group("gloo" if cpu else "cpu:gloo,cuda:nccl", store=dist.HashStore(),
                            rank=0, world_size=1, device_id=None if cpu else device)
    try:
        torch.manual_seed(0)
        raw_model = GPT(GPTConfig(vocab_size=64, block_size=32, n_layer=2, n_head=2, n_embd=32))
        raw_model = raw_model.to(device)   # F.cross_entropy knows no padded class
        model = DDP(raw_model, device_ids=None if cpu else [device], gradient_as_bucket_view=True)
        x, y = torch.randint(64, (2, 8, 32), device=device)
        scaler = torch.amp.GradScaler(device.type, enabled=False)
        no_autocast = torch.autocast(device.type, enabled=False)
        for wrapped in raw_model, model:
            loss = train.accumulate_gradients(wrapped, x, y, train.next_token_loss, 4, no_autocast,
                                              scaler)
            wanted = F.cross_entropy(raw_model(x).flatten(0, 1), y.flatten())
            gradients = torch.autograd.grad(wanted, list(raw_model.parameters()))
            assert loss.item() == pytest.approx(wanted.item(), abs=0.01)
            for p, g in zip(raw_model.parameters(), gradients):
                torch.testing.assert_close(p.grad, g, rtol=0.01, atol=1e-3)
        assert ddp.all_reduce_mean(torch.tensor(3.0, device=device)).device == device
        assert ddp.all_reduce_sum(torch.ones(3, dtype=torch.double)).tolist() == [1, 1, 1]
        assert ddp.all_reduce_max(7) == 7 and ddp.broadcast_from_rank0(lambda: "a path") == "a path"
        del model
    finally:
        ddp.cleanup()


def test_one_rank_per_gpu_gives_the_losses_of_one_rank(device, tiny_data, tmp_path):
    ranks = torch.cuda.device_count() if device.type == "cuda" else 2
    if ranks < 2:
        pytest.skip("there is one GPU")
    for n in 1, ranks:
        knobs = {**SETTINGS, "dataset": tiny_data, "device": device.type, "dtype": "float32",
                 "batch_size": 1, "total_batch_size": 2 * ranks, "hessian_batch_size": ranks,
                 "out_dir": tmp_path / str(n), "compile": False}
        done = subprocess.run(command("train.py", *flags(**knobs), ranks=n), env=environment(),
                              capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    one, all_ranks = (records(tmp_path / str(n)) for n in (1, ranks))
    assert [r["train/loss"] for r in all_ranks] == pytest.approx(
        [r["train/loss"] for r in one], abs=0.01)
    assert all_ranks[-1]["hessian_norm"] == pytest.approx(one[-1]["hessian_norm"], rel=0.05)
