"""A tiny world for tests: a random Llama of 2 layers with a tokenizer and a chat template, and pairs to train on."""

import gc
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from recorded import recording

gc.disable()  # until all tests are collected: it would go through a million objects that stay, a third of the time
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes that run the tests share the cores, and so do those they start
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # where two threads are a test's subject, one that waits keeps no core busy

SHARED = Path(os.environ.get("PE_DPO_SHARED", Path(__file__).resolve().parents[1].parent / "shared"))
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ("red", "green", "blue", "round", "square", "small", "large", "sweet", "sour", "bitter", "warm", "cold", "near", "far")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests go first, so that at the end no process waits for another one's last long test."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """What the tests imported stays to the end: no garbage collection, of which each training has one, looks through it."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    if "warm_process" in sys.modules:
        sys.modules["warm_process"].end()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _no_wait_for_the_disk() -> Iterator[None]:
    """What a test writes need not outlive the machine's power: without its 3 ms a file, some thousand times a minute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Runs of the tests neither find nor leave reference log-probs of other runs on this machine."""
    os.environ["PE_DPO_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def warned() -> Iterator[list[str]]:
    """The warnings that the package logs during the test, as lines."""
    with recording(logging.WARNING) as lines:
        yield lines


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """The lines that the package logs during the test."""
    with recording() as lines:
        yield lines


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """A folder of a name, filled on first use by the function given, once for all processes that run the tests; read-only."""
    root = tmp_path_factory.getbasetemp()
    root = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "made-once"
    root.mkdir(exist_ok=True)

    def make(name: str, fill: Callable[[Path], object]) -> Path:
        folder, done = root / name, root / f"{name}.done"
        with FileLock(root / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                fill(folder)
                done.touch()
        return folder

    return make


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data and models beside the checkout, or a skip."""
    if not SHARED.is_dir():
        pytest.skip("needs the shared folder with real data and models beside the checkout (or PE_DPO_SHARED)")
    return SHARED


@pytest.fixture(scope="session")
def tiny_base(made_once: Callable[..., Path]) -> Path:
    """A saved random Llama (2 layers, 64 wide) with a byte-level tokenizer and a ChatML template."""
    return made_once("tiny-base", _save_tiny_base)


def _save_tiny_base(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(alphabet)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|pad|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_pairs(made_once: Callable[..., Path]) -> Path:
    """A folder with train.jsonl (24 pairs) and test.jsonl (9 pairs) of differing lengths."""
    return made_once("tiny-pairs", _write_tiny_pairs)


def _write_tiny_pairs(folder: Path) -> None:
    for name, rows in (("train", range(24)), ("test", range(24, 33))):
        lines = []
        for row in rows:
            word, other = WORDS[row % len(WORDS)], WORDS[(row * 7 + 3) % len(WORDS)]
            chosen, rejected = f"It is {word}" + "!" * (row % 4), f"Who cares, {other}" + "?" * (row % 3)
            lines.append(json.dumps({"prompt": f"Number {row}, {word} or {other}?", "chosen": chosen, "rejected": rejected}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture(scope="session")
def tiny_recipe(tiny_base: Path, tiny_pairs: Path) -> Callable:
    """A recipe over the tiny world, given its output folder; "section.key=value" strings change it."""
    from pe_dpo.recipe import Recipe, recipe_from_yaml

    def make(output: Path, *overrides: str) -> Recipe:
        # Of the six steps two are evaluated and saved, not each as by itself: that would be a third of the run's time.
        text = (
            f"model: {{base: '{tiny_base}', quantize: none}}\n"
            "adapter: {rank: 4, alpha: 8}\n"
            f"data: {{train: '{tiny_pairs}'}}\n"
            "train: {learning_rate: 1.0e-3, pairs_per_step: 8, epochs: 2, warmup: 0, eval_every: 3, save_every: 3}\n"
            f"output: '{output}'\n"
        )
        return recipe_from_yaml(text, "test", overrides)

    return make


@pytest.fixture
def make_recipe(tiny_recipe: Callable, tmp_path: Path) -> Callable:
    """A recipe over the tiny world whose run goes into the test's own folder."""

    def make(*overrides: str, output: str = "run") -> Any:
        return tiny_recipe(tmp_path / output, *overrides)

    return make


@pytest.fixture(scope="session")
def loss_vectors() -> dict[str, Any]:
    """33 in-family configurations × 20 pairs, computed with 60 digits."""
    return _shared_json("vectors/loss_vectors.json")


@pytest.fixture(scope="session")
def testbed() -> dict[str, Any]:
    """Closed forms: two-arm optima, gradient flows, flip times, mixout expectations, diagnostics."""
    return _shared_json("vectors/testbed_expected.json")


def _shared_json(name: str) -> dict[str, Any]:
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"{name} is not beside the checkout: set PE_DPO_SHARED to the folder that holds it")
    return json.loads(path.read_text())
