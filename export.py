"""
A trained model as a plain GPT-2 in Hugging Face's format, for any runtime that reads GPT-2.

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
    The weights of model, in dtype, under the names of GPT2LMHeadModel. Conv1D holds (in, out) and
    has a bias, zero where we have none; the tied head is not stored.

    Most runtimes neither scale attention by layer nor expect more rows than tokens. The scale is
    therefore folded into the query, in which attention scores are linear, and padding is cut off.
    """
    c, weights = model.config, {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        if name == "transformer.wte.weight":
            tensor = tensor[:c.vocab_size]
        if ".c_attn." in name and c.scale_attn_by_inverse_layer_idx:
            query, key_value = tensor.split([c.n_embd, 2 * c.n_embd])
            tensor = torch.cat([query / (int(name.split(".")[2]) + 1), key_value])
        weights[name] = (tensor.t() if is_conv1d(name) else tensor).to(dtype).contiguous()
        if is_conv1d(name) or ".ln_" in name and name.endswith(".weight"):
            weights.setdefault(name.replace(".weight", ".bias"), torch.zeros(len(tensor),
                                                                             dtype=dtype))
    return weights


def hf_config(config, eot_id, dtype):
    """Contents of config.json: keys of OpenAI's, and dtype."""
    return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2",
            "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
            "vocab_size": config.vocab_size, "n_positions": config.block_size,
            "n_ctx": config.block_size, "n_layer": config.n_layer, "n_head": config.n_head,
            "n_embd": config.n_embd, "resid_pdrop": config.dropout, "embd_pdrop": config.dropout,
            "attn_pdrop": config.dropout, "bos_token_id": eot_id, "eos_token_id": eot_id,
            "dtype": dtype}


def merge_of(token, ids):
    """The two tokens that byte-pair encoding joined last into `token`, an entry of {bytes: id}."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        ranks = [ids.get(a + b, len(ids)) for a, b in zip(parts, parts[1:])]
        i = ranks.index(min(ranks))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def hf_tokenizer(tokenizer):
    """Contents of tokenizer.json and tokenizer_config.json: byte-level BPE for both of our
    tokenizers, bytes having no merges."""
    ids = tokenizer.byte_strings()
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [b for b in range(256) if b not in printable]
    letter = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}

    def spell(token):
        return "".join(letter[b] for b in token)

    merges = [[spell(part) for part in merge_of(token, ids)] for token in ids if len(token) > 1]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": True}
    end = {"id": tokenizer.eot_id, "content": END_OF_TEXT, "single_word": False, "lstrip": False,
           "rstrip": False, "normalized": False, "special": True}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [end],
            "normalizer": None, "pre_tokenizer": byte_level, "post_processor": None,
            "decoder": byte_level,
            "model": {"type": "BPE", "dropout": None, "unk_token": None,
                      "continuing_subword_prefix": None, "end_of_word_suffix": None,
                      "fuse_unk": False, "byte_fallback": False,
                      "vocab": {spell(token): i for token, i in ids.items()}
                      | {END_OF_TEXT: tokenizer.eot_id}, "merges": merges}}, {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT,   # CTranslate2 needs one
            "clean_up_tokenization_spaces": False}


def main(argv):
    parser = ArgumentParser(__doc__)
    parser.add_argument("run", help="run directory (its best checkpoint) or checkpoint file")
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
                        help="of the weights in the file")
    args = parser.parse_args(argv)
    if os.path.exists(args.out):
        raise UserError(f"{args.out} exists; choose another --out")
    path = checkpoint.find_best(args.run)
    saved = checkpoint.load(path)
    tokenizer = get_tokenizer(saved["tokenizer"])
    model = GPT(GPTConfig(**saved["model_args"]))
    model.load_state_dict(saved["model"])
    tokens, tokens_config = hf_tokenizer(tokenizer)
    files = {name: json.dumps(content, indent=2, ensure_ascii=False).encode() for name, content in (
        ("config.json", hf_config(model.config, tokenizer.eot_id, args.dtype)),
        ("tokenizer.json", tokens), ("tokenizer_config.json", tokens_config))}
    files["model.safetensors"] = save(hf_weights(model, getattr(torch, args.dtype)),
                                      metadata={"format": "pt"})
    unfinished = args.out.rstrip("/") + ".tmp"
    for name, content in files.items():
        write_atomically(os.path.join(unfinished, name),
                         lambda file, content=content: file.write(content))
    os.replace(unfinished, args.out)
    print(f"{path}, step {saved['step']}: wrote {args.out}. "
          f"AutoModelForCausalLM.from_pretrained({args.out!r}) loads it")


if __name__ == "__main__":
    run_script(main)
