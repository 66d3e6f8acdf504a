"""
Metrics: one record -> a console line, a line of metrics.jsonl, wandb. Also what accumulates between
two log lines: clipped steps, time, the first step that was not finite.
"""
import json
import math
import os
import re
import subprocess
import time
from dataclasses import asdict
from datetime import timedelta

import torch

import ddp
from configurator import ROOT, UserError, to_json, write_atomically
from model import rows_per_chunk
from optim import STATE_TENSORS

# Dense bfloat16/float16 tensor-core peaks in FLOP/s, with float32 accumulation. Keys are regular
# expressions for CUDA's name of the card. Most data sheets print the peak with sparsity, which is
# twice the dense one.
PEAK_FLOPS = {
    "GB200": 2500e12,                                   # GB200 NVL72 data sheet
    "B200": 2250e12,                                    # Blackwell data sheet, HGX B200
    "GH200 .*": 989e12,                                 # GH200 Grace Hopper data sheet
    "H200": 989e12, "H200 NVL": 836e12,                 # H200 data sheet
    "H100 .*HBM3": 989e12, "H100 NVL": 836e12,          # H100 data sheet, SXM and NVL
    "H100 PCIe": 756e12,                                # H100 data sheet of 2022
    "A100[ -].*": 312e12,                               # A100 data sheet
    "L40S": 362e12, "L4": 121e12,                       # L40S and L4 data sheets
    "A10G": 70e12,                                      # A10G data sheet, published by AWS
    "RTX A6000": 155e12,                                # RTX A6000 data sheet
    "RTX 3090": 71e12,                                  # Ampere GA102 whitepaper
    "RTX 4090": 165e12,                                 # Ada architecture whitepaper
    "RTX 5090": 209.5e12,                               # RTX Blackwell architecture whitepaper
    "V100-SXM.*": 125e12, "V100-PCIE.*": 112e12,        # V100 data sheet
    "T4": 65e12}                                        # T4 data sheet
WIN_RATES, ADVISE_AFTER = (0.05, 0.9), 20   # outside for so many log lines, rho is wrong
MAX_SKIPPED = 20   # in a row: a GradScaler that begins at 2**16 has found its scale by then
# Kept on the device: clipped steps and largest loss since the last log line; skipped updates of the
# whole run; skipped steps in a row.
COUNTS = ("clipped", "loss_max", "skipped", "in_a_row")


def peak_flops(device, dtype):
    """Peak FLOP/s of the device in dtype. Where a GPU's is not known: None, and one line why."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    card = re.sub("^(NVIDIA |Tesla |GeForce )*", "", name)
    peaks = [peak for pattern, peak in PEAK_FLOPS.items() if re.fullmatch(pattern, card)]
    if not peaks or " MIG " in card:
        ddp.say(f"MFU is left out: PEAK_FLOPS in metrics.py has no peak for {name}")
    elif dtype == torch.float32:
        ddp.say("MFU is left out: PEAK_FLOPS in metrics.py has no peaks for float32")
    else:
        return peaks[0]
    return None


def memory_estimate(cfg, model, dtype, compiled):
    """
    Bytes that PyTorch allocates on one rank at the peak of a step, by part: {name: bytes}. With P
    parameters, E of them in the token embedding, width C, L layers, N = batch_size x block_size
    tokens in a micro-batch and s bytes in a number of dtype:
        weights      4 P, and s P for their copies where dtype is not float32
        gradients    4 P
        state        4 P for each tensor that the optimizer keeps
        activations  N L C (14 s + 8): in each layer the float32 inputs of two LayerNorms; the
                     inputs of four matmuls (7 C), q, k, v (3 C) and the input of GELU (4 C)
        head         4 E for its weight's gradient, and the float32 logits of a chunk, 3 times
                     compiled and 6 times eager
    The peak is at the head of any micro-batch but the first, when all of these exist. An update
    that is not compiled exceeds it in a model of few layers. So does a Hutchinson pass in any.
    What CUDA, NCCL and fragmentation take comes on top.
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


