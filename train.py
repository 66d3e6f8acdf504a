"""
Pretrain GPT-2 with SophiaG, AdamW or Lion: one loop for all of them.

    python train.py config/quickstart_sophiag.py
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_small_sophiag.py
    python train.py --help

SIGTERM, SIGINT, SIGUSR1 or SIGHUP finish the step, save and leave; --init_from=resume goes on from
there.
"""
import math
import os
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from textwrap import shorten

import torch
from torch.nn.parallel import DistributedDataParallel as DDP

import checkpoint
import ddp
import pretrained
from configurator import FIELDS, UserError, less_memory, load_config, run_script
from dataloader import DataLoader
from metrics import Metrics, memory_estimate, peak_flops
from model import GPT, GPTConfig
from optim import hessian_due, lr_at, make_optimizer, statistics
from tokenizer import get_tokenizer

MODEL_KNOBS = ("n_layer", "n_head", "n_embd", "bias", "scale_attn_by_inverse_layer_idx")
# A resumed run with another of these would be another run.
FIXED_KNOBS = (*MODEL_KNOBS, "block_size", "optimizer", "hessian_estimator", "seed",
               "total_batch_size")


def next_token_loss(model, x, y):
    return model(x, targets=y)


def sampled_label_loss(model, x, noise):
    return model(x, label_noise=noise)


def accumulate_gradients(model, x, y, loss_fn, batch_size, autocast, scaler):
    """
    Leave in .grad the gradient of the mean loss over (x, y) and all ranks, times the scaler's
    scale. Micro-batches of batch_size sequences; ranks exchange gradients in the last. Returns the
    mean loss over this rank's sequences, 0-dim, on the device.
    """
    model.zero_grad(set_to_none=True)
    mean_loss = torch.zeros((), device=x.device)
    micro_batches = list(zip(x.split(batch_size), y.split(batch_size)))
    for i, (x_micro, y_micro) in enumerate(micro_batches):
        exchange = i == len(micro_batches) - 1 or not isinstance(model, DDP)
        with nullcontext() if exchange else model.no_sync():
            with autocast:
                loss = loss_fn(model, x_micro, y_micro)
            loss = loss * (len(x_micro) / len(x))   # the last micro-batch may be smaller
            scaler.scale(loss).backward()
        mean_loss += loss.detach()
    return mean_loss


def estimate_hessian(model, raw_model, batch, direction, cfg, autocast, scaler):
    """
    Leave in .grad what the optimizer's update_hessian takes, from a batch (x, y, noise) and all
    ranks, times the scaler's scale. By cfg.hessian_estimator:
      gnb               gradient of the loss against sampled labels (paper, algorithm 2)
      empirical_fisher  gradient of the loss against the true labels: biased, for comparison
      hutchinson        d * (H d), d = direction(parameters) standard normal and H the Hessian of
                        the mean loss (paper, algorithm 1)
    The gradients are then clipped like those of training, as in the official code; Hutchinson's
    estimate, which is none, is not.
    """
    x, y, noise = batch
    settings = cfg.batch_size, autocast, scaler
    if cfg.hessian_estimator == "gnb":
        accumulate_gradients(model, x, noise, sampled_label_loss, *settings)
    elif cfg.hessian_estimator == "empirical_fisher":
        accumulate_gradients(model, x, y, next_token_loss, *settings)
    else:   # not through DDP, which takes part in first derivatives alone
        d = direction(raw_model.parameters())
        accumulate_gradients(raw_model, x, y, lambda model, x, y:
                             model.directional_derivative(x, y, d), *settings)
        for p, d_p in zip(raw_model.parameters(), d):
            ddp.mean(p.grad.mul_(d_p))


def clip_gradients(model, optimizer, scaler, grad_clip):
    """Scale .grad so that its norm is at most grad_clip (0: leave it); returns the norm before."""
    scaler.unscale_(optimizer)
    return torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)


@torch.no_grad()
def evaluate(raw_model, data, autocast):
    """Mean loss over the evaluation windows of all ranks, and its standard error."""
    raw_model.eval()
    losses = []
    for x, y in data.val():
        with autocast:
            losses.append(raw_model.token_losses(x, y).float().mean(dim=1))
    raw_model.train()
    windows = torch.cat(losses).cpu().double() if losses else torch.zeros(0, dtype=torch.double)
    sums = torch.stack([torch.tensor(float(len(windows))), windows.sum(), windows.square().sum()])
    count, total, squares = ddp.total(sums.double()).tolist()
    variance = max(squares / count - (total / count) ** 2, 0.0)
    return total / count, math.sqrt(variance / max(count - 1, 1))


def sample_text(raw_model, tokenizer, eot_id, cfg):
    """Text that the model writes after an end of text, from the same random numbers each time."""
    device = raw_model.lm_head.weight.device
    raw_model.eval()
    ids = raw_model.generate(torch.tensor([[eot_id]], device=device), cfg.sample_tokens, top_k=200,
                             temperature=0.8, eot_id=eot_id,
                             generator=torch.Generator(device).manual_seed(cfg.seed))
    raw_model.train()
    return tokenizer.decode(ids[0, 1:].tolist())


