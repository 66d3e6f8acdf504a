"""
Estimates the Hessian diagonal many times with the trainer's own code, on any number of ranks, for
test_train.py.

    hessian_estimates.py ESTIMATOR DATA OUT.npz ESTIMATES [shared]
                                                # shared: all ranks use rank 0's noise
"""
import sys
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel as DDP

import ddp
from configurator import load_config
from dataloader import DataLoader
from model import GPT, GPTConfig
from train import estimate_hessian

TINY = GPTConfig(vocab_size=64, block_size=4, n_layer=1, n_head=2, n_embd=8)   # no padded class


def build():
    torch.manual_seed(0)
    model = GPT(TINY)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)   # a softmax far from uniform
    return model


def main(estimator, data_dir, out, estimates, shared):
    cfg = load_config([f"--dataset={data_dir}", "--block_size=4", "--batch_size=1",
                       "--total_batch_size=4", "--hessian_batch_size=4",
                       f"--hessian_estimator={estimator}"], ddp.world_size())
    world = ddp.setup(torch.device("cpu"))
    data = DataLoader(cfg, ddp.World(0, world.size, world.device) if shared else world)
    raw_model = build()
    model = DDP(raw_model) if world.size > 1 else raw_model
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    total = squares = 0
    for update in range(estimates):
        estimate_hessian(model, raw_model, data.hessian(update), partial(data.direction, update),
                         cfg, nullcontext(), scaler)
        estimate = torch.cat([p.grad.flatten() for p in raw_model.parameters()]).double().numpy()
        if cfg.squares_gradient:
            estimate = cfg.hessian_tokens * estimate ** 2
        total, squares = total + estimate, squares + estimate ** 2
    if world.is_rank0:
        mean = total / estimates
        np.savez(out, mean=mean, error=np.sqrt((squares / estimates - mean ** 2) / estimates))
    del model
    ddp.cleanup()


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]), sys.argv[5:] == ["shared"])
