"""
Weights from elsewhere: Hugging Face's GPT-2, and ckpt.pt of nanoGPT and the official Sophia code.
"""
import json
import os
import re

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file

import checkpoint
from configurator import UserError
from model import GPTConfig

HUB = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")   # OpenAI's
SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
# What our GPT computes, in the words of config.json. The first is meant where one is left out.
FIXED = {"model_type": ["gpt2"], "activation_function": ["gelu_new", "gelu_pytorch_tanh"],
         "layer_norm_epsilon": [1e-5], "scale_attn_weights": [True],
         "add_cross_attention": [False], "tie_word_embeddings": [True]}


def is_linear(name):
    """Whether Hugging Face stores this weight as Conv1D, (in, out), where we have (out, in)."""
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def download(name):
    """The folder of one of HUB, from the cache or the network. Raises UserError."""
    from huggingface_hub import hf_hub_download  # only when asked for
    repo = f"openai-community/{name}"
    try:
        hf_hub_download(repo, "model.safetensors")
        return os.path.dirname(hf_hub_download(repo, "config.json"))
    except Exception as error:   # of the hub, the network or the disk
        raise UserError(f"cannot download {repo} from Hugging Face ({type(error).__name__}); fetch "
                        f"its config.json and model.safetensors on another machine and pass "
                        f"--init_from=FOLDER") from None


def read_folder(folder):
    """config.json with block_size added, and the tensors, Linear weights (out, in)."""
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
                        f"files: there is no {os.path.basename(path)}") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError,
            SafetensorError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    for key, ours in FIXED.items():
        if config.get(key, ours[0]) not in ours:
            raise UserError(f"{folder}/config.json has {key}={config[key]!r}, this GPT "
                            f"{' or '.join(map(repr, ours))}")
    config["block_size"] = config.get("n_positions")
    return config, {name: t.transpose(0, -1) if is_linear(name) else t
                    for name, t in weights.items()}


def load(source, vocab_size, bias):
    """
    A dict with model, a state_dict of GPT, and model_args, those of GPTConfig. source: a folder in
    Hugging Face's format or with a ckpt.pt, or a file, ours, nanoGPT's or official Sophia's. Raises
    UserError.

    vocab_size: tokens of the data. The file's embedding has a row for each, and is then padded with
    zeros, or is padded as ours.
    bias: whether to keep biases that are all zero, as they are where export.py made them up.

    A ckpt.pt that does not say whether attention is scaled by layer is nanoGPT's, where it is not.
    Recent nanoGPT computes the exact GELU, where OpenAI, Sophia and we take the tanh approximation
    (within 5e-4 of it), and its files do not tell.
    """
    if os.path.exists(os.path.join(source, "ckpt.pt")):
        source = os.path.join(source, "ckpt.pt")
    if os.path.isdir(source):
        return adapted(source, *read_folder(source), vocab_size, bias)
    saved = checkpoint.read(source)
    if "iter_num" in saved:   # ours has step
        return adapted(source, saved.get("model_args"), saved.get("model"), vocab_size, bias)
    checkpoint.check(saved, source)
    return saved


def adapted(source, config, found, vocab_size, bias):
    """What load returns, of the sizes and tensors that were found in source."""
    if not (isinstance(config, dict) and isinstance(found, dict)
            and all(map(torch.is_tensor, found.values()))):
        raise UserError(f"{source} holds no model_args or something else than weights in model")
    for size in SIZES:
        if type(config.get(size)) is not int:
            raise UserError(f"{source} has {size}={config.get(size)!r}, no whole number (block_size"
                            f" is n_positions of config.json)")
    if config.get("n_inner") not in (None, 4 * config["n_embd"]):
        raise UserError(f"{source} has n_inner={config['n_inner']!r}, this GPT 4 x n_embd = "
                        f"{4 * config['n_embd']}")
    # torch.compile, DDP and GPT2LMHeadModel each put a prefix before a name.
    found = {re.sub(r"^((_orig_mod|module|transformer)\.)*", "", str(name)): tensor
             for name, tensor in found.items()}
    for name, rows in ("wte.weight", "vocab_size"), ("wpe.weight", "block_size"):
        shape = tuple(found[name].shape) if name in found else None
        if shape != (config[rows], config["n_embd"]):
            raise UserError(f"{source}: {name} has shape {shape}, not the {rows} x n_embd = "
                            f"{config[rows]} x {config['n_embd']} that the sizes imply")
    head = found.pop("lm_head.weight", found["wte.weight"])
    if not torch.equal(head, found["wte.weight"]):
        raise UserError(f"{source}: lm_head.weight is not the token embedding, wte.weight")
    causal_masks = (".attn.bias", ".attn.masked_bias")
    weights = {f"transformer.{name}": tensor for name, tensor in found.items()
               if not name.endswith(causal_masks)} | {"lm_head.weight": head}
    biases = [name for name in weights if name.endswith(".bias")]
    has_bias = bool(biases) and (bias or any(weights[name].any() for name in biases))
    args = {**{size: config[size] for size in SIZES}, "vocab_size": vocab_size, "bias": has_bias,
            "scale_attn_by_inverse_layer_idx": config.get("scale_attn_by_inverse_layer_idx", False)}
    padded = GPTConfig(vocab_size).padded_vocab_size
    if config["vocab_size"] not in (vocab_size, padded):
        raise UserError(f"{source} has a vocabulary of {config['vocab_size']} rows, the data one "
                        f"of {vocab_size}: made with another tokenizer")
    for name in "transformer.wte.weight", "lm_head.weight":
        weights[name] = F.pad(weights[name], (0, 0, 0, padded - config["vocab_size"]))
    return {"model": {name: tensor for name, tensor in weights.items()
                      if has_bias or name not in biases},
            "model_args": args}
