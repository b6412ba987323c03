# make demo: set up .venv, prepare text, train a small topographic GPT, show its maps, a sample and a report (CPU or GPU,
#            minutes); again: goes on, and keeps what was analysed; FRESH=1: anew, the old run kept as out/demo-TIME
#            STIMULI=folder for published stimuli (python -m evals.fetch); without one they are our own
# make test: set up .venv, check the code's style, run every test, on WORKERS=2 cores
# make check: before every commit, in about a minute: style, types of the public names, the quick tests
# make faults: kills, signals, two starts at once, flipped bits, full disks against tiny runs: the table of docs/FAULTS.md
# make test-compat: the exported model in transformers 4.51
# make control: the demo's matched control, without the spatial loss

VENV := .venv
PY := $(VENV)/bin/python
COMPAT := .venv-compat
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
STIMULI ?= data/stimuli
REPORT = $(PY) -m evals.report out/demo --stimuli_dir $(STIMULI) $(if $(wildcard out/demo-control/best),--control out/demo-control)
# A run that has a checkpoint goes on (a finished one is kept); what is left of one without is trained anew.
AGAIN = $$(ls -d out/demo/checkpoints/step-* >/dev/null 2>&1 && echo --resume || echo --overwrite)
WORKERS ?= 2
# A file's tests stay in one process, as they share runs.
PYTEST = $(PY) -m pytest --numprocesses $(WORKERS) --dist loadfile
QUICK = $(filter-out %/test_distributed.py %/test_wheel.py,$(wildcard tests/test_*.py)) \
	tests/analysis tests/model tests/spatial tests/text/test_loader.py -k "not compile and not gradcheck"
PIP := $(PY) -m pip --disable-pip-version-check --quiet install --constraint constraints.txt

.PHONY: demo control test check faults test-compat clean

demo: $(VENV)/.demo data/pydoc/manifest.json
	@$(if $(FRESH),test ! -d out/demo || mv out/demo out/demo-$$(date +%Y%m%d-%H%M%S))
	$(PY) train.py configs/demo.yaml --run_name demo $$(test ! -d out/demo || echo $(AGAIN))
	@echo
	@$(PY) topo.py out/demo --draw
	@echo
	@$(PY) export.py out/demo
	@echo && echo "a sample from the exported folder; after 200,000 tokens a model knows words and little of sentences:"
	@$(PY) sample.py out/demo/hf --prompt "The function returns" --max_new_tokens 60
	@echo
	@$(REPORT)

control: $(VENV)/.demo data/pydoc/manifest.json
	$(PY) train.py configs/demo.yaml --run_name demo-control --overwrite --topo.loss none
	@echo
	@$(PY) topo.py out/demo-control --draw
	@echo
	@test ! -d out/demo/best || $(PY) -m evals.report out/demo --control out/demo-control --stimuli_dir $(STIMULI)

test: $(VENV)/.test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PYTEST)

check: $(VENV)/.test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PYTEST) $(QUICK)

# As root of a namespace of its own, where there are such: small disks are mounted to be filled.
faults: $(VENV)/.test
	OMP_NUM_THREADS=1 PYTHONPATH=.:tests $$(unshare --map-root-user --mount true 2>/dev/null \
		&& echo unshare --map-root-user --mount) $(PY) tests/faults.py

# The exported folder in the oldest transformers that must load it, in an environment of its own.
test-compat: $(VENV)/.test $(COMPAT)/.done
	rm -rf $(COMPAT)/run
	$(PY) tests/compat/make_export.py $(COMPAT)
	$(PY) tests/compat/check_export.py $(COMPAT)/run/hf --write
	$(COMPAT)/bin/python tests/compat/check_export.py $(COMPAT)/run/hf

$(COMPAT)/.done: | $(PY)
	$(PYTHON) -m venv $(COMPAT)
	$(COMPAT)/bin/python -m pip --disable-pip-version-check --quiet install \
		torch==2.13.0 transformers==4.51.3 "numpy<3" "peft<1"
	@touch $@

data/pydoc/manifest.json:
	$(PY) prepare_fineweb.py --source pydoc --out_dir data/pydoc --val_fraction 0.05

$(VENV)/.demo: setup.py constraints.txt | $(PY)
	@echo "installing into $(VENV): takes a few minutes the first time"
	$(PIP) --editable ".[figures]" transformers scipy
	@touch $@

$(VENV)/.test: setup.py constraints.txt | $(PY)
	@echo "installing into $(VENV): takes a few minutes the first time"
	$(PIP) --editable ".[dev]"
	@touch $@

$(PY):
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.11 found; install one, or give make PYTHON=/path/to/python3"; exit 2; }
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) $(COMPAT) *.egg-info
