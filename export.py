"""
Export a trained model as a plain GPT-2 in Hugging Face's format, for any runtime that loads GPT-2.

    python export.py out/quickstart-sophiag --out=exported --dtype=bfloat16
"""
import json
import os

import torch
from safetensors.torch import save

import checkpoint
from init_from import is_conv1d
from model import GPT, GPTConfig
from script import ArgumentParser, UserError, run_script, write_atomically
from tokenizer import get_tokenizer

END_OF_TEXT = "<|endoftext|>"


def hf_weights(model, dtype):
    """
    State dict of GPT2LMHeadModel in dtype, without the tied head. Missing biases become zeros.
    Most runtimes support neither attention scaled by layer nor a padded embedding. So the scale is
    folded into the query projection, and the padded rows are cut off.
    """
    c, weights, state = model.config, {}, model.state_dict()
    del state["lm_head.weight"]
    state["transformer.wte.weight"] = state["transformer.wte.weight"][:c.vocab_size]
    for name, tensor in state.items():
        if ".c_attn." in name and c.scale_attn_by_inverse_layer_idx:
            query, key_value = tensor.split([c.n_embd, 2 * c.n_embd])
            tensor = torch.cat([query / (int(name.split(".")[2]) + 1), key_value])
        # Conv1D stores (in, out), the transpose of Linear.
        weights[name] = (tensor.t() if is_conv1d(name) else tensor).to(dtype).contiguous()
        if is_conv1d(name) or ".ln_" in name and name.endswith(".weight"):
            bias = name.replace(".weight", ".bias")
            weights.setdefault(bias, torch.zeros(len(tensor), dtype=dtype))
    return weights


def hf_config(c, eot_id, dtype):
    """Contents of config.json, from a GPTConfig."""
    return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2",
            "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
            "vocab_size": c.vocab_size, "n_positions": c.block_size, "n_ctx": c.block_size,
            "n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), c.dropout),
            "bos_token_id": eot_id, "eos_token_id": eot_id, "dtype": dtype}


def last_merge(token, ids):
    """The two tokens whose merge gives `token`. ids: {bytes: id}; lower ids merge first."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        ranks = [ids.get(a + b, len(ids)) for a, b in zip(parts, parts[1:])]
        i = ranks.index(min(ranks))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def hf_tokenizer(tokenizer):
    """Contents of tokenizer.json and tokenizer_config.json, as byte-level BPE."""
    ids = tokenizer.byte_strings()
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [b for b in range(256) if b not in printable]
    char_of = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    spelling = {token: "".join(char_of[b] for b in token) for token in ids}   # as GPT-2 spells it
    merges = [[spelling[part] for part in last_merge(t, ids)] for t in ids if len(t) > 1]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": True}
    end_of_text = {"id": tokenizer.eot_id, "content": END_OF_TEXT, "special": True,
                   **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)}
    vocab = {spelling[token]: i for token, i in ids.items()} | {END_OF_TEXT: tokenizer.eot_id}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
             "vocab": vocab, "merges": merges}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [end_of_text],
            "normalizer": None, "pre_tokenizer": byte_level, "post_processor": None,
            "decoder": byte_level, "model": model}, {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT,   # CTranslate2 requires it
            "clean_up_tokenization_spaces": False}


def main(argv):
    parser = ArgumentParser(__doc__)
    parser.add_argument("run", help="run directory (its best checkpoint) or checkpoint file")
    parser.add_argument("--out", required=True, help="folder to create")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    args = parser.parse_args(argv)
    if os.path.exists(args.out):
        raise UserError(f"{args.out} exists; choose another --out")
    path = checkpoint.find_best(args.run)
    saved = checkpoint.load(path)
    tokenizer = get_tokenizer(saved["tokenizer"])
    if tokenizer.eot_id is None:
        raise UserError(f"{path} cannot be exported: its tokens are the characters of a meta.pkl, "
                        f"and GPT-2's tokenizers need an end-of-text token")
    model = GPT(GPTConfig(**saved["model_args"]))
    model.load_state_dict(saved["model"])
    tokenizer_json, tokenizer_config = hf_tokenizer(tokenizer)
    contents = {"config.json": hf_config(model.config, tokenizer.eot_id, args.dtype),
                "tokenizer.json": tokenizer_json, "tokenizer_config.json": tokenizer_config}
    files = {name: json.dumps(content, indent=2, ensure_ascii=False).encode()
             for name, content in contents.items()}
    files["model.safetensors"] = save(hf_weights(model, getattr(torch, args.dtype)),
                                      metadata={"format": "pt"})
    temporary = args.out.rstrip("/") + ".tmp"
    for name, content in files.items():
        write_atomically(os.path.join(temporary, name), content)
    os.replace(temporary, args.out)
    print(f"{path}, step {saved['step']}: wrote {args.out}. "
          f"Load it with AutoModelForCausalLM.from_pretrained({args.out!r})")


if __name__ == "__main__":
    run_script(main)
