# Everything that a fresh clone needs, each environment made on first use:
#
#   make demo      the sample model exported, verified, and asked one question
#   make test      all tests (tests/interop apart)
#   make test-slow what takes many seconds each: other pages' commands, killed exports, the network watched (10 minutes)
#   make test-matrix  every combination of export options, on a vocabulary of real size (10 minutes)
#   make test-llama   a real Llama (the sample's weights) in every precision, each with its proof (half an hour)
#   make test-docs every command of README.md and docs/ on the sample model (half an hour)
#   make test-mutations thousands of damaged checkpoints and exports (make test tries some)
#   make test-planted every planted error in every kind of export (a quarter of an hour)
#   make test-gpu  what only an NVIDIA GPU can show; elsewhere each test says why it is skipped
#   make test-oldest  the runtime with the lowest versions of what it needs; test-newest: all with the newest
#   make test-clients langchain, litellm, llm-comply, schemathesis and lm-eval against the server (three minutes)
#   make test-formats what we read of others' formats beside peft, compressed-tensors, AutoAWQ and GPTQModel
#   make test-ray  a batch on a Ray cluster of two node processes: workers killed, nodes removed and added; qrun deploy
#   make test-schemas the whole JSON-Schema-Test-Suite: each schema enforced or refused (two minutes)
#   make test-interleavings thousands of interleavings of answers (minutes); make soak: ten minutes of bad clients
#   make test-kills qrun batch killed a hundred times, and each answer counted (four minutes)
#   make lint      ruff, mypy, import-linter
#   make interop   optimum and onnxruntime-genai read the exported sample and answer as qrun does
#   make benchmark export cost and decode speed beside other programs (idle machine, 10 GB, an hour)
#   make compare   our exports beside six other engines, and the report (idle machine, 60 GB, hours)
#   make clean     remove environments, caches and the demo
#
# PYTHON=python3.12 chooses the interpreter (3.11 to 3.13 with the pinned versions). Packages come
# through your own pip configuration. On Linux torch's default wheel brings gigabytes of CUDA: point
# pip at a CPU build of the pinned version (pip config set global.find-links FOLDER, or PyTorch's own
# CPU index) where that matters.

PYTHON ?= python3
VENV := .venv
OLDEST_VENV := .venv-oldest
NEWEST_VENV := .venv-newest
# ONNX Runtime 1.23 is the newest for Python 3.10, and the oldest that is allowed.
OLDEST_PYTHON ?= $(shell for each in python3.10 $(HOME)/.pyenv/versions/3.10*/bin/python $(PYTHON); do \
	$$each -c '' 2> /dev/null && echo $$each && break; done)
# What needs no torch: the rest of tests/qrun compares with transformers.
OLDEST_TESTS ?= $(filter-out %_sampling.py %_added_tokens.py %_chat_template.py %_text.py %_tokenizer.py %_thinking.py %_bench.py, \
	$(wildcard tests/qrun/test_*.py))
INTEROP_VENV := .venv-interop
BENCH_VENV := .venv-bench
CLIENTS_VENV := .venv-clients
FORMATS_VENV := .venv-formats
RAY_VENV := .venv-ray

# Whole files at a time, one for each core, since the tests of a file share what they make: make test SIDE_BY_SIDE= for one.
SIDE_BY_SIDE ?= -n auto --dist loadfile

# Kept between runs: the sample checkpoint, which tests and `make interop` share.
export QCONVERT_TEST_CACHE ?= $(CURDIR)/.cache/tests

PIP_INSTALL := -m pip install --quiet --progress-bar off --disable-pip-version-check
SOURCES := $(shell find qconvert runtime -type f -not -name "*.pyc")
SAMPLE := $(QCONVERT_TEST_CACHE)/sample-model
EXPORTS := $(QCONVERT_TEST_CACHE)/interop

DEMO := demo/sample-model
DEMO_EXPORT := demo/sample-model-onnx-int8
# Asked so that a 135M model is sure of its answer (1.6 between the first two tokens; "What is the capital
# of France?" leaves 0.06, which int8 arithmetic of another processor may turn).
QUESTION := Name the capital of France.

