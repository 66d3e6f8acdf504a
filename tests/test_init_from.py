"""Weights from elsewhere: what Hugging Face's GPT-2 computes with them, train.py computes."""
import json
import os
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, flags, records, run, train, write_data
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

import checkpoint
import init_from
import train as train_script
from model import GPT, GPTConfig
from script import UserError

V, CONTEXT = 257, TINY["block_size"]   # bytes and end of text; 257 is no multiple of 64
SHAPE = dict(n_layer=3, n_head=2, n_embd=32, bias=True, scale_attn_by_inverse_layer_idx=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    tokens = np.random.default_rng(0).integers(0, V, 4000)
    return write_data(tmp_path_factory.mktemp("data") / "bytes", tokens[:3000], tokens[3000:], V)


def build_theirs(vocab_size=V, bias=True, **settings):
    """A GPT2LMHeadModel whose every tensor matters, and with logits near -50, like OpenAI's: one
    row of zeros more would be all of the softmax."""
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(
        vocab_size=vocab_size, n_positions=CONTEXT + 8, n_embd=32, n_layer=3, n_head=2,
        bos_token_id=V - 1, eos_token_id=V - 1, **settings)).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.normal_(std=0.3) if bias or not name.endswith("bias") else p.zero_()
            if ".ln_" in name and name.endswith("weight"):
                p += 1
        if bias:
            theirs.transformer.wte.weight[:, 0] -= 5
            theirs.transformer.ln_f.bias[0] = 10
    return theirs


def plain(theirs, folder):
    theirs.save_pretrained(folder)


def sharded(theirs, folder):
    theirs.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 1


