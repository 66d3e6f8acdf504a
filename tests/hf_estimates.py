"""
Estimates the Hessian many times with examples/hf_trainer.py at fixed weights, in one or several
processes. Rank 0 saves bs h, corrected for its zero start, and the exact Gauss-Newton diagonal.
"""
import gc
import sys
from pathlib import Path

import accelerate
import torch
import transformers as hf

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT), str(ROOT / "examples")]
from hf_trainer import SophiaTrainer  # noqa: E402

from sophia import SophiaG  # noqa: E402

STEPS, BETA2 = 150, 0.998


def gauss_newton_diagonal(model, block):
    """The mean of E_y |grad log p(y)|^2 over a block's predictions, label by label."""
    params = list(model.parameters())
    diagonal = [torch.zeros_like(p) for p in params]
    log_probs = model(input_ids=block["input_ids"][None]).logits[0, :-1].log_softmax(-1)
    predicted = (block["labels"][1:] != -100).nonzero()[:, 0].tolist()
    for i in predicted:
        for log_prob in log_probs[i]:
            grads = torch.autograd.grad(log_prob, params, retain_graph=True)
            for total, grad in zip(diagonal, grads):
                total += log_prob.exp().detach() * grad * grad / len(predicted)
    return diagonal


def main(out_dir):
    torch.manual_seed(0)
    model = hf.GPT2LMHeadModel(hf.GPT2Config(
        vocab_size=7, n_positions=6, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0,
        attn_pdrop=0, bos_token_id=None, eos_token_id=None, initializer_range=0.3))
    args = hf.TrainingArguments(
        out_dir, max_steps=STEPS, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        max_grad_norm=0, lr_scheduler_type="constant", save_strategy="no", disable_tqdm=True,
        use_cpu=True)
    # Five micro-batches per epoch, so the last of three updates has one. One label is padding.
    tokens = torch.tensor([1, 4, 2, 6, 0, 3])
    labels = torch.tensor([1, 4, 2, 6, 0, -100])
    blocks = [{"input_ids": tokens, "labels": labels}] * (10 * args.world_size)
    bs = 2 * 2 * args.world_size * 5
    trainer = SophiaTrainer(model, args, train_dataset=blocks, hessian_interval=1,
                            optimizer_cls_and_kwargs=(SophiaG, dict(lr=0, bs=bs,
                                                                    betas=(0.9, BETA2))))
    trainer.train()
    state = trainer.optimizer.state
    if trainer.is_world_process_zero():
        found = [state[p]["hessian"] * bs / (1 - BETA2 ** STEPS) for p in model.parameters()]
        torch.save((found, gauss_newton_diagonal(model, blocks[0])), Path(out_dir) / "found.pt")


if __name__ == "__main__":
    main(sys.argv[1])
    gc.collect()
    accelerate.PartialState().destroy_process_group()