.PHONY: demo test test-slow test-kills test-oldest test-newest test-matrix test-mutations test-planted test-docs test-gpu lint
.PHONY: interop benchmark compare clean test-interleavings test-schemas test-clients test-formats soak
.PHONY: formats-table test-llama test-ray

demo: $(DEMO_EXPORT)/qconvert.json
	$(VENV)/bin/qrun generate --engine $(DEMO_EXPORT) --prompt "$(QUESTION)"

test: $(VENV)/.ready
	$(VENV)/bin/pytest $(SIDE_BY_SIDE)

test-slow: $(VENV)/.ready
	$(VENV)/bin/pytest $(SIDE_BY_SIDE) -m slow

test-matrix: $(VENV)/.ready
	$(VENV)/bin/pytest -m "not real" tests/matrix

test-llama: $(VENV)/.ready
	$(VENV)/bin/pytest -m real tests/matrix/test_real_llama.py

test-mutations: $(VENV)/.ready
	QCONVERT_MUTATIONS=3000 QCONVERT_GGUF_MUTATIONS=5000 $(VENV)/bin/pytest tests/qconvert/test_mutations.py \
		tests/qconvert/test_gguf_mutations.py

# Tiny models come from the pinned environment, which has torch.
test-oldest: $(OLDEST_VENV)/.ready $(VENV)/.ready
	QCONVERT_TEST_PYTHON=$(CURDIR)/$(VENV)/bin/python \
	    $(OLDEST_VENV)/bin/pytest -m "not export and not slow_docs" $(OLDEST_TESTS)

# The whole JSON-Schema-Test-Suite, every draft; it lies in jsonschema's source distribution.
test-schemas: $(VENV)/.ready
	test -d .cache/schemas || { mkdir -p .cache/schemas.part && cd .cache/schemas.part && \
	    $(CURDIR)/$(VENV)/bin/pip download --quiet --no-deps --no-binary :all: jsonschema==4.26.0 && \
	    tar --strip-components=1 -xf jsonschema-4.26.0.tar.gz && mv $(CURDIR)/.cache/schemas.part $(CURDIR)/.cache/schemas; }
	QCONVERT_SCHEMA_SUITE=$(CURDIR)/.cache/schemas/json/tests $(VENV)/bin/pytest -s tests/qrun/test_schema_suite.py

# Clients that others wrote, against a server of the test's own.
test-clients: $(CLIENTS_VENV)/.ready
	$(CLIENTS_VENV)/bin/pytest -rs tests/clients

# The libraries that define formats, beside what we read of them. peft refuses to work where it sees GPTQModel.
test-formats: $(FORMATS_VENV)/.ready
	$(FORMATS_VENV)/bin/pytest tests/formats --ignore tests/formats/test_gptqmodel.py
	PYTHONPATH=$(FORMATS_VENV)/gptqmodel $(FORMATS_VENV)/bin/pytest tests/formats/test_gptqmodel.py

# The sample in every format that is read. LLAMA_QUANTIZE is llama.cpp's program; without it GGUF rows stay as they are.
formats-table: $(FORMATS_VENV)/.ready $(SAMPLE)/sample-model.json
	PYTHONPATH=$(FORMATS_VENV)/gptqmodel $(FORMATS_VENV)/bin/python -m benchmarks.formats_table --sample $(SAMPLE) \
	    $(if $(LLAMA_QUANTIZE),--llama-quantize $(LLAMA_QUANTIZE))

# The tiny model comes from the pinned environment, which has torch. The server's own tests are asked of Ray Serve.
test-ray: $(RAY_VENV)/.ready $(VENV)/.ready
	QCONVERT_TEST_PYTHON=$(CURDIR)/$(VENV)/bin/python $(RAY_VENV)/bin/pytest -rs tests/ray
	QCONVERT_TEST_PYTHON=$(CURDIR)/$(VENV)/bin/python $(RAY_VENV)/bin/python -m pytest -rs -p tests.ray.deployed tests/serve

test-newest: $(NEWEST_VENV)/.ready
	$(NEWEST_VENV)/bin/pytest
