"""A sweep over every head of SmolLM2, beside one `evaluate` per head, and beside a loop of `run_with_hooks`.

    python tests/benchmarks/sweep.py [--tokens 256] [--rounds 3] [--edit "zero_head()"] [--layers 0 15 29]

Each `evaluate` and each pass of the loop takes as long whatever the head, so that those of `--layers` alone may be run, and
counted for all. The loop is what anybody writes: the whole model on the text for every head, its output zeroed by a hook,
and the loss of the logits; it gives no KL and no interval.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

import sinkscope as ss


def of_the_loop(model: Any, ids: Any, layer: int, head: int) -> float:
    """Zero a head's output by a hook of TransformerLens, and give the difference of the mean loss."""
    import torch

    def zero(z: Any, hook: Any) -> Any:
        z[:, :, head] = 0
        return z

    hooks = [(f"blocks.{layer}.attn.hook_z", zero)]
    with torch.no_grad():
        logits = model.run_with_hooks(ids, return_type="logits", fwd_hooks=hooks)[0, :-1]
        return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:]))


def now() -> tuple[float, float]:
    """Read the clock on the wall, and that of the processors."""
    return time.perf_counter(), time.process_time()


def since(start: tuple[float, float], times: float = 1.0) -> tuple[float, float]:
    """Give the seconds of both since then, for so many times as much."""
    wall, used = now()
    return times * (wall - start[0]), times * (used - start[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--edit", default="zero_head()")
    parser.add_argument("--layers", type=int, nargs="+", help="run the single calls for the heads of these layers alone")
    parser.add_argument("--sample", type=int, nargs="+", help="sweep these layers alone: a rehearsal")
    args = parser.parse_args()
    from dataclasses import replace

    import torch

    from sinkscope.interventions import parse
    from sinkscope.interventions.places import Place, at
    from sinkscope.samples import samples

    model: Any = ss.load_model("smollm2-135m")
    whole = model.to_tokens(max(samples().values(), key=len))
    assert whole.shape[1] >= args.tokens, "the sample is too short"
    ids, edit = whole[:, : args.tokens], parse(args.edit)
    swept = edit if args.sample is None else replace(edit, layers=tuple(args.sample))
    heads = [(layer, head) for layer in args.sample or range(model.cfg.n_layers) for head in range(model.cfg.n_heads)]
    chosen = [place for place in heads if args.layers is None or place[0] in args.layers]
    seconds: dict[str, list[tuple[float, float]]] = {"sweep": [], "evaluate": [], "loop": []}
    gaps = {"evaluate": 0.0, "loop": 0.0}
    for _ in range(args.rounds):
        start = now()
        report = ss.sweep(model, [ids[0]], swept, placebo=False, score_from=1)
        seconds["sweep"].append(since(start))
        rows = report.summary().set_index(["layer", "head"])
        start = now()
        for layer, head in chosen:
            one = at(edit, Place(layer, head))
            found = ss.evaluate(model, [ids[0]], one).summary().iloc[1]
            off = max(abs(float(found[name]) - float(rows.loc[(layer, head), name])) for name in ("delta_loss", "kl", "loss"))
            gaps["evaluate"] = max(gaps["evaluate"], off)
        seconds["evaluate"].append(since(start, len(heads) / len(chosen)))
        start = now()
        for layer, head in chosen:
            off = abs(of_the_loop(model, ids, layer, head) - float(rows.loc[(layer, head), "loss"]))
            gaps["loop"] = max(gaps["loop"], off if "zero_head" in args.edit else 0.0)
        seconds["loop"].append(since(start, len(heads) / len(chosen)))
    threads, load = torch.get_num_threads(), os.getloadavg()[0]
    print(f"{len(heads)} heads, {args.tokens} tokens, {threads} threads; medians of {args.rounds}, load {load:.1f}")
    for clock, name in enumerate(("wall clock", "processors")):
        middle = {way: statistics.median(taken[clock] for taken in times) for way, times in seconds.items()}
        for way, took in middle.items():
            gap = f", differs by {gaps[way]:.1e}" if way in gaps else ""
            print(f"{name}: {way:10} {took:8.1f} s, {took / middle['sweep']:.2f} x the sweep{gap}")


if __name__ == "__main__":
    main()