def as_openai(theirs, folder):
    """The layout of openai-community/gpt2: no prefix, causal masks, no head, a short config."""
    theirs.save_pretrained(folder)
    weights = {name.removeprefix("transformer."): tensor
               for name, tensor in load_file(folder / "model.safetensors").items()}
    weights.pop("lm_head.weight", None)
    for i in range(3):
        weights[f"h.{i}.attn.bias"] = torch.ones(40, 40).tril()[None, None]
        weights[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(weights, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    names = ("activation_function", "layer_norm_epsilon", "model_type", "n_ctx", "n_embd", "n_head",
             "n_layer", "n_positions", "vocab_size")
    (folder / "config.json").write_text(json.dumps({n: config[n] for n in names if n in config}))


def with_head(theirs, folder):
    theirs.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["transformer.wte.weight"].clone()
    save_file(weights, folder / "model.safetensors")


def nanogpt_dict(theirs, prefix="_orig_mod.", masks=True, **model_args):
    """What nanoGPT and the official Sophia code give to torch.save."""
    weights = {name: tensor.t().contiguous() if name.endswith((
        "c_attn.weight", "c_proj.weight", "c_fc.weight")) else tensor
        for name, tensor in theirs.state_dict().items()}
    if not model_args["bias"]:
        weights = {name: t for name, t in weights.items() if not name.endswith("bias")}
    state = {0: {"step": torch.tensor(7.0), "exp_avg": torch.ones(2), "hessian": torch.ones(2)}}
    groups = [{"lr": 6e-4, "betas": (0.965, 0.99), "rho": 0.05, "weight_decay": 0.2, "params": [0],
               "maximize": False, "capturable": False}]
    c = theirs.config
    for i in range(c.n_layer if masks else 0):
        weights[f"transformer.h.{i}.attn.bias"] = torch.ones(40, 40).tril()[None, None]
    return {"model": {prefix + name: tensor for name, tensor in weights.items()},
            "optimizer": {"state": state, "param_groups": groups},
            "model_args": dict(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd,
                               block_size=c.n_positions, vocab_size=c.vocab_size, dropout=0.0,
                               **model_args),
            "iter_num": 7, "best_val_loss": torch.tensor(3.5),
            "config": {"out_dir": "out", "learning_rate": 6e-4, "compile": True}}


def as_nanogpt(theirs, path):
    torch.save(nanogpt_dict(theirs, masks=False, bias=True), path)


def as_sophia(theirs, path):
    scaled = theirs.config.scale_attn_by_inverse_layer_idx
    bias = bool(theirs.transformer.ln_f.bias.any())
    torch.save(nanogpt_dict(theirs, prefix="module._orig_mod.", bias=bias,
                            scale_attn_by_inverse_layer_idx=scaled), path)


def their_loss(theirs, data):
    """Mean cross-entropy over all windows of val.bin."""
    tokens = torch.from_numpy(np.fromfile(data / "val.bin", "<u2").astype(np.int64))
    windows = tokens.unfold(0, CONTEXT + 1, CONTEXT)
    with torch.no_grad():
        logits = theirs(windows[:, :-1]).logits[..., :V]   # padded classes have probability 0
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()


def gpt(start):
    ours = GPT(GPTConfig(**start["model_args"])).eval()
    ours.load_state_dict(start["model"])
    return ours


@pytest.mark.parametrize("save, settings", [
    (plain, {}), (plain, dict(vocab_size=320)), (plain, dict(bias=False)), (sharded, {}),
    (plain, dict(scale_attn_by_inverse_layer_idx=True)),
    (plain, dict(activation_function="gelu_pytorch_tanh", n_inner=128)),
    (as_openai, {}), (with_head, {}), (as_nanogpt, {}), (as_nanogpt, dict(vocab_size=320)),
    (as_sophia, dict(vocab_size=320, scale_attn_by_inverse_layer_idx=True, bias=False))])
def test_logits_and_losses_equal_hugging_faces(data, tmp_path, save, settings):
    theirs = build_theirs(**settings)
    source = tmp_path / "theirs"
    save(theirs, source)
    bias = settings.get("bias", True)
    ours = gpt(init_from.load_weights(str(source), V, False))
    assert ours.config.bias == bias and ours.config.block_size == CONTEXT + 8
    assert ours.config.padded_vocab_size == 320
    kept = init_from.load_weights(str(source), V, True)   # zero biases in the file stay
    assert kept["model_args"]["bias"] == (bias or source.is_dir())
    x, y = torch.randint(V, (2, 4, CONTEXT))
    with torch.no_grad():
        wanted = theirs(x).logits[..., :V]
        torch.testing.assert_close(ours(x), wanted, rtol=0, atol=1e-4)
        losses = F.cross_entropy(wanted.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)
        torch.testing.assert_close(ours.token_losses(x, y), losses, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours(x, targets=y), losses.mean(), rtol=0, atol=1e-4)
    noise = torch.rand(y.shape)   # all labels are real classes, and the softmax is theirs
    cdf = wanted.double().softmax(-1).cumsum(-1)
    labels = (cdf <= noise[..., None]).sum(-1).clamp(max=V - 1)
    torch.testing.assert_close(ours(x, label_noise=noise), ours(x, targets=labels), rtol=0,
                               atol=1e-3)
    generated = ours.generate(x[:1, :4], 4, temperature=0)
    assert generated.shape == (1, 8) and generated.max() < V


@pytest.mark.slow
@pytest.mark.parametrize("save, ranks", [(as_openai, 1), (as_openai, 2), (as_sophia, 1)])
def test_train_evaluates_and_finetunes(data, tmp_path, save, ranks):
    theirs = build_theirs()
    save(theirs, tmp_path / "theirs")
    settings = dict(SHAPE, init_from=tmp_path / "theirs", eval_iters=0, max_iters=2, warmup_iters=1,
                    eval_interval=1, ranks=ranks)
    output = train(tmp_path / "evaluated", data, eval_only=True, **settings)
    loss = their_loss(theirs, data)
    assert f"val loss {loss:.4f}" in output and not (tmp_path / "evaluated").exists()
    train(tmp_path / "tuned", data, hessian_interval=1, **settings)
    losses = [r["val/loss"] for r in records(tmp_path / "tuned", "val/loss")]
    assert losses[0] == pytest.approx(loss, abs=1e-4)
    assert losses[2] < losses[1] < losses[0]
    train(tmp_path / "tuned", data, **dict(settings, init_from="resume", hessian_interval=1,
                                           max_iters=3))
    assert len(records(tmp_path / "tuned", "val/loss")) == 4


@pytest.mark.slow
def test_an_exported_run_comes_back_bitwise(data, tmp_path):
    """Where export.py has nothing to fold in and no padding to cut off."""
    as_openai(build_theirs(), tmp_path / "theirs")
    train(tmp_path / "run", data, max_iters=2, optimizer="adamw", init_from=tmp_path / "theirs",
          **SHAPE)
    done = run("export.py", tmp_path / "run", f"--out={tmp_path}/exported")
    assert done.returncode == 0, done.stderr
    saved = checkpoint.load(checkpoint.list_checkpoints(tmp_path / "run")[0])
    back = init_from.load_weights(str(tmp_path / "exported"), V, True)
    assert asdict(GPTConfig(**back["model_args"])) == saved["model_args"]
    assert back["model"].keys() == saved["model"].keys()
    assert all(torch.equal(back["model"][name], saved["model"][name]) for name in saved["model"])


def test_checkpoints_from_before_padding_was_a_choice_are_padded():
    args = asdict(GPTConfig())
    del args["vocab_multiple"]
    assert GPTConfig(**args).padded_vocab_size == 50304
    assert GPTConfig(**args, vocab_multiple=1).padded_vocab_size == 50257


class Payload:
    """Runs when it is unpickled: makes a folder in the working directory."""

    def __reduce__(self):
        return os.mkdir, ("mark_of_the_payload",)


def edit_config(**changes):
    def edit(folder):
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))
    return edit


