"""sample.py and compare.py read the run directories of train.py."""
import json

import pytest
from conftest import records, run, train, write_characters, write_data

import checkpoint


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that has learned to write 'hello world. ' in bytes."""
    folder = tmp_path_factory.mktemp("sample")
    text = list(b"hello world. ") * 400
    data = write_data(folder / "hello", text, text[:1300], vocab_size=257)
    train(folder / "run", data, max_iters=200, lr_decay_iters=200, eval_interval=100,
          learning_rate=3e-3, optimizer="adamw", log_interval=50)
    return folder / "run"


def text_of(done):
    """The printed samples."""
    assert done.returncode == 0, done.stderr
    return [part.strip("\n") for part in done.stdout.split("-" * 80)[1:-1]]


def test_greedy_sampling_repeats_the_training_text(trained):
    samples = text_of(run("sample.py", trained, "--prompt=hello w", "--temperature=0",
                          "--num_samples=2", "--max_new_tokens=40"))
    assert samples == [("hello world. " * 4)[:47].strip()] * 2


def test_streaming_prints_only_complete_characters(trained):
    """Random bytes are rarely valid UTF-8, yet the streamed text must be their decoding."""
    words = (trained, "--prompt=h\u00e9", "--temperature=3", "--top_k=0", "--max_new_tokens=50")
    one, = text_of(run("sample.py", *words))
    assert one.startswith("h\u00e9") and "\ufffd" in one
    greedy, = text_of(run("sample.py", trained, "--prompt=hello w", "--temperature=0.1",
                          "--top_p=0.5", "--max_new_tokens=40"))
    assert greedy == ("hello world. " * 4)[:47].strip()


@pytest.mark.slow
def test_the_seed_determines_the_samples_and_prompts_can_be_files(trained, tmp_path):
    (tmp_path / "prompt.txt").write_text("world")
    words = (trained, f"--prompt=FILE:{tmp_path}/prompt.txt", "--temperature=2", "--top_k=0",
             "--max_new_tokens=60", "--num_samples=2")
    first, again, other = (text_of(run("sample.py", *words, f"--seed={s}")) for s in (1, 1, 2))
    assert first == again and first != other
    assert all(s.startswith("world") for s in first) and first[0] != first[1]


def test_a_run_uses_its_best_checkpoint_and_a_file_uses_itself(trained):
    best = checkpoint.load(checkpoint.path_of(trained, 200))["best_step"]
    words = ("--max_new_tokens=1", "--num_samples=1")
    assert f"step {best}" in run("sample.py", trained, *words).stdout
    assert "step 100" in run("sample.py", trained / "ckpt_00000100.pt", *words).stdout


@pytest.mark.slow
def test_compare_shows_the_last_and_the_best_evaluation(trained, tiny_data, tmp_path):
    train(tmp_path / "other", tiny_data, max_iters=2)
    done = run("compare.py", trained, tmp_path / "other")
    assert done.returncode == 0, done.stderr
    head, first, second = done.stdout.splitlines()[:3]
    assert "final val loss" in head and "adamw" in first and "sophiag" in second
    for row, folder in (first, trained), (second, tmp_path / "other"):
        evaluations = records(folder, "val/loss")
        assert f"{evaluations[-1]['val/loss']:.4f}" in row
        assert f"{min(e['val/loss'] for e in evaluations):.4f}" in row
        assert f"{evaluations[-1]['tokens']:,}" in row
    assert json.loads((trained / "config.json").read_text())["optimizer"] in first


def test_a_model_of_nanogpts_characters_samples_characters(tmp_path):
    """The start-up line names the vocabulary. Samples start after a line break, and do not end."""
    data = write_characters(tmp_path / "characters", "h\u00e9llo wurld.\n" * 300)
    output = train(tmp_path / "run", data, max_iters=150, lr_decay_iters=150, eval_interval=150,
                   learning_rate=3e-3, optimizer="adamw", log_interval=50, sample_tokens=30)
    assert "(11 characters, from meta.pkl)" in output
    assert records(tmp_path / "run", "sample")[-1]["sample"] == ("h\u00e9llo wurld.\n" * 3)[:30]
    words = (tmp_path / "run", "--temperature=0", "--max_new_tokens=30")
    assert text_of(run("sample.py", *words)) == [("h\u00e9llo wurld.\n" * 3)[:30]]
    assert text_of(run("sample.py", *words, "--prompt=wu")) == [
        ("wurld.\n" + "h\u00e9llo wurld.\n" * 2)[:32]]
    for script, word, named in (("sample.py", "--prompt=x", "the vocabulary has no 'x'"),
                                ("export.py", f"--out={tmp_path}/out", "cannot be exported")):
        done = run(script, tmp_path / "run", word)
        assert done.returncode == 2 and named in done.stderr and done.stderr.count("\n") == 1
    other = write_characters(tmp_path / "other", "HELLO WURLd.\n" * 300)
    with pytest.raises(AssertionError, match="trained with another tokenizer"):
        train(tmp_path / "tuned", other, init_from=tmp_path / "run")
