"""Losses on a large vocabulary: `evaluate` of five rows beside what it can't avoid, on random weights; times and peak memory.

What it can't avoid: the bodies of its five passes, and for each row one product of all scored states with the unembedding,
at the speed of one large product. `--old DIR` has another checkout do the same, for its time and its losses.

    python tests/benchmarks/vocabulary.py [--tokens 2048] [--rounds 3] [--old DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

VOCABULARY, WIDTH, LAYERS, HEADS, KEY_HEADS, MLP = 262_144, 640, 18, 10, 2, 2048
EDITS = ["window(size=256)", "sink_window(size=256, sinks=1)", "sink_window(size=256, sinks=4)", "mask_keys(keys=[0])"]
#: Rows of the one large product: its result takes half a gigabyte.
ROWS = 512


def model() -> Any:
    """Build it: random weights, the output layer tied to the embedding, as Gemma's is."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    sizes |= {"num_key_value_heads": KEY_HEADS, "intermediate_size": MLP, "vocab_size": VOCABULARY}
    config = LlamaConfig(**sizes, max_position_embeddings=8192, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)
    return LlamaForCausalLM(config).eval()


def text(tokens: int) -> Any:
    """Draw token ids."""
    import torch

    return torch.randint(3, VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(1))


def timed(do: Callable[[], Any]) -> tuple[Any, list[float]]:
    """Give what something gives, and the wall-clock and the processor seconds that it takes."""
    start, used = time.perf_counter(), time.process_time()
    found = do()
    return found, [time.perf_counter() - start, time.process_time() - used]


def evaluated(tokens: int, rounds: int) -> dict[str, Any]:
    """Run `evaluate`; to be called in a process of its own. Gives seconds, the peak above the loaded model, and losses."""
    import sinkscope as ss

    made, ids, seconds = model(), text(tokens), []
    ss.evaluate(made, [ids[:32]], EDITS[-1])
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    for _ in range(rounds):
        report, took = timed(lambda: ss.evaluate(made, [ids], EDITS))
        seconds.append(took)
    high = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
    rows = report.summary()
    numbers = {name: rows[name].tolist() for name in ("loss", "delta_loss", "kl", "top1_agreement")}
    return {"seconds": seconds, "peak_mb": (high - before) / 1e6, "numbers": numbers}


def unavoidable(tokens: int, rounds: int) -> dict[str, Any]:
    """Time the bodies of the five passes, and the large product for as many states as are scored."""
    import torch

    from sinkscope.capture.plans import plan
    from sinkscope.capture.routes import routes
    from sinkscope.interventions import parse
    from sinkscope.models import adapt
    from sinkscope.tokens import TextTokens, Tokens

    made, ids = model(), text(tokens)
    adapter, edits = adapt(made), [(name, parse(name)) for name in EDITS]
    whole = Tokens((TextTokens("text", ids, ("",) * tokens),), "")
    ways = routes(adapter, edits, tokens, "none")
    (batch,) = whole.batches(1)
    passes = [route for route in (ways.clean, *ways.edited) if route is not None]
    bodies, products = [], []
    with plan(adapter, whole, [edit for _, edit in edits]) as capture:
        for _ in range(rounds):
            found, took = timed(lambda: [list(capture.pieces(batch, route, lambda: None)) for route in passes])
            bodies.append(took)
    states, weights = found[0][0][:ROWS], adapter.head.weight.detach()
    out = torch.empty(len(states), VOCABULARY)
    with torch.no_grad():
        torch.matmul(states, weights.T, out=out)
        for _ in range(max(3, rounds)):
            _, took = timed(lambda: torch.matmul(states, weights.T, out=out))
            products.append([seconds * len(passes) * (tokens - 1) / len(states) for seconds in took])
    return {"bodies": bodies, "products": products}


def in_a_process(what: str, args: argparse.Namespace, rounds: int, path: Path | None = None) -> dict[str, Any]:
    """Do it in a process of its own, which imports the checkout in `path`."""
    command = [sys.executable, __file__, "--tokens", str(args.tokens), "--rounds", str(rounds), "--what", what]
    here = os.environ | {"PYTHONPATH": str(path or Path(__file__).parents[2])}
    told = subprocess.run(command, capture_output=True, text=True, check=True, env=here).stdout
    found: dict[str, Any] = json.loads(told.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--old", type=Path, help="another checkout, which does the same once")
    parser.add_argument("--what", choices=["evaluated", "unavoidable"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.what:
        print(json.dumps({"evaluated": evaluated, "unavoidable": unavoidable}[args.what](args.tokens, args.rounds)))
        return
    turns = [{what: in_a_process(what, args, 1) for what in ("evaluated", "unavoidable")} for _ in range(args.rounds)]
    ours = [turn["evaluated"] for turn in turns]
    load = os.getloadavg()[0]
    print(
        f"{args.tokens} tokens, {VOCABULARY:,} of vocabulary, five rows; medians of {args.rounds}, in turn, load {load:.1f}"
    )
    for way, clock in enumerate(("wall clock", "processors")):
        took = [one["seconds"][0][way] for one in ours]
        bodies, products = (
            [statistics.median(times[way] for times in turn["unavoidable"][part]) for turn in turns]
            for part in ("bodies", "products")
        )
        ratios = sorted(all_of / (body + product) for all_of, body, product in zip(took, bodies, products, strict=True))
        medians = ", ".join(f"{statistics.median(some):.1f}" for some in (took, bodies, products))
        range_of = f"{ratios[0]:.2f}-{ratios[-1]:.2f}"
        print(
            f"{clock}, evaluate, bodies, products: {medians} s: {statistics.median(ratios):.2f} times their sum ({range_of})"
        )
    print(f"peak {max(one['peak_mb'] for one in ours):.0f} MB above the model")
    if args.old:
        old = in_a_process("evaluated", args, 1, args.old)
        gap = max(
            abs(a - b)
            for name in ours[0]["numbers"]
            for a, b in zip(ours[0]["numbers"][name], old["numbers"][name], strict=True)
        )
        wall, used = old["seconds"][0]
        print(f"before: {wall:.1f} s, of processors {used:.1f}; peak {old['peak_mb']:.0f} MB; numbers differ by {gap:.1e}")


if __name__ == "__main__":
    main()
