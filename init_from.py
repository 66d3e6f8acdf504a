"""
Where a run starts, --init_from: a new model, a checkpoint of this run, or weights of another run,
of Hugging Face's GPT-2, of nanoGPT or of the official Sophia code.
"""
import json
import os
import re
from dataclasses import asdict, replace
from textwrap import shorten

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file

import checkpoint
import ddp
from configurator import FIELDS
from model import GPT, GPTConfig
from script import UserError

MODEL_KNOBS = ("n_layer", "n_head", "n_embd", "bias", "scale_attn_by_inverse_layer_idx")
# A run cannot resume with another value of these.
FIXED_KNOBS = (*MODEL_KNOBS, "block_size", "optimizer", "hessian_estimator", "seed",
               "total_batch_size")
HUB = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")   # OpenAI's weights
SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
# What our GPT computes, in the terms of config.json. The first value is Hugging Face's default.
HF_REQUIRED = {"model_type": ["gpt2"], "activation_function": ["gelu_new", "gelu_pytorch_tanh"],
               "layer_norm_epsilon": [1e-5], "scale_attn_weights": [True],
               "add_cross_attention": [False], "tie_word_embeddings": [True]}


def find_start(cfg, data):
    """
    What the run starts from: None (a new model), a whole checkpoint (resume), or a dict of model
    and model_args (finetune). Rank 0 picks the file; every rank loads it. Raises UserError.
    """
    if cfg.init_from in ("resume", "auto") or ddp.restarted():
        path, problems = ddp.broadcast_from_rank0(lambda: checkpoint.find_latest(cfg.out_dir))
        for problem in problems:
            ddp.print0(f"{problem}; falling back to the previous checkpoint")
        if path is not None:
            return resume(path, cfg, data)
        if cfg.init_from == "resume":
            raise UserError(f"no checkpoint to resume from in {cfg.out_dir}; start a run with "
                            f"--init_from=scratch (or auto)")
    elif not cfg.eval_only:
        ddp.broadcast_from_rank0(lambda: checkpoint.check_unused(cfg.out_dir))
    if cfg.init_from in ("scratch", "auto"):
        return None
    source = cfg.init_from
    if os.path.isdir(source):
        latest, _ = ddp.broadcast_from_rank0(lambda: checkpoint.find_latest(cfg.init_from))
        source = latest or source
    elif source in HUB:
        source = ddp.broadcast_from_rank0(lambda: download(cfg.init_from))
    ddp.print0(f"weights from {source}")
    start = load_weights(source, data.meta["vocab_size"], cfg.bias)
    if start.pop("tokenizer", data.meta["tokenizer"]) != data.meta["tokenizer"]:
        raise UserError(f"{source} was trained with another tokenizer than {cfg.data_dir}")
    return start


def is_checkpoint(start):
    """Whether find_start returned a checkpoint to resume from."""
    return start is not None and "optimizer" in start


def resume(path, cfg, data):
    """The checkpoint at path. Raises UserError if it belongs to another run or other data."""
    start = checkpoint.load(path)
    saved = {**start["config"], "batch_size": cfg.batch_size}   # what fits can change
    if cfg.init_from not in ("resume", "auto") and saved != asdict(cfg):
        # torchrun restarted this run, but the checkpoint was there before it.
        checkpoint.check_unused(cfg.out_dir)
    for name in FIXED_KNOBS:
        then = start["config"].get(name, FIELDS[name].default)   # an older checkpoint may lack it
        now = getattr(cfg, name)
        if then != now:
            raise UserError(f"{path} was made with {name}={then}, not {now}; choose another "
                            f"--out_dir")
    if start["data"] != data.tokens.fingerprint():
        raise UserError(f"{path} was trained on other data ({start['data']}) than "
                        f"{data.tokens.path} ({data.tokens.fingerprint()})")
    ddp.print0(f"resuming from {path}")
    return start


def build_model(cfg, vocab_size, start):
    """
    The GPT with start's weights, or with new ones that depend on the seed alone: they are drawn on
    the CPU. Raises UserError if start does not fit cfg or the data.
    """
    torch.manual_seed(cfg.seed)
    if start is None:
        shape = {name: getattr(cfg, name) for name in (*MODEL_KNOBS, "init_std")}
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
    except RuntimeError as error:   # it names the tensors
        raise UserError(f"init_from={cfg.init_from}: {shorten(str(error), 300)}") from None
    if cfg.block_size != args.block_size:
        model.crop_block_size(cfg.block_size)
    return model


def download(name):
    """The folder of a model in HUB, from the cache or the network. Raises UserError."""
    from huggingface_hub import hf_hub_download  # slow to import
    repo = f"openai-community/{name}"
    try:
        hf_hub_download(repo, "model.safetensors")
        return os.path.dirname(hf_hub_download(repo, "config.json"))
    except Exception as error:   # from the hub, the network or the disk
        raise UserError(f"cannot download {repo} from Hugging Face ({type(error).__name__}); fetch "
                        f"its config.json and model.safetensors on another machine and pass "
                        f"--init_from=FOLDER") from None


