"""All attacks, by what they are made on."""

from __future__ import annotations

from collections.abc import Callable

from . import (
    byte_attacks,
    collective_attacks,
    document_attacks,
    drawing_attacks,
    manifest_attacks,
    plan_attacks,
    weights_attacks,
)
from .forge import Attacks, Forge

BATCHES: dict[str, Callable[[Forge], Attacks]] = {
    "unsigned bytes": byte_attacks.unsigned,
    "signed bytes": byte_attacks.signed,
    "special files": byte_attacks.special_files,
    "manifest": manifest_attacks.attacks,
    "plan numbers": plan_attacks.numbers,
    "plan operands": plan_attacks.operands,
    "plan structure": plan_attacks.structure,
    "plan encodings": plan_attacks.encodings,
    "weights": weights_attacks.attacks,
    "tokenizer": document_attacks.tokenizers,
    "documents": document_attacks.documents,
}

# On engines for GPUs.
GPU_BATCHES: dict[str, Callable[[Forge], Attacks]] = {
    "plan drawing": drawing_attacks.attacks,
    "plan collectives": collective_attacks.attacks,
}
