"""
Metrics: what training measures. Between two log lines this counts clipped and skipped steps on the
device, and training time. It ends a run that diverged.
"""
import math
import time
from datetime import timedelta

import torch

import ddp
from records import RecordWriter
from script import UserError

WIN_RATES, ADVISE_AFTER = (0.05, 0.9), 20   # advise on rho after 20 log lines outside this range
MAX_SKIPPED = 20   # in a row. A GradScaler that starts at 2**16 finds its scale sooner
# On the device: clipped steps and maximum loss since the last log line; skipped updates of the
# whole run; skipped steps in a row.
COUNTS = ("clipped", "loss_max", "skipped", "in_a_row")


class Metrics:
    """
    Every rank has one, which counts on its own device. state: the state_dict() of the checkpoint
    that the run resumes from, or None.
    """

    def __init__(self, cfg, world, flops_per_token, peak, state=None, step=0):
        self.cfg, self.world = cfg, world
        self.flops_per_token, self.peak = flops_per_token, peak
        state = {**dict.fromkeys(COUNTS, 0), "seconds": 0.0, "wandb_id": None, **(state or {})}
        for name in COUNTS:
            setattr(self, name, torch.tensor(float(state[name]), device=world.device))
        self.stuck_at = torch.zeros((), device=world.device)
        self.seconds = state["seconds"]       # spent in training steps, over all restarts
        self.started_at = None
        self.logged = (step, self.seconds)    # at the last log line
        self.first = self.logged              # when this process started
        self.unhealthy = 0                    # log lines in a row outside WIN_RATES
        self.writer = RecordWriter(cfg, world.is_rank0, step, state["wandb_id"])

    def state_dict(self):
        """State for a checkpoint. All records so far are on disk when this returns."""
        self.writer.flush()
        counts = {name: ddp.all_reduce_max(float(getattr(self, name))) for name in COUNTS}
        return {**counts, "seconds": self.seconds, "wandb_id": self.writer.wandb_id}

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
        self.writer.alert(what)
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
        parts = [f"loss {record['train/loss']:.4f}", f"lr {lr:.2e}"]
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
                    f"val loss {val_loss:.4f} +- {stderr:.4f}")

    def log_sample(self, step, text):
        """Log sample text, on rank 0 only."""
        self._write(step, {"sample": text}, f"sample {text[:60]!r}")

    def _write(self, step, record, line):
        tokens = step * self.cfg.tokens_per_step
        self.writer.write({
            "iter": step, "tokens": tokens, "flops": tokens * self.flops_per_token,
            "seconds": round(self.seconds, 3), "hours": self.seconds / 3600, **record},
            f"step {step}/{self.cfg.max_iters} | {line}")
