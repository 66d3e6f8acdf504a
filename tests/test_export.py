"""export.py: other runtimes compute the same logits from the export, and train.py loads it."""
import json
from dataclasses import asdict

import ctranslate2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, records, run, train, write_data
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import checkpoint
import init_from
from export import hf_tokenizer
from model import GPT, GPTConfig
from tokenizer import get_tokenizer

TEXTS = ["def f(x):\n    return x", "naïve 東京 🙂 <b>\x00\x7f", "  two  spaces\t\n\n\n",
         "it's 1,234.5"]
V, CONTEXT = 257, TINY["block_size"]   # bytes and end of text, padded to 320
PLAIN = "--scale_attn_by_inverse_layer_idx=False"


@pytest.fixture(scope="module", params=[False, True], ids=["no bias", "bias"])
def ours(request):
    """A GPT with attention scaled by layer. Every tensor influences its logits."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(V, CONTEXT, n_layer=3, n_head=2, n_embd=32, bias=request.param)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.3)
            if ".ln_" in name and name.endswith("weight"):
                p += 1
    return model


@pytest.fixture
def exported(ours, tmp_path):
    """A function that exports `ours` with the given flags and returns the folder. The run itself is
    in tmp_path / "run"."""
    checkpoint.save(tmp_path / "run", {
        "model": ours.state_dict(), "model_args": asdict(ours.config), "optimizer": {}, "step": 1,
        "best_step": 1, "config": {}, "tokenizer": "bytes", "data": {}}, 1)

    def export(*words):
        folder = tmp_path / "-".join(("hf", *words))
        done = run("export.py", tmp_path / "run", f"--out={folder}", *words)
        assert done.returncode == 0, done.stderr
        return folder
    return export


@torch.no_grad()
def test_other_runtimes_give_our_logits_and_greedy_text(ours, exported, tmp_path):
    folder = exported()
    x = torch.randint(V, (2, CONTEXT), generator=torch.Generator().manual_seed(0))
    logits = ours(x)
    unscaled = GPT(GPTConfig(**{**asdict(ours.config), "scale_attn_by_inverse_layer_idx": False}))
    unscaled.load_state_dict(ours.state_dict())
    assert (unscaled.eval()(x) - logits).abs().max() > 0.1   # a runtime must not ignore the scale
    n = CONTEXT // 2
    greedy = ours.generate(x[:1, :n], n, temperature=0, eot_id=V - 1)[0, n:].tolist()

    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(theirs(x).logits, logits, rtol=0, atol=1e-4)
    assert theirs.generate(x[:1, :n], max_new_tokens=n, do_sample=False)[0, n:].tolist() == greedy

    ctranslate2.converters.TransformersConverter(str(folder)).convert(str(tmp_path / "ct2"))
    generator = ctranslate2.Generator(str(tmp_path / "ct2"), device="cpu", intra_threads=1)
    found = torch.from_numpy(np.array(generator.forward_batch(x.tolist())))
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-4)
    prompt = AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(x[0, :n].tolist())
    result, = generator.generate_batch([prompt], max_length=n, beam_size=1,
                                       include_prompt_in_result=False)
    assert result.sequences_ids[0] == greedy


def test_config_is_a_plain_gpt2_config(ours, exported):
    folder = exported()
    assert json.loads((folder / "config.json").read_text()) == {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": V,
        "n_positions": CONTEXT, "n_ctx": CONTEXT, "n_layer": 3, "n_head": 2, "n_embd": 32,
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "resid_pdrop": 0.0,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": V - 1, "eos_token_id": V - 1,
        "dtype": "float32"}
    again = run("export.py", folder.parent / "run", f"--out={folder}")
    assert again.returncode == 2 and "exists" in again.stderr


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_the_weights(ours, exported, dtype):
    name = str(dtype).removeprefix("torch.")
    half = exported(f"--dtype={name}")
    precise = load_file(exported() / "model.safetensors")
    rounded = load_file(half / "model.safetensors")
    assert rounded.keys() == precise.keys()
    assert all(tensor.dtype == dtype and torch.equal(tensor, precise[name].to(dtype))
               for name, tensor in rounded.items())
    assert AutoModelForCausalLM.from_pretrained(half).dtype == dtype
    back = init_from.load_weights(str(half), V, ours.config.bias)
    model = GPT(GPTConfig(**back["model_args"])).eval()
    model.load_state_dict(back["model"])
    theirs = AutoModelForCausalLM.from_pretrained(half, dtype=torch.float32).eval()
    x = torch.randint(V, (2, CONTEXT))
    with torch.no_grad():
        torch.testing.assert_close(model(x), theirs(x).logits, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_finetuning_starts_from_the_export(ours, exported, tmp_path):
    """Finetuning starts at the loss that transformers computes. Without the flag for unscaled
    attention the error names the flag."""
    tokens = np.random.default_rng(0).integers(0, V, 4000)
    data = write_data(tmp_path / "bytes", tokens[:3000], tokens[3000:], V)
    folder = exported()
    settings = dict(n_layer=3, bias=ours.config.bias, init_from=folder, eval_iters=0, max_iters=2,
                    warmup_iters=1, eval_interval=1, hessian_interval=1)
    back = init_from.load_weights(str(folder), V, ours.config.bias)
    assert back["model_args"]["bias"] == ours.config.bias
    assert GPTConfig(**back["model_args"]).padded_vocab_size == 320
    model = GPT(GPTConfig(**back["model_args"])).eval()
    model.load_state_dict(back["model"])
    windows = torch.from_numpy(tokens[3000:]).unfold(0, CONTEXT + 1, CONTEXT)
    with torch.no_grad():
        torch.testing.assert_close(model(windows[:, 1:]), ours(windows[:, 1:]), rtol=0, atol=1e-4)
        logits = AutoModelForCausalLM.from_pretrained(folder)(windows[:, :-1]).logits
    loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()

    with pytest.raises(AssertionError, match=f"pass {PLAIN}\n"):
        train(tmp_path / "tuned", data, **settings)
    train(tmp_path / "tuned", data, PLAIN, **settings)
    losses = [r["val/loss"] for r in records(tmp_path / "tuned", "val/loss")]
    assert losses[0] == pytest.approx(loss, abs=1e-4)
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.slow
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
