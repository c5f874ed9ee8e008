"""Rotary position embeddings: what `rope_parameters` (or `rope_scaling` and `rope_theta`) ask for.

Su et al., RoFormer, 2021; the scaled kinds as transformers' modeling_rope_utils computes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .reader import ConfigReader, is_number

Frequencies = NDArray[np.float64]


@dataclass(frozen=True)
class Rope:
    """One rotary table.

    kind       "static"; "longrope": long_frequencies for prompts above threshold; "dynamic": base grows above threshold
    rotary_dim  leading elements of a head that are rotated
    frequencies  of rotary_dim / 2 angles per position, float32 as tuples, so that equal tables compare equal
    reach      how far scaling extends the context: 1 where max_position_embeddings already says it
    """

    kind: str
    rotary_dim: int
    frequencies: tuple[float, ...]
    long_frequencies: tuple[float, ...] = ()
    attention_factor: float = 1.0
    threshold: int = 0
    base: float = 0.0
    factor: float = 1.0
    reach: float = 1.0

    @property
    def is_finite(self) -> bool:
        """Whether every number is one that a kernel can use."""
        numbers = (self.attention_factor, self.threshold, self.base, self.factor, self.reach)
        return all(map(is_number, (*self.frequencies, *self.long_frequencies, *numbers)))


@dataclass(frozen=True)
class _Spec:
    """One rope's parameters with what its formula needs of the model."""

    parameters: dict[str, Any]
    reader: ConfigReader
    key: str
    dim: int
    base: float
    max_positions: int

    def number(self, name: str, default: float | None = None) -> float:
        found = self.parameters.get(name)
        found = default if found is None else found
        if found is None or not is_number(found) or found <= 0:
            self.reader.reasons.append(f"{self.key}.{name} = {found!r}: wanted a number above 0")
            return 1.0
        return float(found)

    def optional(self, name: str) -> float | None:
        """None where it is missing or 0, which asks for the formula's own."""
        return self.number(name) if self.parameters.get(name) not in (None, 0) else None

    def original_length(self) -> int:
        found = self.reader.value("original_max_position_embeddings")
        found = self.parameters.get("original_max_position_embeddings") if found is None else found
        if found is None:
            return self.max_positions
        if not is_number(found) or found < 1:
            self.reader.reasons.append(f"original_max_position_embeddings = {found!r}: wanted a number from 1")
            return self.max_positions
        return int(found)


def read_rope(
    reader: ConfigReader,
    key: str,
    parameters: dict[str, Any],
    theta: float,
    head_dim: int,
) -> Rope:
    """The table that `parameters` describe; `key` is where they stand in config.json, for messages."""
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    fraction = parameters.get("partial_rotary_factor", reader.value("partial_rotary_factor", 1.0))
    base = parameters.get("rope_theta", theta)
    if not isinstance(kind, str) or kind not in _KINDS:
        reader.reasons.append(f'{key}.rope_type = "{kind}": not implemented; implemented are {", ".join(_KINDS)}')
        kind = "default"
    unknown = sorted(set(parameters) - _COMMON - _KINDS[kind].keys)
    reader.reasons += [
        f"{key}.{name} = {parameters[name]!r}: not known for {kind}" for name in unknown if parameters[name] is not None
    ]
    if not is_number(fraction) or not 0 < fraction <= 1 or not is_number(base) or base <= 1:
        reader.reasons.append(f"{key}: rope_theta = {base!r} or partial_rotary_factor = {fraction!r} makes no sense")
        fraction, base = 1.0, 10000.0
    dim = int(head_dim * fraction)
    if dim % 2 or dim == 0:
        reader.reasons.append(
            f"{key}.partial_rotary_factor = {fraction}: rotates {dim} of {head_dim} elements; wanted an even number"
        )
        dim = max(dim - dim % 2, 2)
    spec = _Spec(parameters, reader, key, dim, float(base), reader.integer("max_position_embeddings"))
    return _make(spec, kind)


