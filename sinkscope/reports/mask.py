"""SinkMask: which tokens are sinks, by text, padded, as a table, and how far the rules agree."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor

from sinkscope.errors import SinkscopeError, unknown

#: Columns of the table before those of the rules' strengths.
COLUMNS = ["text", "position", "token", "layer", "rules"]
#: What is put beside the rules: so many positions are often left out unseen.
USUAL = 16


@dataclass(frozen=True, eq=False)
class SinkMask:
    """Which tokens of some texts are sinks; True is a sink.

    Attributes:
        flagged: a row per flagged token; see :meth:`table`.
        lengths: label -> tokens of each text, in order.
        rules: rule -> threshold.
        about: model, versions, engine and why, dtype, BOS decision, arguments.
    """

    flagged: pd.DataFrame
    lengths: dict[str, int] = field(repr=False)
    rules: dict[str, float]
    about: dict[str, Any] = field(repr=False)

    @classmethod
    def of(
        cls,
        pieces: Sequence[pd.DataFrame],
        lengths: Mapping[str, int],
        rules: dict[str, float],
        about: dict[str, Any],
    ) -> SinkMask:
        """Put pieces together, in the order of the texts."""
        whole = pd.concat([p for p in pieces if len(p)] or list(pieces), ignore_index=True)[[*COLUMNS, *rules]]
        place = {label: i for i, label in enumerate(lengths)}
        order = whole.assign(place=whole["text"].map(place)).sort_values(["place", "position"]).index
        return cls(whole.loc[order].reset_index(drop=True), dict(lengths), rules, about)

    @property
    def by_text(self) -> dict[str, Bool[Tensor, " position"]]:
        """Give one boolean per token of each text, by its label."""
        masks = {label: torch.zeros(n, dtype=torch.bool) for label, n in self.lengths.items()}
        for label, rows in self.flagged.groupby("text", sort=False):
            masks[str(label)][torch.tensor(rows["position"].to_numpy())] = True
        return masks

    def padded(self, side: str = "right") -> tuple[Bool[Tensor, "text position"], Bool[Tensor, "text position"]]:
        """Give the mask and the attention mask of all texts, padded on the right or the left; pads are no sinks.

        Raises:
            SinkscopeError: another side.
        """
        if side not in ("right", "left"):
            raise unknown("side", side, ["right", "left"])
        longest = max(self.lengths.values())
        mask, real = torch.zeros(2, len(self.lengths), longest, dtype=torch.bool)
        for row, one in enumerate(self.by_text.values()):
            at = slice(len(one)) if side == "right" else slice(longest - len(one), longest)
            mask[row, at], real[row, at] = one, True
        return mask, real

    def table(self) -> pd.DataFrame:
        """Give one row per flagged token.

        Returns:
            Columns `text, position, token, layer, rules`, and one per rule with how strong the token is by it, whether it
            flags it or not: `attention` is a share of heads, `norm` and `massive` are multiples of a median, `bos_cosine` is
            a cosine. `layer` is the first in which a rule that flags it shows (-1 where none does: `first`), `rules` joins
            the names of those that flag it with +.
        """
        return self.flagged.copy()

    def only(self, rule: str) -> SinkMask:
        """Give the mask of one of the rules.

        Raises:
            SinkscopeError: it was not asked for.
        """
        if rule not in self.rules:
            raise unknown("rule in this mask", rule, self.rules)
        rows = self.flagged[self._by(rule)].reset_index(drop=True)
        return replace(self, flagged=rows[[*COLUMNS, rule]].assign(rules=rule), rules={rule: self.rules[rule]})

    def agreement(self) -> pd.DataFrame:
        """Say how many tokens each rule takes, and how far the rules agree, beside the first 16 positions.

        Returns:
            One row per rule: `rule, tokens, share` (of all tokens) and `texts` (in which it takes one), and of its tokens the
            share that each other rule takes too, `also_NAME`.
        """
        total = sum(self.lengths.values())
        early = sum(min(n, USUAL) for n in self.lengths.values())
        usual = f"first {USUAL} positions"
        chosen = {rule: self._by(rule) for rule in self.rules} | {usual: self.flagged["position"] < USUAL}
        rows = []
        for name, mine in chosen.items():
            tokens = early if name == usual else int(mine.sum())
            texts = len(self.lengths) if name == usual else self.flagged["text"][mine].nunique()
            also = {
                f"also_{other}": float((mine & theirs).sum()) / tokens if tokens else 0.0 for other, theirs in chosen.items()
            }
            rows.append({"rule": name, "tokens": tokens, "share": tokens / total, "texts": texts} | also)
            rows[-1][f"also_{name}"] = 1.0
        return pd.DataFrame(rows)

    def save(self, directory: str | Path) -> Path:
        """Write `mask` (a row per flagged token), `texts` and `agreement` as Parquet and CSV, and `summary.json`.

        Raises:
            SinkscopeError: the directory can't be written.
        """
        from sinkscope.reports import files
        from sinkscope.runs.resume import claimed, forget

        path = files.check_writable(directory)
        texts = pd.DataFrame({"text": list(self.lengths), "tokens": list(self.lengths.values())})
        with claimed(path):
            (path / files.SEAL).unlink(missing_ok=True)
            for name, table in {"mask": self.flagged, "texts": texts, "agreement": self.agreement()}.items():
                files.write_table(table, path / name)
            seal = json.dumps(self.about | {"rules": self.rules}, indent=1, ensure_ascii=False)
            files.write(path / files.SEAL, lambda p: p.write_text(seal, encoding="utf-8"))
            forget(path)
        return path

    @classmethod
    def load(cls, directory: str | Path) -> SinkMask:
        """Read a saved mask.

        Raises:
            SinkscopeError: there is no whole one.
        """
        path = Path(directory).expanduser()
        try:
            about = json.loads((path / "summary.json").read_text(encoding="utf-8"))
            flagged, texts = (pd.read_parquet(path / f"{name}.parquet") for name in ("mask", "texts"))
            lengths = dict(zip(texts["text"], texts["tokens"].astype(int).tolist(), strict=True))
            return cls(flagged[[*COLUMNS, *about["rules"]]], lengths, about["rules"], about)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SinkscopeError(f"no whole mask in {str(path)!r}: {error}") from None

    def _by(self, rule: str) -> pd.Series[bool]:
        """Mark the rows that a rule flags."""
        return pd.Series([rule in names.split("+") for names in self.flagged["rules"]], index=self.flagged.index, dtype=bool)

    def _repr_html_(self) -> str:
        table = self.agreement().to_html(float_format="{:.3f}".format, escape=True, index=False)
        return f"<p>{html.escape(str(self))}</p>{table}"

    def __str__(self) -> str:
        """Say in one line what this is."""
        n, total = len(self.lengths), sum(self.lengths.values())
        return (
            f"SinkMask: {self.about['model']}, {len(self.flagged)} of {total} tokens in {n} text{'s' * (n != 1)} "
            f"({', '.join(f'{rule} at {eps:g}' for rule, eps in self.rules.items())})"
        )
