# make demo and make test set themselves up on a fresh clone. PYTHON chooses the interpreter: 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test lint clean

setup: .venv/done

.venv/done: requirements.txt requirements-dev.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	touch $@

demo: setup
	$(BIN)/python -m data.drawn voc runs/demo_data --images 500 --seed 0
	$(BIN)/python train_ssd.py --config configs/ssd_demo.toml --data runs/demo_data --model-dir runs/demo --overwrite
	$(BIN)/python predict.py runs/demo/best.pt runs/demo_data/JPEGImages/0004[89]*.jpg --out runs/demo/pictures

test: setup
	$(BIN)/python -m pytest -q

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv runs .pytest_cache .ruff_cache