def is_conv1d(name):
    """Whether Hugging Face stores this Linear weight as Conv1D: (in, out) instead of (out, in)."""
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def read_hf_folder(folder):
    """(config.json with block_size added, {name: tensor}), with Linear weights (out, in)."""
    path = os.path.join(folder, "config.json")
    weights, names = {}, ["model.safetensors"]
    try:
        with open(path, encoding="utf-8") as file:
            config = {**json.load(file)}
        path = os.path.join(folder, "model.safetensors.index.json")
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                names = {os.path.basename(name) for name in json.load(file)["weight_map"].values()}
        for name in names:
            path = os.path.join(folder, name)
            weights |= load_file(path)
    except FileNotFoundError:
        raise UserError(f"{folder} has neither a checkpoint of train.py nor all of Hugging Face's "
                        f"files: {os.path.basename(path)} is missing") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError,
            SafetensorError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    for key, ours in HF_REQUIRED.items():
        if config.get(key, ours[0]) not in ours:
            raise UserError(f"{folder}/config.json has {key}={config[key]!r}; this GPT needs "
                            f"{' or '.join(map(repr, ours))}")
    config["block_size"] = config.get("n_positions")
    return config, {name: t.transpose(0, -1) if is_conv1d(name) else t
                    for name, t in weights.items()}


def load_weights(source, vocab_size, bias):
    """
    {"model": state_dict of our GPT, "model_args": those of GPTConfig}, and of our checkpoints also
    "tokenizer". source: a file (a checkpoint of ours, nanoGPT's or official Sophia's) or a folder
    (with a ckpt.pt, or Hugging Face's). Raises UserError.

    vocab_size: tokens of the data. The embedding in source has one row per token, which we pad with
    zeros, or is already padded like ours.
    bias: whether to keep biases that are all zero, such as those that export.py adds.

    A ckpt.pt that does not say whether attention is scaled by layer is nanoGPT's: it is not scaled.
    Recent nanoGPT computes the exact GELU; OpenAI, Sophia and we use the tanh approximation (within
    5e-4). Its files do not tell which.
    """
    if os.path.exists(os.path.join(source, "ckpt.pt")):
        source = os.path.join(source, "ckpt.pt")
    if os.path.isdir(source):
        return convert(source, *read_hf_folder(source), vocab_size, bias)
    saved = checkpoint.read(source)
    if "iter_num" in saved:   # ours has step
        return convert(source, saved.get("model_args"), saved.get("model"), vocab_size, bias)
    checkpoint.check(saved, source)
    return {key: saved[key] for key in ("model", "model_args", "tokenizer")}


def convert(source, config, found, vocab_size, bias):
    """load_weights' result from the sizes and tensors in source."""
    if not (isinstance(config, dict) and isinstance(found, dict)
            and all(map(torch.is_tensor, found.values()))):
        raise UserError(f"{source} has no model_args, or its model is not a dict of tensors")
    for size in SIZES:
        if type(config.get(size)) is not int:
            raise UserError(f"{source} has {size}={config.get(size)!r}, not an integer (block_size "
                            f"is n_positions in config.json)")
    # torch.compile, DDP and GPT2LMHeadModel each add a prefix to a name.
    found = {re.sub(r"^((_orig_mod|module|transformer)\.)*", "", str(name)): tensor
             for name, tensor in found.items()}
    for name, rows in ("wte.weight", "vocab_size"), ("wpe.weight", "block_size"):
        shape = tuple(found[name].shape) if name in found else None
        if shape != (config[rows], config["n_embd"]):
            raise UserError(f"{source}: {name} has shape {shape}, but {rows} x n_embd is "
                            f"{config[rows]} x {config['n_embd']}")
    head = found.pop("lm_head.weight", found["wte.weight"])
    if not torch.equal(head, found["wte.weight"]):
        raise UserError(f"{source}: lm_head.weight differs from the token embedding, wte.weight")
    causal_masks = (".attn.bias", ".attn.masked_bias")
    weights = {f"transformer.{name}": tensor for name, tensor in found.items()
               if not name.endswith(causal_masks)} | {"lm_head.weight": head}
    biases = [name for name in weights if name.endswith(".bias")]
    has_bias = bool(biases) and (bias or any(weights[name].any() for name in biases))
    args = {**{size: config[size] for size in SIZES}, "vocab_size": vocab_size, "bias": has_bias,
            "scale_attn_by_inverse_layer_idx": config.get("scale_attn_by_inverse_layer_idx", False)}
    padded = GPTConfig(vocab_size).padded_vocab_size
    if config["vocab_size"] not in (vocab_size, padded):
        raise UserError(f"{source} has a vocabulary of {config['vocab_size']}, the data one of "
                        f"{vocab_size}: they use different tokenizers")
    for name in "transformer.wte.weight", "lm_head.weight":
        weights[name] = F.pad(weights[name], (0, 0, 0, padded - config["vocab_size"]))
    return {"model": {name: tensor for name, tensor in weights.items()
                      if has_bias or name not in biases},
            "model_args": args}
