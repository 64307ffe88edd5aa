"""What an encoder-decoder's target is made of: labels behind a start token, or what the model writes itself."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from sinkscope.errors import SinkscopeError
from sinkscope.models.adapter import Adapter
from sinkscope.tokens import TextTokens
from sinkscope.tokens.pairs import FORMS

#: Tokens of a target that is generated, at most, where nothing else is said.
GENERATED = 64


class Writing(Adapter):
    """A model that reads a source and writes a target."""

    #: What one of its sources is called in labels.
    noun: ClassVar[str] = "text"

    def _given(self, source: TextTokens) -> dict[str, Any]:
        """Give one source as the whole model takes it."""
        ids = source.ids[None].to(self.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def _shifted(self, labels: list[int]) -> list[int]:
        """Put labels behind the start token, as in training."""
        network: Any = self.network
        own = getattr(network, "prepare_decoder_input_ids_from_labels", None)
        if own is not None:
            shifted: list[int] = own(torch.tensor([labels], device=self.device))[0].tolist()
            return shifted
        start = getattr(network.config, "decoder_start_token_id", None)
        if start is None:
            raise SinkscopeError(f"{self.name} says no decoder_start_token_id: give targets as token ids")
        return [int(start), *labels[:-1]]

    def _generated(self, source: TextTokens, most: int | None) -> Int[Tensor, " target"]:
        """Generate a target greedily; its last token was never given to the decoder, and is left out.

        Raises:
            SinkscopeError: the model generates nothing.
        """
        network: Any = self.network
        if not hasattr(network, "generate") or network.get_output_embeddings() is None:
            raise SinkscopeError(
                f"{type(network).__name__} has no language-model head to generate a target with, which side={self.side!r} "
                f"needs: give {FORMS[self.noun]}; or look at side='encoder'"
            )
        room = min(GENERATED if most is None else most, self.n_ctx or GENERATED)
        with self.quiet():
            return torch.as_tensor(self._written(self._given(source), room))[:-1].cpu()

    def _written(self, source: dict[str, Any], room: int) -> Int[Tensor, " position"]:
        """Have the model write at most so many tokens greedily; give all that its decoder has seen, and the last."""
        network: Any = self.network
        written: Tensor = network.generate(**source, max_new_tokens=room, do_sample=False, num_beams=1)[0]
        return written
