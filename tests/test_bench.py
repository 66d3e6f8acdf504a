"""bench.py runs every section, and its numbers are of the right kind; how large they are is not a
test's business."""
import json

from conftest import TINY, flags, run


def test_every_section_reports_positive_numbers(tiny_data, tmp_path):
    done = run("bench.py", *flags(**TINY, dataset=tiny_data), "--repeat=1",
               f"--json={tmp_path}/bench.json", f"--profile={tmp_path}/trace.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "bench.json").read_text())
    rows = {(r["section"], r["name"]): r for r in found["rows"]}
    assert {section for section, _ in rows} == {"optimizer", "step", "data", "generate",
                                                "tokenize"}
    for (_, name), row in rows.items():
        assert row["value"] > 0 and name in done.stdout, name
    assert "equal tokens" in rows["generate", "16 tokens, uncached"]["note"]
    share = rows["step", "hessian, share of a step"]["value"]
    assert 0 < share < 100
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_adamw_has_no_hessian_and_missing_data_means_random_tokens(tmp_path):
    done = run("bench.py", *flags(**TINY, dataset=f"{tmp_path}/none", optimizer="adamw"),
               "--only=step", "--repeat=1", "--n_embd=16")
    assert done.returncode == 0, done.stderr
    assert "random tokens" in done.stdout and "hessian:" not in done.stdout


def test_mistakes_get_one_line():
    for word, named in ("--only=speed", "speed"), ("--repeat=0", "repeat"), ("--lr=1", "lr"):
        done = run("bench.py", word)
        assert done.returncode == 2 and named in done.stderr and done.stderr.count("\n") == 1
