"""docs/: commands and snippets run, links resolve, and figures show what the captions say."""
import json
import os
import re
import runpy
import sys

import numpy as np
import pyarrow
import pytest
import torch
import torch.distributed.run
from conftest import ROOT, code_blocks, flags, records, run, shell, train, write_data
from pyarrow import parquet
from test_init_from import CONTEXT, SHAPE, V, as_sophia, build_theirs, their_loss

import checkpoint
from configurator import load_config
from plot import COLOURS
from sophia import SophiaG

PAGES = ("sophia.md", "faq.md", "reliability.md", "data.md", "trainers.md", "gpu.md")
COMMANDS = [c for page in PAGES for c in code_blocks(ROOT / "docs" / page)[0]]
REPRODUCE = code_blocks(ROOT / "docs/reproduce.md")[0]
SNIPPETS = code_blocks(ROOT / "docs/faq.md")[1]
HOOK, FSDP2 = code_blocks(ROOT / "docs/trainers.md")[1]
FIGURES = runpy.run_path(str(ROOT / "docs/figures.py"))
QUICK = flags(max_iters=2, warmup_iters=1, eval_iters=1, log_interval=1, n_layer=1, n_embd=32,
              block_size=32)
RESUME = "quickstart_sophiag.py --init_from=resume"
TINY_RUN = " ".join(flags(
    n_layer=1, n_head=2, n_embd=32, block_size=32, batch_size=2, total_batch_size=8, max_iters=2,
    warmup_iters=1, lr_decay_iters=4, eval_iters=1, device="cpu", compile=False, wandb_log=False))


def command(word):
    """The only command on the pages that contains word, with this Python."""
    found, = [c for c in COMMANDS if word in c]
    found = re.sub("^python", sys.executable, found)
    found = re.sub("^pytest", f"{sys.executable} -m pytest", found)
    return re.sub("(^| )torchrun", rf"\1{sys.executable} -m torch.distributed.run", found)


