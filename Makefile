# make demo: set up .venv, prepare text, train a small topographic GPT, show its maps and a sample (CPU or GPU, minutes)
# make test: set up .venv, check the code's style, run every test
# make control: the demo's matched control, without the spatial loss

VENV := .venv
PY := $(VENV)/bin/python
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PIP := $(PY) -m pip --disable-pip-version-check --quiet install --constraint constraints.txt

.PHONY: demo control test clean

demo: $(VENV)/.demo data/pydoc/manifest.json
	$(PY) train.py configs/demo.yaml --run_name demo --overwrite
	@echo
	@$(PY) summary.py out/demo
	@echo && echo "a sample:"
	@$(PY) sample.py out/demo --prompt "The function returns" --max_new_tokens 60

control: $(VENV)/.demo data/pydoc/manifest.json
	$(PY) train.py configs/demo.yaml --run_name demo-control --overwrite --topo.loss none
	@echo
	@$(PY) summary.py out/demo-control

test: $(VENV)/.test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pytest

data/pydoc/manifest.json:
	$(PY) prepare_fineweb.py --source pydoc --out_dir data/pydoc --val_fraction 0.05

$(VENV)/.demo: setup.py constraints.txt | $(PY)
	@echo "installing into $(VENV): takes a few minutes the first time"
	$(PIP) --editable ".[figures]"
	@touch $@

$(VENV)/.test: setup.py constraints.txt | $(PY)
	@echo "installing into $(VENV): takes a few minutes the first time"
	$(PIP) --editable ".[dev]"
	@touch $@

$(PY):
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.11 found; install one, or give make PYTHON=/path/to/python3"; exit 2; }
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) *.egg-info
