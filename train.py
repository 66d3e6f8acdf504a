"""
Pretrain GPT-2 with SophiaG, AdamW, Lion or Muon: one loop for all of them.

    python train.py config/quickstart_sophiag.py
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_small_sophiag.py
    python train.py --help

SIGTERM, SIGINT, SIGUSR1 and SIGHUP finish the step, save a checkpoint and exit;
--init_from=resume continues from there.
"""
import math
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial

import torch
from torch.nn.parallel import DistributedDataParallel as DDP

import checkpoint
import ddp
from configurator import load_config
from dataloader import DataLoader
from device import peak_flops, pick_device, require_determinism, resolve_compile, resolve_dtype
from init_from import build_model, find_start, is_checkpoint
from memory import choose_batch_size, describe_memory, explain_out_of_memory
from metrics import Metrics
from optim import hessian_due, lr_at, make_optimizer, resume_optimizer, statistics
from script import StopSignal, run_script
from tokenizer import get_tokenizer


def next_token_loss(model, x, y):
    return model(x, targets=y)


def sampled_label_loss(model, x, noise):
    return model(x, label_noise=noise)


def accumulate_gradients(model, x, y, loss_fn, batch_size, autocast, scaler):
    """
    Set .grad to the gradient of the mean loss over (x, y) and all ranks, times the scaler's scale.
    Micro-batches have batch_size sequences; DDP's all-reduce runs in the last one. Returns the mean
    loss over this rank's sequences, 0-dim, on the device.
    """
    model.zero_grad(set_to_none=True)
    mean_loss = torch.zeros((), device=x.device)
    micro_batches = list(zip(x.split(batch_size), y.split(batch_size)))
    for i, (x_micro, y_micro) in enumerate(micro_batches):
        last = i == len(micro_batches) - 1
        with model.no_sync() if isinstance(model, DDP) and not last else nullcontext():
            with autocast:
                loss = loss_fn(model, x_micro, y_micro)
            loss = loss * (len(x_micro) / len(x))   # the last micro-batch may be smaller
            scaler.scale(loss).backward()
        mean_loss += loss.detach()
    return mean_loss


def estimate_hessian(model, raw_model, batch, direction, cfg, autocast, scaler):
    """
    Set .grad to the input of optimizer.update_hessian, from a batch (x, y, noise) and all ranks,
    times the scaler's scale. cfg.hessian_estimator:
      gnb               gradient of the loss against sampled labels (paper, algorithm 2)
      empirical_fisher  gradient of the loss against the true labels: biased, for comparison
      hutchinson        d * (H d), with d = direction(parameters) standard normal and H the Hessian
                        of the mean loss (paper, algorithm 1)
    The caller clips gradients like those of training, as in the official code. Hutchinson's
    estimate is no gradient and is not clipped.
    """
    x, y, noise = batch
    settings = cfg.batch_size, autocast, scaler
    if cfg.hessian_estimator == "gnb":
        accumulate_gradients(model, x, noise, sampled_label_loss, *settings)
    elif cfg.hessian_estimator == "empirical_fisher":
        accumulate_gradients(model, x, y, next_token_loss, *settings)
    else:   # without DDP, which supports first derivatives only
        d = direction(raw_model.parameters())
        accumulate_gradients(raw_model, x, y, lambda model, x, y:
                             model.directional_derivative(x, y, d), *settings)
        for p, d_p in zip(raw_model.parameters(), d):
            ddp.all_reduce_mean(p.grad.mul_(d_p))


def clip_gradients(model, optimizer, scaler, grad_clip):
    """Scale .grad to a norm of at most grad_clip (0: no limit). Returns the norm before that."""
    scaler.unscale_(optimizer)
    return torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)


def not_finite(grad_norm):
    """1.0 if the gradient has an inf or nan, else 0.0: 0-dim, on the device, equal on all ranks."""
    return (~torch.isfinite(grad_norm)).float()


@torch.no_grad()
def evaluate(raw_model, batches, autocast):
    """(mean loss of this rank's batches (x, y) and those of all others, its standard error)."""
    raw_model.eval()
    losses = []
    for x, y in batches:
        with autocast:
            losses.append(raw_model.token_losses(x, y).float().mean(dim=1))
    raw_model.train()
    windows = torch.cat(losses).cpu().double() if losses else torch.zeros(0, dtype=torch.double)
    sums = torch.stack([torch.tensor(float(len(windows))), windows.sum(), windows.square().sum()])
    count, total, squares = ddp.all_reduce_sum(sums.double()).tolist()
    variance = max(squares / count - (total / count) ** 2, 0.0)
    return total / count, math.sqrt(variance / max(count - 1, 1))


