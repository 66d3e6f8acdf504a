"""Settings: files, flags and their errors, derived values, and the numbers in config/."""
import dataclasses
import json

import pytest
from conftest import ROOT

from configurator import FIELDS, TrainConfig, load_config, to_json
from script import UserError

CONFIGS = sorted((ROOT / "config").glob("*.py"))
# {size: layers, heads, width, (learning rate, min_lr) of AdamW, Lion and SophiaG, SophiaG's rho}.
# From arXiv 2305.14342 and the official configs, typed by hand, so that a typo in config/ shows.
PUBLISHED = {
    "small": (12, 12, 768, (6e-4, 3e-5), (1e-4, 1e-5), (6e-4, 1.5e-5), 0.05),
    "medium": (24, 16, 1024, (3e-4, 6e-5), (1e-4, 1e-5), (7e-4, 1e-5), 0.08),
    "large": (36, 20, 1280, (2e-4, 1e-5), (8e-5, 8e-6), (3e-4, 1e-5), 0.05),
}
SHARED = dict(dataset="openwebtext", block_size=1024, total_batch_size=480, tokens_per_step=491_520,
              max_iters=100_000, lr_decay_iters=100_000, warmup_iters=2000, decay_lr=True,
              grad_clip=1.0, dropout=0.0, bias=False, scale_attn_by_inverse_layer_idx=True)
OWN = {"out_dir", "wandb_run_name", "optimizer", "learning_rate", "min_lr", "weight_decay", "beta1",
       "beta2", "warmup_iters", "rho", "target_win_rate", "hessian_estimator", "hessian_interval",
       "hessian_batch_size"}   # the optimizer's own settings


def write(tmp_path, text, name="config.py"):
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def error(*words, world_size=1):
    with pytest.raises(UserError) as caught:
        load_config(words, world_size)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads(path):
    cfg = load_config([str(path)])
    assert cfg.optimizer == path.stem.rsplit("_", 1)[1]
    assert cfg.optimizer in cfg.out_dir   # so that optimizers do not share a folder
    # A quickstart's 8 sequences are one micro-batch, which 8 ranks must divide.
    words = ["--batch_size=1"] if path.stem.startswith("quickstart") else []
    assert load_config([str(path), *words], 8).tokens_per_step == cfg.tokens_per_step


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "muon", "sophiag"])
@pytest.mark.parametrize("size", PUBLISHED)
def test_gpt2_configs_hold_the_published_numbers(size, optimizer):
    cfg = load_config([str(ROOT / "config" / f"train_gpt2_{size}_{optimizer}.py")])
    *shape, adamw, lion, sophiag, rho = PUBLISHED[size]
    rates = dict(adamw=adamw, lion=lion, muon=adamw, sophiag=sophiag)[optimizer]
    assert [cfg.n_layer, cfg.n_head, cfg.n_embd] == shape
    assert (cfg.learning_rate, cfg.min_lr) == pytest.approx(rates, rel=1e-12)
    assert {name: getattr(cfg, name) for name in SHARED} == SHARED
    betas = dict(adamw=(0.9, 0.95), lion=(0.95, 0.98), muon=(0.95, 0.95),
                 sophiag=(0.965, 0.99))[optimizer]
    assert (cfg.beta1, cfg.beta2) == betas
    low, high = dict(adamw=(0.1, 0.1), lion=(0.2, 1.0), muon=(0.1, 0.1),
                     sophiag=(0.2, 0.2))[optimizer]
    assert low <= cfg.weight_decay <= high   # Lion, arXiv 2302.06675: 3-10 times AdamW's
    if optimizer == "sophiag":
        assert (cfg.rho, cfg.hessian_interval, cfg.hessian_batch_size) == (rho, 10, 240)


@pytest.mark.parametrize("optimizer, lr, decay, betas", [
    ("sophiag", 2e-4, 0.15, (0.965, 0.99)), ("adamw", 1.2e-4, 0.1, (0.9, 0.95))])
def test_gpt2_xl_configs_hold_the_authors_numbers(optimizer, lr, decay, betas):
    """Official repository, issue 15."""
    cfg = load_config([str(ROOT / f"config/train_gpt2_xl_{optimizer}.py")])
    assert (cfg.n_layer, cfg.n_head, cfg.n_embd) == (48, 25, 1600)
    assert (cfg.learning_rate, cfg.weight_decay, (cfg.beta1, cfg.beta2)) == (lr, decay, betas)
    assert optimizer == "adamw" or cfg.rho == 0.04
    assert {name: getattr(cfg, name) for name in SHARED} == SHARED


def test_quickstarts_differ_only_in_the_optimizers_own_knobs():
    configs = [dataclasses.asdict(load_config([str(p)])) for p in CONFIGS if "quick" in p.stem]
    assert {config["optimizer"] for config in configs} == {"adamw", "lion", "muon", "sophiag"}
    shared = [{k: v for k, v in config.items() if k not in OWN} for config in configs]
    assert all(other == shared[0] for other in shared)
    assert shared[0]["dataset"] == "pystdlib"   # it needs no download


