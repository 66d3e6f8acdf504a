"""device.py: the choices for a GPU that is faked, and the line about a GPU that is not used."""
import os
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, flags, run
from fake_gpu import fake_gpu

import device
from configurator import load_config
from ddp import World
from model import GPT, GPTConfig
from script import UserError
from train import print_summary


@pytest.mark.parametrize("kind, setting, native, wanted", [
    ("cuda", "auto", True, "bfloat16"), ("cuda", "auto", False, "float16"),
    ("cuda", "float32", False, "float32"), ("cuda", "bfloat16", False, "bfloat16"),
    ("cpu", "auto", True, "float32"), ("mps", "auto", True, "float32")])
def test_auto_is_float16_on_gpus_without_native_bfloat16(monkeypatch, kind, setting, native,
                                                         wanted):
    fake_gpu(monkeypatch, bfloat16=native)
    assert device.resolve_dtype(setting, torch.device(kind)) == getattr(torch, wanted)


@pytest.mark.parametrize("dtype, native, line", [
    ("auto", False, "cuda, float16 with a GradScaler, since this GPU has no native bfloat16, "),
    ("float16", True, "cuda, float16 with a GradScaler, "), ("auto", True, "cuda, bfloat16, ")])
def test_the_start_up_line_says_why_it_is_float16(monkeypatch, capsys, dtype, native, line):
    gpu = fake_gpu(monkeypatch, "Tesla T4", native, 16, 15.5)
    cfg = load_config(flags(dtype=dtype, batch_size=4))
    data = SimpleNamespace(tokens=SimpleNamespace(count=10**6), meta={"tokenizer": "gpt2"},
                           windows=976)
    with torch.device("meta"):
        model = GPT(GPTConfig())
    print_summary(cfg, World(0, 1, gpu), data, model, device.resolve_dtype(dtype, gpu), True, None)
    lines = capsys.readouterr().out.splitlines()
    assert f"machine: {line}compiled" in lines and "GPU: Tesla T4, 16.00 GB" in lines


def pretend_driver(monkeypatch, folder, how):
    """Fake what is left of an NVIDIA GPU: its driver's folder in /proc, or nvidia-smi in PATH."""
    exists = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda path: exists(path) or (
        how == "driver" and path == "/proc/driver/nvidia"))
    monkeypatch.setenv("PATH", str(folder))
    if how == "nvidia-smi":
        (folder / "nvidia-smi").write_text("#!/bin/sh\n")
        (folder / "nvidia-smi").chmod(0o755)


@pytest.mark.parametrize("how", ["driver", "nvidia-smi"])
@pytest.mark.parametrize("reason", ["Torch not compiled with CUDA enabled", "The NVIDIA driver on "
                                    "your system is too old (found version 12020)."])
def test_an_nvidia_gpu_that_pytorch_cannot_use_is_one_line(monkeypatch, capsys, tmp_path, how,
                                                           reason):
    def fail():
        raise (AssertionError if "compiled" in reason else RuntimeError)(reason + "\nMore.")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", fail)
    pretend_driver(monkeypatch, tmp_path, how)
    assert device.pick_device("auto") == torch.device("cpu")
    line, = capsys.readouterr().out.splitlines()
    assert all(word in line for word in ("device=auto", torch.__version__, reason, "docs/gpu.md"))
    with pytest.raises(UserError, match="device=cuda is not available") as refused:
        device.pick_device("cuda")
    assert reason in str(refused.value)
    assert device.pick_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")   # the user hides it
    assert device.pick_device("auto") == torch.device("cpu")
    assert capsys.readouterr().out == ""


def test_a_machine_without_a_gpu_and_one_with_a_gpu_that_works_print_nothing(monkeypatch, capsys,
                                                                           tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    pretend_driver(monkeypatch, tmp_path, "nothing")
    assert device.pick_device("auto") == torch.device("cpu")
    pretend_driver(monkeypatch, tmp_path, "driver")
    gpu = fake_gpu(monkeypatch)
    before = torch.get_float32_matmul_precision()
    try:
        assert device.pick_device("auto") == gpu
    finally:
        torch.set_float32_matmul_precision(before)
    assert capsys.readouterr().out == ""


def test_device_imports_nothing_of_the_model_or_the_optimizers():
    names = {line.split()[1] for line in (ROOT / "device.py").read_text().splitlines()
             if line.startswith(("import ", "from "))}
    assert names & {path.stem for path in ROOT.glob("*.py")} == {"ddp", "script"}


def test_deterministic_runs_refuse_kernels_that_are_not(tmp_path):
    """In compiled code they raise errors, since PyTorch otherwise keeps FlashAttention's backward
    pass as it is; in eager code they warn."""
    script = tmp_path / "check.py"
    script.write_text("""import torch, device
for compiled in True, False:
    device.require_determinism(compiled)
    print(torch.are_deterministic_algorithms_enabled(),
          torch.is_deterministic_algorithms_warn_only_enabled(),
          torch.backends.cuda.cudnn_sdp_enabled())
""")
    assert run(script, PYTHONPATH=str(ROOT)).stdout.splitlines() == ["True False False",
                                                                   "True True False"]
