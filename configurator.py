"""
Settings: the one list of knobs, and how config files and --key=value set them.

    python train.py config/a.py --learning_rate=3e-4 config/b.py     # later words win

A config file holds Python assignments and runs in its own namespace. --key=value is only parsed.
"""
import dataclasses
import difflib
import json
import math
import os
import sys
import textwrap
import types
import typing
from dataclasses import dataclass, field

from script import ROOT, UserError

# Published settings of each optimizer, for all model sizes; they replace None in TrainConfig. AdamW
# and SophiaG: arXiv 2305.14342. Lion: arXiv 2302.06675; its weight decay makes lr * weight_decay
# equal to AdamW's for GPT-2 small. Muon: momentum as in torch.optim.Muon, the rest as AdamW.
OPTIMIZER_DEFAULTS = {
    "sophiag": dict(beta1=0.965, beta2=0.99, weight_decay=0.2),
    "adamw": dict(beta1=0.9, beta2=0.95, weight_decay=0.1),
    "lion": dict(beta1=0.95, beta2=0.98, weight_decay=0.6),
    "muon": dict(beta1=0.95, beta2=0.95, weight_decay=0.1),
}


def knob(default, meaning):
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True)
class TrainConfig:
    # run
    out_dir: str = knob("out", "run directory: config.json, metrics.jsonl, checkpoints, wandb/")
    init_from: str = knob("scratch", "scratch | resume | auto (resume if possible) | weights to "
                          "finetune: a run, a checkpoint (nanoGPT's too), a Hugging Face folder, "
                          "gpt2[-medium|-large|-xl]")
    seed: int = knob(1337, "seeds initial weights, data order, label noise and dropout")
    eval_interval: int = knob(1000, "steps between evaluations, each with a checkpoint")
    eval_iters: int = knob(10, "evaluation batches of total_batch_size sequences; 0: all of val")
    eval_only: bool = knob(False, "evaluate once and stop")
    log_interval: int = knob(10, "steps between log lines")
    sample_tokens: int = knob(0, "tokens of text to sample at each evaluation; 0: none")
    wandb_log: bool = knob(False, "also log to Weights & Biases")
    wandb_project: str = knob("sophia-gpt2", "wandb project")
    wandb_run_name: str | None = knob(None, "wandb run name (default: the name of out_dir)")
    # data
    dataset: str = knob("openwebtext", "a folder under data/, or a path")
    batch_size: int | None = knob(None, "sequences per rank at a time (default: as many as fit)")
    total_batch_size: int = knob(480, "sequences per update, over all ranks")
    # model
    block_size: int = knob(1024, "context length in tokens")
    n_layer: int = knob(12, "layers")
    n_head: int = knob(12, "attention heads")
    n_embd: int = knob(768, "width")
    dropout: float = knob(0.0, "dropout; 0 for pretraining")
    bias: bool = knob(False, "biases in Linear and LayerNorm")
    init_std: float = knob(0.02, "std of initial weights; in small models 1/sqrt(n_embd)")
    scale_attn_by_inverse_layer_idx: bool = knob(True, "divide attention scores by layer index + 1")
    # optimizer
    optimizer: str = knob("sophiag", "sophiag | adamw | lion | muon (for Linear; else adamw)")
    learning_rate: float = knob(6e-4, "peak learning rate")
    min_lr: float | None = knob(None, "final learning rate (default: learning_rate / 10)")
    max_iters: int = knob(100_000, "steps")
    warmup_iters: int = knob(2000, "steps of linear warmup")
    lr_decay_iters: int | None = knob(None, "step that reaches min_lr (default: max_iters)")
    decay_lr: bool = knob(True, "cosine decay; False: constant after warmup")
    weight_decay: float | None = knob(None, "decoupled, on Linear weights only (default: 0.2 "
                                      "sophiag, 0.1 adamw and muon, 0.6 lion)")
    beta1: float | None = knob(None, "default: 0.965 sophiag, 0.9 adamw, 0.95 lion and muon (its "
                               "momentum)")
    beta2: float | None = knob(None, "default: 0.99 sophiag, 0.95 adamw and muon, 0.98 lion")
    grad_clip: float = knob(1.0, "maximum gradient norm; 0: no clipping")
    rho: float = knob(0.05, "sophiag: clipping threshold; a larger rho gives a larger win_rate")
    target_win_rate: float = knob(0.0, "sophiag: adapt rho to reach this win_rate; 0: fixed rho")
    hessian_estimator: str = knob("gnb", "sophiag: gnb | hutchinson (Sophia-H; rho 0.01 in the "
                                  "paper) | empirical_fisher")
    hessian_interval: int = knob(10, "sophiag: steps between Hessian estimates, k")
    hessian_batch_size: int | None = knob(None, "sophiag: sequences per Hessian estimate, over all "
                                          "ranks (default: total_batch_size / 2; hutchinson: / 15)")
    # machine
    device: str = knob("auto", "auto | cuda | mps | cpu")
    dtype: str = knob("auto", "auto | float32 | bfloat16 | float16 (with a GradScaler)")
    compile: str = knob("auto", "auto | True | False: torch.compile")
    deterministic: bool = knob(False, "CUDA: deterministic kernels if compiled, slower")
    backend: str = knob("auto", "torch.distributed backend: auto | nccl | gloo")

    @property
    def tokens_per_step(self):
        return self.total_batch_size * self.block_size

    @property
    def hessian_tokens(self):
        """B in the paper, for estimators that square gradients: labels per Hessian estimate."""
        return self.hessian_batch_size * self.block_size

    @property
    def squares_gradient(self):
        """Whether h averages squared gradients, or direct estimates of the Hessian diagonal."""
        return self.hessian_estimator != "hutchinson"

    @property
    def data_dir(self):
        inside = os.path.join(ROOT, "data", self.dataset)
        return self.dataset if os.sep in self.dataset else inside

    @property
    def group(self):
        """wandb group: runs of the same data and model shape."""
        name = os.path.basename(os.path.normpath(self.dataset))
        return f"{name}-{self.n_layer}x{self.n_embd}-{self.block_size}"


