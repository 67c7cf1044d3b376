# Every target sets up what it needs: a .venv here, with the project and tested versions of its packages.
PYTHON ?= python3
IMAGES ?=
PY := .venv/bin/python
V2FLOW := .venv/bin/v2flow
ON_TWO := OMP_NUM_THREADS=1 .venv/bin/torchrun --standalone --nproc-per-node 2 -m v2flow_cli.cli.app
DATA ?= ../shared/data
PAIRS ?= $(DATA)/captioned/captioned-00[0-2].tar
MORE_PAIRS ?= $(DATA)/captioned/captioned-00[34].tar

.PHONY: demo test test-slow lint default-model default-model-dry-run clean

demo: .venv/installed  ## Photos to tokens and back, a sentence to a picture, one page that shows it
	$(PY) -m v2flow_cli.demo.page --out demo $(if $(IMAGES),--images "$(IMAGES)")

test: .venv/installed  ## The everyday suite
	$(PY) -m pytest

test-slow: .venv/installed  ## The long tests too
	$(PY) -m pytest -m "not gpu and not network"

lint: .venv/installed
	$(PY) -m ruff check .
	$(PY) -m mypy v2flow_cli

# The embedded model, stage by stage; each stage resumes where it stopped. DATA holds photos/, captioned/, text/;
# PAIRS are the captioned shards that the LLM learns to draw from, MORE_PAIRS those that its later stages have too.
default-model: .venv/installed
	$(V2FLOW) train recipes/default/autoencoder.yaml --resume
	$(V2FLOW) finetune-llm recipes/default/lm.yaml --resume
	$(V2FLOW) train recipes/default/tokenizer.yaml --resume
	$(V2FLOW) train recipes/default/tokenizer_256.yaml --resume
	$(V2FLOW) train recipes/default/tokenizer_decoder.yaml --resume
	$(V2FLOW) encode $(PAIRS) -o runs/default/tokens --model runs/default/tokenizer_256
	$(V2FLOW) encode $(MORE_PAIRS) -o runs/default/tokens_more --model runs/default/tokenizer_256
	$(V2FLOW) finetune-llm recipes/default/llm.yaml --resume
	$(ON_TWO) finetune-llm recipes/default/llm_gist.yaml --resume
	$(V2FLOW) finetune-llm recipes/default/llm_clean.yaml --resume
	$(ON_TWO) finetune-llm recipes/default/llm_last.yaml --resume
	mkdir -p v2flow_cli/assets/default/tokenizer v2flow_cli/assets/default/llm
	cp runs/default/tokenizer/README.md runs/default/tokenizer/recipe.yaml runs/default/tokenizer/*.json runs/default/tokenizer/*.safetensors v2flow_cli/assets/default/tokenizer/
	cp runs/default/llm_last/README.md runs/default/llm_last/recipe.yaml runs/default/llm_last/*.json runs/default/llm_last/*.safetensors runs/default/llm_last/*.jinja runs/default/llm_last/*.npy v2flow_cli/assets/default/llm/

default-model-dry-run: .venv/installed
	$(V2FLOW) train recipes/default/autoencoder.yaml --dry-run
	$(V2FLOW) finetune-llm recipes/default/lm.yaml --dry-run
	$(V2FLOW) train recipes/default/tokenizer.yaml --dry-run
	$(V2FLOW) train recipes/default/tokenizer_256.yaml --dry-run
	$(V2FLOW) train recipes/default/tokenizer_decoder.yaml --dry-run

clean:
	rm -rf .venv demo build dist

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