def fork(word, *more, cwd=ROOT):
    """Run the command that contains word as a fork, which starts faster. Returns its output."""
    _, script, *words = command(word).split()
    done = run(script, *words, *more, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_commands_are_those_that_are_tested_here():
    words = ("out/scaled", "figures", "out/steered", "out/finetuned", "out/rates", "node=4",
             "official", RESUME, "signals", "HOST", "faults", "hypothesis", "openwebtext/prepare",
             "fineweb_edu", "nanoGPT")
    untested = "pip-audit", "sbatch"   # they need a network and Slurm
    assert len({command(word) for word in (*words, *untested)}) == len(COMMANDS)
    assert all(code_blocks(ROOT / "docs" / page)[1] == [] for page in PAGES
               if page not in ("faq.md", "trainers.md"))


@pytest.mark.slow
def test_commands_run_after_a_quickstart(copy, tiny_data):
    quickstart = ["config/quickstart_sophiag.py", *QUICK, f"--dataset={tiny_data}"]
    assert run("train.py", *quickstart, cwd=copy).returncode == 0
    for word in "out/scaled", "out/steered", "out/finetuned", "out/rates":
        output = fork(word, *quickstart[1:], cwd=copy)
        assert ("[3/3]" if word == "out/rates" else "finished at step 2") in output
    figures = [copy / "docs" / name for name in ("toy.png", "clipping.png", "quickstart.png")]
    for figure in figures:
        figure.unlink(missing_ok=True)
    shell(command("figures"), copy)
    assert all(figure.read_bytes()[:4] == b"\x89PNG" for figure in figures)


@pytest.mark.slow
def test_commands_that_resume(tiny_data, tmp_path):
    words = [*TINY_RUN.split(), f"--dataset={tiny_data}", f"--out_dir={tmp_path}/run"]
    fork(RESUME, *words, "--init_from=scratch")
    assert "resuming from" in fork(RESUME, *words)


@pytest.mark.parametrize("word, ranks, init_from", [
    ("signals", 8, "auto"), ("HOST", 8, "auto"), ("node=4", 4, "resume")])
def test_torchrun_commands_are_valid(word, ranks, init_from):
    """Training on several ranks runs in test_readme.py; signals, restarts and resuming on another
    number of ranks run in tests/faults."""
    words = command(word).partition("torch.distributed.run ")[2].split()
    args = torch.distributed.run.get_args_parser().parse_args(words)
    assert args.training_script == "train.py" and args.nproc_per_node == str(ranks)
    nodes = 2 if word == "HOST" else 1
    assert load_config(args.training_script_args, nodes * ranks).init_from == init_from


@pytest.mark.slow
def test_pytest_commands_find_their_tests():
    more = command("hypothesis").partition(" -m pytest ")[2]
    output = shell(f"{command('faults')} {more} --collect-only -q", ROOT)
    assert "test_kills" in output and "test_properties" in output


def test_files_that_are_named_exist():
    for page in "reliability.md", "data.md":
        named = re.findall(r"[\w/]+/\w+\.(?:py|sbatch)|\brequirements\.txt",
                           (ROOT / "docs" / page).read_text())
        assert len(named) >= 3 and all((ROOT / name.lstrip("/")).exists() for name in named)


@pytest.mark.slow
def test_prepare_commands(tmp_path):
    table = pyarrow.table({"text": [f"document {i}" for i in range(20_000)]})
    parquet.write_table(table, tmp_path / "0.parquet")
    for word in "openwebtext/prepare", "fineweb_edu":
        assert "val.bin" in fork(word, f"--source={tmp_path}", "--tokenizer=bytes",
                                 f"--out_dir={tmp_path}/{word}")


@pytest.mark.slow
def test_token_files_of_nanogpt(tmp_path):
    write_data(tmp_path / "owt", range(4000), range(4000)).joinpath("meta.json").unlink()
    assert "finished at step 2" in fork("nanoGPT", *TINY_RUN.split(), f"--out_dir={tmp_path}/run",
                                        f"--dataset={tmp_path}/owt")


@pytest.mark.slow
def test_the_commands_that_reproduce_the_paper(tiny_data, tmp_path):
    """On one rank, with a narrow model and few steps."""
    prepare, *trainings, compare = REPRODUCE
    assert prepare in COMMANDS and len(trainings) == 3
    for line in trainings:
        words = line.partition(" train.py ")[2].split()
        cfg = load_config(words, 8)
        assert cfg.tokens_per_step == 491_520 and cfg.max_iters == cfg.lr_decay_iters
        small = TINY_RUN.split() + flags(dataset=tiny_data, out_dir=tmp_path / cfg.out_dir)
        done = run("train.py", ROOT / words[0], *words[1:], *small)
        assert done.returncode == 0, done.stderr
    done = run(*compare.split()[1:], cwd=tmp_path)
    rows = [line.split()[:3] for line in done.stdout.splitlines()[1:4]]
    assert rows == [[f"gpt2-small-{name}", optimizer, "2"] for name, optimizer in (
        ("adamw", "adamw"), ("sophiag", "sophiag"), ("sophiag-half", "sophiag"))], done.stderr
    assert (tmp_path / "reproduce.png").stat().st_size > 10_000


@pytest.mark.slow
def test_official_checkpoints_are_evaluated(copy, tmp_path):
    tokens = np.random.default_rng(0).integers(0, V, 4000)
    data = write_data(tmp_path / "bytes", tokens[:3000], tokens[3000:], V)
    theirs = build_theirs(vocab_size=320, bias=False, scale_attn_by_inverse_layer_idx=True)
    (copy / "official").mkdir()
    as_sophia(theirs, copy / "official/ckpt.pt")
    settings = {**SHAPE, "bias": False, "scale_attn_by_inverse_layer_idx": True}
    words = flags(**settings, block_size=CONTEXT, batch_size=4, total_batch_size=8, eval_iters=0,
                  device="cpu", compile=False, dataset=data, wandb_log=False)
    assert f"val loss {their_loss(theirs, data):.4f}" in fork("official", *words, cwd=copy)


@pytest.mark.slow
def test_snippets_of_the_faq_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}

    def hessian():
        return torch.cat([s["hessian"].flatten() for s in names["optimizer"].state.values()])

    exec(compile(SNIPPETS[0], "faq", "exec"), names)
    model, optimizer = names["model"], names["optimizer"]
    assert optimizer.param_groups[0]["bs"] == 4 * 8 * 64
    exec(compile(SNIPPETS[1], "faq", "exec"), names)
    after_one = hessian()
    assert after_one.any()
    exec(compile(SNIPPETS[2], "faq", "exec"), names)
    after_two = hessian()
    # Unscaled before it is squared: not 65,536 ** 2 times as large.
    assert not torch.equal(after_one, after_two) and after_two.sum() < 5 * after_one.sum()
    with torch.no_grad():
        model[1].bias[0] = torch.inf
    exec(compile(SNIPPETS[2].replace("sampled_label_loss(batch)", "model(batch).sum()"), "faq",
                 "exec"), names)
    assert torch.equal(hessian(), after_two) and optimizer.found_inf is None
    exec(compile(SNIPPETS[3], "faq", "exec"), names)
    decays = {id(p): group["weight_decay"] for group in names["optimizer"].param_groups
              for p in group["params"]}
    assert [decays[id(p)] for p in model.parameters()] == [0.0, 0.2, 0.0]

    official = SophiaG([{"params": group["params"]} for group in names["optimizer"].param_groups])
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    official.step()
    official.update_hessian()
    saved = official.state_dict()
    for group in saved["param_groups"]:
        del group["bs"], group["fused"], group["target_win_rate"]
    os.mkdir("official")
    torch.save({"optimizer": saved}, "official/ckpt.pt")
    exec(compile(SNIPPETS[4], "faq", "exec"), names)
    assert len(SNIPPETS) == 5
    assert torch.equal(hessian(), torch.full_like(after_two, 0.01))
    assert all(group["bs"] == 4 * 8 * 64 for group in names["optimizer"].param_groups)


