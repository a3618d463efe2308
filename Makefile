# The two commands a newcomer needs are `make demo` and `make test`; each does the set-up by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Apart, for the tests that need them: peft imports them wherever it finds them, which takes each process seconds.
QUANTISED := $(VENV)/quantised

.PHONY: demo app app-picture report report-picture setup test test-slow benchmark-quality benchmark-quality-all \
	benchmark-transfer benchmark-speed lint format flags clean

LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no

demo: setup  ## train LoRA and Bi-LoRA on 23 3D icons, draw base | LoRA | Bi-LoRA for others beside the true icons
	$(LAUNCH) train_dreambooth_bilora.py --config configs/quickstart.yaml --method lora --output_dir outputs/quickstart_lora
	$(LAUNCH) train_dreambooth_bilora.py --config configs/quickstart.yaml
	$(BIN)/python -m bilora_diffusion.demo outputs/quickstart_lora outputs/quickstart

app: setup  ## open the app at http://127.0.0.1:7860; ARGS="--base ... --lora_dir ..." are handed on
	$(BIN)/python -m app $(ARGS)

setup: $(READY)  ## .venv with the tested versions

# uv installs the three gigabytes of torch several times faster than pip.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[test]'
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --no-deps --target $(QUANTISED) \
		bitsandbytes torchao
	touch $(READY)

# Two at a time, a file in one process: more would need more than the 8 GB that many machines have. In the order of
# their names, or the app's few long tests would come last, one process idle beside them.
test: setup  ## all tests that a CPU can run in minutes
	$(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: setup  ## full-size SDXL with random weights, rarer combinations: 10 GB of memory, some minutes
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark-quality: setup  ## all methods on the embedded base: three to four hours on two cores, goes on where it stopped
	for stage in choose measure; do \
		$(BIN)/python -m benchmarks.quality $$stage --alone --part 1/2 & one=$$!; \
		$(BIN)/python -m benchmarks.quality $$stage --alone --part 2/2 && wait $$one || exit 1; \
	done
	$(BIN)/python -m benchmarks.quality report

benchmark-quality-all: setup  ## with controls, combinations, wider grids, new seeds: most of a day
	for stage in choose measure confirm; do \
		$(BIN)/python -m benchmarks.quality $$stage --part 1/2 & one=$$!; \
		$(BIN)/python -m benchmarks.quality $$stage --part 2/2 && wait $$one || exit 1; \
	done
	$(BIN)/python -m benchmarks.quality rises --seeds 1 2
	$(BIN)/python -m benchmarks.quality report

benchmark-transfer: setup  ## what was chosen there on other concepts (npm); ARGS="--subjects_dir ... --classes ..." adds photos
	$(BIN)/python -m benchmarks.quality transfer $(ARGS)
	$(BIN)/python -m benchmarks.quality report

report: setup  ## train LoRA and Bi-LoRA on the 3D icons with three seeds, measure them, write outputs/report/report.html
	$(BIN)/python -m bilora_diffusion.report --config configs/quickstart.yaml --max_train_steps 250 --checkpointing_steps 50 \
		--output_dir outputs/report $(ARGS)

report-picture: setup  ## take the README's picture of a report again, from what `make report` wrote
	PYTHONPATH=. $(BIN)/python tests/report_picture.py

benchmark-speed: setup  ## what a step costs with each method and the stock recipe; ARGS="--model sdxl" on a CUDA GPU
	$(BIN)/python -m benchmarks.speed $(or $(ARGS),--model medium)

app-picture: setup  ## take the README's picture of the app again, from what `make demo` trained
	PYTHONPATH=. $(BIN)/python tests/readme_picture.py

flags: setup  ## rewrite docs/flags.md from the configuration
	$(BIN)/python -m bilora_diffusion.command_line > docs/flags.md

clean:  ## but for outputs/embedded: hours of checkpoints
	find outputs -mindepth 1 -maxdepth 1 ! -name embedded -exec rm -rf {} + 2>/dev/null || true
	rm -rf .pytest_cache .ruff_cache
