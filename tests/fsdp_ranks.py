"""
One rank of tests/test_fsdp.py: trains a model sharded by fully_shard and an unsharded copy on the
same batches, and compares them.

    python tests/fsdp_ranks.py train FOLDER    # trains 10 steps and saves
    python tests/fsdp_ranks.py resume FOLDER   # resumes and trains 10 more
"""
import os
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lion import Lion
from sophia import SophiaG

STEPS, HALF, K, ROWS = 20, 10, 4, 8   # ROWS: the batch over all ranks


def make_model():
    """The last layer has 3 rows, so two ranks get shards of unequal size."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3, bias=False))


def make_optimizer(params, name, fused, target):
    if name == "lion":
        return Lion(params, lr=1e-2, weight_decay=0.1, fused=fused)
    return SophiaG(params, lr=1e-2, betas=(0.9, 0.9), rho=0.5, weight_decay=0.1, bs=ROWS,
                   fused=fused, target_win_rate=target)


def backward(model, seed, ranks, rank):
    """Compute the gradient of the mean loss over a batch, of which each rank has a part."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, 16, generator=generator).chunk(ranks)[rank]
    y = torch.randint(0, 3, (ROWS,), generator=generator).chunk(ranks)[rank]
    model.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()


def train(model, optimizer, first, last, ranks=1, rank=0):
    for step in range(first, last):
        backward(model, step, ranks, rank)
        optimizer.step()
        if step % K == K - 1 and isinstance(optimizer, SophiaG):
            backward(model, 1000 + step, ranks, rank)
            optimizer.update_hessian()


def main(job, folder):
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    ranks, rank = dist.get_world_size(), dist.get_rank()
    cases = [("lion", False, None), ("lion", True, None), ("sophiag", False, None),
             ("sophiag", False, 0.4), ("sophiag", True, 0.4)]   # name, fused, target_win_rate
    for case in cases if job == "train" else [case for case in cases if not case[1]]:
        whole, sharded = make_model(), make_model()
        for layer in (*sharded.children(), sharded):
            fully_shard(layer)
        reference = make_optimizer(whole.parameters(), *case)
        optimizer = make_optimizer(sharded.parameters(), *case)
        path = f"{folder}/{'-'.join(map(str, case))}"
        train(whole, reference, 0, HALF if job == "train" else STEPS)
        if job == "train":
            train(sharded, optimizer, 0, HALF, ranks, rank)
        else:
            model_state, optimizer_state = get_state_dict(sharded, optimizer)
            state = {"model": model_state, "optimizer": optimizer_state}
            dcp.load(state, checkpoint_id=path)
            set_state_dict(sharded, optimizer, model_state_dict=state["model"],
                           optim_state_dict=state["optimizer"])
            train(sharded, optimizer, HALF, STEPS, ranks, rank)
        for p, q in zip(sharded.parameters(), whole.parameters()):
            assert isinstance(p, DTensor)
            torch.testing.assert_close(p.full_tensor(), q.detach(), rtol=1e-4, atol=1e-6)
        if case[0] == "sophiag":
            found, wanted = optimizer.statistics(), reference.statistics()
            assert 0 < wanted["win_rate"] < 1 and found.keys() == wanted.keys()
            assert not any(isinstance(value, DTensor) for value in found.values())
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
        if job == "train":
            model_state, optimizer_state = get_state_dict(sharded, optimizer)
            dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=path)
        if rank == 0:
            print("equal:", *case)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
