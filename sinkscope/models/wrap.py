"""Wrapping: a Hugging Face model into a TransformerBridge, with nothing installed behind anybody's back."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sinkscope.models.versions import check_bridge
from sinkscope.runs.undo import Undo
from sinkscope.tokens.features import READS

#: What TransformerLens requires of vision-language models, for their images alone.
IMAGES = ["torchvision"]


def bridge(network: Any, tokenizer: Any, name: str, location: str | None = None) -> Any:
    """Wrap a Hugging Face model, where it is, in a TransformerBridge; the model is rewritten in place.

    Args:
        network: the model; its `config.architectures` must name its class.
        tokenizer: its tokenizer.
        name: what reports call it.
        location: a directory with its config; None writes one for the moment.
    """
    check_bridge()
    from transformer_lens.model_bridge import TransformerBridge

    network.set_attn_implementation("eager")  # 3.9 leaves sdpa in place, where patterns never fire
    with tempfile.TemporaryDirectory() as directory, nothing_installed():
        if location is None or not (Path(location) / "config.json").exists():
            network.config.save_pretrained(directory)
            location = directory
        model = TransformerBridge.boot_transformers(
            location, hf_model=network, tokenizer=tokenizer, device=str(network.device), dtype=network.dtype
        )
    _nothing_around_nothing(network)
    model.cfg.model_name = name
    return model


def wrapped(network: Any, tokenizer: Any, name: str, location: str | None = None) -> Any:
    """Wrap as :func:`bridge` does; an encoder of images or of sound that TransformerLens does not know stays as it is."""
    check_bridge()
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES as KNOWN

    if network.main_input_name in READS and not set(network.config.architectures or ()) & set(KNOWN):
        return network
    return bridge(network, tokenizer, name, location)


def _nothing_around_nothing(network: Any) -> None:
    """Put back the modules that a model does not have: rotary positions of Granite's hybrids, around which a bridge wraps."""
    for parent in network.modules():
        for name, child in parent._modules.items():
            if child is not None and getattr(child, "original_component", child) is None:
                parent._modules[name] = None


@contextmanager
def nothing_installed() -> Iterator[None]:
    """Keep TransformerLens from running pip, which it does for the image processor of a vision-language model.

    Nor does it ask for that processor's library, without which text can be read.
    """

    def refuse(command: Any, *args: Any, **how: Any) -> int:
        raise OSError(f"not run while a model is loaded: {command}")

    with Undo() as undo:
        for name in ("run", "check_call"):  # not Popen, a class that others inherit from
            undo.callback(setattr, subprocess, name, getattr(subprocess, name))
            setattr(subprocess, name, refuse)
        inside = "transformer_lens.model_bridge."
        helpers: Any = sys.modules.get(f"{inside}sources.transformers.helpers")
        if hasattr(helpers, "_ensure_torchvision"):
            undo.callback(setattr, helpers, "_ensure_torchvision", helpers._ensure_torchvision)
            helpers._ensure_torchvision = lambda: False  # it would run pip
        adapters: Any = getattr(sys.modules.get(f"{inside}architecture_adapter"), "ArchitectureAdapter", None)
        if hasattr(adapters, "_check_required_libraries"):
            check = adapters._check_required_libraries
            undo.callback(setattr, adapters, "_check_required_libraries", check)
            adapters._check_required_libraries = lambda self: None if self.required_libraries == IMAGES else check(self)
        yield
