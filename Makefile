# make quickstart: train the same small GPT with SophiaG and with AdamW, compare, sample.
# make test:       lint and all tests.
# make quick:      a subset of the tests, in under a minute.
# make lint:       ruff alone.
# make check-gpu:  test and measure this machine's GPU.
PYTHON ?= python3
PY = .venv/bin/python
# Further settings for the runs, e.g. make quickstart ARGS=--max_iters=100
ARGS ?=

.PHONY: quickstart test quick lint check-gpu
.DELETE_ON_ERROR:

quickstart: .venv/installed data/pystdlib/meta.json
	$(PY) train.py config/quickstart_sophiag.py --init_from=auto $(ARGS)
	$(PY) train.py config/quickstart_adamw.py --init_from=auto $(ARGS)
	$(PY) compare.py out/quickstart-sophiag out/quickstart-adamw --plot=out/quickstart.png
	$(PY) sample.py out/quickstart-sophiag --prompt="def " --max_new_tokens=400 --top_k=50 --seed=3
	@echo "Next: look at out/quickstart.png, change a setting of config/quickstart_sophiag.py,"
	@echo "search a learning rate with sweep.py, or read on in README.md"

# worksteal: a worker that is done takes tests from the other, so neither core is idle at the end.
test: lint
	$(PY) -m pytest -q -n 2 --dist worksteal --durations=10

quick: .venv/installed-tests
	$(PY) -m pytest -q -n 2 --dist worksteal -m "not slow" --ignore=tests/test_examples.py

lint: .venv/installed-tests
	$(PY) -m ruff check .

check-gpu: .venv/installed-tests
	@$(PY) tests/check_gpu.py $(ARGS)

data/pystdlib/meta.json: | .venv/installed
	$(PY) data/pystdlib/prepare.py

.venv/installed: requirements.txt
	$(PYTHON) -c "import sys; sys.version_info >= (3, 11) or sys.exit('Python 3.11+ is needed, e.g. make PYTHON=python3.12')"
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --progress-bar=on -r requirements.txt
	touch $@

.venv/installed-tests: .venv/installed requirements-test.txt examples/requirements.txt
	$(PY) -m pip install -r requirements-test.txt
	touch $@
