"""A GPU that torch.cuda reports but that does not exist, to test the choices made for a GPU."""
import torch


def fake_gpu(monkeypatch, name="NVIDIA H200", bfloat16=True, total_gb=150, free_gb=149):
    """Make torch.cuda report this GPU. Returns its torch.device; no tensor can be put there."""
    device = torch.device("cuda", 0)
    for function, result in dict(
            is_available=True, device_count=1, set_device=None, get_device_name=name,
            is_bf16_supported=bfloat16,
            mem_get_info=(int(free_gb * 1e9), int(total_gb * 1e9))).items():
        monkeypatch.setattr(torch.cuda, function, lambda *args, result=result, **kwargs: result)
    return device
