"""The last transformers before version 5, asked about a model folder, an adapter on `options.base`, or a tokenizer alone.

`options.special_tokens` has the texts tokenized with what the tokenizer adds by itself.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

WITHOUT_CODE = {"trust_remote_code": False, "local_files_only": True}


def answer(artefact: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Return what transformers says to the parts of a request."""
    options = request.get("options", {})
    found: dict[str, Any] = {"engine": "transformers4", "version": transformers.__version__}
    if request.get("texts") or request.get("chats"):
        tokenizer = AutoTokenizer.from_pretrained(artefact, **WITHOUT_CODE)
        with_special = bool(options.get("special_tokens"))
        found["tokens"] = [tokenizer(text, add_special_tokens=with_special).input_ids for text in request.get("texts", [])]
        chats = request.get("chats", [])
        found["rendered"] = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
        found["specials"] = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "unk")}
    if request.get("ids") or request.get("greedy"):
        model = load(artefact, Path(options.get("base", artefact))).eval()
        with torch.no_grad():
            rows = [model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double() for ids in request.get("ids", [])]
            found["logprobs"] = [
                row.log_softmax(-1)[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
                for row, ids in zip(rows, request.get("ids", []), strict=True)
            ]
            found["rows"] = [
                {"sequence": number, "position": len(row) - 1, "logprobs": row[-1].log_softmax(-1).tolist()}
                for number, row in enumerate(rows)
            ]
            found["greedy"] = [greedy(model, ids, request["new_tokens"]) for ids in request.get("greedy", [])]
    return found


def load(artefact: Path, base: Path) -> Any:
    """Return a whole model, or an adapter on its base, in float32."""
    config = AutoConfig.from_pretrained(base, **WITHOUT_CODE)
    kinds = (AutoModelForCausalLM, AutoModelForImageTextToText)
    kind = next(kind for kind in kinds if type(config) in kind._model_mapping)
    model, loading = kind.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, **WITHOUT_CODE
    )  # its other ways leave out the soft caps of Gemma 2
    if loading["missing_keys"]:
        raise SystemExit(f"{base}: lacks {loading['missing_keys'][:3]}, which would be random")
    if artefact == base:
        return model
    from peft import PeftModel

    return PeftModel.from_pretrained(model, artefact)


def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    """Return the likeliest next tokens, one after the other, whatever the generation settings say."""
    whole = list(ids)
    for _ in range(count):
        whole.append(int(model(input_ids=torch.tensor([whole]), use_cache=False).logits[0, -1].argmax()))
    return whole[len(ids) :]


if __name__ == "__main__":
    question = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    Path(sys.argv[3]).write_text(json.dumps(answer(Path(sys.argv[1]), question)), encoding="utf-8")
