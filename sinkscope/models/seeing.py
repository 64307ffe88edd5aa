"""Text with images or sound in it, as the processor of a vision-language model gives it.

The whole model is run: it puts what its towers make of images where their tokens stand, numbers the positions and says who
sees whom. What is looked at is the attention of its text model, over all positions. Text alone is run as by any decoder.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from sinkscope.errors import SinkscopeError
from sinkscope.models.adapter import Adapter
from sinkscope.models.identity import text_model
from sinkscope.models.patches import names_inside
from sinkscope.runs.undo import Undo
from sinkscope.tokens import Batch, Mixed, TextTokens, Tokens, at_most, columns_of, is_mixed, label_of, separate
from sinkscope.tokens.encodings import IDS, IGNORED, rows_of
from sinkscope.tokens.features import AMONG, MASK
from sinkscope.tokens.numbers import tensor_of
from sinkscope.tokens.texts import strings_of

#: What a token may stand for, and what configurations call its id.
KINDS = {
    "image": ("image_token_id", "image_token_index"),
    "video": ("video_token_id", "video_token_index"),
    "sound": ("audio_token_id", "audio_token_index"),
}
#: Where Hugging Face notes that a model has its hooks on hidden states.
HOOKED = "_output_capturing_hooks_installed"
#: What the model is given by us, or makes itself.
OURS = frozenset({"position_ids", "inputs_embeds", "use_cache", "past_key_values", "cache", "labels"})


def seeing(adapter: Adapter) -> Adapter:
    """Have the text model inside a larger one take images and sound as well; give any other model as it is."""
    if adapter.kind not in ("bridge", "hugging_face") or text_model(adapter.network) is adapter.network:
        return adapter
    network: Any = adapter.network
    if not _stand_ins(network.config):
        return adapter
    return Seeing(**{field.name: getattr(adapter, field.name) for field in fields(adapter)})


@dataclass(frozen=True, eq=False)
class Seeing(Adapter):
    """A text model inside a larger one, which puts images or sound among its tokens."""

    @property
    def spared(self) -> frozenset[int]:
        """The configurations of its towers, which attend as they do."""
        inside = next(name for name, module in self.network.named_modules() if module is text_model(self.network))
        held: dict[bool, set[int]] = {True: set(), False: set()}
        for name, module in self.network.named_modules():
            apart = not (f"{name}.".startswith(f"{inside}.") or f"{inside}.".startswith(f"{name}." if name else ""))
            if vars(module).get("config") is not None:
                held[apart].add(id(vars(module)["config"]))
        return frozenset(held[True] - held[False])

    def tokenize(self, texts: Any, **how: Any) -> Tokens:
        """Tokenise text, and take text with images in it as the processor gives it: one, several, or label -> one.

        Raises:
            SinkscopeError: as for any text; several texts in one, or what the model does not take.
        """
        if isinstance(texts, Tokens) or not _any_mixed(texts):
            return super().tokenize(texts, **how)
        if how.get(MASK) is not None:
            raise SinkscopeError(
                "attention_mask= is for ids: of text with images in it, it is among what the processor gives"
            )
        first, most = how.get("first", 0), at_most(how.get("max_tokens"))
        named = isinstance(texts, Mapping) and not is_mixed(texts)
        entries = (
            texts.items() if named else ((None, entry) for entry in separate([texts] if is_mixed(texts) else texts, first))
        )
        found: list[TextTokens] = []
        said = []
        for n, (label, entry) in enumerate(entries, first):
            if is_mixed(entry):
                found.append(self._read(f"text {n}" if label is None else label_of(label), entry, most))
                said.append("token ids and what goes with them were given and taken as they are")
                continue
            alone = super().tokenize([entry] if label is None else {label: entry}, **how | {"first": n})
            found += alone.sequences
            said.append(alone.bos)
        wrong = [label for label, n in Counter(s.label for s in found).items() if n > 1 or label == "all"]
        if wrong:
            raise SinkscopeError(f"text labels must be distinct and not 'all'; got {wrong[0]!r}")
        return Tokens(tuple(found), "; ".join(dict.fromkeys(said)))

    def _read(self, label: str, given: Mapping[str, Any], most: int | None) -> TextTokens:
        """Take one text with images in it: its ids without pads, what goes with them, and what its positions are called."""
        rows = rows_of({name: given[name] for name in (IDS, MASK) if given.get(name) is not None}, repr(label))
        if len(rows) != 1:
            raise SinkscopeError(
                f"{label!r} holds {len(rows)} texts at once, whose images are not told apart: give them one by one, "
                "[processor(text=text, images=images, return_tensors='pt') for ...]"
            )
        (ids,) = rows
        if most is not None and len(ids) > most:
            raise SinkscopeError(
                f"{label!r} has {len(ids)} positions, images among them, and is not cut: give max_tokens={len(ids)}, or "
                "leave it out"
            )
        start = columns_of(given, None, 1)[0]
        values = {
            name: value.reshape(1, -1)[:, start : start + len(ids)] if name.endswith("token_type_ids") else value
            for name, value in self._beside(label, given).items()
        }
        network: Any = self.network
        strings, placed = strings_of(self.tokenizer, ids), torch.zeros(len(ids), dtype=torch.bool)
        for kind, token in _stand_ins(network.config).items():
            at = (ids == token).nonzero().flatten().tolist()
            placed |= ids == token
            for position, name in zip(at, names_inside(kind, at, values, network.config), strict=True):
                strings[position] = name
        if not bool(placed.any()):
            raise SinkscopeError(
                f"{label!r} has no token that stands for an image or a sound (ids {_stand_ins(network.config)}): give what "
                "the processor gives for text and images together"
            )
        ends = _ends(values, len(ids), network.config)
        mixed = Mixed(values, placed, ends, near=_sees_near(network.config))
        return TextTokens(label, ids, tuple(strings), inputs=mixed)

    def _beside(self, label: str, given: Mapping[str, Any]) -> dict[str, Tensor]:
        """Give what comes beside the ids, as tensors; refuse what the model does not take."""
        taken = set(inspect.signature(self.trunk.forward).parameters) - OURS
        found = {}
        for name, value in given.items():
            if value is None or name in {IDS, MASK} | IGNORED or isinstance(value, str):
                continue
            if name not in taken:
                raise SinkscopeError(
                    f"{label!r} has {name!r}, which {type(self.trunk).__name__} does not take: "
                    + (
                        "reduce what Hugging Face's own model gives with output_attentions=True: ss.metrics.of_pattern"
                        if name in AMONG
                        else "leave it out"
                    )
                )
            try:
                numbers = tensor_of(value).detach().cpu()
                found[name] = numbers[None] if numbers.ndim == 0 else numbers
            except Exception:  # whatever NumPy and PyTorch raise about what are no numbers
                raise SinkscopeError(
                    f"{name} of {label!r} is no array of numbers: give what processor(..., return_tensors='pt') gives"
                ) from None
        return found

    def body(
        self,
        ids: Int[Tensor, "batch position"],
        valid: Bool[Tensor, "batch position"],
        cache: Any = None,
        first: int = 0,
        sources: Batch | None = None,
        inputs: Shaped[Tensor, "batch ..."] | Mixed | None = None,
    ) -> Float[Tensor, "batch position d_model"]:
        """Run the whole model but its head; on text alone, as any decoder.

        Raises:
            SinkscopeError: it makes another number of positions of what it is given.
        """
        if not isinstance(inputs, Mixed):
            return super().body(ids, valid, cache, first, sources, inputs)
        dtype = next(self.network.parameters()).dtype
        given = {n: x.to(ids.device, dtype if x.is_floating_point() else x.dtype) for n, x in inputs.values.items()}
        with Undo() as undo, _bare(self.network):
            undo.callback(vars(self).pop, "mixed", None)
            vars(self)["mixed"] = inputs
            for module in (m for m in (self.network, self.trunk) if hasattr(m, "rope_deltas")):
                undo.callback(setattr, module, "rope_deltas", module.rope_deltas)  # kept by Qwen, to generate from there
            output = self.trunk(
                input_ids=ids,
                attention_mask=valid.long(),
                use_cache=False,
                output_attentions=False,
                return_dict=True,
                **given,
            )
        hidden: Tensor = output.last_hidden_state
        if hidden.shape[:2] != ids.shape:
            raise SinkscopeError(
                f"{self.name} makes {hidden.shape[1]} positions of {ids.shape[1]} ids and the images beside them: give what "
                "its processor gives, which has one token for every position"
            )
        return hidden.to(ids.device)


@contextmanager
def _bare(network: nn.Module) -> Iterator[None]:
    """Take back the hooks that Hugging Face puts on a tower for good when it is first asked for its hidden states."""
    before = [(module, set(module._forward_hooks), vars(module).get(HOOKED)) for module in network.modules()]
    try:
        yield
    finally:
        for module, hooks, hooked in before:
            for key in module._forward_hooks.keys() - hooks:
                del module._forward_hooks[key]
            if hooked is None:
                vars(module).pop(HOOKED, None)


def _any_mixed(texts: Any) -> bool:
    """Tell text with images in it, alone, in a list or under a label."""
    if is_mixed(texts):
        return True
    entries = texts.values() if isinstance(texts, Mapping) else texts if isinstance(texts, list | tuple) else ()
    return any(is_mixed(entry) for entry in entries)


def _stand_ins(config: Any) -> dict[str, int]:
    """Give the tokens that stand for images, videos and sound."""
    found = {kind: [getattr(config, name, None) for name in names] for kind, names in KINDS.items()}
    return {kind: ids[0] for kind, given in found.items() if (ids := [n for n in given if isinstance(n, int)])}


def _ends(values: Mapping[str, Tensor], length: int, config: Any) -> Int[Tensor, " position"]:
    """Give the key after the last that each query sees: Gemma's images see themselves both ways, Gemma 3's in every layer.

    When the model is run, it is compared with the masks that the model makes.
    """
    ends = torch.arange(1, length + 1)
    sees = _sees_near(config)
    types = (
        values.get("mm_token_type_ids") if sees else values.get("token_type_ids") if config.model_type == "gemma3" else None
    )
    if types is None:
        return ends
    inside = ((types[0] == 1) | (sees & (types[0] == 2))).tolist()
    for n in range(length - 2, -1, -1):
        if inside[n] and inside[n + 1]:
            ends[n] = ends[n + 1]
    return ends


def _sees_near(config: Any) -> bool:
    """Tell models whose images see themselves both ways in layers with a sliding window alone: larger ones of Gemma 4."""
    return getattr(config.get_text_config(), "use_bidirectional_attention", None) == "vision"
