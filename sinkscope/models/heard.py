"""Encoder-decoders that hear: Whisper, whose source is a sound, as its processor gives it, and whose target is text."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from sinkscope.errors import SinkscopeError
from sinkscope.models.adapter import Adapter
from sinkscope.models.senses import Sensing, sensing
from sinkscope.models.sides import Sided
from sinkscope.tokens import Batch, TextTokens, Tokens


@dataclass(frozen=True, eq=False)
class Heard(Sided):
    """One attention of a Whisper; positions are frames of the sound in the encoder, else the target's tokens."""

    noun: ClassVar[str] = "sound"

    @cached_property
    def ears(self) -> Sensing:
        """Its encoder, which knows what it reads."""
        return sensing(self.model)

    @property
    def hears(self) -> bool:
        """Whether positions in an encoder are those of a sound."""
        return True

    @property
    def vocabulary(self) -> int:
        """How many token ids the decoder takes; of frames, whose ids only number them, 0."""
        return 0 if self.alone else super().vocabulary

    def _encoded(self, ids: Tensor, valid: Tensor, inputs: Tensor | None, how: dict[str, Any]) -> Tensor:
        return self.ears.body(ids, valid, inputs=inputs)

    def check(self, tokens: Tokens, *, bounded: bool = True) -> None:
        """Refuse what the decoder can't take; sounds were looked at when they were read."""
        Adapter.check(self, tokens, bounded=bounded and not self.alone)

    def tokenize(self, texts: Any, **how: Any) -> Tokens:
        """Take what the model's processor gives, `decoder_input_ids` beside it or in a (sound, target) pair."""
        if how.get("attention_mask") is not None:
            self.ears.tokenize([], **how)
        return super().tokenize(texts, **how)

    def describe(self) -> dict[str, Any]:
        """Give what a report must record about the model: also what it reads."""
        return super().describe() | {"reads": self.ears.reads}

    def _read(self, sources: dict[str, Any], **how: Any) -> Tokens:
        """Take one sound under each label; they are whole, `max_tokens` is for targets."""
        if not self.alone:
            how.pop("max_tokens", None)
        found = self.ears.tokenize(sources, **how)
        if len(found) != len(sources):
            raise SinkscopeError(
                f"{len(found)} sounds are in {len(sources)} pairs: give a target to each of them, as rows of "
                "'decoder_input_ids' beside them or in pairs of their own"
            )
        return found

    def _heard(self, text: TextTokens) -> TextTokens:
        """Give a sound to try the model on: a hum."""
        encoder: Any = self.ears.trunk
        frames = encoder.config.max_source_positions * encoder.conv1.stride[0] * encoder.conv2.stride[0]
        hum = torch.arange(encoder.config.num_mel_bins * frames).sin().reshape(-1, frames)
        return self.ears.tokenize({self.ears.reads: hum}).sequences[0]

    def _memory(self, sources: Batch, how: dict[str, Any]) -> dict[str, Any]:
        return {"encoder_hidden_states": self.ears.body(sources.ids, sources.valid, inputs=sources.inputs)}

    def _given(self, source: TextTokens) -> dict[str, Any]:
        inputs = torch.as_tensor(source.inputs)[None]
        return {self.ears.reads: inputs.to(self.device, next(self.network.parameters()).dtype)}

    def _shifted(self, labels: list[int]) -> list[int]:
        """Put labels behind the start token, which Whisper's tokenizer puts before them already."""
        network: Any = self.network
        start = network.config.decoder_start_token_id
        return super()._shifted(labels[1:] if labels[:1] == [start] else labels)

    def _written(self, source: dict[str, Any], room: int) -> Int[Tensor, " position"]:
        """Have the model transcribe; asked for a dictionary, it gives also what it was prompted with."""
        network: Any = self.network
        how = {"do_sample": False, "num_beams": 1, "return_timestamps": False, "return_dict_in_generate": True}
        written: Tensor = network.generate(**source, max_length=room, **how)["sequences"][0]
        return written
