"""The names of settings: dotted keys, the short names of those that people set most, and what other tools call them."""

import difflib

from pydantic import BaseModel

from pe_dpo.recipe.schema import DataSource, Recipe

SHORT_NAMES = {
    "beta": "loss.beta",
    "gamma": "loss.gamma",
    "margin": "loss.margin",
    "mixout": "mixout.p",
    "lr": "train.learning_rate",
    "dropout": "adapter.dropout",
    "epochs": "train.epochs",
    "loss": "loss.preset",
    "link": "loss.link",
    "reduce": "loss.reduce",
    "rank": "adapter.rank",
    "seed": "train.seed",
    "output": "output",
}
"""Short name: dotted key. They are flags of `train` and `quickstart`, and axes of `sweep`."""

OTHER_NAMES = {
    "simpo_gamma": "that is the margin here: loss.margin (gamma is the weight of the reference)",
    "gamma_beta_ratio": "that is margin / beta here: set loss.margin (gamma is the weight of the reference)",
    "num_train_epochs": "train.epochs",
    "loss_type": "loss.preset",
    "per_device_train_batch_size": "train.pairs_per_step (pairs per optimizer step; micro-batches are found by themselves)",
    "gradient_accumulation_steps": "train.pairs_per_step (accumulation is derived from it)",
    "batch_size": "train.pairs_per_step",
    "model_name_or_path": "model.base",
    "load_in_4bit": "model.quantize: nf4",
    "load_in_8bit": "model.quantize: int8",
    "torch_dtype": "model.dtype",
    "dataset_name": "data.train",
    "datasets": "data.train: a list of {path: …, weight: …, columns: …}",
    "dataset_mixer": "data.train: a list of {path: …, weight: …}",
    "dataset_config": "data.train: {path: …, subset: …}",
    "dataset_train_split": "data.train: {path: …, split: …}",
    "lora_r": "adapter.rank",
    "r": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "target_modules": "adapter.targets",
    "lora_target_modules": "adapter.targets",
    "init_lora_weights": "adapter.init",
    "use_dora": "DoRA is not supported",
    "modules_to_save": "fully trained modules are not supported; LoRA only",
    "rpo_alpha": "loss.sft_weight",
    "cpo_alpha": "loss.sft_weight",
    "ref_model": "the reference is the base with adapters off (adapter.reference)",
    "output_dir": "output",
    "lr": "train.learning_rate",
    "warmup_ratio": "train.warmup",
    "lr_scheduler_type": "train.schedule",
    "optim": "train.optimizer",
    "logging_steps": "train.log_every",
    "eval_steps": "train.eval_every",
    "save_steps": "train.save_every",
    "save_total_limit": "train.keep_checkpoints",
    "trust_remote_code": "code from a model repository is never run; convert the model to a class of transformers",
    "precompute_ref_log_probs": "the reference pass is arranged by the program; drop the key",
}
"""Keys of other tools, and what they are called here."""


def known_keys() -> list[str]:
    """Return every dotted key of a recipe."""
    keys = []
    for name, field in Recipe.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            keys += [f"{name}.{key}" for key in section.model_fields]
        else:
            keys.append(name)
    return keys


def explain_unknown_key(path: tuple[str | int, ...]) -> str:
    """Return what to write instead of a key that is none: what another tool's key is here, or the most similar key."""
    key = str(path[-1])
    if path[:2] in (("data", "train"), ("data", "eval")):
        return f"unknown key; a place has {', '.join(DataSource.model_fields)}"
    if key in OTHER_NAMES:
        other = OTHER_NAMES[key]
        is_key = other.replace(":", " ").split()[0] in known_keys()
        return f"unknown key; here it is {other}" if is_key else f"unknown key; {other}"
    sections = difflib.get_close_matches(key, Recipe.model_fields, n=1, cutoff=0.7) if len(path) == 1 else []
    if sections:
        return f"unknown key; did you mean {sections[0]}?"
    names = {dotted.rsplit(".", 1)[-1]: dotted for dotted in known_keys()}
    if key in names:
        return f"unknown key here; did you mean {names[key]}?"
    inside = [name for name in known_keys() if name.startswith(".".join(map(str, path[:-1])))]
    close = difflib.get_close_matches(".".join(map(str, path)), inside or list(names.values()), n=1, cutoff=0.5)
    close = close or [names[name] for name in difflib.get_close_matches(key, names, n=1, cutoff=0.6)]
    return f"unknown key; did you mean {close[0]}?" if close else "unknown key; `pe-dpo recipes schema` lists what there is"