FIELDS = {f.name: f for f in dataclasses.fields(TrainConfig)}
TYPES = typing.get_type_hints(TrainConfig)


def _allowed(name):
    """Types that a knob accepts, e.g. (float, NoneType)."""
    return typing.get_args(TYPES[name]) or (TYPES[name],)


def _type_name(name):
    return " or ".join("None" if t is types.NoneType else t.__name__ for t in _allowed(name))


def _check_known(name, where):
    if name not in FIELDS:
        near = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "see python train.py --help"
        raise UserError(f"{where}: unknown setting {name}; {hint}")


def _checked(name, value, where):
    """value as the knob's type. An int is accepted for a float, and a bool for compile."""
    allowed = _allowed(name)
    if name == "compile" and isinstance(value, bool):
        return str(value)
    if float in allowed and type(value) is int and abs(value) < 2**63:
        value = float(value)
    if type(value) not in allowed or (isinstance(value, str) and "\0" in value):
        raise UserError(f"{where}: {name} takes {_type_name(name)}, got {value!r}")
    if type(value) is float and not math.isfinite(value):
        raise UserError(f"{where}: {name} must be finite, got {value}")
    return value


def _parsed(name, text, where):
    """The value of --name=text."""
    allowed = _allowed(name)
    if types.NoneType in allowed and text in ("None", "none"):
        return None
    for kind in allowed:
        if kind is bool and text in ("True", "true", "False", "false"):
            return text in ("True", "true")
        if kind is str:
            return text.capitalize() if name == "compile" and text in ("true", "false") else text
        if kind in (int, float):
            try:
                return _checked(name, kind(text), where)
            except ValueError:
                continue
    raise UserError(f"{where}: {name} takes {_type_name(name)}, got {text!r}")


def _read_file(path):
    """The settings that a config file assigns, by name. Raises UserError."""
    try:
        with open(path, encoding="utf-8") as file:
            source = file.read()
    except (OSError, ValueError) as error:   # ValueError: a bad path, or not UTF-8
        reason = getattr(error, "strerror", None) or "not a UTF-8 text file"
        raise UserError(f"cannot read config file {path!r}: {reason}") from None
    namespace = {"__file__": path}
    try:
        exec(compile(source, path, "exec"), namespace)
    except (Exception, SystemExit) as error:   # a config file can raise anything
        line = getattr(error, "lineno", None)
        trace = error.__traceback__
        while trace is not None:
            line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == path else line
            trace = trace.tb_next
        reason = " ".join(str(error).split())
        raise UserError(f"{path}, line {line}: {type(error).__name__}: {reason}") from None
    ignored = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)
    settings = {}
    for name, value in namespace.items():
        if name.startswith("_") or isinstance(value, ignored):
            continue
        _check_known(name, path)
        settings[name] = _checked(name, value, path)
    return settings


