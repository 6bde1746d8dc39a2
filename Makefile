# make demo and make test set themselves up on a fresh clone. PYTHON chooses the interpreter: 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo chain test lint clean

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

# Backbone, detector started from it, pictures, ONNX: the README's commands, one after the other.
chain: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-export.txt
	$(BIN)/python -m data.drawn imagefolder runs/data/shapes --images 3000
	$(BIN)/python train_backbone.py --config configs/backbone_small.toml --data runs/data/shapes --model-dir runs/shapes --overwrite
	$(BIN)/python -m data.drawn coco runs/data/coco --images 500
	$(BIN)/python train_retinanet.py --config configs/retinanet_small.toml --coco_path runs/data/coco --backbone-weights runs/shapes/backbone.pt --epochs 5 --model-dir runs/chain --overwrite
	$(BIN)/python predict.py runs/chain/best.pt runs/data/coco/val2017 --out runs/chain/pictures
	$(BIN)/python export.py runs/chain/best.pt --size 160 224 --nms --out runs/chain/retinanet.onnx

test: setup
	$(BIN)/python -m pytest -q

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv runs .pytest_cache .ruff_cache