def sample_text(raw_model, tokenizer, eot_id, cfg):
    """A new document from the model, with the same seed each time. eot_id: None for characters."""
    device = raw_model.lm_head.weight.device
    start = tokenizer.start_id if eot_id is None else eot_id
    raw_model.eval()
    ids = raw_model.generate(torch.tensor([[start]], device=device), cfg.sample_tokens, top_k=200,
                             temperature=0.8, eot_id=eot_id,
                             generator=torch.Generator(device).manual_seed(cfg.seed))
    raw_model.train()
    return tokenizer.decode(ids[0, 1:].tolist())


def print_summary(cfg, world, data, model, dtype, compiled, why_not):
    """Print what is about to run, with every number that determines what the optimizer sees."""
    micro_steps = cfg.total_batch_size // (cfg.batch_size * world.size)
    epochs = cfg.max_iters * cfg.total_batch_size / data.windows
    batch = (f"{cfg.total_batch_size} sequences = {cfg.tokens_per_step:,} tokens per step = "
             f"{world.size} rank{'s' * (world.size > 1)} x batch_size {cfg.batch_size} x "
             f"{micro_steps} micro-step{'s' * (micro_steps > 1)}")
    if hessian_due(cfg.hessian_interval, cfg) and cfg.max_iters:
        memory_steps = cfg.hessian_interval / (1 - cfg.beta2)
        batch += (f"; Hessian: {cfg.hessian_batch_size} sequences every {cfg.hessian_interval} "
                  f"steps, averaged over {memory_steps:,.0f} steps "
                  f"({memory_steps / cfg.max_iters:.0%} of the run)")
    precision = str(dtype).removeprefix("torch.") + " with a GradScaler" * (dtype == torch.float16)
    if cfg.dtype == "auto" and dtype == torch.float16:
        precision += ", since this GPU has no native bfloat16"
    ddp.print0(f"data: {cfg.data_dir}, {data.tokens.count:,} training tokens "
               f"({data.meta.get('note', data.meta['tokenizer'])}); {cfg.max_iters} steps are "
               f"{epochs:.2f} epochs\n"
               f"batch: {batch}\n"
               f"model: {model.num_params() / 1e6:.2f}M parameters, "
               f"{model.flops_per_token() / 1e9:.3f} GFLOP per token\n"
               f"{describe_memory(cfg, model, world.device, dtype, compiled)}\n"
               f"machine: {world.device.type}, {precision}, "
               + ("compiled" if compiled else f"eager ({why_not})"))


def build(cfg, world, data, start):
    """
    (raw_model, model, optimizer, autocast, scaler) on the rank's device. model is raw_model,
    compiled and under DDP where they are in use. start: what find_start returned.
    """
    dtype = resolve_dtype(cfg.dtype, world.device)
    compiled, why_not = resolve_compile(cfg.compile, world.device)
    if cfg.deterministic:
        require_determinism(compiled)
    raw_model = build_model(cfg, data.meta["vocab_size"], start).to(world.device)
    optimizer = make_optimizer(cfg, raw_model, fused=compiled)
    autocast = torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16)
    if is_checkpoint(start):
        resume_optimizer(optimizer, start["optimizer"])
        scaler.load_state_dict(start["scaler"])
    if compiled:
        raw_model.compile_for_training()
    model = raw_model
    if world.size > 1:
        model = DDP(raw_model, device_ids=[world.device] if world.device.type == "cuda" else None,
                    gradient_as_bucket_view=True)
    print_summary(cfg, world, data, raw_model, dtype, compiled, why_not)
    return raw_model, model, optimizer, autocast, scaler


