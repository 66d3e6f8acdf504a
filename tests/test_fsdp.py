"""SophiaG and Lion on a model sharded by FSDP2, against the same model unsharded."""
import pytest
from conftest import run


@pytest.mark.slow
def test_a_sharded_model_trains_like_an_unsharded_one_and_resumes_on_other_ranks(tmp_path):
    """Lion and SophiaG, eager and fused, with fixed and adapting rho. Two ranks save through
    torch.distributed.checkpoint; one rank and two ranks resume, without compiling again."""
    for job, ranks in ("train", 2), ("resume", 1), ("resume", 2):
        done = run("tests/fsdp_ranks.py", job, tmp_path, ranks=ranks)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("equal:") == (5 if job == "train" else 3)
