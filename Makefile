# Every target sets up what it needs: a .venv here, with the project and tested versions of its packages.
PYTHON ?= python3
IMAGES ?=
PY := .venv/bin/python
V2FLOW := .venv/bin/v2flow
DATA ?= ../shared/data

.PHONY: demo test test-slow lint default-model flexible-model default-model-dry-run clean

demo: .venv/installed  ## Photos to tokens and back, a sentence to a picture, one page that shows it
	$(PY) -m v2flow_cli.demo.page --out demo $(if $(IMAGES),--images "$(IMAGES)")

test: .venv/installed  ## The everyday suite, a process on each core
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 8 --dist loadfile

test-slow: .venv/installed  ## The long tests too
	$(PY) -m pytest -m "not gpu and not network"

lint: .venv/installed
	$(PY) -m ruff check .
	$(PY) -m mypy v2flow_cli

# The embedded model, stage by stage; each stage resumes where it stopped. DATA holds photos/, captioned/, drawings/ and
# text/. scenes.py draws the pictures that the tokenizer and the LLM learn drawings from.
SCENES := $(PY) recipes/default/scenes.py --drawings $(DATA)/drawings/drawings-000.tar
ENCODE := $(V2FLOW) encode --tokens 64 --model runs/default/tokenizer_256

default-model: .venv/installed
ifdef MINUTES  # all stages in that wall time; see docs/budget.md
	$(V2FLOW) budget recipes/default/budget.yaml --minutes $(MINUTES)
else
	$(SCENES) --photos $(DATA)/photos --out runs/default/scenes --count 8000
	$(SCENES) --layout centred --per-title 3 --out runs/default/centred
	$(SCENES) --layout centred --per-title 1 --common --out runs/default/common
	$(SCENES) --layout centred --per-title 1 --out runs/default/titles
	$(SCENES) --layout colours --per-title 1 --common --out runs/default/colours
	$(V2FLOW) train recipes/default/autoencoder.yaml --resume
	$(V2FLOW) finetune-llm recipes/default/lm.yaml --resume
	$(V2FLOW) train recipes/default/tokenizer.yaml --resume
	$(V2FLOW) train recipes/default/tokenizer_256.yaml --resume
	$(V2FLOW) train recipes/default/tokenizer_decoder.yaml --resume
	$(V2FLOW) train recipes/default/tokenizer_sharp.yaml --resume
	$(PY) -c 'from v2flow_cli.jobs.add_decoder import add_decoder as add; add("runs/default/tokenizer", "runs/default/tokenizer_sharp")'
	$(ENCODE) runs/default/centred -o runs/default/tokens_centred
	$(ENCODE) runs/default/common -o runs/default/tokens_common
	$(ENCODE) runs/default/titles -o runs/default/tokens_titles
	$(ENCODE) runs/default/colours -o runs/default/tokens_colours
	$(V2FLOW) finetune-llm recipes/default/llm.yaml --resume
	$(V2FLOW) finetune-llm recipes/default/llm_noise.yaml --resume
	$(V2FLOW) finetune-llm recipes/default/llm_common.yaml --resume
	$(V2FLOW) finetune-llm recipes/default/llm_colours.yaml --resume
	$(V2FLOW) finetune-llm recipes/default/llm_last.yaml --resume
	$(V2FLOW) finetune-llm recipes/default/llm_captions.yaml --resume
endif
	mkdir -p v2flow_cli/assets/default/tokenizer v2flow_cli/assets/default/llm
	cp runs/default/tokenizer/README.md runs/default/tokenizer/recipe.yaml runs/default/tokenizer/*.json runs/default/tokenizer/*.safetensors v2flow_cli/assets/default/tokenizer/
	cp recipes/default/NOTICE v2flow_cli/assets/default/tokenizer/
	cp recipes/default/NOTICE v2flow_cli/assets/default/llm/
	cp runs/default/llm/README.md runs/default/llm/recipe.yaml runs/default/llm/*.json runs/default/llm/*.safetensors runs/default/llm/*.jinja runs/default/llm/*.npy v2flow_cli/assets/default/llm/

# The embedded tokenizer of flexible length (--model flexible); its autoencoder is the default model's.
flexible-model: .venv/installed  # finished stages are kept
	$(V2FLOW) budget recipes/flextok/budget.yaml --minutes $(or $(MINUTES),330) --only small_sharp
	$(PY) -c 'from pathlib import Path; from v2flow_cli.tokenizer.embedded import FLEXIBLE_MODEL, share_autoencoder as share; share(Path("runs/flextok/small_sharp"), FLEXIBLE_MODEL, num_flow_steps=1, noise_temperature=0.0)'
	cp recipes/default/NOTICE v2flow_cli/assets/flexible/

# Sizes are printed although earlier stages have not run, which each command reports and make then passes over.
default-model-dry-run: .venv/installed
	-$(V2FLOW) train recipes/default/autoencoder.yaml --dry-run
	-$(V2FLOW) finetune-llm recipes/default/lm.yaml --dry-run
	-$(V2FLOW) train recipes/default/tokenizer.yaml --dry-run
	-$(V2FLOW) train recipes/default/tokenizer_256.yaml --dry-run
	-$(V2FLOW) train recipes/default/tokenizer_decoder.yaml --dry-run
	-$(V2FLOW) train recipes/default/tokenizer_sharp.yaml --dry-run

clean:
	rm -rf .venv demo build dist

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
