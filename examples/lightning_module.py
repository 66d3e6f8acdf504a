"""SophiaG in Lightning: a small character-level transformer, trained on README.md.

    python examples/lightning_module.py
    python examples/lightning_module.py --devices=2 --accumulate_grad_batches=2 --ckpt_path=FILE"""
import argparse
import sys
from pathlib import Path

import lightning
import torch
import torch.nn as nn
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))   # for sophia.py
from sophia import SophiaG  # noqa: E402

BLOCK, BATCH = 64, 8   # tokens per sequence; sequences per micro-batch and process


class LanguageModel(lightning.LightningModule):
    def __init__(self, width=64, seed=0, hessian_interval=10):
        super().__init__()
        self.save_hyperparameters()
        self.embed = nn.Embedding(256, width)
        self.positions = nn.Parameter(torch.randn(BLOCK, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0, batch_first=True,
                                           norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 256)
        self.micro_batches = []

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(BLOCK, device=x.device)
        return self.head(self.blocks(self.embed(x) + self.positions, mask, is_causal=True))

    def training_step(self, batch, batch_idx):
        self.micro_batches.append(batch)
        loss = F.cross_entropy(self(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        self.log("loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def configure_optimizers(self):
        sequences = BATCH * self.trainer.accumulate_grad_batches * self.trainer.world_size
        return SophiaG(self.parameters(), lr=3e-4, bs=sequences * BLOCK, target_win_rate=0.3)

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        steps = self.trainer.global_step + 1   # Lightning counts this step after the hook
        if steps % self.hparams.hessian_interval == 0:
            self.update_hessian(optimizer.optimizer, steps)
        self.log("win_rate", optimizer.optimizer.win_rate(), prog_bar=True)
        self.micro_batches = []

    def update_hessian(self, sophia, steps):
        seed = hash((self.hparams.seed, steps, self.global_rank))   # differs by process
        generator = torch.Generator(self.device).manual_seed(seed)
        precision = self.trainer.precision_plugin
        scaler = getattr(precision, "scaler", None)   # with 16-mixed; its state must not change
        scale = scaler.get_scale() if scaler else 1.0
        bs = sophia.param_groups[0]["bs"]
        n = len(self.micro_batches) * BATCH * BLOCK * self.trainer.world_size   # at most bs
        sophia.zero_grad()
        for batch in self.micro_batches:
            with precision.forward_context():
                logits = self(batch[:, :-1]).flatten(0, 1).float()
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            loss = F.cross_entropy(logits, drawn, reduction="sum") * self.trainer.world_size
            (loss / (n * bs) ** 0.5 * scale).backward()   # mean loss times sqrt(n / bs)
        for p in self.parameters():   # DDP does not reduce this pass
            p.grad = self.trainer.strategy.reduce(p.grad / scale, reduce_op="mean")
        norm = nn.utils.clip_grad_norm_(self.parameters(), self.trainer.gradient_clip_val or 1e9)
        if norm.isfinite():
            sophia.update_hessian()
        sophia.zero_grad()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--accumulate_grad_batches", type=int, default=1)
    parser.add_argument("--max_epochs", type=int, default=4)
    parser.add_argument("--out_dir", default="out/lightning")
    parser.add_argument("--ckpt_path", help="resume from this checkpoint")
    args = parser.parse_args()
    lightning.seed_everything(0)
    tokens = torch.tensor(list((ROOT / "README.md").read_bytes()))
    blocks = tokens.unfold(0, BLOCK + 1, BLOCK)
    loader = torch.utils.data.DataLoader(blocks, BATCH, shuffle=True, drop_last=True)
    trainer = lightning.Trainer(
        devices=args.devices, max_epochs=args.max_epochs, gradient_clip_val=1.0,
        accumulate_grad_batches=args.accumulate_grad_batches, default_root_dir=args.out_dir,
        log_every_n_steps=5)
    trainer.fit(LanguageModel(), loader, ckpt_path=args.ckpt_path)
    print({name: round(value.item(), 4) for name, value in trainer.callback_metrics.items()})


if __name__ == "__main__":
    main()
