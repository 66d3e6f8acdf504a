"""
Generate text with a trained model.

    python sample.py out/quickstart-sophiag --prompt="def "
    python sample.py out/run/ckpt_00010000.pt --prompt=FILE:prompt.txt --num_samples=5 --top_k=50
"""
import time

import torch

import checkpoint
from device import pick_device
from model import GPT, GPTConfig
from script import ArgumentParser, UserError, run_script
from tokenizer import get_tokenizer


def main(argv):
    parser = ArgumentParser(__doc__)
    parser.add_argument("run", help="run directory (its best checkpoint) or checkpoint file")
    parser.add_argument("--prompt", default="", help="text, or FILE:path; empty: a new document")
    parser.add_argument("--num_samples", type=int, default=1, help="1: print tokens as they come")
    parser.add_argument("--max_new_tokens", type=int, default=500)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: greedy")
    parser.add_argument("--top_k", type=int, default=200, help="0: no limit")
    parser.add_argument("--top_p", type=float, default=1.0, help="nucleus sampling; 1: no limit")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--device", default="auto", help="auto | cuda | mps | cpu")
    args = parser.parse_args(argv)
    if args.num_samples < 1 or args.max_new_tokens < 1 or args.top_k < 0:
        raise UserError("num_samples and max_new_tokens must be at least 1, top_k at least 0")
    finite = 0 <= args.temperature < float("inf") and 0 <= args.seed < 2**63
    if not (0 < args.top_p <= 1 and finite):
        raise UserError("top_p must be in (0, 1], temperature and seed finite and at least 0")
    prompt = args.prompt
    if prompt.startswith("FILE:"):
        try:
            with open(prompt[5:], encoding="utf-8") as file:
                prompt = file.read()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {prompt[5:]}: {error}") from None

    path = checkpoint.find_best(args.run)
    saved = checkpoint.load(path)
    tokenizer = get_tokenizer(saved["tokenizer"])
    device = pick_device(args.device)
    model = GPT(GPTConfig(**saved["model_args"]))
    model.load_state_dict(saved["model"])
    model.eval().to(device)
    print(f"{path}: {model.num_params() / 1e6:.2f}M parameters, step {saved['step']}")

    ids = tokenizer.encode(prompt) or [tokenizer.start_id]   # in training, a document follows it
    if max(ids) >= model.config.vocab_size:
        raise UserError(f"the model in {path} has {model.config.vocab_size} tokens, fewer than "
                        f"its tokenizer {tokenizer.name}")
    generator = torch.Generator(device).manual_seed(args.seed)
    start = time.perf_counter()
    stream = model.stream(torch.tensor([ids] * args.num_samples, device=device),
                          args.max_new_tokens, args.temperature, args.top_k or None,
                          None if args.top_p == 1 else args.top_p, tokenizer.eot_id, generator)
    rows, printed = [ids] * args.num_samples, ""
    print("-" * 80)
    for new_tokens in stream:
        rows = [[*row, token] for row, token in zip(rows, new_tokens.tolist())]
        text = tokenizer.decode(rows[0])
        if args.num_samples == 1 and not text.endswith("\ufffd"):   # an incomplete character
            print(text[len(printed):], end="", flush=True)
            printed = text
    seconds = time.perf_counter() - start
    print(tokenizer.decode(rows[0])[len(printed):])
    for row in rows[1:]:
        print("-" * 80, tokenizer.decode(row), sep="\n")
    print("-" * 80)
    print(f"{sum(len(row) - len(ids) for row in rows)} tokens in {seconds:.1f} s")


if __name__ == "__main__":
    run_script(main)
