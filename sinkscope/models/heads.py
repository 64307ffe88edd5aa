"""From last hidden states to logits."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sinkscope.errors import SinkscopeError
from sinkscope.models.running import Running
from sinkscope.runs.undo import Undo


class Heads(Running):
    """A decoder's output layer."""

    #: Whether there is more to logits than an output layer: a transform before it (BERT's), so that all of the head is run.
    transforms: ClassVar[bool] = False

    def take_whole_head(self) -> None:
        """Have `logits` run whatever the model does with its last hidden states, from now on."""
        vars(self)["transforms"] = True  # an adapter is of one call

    @property
    def head(self) -> Any:
        """Hugging Face's output layer, or None."""
        network: Any = self.network
        return network.get_output_embeddings()

    def logits(
        self, hidden: Float[Tensor, "position d_model"], room: Float[Tensor, "row vocabulary"] | None = None
    ) -> Float[Tensor, "position vocabulary"]:
        """Unembed some last hidden states of a decoder, in float32: never a whole text's at once.

        They may be made in a `room` that `room()` gave, in which nobody needs what is there any longer.
        """
        if self.kind == "hooked_transformer":
            normed = self.model.ln_final(hidden[None]) if self.model.cfg.normalization_type is not None else hidden[None]
            logits: Tensor = self.model.unembed(normed)[0].float()
            cap = getattr(self.model.cfg, "output_logits_soft_cap", None)
            cap = cap if cap and cap > 0 else None
        elif self.transforms:
            return self._whole_head(hidden)
        else:
            made = (
                torch.mm(hidden, self.head.weight.T, out=room[: len(hidden)])
                if room is not None
                else self.head(hidden[None])[0]
            )
            logits = made.float()
            scale = getattr(self.config, "logit_scale", None) or 1 / (getattr(self.config, "logits_scaling", None) or 1)
            logits = logits if scale == 1 else logits * scale
            caps = (getattr(self.config, name, None) for name in ("final_logit_softcapping", "logits_soft_cap"))
            cap = next((cap for cap in caps if cap), None)
        return logits if cap is None else (logits / cap).tanh() * cap

    def room(self, rows: int) -> Float[Tensor, "row vocabulary"] | None:
        """Give memory in which `logits` makes up to so many rows again and again: fresh memory costs a tenth of the product.

        None where the output layer is more than a product, or not that of torch alone.
        """
        head = None if self.kind == "hooked_transformer" or self.transforms else self.head
        if type(head) is not nn.Linear or type(head.weight) is not nn.Parameter or head.bias is not None:
            return None
        touched = head._forward_pre_hooks or head._forward_hooks or "forward" in vars(head)
        if touched or torch.is_autocast_enabled(head.weight.device.type):
            return None
        return head.weight.new_empty(rows, len(head.weight))

    def _whole_head(self, hidden: Float[Tensor, "position d_model"]) -> Float[Tensor, "position vocabulary"]:
        """Run the model while its body gives these hidden states, whatever it is asked."""
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=self.device)
        inside = vars(self.trunk)
        with Undo() as undo:
            before = {"forward": inside["forward"]} if "forward" in inside else {}  # a patch of somebody's
            undo.callback(inside.update, before)
            undo.callback(inside.pop, "forward")
            inside["forward"] = lambda *_, **__: _Given(hidden[None])
            logits = self.own_logits(ids)
        return logits

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


class _Given:
    """What a body gives: a last hidden state, by name or first of all, and nothing else."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int) -> Tensor:
        return self.last_hidden_state
