"""SophiaG and Lion on parameters sharded by FSDP2, against the same model in one piece."""
from conftest import run


def test_sharded_equals_whole_and_resumes_on_another_number_of_ranks(tmp_path):
    """Lion and SophiaG, eager and fused, rho fixed and steered; saved by two ranks through
    torch.distributed.checkpoint, and resumed by one and by two."""
    for job, ranks in ("train", 2), ("resume", 1), ("resume", 2):
        done = run("tests/fsdp_ranks.py", job, tmp_path, ranks=ranks)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("equal:") == 6