def find_start(cfg, data):
    """
    What the run starts from: None (scratch), a whole checkpoint (resume) or only its model
    (finetune). Rank 0 looks and every rank loads the same file. Raises UserError.
    """
    if cfg.init_from in ("resume", "auto") or ddp.restarted():
        path, problems = ddp.from_main(lambda: checkpoint.newest_good(cfg.out_dir))
        for problem in problems:
            ddp.say(f"{problem}; falling back to the checkpoint before it")
        if path is not None:
            start = checkpoint.load(path)
            if cfg.init_from not in ("resume", "auto") and start["config"] != asdict(cfg):
                checkpoint.check_unused(cfg.out_dir)   # another run, as it was at the first try
            for name in FIXED_KNOBS:
                then = start["config"].get(name, FIELDS[name].default)   # an older checkpoint's
                now = getattr(cfg, name)
                if then != now:
                    raise UserError(f"{path} was made with {name}={then}, not {now}; choose "
                                    f"another --out_dir")
            if start["data"] != data.tokens.fingerprint():
                raise UserError(f"{path} was trained on other data ({start['data']}) than "
                                f"{data.tokens.path} ({data.tokens.fingerprint()})")
            ddp.say(f"resuming from {path}")
            return start
        if cfg.init_from == "resume":
            raise UserError(f"no checkpoint to resume from in {cfg.out_dir}; start one with "
                            f"--init_from=scratch (or auto)")
    elif not cfg.eval_only:
        ddp.from_main(lambda: checkpoint.check_unused(cfg.out_dir))
    if cfg.init_from in ("scratch", "auto"):
        return None
    source = cfg.init_from
    if os.path.isdir(source):
        newest, _ = ddp.from_main(lambda: checkpoint.newest_good(cfg.init_from))
        source = newest or source
    elif source in pretrained.HUB:
        source = ddp.from_main(lambda: pretrained.download(cfg.init_from))
    ddp.say(f"weights from {source}")
    start = pretrained.load(source, data.meta["vocab_size"], cfg.bias)
    return {"model": start["model"], "model_args": start["model_args"]}


def build_model(cfg, vocab_size, start):
    """The GPT on the CPU, so that its initial weights depend on the seed alone; start's weights if
    there are any. Raises UserError if they do not fit cfg or the data."""
    torch.manual_seed(cfg.seed)
    if start is None:
        shape = {name: getattr(cfg, name) for name in MODEL_KNOBS}
        return GPT(GPTConfig(vocab_size, cfg.block_size, dropout=cfg.dropout, **shape))
    args = GPTConfig(**start["model_args"])
    wrong = [name for name in MODEL_KNOBS if getattr(args, name) != getattr(cfg, name)]
    if cfg.block_size > args.block_size:
        wrong.append("block_size")
    if wrong:
        theirs, ours = ([f"{name}={getattr(c, name)}" for name in wrong] for c in (args, cfg))
        raise UserError(f"init_from={cfg.init_from} has {', '.join(theirs)}, this run "
                        f"{', '.join(ours)}; pass {' '.join('--' + word for word in theirs)}")
    if args.vocab_size != vocab_size:
        raise UserError(f"init_from has a vocabulary of {args.vocab_size}, {cfg.dataset} one of "
                        f"{vocab_size}")
    model = GPT(replace(args, dropout=cfg.dropout))
    try:
        model.load_state_dict(start["model"])
    except RuntimeError as error:   # names the tensors
        raise UserError(f"init_from={cfg.init_from}: {shorten(str(error), 300)}") from None
    if cfg.block_size != args.block_size:
        model.crop_block_size(cfg.block_size)
    return model


def describe(cfg, world, data, model, dtype, compile_reason):
    """Print what is about to run: every number that decides what the optimizer sees."""
    steps = cfg.total_batch_size // (cfg.batch_size * world.size)
    epochs = cfg.max_iters * cfg.total_batch_size / data.windows
    memory = memory_estimate(cfg, model, dtype, compile_reason is None)
    total = sum(memory.values())
    parts = " + ".join(f"{name} {size / 1e9:.2f}" for name, size in memory.items())
    batch = (f"{cfg.total_batch_size} sequences = {cfg.tokens_per_step:,} tokens a step = "
             f"{world.size} rank{'s' * (world.size > 1)} x batch_size {cfg.batch_size} x {steps} "
             f"micro-step{'s' * (steps > 1)}")
    if hessian_due(cfg.hessian_interval, cfg):
        remembered = cfg.hessian_interval / (1 - cfg.beta2)
        batch += (f"; Hessian: {cfg.hessian_batch_size} sequences every {cfg.hessian_interval} "
                  f"steps, averaged over {remembered:,.0f} steps "
                  f"({remembered / cfg.max_iters:.0%} of the run)")
    compiled = "compiled" if compile_reason is None else f"eager ({compile_reason})"
    ddp.say(f"data: {cfg.data_dir}, {data.tokens.count:,} training tokens in "
            f"{data.meta['tokenizer']}; {cfg.max_iters} steps are {epochs:.2f} epochs\n"
            f"batch: {batch}\n"
            f"model: {model.num_params() / 1e6:.2f}M parameters, "
            f"{model.flops_per_token() / 1e9:.3f} GFLOP a token\n"
            f"memory: about {total / 1e9:.2f} GB a rank = {parts}\n"
            f"machine: {world.device.type}, {str(dtype).removeprefix('torch.')}, {compiled}")
    if world.device.type == "cuda":
        _, card = torch.cuda.mem_get_info(world.device)
        advice = f"; too little: {less_memory(cfg, world.size)}" if total > card else ""
        ddp.say(f"GPU: {torch.cuda.get_device_name(world.device)} with {card / 1e9:.2f} GB{advice}")