def test_the_last_setting_wins_in_files_and_flags(tmp_path):
    a = write(tmp_path, "seed = 1\nn_layer = 3\n", "a.py")
    b = write(tmp_path, "seed = 2\n", "b.py")
    for words, seed in ([a, b], 2), ([b, a], 1), ([a, "--seed=5", b], 2), ([a, b, "--seed=6"], 6):
        assert (load_config(words).seed, load_config(words).n_layer) == (seed, 3)


@pytest.mark.parametrize("setting, value", [
    ("--learning_rate=1e-3", 1e-3), ("--learning_rate=1", 1.0), ("--bias=True", True),
    ("--bias=true", True), ("--bias=False", False), ("--bias=false", False), ("--min_lr=0", 0.0),
    ("--min_lr=None", 6e-4 / 10), ("--weight_decay=None", 0.2), ("--hessian_batch_size=24", 24),
    ("--wandb_run_name=a=b c", "a=b c"), ("--compile=True", "True"), ("--compile=false", "False"),
    ("learning_rate = 1", 1.0), ("learning_rate = 1e-3", 1e-3), ("bias = True", True),
    ("compile = False", "False"), ("weight_decay = None", 0.2), ("hessian_batch_size = 24", 24)])
def test_flags_and_files_give_typed_values(tmp_path, setting, value):
    cfg = load_config([setting if setting.startswith("--") else write(tmp_path, setting)])
    found = getattr(cfg, setting.strip("-").split("=")[0].strip())
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("setting", [
    "--max_iters=1.5", "--max_iters=1e3", "--max_iters=True", "--max_iters=", "--max_iters=None",
    "--learning_rate=fast", "--learning_rate=nan", "--learning_rate=inf", "--learning_rate=None",
    "--bias=1", "--bias=yes", "--bias=None", "--max_iters", "--min_lr=x", "--n_layer=2*3", "--bias",
    "max_iters = 1.0", "max_iters = True", "learning_rate = True", "learning_rate = '1e-3'",
    "bias = 1", "out_dir = 3", "out_dir = None", "dataset = ['a']", "compile = 1", "min_lr = True",
    "hessian_batch_size = 1.5", "min_lr = float('nan')"])
def test_a_value_of_the_wrong_type_is_an_error(tmp_path, setting):
    name, flag = setting.strip("-").split("=")[0].strip(), setting.startswith("--")
    message = error(setting if flag else write(tmp_path, setting))
    assert name in message and ("command line" if flag else "config.py") in message


@pytest.mark.parametrize("typo, meant", [
    ("learningrate", "learning_rate"), ("n_layers", "n_layer"), ("max_iter", "max_iters"),
    ("hess_interval", "hessian_interval"), ("optimiser", "optimizer")])
def test_a_typo_names_the_nearest_setting(tmp_path, typo, meant):
    path = write(tmp_path, f"seed = 1\n{typo} = 1\n")
    for message, where in (error(f"--{typo}=1"), "command line"), (error(path), path):
        assert where in message and f" {typo}; did you mean {meant}?" in message


def test_a_config_file_may_import_and_define_helpers(tmp_path):
    path = write(tmp_path, "import math, os.path as where\nfrom json import loads\n"
                 "from math import sqrt\n_half = 0.5\n__author__ = 'me'\n"
                 "def double(x):\n    return 2 * x\nclass Note:\n    pass\n"
                 "max_iters = double(int(sqrt(2500 * 2500)))\nlearning_rate = 1e-3 * _half\n")
    assert (load_config([path]).max_iters, load_config([path]).learning_rate) == (5000, 5e-4)


@pytest.mark.parametrize("text, line, kind", [
    ("seed = 1\n\nmax_iters = 1 / 0\n", 3, "ZeroDivisionError"),
    ("seed = 1\nmax_iters == (\n", 2, "SyntaxError"),
    ("import json\n\n\nseed = json.loads('{')\n", 4, "JSONDecodeError"),
    ("def f():\n    raise KeyError('x')\nseed = f()\n", 2, "KeyError"),
    ("seed = len(FIELDS)\n", 1, "NameError"),      # a global of configurator.py
    ("seed = _of_another_file\n", 1, "NameError")])
def test_a_config_file_that_raises_is_an_error_with_its_line(tmp_path, text, line, kind):
    words = write(tmp_path, "_of_another_file = 3\n", "a.py"), write(tmp_path, text)
    assert f"config.py, line {line}: {kind}" in error(*words)


def test_flags_are_never_evaluated_as_code(tmp_path):
    mark = tmp_path / "mark"
    code = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    assert load_config([f"--out_dir={code}"]).out_dir == code
    for name in "max_iters", "learning_rate", "bias", "min_lr":
        assert name in error(f"--{name}={code}")
    assert not mark.exists()