def help_text():
    """The table of knobs, 100 columns wide."""
    lines = ["python train.py [config/file.py ...] [--key=value ...]   (later words win)", ""]
    for name, f in FIELDS.items():
        default = "" if f.default is None else f.default
        lines += textwrap.wrap(f.metadata["meaning"], width=100, subsequent_indent=" " * 45,
                               initial_indent=f"{name:32}{default!s:13}")
    return "\n".join(lines)


def load_config(argv, world_size=1):
    """
    TrainConfig from command-line words: config files and --key=value; later words win. --help
    prints the knobs and exits. world_size: ranks that share total_batch_size. Raises UserError.
    """
    settings = {}
    for word in argv:
        if word in ("--help", "-h"):
            print(help_text())
            sys.exit(0)
        if word.startswith("--"):
            name, equals, text = word[2:].partition("=")
            _check_known(name, "command line")
            if not equals:
                raise UserError(f"command line: write --{name}=VALUE")
            settings[name] = _parsed(name, text, "command line")
        else:
            settings.update(_read_file(word))
    return resolve(TrainConfig(**settings), world_size)


def resolve(cfg, world_size=1):
    """Fill in defaults that depend on other settings, and reject impossible combinations."""
    choices = dict(optimizer=tuple(OPTIMIZER_DEFAULTS), device=("auto", "cuda", "mps", "cpu"),
                   hessian_estimator=("gnb", "hutchinson", "empirical_fisher"),
                   dtype=("auto", "float32", "bfloat16", "float16"),
                   compile=("auto", "True", "False"), backend=("auto", "nccl", "gloo"))
    for name, allowed in choices.items():
        value = getattr(cfg, name)
        if value not in allowed:
            raise UserError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
    hessian_share = cfg.total_batch_size / (2 if cfg.squares_gradient else 15)   # as in the paper
    derived = dict(OPTIMIZER_DEFAULTS[cfg.optimizer], min_lr=cfg.learning_rate / 10,
                   lr_decay_iters=cfg.max_iters,
                   hessian_batch_size=math.ceil(hessian_share / world_size) * world_size,
                   wandb_run_name=os.path.basename(os.path.normpath(cfg.out_dir)))
    cfg = dataclasses.replace(
        cfg, **{name: v for name, v in derived.items() if getattr(cfg, name) is None})
    ranges = (
        (1, math.inf, "eval_interval log_interval hessian_interval"),
        (1, 2**31, "batch_size total_batch_size hessian_batch_size block_size n_layer n_head "
                   "n_embd"),
        (0, math.inf, "eval_iters sample_tokens max_iters warmup_iters lr_decay_iters "
                      "learning_rate min_lr weight_decay grad_clip rho init_std"),
        (0, 1, "dropout beta1 beta2 target_win_rate"), (0, 2**63, "seed"))
    for low, limit, names in ranges:
        for name in names.split():
            value = getattr(cfg, name)
            if value is not None and not low <= value < limit:
                below = f" and below {limit}" * (limit < math.inf)
                raise UserError(f"{name} must be at least {low}{below}, got {value}")
    if not cfg.out_dir:
        raise UserError("out_dir must not be empty")
    if cfg.n_embd % cfg.n_head:
        raise UserError(f"n_embd={cfg.n_embd} is not divisible by n_head={cfg.n_head}")
    batch_size = cfg.batch_size or 1   # None: chosen later
    if cfg.total_batch_size % (batch_size * world_size):
        ranks = f" x {world_size} ranks" if world_size > 1 else ""
        raise UserError(f"total_batch_size={cfg.total_batch_size} is not divisible by "
                        f"batch_size={batch_size}{ranks}; change either")
    if cfg.hessian_batch_size % world_size:
        raise UserError(f"hessian_batch_size={cfg.hessian_batch_size} is not divisible by "
                        f"{world_size} ranks")
    if cfg.warmup_iters > cfg.lr_decay_iters and cfg.decay_lr and cfg.max_iters:
        raise UserError(f"warmup_iters={cfg.warmup_iters} is more than the {cfg.lr_decay_iters} "
                        f"steps of the schedule (lr_decay_iters, by default max_iters)")
    if cfg.min_lr > cfg.learning_rate:
        raise UserError(f"min_lr={cfg.min_lr} is above learning_rate={cfg.learning_rate}")
    return cfg


def to_json(cfg):
    return json.dumps(dataclasses.asdict(cfg), indent=2) + "\n"