def test_the_hook_updates_the_hessian_every_tenth_bare_step():
    names = {}
    exec(compile(HOOK, "trainers.md", "exec"), names)
    model, optimizer = names["model"], names["optimizer"]
    for step in range(1, 31):
        model(torch.randint(0, 100, (8, 64))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        updated = [bool(s["hessian"].any()) for s in optimizer.state.values()]
        assert all(updated) == (step >= 10)


@pytest.mark.slow
def test_the_fsdp2_snippet_shards_a_model_over_two_ranks(tmp_path):
    (tmp_path / "fsdp.py").write_text(FSDP2)
    done = run(tmp_path / "fsdp.py", ranks=2)
    assert done.returncode == 0, done.stderr
    # Two processes print in any order, and a line may begin before the other's has ended.
    found = sorted(re.findall(r"(10|20) win_rate (\d\.\d{3})", done.stdout))
    assert [step for step, _ in found] == ["10", "10", "20", "20"]
    assert found[0] == found[1] and found[2] == found[3]   # win_rate of the whole model


@pytest.mark.parametrize("page", [*PAGES, "reproduce.md"])
def test_links_resolve_to_files_and_headings(page):
    text = (ROOT / "docs" / page).read_text()
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text)
             if not link.startswith("http")]
    assert len(links) >= 3
    for link in links:
        path, _, anchor = link.partition("#")
        target = ROOT / "docs" / (path or page)
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-")
                              for heading in headings], link


@pytest.mark.slow
def test_the_toy_figure_matches_its_caption():
    loss, best_path = FIGURES["toy_loss"], FIGURES["best_path"]
    paths = {method: best_path(method) for method in FIGURES["METHODS"]}
    ends = {method: loss(path[-1]) for method, path in paths.items()}
    assert len(COLOURS) >= len(paths)
    np.testing.assert_allclose(paths["Newton"][-1], (0, 4), atol=1e-9)    # the saddle
    np.testing.assert_allclose(paths["Sophia"][-1], (1, 4), atol=1e-6)    # a minimum
    assert min(ends, key=ends.get) == "Sophia"
    assert paths["gradient descent"][-1][1] < 2                            # still on its way to 4
    steps = np.abs(np.diff(paths["sign descent"], axis=0))
    np.testing.assert_allclose(steps, steps[0, 0])                         # equal in both
    late = loss(paths["Adam"][len(steps) // 2:].T)
    assert late.max() > 5 * late[0]                                        # thrown back


@pytest.mark.slow
def test_kinds_of_parameters_add_up_to_the_logged_win_rate(tiny_data, tmp_path):
    out = tmp_path / "run"
    train(out, tiny_data, hessian_interval=2, rho=0.5, target_win_rate=0.3, max_iters=40)
    ratios = FIGURES["clip_ratios"](str(out))
    saved = checkpoint.load(checkpoint.path_of(out, 40))
    shapes = {name: t.numel() for name, t in saved["model"].items() if name != "lm_head.weight"}
    wanted = {"token embedding": shapes["transformer.wte.weight"],
              "position embedding": shapes["transformer.wpe.weight"],
              "attention": 2 * (3 + 1) * 32 * 32, "MLP": 2 * (4 + 4) * 32 * 32, "norms": 5 * 32}
    assert {kind: ratio.size for kind, ratio in ratios.items()} == wanted
    assert sum(wanted.values()) == sum(shapes.values())
    win_rate = np.mean(np.concatenate(list(ratios.values())) < 1)
    logged = records(out, "train/win_rate")[-1]["train/win_rate"]
    assert 0.05 < logged < 0.95 and abs(win_rate - logged) < 2 / sum(wanted.values())


@pytest.mark.slow
def test_figures_need_a_run_of_sophiag(tiny_data, tmp_path):
    train(tmp_path / "adamw", tiny_data, optimizer="adamw", max_iters=2)
    assert json.loads((tmp_path / "adamw/config.json").read_text())["optimizer"] == "adamw"
    before = {path: path.stat().st_mtime_ns for path in ROOT.glob("docs/*.png")}
    for folder, word in ("adamw", "adamw"), ("nowhere", "config/quickstart_sophiag.py"):
        done = run("docs/figures.py", tmp_path / folder)
        assert done.returncode == 2 and word in done.stderr and done.stderr.count("\n") == 1
    assert before == {path: path.stat().st_mtime_ns for path in ROOT.glob("docs/*.png")}