@pytest.mark.parametrize("flags, named", [
    ("--n_embd=100 --n_head=3", "n_embd n_head"), ("--batch_size=7", "total_batch_size batch_size"),
    ("--max_iters=100 --warmup_iters=101", "warmup_iters 101 100"),
    ("--lr_decay_iters=1000", "warmup_iters 2000 1000"), ("--min_lr=1", "min_lr learning_rate"),
    ("--optimizer=sgd", "sgd sophiag adamw lion"), ("--dtype=float64", "dtype float64 bfloat16"),
    ("--device=tpu", "device tpu cuda"), ("--backend=mpi", "backend mpi gloo"),
    ("--compile=maybe", "compile maybe"), ("--dropout=1", "dropout"), ("--beta1=1", "beta1"),
    ("--beta2=-0.1", "beta2"), ("--target_win_rate=1", "target_win_rate"),
    ("--target_win_rate=-0.1", "target_win_rate"),
    ("--hessian_estimator=fisher", "hessian_estimator gnb hutchinson empirical_fisher fisher"),
    *((f"--{name}=0", f"{name} 1") for name in
      ("hessian_batch_size", "hessian_interval", "batch_size", "total_batch_size", "block_size",
       "log_interval", "eval_interval", "n_layer", "n_head", "n_embd")),
    *((f"--{name}=-1", f"{name} least 0") for name in
      ("seed", "learning_rate", "eval_iters", "max_iters", "warmup_iters", "weight_decay",
       "grad_clip", "rho"))])
def test_impossible_settings_are_errors_that_name_them(flags, named):
    message = error(*flags.split())
    assert all(word in message for word in named.split()), message
    assert "7 ranks" in error(world_size=7)   # 480 sequences in sevenths of 12
    assert "8 ranks" in error("--hessian_batch_size=12", world_size=8)


@pytest.mark.parametrize("total, micro, ranks, wanted", [
    (480, 12, 1, 240), (480, 12, 8, 240), (480, 10, 16, 240), (10, 5, 1, 5), (10, 1, 2, 6),
    (9, 1, 1, 5), (9, 3, 3, 6), (6, 1, 6, 6), (1, 1, 1, 1)])
def test_the_hessian_batch_is_half_the_batch_rounded_up_to_the_ranks(total, micro, ranks, wanted):
    cfg = load_config([f"--total_batch_size={total}", f"--batch_size={micro}", "--block_size=64"],
                      ranks)
    assert cfg.hessian_batch_size == wanted
    assert cfg.hessian_tokens == wanted * 64 and cfg.tokens_per_step == total * 64


@pytest.mark.parametrize("total, ranks, wanted", [(480, 1, 32), (480, 24, 48), (8, 1, 1),
                                                  (16, 2, 2)])
def test_hutchinsons_batch_is_a_fifteenth_rounded_up_to_the_ranks(total, ranks, wanted):
    cfg = load_config([f"--total_batch_size={total}", "--batch_size=1",
                       "--hessian_estimator=hutchinson"], ranks)
    assert cfg.hessian_batch_size == wanted


@pytest.mark.parametrize("optimizer, beta1, beta2, weight_decay", [
    ("sophiag", 0.965, 0.99, 0.2), ("adamw", 0.9, 0.95, 0.1), ("lion", 0.95, 0.98, 0.6),
    ("muon", 0.95, 0.95, 0.1)])
def test_derived_settings_follow_the_others_unless_given(optimizer, beta1, beta2, weight_decay):
    cfg = load_config([f"--optimizer={optimizer}", "--learning_rate=3e-3", "--max_iters=5000",
                       "--out_dir=some/where/"])
    assert (cfg.beta1, cfg.beta2, cfg.weight_decay) == (beta1, beta2, weight_decay)
    assert (cfg.min_lr, cfg.lr_decay_iters, cfg.wandb_run_name) == (3e-3 / 10, 5000, "where")
    said = dict(beta1=0.5, beta2=0.6, weight_decay=0.0, min_lr=1e-6, lr_decay_iters=3000,
                wandb_run_name="mine", hessian_batch_size=24)
    cfg = load_config([f"--optimizer={optimizer}", *(f"--{k}={v}" for k, v in said.items())])
    assert {name: getattr(cfg, name) for name in said} == said


def test_help_prints_every_setting(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        load_config(["--help"])
    text = capsys.readouterr().out
    for name, field in FIELDS.items():
        words = text.split(f"\n{name} ")[1].split()
        default = [] if field.default is None else [str(field.default)]
        expected = default + field.metadata["meaning"].split()
        assert words[:len(expected)] == expected


def test_settings_are_frozen_and_survive_json():
    cfg = load_config([str(ROOT / "config" / "train_gpt2_medium_sophiag.py")])
    assert TrainConfig(**json.loads(to_json(cfg))) == cfg
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.seed = 2