def _make(spec: _Spec, kind: str) -> Rope:
    """The table, or a refusal and a plain one where its numbers, each sound, make none together."""
    with np.errstate(all="ignore"):
        try:
            rope = _KINDS[kind].make(spec)
            if rope.is_finite:
                return rope
        except (ArithmeticError, ValueError):
            pass
    spec.reader.reasons.append(f"{spec.key}: its numbers give no finite frequencies for {kind}")
    return Rope("static", spec.dim, (1.0,) * (spec.dim // 2))


def _plain(spec: _Spec) -> Frequencies:
    return spec.base ** -(np.arange(0, spec.dim, 2) / spec.dim)


def _rounded(values: Frequencies) -> tuple[float, ...]:
    return tuple(float(value) for value in values.astype(np.float32))


def _default(spec: _Spec) -> Rope:
    return Rope("static", spec.dim, _rounded(_plain(spec)))


def _linear(spec: _Spec) -> Rope:
    factor = spec.number("factor")
    return Rope("static", spec.dim, _rounded(_plain(spec) / factor), reach=max(factor, 1.0))


def _dynamic(spec: _Spec) -> Rope:
    """bloc97 and emozilla's dynamic NTK scaling: the base grows with the length."""
    factor = spec.number("factor")
    if spec.dim <= 2:
        spec.reader.reasons.append(f"{spec.key}: dynamic scaling needs more than 2 rotated elements")
    return Rope(
        "dynamic",
        spec.dim,
        _rounded(_plain(spec)),
        threshold=spec.max_positions,
        base=spec.base,
        factor=factor,
        reach=max(factor, 1.0),
    )


def _llama3(spec: _Spec) -> Rope:
    """Llama 3.1: long wavelengths are stretched, short ones kept, those between interpolated."""
    factor, low, high = spec.number("factor"), spec.number("low_freq_factor"), spec.number("high_freq_factor")
    frequencies = _plain(spec)
    wavelengths, length = 2 * math.pi / frequencies, spec.original_length()
    smooth = (length / wavelengths - low) / (high - low)
    between = (1 - smooth) * frequencies / factor + smooth * frequencies
    scaled = np.where(wavelengths > length / low, frequencies / factor, frequencies)
    medium = (wavelengths >= length / high) & (wavelengths <= length / low)
    return Rope("static", spec.dim, _rounded(np.where(medium, between, scaled)))


def _yarn(spec: _Spec) -> Rope:
    """Peng et al., YaRN, 2023."""
    length = spec.original_length()
    factor = spec.number("factor", spec.max_positions / length)
    attention_factor = spec.optional("attention_factor")
    mscale, all_dim = spec.optional("mscale"), spec.optional("mscale_all_dim")
    if attention_factor is None:
        attention_factor = (
            _mscale(factor, mscale) / _mscale(factor, all_dim) if mscale and all_dim else _mscale(factor, 1.0)
        )
    fast, slow = spec.optional("beta_fast") or 32, spec.optional("beta_slow") or 1
    low, high = (
        spec.dim * math.log(length / (beta * 2 * math.pi)) / (2 * math.log(spec.base)) for beta in (fast, slow)
    )
    if spec.parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.dim - 1)
    ramp = np.clip((np.arange(spec.dim // 2) - low) / (high - low if high != low else 0.001), 0, 1)
    frequencies = _plain(spec)
    mixed = frequencies / factor * ramp + frequencies * (1 - ramp)
    reach = max(length * factor / spec.max_positions, 1.0)
    return Rope("static", spec.dim, _rounded(mixed), attention_factor=attention_factor, reach=reach)


def _mscale(scale: float, weight: float) -> float:
    return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0


def _longrope(spec: _Spec) -> Rope:
    """Ding et al., LongRoPE, 2024: one set of factors for short prompts, another for long ones."""
    length = spec.original_length()
    factor = spec.number("factor", spec.max_positions / length)
    attention_factor = spec.optional("attention_factor")
    if attention_factor is None:
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(length)) if factor > 1 else 1.0
    tables = []
    for name in ("short_factor", "long_factor"):
        factors = spec.parameters.get(name)
        if not isinstance(factors, list) or len(factors) != spec.dim // 2 or not all(map(is_number, factors)):
            got = f"{len(factors)} values" if isinstance(factors, list) else "none"
            spec.reader.reasons.append(f"{spec.key}.{name}: wanted {spec.dim // 2} numbers, got {got}")
            factors = [1.0] * (spec.dim // 2)
        tables.append(_rounded(_plain(spec) / np.asarray(factors, np.float32)))
    return Rope("longrope", spec.dim, tables[0], tables[1], attention_factor=attention_factor, threshold=length)


@dataclass(frozen=True)
class _Kind:
    make: Callable[[_Spec], Rope]
    keys: frozenset[str] = frozenset()


_COMMON = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_KINDS = {
    "default": _Kind(_default),
    "linear": _Kind(_linear, frozenset({"factor"})),
    "dynamic": _Kind(_dynamic, frozenset({"factor", "original_max_position_embeddings"})),
    "llama3": _Kind(
        _llama3, frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"})
    ),
    "yarn": _Kind(
        _yarn,
        frozenset(
            "factor original_max_position_embeddings attention_factor beta_fast beta_slow mscale mscale_all_dim "
            "truncate".split()
        ),
    ),
    "longrope": _Kind(
        _longrope,
        frozenset({"factor", "attention_factor", "short_factor", "long_factor", "original_max_position_embeddings"}),
    ),
}


def read_ropes(
    reader: ConfigReader,
    head_dim: int,
    windows: tuple[int, ...],
    theta: float = 10000.0,
) -> tuple[tuple[int, ...], tuple[Rope, ...]]:
    """Which table each layer uses, and the tables. Reads rope_parameters, flat or by layer type, or the older keys."""
    parameters = reader.value("rope_parameters")
    scaling = reader.value("rope_scaling")
    # Where a config has both, transformers takes the older one.
    key = "rope_scaling" if scaling else "rope_parameters"
    parameters = scaling or (parameters if parameters is not None else {})
    base = reader.number("rope_theta", theta)
    reader.value("original_max_position_embeddings")
    if not isinstance(parameters, dict):
        reader.refuse(key, "wanted an object")
        parameters = {}
    nested = {kind: parameters[kind] for kind in ("full_attention", "sliding_attention") if kind in parameters}
    if not nested:
        return (0,) * len(windows), (read_rope(reader, key, parameters, base, head_dim),)
    beside = sorted(name for name in parameters if name not in nested and parameters[name] is not None)
    reader.reasons += [f"{key}.{name}: not known beside {' and '.join(nested)}" for name in beside]
    tables: list[Rope] = []
    chosen = {}
    for kind in sorted({"sliding_attention" if window else "full_attention" for window in windows}):
        inner = nested.get(kind) or {}
        if not isinstance(inner, dict):
            reader.reasons.append(f"{key}.{kind}: wanted an object")
            inner = {}
        rope = read_rope(reader, f"{key}.{kind}", inner, base, head_dim)
        if rope not in tables:
            tables.append(rope)
        chosen[kind] = tables.index(rope)
    return tuple(chosen["sliding_attention" if window else "full_attention"] for window in windows), tuple(tables)
