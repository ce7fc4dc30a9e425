"""CTranslate2's worker: its converter on a whole model folder, then its generator.

Texts and chats are left out, since it has neither a tokenizer nor templates of its own.
"""

import json
import sys
import tempfile
from pathlib import Path

import ctranslate2
import numpy as np


def main(artefact: str, request: dict) -> dict:
    """Return the answer about a model folder; `options.compute_type` (float32) is that of weights and arithmetic."""
    kind = request.get("options", {}).get("compute_type", "float32")
    with tempfile.TemporaryDirectory(prefix="pe-dpo-ctranslate2-") as folder:
        converted = Path(folder) / "model"
        ctranslate2.converters.TransformersConverter(artefact).convert(str(converted), quantization=kind)
        generator = ctranslate2.Generator(str(converted), device="cpu", compute_type=kind, inter_threads=1, intra_threads=1)
        names = json.loads((converted / "vocabulary.json").read_text(encoding="utf-8"))
        answer = {"engine": "ctranslate2", "version": ctranslate2.__version__}
        if "ids" in request:
            answer["logprobs"] = [log_probs(generator, ids) for ids in request["ids"]]
        if "greedy" in request:
            answer["greedy"] = [greedy(generator, ids, names, request["new_tokens"]) for ids in request["greedy"]]
        return answer


def log_probs(generator: ctranslate2.Generator, ids: list[int]) -> list[float]:
    """Return the log-prob of each token after the first."""
    rows = np.array(generator.forward_batch([ids], return_log_probs=True))[0]
    return [float(row[token]) for row, token in zip(rows[:-1], ids[1:], strict=True)]


def greedy(generator: ctranslate2.Generator, ids: list[int], names: list[str], count: int) -> list[int]:
    """Return the likeliest tokens one after another; a name that no token has ends nothing."""
    settings = {"sampling_topk": 1, "max_length": count, "include_prompt_in_result": False}
    (result,) = generator.generate_batch([[names[token] for token in ids]], end_token=[len(names) - 1], **settings)
    return list(result.sequences_ids[0])


if __name__ == "__main__":
    request = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    Path(sys.argv[3]).write_text(json.dumps(main(sys.argv[1], request)), encoding="utf-8")
