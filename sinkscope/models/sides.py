"""Encoder-decoders: one of their three attentions at a time, as layers like those of any other model.

The encoder's and the decoder's own attention are those of two models, of which the second is given what the first has made of
the source. In cross-attention queries are the target's tokens and keys the source's. Encoder and decoder are called by
themselves, one after the other, so that no logits are made.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from sinkscope.errors import SinkscopeError, unknown
from sinkscope.models.adapter import Adapter
from sinkscope.models.adapting import bare, short_name
from sinkscope.models.identity import Side
from sinkscope.models.stacks import layers_of, longest_input, sides_in, stack_of, vocabulary_of, windows_of
from sinkscope.models.uncovered import check_merged
from sinkscope.models.writing import Writing
from sinkscope.tokens import Batch, Targets, TextTokens, Tokens, resided, tokenize, tokenize_pairs
from sinkscope.tokens.pairs import FORMS


def sided(model: Any, side: Side, kind: type[Sided], *, whole: bool = False) -> Sided:
    """Look at one side, by a kind of `Sided`; `whole`: run the decoder too where the encoder is looked at.

    Raises:
        SinkscopeError: the model is edited, or is the inside of a bridge.
    """
    network, plain = bare(model)
    check_merged(network)
    half: Side = "encoder" if side == "encoder" else "decoder"
    config, n_layers = stack_of(network, half).config, len(layers_of(stack_of(network, half)))
    last: Side = "decoder" if whole else half
    named = getattr(getattr(model, "cfg", None), "model_name", None) or getattr(network.config, "_name_or_path", "")
    heads = getattr(config, f"{half}_attention_heads", None) or config.num_attention_heads
    return kind(
        model=model,
        kind="hugging_face" if plain else "bridge",
        name=f"{short_name(str(named or type(network).__name__))} ({side})",
        layers=tuple(range(n_layers)),
        windows={} if side == "cross" else windows_of(config, n_layers, half),
        n_layers=n_layers,
        n_heads=int(heads),
        n_ctx=longest_input(stack_of(network, last).config, last),
        causal=side == "decoder",
        points={} if plain else model.hook_dict,
        side=side,
        whole=whole,
    )


@dataclass(frozen=True, eq=False)
class Sided(Writing):
    """One attention of an encoder-decoder; positions are the source's in the encoder, else the target's.

    Attributes:
        source: what the encoder reads where nothing else is said.
        whole: whether the decoder is run too where the encoder is looked at, so that there is a loss.
    """

    source: TextTokens | None = None
    whole: bool = False
    #: Where a bridge keeps each side's attention of a layer.
    places: ClassVar[dict[Side, str]] = {
        "encoder": "encoder_blocks.{}.attn",
        "decoder": "decoder_blocks.{}.self_attn",
        "cross": "decoder_blocks.{}.cross_attn",
    }

    @cached_property
    def _sides(self) -> dict[int, Side]:
        """Which attention each module belongs to, by its `id`."""
        return sides_in(self.network)

    def side_of(self, module: nn.Module) -> Side | None:
        """Tell which attention a module computes."""
        return self._sides.get(id(module))

    @cached_property
    def _numbers(self) -> dict[int, int]:
        """Which layer each module belongs to, by its `id`."""
        return {id(module): layer for layer, block in enumerate(self.blocks) for module in block.modules()}

    def layer_of(self, module: nn.Module) -> int | None:
        """Tell the layer whose attention a module computes, which those of encoders do not say."""
        return self._numbers.get(id(module))

    @property
    def alone(self) -> bool:
        """Whether the encoder is run, and no decoder after it."""
        return self.side == "encoder" and not self.whole

    @property
    def predicts(self) -> bool:
        """Whether a run gives next tokens, of which there is a loss."""
        return not self.alone

    @property
    def trunk(self) -> nn.Module:
        """The stack that gives the last hidden state."""
        stack: nn.Module = stack_of(self.network, "encoder" if self.alone else "decoder")
        return stack

    @property
    def trunks(self) -> list[nn.Module]:
        """Both stacks, of which the decoder is called with the KV cache."""
        return [stack_of(self.network, "encoder"), stack_of(self.network, "decoder")]

    @property
    def embedding(self) -> nn.Module:
        """The module that takes the token ids of that stack, and may take the other's too."""
        stack: Any = self.trunk
        found: nn.Module = stack.get_input_embeddings()
        return found

    @property
    def config(self) -> Any:
        """The configuration of that stack."""
        stack: Any = self.trunk
        return stack.config

    @property
    def vocabulary(self) -> int:
        """How many token ids that stack takes; 0 where it does not say."""
        return vocabulary_of(self.trunk)

    def body(
        self,
        ids: Int[Tensor, "batch position"],
        valid: Bool[Tensor, "batch position"],
        cache: Any = None,
        first: int = 0,
        sources: Batch | None = None,
        inputs: Shaped[Tensor, "batch ..."] | None = None,
    ) -> Float[Tensor, "batch position d_model"]:
        """Run the encoder, and unless it alone is looked at, the decoder on what it gives.

        Targets need no mask of their pads: real rows never see them. But their mask is given, of ones, since some decoders
        would take tokens for pads by their id.

        Raises:
            SinkscopeError: a target without a source.
        """
        # A bridge's hooks on attention that is not looked up (LED) are fed only where it is asked for.
        how = {"output_attentions": self.kind == "bridge" and not self.asks_interface, "return_dict": True}
        if self.alone:
            return self._encoded(ids, valid, inputs, how)
        given = self._memory(self.sources_of(ids, sources), how) | {
            "attention_mask": torch.ones_like(ids),
            "use_cache": False,
        }
        hidden: Tensor = stack_of(self.network, "decoder")(input_ids=ids, **given, **how).last_hidden_state
        return hidden.to(ids.device)

    def sources_of(self, ids: Int[Tensor, "batch position"], sources: Batch | None) -> Batch:
        """Give the sources of some targets: those given, or for each the one that stands beside.

        Raises:
            SinkscopeError: there is none.
        """
        if sources is None and self.source is not None:
            (sources,) = Tokens((self.source,) * len(ids), "").batches(len(ids), ids.device)
        if sources is None:
            raise SinkscopeError(f"{self.name} needs a source for its target: give {FORMS[self.noun]}")
        return sources

    def _encoded(self, ids: Tensor, valid: Tensor, inputs: Tensor | None, how: dict[str, Any]) -> Tensor:
        """Run the encoder alone."""
        encoder = stack_of(self.network, "encoder")
        hidden: Tensor = encoder(input_ids=ids, attention_mask=valid.long(), **how).last_hidden_state
        return hidden

    def _memory(self, sources: Batch, how: dict[str, Any]) -> dict[str, Any]:
        """Give what the decoder is handed of the sources."""
        real = sources.valid.long()
        memory = stack_of(self.network, "encoder")(input_ids=sources.ids, attention_mask=real, **how).last_hidden_state
        return {"encoder_hidden_states": memory, "encoder_attention_mask": real}

    def few(self) -> Tokens:
        """Give a few tokens to try the model on, beside a source."""
        (text,) = super().few().sequences
        return Tokens((replace(text, source=self._heard(text), crossed=self.side != "decoder"),), "")

    def _heard(self, text: TextTokens) -> TextTokens:
        """Give a source to try the model on."""
        return text

    def beside(self, text: TextTokens) -> Sided:
        """Give the model as it runs this text's ids: beside its source."""
        return self if text.source is None else replace(self, source=text.source)

    def within(self, text: TextTokens) -> Sided:
        """Give the model as it runs the text whose positions are edited; of a source, its encoder alone."""
        return replace(self.beside(text), whole=False)

    def proofs(self, tokens: Tokens) -> list[tuple[Adapter, Tokens]]:
        """Give what must be proved before it is edited: an encoder with its decoder, as the two that they are."""
        sides: tuple[Side, ...] = ("decoder", "encoder")
        if not self.whole or self.side != "encoder":
            return [(self, tokens)]
        return [(sided(self.model, side, type(self)), resided(tokens, side)) for side in sides]

    def logits(
        self, hidden: Float[Tensor, "position d_model"], room: Float[Tensor, "row vocabulary"] | None = None
    ) -> Float[Tensor, "position vocabulary"]:
        """Unembed the decoder's last hidden states, as T5 scales them and with BART's bias."""
        network: Any = self.network
        tied = getattr(network.config, "tie_word_embeddings", False) and hasattr(network, "model_dim")  # Switch, UMT5
        scaled = getattr(network.config, "scale_decoder_outputs", tied)
        logits = super().logits(hidden * network.config.d_model**-0.5 if scaled else hidden, room)
        bias = getattr(network, "final_logits_bias", None)
        return logits if bias is None else logits + bias[0].float()

    def own_logits(self, ids: Int[Tensor, "1 position"]) -> Float[Tensor, "position vocabulary"]:
        """Give the logits as the model itself makes them."""
        network: Any = self.network
        if self.source is None or self.head is None:
            raise SinkscopeError(
                f"{type(network).__name__} predicts no token here: it needs a source, and a head for its logits"
            )
        given = {"decoder_input_ids": ids, "decoder_attention_mask": torch.ones_like(ids)}
        output = network(**self._given(self.source), use_cache=False, return_dict=True, **given)
        own: Tensor = output.logits[0].float()
        return own

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers of the stack that is looked at."""
        return list(layers_of(stack_of(self.network, "encoder" if self.side == "encoder" else "decoder")))

    def why_no_cache(self, length: int) -> str | None:
        """Say why nothing is run in chunks."""
        return super().why_no_cache(length) or "an encoder-decoder's target is run in one shot"

    def tokenize(self, texts: Any, **how: Any) -> Tokens:
        """Tokenise sources and targets by this model's conventions; see :func:`sinkscope.tokens.tokenize_pairs`."""
        if isinstance(texts, Tokens):
            return resided(super().tokenize(texts, **how), self.side or "decoder", alone=self.alone)
        targets = None if self.alone else Targets(self.tokenizer, self._shifted, self._generated)
        return tokenize_pairs(texts, targets, self._read, crossed=self.side != "decoder", noun=self.noun, **how)

    def _read(self, sources: dict[str, Any], **how: Any) -> Tokens:
        """Make tokens of sources, by their labels."""
        return tokenize(self.tokenizer, sources, causal=False, **how)

    def check(self, tokens: Tokens, *, bounded: bool = True) -> None:
        """Refuse what the model can't take, of targets and of their sources."""
        super().check(tokens, bounded=bounded)
        encoder: Any = stack_of(self.network, "encoder")
        longest = longest_input(encoder.config, "encoder") if bounded else None
        for source in (s.source for s in tokens.sequences if s.source is not None):
            self._check_text(source, longest, vocabulary_of(encoder))

    def hook_point(self, layer: int, name: str) -> Any:
        """Give this side's hook point of a layer: `attn.` is its attention."""
        place = self.places[self.side or "decoder"].format(layer)
        full = name.replace("attn", place, 1) if name.startswith("attn.") else f"{place.rpartition('.')[0]}.{name}"
        if full not in self.points:
            raise unknown("hook point", full, [p for p in self.points if p.startswith(place.rpartition(".")[0])])
        return self.points[full]

    @property
    def attention_points(self) -> list[tuple[int, Any]]:
        """The hook points of all three attentions' patterns, with their layers."""
        return [(int(p.split(".")[1]), at) for p, at in self.points.items() if p.endswith("attn.hook_pattern")]
