"""examples/: each one runs, resumes exactly and estimates the Hessian correctly."""
import copy
import re
import subprocess
import sys

import lightning
import pytest
import torch
import transformers as hf
from conftest import ROOT, environment, run
from tokenizers import Tokenizer, models, pre_tokenizers

sys.path.append(str(ROOT / "examples"))
import hf_trainer  # noqa: E402
import image_classifier  # noqa: E402
import lightning_module  # noqa: E402

from sophia import SophiaG  # noqa: E402

pytestmark = pytest.mark.slow


def launch(*words):
    """Run a script in two processes, as a user of accelerate does."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu",
               "--num_processes=2", "--main_process_port=0", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), text=True, capture_output=True,
                          timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def hf_run(out_dir, *words):
    done = run("examples/hf_trainer.py", "--disable_tqdm=True", "--hessian_interval=2",
               "--logging_steps=1", "--per_device_train_batch_size=2",
               "--gradient_accumulation_steps=2", f"--output_dir={out_dir}", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """21 training sequences of 128 bytes, so 11 micro-batches: the sixth update of an epoch has one
    micro-batch instead of two."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text((ROOT / "sophia.py").read_bytes()[:24 * 128 + 1].decode("ascii", "replace"))
    return file


def test_hf_trainer_resumes_exactly_and_logs_win_rate(text, tmp_path):
    steps = ["--max_steps=8", "--save_steps=5", f"--text={text}"]
    output = hf_run(tmp_path / "whole", *steps)
    win_rates = [float(w) for w in re.findall(r"'win_rate': '([\d.e-]+)'", output)]
    assert len(win_rates) == 8 and win_rates[0] == 0 and 0 < win_rates[-1] < 1
    assert "eval_loss" in output
    resumed = hf_run(tmp_path / "resumed", *steps,
                     f"--resume_from_checkpoint={tmp_path}/whole/checkpoint-5")
    lines = [[re.sub("'epoch.*", "", line) for line in text.splitlines() if "'loss'" in line]
             for text in (output, resumed)]
    assert len(lines[1]) == 3 and lines[1] == lines[0][5:]
    first, second = (torch.load(tmp_path / name / "checkpoint-8/optimizer.pt")["state"]
                     for name in ("whole", "resumed"))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    weights = [(tmp_path / name / "checkpoint-8/model.safetensors").read_bytes()
               for name in ("whole", "resumed")]
    assert weights[0] == weights[1]


def test_hf_trainer_finetunes_a_folder(text, tmp_path):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "model")
    hf.GPT2LMHeadModel(hf.GPT2Config(
        vocab_size=256, n_positions=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=None,
        eos_token_id=None)).save_pretrained(tmp_path / "model")
    hf_run(tmp_path / "out", f"--model={tmp_path}/model", "--max_steps=2", f"--text={text}")
    tuned = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out/checkpoint-2")
    assert tuned.config.n_positions == 64


def test_hf_trainer_names_a_short_text_or_a_missing_file(tmp_path):
    done = run("examples/hf_trainer.py", f"--text={tmp_path}/none.txt")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].endswith("not a file; choose one with --text")
    done = run("examples/hf_trainer.py", f"--resume_from_checkpoint={tmp_path}")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(f"{tmp_path} is not a checkpoint")
    (tmp_path / "short.txt").write_text("x" * 256)
    done = run("examples/hf_trainer.py", f"--text={tmp_path}/short.txt")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].endswith("has 256 tokens; more than 256 are needed")


def test_hf_trainer_runs_in_two_processes(text, tmp_path):
    output = launch("examples/hf_trainer.py", f"--text={text}", "--max_steps=20",
                    f"--output_dir={tmp_path}", "--per_device_train_batch_size=2",
                    "--disable_tqdm=True", "--use_cpu")
    assert len(re.findall("'win_rate'", output)) == 2
    saved = torch.load(tmp_path / "checkpoint-20/optimizer.pt")
    assert saved["param_groups"][0]["bs"] == 2 * 2 * 127
    assert all(state["hessian"].any() for state in saved["state"].values())


def test_hf_trainer_estimates_the_gauss_newton_diagonal_in_two_processes(tmp_path):
    """The mean of 150 estimates, including padding and short last updates of an epoch. Unreduced
    gradients, equal noise on both ranks or a wrong bs would give a ratio of 2 or 1/2."""
    launch("tests/hf_estimates.py", tmp_path)
    found, exact = (torch.cat([t.flatten() for t in tensors])
                    for tensors in torch.load(tmp_path / "found.pt"))
    assert 0.93 < (found.sum() / exact.sum()).item() < 1.07
    assert torch.corrcoef(torch.stack([found, exact]))[0, 1] > 0.97


