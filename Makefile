# Two commands do everything: `make run` (train, measure and X-ray a real multimodal model) and `make test`.
PYTHON ?= python3
SCALE ?= laptop
SEED ?= 0
BIN := .venv/bin
export JUPYTER_PREFER_ENV_PATH := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup run full claims test lab check docs readme clean
help:            ## what there is to make
	@grep -E '^[a-z]+:.*##' Makefile | sed 's/:.*##/\t/' | expand -t 10

.venv/ready: settings.ini setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv || echo "uv cannot be had: falling back to pip"
	if [ -x $(BIN)/uv ]; then $(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[dev]'; \
	else $(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'; fi
	touch $@

setup: .venv/ready ## a virtual environment with pinned packages

run: setup       ## the main job: the ladder on the known-answer corpus (SCALE=smoke|laptop|full, SEED=0)
	$(BIN)/mmemo run ladder --scale $(SCALE) --seed $(SEED)

full: setup      ## the ladder at published sizes, its promises asserted (needs a GPU and bert-base-uncased)
	$(BIN)/mmemo run ladder --scale full --seed $(SEED) --out _runs/ladder_full

claims: setup    ## what systems of this kind promise, defined and measured
	$(BIN)/mmemo run claims --scale $(SCALE) --seed $(SEED)

test: setup      ## unit tests, and every notebook executed at smoke scale
	@# Dozens of processes import the same packages: what one has compiled is kept for the others.
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n auto --dist loadscope

lab: setup       ## step through the lessons in JupyterLab
	$(BIN)/jupyter lab nbs/index.ipynb

check: setup     ## notebooks are clean, and the package is what they export
	$(BIN)/nbdev_clean && $(BIN)/nbdev_export
	@test -z "$$(git status --porcelain -- nbs mmemo)" || { git status --short -- nbs mmemo; echo "notebooks and package differ: commit what nbdev_clean and nbdev_export changed"; exit 1; }

docs: setup      ## the web site, where Quarto is installed
	@if command -v quarto >/dev/null; then $(BIN)/nbdev_docs; else echo "the docs need Quarto (quarto.org); nothing was built"; fi

readme: setup    ## README.md from nbs/index.ipynb
	@$(BIN)/jupyter nbconvert --log-level=ERROR --to markdown --stdout nbs/index.ipynb | perl -pe 's#\]\((?!https?:|\.\./)#](nbs/#g; s#\]\(\.\./#](#g' > README.md

clean:           ## remove what runs leave behind (not the environment)
	rm -rf _runs _docs _proc _data