def edit_weights(changes):
    """changes: {name: a tensor, or None to leave it out}."""
    def edit(folder):
        weights = load_file(folder / "model.safetensors") | changes
        save_file({name: t for name, t in weights.items() if t is not None},
                  folder / "model.safetensors")
    return edit


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def ckpt(**changes):
    def edit(folder):
        torch.save({**nanogpt_dict(build_theirs(), bias=True), **changes}, folder / "ckpt.pt")
    return edit


FIRST = "transformer.h.0."
CKPT = "--init_from=theirs/ckpt.pt"
# name: (what the line must name, further words, an edit of the folder theirs/).
MISTAKES = {
    "missing": ("nowhere", "--init_from=nowhere", None),
    "no such size": ("gpt2-huge", "--init_from=gpt2-huge", None),
    "folder without weights": ("theirs model.safetensors checkpoint", "",
                               lambda folder: (folder / "model.safetensors").unlink()),
    "folder without config": ("theirs config.json", "",
                              lambda folder: (folder / "config.json").unlink()),
    "all flags at once": ("--n_layer=3 --bias=True --scale_attn_by_inverse_layer_idx=False "
                          "--block_size=40", "--n_layer=2 --bias=False --block_size=64 "
                          "--scale_attn_by_inverse_layer_idx=True", None),
    "biases that are not zero": ("bias=False --bias=True", "--bias=False", None),
    "biases that are not there": ("--bias=False", CKPT, ckpt(model=
        nanogpt_dict(build_theirs(), bias=False)["model"])),
    "another activation": ("activation_function relu", "", edit_config(activation_function="relu")),
    "another norm": ("layer_norm_epsilon 1e-06", "", edit_config(layer_norm_epsilon=1e-6)),
    "another model": ("llama gpt2", "", edit_config(model_type="llama")),
    "more rows than tokens": ("256 257", "", [edit_config(vocab_size=256), edit_weights({
        "transformer.wte.weight": torch.ones(256, 32)})]),
    "rows that config.json denies": ("wte.weight 258 257", "", edit_config(vocab_size=258)),
    "positions that config.json denies": ("wpe.weight 10000000", "",
                                          edit_config(n_positions=10**12)),
    "size of another type": ("n_positions block_size", "", edit_config(n_positions="40")),
    "untied head": ("tie_word_embeddings=False True", "", edit_config(tie_word_embeddings=False)),
    "another GELU": ("activation_function='gelu' gelu_new gelu_pytorch_tanh", "",
                     edit_config(activation_function="gelu")),
    "another inner width": ("h.0.mlp.c_fc.weight 64", "", edit_weights({
        f"{FIRST}mlp.c_fc.weight": torch.ones(32, 64)})),
    "three dimensions": ("h.0.mlp.c_fc.weight", "", edit_weights({
        f"{FIRST}mlp.c_fc.weight": torch.ones(32, 64, 2)})),
    "missing tensor": ("h.0.ln_1.weight Missing", "", edit_weights({f"{FIRST}ln_1.weight": None})),
    "tensor too many": ("h.0.ln_3.weight Unexpected", "", edit_weights({
        f"{FIRST}ln_3.weight": torch.ones(32)})),
    "no embedding": ("wte.weight None", "", edit_weights({"transformer.wte.weight": None})),
    "head of its own": ("lm_head.weight", "", edit_weights({"lm_head.weight": torch.ones(V, 32)})),
    "truncated weights": ("model.safetensors", "", cut),
    "weights that are text": ("model.safetensors", "", write("model.safetensors", "hello" * 9)),
    "damaged config": ("config.json", "", write("config.json", "{")),
    "config of another kind": ("config.json", "", write("config.json", "[1]")),
    "empty config": ("theirs n_layer=None", "", write("config.json", "{}")),
    "missing shard": ("b.safetensors missing", "", write(
        "model.safetensors.index.json", '{"weight_map": {"wte": "../a/b.safetensors"}}')),
    "index of another kind": ("index.json", "", write("model.safetensors.index.json", "[]")),
    "checkpoint with code": ("ckpt.pt code", CKPT, ckpt(config=Payload())),
    "checkpoint without sizes": ("ckpt.pt n_head=None", CKPT, ckpt(model_args={"n_layer": 3})),
    "checkpoint without model_args": ("ckpt.pt model_args", CKPT, ckpt(model_args=None)),
    "checkpoint without weights": ("ckpt.pt dict tensors", CKPT, ckpt(model=[1])),
    "weights that are no tensors": ("ckpt.pt dict tensors", CKPT, ckpt(model={"wte.weight": 1})),
    "pickle of another kind": ("ckpt.pt not train.py", CKPT,
                               lambda folder: torch.save({"a": 1}, folder / "ckpt.pt")),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(data, tmp_path, monkeypatch, mistake):
    """One line that names what is wrong, and no file touched. That such an error ends a script with
    exit code 2 is tested for all of them in test_errors.py."""
    named, words, edits = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    plain(build_theirs(), tmp_path / "theirs")
    for edit in edits if isinstance(edits, list) else [edits] if edits else []:
        edit(tmp_path / "theirs")
    before = {str(path): path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    settings = dict(TINY, **SHAPE | {"dataset": data, "out_dir": "new", "init_from": "theirs"})
    with pytest.raises(UserError) as error:
        train_script.main([*flags(**settings), *words.split()])
    assert all(word in str(error.value) for word in named.split()), error.value
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert before == {str(path): path.is_file() and path.read_bytes()
                      for path in tmp_path.rglob("*")}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_without_a_network_the_error_says_what_to_fetch(data, tmp_path, ranks):
    done = run("train.py", *flags(**{**TINY, "dataset": data, "out_dir": tmp_path / "new"}),
               "--init_from=gpt2-medium", ranks=ranks, HF_HUB_OFFLINE="1", HF_HOME=tmp_path / "hf")
    lines = [line for line in done.stderr.splitlines() if line.startswith("train.py: error: ")]
    assert len(lines) == 1 and (ranks > 1 or (done.returncode == 2 and len(lines[0]) + 1 == len(
        done.stderr)))
    assert all(word in lines[0] for word in (
        "openai-community/gpt2-medium", "config.json", "model.safetensors", "--init_from=FOLDER"))
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_downloaded_model_is_read_from_the_cache(data, tmp_path):
    """A cache with the layout of huggingface_hub, and no network."""
    theirs = build_theirs()
    repo = tmp_path / "hf" / "hub" / "models--openai-community--gpt2"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    (repo / "snapshots").mkdir()
    as_openai(theirs, repo / "snapshots" / ("0" * 40))
    settings = {**TINY, **SHAPE, "dataset": data, "out_dir": tmp_path / "new", "eval_iters": 0}
    done = run("train.py", *flags(**settings), "--init_from=gpt2", "--eval_only=True",
               HF_HUB_OFFLINE="1", HF_HOME=tmp_path / "hf")
    assert done.returncode == 0, done.stderr
    assert f"val loss {their_loss(theirs, data):.4f}" in done.stdout