@pytest.mark.parametrize("scale", [2.0 ** 10, 2.0 ** 127])
def test_hf_trainer_leaves_a_gradient_scaler_as_it_is(tmp_path, scale):
    """As with fp16 on CUDA: the scaler only sees training steps, and an overflow, in the Hessian
    gradient or in training, changes nothing."""
    states = []
    for scaler in None, torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000):
        hf.set_seed(0)
        model = hf.GPT2LMHeadModel(hf.GPT2Config(
            vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=1, resid_pdrop=0,
            embd_pdrop=0, attn_pdrop=0, bos_token_id=None, eos_token_id=None))
        blocks = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 8
        args = hf.TrainingArguments(tmp_path, max_steps=6, max_grad_norm=0, save_strategy="no",
                                    disable_tqdm=True, per_device_train_batch_size=4,
                                    lr_scheduler_type="constant", learning_rate=1e-3)
        trainer = hf_trainer.SophiaTrainer(
            model, args, train_dataset=blocks, hessian_interval=1,
            optimizer_cls_and_kwargs=(SophiaG, dict(lr=1e-3, bs=4 * 7)))
        trainer.accelerator.scaler = scaler
        trainer.train()
        states.append(trainer.optimizer.optimizer.state_dict()["state"])
    if scale == 2.0 ** 10:
        torch.testing.assert_close(states[0], states[1])
        assert scaler.get_scale() == scale and scaler._get_growth_tracker() == 6
    else:
        assert scaler.get_scale() < scale
        assert all(state["hessian"].isfinite().all() for state in states[1].values())


def test_lightning_averages_the_hessian_gradient_over_two_processes(tmp_path):
    done = subprocess.run([sys.executable, "tests/lightning_estimates.py", tmp_path / "found.pt"],
                          cwd=ROOT, env=environment(), text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found, exact, labels, bs = torch.load(tmp_path / "found.pt")
    torch.testing.assert_close(found, exact, rtol=2e-3, atol=1e-12)
    assert bs == labels.numel() and not torch.equal(labels[0], labels[1])


def test_lightning_resumes_exactly(tmp_path):
    """An epoch has six updates; the last has one micro-batch instead of two. k is 4, so the third
    estimate, after twelve updates, is due only if the count continues after resuming."""
    torch.manual_seed(0)
    blocks = torch.randint(0, 256, (11 * lightning_module.BATCH, lightning_module.BLOCK + 1))

    def fit(model, epochs, **resume):
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", accumulate_grad_batches=2, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        trainer.fit(model, torch.utils.data.DataLoader(blocks, lightning_module.BATCH), **resume)
        return trainer

    first = lightning_module.LanguageModel(hessian_interval=4)
    start = copy.deepcopy(first.state_dict())
    fit(first, 1).save_checkpoint(tmp_path / "one.ckpt")
    resumed = fit(lightning_module.LanguageModel(hessian_interval=4), 2,
                  ckpt_path=tmp_path / "one.ckpt")
    whole = lightning_module.LanguageModel(hessian_interval=4)
    whole.load_state_dict(start)
    whole = fit(whole, 2)
    assert whole.global_step == resumed.global_step == 12
    for kind in (lambda t: t.lightning_module.state_dict(),
                 lambda t: t.optimizers[0].state_dict()["state"]):
        torch.testing.assert_close(kind(whole), kind(resumed), rtol=0, atol=0)
    assert whole.callback_metrics["win_rate"] == resumed.callback_metrics["win_rate"] > 0


def test_lightning_example_runs(tmp_path):
    done = run("examples/lightning_module.py", "--max_epochs=1", f"--out_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert re.search(r"\{'loss': \d.*'win_rate': 0\.\d", done.stdout)


def test_image_classifier_prints_a_table():
    done = run("examples/image_classifier.py", "--epochs=1", "--seeds=2")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert [row[0] for row in rows] == ["AdamW", "SophiaG"]
    for row in rows:
        losses = {float(rate[:-1]): float(loss) for rate, loss in zip(row[1:11:2], row[2:11:2])}
        assert len(losses) == 5 and losses[float(row[11])] == min(losses.values())


def test_image_classifier_estimates_the_gauss_newton_diagonal():
    """The mean of many estimates against the exact diagonal of the last bias, p (1 - p)."""
    torch.manual_seed(0)
    model, images = image_classifier.ViT(), torch.rand(image_classifier.BATCH, 1, 8, 8)
    optimizer = SophiaG(model.parameters(), lr=0, betas=(0.9, 0.998), bs=len(images))
    generator = torch.Generator().manual_seed(1)
    for _ in range(600):
        image_classifier.update_hessian(model, optimizer, images, generator)
    p = model(images).softmax(-1)
    bias = model.head[-1].bias
    found = optimizer.state[bias]["hessian"] * len(images) / (1 - 0.998 ** 600)
    torch.testing.assert_close(found, (p * (1 - p)).mean(0).detach(), rtol=0.25, atol=0)
    assert abs(found.sum() / (p * (1 - p)).mean(0).sum() - 1) < 0.06
