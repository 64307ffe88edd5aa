"""The versions that people have: where those that are served differ, it is asked here and nowhere else.

TransformerLens: 2.16 to 3.9 have HookedTransformer and HookedEncoder, 3.0 to 4.x TransformerBridge. transformers: 4.51 (which
TransformerLens 2.16 needs) to 5.x; from 4.53 on there are interfaces for attention and its masks, where a function of ours
can stand.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
from typing import Any

import torch

from sinkscope.errors import SinkscopeError

#: What a KV cache is called: by transformers up to 5.23 and since, by HookedTransformer.
CACHE = ("past_key_values", "cache", "past_kv_cache")


class VersionError(SinkscopeError):
    """What was asked for is not in the versions that are installed; the message names one that has it."""


@functools.cache
def installed(package: str) -> tuple[int, int]:
    """Give the first two numbers of a package's version."""
    major, minor = importlib.metadata.version(package).split(".")[:2]
    return int(major), int(minor)


def has_bridge() -> bool:
    """Whether TransformerLens has TransformerBridge."""
    return installed("transformer-lens") >= (3, 0)


def has_hooked_transformer() -> bool:
    """Whether TransformerLens has HookedTransformer and HookedEncoder."""
    return installed("transformer-lens") < (4, 0)


def check_bridge() -> None:
    """See to it that there is a TransformerBridge.

    Raises:
        VersionError: there is none.
    """
    if not has_bridge():
        plain = " or Hugging Face's own model" if has_interfaces() else ""
        raise VersionError(
            f"TransformerLens {importlib.metadata.version('transformer-lens')} has no TransformerBridge: take a "
            f"HookedTransformer (backend='hooked_transformer'){plain}, or pip install 'transformer-lens>=3'"
        )


def check_hooked_transformer() -> None:
    """See to it that there is a HookedTransformer.

    Raises:
        VersionError: there is none.
    """
    if not has_hooked_transformer():
        raise VersionError(
            "backend='hooked_transformer' needs transformer-lens 2.16 to 3.9; this is "
            f"{importlib.metadata.version('transformer-lens')}, which has TransformerBridge only. Leave backend out, or pip "
            "install 'transformer-lens<4'"
        )


def hooked_cache() -> Any:
    """Give the class of HookedTransformer's KV cache, which moved in 3.0."""
    if has_bridge():
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        return TransformerLensKeyValueCache
    from transformer_lens.past_key_value_caching import HookedTransformerKeyValueCache

    return HookedTransformerKeyValueCache


def cache_keyword(network: Any) -> str:
    """Give the keyword of a model's KV cache: `cache` since transformers 5.24."""
    return "cache" if "cache" in inspect.signature(network.forward).parameters else "past_key_values"


def cache_of(given: dict[str, Any]) -> Any:
    """Find the KV cache among the keywords of a forward pass; None where there is none."""
    return next((found for name in CACHE if (found := given.get(name)) is not None), None)


def known_names() -> list[str]:
    """Give the names that TransformerLens lists."""
    import transformer_lens

    place = "supported_models" if has_bridge() else "loading_from_pretrained"
    found: list[str] = getattr(getattr(transformer_lens, place, None), "OFFICIAL_MODEL_NAMES", [])
    return list(found)


def of_dtype(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Give the keyword of `from_pretrained` for a dtype."""
    return {"dtype" if installed("transformers") >= (4, 56) else "torch_dtype": dtype}


def has_interfaces() -> bool:
    """Whether functions of ours can stand for a Hugging Face model's attention and for its masks."""
    return installed("transformers") >= (4, 53)


def check_interfaces() -> None:
    """See to it that functions of ours can stand for a Hugging Face model's attention and masks.

    Raises:
        VersionError: they can't.
    """
    if not has_interfaces():
        raise VersionError(
            "a plain Hugging Face model is measured through an interface for attention masks, which transformers has from "
            f"4.53 on; this is {importlib.metadata.version('transformers')}. pip install 'transformers>=4.53', or make a "
            "HookedTransformer of the model, or reduce what it gives with output_attentions=True: "
            "ss.metrics.of_pattern(attentions)"
        )


def looks_up() -> bool:
    """Whether models look their attention function up by a method, beside which others can listen."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return hasattr(ALL_ATTENTION_FUNCTIONS, "get_interface")


def check_lookup() -> None:
    """See to it that a plain Hugging Face model can be watched.

    Raises:
        VersionError: it can't.
    """
    if not looks_up():
        raise VersionError(
            f"a plain Hugging Face model is watched by a method that transformers has from 5.0 on; this is "
            f"{importlib.metadata.version('transformers')}: pip install 'transformers>=5', or watch it in TransformerLens"
        )


def class_of(name: str) -> Any:
    """Give a class of transformers.

    Raises:
        VersionError: there is none yet.
    """
    import transformers

    found = getattr(transformers, name, None)
    if found is None:
        raise VersionError(f"transformers {transformers.__version__} has no {name}: pip install --upgrade transformers")
    return found


def rotary_options(config: Any) -> dict[str, Any]:
    """Give what a configuration says of rotary positions, under one name or another."""
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    return found or {}


def as_configured(options: dict[str, Any], known: set[str]) -> dict[str, Any]:
    """Say what configurations are told since transformers 5 in the words that this one knows: its rotary positions."""
    if "rope_parameters" in known or "rope_parameters" not in options:
        return options
    told = {name: value for name, value in options.items() if name != "rope_parameters"}
    rotary = options["rope_parameters"]
    old = {"rope_theta": rotary["rope_theta"], "rope_scaling": None, "rotary_emb_base": rotary["rope_theta"]}
    if "partial_rotary_factor" in rotary:
        old |= dict.fromkeys(("partial_rotary_factor", "rotary_pct"), rotary["partial_rotary_factor"])
    return told | {name: value for name, value in old.items() if name in known}


def with_sizes(given: dict[str, Any]) -> dict[str, Any]:
    """Give what a mask function is told, with sizes in place of the positions in the cache that it was told before 5.2."""
    at = given.pop("cache_position", None)
    return given if at is None or "q_length" in given else {**given, "q_length": len(at), "q_offset": int(at[0])}
