"""HookedEncoderDecoder, which TransformerLens has up to 3.9: a T5 whose three attentions have hook points.

It is measured, by hooks. Its forward pass is called whole, and the last hidden states are those that a final norm gives.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from sinkscope.errors import SinkscopeError
from sinkscope.models.adapter import Adapter
from sinkscope.models.adapting import short_name
from sinkscope.models.identity import Side
from sinkscope.models.sides import Sided
from sinkscope.models.writing import GENERATED
from sinkscope.runs.undo import Undo
from sinkscope.tokens import Batch, TextTokens, Tokens

#: Tokens on which the decoder is seen to look at none that come later.
FEW = 4


def is_hooked(model: Any) -> bool:
    """Tell a HookedEncoderDecoder."""
    return not isinstance(model, type) and hasattr(model, "encoder_final_ln") and hasattr(model, "decoder_final_ln")


def hooked_sided(model: Any, side: Side) -> HookedSided:
    """Look at one side.

    Raises:
        SinkscopeError: its decoder sees later tokens (TransformerLens 2).
    """
    name = short_name(str(getattr(model.cfg, "model_name", None) or type(model).__name__))
    adapter = HookedSided(
        model=model,
        kind="hooked_encoder",
        name=f"{name} ({side})",
        layers=tuple(range(model.cfg.n_layers)),
        windows={},
        n_layers=int(model.cfg.n_layers),
        n_heads=int(model.cfg.n_heads),
        n_ctx=None,  # positions are relative
        causal=side == "decoder",
        points=model.hook_dict,
        side=side,
    )
    if side != "encoder":
        adapter.check_causal()
    return adapter


@dataclass(frozen=True, eq=False)
class HookedSided(Sided):
    """One attention of a HookedEncoderDecoder; positions as of any `Sided`."""

    places: ClassVar[dict[Side, str]] = {
        "encoder": "encoder.{}.attn",
        "decoder": "decoder.{}.attn",
        "cross": "decoder.{}.cross_attn",
    }

    def side_of(self, module: nn.Module) -> Side | None:
        """Tell nothing: no module asks for its attention."""
        return None

    @property
    def trunk(self) -> nn.Module:
        """The model itself."""
        return self.network

    @property
    def vocabulary(self) -> int:
        """How many token ids there are."""
        return int(self.model.cfg.d_vocab)

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers of the stack that is looked at."""
        return list(self.model.encoder if self.side == "encoder" else self.model.decoder)

    def body(
        self,
        ids: Int[Tensor, "batch position"],
        valid: Bool[Tensor, "batch position"],
        cache: Any = None,
        first: int = 0,
        sources: Batch | None = None,
        inputs: Shaped[Tensor, "batch ..."] | None = None,
    ) -> Float[Tensor, "batch position d_model"]:
        """Run the model; where the encoder alone is looked at, with a target of one token.

        Raises:
            SinkscopeError: a target without a source.
        """
        model, seen = self.model, list[Tensor]()
        read, real, target = ids, valid, torch.zeros_like(ids[:, :1])
        if not self.alone:
            beside = self.sources_of(ids, sources)
            read, real, target = beside.ids, beside.valid, ids
        norm = model.encoder_final_ln if self.alone else model.decoder_final_ln
        with Undo() as undo:
            undo.callback(norm.register_forward_hook(lambda _, __, output: seen.append(output.clone())).remove)
            model(read, decoder_input=target, return_type=None, one_zero_attention_mask=real.long())
        return seen[0]

    def logits(
        self, hidden: Float[Tensor, "position d_model"], room: Float[Tensor, "row vocabulary"] | None = None
    ) -> Float[Tensor, "position vocabulary"]:
        """Unembed the decoder's last hidden states."""
        tied = getattr(self.model.cfg, "tie_word_embeddings", False)
        logits: Tensor = self.model.unembed(hidden[None] * (self.model.cfg.d_model**-0.5 if tied else 1))[0]
        return logits.float()

    def own_logits(self, ids: Int[Tensor, "1 position"]) -> Float[Tensor, "position vocabulary"]:
        """Give the logits as the model itself makes them."""
        beside = self.sources_of(ids, None)
        logits: Tensor = self.model(beside.ids, decoder_input=ids, one_zero_attention_mask=beside.valid.long())[0]
        return logits.float()

    def check(self, tokens: Tokens, *, bounded: bool = True) -> None:
        """Refuse ids that there are not, of targets and of their sources."""
        Adapter.check(self, tokens, bounded=bounded)
        for source in (s.source for s in tokens.sequences if s.source is not None):
            self._check_text(source, None, self.vocabulary)

    def check_causal(self) -> None:
        """See to it that the decoder is one: that of TransformerLens 2 sees later tokens.

        Raises:
            SinkscopeError: it does.
        """
        seen = list[Tensor]()
        ids = torch.arange(1, 1 + FEW, device=self.device)[None]
        point = self.points["decoder.0.attn.hook_pattern"]
        with Undo() as undo, self.quiet():
            undo.callback(point.register_forward_hook(lambda _, __, output: seen.append(output)).remove)
            self.model(ids, decoder_input=ids, return_type=None, one_zero_attention_mask=torch.ones_like(ids))
        if bool(seen[0].triu(1).any()):
            raise SinkscopeError(
                f"the decoder of {self.name} sees tokens that come later, unlike T5's: give Hugging Face's own, "
                "T5ForConditionalGeneration.from_pretrained(name), or TransformerLens 3.9"
            )

    def _shifted(self, labels: list[int]) -> list[int]:
        """Put labels behind the start token, as in training."""
        return [self._start, *labels[:-1]]

    @property
    def _start(self) -> int:
        start = getattr(self.model.cfg, "decoder_start_token_id", None)
        if start is None:
            raise SinkscopeError(f"{self.name} says no decoder_start_token_id: give targets as token ids")
        return int(start)

    def _generated(self, source: TextTokens, most: int | None) -> Int[Tensor, " target"]:
        """Generate a target greedily, up to EOS; its last token was never given to the decoder, and is left out."""
        ids, end = [self._start], getattr(self.tokenizer, "eos_token_id", None)
        with self.quiet():
            while len(ids) <= (GENERATED if most is None else most) and (len(ids) == 1 or ids[-1] != end):
                logits = replace(self, source=source).own_logits(torch.tensor([ids], device=self.device))
                ids.append(int(logits[-1].argmax()))
        return torch.tensor(ids[:-1])
