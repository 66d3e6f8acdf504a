"""
Compare SophiaG with AdamW: a small vision transformer on scikit-learn's handwritten digits. The
GNB estimator works for any softmax classifier; here it draws one of ten classes for each image.
    python examples/image_classifier.py
Each optimizer gets five learning rates, a factor of two apart, on one seed. The rate with the
lowest validation loss is then trained on other seeds. The table shows their test results.
"""
import argparse
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_digits

sys.path.append(str(Path(__file__).resolve().parent.parent))   # for sophia.py
from sophia import SophiaG  # noqa: E402

BATCH, HESSIAN_INTERVAL = 50, 10
RATES = {"AdamW": [5e-4, 1e-3, 2e-3, 4e-3, 8e-3], "SophiaG": [1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3]}


class ViT(nn.Module):
    """Maps images (B, 1, 8, 8), as 16 patches of 2 x 2 pixels, to logits (B, 10)."""

    def __init__(self, width=32, depth=2, heads=4):
        super().__init__()
        self.patches = nn.Conv2d(1, width, kernel_size=2, stride=2)
        self.positions = nn.Parameter(torch.randn(16, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0, activation="gelu",
                                           batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10))

    def forward(self, images):
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.blocks(tokens).mean(1))


def update_hessian(model, optimizer, images, generator):
    logits = model(images)
    drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
    F.cross_entropy(logits, drawn).backward()
    optimizer.update_hessian()
    optimizer.zero_grad()


def train(name, rate, images, labels, epochs, seed):
    """Returns a trained ViT. Its initial weights and batches depend only on the seed."""
    torch.manual_seed(seed)
    model = ViT()
    settings = dict(lr=rate, betas=(0.9, 0.99), weight_decay=0.1)
    if name == "SophiaG":   # B: one label per image of the batch
        optimizer = SophiaG(model.parameters(), **settings, bs=BATCH, target_win_rate=0.3)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), **settings)
    batches = [batch for _ in range(epochs) for batch in torch.randperm(len(images)).split(BATCH)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, len(batches), pct_start=0.1,
                                                   cycle_momentum=False)
    generator = torch.Generator().manual_seed(seed)   # for the drawn labels
    for step, batch in enumerate(batches, 1):
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if name == "SophiaG" and step % HESSIAN_INTERVAL == 0:
            update_hessian(model, optimizer, images[batch], generator)
    return model


@torch.no_grad()
def evaluate(model, images, labels):
    logits = model(images)
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float().mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3, help="runs at the best rate")
    args = parser.parse_args()
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 16
    labels = torch.tensor(digits.target)[order]
    (x, x_val, x_test), (y, y_val, y_test) = (t.split([1200, 297, 300]) for t in (images, labels))
    print(f"{'optimizer':10} {'rate: validation loss':73} chosen   test loss      accuracy")
    for name, rates in RATES.items():
        tried = {r: evaluate(train(name, r, x, y, args.epochs, 0), x_val, y_val)[0] for r in rates}
        best = min(tried, key=tried.get)
        runs = [train(name, best, x, y, args.epochs, seed) for seed in range(1, args.seeds + 1)]
        loss, accuracy = torch.tensor([evaluate(model, x_test, y_test) for model in runs]).T
        print(f"{name:10}", *(f"{rate:.1e}: {loss:.3f} " for rate, loss in tried.items()),
              f"{best:.1e}  {loss.mean():.3f} ± {loss.std():.3f}  {accuracy.mean():.1%}")


if __name__ == "__main__":
    main()
