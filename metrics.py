"""
Metrics: each record goes to the console, to metrics.jsonl and to wandb. Between two log lines this
counts clipped and skipped steps on the device, and training time.
"""
import json
import math
import os
import subprocess
import time
from dataclasses import asdict
from datetime import timedelta

import torch

import ddp
from configurator import to_json
from script import ROOT, UserError, write_atomically

WIN_RATES, ADVISE_AFTER = (0.05, 0.9), 20   # advise on rho after 20 log lines outside this range
MAX_SKIPPED = 20   # in a row. A GradScaler that starts at 2**16 finds its scale sooner
# On the device: clipped steps and maximum loss since the last log line; skipped updates of the
# whole run; skipped steps in a row.
COUNTS = ("clipped", "loss_max", "skipped", "in_a_row")


def git_commit():
    """This code's commit, with '-dirty' after uncommitted changes; None outside a repository."""
    try:
        words = ["git", "-C", ROOT, "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


class Metrics:
    """
    Every rank has one, which counts on its own device. Rank 0 alone writes. state: the state_dict()
    of the checkpoint that the run resumes from, or None.
    """

    def __init__(self, cfg, world, flops_per_token, peak, state=None, step=0):
        self.cfg, self.world = cfg, world
        self.flops_per_token, self.peak = flops_per_token, peak
        state = {**dict.fromkeys(COUNTS, 0), "seconds": 0.0, "wandb_id": None, **(state or {})}
        for name in COUNTS:
            setattr(self, name, torch.tensor(float(state[name]), device=world.device))
        self.stuck_at = torch.zeros((), device=world.device)
        self.seconds = state["seconds"]       # spent in training steps, over all restarts
        self.wandb_id = state["wandb_id"]
        self.started_at = None
        self.logged = (step, self.seconds)    # at the last log line
        self.first = self.logged              # when this process started
        self.unhealthy = 0                    # log lines in a row outside WIN_RATES
        self.file = self.wandb = None
        if world.is_rank0 and not cfg.eval_only:
            self._open(step)

    def _open(self, step):
        path = os.path.join(self.cfg.out_dir, "metrics.jsonl")
        # A resumed run logs the steps after its checkpoint again.
        old = [r for r in read_metrics(path) if r["iter"] <= step] if step else []
        self.samples = [[r["iter"], r["sample"]] for r in old if "sample" in r]
        kept = "".join(json.dumps(r) + "\n" for r in old)
        write_atomically(os.path.join(self.cfg.out_dir, "config.json"), to_json(self.cfg).encode())
        write_atomically(path, kept.encode())
        self.file = open(path, "a", encoding="utf-8")
        if self.cfg.wandb_log:
            self._open_wandb()

    def _open_wandb(self):
        try:
            import wandb  # slow to import
        except ImportError:
            raise UserError("wandb_log=True needs the package wandb: pip install wandb") from None
        settings = dict(
            project=self.cfg.wandb_project, name=self.cfg.wandb_run_name, group=self.cfg.group,
            dir=self.cfg.out_dir, id=self.wandb_id, resume="allow",
            config={**asdict(self.cfg), "git_commit": git_commit()})
        try:
            self.wandb = wandb.init(**settings)
        except wandb.Error as error:   # no key, no network
            reason = str(error).splitlines()[0].rstrip(".")
            ddp.print0(f"wandb: {reason}; logging offline. Upload it later with: wandb sync "
                       f"{self.cfg.out_dir}/wandb/offline-run-*")
            self.wandb = wandb.init(**settings, mode="offline")
        self.wandb_id = self.wandb.id
        # wandb's own step counter rejects steps that a resumed run logs again, so charts use these.
        for name in ("iter", "tokens", "flops", "hours"):
            self.wandb.define_metric(name)
        self.wandb.define_metric("*", step_metric="iter")
        self.wandb.define_metric("val/loss", step_metric="iter", summary="min")

    def state_dict(self):
        """State for a checkpoint. All records so far are on disk when this returns."""
        if self.file:
            self._append("", to_disk=True)
        counts = {name: ddp.all_reduce_max(float(getattr(self, name))) for name in COUNTS}
        return {**counts, "seconds": self.seconds, "wandb_id": self.wandb_id}

    def start_clock(self):
        """Start counting training time, unless the clock already runs."""
        self.started_at = self.started_at or time.perf_counter()

    def stop_clock(self):
        now = time.perf_counter()
        self.seconds += now - (self.started_at or now)
        self.started_at = None

    def count_step(self, step, loss, grad_norm, skipped):
        """Count a training step on the device. loss: this rank's mean; skipped: 1 if its update was
        skipped because the gradient, whose norm is the same on all ranks, is not finite."""
        self.skipped += skipped
        self.in_a_row = (self.in_a_row + 1) * skipped
        self.stuck_at += step * ((self.stuck_at == 0) & (self.in_a_row >= MAX_SKIPPED))
        self.loss_max = torch.fmax(self.loss_max, loss)
        if self.cfg.grad_clip:
            self.clipped += grad_norm > self.cfg.grad_clip

    def check_skipped(self):
        """Raise UserError on all ranks after MAX_SKIPPED skips in a row. Waits for the device."""
        step = ddp.all_reduce_max(int(self.stuck_at))
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
        """Log a training step; every rank calls this. loss: this rank's mean, 0-dim; statistics:
        {name: 0-dim tensor}. The only place in the loop that waits for the device."""
        self.check_skipped()
        tensors = {"train/loss": ddp.all_reduce_mean(loss), "grad_norm": grad_norm,
                   "train/clip_rate": self.clipped / self.cfg.log_interval,
                   "train/skipped": self.skipped, **statistics}
        values = torch.stack([t.float() for t in tensors.values()]).tolist()
        largest = ddp.all_reduce_max(float(self.loss_max))
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
                   or self.cfg.target_win_rate > 0)   # rho adapts
        self.unhealthy = 0 if healthy else self.unhealthy + 1
        if self.unhealthy == ADVISE_AFTER:
            how = f"below {low}: raise" if win_rate < low else f"above {high}: lower"
            ddp.print0(f"win_rate has been {how} rho, which is {self.cfg.rho}, in the next run")

    def log_eval(self, step, val_loss, stderr):
        """Log an evaluation."""
        if not math.isfinite(val_loss):
            self._give_up(f"validation loss is {val_loss} at step {step}")
        self._write(step, {"val/loss": val_loss, "val/loss_stderr": stderr},
                    f"step {step}/{self.cfg.max_iters} | val loss {val_loss:.4f} +- {stderr:.4f}")

    def log_sample(self, step, text):
        """Log sample text, on rank 0 only."""
        self._write(step, {"sample": text},
                    f"step {step}/{self.cfg.max_iters} | sample {text[:60]!r}")

    def _write(self, step, record, line):
        if not self.world.is_rank0:
            return
        ddp.print0(line)
        if not self.file:   # eval_only
            return
        tokens = step * self.cfg.tokens_per_step
        record = {"iter": step, "tokens": tokens, "flops": tokens * self.flops_per_token,
                  "seconds": round(self.seconds, 3), "hours": self.seconds / 3600, **record}
        # A skipped step has nan values, which JSON does not allow.
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
            path, self.file = self.file.name, None   # closing it would write again
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
    """Records of a metrics.jsonl. Ignores an incomplete last line, which a crash can leave."""
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
