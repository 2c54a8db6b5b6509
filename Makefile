# Two commands do everything: `make run` (train, measure and X-ray a real multimodal model) and `make test`.
PYTHON ?= python3
SCALE ?= laptop
SEED ?= 0
BIN := .venv/bin
export JUPYTER_PREFER_ENV_PATH := 1
export TOKENIZERS_PARALLELISM := false
# no look for a newer version on the network
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: help setup run full claims test numbers lab export check docs readme sidebar clean
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

export: setup    ## the package from the notebooks: clean, export, sort imports, format
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export
	$(BIN)/ruff check --quiet --select I --fix mmemo
	$(BIN)/ruff format --quiet mmemo

check: export    ## notebooks are clean, the package is what they export, ruff and pyright find nothing
	@test -z "$$(git status --porcelain -- nbs mmemo)" || { git status --short -- nbs mmemo; echo "notebooks and package differ: commit what make export changed"; exit 1; }
	$(BIN)/ruff check --quiet nbs mmemo tests
	$(BIN)/ruff format --quiet --check nbs mmemo tests
	$(BIN)/pyright --pythonpath $(BIN)/python

numbers: setup   ## does every number still come out bit for bit? (two minutes, one kind of CPU)
	$(BIN)/python tests/fingerprints.py --compare tests/fingerprints.json

docs: setup      ## the web site, where Quarto is installed
	@if command -v quarto >/dev/null; then $(BIN)/nbdev_docs; else echo "the docs need Quarto (quarto.org); nothing was built"; fi

readme: setup    ## README.md from nbs/index.ipynb
	@$(BIN)/jupyter nbconvert --log-level=ERROR --to markdown --stdout nbs/index.ipynb | perl -pe '$$code ^= /^```/; if (!$$code) { s#\]\((?!https?:|\.\./)#](nbs/#g; s#\]\(\.\./#](#g }' > README.md

sidebar: setup   ## the site's list of notebooks, from the notebooks that are there
	$(BIN)/python tests/sidebar.py

clean:           ## remove what runs leave behind (not the environment)
	rm -rf _runs _docs _proc _data