def git_commit():
    """The commit of this code, '-dirty' if it was changed since, or None outside a repository."""
    try:
        words = ["git", "-C", ROOT, "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


class Metrics:
    """
    Lives on every rank, since finiteness and clipping are counted on each device; only rank 0
    writes. state: what state_dict() gave at the step the run resumes from, else None.
    """

    def __init__(self, cfg, world, flops_per_token, peak, state=None, step=0):
        self.cfg, self.world = cfg, world
        self.flops_per_token, self.peak = flops_per_token, peak
        state = {**dict.fromkeys(COUNTS, 0), "seconds": 0.0, "wandb_id": None, **(state or {})}
        for name in COUNTS:
            setattr(self, name, torch.tensor(float(state[name]), device=world.device))
        self.stuck_at = torch.zeros((), device=world.device)
        self.seconds = state["seconds"]       # in training steps, over all starts of the run
        self.wandb_id = state["wandb_id"]
        self.started_at = None
        self.logged = (step, self.seconds)    # at the last log line
        self.first = self.logged              # when this process started
        self.unhealthy = 0                    # log lines in a row, see WIN_RATES
        self.file = self.wandb = None
        if world.is_main and not cfg.eval_only:
            self._open(step)

    def _open(self, step):
        path = os.path.join(self.cfg.out_dir, "metrics.jsonl")
        # Records after the checkpoint that a run resumes from will be made again.
        old = [r for r in read_metrics(path) if r["iter"] <= step] if step else []
        self.samples = [[r["iter"], r["sample"]] for r in old if "sample" in r]
        kept = "".join(json.dumps(r) + "\n" for r in old)
        config = to_json(self.cfg)
        write_atomically(os.path.join(self.cfg.out_dir, "config.json"),
                         lambda file: file.write(config.encode()))
        write_atomically(path, lambda file: file.write(kept.encode()))
        self.file = open(path, "a", encoding="utf-8")
        if self.cfg.wandb_log:
            self._open_wandb()

    def _open_wandb(self):
        try:
            import wandb  # only when asked for: importing it takes a second
        except ImportError:
            raise UserError("wandb_log=True needs the package wandb: pip install wandb") from None
        settings = dict(
            project=self.cfg.wandb_project, name=self.cfg.wandb_run_name, group=self.cfg.group,
            dir=self.cfg.out_dir, id=self.wandb_id, resume="allow",
            config={**asdict(self.cfg), "git_commit": git_commit()})
        try:
            self.wandb = wandb.init(**settings)
        except wandb.Error as error:   # no key, no network
            ddp.say(f"wandb: {str(error).splitlines()[0].rstrip('.')}; logging offline. Upload it "
                    f"later with: wandb sync {self.cfg.out_dir}/wandb/offline-run-*")
            self.wandb = wandb.init(**settings, mode="offline")
        self.wandb_id = self.wandb.id
        # A resumed run repeats the steps after its checkpoint, which wandb's own counter would
        # refuse: charts are against iter, or any other of these.
        for name in ("iter", "tokens", "flops", "hours"):
            self.wandb.define_metric(name)
        self.wandb.define_metric("*", step_metric="iter")
        self.wandb.define_metric("val/loss", step_metric="iter", summary="min")

    def state_dict(self):
        """What a checkpoint keeps. The records before it are on the disk when this returns."""
        if self.file:
            self._append("", to_disk=True)
        counts = {name: ddp.largest(float(getattr(self, name))) for name in COUNTS}
        return {**counts, "seconds": self.seconds, "wandb_id": self.wandb_id}

    def start_clock(self):
        """Count the time from now on as training; does nothing while it already is."""
        self.started_at = self.started_at or time.perf_counter()

    def stop_clock(self):
        now = time.perf_counter()
        self.seconds += now - (self.started_at or now)
        self.started_at = None

    def observe(self, step, loss, grad_norm):
        """
        Take note, on the device, of a training step before its update. loss: this rank's mean;
        grad_norm: of the gradient of all ranks, hence the same on all. Returns a 0-dim tensor, 1 if
        the update must be skipped because the gradient is not finite.
        """
        skip = self.skip_if_not_finite(grad_norm)
        self.in_a_row = (self.in_a_row + 1) * skip
        self.stuck_at += step * ((self.stuck_at == 0) & (self.in_a_row >= MAX_SKIPPED))
        self.loss_max = torch.fmax(self.loss_max, loss)
        if self.cfg.grad_clip:
            self.clipped += grad_norm > self.cfg.grad_clip
        return skip

    def skip_if_not_finite(self, grad_norm):
        skip = (~torch.isfinite(grad_norm)).float()
        self.skipped += skip
        return skip

    def check_skipped(self):
        """Raise UserError on every rank if too many updates in a row were skipped. Waits for the
        device."""
        step = ddp.largest(int(self.stuck_at))
        if step:
            self._give_up(f"the gradient was not finite in {MAX_SKIPPED} steps in a row, up to "
                          f"{step}")

    def _give_up(self, what):
        if self.wandb:
            self.wandb.alert("training gave up", f"{self.cfg.out_dir}: {what}", "ERROR")
        raise UserError(f"{what}; checkpoints in {self.cfg.out_dir} are intact. Resume with a "
                        f"lower learning_rate, or start again with more warmup_iters or another "
                        f"seed")

    def log_step(self, step, loss, lr, grad_norm, statistics):
        """Record a training step. loss: this rank's mean, 0-dim; statistics: 0-dim tensors by name.
        Every rank calls this; it is the loop's only wait for the device."""
        self.check_skipped()
        tensors = {"train/loss": ddp.mean(loss), "grad_norm": grad_norm,
                   "train/clip_rate": self.clipped / self.cfg.log_interval,
                   "train/skipped": self.skipped, **statistics}
        values = torch.stack([t.float() for t in tensors.values()]).tolist()
        largest = ddp.largest(float(self.loss_max))
        self.clipped.zero_()
        self.loss_max.zero_()
        self.stop_clock()
        self.start_clock()
        steps, seconds = step - self.logged[0], self.seconds - self.logged[1]
        rate = steps * self.cfg.tokens_per_step / max(seconds, 1e-9)
        self.logged = (step, self.seconds)
        record = {**dict(zip(tensors, values)), "train/loss_max": largest, "lr": lr,
                  "tokens_per_sec": rate}
        if self.peak:
            record["mfu"] = rate * self.flops_per_token / (self.peak * self.world.size)
        pace = (self.seconds - self.first[1]) / (step - self.first[0])
        left = timedelta(seconds=round(pace * (self.cfg.max_iters - step)))
        parts = [f"step {step}/{self.cfg.max_iters}", f"loss {record['train/loss']:.4f}",
                 f"lr {lr:.2e}"]
        if "train/win_rate" in record:
            parts.append(f"win_rate {record['train/win_rate']:.3f}")
        parts += [f"grad_norm {record['grad_norm']:.2f}", f"{rate:,.0f} tok/s"]
        if "mfu" in record:
            parts.append(f"mfu {record['mfu']:.1%}")
        self._write(step, record, " | ".join(parts + [f"eta {left}"]))
        self._advise(step, record.get("train/win_rate"))

    def _advise(self, step, win_rate):
        low, high = WIN_RATES
        healthy = (win_rate is None or low <= win_rate <= high or step <= self.cfg.warmup_iters
                   or self.cfg.target_win_rate > 0)   # rho is looked after
        self.unhealthy = 0 if healthy else self.unhealthy + 1
        if self.unhealthy == ADVISE_AFTER:
            how = f"below {low}: raise" if win_rate < low else f"above {high}: lower"
            ddp.say(f"win_rate has been {how} rho, which is {self.cfg.rho}, in the next run")

    def log_eval(self, step, val_loss, stderr):
        """Record an evaluation."""
        if not math.isfinite(val_loss):
            self._give_up(f"validation loss is {val_loss} at step {step}")
        self._write(step, {"val/loss": val_loss, "val/loss_stderr": stderr},
                    f"step {step}/{self.cfg.max_iters} | val loss {val_loss:.4f} +- {stderr:.4f}")

    def log_sample(self, step, text):
        """Record sample text; only rank 0 has it."""
        self._write(step, {"sample": text},
                    f"step {step}/{self.cfg.max_iters} | sample {text[:60]!r}")

    def _write(self, step, record, line):
        if not self.world.is_main:
            return
        ddp.say(line)
        if not self.file:   # eval_only
            return
        tokens = step * self.cfg.tokens_per_step
        record = {"iter": step, "tokens": tokens, "flops": tokens * self.flops_per_token,
                  "seconds": round(self.seconds, 3), "hours": self.seconds / 3600, **record}
        # JSON has no nan: what a skipped step leaves is left out.
        record = {k: v for k, v in record.items() if isinstance(v, str) or math.isfinite(v)}
        self._append(json.dumps(record) + "\n")
        if self.wandb:
            if "sample" in record:
                from wandb import Table
                self.samples.append([step, record["sample"]])
                record["sample"] = Table(columns=["iter", "text"], data=self.samples)
            self.wandb.log(record)

    def _append(self, text, to_disk=False):
        try:
            self.file.write(text)
            self.file.flush()
            if to_disk:
                os.fsync(self.file.fileno())
        except OSError as error:
            path, self.file = self.file.name, None   # to close it would be to try again
            raise UserError(f"cannot write {path}: {error.strerror}; checkpoints are "
                            f"intact") from None

    def __enter__(self):
        return self

    def __exit__(self, error_type, error, trace):
        if self.file:
            self.file.close()
        if self.wandb:
            self.wandb.finish(exit_code=0 if error is None else 1)


def read_metrics(path):
    """Records of a metrics.jsonl. A last line that a crash left half-written is passed over."""
    if not os.path.exists(path):
        return []
    records = []
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = file.read().split("\n")
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict) and isinstance(record.get("iter"), int):
            records.append(record)
        elif line and number < len(lines):
            raise UserError(f"{path}, line {number} is damaged: not a record; remove the line")
    return records
