"""export.py: what transformers loads is our model and our tokenizer."""
import json

import pytest
import torch
from conftest import run, train
from transformers import AutoModelForCausalLM, AutoTokenizer

import checkpoint
from export import hf_tokenizer
from model import GPT, GPTConfig
from sample import best_checkpoint
from tokenizer import get_tokenizer

TEXTS = ["def f(x):\n    return x", "naïve 東京 🙂 <b>\x00\x7f", "  two  spaces\t\n\n\n",
         "it's 1,234.5"]


@pytest.mark.parametrize("bias", [False, True])
def test_exported_run_gives_equal_logits_and_greedy_text(tiny_data, tmp_path, bias):
    train(tmp_path / "run", tiny_data, optimizer="adamw", learning_rate=1e-2, max_iters=20,
          bias=bias)
    done = run("export.py", str(tmp_path / "run"), f"--out={tmp_path}/hf")
    assert done.returncode == 0, done.stderr
    saved = checkpoint.load(best_checkpoint(str(tmp_path / "run")))
    ours = GPT(GPTConfig(**saved["model_args"])).eval()
    ours.load_state_dict(saved["model"])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    c = ours.config
    x = torch.randint(c.vocab_size, (2, c.block_size))
    with torch.no_grad():
        torch.testing.assert_close(theirs(x).logits[..., :c.vocab_size], ours(x), rtol=0, atol=1e-4)
    n, eot_id = c.block_size // 2, get_tokenizer(saved["tokenizer"]).eot_id
    greedy = theirs.generate(x[:1, :n], max_new_tokens=n, do_sample=False)[0].tolist()
    expected = ours.generate(x[:1, :n], n, temperature=0, eot_id=eot_id)[0].tolist()
    assert greedy == expected
    again = run("export.py", str(tmp_path / "run"), f"--out={tmp_path}/hf")
    assert again.returncode == 2 and "exists" in again.stderr


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_exported_tokenizer_gives_our_ids(tmp_path, name):
    ours = get_tokenizer(name)
    for file, content in zip(("tokenizer.json", "tokenizer_config.json"), hf_tokenizer(ours)):
        (tmp_path / file).write_text(json.dumps(content))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    assert theirs.eos_token_id == ours.eot_id and len(theirs) == ours.vocab_size
