"""The adapter: one face for every TransformerLens model, and for a plain Hugging Face one.

What a model is stands in `identity.py`, how it is run in `running.py`, its logits in `heads.py`; `adapt` in `adapting.py`
looks at whatever the caller has.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

import torch
from torch import nn

from sinkscope.errors import SinkscopeError
from sinkscope.models.digest import digest
from sinkscope.models.heads import Heads
from sinkscope.runs.fingerprint import fingerprint
from sinkscope.tokens import TextTokens, Tokens, tokenize


class Adapter(Heads):
    """What the rest of the library needs to know about a model, and the one way to run it."""

    def tokenize(self, texts: Any, **how: Any) -> Tokens:
        """Tokenise texts by this model's conventions; arguments as for :func:`sinkscope.tokenize`."""
        return tokenize(self.tokenizer, texts, bos_by_default=self.bos_by_default, causal=self.causal, **how)

    def check(self, tokens: Tokens, *, bounded: bool = True) -> None:
        """Refuse, before anything runs, what the model can't take.

        Raises:
            SinkscopeError: a text longer than the context (if that bounds what will be run), or an id outside the vocabulary.
        """
        chosen = self.chosen
        for s in tokens.sequences:
            self._check_text(s, self.n_ctx if bounded else None, self.vocabulary)
            if chosen is not None and len(s) > chosen:
                raise SinkscopeError(
                    f"{s.label!r} has {len(s)} tokens, and queries of {self.name} attend to the {chosen} keys that an "
                    f"indexer chooses for each, which is not covered: up to {chosen} tokens they see all. Shorten it with "
                    f"max_tokens={chosen} (--max-tokens {chosen})"
                )

    def _check_text(self, s: TextTokens, longest: int | None, vocabulary: int) -> None:
        if longest is not None and len(s) > longest:
            raise SinkscopeError(
                f"{s.label!r} has {len(s)} tokens, but {self.name} takes at most {longest}. Shorten it with "
                f"max_tokens={longest} (--max-tokens {longest}), or take a windowed intervention that streams"
            )
        if vocabulary > 0 and int(s.ids.max()) >= vocabulary:
            raise SinkscopeError(f"{s.label!r} has token id {int(s.ids.max())}; {self.name} has 0 to {vocabulary - 1}")

    def few(self) -> Tokens:
        """Give a few tokens to try the model on."""
        ids = torch.arange(1, 9)
        return Tokens((TextTokens("proof", ids, ("",) * len(ids)),), "")

    def beside(self, text: TextTokens) -> Adapter:
        """Give the model as it runs this text's ids: an encoder-decoder, beside its source."""
        return self

    def within(self, text: TextTokens) -> Adapter:
        """Give the model as it runs the text whose positions are edited; of a source, its encoder alone."""
        return self.beside(text)

    def proofs(self, tokens: Tokens) -> list[tuple[Adapter, Tokens]]:
        """Give what must be proved before it is edited: an encoder with its decoder, as the two that they are."""
        return [(self, tokens)]

    def state(self) -> dict[str, Any]:
        """Give what numbers depend on besides the texts: weights, buffers, configuration, switches, hooks, patched code.

        Nothing of it is remembered from an earlier call: a write through `.data` leaves no trace but the weights themselves.
        """
        modules = list(dict.fromkeys([*self.model.modules(), *self.network.modules()]))
        hooks = [(place, found) for place, module in enumerate(modules) if (found := hooks_on(module))]
        patched = [(place, vars(module)["forward"]) for place, module in enumerate(modules) if "forward" in vars(module)]
        switches = {name: repr(value) for name, value in vars(getattr(self.model, "cfg", self)).items() if _plain(value)}
        config = getattr(self.network, "config", None)
        return {
            "weights": digest(self.network),
            "config": "" if config is None else config.to_json_string(use_diff=False),
            "switches": switches,
            "autocast": torch.is_autocast_enabled(self.device.type),
            "hooks": fingerprint(hooks),
            "patched": fingerprint(patched),
        }

    def describe(self) -> dict[str, Any]:
        """Give what a report must record about the model."""
        versions = {p: importlib.metadata.version(p) for p in ("sinkscope", "transformers")}
        return {
            "model": self.name,
            "class": type(self.model).__name__,
            "n_layers": self.n_layers,
            "n_heads": self.n_heads,
            **({"heads": {str(layer): n for layer, n in self.heads.items()}} if self.uneven else {}),
            "layers": list(self.layers),
            "windows": {str(layer): size for layer, size in self.windows.items()},
            "causal": self.causal,
            **({} if self.side is None else {"side": self.side}),
            "dtype": self.dtype,
            "device": ", ".join(sorted({str(p.device) for p in self.network.parameters() if not p.is_meta})),
            "transformer_lens": importlib.metadata.version("transformer-lens"),
            "torch": torch.__version__,
            **versions,
        }


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool | list | tuple)


def hooks_on(module: nn.Module) -> list[Any]:
    """Give a module's hooks, but those that a bridge puts there itself and that rest: nobody hooks the points they feed."""
    found = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return [hook for hook in found if not _rests(hook)]


def _rests(hook: Any) -> bool:
    fed = [cell.cell_contents for cell in getattr(hook, "__closure__", None) or ()]
    own = str(getattr(hook, "__module__", "")).startswith("transformer_lens.model_bridge")
    return own and not any(point.has_hooks(dir="both") for point in fed if hasattr(point, "has_hooks"))
