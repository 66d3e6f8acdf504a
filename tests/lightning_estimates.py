"""
Lightning runs this in two processes. Saves the first Hessian estimate of
examples/lightning_module.py, and the same gradient computed in one process from all sampled labels.
"""
import sys
from pathlib import Path

import lightning
import torch
import torch.distributed as dist
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT), str(ROOT / "examples")]
from lightning_module import BATCH, BLOCK, LanguageModel  # noqa: E402

drawn, multinomial = [], torch.multinomial


def recording(*args, **kwargs):
    drawn.append(multinomial(*args, **kwargs))
    return drawn[-1]


def gather(tensor):
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor)
    return gathered


class Recorder(LanguageModel):
    def update_hessian(self, sophia, steps):
        inputs = [batch[:, :-1] for batch in self.micro_batches]
        super().update_hessian(sophia, steps)
        x, y = (torch.stack(gather(torch.cat(t))) for t in (inputs, drawn))
        if self.global_rank == 0:
            loss = F.cross_entropy(self(x.flatten(0, 1)).flatten(0, 1), y.flatten())
            exact = torch.autograd.grad(loss, list(self.parameters()))
            found = [sophia.state[p]["hessian"] / (1 - 0.99) for p in self.parameters()]
            torch.save((found, [g * g for g in exact], y, sophia.param_groups[0]["bs"]),
                       sys.argv[1])


if __name__ == "__main__":
    torch.multinomial = recording
    lightning.seed_everything(0)
    blocks = torch.randint(0, 256, (8 * BATCH, BLOCK + 1))
    loader = torch.utils.data.DataLoader(blocks, BATCH, drop_last=True)
    trainer = lightning.Trainer(devices=2, accelerator="cpu", max_steps=1, logger=False,
                                accumulate_grad_batches=2, enable_checkpointing=False,
                                enable_progress_bar=False)
    trainer.fit(Recorder(hessian_interval=1), loader)