# Thousands of interleavings of answers, each compared bit for bit with what it is alone.
test-interleavings: $(VENV)/.ready
	QCONVERT_INTERLEAVINGS=2000 $(VENV)/bin/pytest --timeout=3600 tests/qrun/test_interleaving.py

# A batch that is killed by -9 a hundred times, ordered and unordered.
test-kills: $(VENV)/.ready
	QRUN_BATCH_KILLS=100 $(VENV)/bin/pytest tests/batch/test_kills.py

# Ten minutes of clients that behave badly, on a small random model.
soak: $(VENV)/.ready
	$(VENV)/bin/python -m tests.serve.soak

test-docs: $(VENV)/.ready
	$(VENV)/bin/pytest -m slow_docs tests/docs tests/qconvert/test_verify.py

test-planted: $(VENV)/.ready
	$(VENV)/bin/pytest -m planted tests/qconvert/test_planted.py

test-gpu: $(VENV)/.ready
	QCONVERT_GPU_RESULTS=$(CURDIR)/benchmarks/results/plan.json $(VENV)/bin/pytest -m gpu -rs

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

interop: $(INTEROP_VENV)/.ready $(EXPORTS)/fp32/qconvert.json $(EXPORTS)/int8/qconvert.json $(EXPORTS)/groups/model/qconvert.json
	QCONVERT_INTEROP=$(EXPORTS) $(INTEROP_VENV)/bin/pytest tests/interop

benchmark: $(BENCH_VENV)/.ready $(INTEROP_VENV)/.ready
	$(BENCH_VENV)/bin/python -m benchmarks.decode_overhead --json benchmarks/results/decode_overhead.json
	$(BENCH_VENV)/bin/python -m benchmarks.export_cost --json benchmarks/results/export_cost.json
	$(BENCH_VENV)/bin/python -m benchmarks.export_cost --optimum --optimum-python $(INTEROP_VENV)/bin/python \
	    --json benchmarks/results/export_cost_optimum.json

compare: $(VENV)/.ready
	$(VENV)/bin/python -m benchmarks.compare --out report

clean:
	rm -rf $(VENV) $(OLDEST_VENV) $(NEWEST_VENV) $(INTEROP_VENV) $(BENCH_VENV) $(CLIENTS_VENV) $(FORMATS_VENV) $(RAY_VENV) demo .cache build dist
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# Environments. The stamp comes last, so an interrupted installation is taken up again.

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(call check-python)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP_INSTALL) -c constraints.txt -e '.[cpu,batch,serve,export,rtx,dev]'
	@touch $@

$(OLDEST_VENV)/.ready: pyproject.toml constraints-oldest.txt
	test -x $(OLDEST_VENV)/bin/python || $(OLDEST_PYTHON) -m venv $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/python $(PIP_INSTALL) -c constraints-oldest.txt -e '.[cpu,grammar]' \
	    hypothesis jsonschema onnx pexpect psutil pyte pytest pytest-timeout
	@touch $@

# The newest of everything but torch, of which pip might take a build of some gigabytes.
$(NEWEST_VENV)/.ready: pyproject.toml constraints.txt
	test -x $(NEWEST_VENV)/bin/python || $(PYTHON) -m venv $(NEWEST_VENV)
	grep '^torch==' constraints.txt > $(NEWEST_VENV)/torch.txt
	$(NEWEST_VENV)/bin/python $(PIP_INSTALL) --upgrade -c $(NEWEST_VENV)/torch.txt \
	    -e '.[cpu,batch,serve,export,rtx,dev]'
	@touch $@

# Without the export extra: its transformers 5 and optimum's 4.57 exclude each other.
$(INTEROP_VENV)/.ready: pyproject.toml constraints-interop.txt
	@$(call check-python)
	test -x $(INTEROP_VENV)/bin/python || $(PYTHON) -m venv $(INTEROP_VENV)
	$(INTEROP_VENV)/bin/python $(PIP_INSTALL) -c constraints-interop.txt -e '.[cpu]' \
	    optimum-onnx transformers torch onnxruntime-genai onnx onnx-ir psutil pytest pytest-timeout
	@touch $@

