"""A finished folder onto the model hub: private unless asked otherwise, and without what belongs to this machine alone.

check name, folder, card, token  →  create or find the repository  →  is it as private as asked?  →  upload  →  all there?
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pe_dpo.errors import ModelError, PeDpoError, UsageError
from pe_dpo.export.public_adapter import check_no_local_paths, is_adapter, write_public_adapter
from pe_dpo.hub import is_hub_name
from pe_dpo.model.tensor_files import TensorFiles
from pe_dpo.runs.files import RUN_FILE

logger = logging.getLogger(__name__)

HIDDEN = (".*", "*/.*")
NOT_FINISHED = ("checkpoint-*", "*/checkpoint-*", "*.partial", "*.lock", "*.tmp")
FOR_TRAINING = ("*optimizer*.pt", "*optimizer*.bin", "*scheduler.pt", "*rng_state*", "*scaler.pt", "*training_args.bin",
                "*trainer_state.json", "runs/*", "*tfevents*", "*__pycache__*")  # fmt: skip
ABOUT_THE_DATA = (
    "*.parquet",
    "data_report.json",
    "metrics.jsonl",
    "evaluation.json",
    "run.json",
    "recipe.yaml",
    "snapshots/*",
    "scaled/*",
)
LEFT_OUT = (*HIDDEN, *NOT_FINISHED, *FOR_TRAINING, *ABOUT_THE_DATA)
"""Patterns of what stays here of a model or an export; `*` also stands for slashes. Of an adapter: see `public_adapter`."""


def check_access(name: str) -> str:
    """Return the token for the hub, and check, without asking the hub, that a push can be asked for at all.

    Args:
        name: ORG/NAME.

    Raises:
        UsageError: another name, or nobody is logged in.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        is_valid = name.count("/") == 1 and is_hub_name(name)
    except HFValidationError:
        is_valid = False
    if not is_valid:
        raise UsageError(f"{name}: is no name on the hub; write ORG/NAME, of letters, digits, '-', '_' and '.'")
    token = get_token()
    if not token:
        raise UsageError("not logged in to the hub; run `hf auth login`, or set HF_TOKEN to a token that may write")
    return token


def push_folder(folder: Path, name: str, *, private: bool = True, endpoint: str | None = None) -> str:
    """Upload a merged model, a run's adapter, any other adapter or an export to the hub, and return its address.

    Args:
        folder: finished, with a README.md. Of a model and an export what `LEFT_OUT` names stays here; of a run or an adapter
            all that is not adapter, tokenizer, card and base.json.
        name: ORG/NAME; made if it is not there.
        private: whether only its owners may see it. A repository that is there keeps what it is.
        endpoint: of another hub.

    Raises:
        UsageError: bad name, no token, nothing to push, no card, a path of this machine in it, no right to write there, or the
            repository is public and a private one was asked for.
        ModelError: files of the model are missing, the hub failed, or not everything arrived.
    """
    from huggingface_hub import HfApi

    token = check_access(name)
    _check_folder(folder)
    with ExitStack() as stack:
        if is_adapter(folder):
            sent = Path(stack.enter_context(TemporaryDirectory()))
            left_out = write_public_adapter(folder, sent, name=name)
        else:
            sent = folder
            files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
            left_out = sorted({file.parts[0] for file in files if _stays(file)})
        files = sorted(path.relative_to(sent) for path in sent.rglob("*") if path.is_file())
        sizes = {file.as_posix(): (sent / file).stat().st_size for file in files if not _stays(file)}
        check_no_local_paths(sent, list(sizes))
        logger.info(f"{folder}: {len(sizes)} files, {sum(sizes.values()) / 1e6:,.1f} MB, to {name}")
        logger.info(f"sent: {', '.join([*list(sizes)[:12], *(['…'] if len(sizes) > 12 else [])])}")
        if left_out:
            logger.info(f"stays here: {', '.join(left_out)}")
        return _upload(sent, name, sizes, private=private, api=HfApi(endpoint=endpoint, token=token))