def train(cfg, world):
    device = world.device
    if cfg.deterministic:
        ddp.be_deterministic()
    dtype = ddp.pick_dtype(cfg.dtype, device)
    compile_reason = ddp.pick_compile(cfg.compile, device)
    data = DataLoader(cfg, world)
    start = find_start(cfg, data)
    raw_model = build_model(cfg, data.meta["vocab_size"], start).to(device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    optimizer = make_optimizer(cfg, raw_model, fused=compile_reason is None)
    step, best_step, best_val_loss, metrics_state = 0, 0, float("inf"), None
    resuming = start is not None and "optimizer" in start
    if resuming:
        optimizer.load_state_dict(start["optimizer"])
        scaler.load_state_dict(start["scaler"])
        step, metrics_state = start["step"], start["metrics"]
        best_step, best_val_loss = start["best_step"], start["best_val_loss"]
    first_step = step
    del start   # as large as model and optimizer
    if compile_reason is None:
        raw_model.compile_for_training()
    model = raw_model
    if world.size > 1:
        model = DDP(raw_model, device_ids=[device] if device.type == "cuda" else None,
                    gradient_as_bucket_view=True, forward_sync_buffers=False)

    def save():
        state = metrics.state_dict()
        if world.is_main:
            checkpoint.save(cfg.out_dir, {
                "model": raw_model.state_dict(), "model_args": asdict(raw_model.config),
                "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "step": step,
                "best_step": best_step, "best_val_loss": best_val_loss, "metrics": state,
                "config": asdict(cfg), "tokenizer": data.meta["tokenizer"],
                "data": data.tokens.fingerprint()}, best_step)

    tokenizer = get_tokenizer(data.meta["tokenizer"]) if cfg.sample_tokens else None
    describe(cfg, world, data, raw_model, dtype, compile_reason)
    stop = ddp.StopSignal()
    if not cfg.eval_only:
        ddp.from_main(lambda: checkpoint.lock(cfg.out_dir))
    metrics = Metrics(cfg, world, raw_model.flops_per_token(), peak_flops(device, dtype),
                      metrics_state, step)
    with metrics:
        while True:
            finished = step >= cfg.max_iters
            stopping = stop.seen_by_any_rank()
            evaluating = step % cfg.eval_interval == 0 or finished or cfg.eval_only
            saved_before = resuming and step == first_step and not cfg.eval_only
            if (evaluating or stopping) and not saved_before:
                metrics.check_skipped()   # waits for the device, so that its time counts
                metrics.stop_clock()
                if evaluating:
                    val_loss, stderr = evaluate(raw_model, data, autocast)
                    metrics.log_eval(step, val_loss, stderr)
                    if tokenizer and world.is_main:
                        metrics.log_sample(step, sample_text(raw_model, tokenizer,
                                                             data.meta["eot_id"], cfg))
                    if val_loss < best_val_loss:
                        best_step, best_val_loss = step, val_loss
                if step > 0 and not cfg.eval_only:
                    save()
            if finished or stopping or cfg.eval_only:
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
            optimizer.found_inf = metrics.observe(step, loss, grad_norm)   # 1: skip this update
            optimizer.step()   # scaler.step would wait for the device to know what found_inf says
            scaler.update()

            if hessian_due(step, cfg):
                update = step // cfg.hessian_interval - 1
                estimate_hessian(model, raw_model, data.hessian(update),
                                 partial(data.direction, update), cfg, autocast, scaler)
                norm = clip_gradients(raw_model, optimizer, scaler,
                                      cfg.grad_clip if cfg.squares_gradient else 0)
                optimizer.found_inf = metrics.skip_if_not_finite(norm)
                optimizer.update_hessian(square=cfg.squares_gradient)
                scaler.update()

            if step % cfg.log_interval == 0:
                metrics.log_step(step, loss, lr, grad_norm, statistics(optimizer))
    if stopping and not finished:
        ddp.say(f"stopped by a signal after step {step}; go on with --init_from=auto")
    elif not cfg.eval_only:
        ddp.say(f"finished at step {step}: best val loss {best_val_loss:.4f} at step {best_step}. "
                f"Text from it: python sample.py {cfg.out_dir}")


def main(argv):
    cfg = load_config(argv, ddp.world_size())
    with ddp.naming_lost_ranks(), ddp.naming_batch_size(cfg):
        train(cfg, ddp.join(cfg.device, cfg.backend))
    ddp.leave()


if __name__ == "__main__":
    run_script(main)
