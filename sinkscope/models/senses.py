"""Encoders of images and of sound: what they read, and what their positions are called.

Such a model is an encoder like those of text, whose positions are patches of an image (or of a spectrum) in reading order, or
frames of a sound, behind the tokens that it puts first by itself. It is run on what its processor gives, never padded.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from sinkscope.errors import SinkscopeError
from sinkscope.models.adapter import Adapter
from sinkscope.models.adapting import bare, reads, short_name
from sinkscope.models.patches import places_of
from sinkscope.tokens import Batch, Features, Mixed, TextTokens, Tokens, at_most, features_of, is_features, label_of, separate
from sinkscope.tokens.features import READS


def sensing(model: Any) -> Sensing:
    """Look at an encoder of images or of sound; of a Whisper, at its encoder.

    Raises:
        SinkscopeError: its attention is not that of one row of positions, in layers with equal numbers of heads.
    """
    network, plain = bare(model)
    trunk = _trunk(network)
    config: Any = trunk.config
    sided = bool(getattr(config, "is_encoder_decoder", False))
    names = ("encoder_layers", "encoder_attention_heads") if sided else ("num_hidden_layers", "num_attention_heads")
    sizes = [getattr(config, name, None) for name in names]
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise SinkscopeError(
            f"{type(network).__name__} reads {reads(model)} by layers of unequal sizes, which is not covered: encoders that "
            "keep one row of patches are (ViT, DeiT, DINOv2, CLIP's, SigLIP's), and of frames (AST, Hubert, Wav2Vec2)"
        )
    named = getattr(getattr(model, "cfg", None), "model_name", None) or getattr(network.config, "_name_or_path", "")
    points = {} if plain else model.hook_dict
    return Sensing(
        model=model,
        kind="hugging_face" if plain else "bridge",
        name=short_name(str(named or type(network).__name__)),
        layers=tuple(range(int(sizes[0] or 0))),
        windows={},
        n_layers=int(sizes[0] or 0),
        n_heads=int(sizes[1] or 0),
        n_ctx=None,
        causal=False,
        points=points,
    )


@dataclass(frozen=True, eq=False)
class Sensing(Adapter):
    """An encoder of images or of sound."""

    @property
    def reads(self) -> str:
        """What Hugging Face calls that which it reads."""
        return reads(self.model)

    @property
    def trunk(self) -> nn.Module:
        """The encoder, without any head."""
        return _trunk(self.network)

    @property
    def config(self) -> Any:
        """Its configuration."""
        trunk: Any = self.trunk
        return trunk.config

    @property
    def vocabulary(self) -> int:
        """No number of ids: they only number positions."""
        return 0

    def body(
        self,
        ids: Int[Tensor, "batch position"],
        valid: Bool[Tensor, "batch position"],
        cache: Any = None,
        first: int = 0,
        sources: Batch | None = None,
        inputs: Shaped[Tensor, "batch ..."] | Mixed | None = None,
    ) -> Float[Tensor, "batch position d_model"]:
        """Run the encoder on inputs.

        Raises:
            SinkscopeError: there are none, or it makes another number of positions of them.
        """
        if not isinstance(inputs, Tensor):
            raise SinkscopeError(f"{self.name} reads {self.reads}, which are not here")
        given: dict[str, Any] = {self.reads: inputs.to(next(self.trunk.parameters()).dtype)}
        output = self.trunk(**given, output_attentions=False, return_dict=True)
        hidden: Tensor = output.last_hidden_state
        if hidden.shape[:2] != ids.shape:
            raise SinkscopeError(
                f"{self.name} makes {hidden.shape[1]} positions of {self.reads} {list(inputs.shape[1:])}, and {ids.shape[1]} "
                "were counted from its configuration: what they are is not known here"
            )
        return hidden.to(ids.device)

    def tokenize(self, texts: Any, **how: Any) -> Tokens:
        """Take what the model's processor gives, one or several of it; each row becomes an `image 0` or a `sound 0`.

        Raises:
            SinkscopeError: it is something else, of another shape than the model takes, or is asked to be cut or masked.
        """
        if isinstance(texts, Tokens):
            return texts
        asked = [name for name in ("bos", "attention_mask") if how.get(name) is not None]
        if asked:
            raise SinkscopeError(f"{asked[0]}= is for text, and {self.name} reads {self.reads}: leave it out")
        most, first = at_most(how.get("max_tokens")), how.get("first", 0)
        found = [self._placed(label, row) for label, row in self._rows(texts, first)]
        if not found:
            raise SinkscopeError(f"nothing was given: {self.name} reads {self.reads}")
        long = next((s for s in found if most is not None and len(s) > most), None)
        if long is not None:
            raise SinkscopeError(
                f"{long.label!r} has {len(long)} positions and is not cut: give max_tokens={len(long)}, or leave it out"
            )
        wrong = [label for label, n in Counter(s.label for s in found).items() if n > 1 or label == "all"]
        if wrong:
            raise SinkscopeError(f"labels must be distinct and not 'all'; got {wrong[0]!r}")
        return Tokens(tuple(found), f"no BOS: positions are those that {type(self.trunk).__name__} makes of {self.reads}")

    def describe(self) -> dict[str, Any]:
        """Give what a report must record about the model: also what it reads."""
        return super().describe() | {"reads": self.reads}

    def _rows(self, texts: Any, first: int) -> Iterator[tuple[str, Features]]:
        """Give (label, row) pairs."""
        kind = READS[self.reads][0]
        if is_features(texts):
            texts = [texts]
        if isinstance(texts, Mapping):
            for label, given in texts.items():
                rows = [given] if isinstance(given, Features) else self._apart(given, repr(label))
                names = [label] if len(rows) == 1 else [f"{label} {n}" for n in range(len(rows))]
                yield from zip(map(label_of, names), rows, strict=True)
            return
        if isinstance(texts, str | Path | bytes | Tensor) or not hasattr(texts, "__iter__"):
            raise self._other(texts, "what was given")
        for n, row in enumerate(separate(texts, first), first):
            yield f"{kind} {n}", row if isinstance(row, Features) else self._apart(row, f"{kind} {n}")[0]

    def _apart(self, given: Any, where: str) -> list[Features]:
        if not is_features(given):
            raise self._other(given, where)
        return features_of(given, where)

    def _other(self, given: Any, where: str) -> SinkscopeError:
        shell = f"; on the command line, --file {'IMAGE.png' if READS[self.reads][0] == 'image' else 'SOUND.wav'}"
        return SinkscopeError(
            f"{where} is a {type(given).__name__}, and {self.name} reads {self.reads}: give what its processor gives, "
            f"{{{self.reads!r}: ...}}, one or several of it{shell}"
        )

    def _placed(self, label: str, row: Features) -> TextTokens:
        """Number and name the positions of one row."""
        if row.name != self.reads:
            raise SinkscopeError(f"{label!r} holds {row.name}, and {self.name} reads {self.reads}")
        places = places_of(self.trunk, label, row.values)
        return TextTokens(label, torch.arange(len(places)), tuple(places), inputs=row.values)


def _trunk(network: Any) -> nn.Module:
    """Find the encoder inside a model with a head, or with a decoder."""
    if getattr(network.config, "is_encoder_decoder", False):
        found: nn.Module = network.get_encoder() if hasattr(network, "decoder") or hasattr(network, "model") else network
        return found
    inside: list[Any] = [getattr(network, name, None) for name in ("base_model", "vision_model")]
    takes = (m for m in inside if isinstance(m, nn.Module) and reads(network) in inspect.signature(m.forward).parameters)
    return next(takes, network)
