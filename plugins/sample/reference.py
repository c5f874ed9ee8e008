"""sample: the next token of a row of logits, as runtime/csrc/sampler.cpp draws it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

NOT_FINITE = -1
NOTHING_ALLOWED = -2
GREEDY_BELOW = 1e-5
SMALL_NUCLEUS = 256

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_BUCKET_SHIFT = 16

Array = NDArray[Any]


@dataclass(frozen=True)
class Sampling:
    """What a row is changed and drawn by.

    num_generated  tokens before this one: with the seed it fixes the random number
    token_counts   how often each known token was generated, 0 for those of the prompt alone
    logit_bias     added to logits; -inf for tokens that are not allowed
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    num_generated: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    token_counts: Mapping[int, int] = field(default_factory=dict)
    logit_bias: Mapping[int, float] = field(default_factory=dict)


def sample(logits: Array, sampling: Sampling) -> tuple[int, float, int]:
    """f32 [vocab] -> the token, its logprob in the unmodified distribution, and its rank there, from 1.

    The token is NOT_FINITE where a logit is not finite, NOTHING_ALLOWED where all are masked.
    """
    if not np.isfinite(logits).all():
        return NOT_FINITE, 0.0, 1
    row = _edit(logits, sampling)
    token = int(row.argmax())
    if row[token] == -np.inf:
        return NOTHING_ALLOWED, 0.0, 1
    if np.float32(sampling.temperature) >= np.float32(GREEDY_BELOW):
        weights = weigh(row, sampling)
        token = _draw(weights, kept_tokens(weights, sampling), uniform(sampling.seed, sampling.num_generated))
    peak = logits.max()
    log_total = math.log(np.exp((logits - peak).astype(np.float64)).sum())
    rank = int((logits > logits[token]).sum() + (logits[:token] == logits[token]).sum()) + 1
    return token, float(np.float32(float(logits[token] - peak) - log_total)), rank


def uniform(seed: int, index: int) -> float:
    """In [0, 1), a function of the seed and the index alone: SplitMix64 (Steele, Lea, Flood 2014) as a counter."""
    bits = _mix(_mix((seed + _GOLDEN) & _MASK) ^ (_GOLDEN * (index + 1) & _MASK))
    return (bits >> 11) * 2.0**-53


def weigh(row: Array, sampling: Sampling) -> Array:
    """exp((row - peak) / temperature) f32 [vocab], 0 below min_p."""
    x = (row - row.max()) * (np.float32(1) / np.float32(sampling.temperature))
    weights = np.where(x < -87, np.float32(0), np.exp(np.maximum(x, np.float32(-87))))
    if sampling.min_p > 0:
        weights = np.where(x < np.float32(np.log(np.float32(sampling.min_p))), np.float32(0), weights)
    return weights.astype(np.float32)


def kept_tokens(weights: Array, sampling: Sampling) -> Array:
    """The tokens that top_k, then top_p leave, in the order in which they are drawn.

    That is by weight, of equals the lower id first; without filters by id. Of a nucleus of more than SMALL_NUCLEUS
    tokens those of whole buckets (the upper half of a weight's bits) come first, by id.
    """
    wide = weights.astype(np.float64)
    all_tokens = sampling.top_k == 0 or sampling.top_k >= len(weights)
    if all_tokens and sampling.top_p >= 1:
        return np.arange(len(weights))
    order = np.argsort(-weights, kind="stable")[: len(weights) if all_tokens else sampling.top_k]
    if sampling.top_p < 1:
        sums = np.cumsum(wide[order])
        target = float(np.float32(sampling.top_p)) * sums[-1]
        order = order[: max(1, int(np.searchsorted(sums, target)) + 1)]
        if all_tokens and len(order) > SMALL_NUCLEUS:
            buckets = weights[order].view(np.uint32) >> _BUCKET_SHIFT
            whole = buckets > buckets[-1]
            order = np.concatenate([np.sort(order[whole]), order[~whole]])
    return order


def _draw(weights: Array, tokens: Array, number: float) -> int:
    sums = np.cumsum(weights[tokens].astype(np.float64))
    likely = np.flatnonzero(weights[tokens] > 0)
    return int(tokens[min(int(np.searchsorted(sums, number * sums[-1], side="right")), likely[-1])])


def _edit(logits: Array, sampling: Sampling) -> Array:
    row = logits.copy()
    for token, bias in sampling.logit_bias.items():
        row[token] += np.float32(bias)
    if (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (0, 0, 1):
        return row
    repetition = np.float32(sampling.repetition_penalty)
    for token, count in sampling.token_counts.items():
        logit = row[token] / repetition if row[token] > 0 else row[token] * repetition
        logit -= np.float32(sampling.frequency_penalty) * np.float32(count)
        row[token] = logit - np.float32(sampling.presence_penalty if count > 0 else 0.0)
    return row


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
