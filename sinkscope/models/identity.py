"""What a model is: its class, its layers, its parts by name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from sinkscope.block import Compressed
from sinkscope.errors import SinkscopeError, unknown
from sinkscope.models.gates import Gate, find_gates
from sinkscope.models.versions import check_interfaces, rotary_options
from sinkscope.tokens import Mixed

Kind = Literal["bridge", "hooked_transformer", "hooked_encoder", "hugging_face"]
#: The attentions of an encoder-decoder.
Side = Literal["decoder", "encoder", "cross"]


@dataclass(frozen=True, eq=False)
class Identity:
    """What is known of a model without running it.

    Attributes:
        model: the model: TransformerLens's, or Hugging Face's own.
        kind: which class it is.
        name: its name, for reports.
        layers: the layers that have attention, ascending.
        windows: sliding window of each layer that has one.
        n_layers: number of layers.
        n_heads: query heads per layer; of layers that differ, the most.
        n_ctx: longest input, or None where nothing bounds it.
        causal: False for encoders.
        points: hook points by their TransformerLens name; none in a plain Hugging Face model.
        side: which attention of an encoder-decoder is looked at; None of any other model.
        uneven: query heads of each layer, where layers differ in it (Laguna's); nothing elsewhere.
    """

    model: Any
    kind: Kind
    name: str
    layers: tuple[int, ...]
    windows: dict[int, int]
    n_layers: int
    n_heads: int
    n_ctx: int | None
    causal: bool
    points: dict[str, Any] = field(repr=False)
    side: Side | None = None
    uneven: dict[int, int] = field(default_factory=dict)
    #: In a pass over text with images in it, what is given beside its ids.
    mixed: ClassVar[Mixed | None] = None

    def side_of(self, module: nn.Module) -> Side | None:
        """Tell which attention of an encoder-decoder a module computes; None in any other model."""
        return None

    @cached_property
    def heads(self) -> dict[int, int]:
        """Query heads of each layer that attends."""
        return {layer: self.uneven.get(layer, self.n_heads) for layer in self.layers}

    def layer_of(self, module: nn.Module) -> int | None:
        """Tell the layer whose attention a module computes; None where it does not say, or several layers share it."""
        says = getattr(module, "layer_idx", None)
        return None if says in (None, -1) else int(says)

    @property
    def predicts(self) -> bool:
        """Whether a run gives next tokens, of which there is a loss."""
        return self.causal

    @property
    def hears(self) -> bool:
        """Whether positions in an encoder are those of a sound."""
        return False

    @property
    def spared(self) -> frozenset[int]:
        """Which configurations, by `id`, are of parts whose attention is not looked at and stays as it is."""
        return frozenset()

    @property
    def asks_interface(self) -> bool:
        """Whether Hugging Face's code of this model looks its attention function up, where another can stand."""
        return hasattr(sys.modules[type(self.network).__module__], "ALL_ATTENTION_FUNCTIONS")

    @cached_property
    def shows_patterns(self) -> bool:
        """Whether there is a hook point for the attention pattern of every layer that attends."""
        try:
            return bool([self.hook_point(layer, "attn.hook_pattern") for layer in self.layers])
        except SinkscopeError:
            return False

    @property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer, or None."""
        return getattr(self.model, "tokenizer", None)

    @property
    def bos_by_default(self) -> bool:
        """Whether TransformerLens puts BOS first by default on this model."""
        return bool(getattr(getattr(self.model, "cfg", None), "default_prepend_bos", True))

    @property
    def device(self) -> torch.device:
        """Where token ids must go: where the first weights are, if they are anywhere (offloaded ones are not)."""
        return next((p.device for p in self.network.parameters() if not p.is_meta), torch.device("cpu"))

    @property
    def dtype(self) -> str:
        """Name of the parameters' dtype."""
        return str(next(self.network.parameters()).dtype).removeprefix("torch.")

    @property
    def network(self) -> nn.Module:
        """The module that computes: Hugging Face's own model inside a bridge, else the model itself."""
        inner: nn.Module = self.model.original_model if self.kind == "bridge" else self.model
        return inner

    @property
    def config(self) -> Any:
        """Hugging Face's configuration of the text model."""
        network: Any = self.network
        return network.config.get_text_config()

    @property
    def chosen(self) -> int | None:
        """How many keys each query is left with by an indexer that chooses them (GLM's sparse attention), or None."""
        if self.kind not in ("bridge", "hugging_face"):
            return None
        compressed = any("compressed" in kind for kind in getattr(self.config, "layer_types", None) or ())
        size = getattr(self.config, "index_topk", None)
        return int(size) if size and not compressed else None

    @cached_property
    def compressed(self) -> bool:
        """Whether some keys are no tokens, but stand for several."""
        return any(isinstance(window, Compressed) for window in self.windows.values())

    @property
    def per_stack(self) -> int | None:
        """Layers of a stack that is run several times in a pass (HRM's), each time as layers of its own; None elsewhere."""
        size = None if self.kind not in ("bridge", "hugging_face") else getattr(self.config, "num_layers_per_stack", None)
        return int(size) if size else None

    def check_run_once(self, what: str) -> None:
        """Refuse what tells layers apart by their modules, where a stack of them is run several times, or keys by tokens.

        Raises:
            SinkscopeError: it is, or some keys are no tokens; says what works.
        """
        if self.compressed:
            raise SinkscopeError(
                f"{what} take keys for tokens, and {self.name} attends to some that stand for several at once (compressed "
                "attention): ss.measure, ss.attention_map and ss.attention_patterns give what its tokens receive"
            )
        if self.per_stack:
            raise SinkscopeError(
                f"{what} tell layers apart by their modules, and the {self.per_stack} layers of a stack of {self.name} are "
                "run several times in a pass: ss.measure and ss.attention_map count the times"
            )

    @property
    def takes_pads(self) -> bool:
        """Whether texts of unequal length may share a batch: TransformerLens 3's two-way decoder attends to pads.

        Where keys stand for several tokens, an indexer chooses otherwise among equals when there are others, of pads.
        """
        return (self.causal or self.kind != "hooked_transformer") and not self.compressed

    @property
    def width(self) -> int:
        """Numbers in the residual stream at a position."""
        if self.kind == "hugging_face":
            return int(self.config.hidden_size)
        return int(self.model.cfg.d_model)

    @property
    def vocabulary(self) -> int:
        """How many token ids there are; 0 where the model does not say."""
        if self.kind == "hugging_face":
            return int(getattr(self.config, "vocab_size", 0) or 0)
        return int(getattr(self.model.cfg, "d_vocab", 0) or 0)

    def hook_point(self, layer: int, name: str) -> Any:
        """Give the hook point `blocks.{layer}.{name}`; what a model without rotary positions rotates is what it has.

        Raises:
            SinkscopeError: there is none; lists those of a block.
        """
        prefix = f"blocks.{layer}."
        if prefix + name not in self.points and "hook_rot_" in name and not self.rotations:
            name = name.replace("hook_rot_", "hook_")
        if prefix + name not in self.points:
            raise unknown("hook point", name, [p.removeprefix(prefix) for p in self.points if p.startswith(prefix)])
        return self.points[prefix + name]

    @property
    def attention_points(self) -> list[tuple[int, Any]]:
        """The hook points of patterns, with their layers; of an encoder-decoder those of all its attentions, as of stacks."""
        if self.per_stack:
            return [(int(p.split(".")[1]), at) for p, at in self.points.items() if p.endswith("attn.hook_pattern")]
        return [(layer, self.hook_point(layer, "attn.hook_pattern")) for layer in self.layers]

    @cached_property
    def modules(self) -> tuple[nn.Module, ...]:
        """All modules, of the model and of Hugging Face's inside a bridge, as they were when a run began.

        A bridge has thousands, and a run asks for them several times.
        """
        found = self.network.modules() if self.network is self.model else (*self.model.modules(), *self.network.modules())
        return tuple(dict.fromkeys(found))

    def attention_modules(self) -> Iterator[nn.Module]:
        """Give the modules that may keep their last pattern."""
        return (module for module in self.modules if hasattr(module, "_pattern"))

    @cached_property
    def gates(self) -> list[Gate]:
        """What gates the heads of layers; nothing where outputs are not gated."""
        if self.kind not in ("bridge", "hugging_face"):
            return []
        return find_gates(text_model(self.network), self.config, self.heads)

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers themselves, each of which gives the residual stream after it."""
        self.check_run_once("losses, edits and sweeps")
        inside = text_model(self.network).modules()
        lists = [m for m in inside if isinstance(m, nn.ModuleList) and len(m) == self.n_layers]
        if not lists:
            raise SinkscopeError(f"the layers of {self.name} were not found")
        return list(lists[0])

    @property
    def rotations(self) -> list[Tensor]:
        """Frequencies of each kind of rotary positions; none where positions are absolute."""
        return [f for m in self.network.modules() if (f := m._buffers.get("inv_freq")) is not None]

    @property
    def rotary(self) -> bool:
        """Whether keys are rotated, in one way or several, for a model that Hugging Face runs."""
        names = (name for m in self.network.modules() for name in m._buffers)
        return any(name.endswith("inv_freq") for name in names) or bool(rotary_options(self.config))


def check_plain(model: Any) -> None:
    """Refuse the inside of a bridge, and a transformers that is too old for a plain model.

    Raises:
        SinkscopeError: it is one of these.
    """
    if any(hasattr(module, "original_component") for module in model.modules()):
        raise SinkscopeError(
            f"this {type(model).__name__} is the inside of a TransformerBridge, which rewrote it: pass the bridge itself"
        )
    check_interfaces()


def text_model(network: Any) -> nn.Module:
    """Give the part of a model that reads text: a decoder inside a vision-language model, else the whole."""
    config: Any = getattr(network, "config", None)
    if config is None or config.get_text_config() is config or not hasattr(network, "get_decoder"):
        whole: nn.Module = network
        return whole
    found = network.get_decoder()
    return found if isinstance(found, nn.Module) else network
