"""SinkCallback: the sinks of a fixed text, measured while `transformers.Trainer` trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, SupportsIndex

import pandas as pd
from transformers import TrainerCallback

from sinkscope.errors import SinkscopeError
from sinkscope.metrics import resolve
from sinkscope.observe import measure
from sinkscope.tokens import whole_number

#: What is measured if nothing is said.
DEFAULT = ("sink_mass", "sink_rate")


class SinkCallback(TrainerCallback):  # type: ignore[misc]
    """Measures probe texts before the first step, at every n-th and at the end, and logs the numbers.

    They are logged as `sink_mass`, `sink_rate@0.3`, ... beside the step: in `trainer.state.log_history`, so that they are in
    `trainer_state.json` too, and in :attr:`history`. The model is measured in eval mode, without gradients or autocast, and
    left as it was; no random number is drawn, so that training goes on as without it.

    Args:
        metrics: as for :func:`sinkscope.measure`; None for sink_mass and sink_rate. Every model-level number is logged.
        texts: as there; strings go through the trainer's `processing_class`, by its own conventions.
        every: steps between measurements.
        log: called with the numbers as well: `trainer.log`, which hands them to every logger that the trainer has, or
            `wandb.log`. None for `log_history` alone.
        how: keywords of :func:`sinkscope.measure`, such as `key`, `where` or `batch_size`.

    Raises:
        SinkscopeError: `every` is less than 1, there are no texts, or a metric is unknown.

    Example::

        probe = ss.SinkCallback(["sink_mass"], texts=["The quick brown fox jumps over the lazy dog."], every=50)
        trainer = Trainer(model, args, train_dataset=data, processing_class=tokenizer, callbacks=[probe])
        trainer.train()
        probe.history                      # step, sink_mass
    """

    def __init__(
        self,
        metrics: Any = None,
        texts: Any = None,
        every: SupportsIndex = 100,
        log: Callable[[dict[str, float]], Any] | None = None,
        **how: Any,
    ) -> None:
        self.metrics = resolve(DEFAULT if metrics is None else metrics)
        self.every, self.texts, self.log, self.how = whole_number(every, "every"), texts, log, how
        if self.every < 1:
            raise SinkscopeError(f"every={self.every}: give 1 to measure after every step, or n for every n-th")
        if texts is None or (hasattr(texts, "__len__") and not len(texts)):
            raise SinkscopeError("SinkCallback needs texts=: those whose sinks are looked at, the same every time")
        self._rows: list[dict[str, float]] = []

    @property
    def history(self) -> pd.DataFrame:
        """All numbers so far: `step`, and a column per model-level number."""
        return pd.DataFrame(self._rows)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure before the first step, or where training goes on."""
        self._measure(state, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure after every n-th step."""
        if state.global_step % self.every == 0:
            self._measure(state, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure at the end, if that was not done."""
        self._measure(state, **kwargs)

    def _measure(self, state: Any, model: Any = None, processing_class: Any = None, **others: Any) -> None:
        if self._rows and self._rows[-1]["step"] == state.global_step:
            return
        texts = self.texts if processing_class is None else _ids(processing_class, self.texts)
        numbers = measure(model, texts, self.metrics, per_text=False, **self.how).summary("all")
        found = {str(name): float(value) for name, value in zip(numbers["metric"], numbers["value"], strict=True)}
        self._rows.append({"step": state.global_step} | found)
        if not state.is_world_process_zero:
            return
        if self.log is None:
            state.log_history.append(found | {"epoch": state.epoch, "step": state.global_step})
        else:
            self.log(found)


def _ids(tokenizer: Any, texts: Any) -> Any:
    """Give strings as the tokenizer writes them, one or several; anything else as it is."""
    if isinstance(texts, str):
        return [tokenizer(texts)["input_ids"]]
    if isinstance(texts, Mapping):
        return {label: tokenizer(t)["input_ids"] if isinstance(t, str) else t for label, t in texts.items()}
    if isinstance(texts, list | tuple):
        return [tokenizer(t)["input_ids"] if isinstance(t, str) else t for t in texts]
    return texts