def _stays(file: Path) -> bool:
    """Whether a file of a folder is not sent."""
    return any(fnmatch(file.as_posix(), pattern) for pattern in LEFT_OUT)


def _upload(folder: Path, name: str, sizes: Mapping[str, int], *, private: bool, api: Any) -> str:
    """Send a folder, and check that all of it arrived; return its address."""
    with _hub_errors(name):
        api.whoami()
        api.create_repo(name, private=private, exist_ok=True)
        is_private = bool(api.model_info(name).private)
        if private and not is_private:
            raise UsageError(
                f"{name}: is there already and is public; nothing was pushed. Name another, or ask for a public one"
            )
        if is_private and not private:
            logger.warning(f"{name} is there already and stays private; its owners can change that on the hub")
        api.upload_folder(repo_id=name, folder_path=folder, ignore_patterns=list(LEFT_OUT), commit_message="Upload with pe-dpo")
        there = {entry.rfilename: entry.size for entry in api.model_info(name, files_metadata=True).siblings or []}
    lost = [path for path, size in sizes.items() if there.get(path) != size]
    if lost:
        raise ModelError(
            f"{name}: {len(lost)} of {len(sizes)} files did not arrive whole ({', '.join(lost[:3])}): a .gitignore there may "
            "name them; push again"
        )
    older = sorted(there.keys() - sizes.keys() - {".gitattributes"})
    if older:
        logger.warning(f"{name} also holds {len(older)} files from before ({', '.join(older[:3])}); they were left as they are")
    return f"{api.endpoint}/{name}"


def _check_folder(folder: Path) -> None:
    """Check that a folder holds something whole to push, with a card, which a run can be given anew."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; name a merged model, an adapter or an export")
    is_model = (folder / "config.json").is_file() and any(folder.glob("*.safetensors*"))
    if not (is_model or is_adapter(folder) or any(folder.glob("*.gguf"))):
        raise UsageError(f"{folder}: holds neither a model, an adapter (safetensors) nor a GGUF file; nothing to push")
    if is_model:
        TensorFiles(folder)  # all shards are there
    card = folder / "README.md"
    if not (folder / RUN_FILE).is_file() and (not card.is_file() or not card.read_text(encoding="utf-8").strip()):
        raise UsageError(f"{card}: is missing or empty; others must read what this is and how it was made: write a model card")


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """Turn whatever the hub and its client raise into one message of ours."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    try:
        yield
    except PeDpoError:
        raise
    except OfflineModeIsEnabled as error:
        raise UsageError(f"{name}: HF_HUB_OFFLINE is set, so nothing can be pushed; unset it") from error
    except HfHubHTTPError as error:
        raise _explained(name, error) from error
    except (HTTPError, OSError) as error:
        raise ModelError(
            f"{name}: the hub cannot be reached ({_first_line(error)}); look at the network and push again"
        ) from error
    except (ValueError, RuntimeError) as error:  # an invalid card; a large file
        if isinstance(error.__cause__, HfHubHTTPError):
            raise _explained(name, error.__cause__) from error
        raise ModelError(f"{name}: was not pushed: {_first_line(error)}") from error


def _explained(name: str, error: Any) -> PeDpoError:
    status = error.response.status_code
    said = (error.server_message or _first_line(error)).strip().splitlines()[0]
    reasons = {
        401: f"the hub does not accept this token ({said}); log in again: `hf auth login`",
        403: f"this token may not write there ({said}); take one with write access, or another ORG",
        404: f"no such organisation or repository, or this token may not see it ({said})",
    }
    if status in reasons:
        return UsageError(f"{name}: {reasons[status]}")
    if status == 409:
        return ModelError(f"{name}: somebody else is changing it right now ({said}); push again")
    return ModelError(f"{name}: the hub answered {status} ({said}); push again later")


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
