"""
A trained model as a folder for Hugging Face's transformers and what reads its files.

    python export.py out/quickstart-sophiag --out=exported
"""
import json
import os

from safetensors.torch import save

import checkpoint
from configurator import ArgumentParser, UserError, run_script, write_atomically
from model import GPT, GPTConfig
from pretrained import hf_config, hf_weights
from sample import best_checkpoint
from tokenizer import get_tokenizer

END_OF_TEXT = "<|endoftext|>"


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
            "eos_token": END_OF_TEXT, "clean_up_tokenization_spaces": False}


def main(argv):
    parser = ArgumentParser(__doc__)
    parser.add_argument("run", help="run directory (its best checkpoint) or checkpoint file")
    parser.add_argument("--out", required=True, help="folder to make")
    args = parser.parse_args(argv)
    if os.path.exists(args.out):
        raise UserError(f"{args.out} exists; choose another --out")
    path = best_checkpoint(args.run)
    saved = checkpoint.load(path)
    tokenizer = get_tokenizer(saved["tokenizer"])
    model = GPT(GPTConfig(**saved["model_args"]))
    model.load_state_dict(saved["model"])
    config, generation = hf_config(model.config, tokenizer.eot_id)
    tokens, tokens_config = hf_tokenizer(tokenizer)
    files = {name: json.dumps(content, indent=2, ensure_ascii=False).encode()
             for name, content in (("config.json", config), ("generation_config.json", generation),
                                   ("tokenizer.json", tokens),
                                   ("tokenizer_config.json", tokens_config))}
    files["model.safetensors"] = save(hf_weights(model), metadata={"format": "pt"})
    unfinished = args.out.rstrip("/") + ".tmp"
    for name, content in files.items():
        write_atomically(os.path.join(unfinished, name),
                         lambda file, content=content: file.write(content))
    os.replace(unfinished, args.out)
    print(f"{path}, step {saved['step']}: wrote {args.out}. "
          f"AutoModelForCausalLM.from_pretrained({args.out!r}) loads it")


if __name__ == "__main__":
    run_script(main)