# Both sides of the export benchmark in one environment: genai's builder needs transformers 5, as qconvert does.
$(BENCH_VENV)/.ready: pyproject.toml constraints.txt
	@$(call check-python)
	test -x $(BENCH_VENV)/bin/python || $(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_VENV)/bin/python $(PIP_INSTALL) -c constraints.txt -e '.[cpu,export]' onnxruntime-genai==0.18.0
	@touch $@

# Without the export extra: the clients bring a hundred packages, none of which qconvert should meet.
$(CLIENTS_VENV)/.ready: pyproject.toml constraints-clients.txt
	@$(call check-python)
	test -x $(CLIENTS_VENV)/bin/python || $(PYTHON) -m venv $(CLIENTS_VENV)
	$(CLIENTS_VENV)/bin/python $(PIP_INSTALL) -c constraints-clients.txt -e '.[cpu,serve]' \
	    httpx langchain-openai litellm llm-comply schemathesis 'lm-eval[api]' transformers pytest pytest-timeout
	@touch $@

# Without the export extra, and apart: Ray brings thirty packages.
$(RAY_VENV)/.ready: pyproject.toml constraints-ray.txt
	@$(call check-python)
	test -x $(RAY_VENV)/bin/python || $(PYTHON) -m venv $(RAY_VENV)
	$(RAY_VENV)/bin/python $(PIP_INSTALL) -c constraints-ray.txt -e '.[cpu,ray]' anthropic httpx openai psutil pytest pytest-timeout
	@touch $@

# AutoAWQ and GPTQModel come as sources: of each a few modules are imported, without their own requirements.
$(FORMATS_VENV)/.ready: pyproject.toml constraints.txt constraints-formats.txt
	@$(call check-python)
	test -x $(FORMATS_VENV)/bin/python || $(PYTHON) -m venv $(FORMATS_VENV)
	$(FORMATS_VENV)/bin/python $(PIP_INSTALL) -c constraints.txt -e '.[cpu,export]' hypothesis pytest \
	    pytest-timeout -r constraints-formats.txt
	$(FORMATS_VENV)/bin/python $(PIP_INSTALL) --no-deps autoawq==0.2.9
	$(FORMATS_VENV)/bin/python -m pip download --quiet --no-deps --no-binary gptqmodel \
	    --dest $(FORMATS_VENV) gptqmodel==7.7.0
	mkdir -p $(FORMATS_VENV)/gptqmodel
	tar -xzf $(FORMATS_VENV)/gptqmodel-7.7.0.tar.gz --strip-components 1 -C $(FORMATS_VENV)/gptqmodel
	@touch $@

define check-python
$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	echo 'The pinned versions need Python 3.11 to 3.13 and "$(PYTHON)" is not that: make PYTHON=python3.11 ...' >&2; \
	exit 1; }
endef

# The sample checkpoint and its exports; each folder appears whole or not at all.

$(DEMO)/sample-model.json $(SAMPLE)/sample-model.json: | $(VENV)/.ready
	$(VENV)/bin/qconvert sample $(@D)

$(DEMO_EXPORT)/qconvert.json: $(DEMO)/sample-model.json $(SOURCES)
	$(VENV)/bin/qconvert export $(DEMO) --output $(DEMO_EXPORT) --force

# A model with two ways of attention, which the sample's few heads do not have.
$(EXPORTS)/groups/model/qconvert.json: $(VENV)/.ready $(SOURCES) tests/tiny.py
	$(VENV)/bin/python -c "from pathlib import Path; from tests.tiny import make_tiny_checkpoint; \
	    make_tiny_checkpoint(Path('$(EXPORTS)/groups/tiny'), max_position_embeddings=1024, hidden_size=128, num_attention_heads=8)"
	$(VENV)/bin/qconvert export $(EXPORTS)/groups/tiny --precision fp32 --output $(EXPORTS)/groups/model --force

$(EXPORTS)/%/qconvert.json: $(SAMPLE)/sample-model.json $(SOURCES)
	$(VENV)/bin/qconvert export $(SAMPLE) --precision $* --output $(EXPORTS)/$* --force
