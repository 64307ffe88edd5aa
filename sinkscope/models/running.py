"""The one way to run a model's body: no logits, no attentions kept, nothing changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from sinkscope.models.identity import Identity, text_model
from sinkscope.models.versions import cache_keyword, cache_of, hooked_cache, rotary_options
from sinkscope.runs.owner import alone
from sinkscope.runs.undo import Undo
from sinkscope.tokens import Batch


class Running(Identity):
    """A model's body, up to its last hidden state."""

    def new_cache(self, batch: int) -> Any:
        """Make an empty KV cache that keeps every position, also on sliding-window layers."""
        if self.kind == "bridge":
            from transformers import DynamicCache

            return DynamicCache()
        return hooked_cache().init_cache(self.model.cfg, self.device, batch)

    def why_no_cache(self, length: int) -> str | None:
        """Say why a chunked prefill of this length can't be right whatever the cache does, or None."""
        if not self.causal:
            return "an encoder's queries see later keys"
        rotary = rotary_options(self.config) if self.kind in ("bridge", "hugging_face") else {}
        grows = any(kind in ("dynamic", "longrope") for kind in _leaves(rotary))
        return "its rotary scaling depends on the length" if grows else None

    def body(
        self,
        ids: Int[Tensor, "batch position"],
        valid: Bool[Tensor, "batch position"],
        cache: Any = None,
        first: int = 0,
        sources: Batch | None = None,
        inputs: Shaped[Tensor, "batch ..."] | None = None,
    ) -> Float[Tensor, "batch position d_model"]:
        """Run the model up to its last hidden state: no logits, no attentions kept.

        Right padding needs no mask in a causal model (real rows never see it); an encoder gets one. `first` is the position
        of the first token, for a decoder that Hugging Face runs; `sources` are what an encoder-decoder's encoder reads,
        `inputs` what an encoder of images or sound does.
        """
        if self.kind in ("bridge", "hugging_face"):
            extra: dict[str, Any] = {} if self.causal else {"attention_mask": valid.long()}
            if cache is not None:
                extra[cache_keyword(self.trunk)] = cache
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
        if inner is not self.network:
            return inner
        inner = text_model(inner)  # of Llama 4, which has no body around both models
        return getattr(inner, "model", inner)

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
        cache = cache_of(given)
        if cache is None:
            return 0
        return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else int(cache[0].past_keys.shape[1])

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Have the model to oneself for the time of a run, in inference.

        Raises:
            SinkscopeError: this thread runs the model already.
        """
        with alone(self.network), self.inference():
            yield

    @contextmanager
    def inference(self) -> Iterator[None]:
        """No gradients, no dropout; every module's mode is put back."""
        vars(self).pop("modules", None)  # of a stream, whose code may change the model before its next text
        training = [module for module in self.modules if module.training]
        with Undo() as undo, torch.no_grad():
            for module in training:  # not eval(): on a bridge it takes as long as a short text
                undo.callback(setattr, module, "training", True)
                module.training = False
            yield


def _leaves(tree: Any) -> list[Any]:
    """Give what nested dictionaries hold."""
    return [leaf for branch in tree.values() for leaf in _leaves(branch)] if isinstance(tree, dict) else [tree]
