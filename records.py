"""Records of a run: written to the console, to metrics.jsonl and to wandb, and read back."""
import json
import math
import os
from dataclasses import asdict

import ddp
from configurator import to_json
from script import UserError, write_atomically


class RecordWriter:
    """
    Every rank has one, and rank 0 alone writes. With eval_only it prints and writes no file.
    step: where the run starts or resumes; wandb_id: the wandb run that it continues, or None.
    """

    def __init__(self, cfg, is_rank0, step, wandb_id):
        self.cfg, self.wandb_id = cfg, wandb_id
        self.file = self.wandb = None
        if is_rank0 and not cfg.eval_only:
            self._open_file(step)
            if cfg.wandb_log:
                self._open_wandb()

    def _open_file(self, step):
        path = os.path.join(self.cfg.out_dir, "metrics.jsonl")
        # A resumed run logs the steps after its checkpoint again.
        old = [r for r in read_metrics(path) if r["iter"] <= step] if step else []
        self.samples = [[r["iter"], r["sample"]] for r in old if "sample" in r]
        kept = "".join(json.dumps(r) + "\n" for r in old)
        write_atomically(os.path.join(self.cfg.out_dir, "config.json"), to_json(self.cfg).encode())
        write_atomically(path, kept.encode())
        self.file = open(path, "a", encoding="utf-8")

    def _open_wandb(self):
        try:
            import wandb  # slow to import
        except ImportError:
            raise UserError("wandb_log=True needs the package wandb: pip install wandb") from None
        settings = dict(
            project=self.cfg.wandb_project, name=self.cfg.wandb_run_name, group=self.cfg.group,
            dir=self.cfg.out_dir, id=self.wandb_id, resume="allow", config=asdict(self.cfg))
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

    def write(self, record, line):
        """record: {name: number or text}, with iter. line: what the console shows of it."""
        ddp.print0(line)
        if not self.file:
            return
        # A skipped step has nan values, which JSON does not allow.
        record = {k: v for k, v in record.items() if isinstance(v, str) or math.isfinite(v)}
        self._append(json.dumps(record) + "\n")
        if self.wandb:
            if "sample" in record:
                from wandb import Table
                self.samples.append([record["iter"], record["sample"]])
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

    def flush(self):
        """All records so far are on disk when this returns."""
        if self.file:
            self._append("", to_disk=True)

    def alert(self, text):
        """wandb notifies the user that training gave up."""
        if self.wandb:
            self.wandb.alert("training gave up", f"{self.cfg.out_dir}: {text}", "ERROR")

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
