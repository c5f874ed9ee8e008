"""Where a checkpoint is: a local Hugging Face directory, or a hub id through huggingface_hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...engines.errors import CheckpointError

# What a build reads of a repository on the hub; pickles are not even downloaded.
PATTERNS = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja"]


@dataclass(frozen=True)
class Source:
    """A checkpoint on this machine. name: as the user gave it; revision: the hub's commit, empty for a directory."""

    directory: Path
    name: str
    revision: str = ""


def find_checkpoint(model: str) -> Source:
    """The checkpoint called `model`: a directory, or else a hub id. Raises CheckpointError."""
    try:
        path = Path(model).expanduser()
        is_directory = path.is_dir()
    except (OSError, RuntimeError) as error:  # a name too long, a ~ of nobody
        raise CheckpointError(f"{model[:100]}: {error}. Wanted a local checkpoint directory, or a hub id.") from None
    if is_directory:
        if not (path / "config.json").is_file():
            raise CheckpointError(
                f"{model}: no config.json. Wanted a Hugging Face checkpoint: config.json, weights and tokenizer."
            )
        return Source(path, model)
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        what = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(f"{model}: {what}. Wanted a local checkpoint directory, or a hub id such as owner/name.")
    return _download(model)


def _download(model: str) -> Source:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        directory = Path(huggingface_hub.snapshot_download(model, allow_patterns=PATTERNS))
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"{model}: not a local directory, not in the hub's cache, and the hub cannot be reached (or "
            f"HF_HUB_OFFLINE is set). Download it where there is a network: hf download {model}"
        ) from None
    except (HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{model}: the hub refused it: {reason} Check the id, and `hf auth login` if it is gated."
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"{model}: could not be downloaded: {error}. It can be resumed: run the command again."
        ) from None
    return Source(directory, model, revision=directory.name)
