# Every target sets up .venv first. PYTHON chooses the interpreter, 3.11 or newer: make PYTHON=python3.12 test
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo chain test test-fast test-gpu lint format bench bench-gpu docs-images clean

setup: .venv/done

.venv/done: requirements.txt requirements-dev.txt requirements-export.txt requirements-video.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	touch $@

# A detector from nothing in a few minutes: synthetic images, training, predictions.
demo: setup
	$(BIN)/python -m synthetic voc runs/demo_data --images 500 --seed 0
	$(BIN)/python train_ssd.py --config configs/ssd_demo.toml --data runs/demo_data --model-dir runs/demo --overwrite
	$(BIN)/python predict.py runs/demo/best.pt runs/demo_data/JPEGImages/0004[89]*.jpg --out runs/demo/predictions --overwrite

# Backbone, a detector that starts from it, predictions, ONNX.
chain: setup
	$(BIN)/python -m synthetic imagefolder runs/data/shapes --images 3000
	$(BIN)/python train_backbone.py --config configs/backbone_small.toml --data runs/data/shapes --model-dir runs/shapes --overwrite
	$(BIN)/python -m synthetic coco runs/data/coco --images 500
	$(BIN)/python train_retinanet.py --config configs/retinanet_small.toml --data runs/data/coco --backbone-weights runs/shapes/backbone.pt --epochs 5 --model-dir runs/chain --overwrite
	$(BIN)/python predict.py runs/chain/best.pt runs/data/coco/val2017 --out runs/chain/predictions --overwrite
	$(BIN)/python export.py runs/chain/best.pt --size 160 224 --nms --out runs/chain/retinanet.onnx

# One process per core: each test uses one thread.
test: setup
	$(BIN)/python -m pytest -q -n auto -m "not gpu"

# Without the tests of whole programs, which train networks, and of real data.
test-fast: setup
	$(BIN)/python -m pytest -q -n auto -m "not slow and not realdata and not gpu"

# What only a GPU can show; without one, one line says so. In one process: a GPU is not shared.
test-gpu: setup
	$(BIN)/python -m tests.gpu

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python -m benchmarks

bench-gpu: setup
	$(BIN)/python -m benchmarks gpu

# The images in docs/images, from networks trained on synthetic data.
docs-images: setup
	$(BIN)/python -m docs.draw_images

# Also deletes runs/ with all checkpoints.
clean:
	rm -rf .venv runs .pytest_cache .ruff_cache