def train(cfg, world):
    data = DataLoader(cfg, world)
    tokenizer = get_tokenizer(data.meta["tokenizer"]) if cfg.sample_tokens else None
    start = find_start(cfg, data)
    before = start["config"]["batch_size"] if is_checkpoint(start) else None
    cfg = choose_batch_size(cfg, world.device, data.meta["vocab_size"], before)
    with explain_out_of_memory(cfg):
        raw_model, model, optimizer, autocast, scaler = build(cfg, world, data, start)
    step, saved_step, best_step, best_val_loss, metrics_state = 0, None, 0, float("inf"), None
    if is_checkpoint(start):
        step = saved_step = start["step"]
        best_step, best_val_loss = start["best_step"], start["best_val_loss"]
        metrics_state = start["metrics"]
    del start   # as large as the model and the optimizer

    def save():
        state = metrics.state_dict()
        if world.is_rank0:
            checkpoint.save(cfg.out_dir, {
                "model": raw_model.state_dict(), "model_args": asdict(raw_model.config),
                "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "step": step,
                "best_step": best_step, "best_val_loss": best_val_loss, "metrics": state,
                "config": asdict(cfg), "tokenizer": data.meta["tokenizer"],
                "data": data.tokens.fingerprint()}, best_step)

    stop = StopSignal()
    if not cfg.eval_only:
        ddp.broadcast_from_rank0(lambda: checkpoint.lock(cfg.out_dir))
    peak = peak_flops(world.device, resolve_dtype(cfg.dtype, world.device))
    metrics = Metrics(cfg, world, raw_model.flops_per_token(), peak, metrics_state, step)
    with explain_out_of_memory(cfg), metrics.writer:   # which closes metrics.jsonl and wandb
        while True:
            finished = step >= cfg.max_iters
            stop_requested = ddp.all_reduce_max(int(stop.requested)) > 0   # all stop together
            evaluating = step % cfg.eval_interval == 0 or finished or cfg.eval_only
            if (evaluating or stop_requested) and (step != saved_step or cfg.eval_only):
                metrics.check_skipped()   # waits for the device, so that the clock counts its work
                metrics.stop_clock()
                if evaluating:
                    val_loss, stderr = evaluate(raw_model, data.val(cfg.batch_size), autocast)
                    metrics.log_eval(step, val_loss, stderr)
                    if tokenizer and world.is_rank0:
                        metrics.log_sample(step, sample_text(raw_model, tokenizer,
                                                             data.meta["eot_id"], cfg))
                    if val_loss < best_val_loss:
                        best_step, best_val_loss = step, val_loss
                if step > 0 and not cfg.eval_only:
                    save()
            if finished or stop_requested or cfg.eval_only:
                break
            metrics.start_clock()

            lr = lr_at(step, cfg)
            for group in optimizer.param_groups:
                group["lr"] = lr
            ddp.seed_step(cfg.seed, step, world.rank)
            x, y = data.train(step)
            loss = accumulate_gradients(model, x, y, next_token_loss, cfg.batch_size, autocast,
                                        scaler)
            grad_norm = clip_gradients(raw_model, optimizer, scaler, cfg.grad_clip)
            step += 1
            optimizer.found_inf = not_finite(grad_norm)   # 1: optimizer.step changes nothing
            optimizer.step()   # not scaler.step, which waits for the device to read found_inf
            scaler.update()
            metrics.count_step(step, loss, grad_norm, skipped=optimizer.found_inf)

            if hessian_due(step, cfg):
                update = step // cfg.hessian_interval - 1
                estimate_hessian(model, raw_model, data.hessian(update),
                                 partial(data.direction, update), cfg, autocast, scaler)
                norm = clip_gradients(raw_model, optimizer, scaler,
                                      cfg.grad_clip if cfg.squares_gradient else 0)
                optimizer.found_inf = not_finite(norm)
                optimizer.update_hessian(square=cfg.squares_gradient)
                scaler.update()
                metrics.skipped += optimizer.found_inf

            if step % cfg.log_interval == 0:
                metrics.log_step(step, loss, lr, grad_norm, statistics(optimizer))
    if stop_requested and not finished:
        ddp.print0(f"stopped by a signal after step {step}; resume with --init_from=auto")
    elif step > 0 and not cfg.eval_only:
        ddp.print0(f"finished at step {step}: best val loss {best_val_loss:.4f} at step "
                   f"{best_step}. Sample from it: python sample.py {cfg.out_dir}")


def main(argv):
    cfg = load_config(argv, ddp.world_size())
    with ddp.explain_lost_rank():
        train(cfg, ddp.setup(pick_device(cfg.device), cfg.backend))
    ddp.cleanup()


if __name__ == "__main__":
    run_script(main)
