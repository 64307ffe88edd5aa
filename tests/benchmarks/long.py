"""Up to 131,072 tokens: does time per token stay, does memory? Each length in a process of its own, once.

A Llama of SmolLM2's shape with a longer context and random weights, one layer of its thirty, no logits. A streaming window
is a pass as `evaluate` makes it; first-token metrics are `measure`'s, by flash, and by hooks in chunks, whose rows are
formed: `long.py [--tokens N ...] [--picture docs/long.png]`.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import bench

LAYERS, CHUNK = 1, 128
WAYS = ("stream", "flash-mass", "mass-chunked")
#: Way -> label, colour.
LINES = {
    "stream": ("StreamingWindow(256, sinks=4)", "#1b7837"),
    "flash-mass": ("measure, flash, first-token metrics", "#2166ac"),
    "mass-chunked": (f"measure, hooks in chunks of {CHUNK}, first-token metrics", "#e6ab02"),
}


def model(tokens: int, threads: int) -> Any:
    """Make the model, as a bridge, which has hooks."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from sinkscope.models.wrap import bridge
    from sinkscope.testing import tiny_tokenizer

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        num_hidden_layers=LAYERS,
        vocab_size=1024,
        max_position_embeddings=max(tokens, 2048),
    )
    config.architectures = ["LlamaForCausalLM"]
    return bridge(LlamaForCausalLM(config).eval(), tiny_tokenizer(), "long")


def one(way: str, tokens: int, threads: int) -> tuple[float, float]:
    """Give seconds, and the peak resident size above the loaded model in MB; to be called in a process of its own."""
    import torch

    import sinkscope as ss

    made = model(tokens, threads)
    ids = torch.randint(0, 1024, (1, tokens), generator=torch.Generator().manual_seed(0))
    run: Callable[[], Any] = bench.make(way, made, ids)
    if way == "mass-chunked":
        run = partial(ss.measure, made, ids, bench.FIRST_TOKEN, engine="hooks", chunk=CHUNK)
    bench.make("flash", made, ids[:, :64])()
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    start = time.perf_counter()
    run()
    took = time.perf_counter() - start
    high = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
    return took, (high - before) / 1e6


def draw(found: dict[str, dict[int, tuple[float, float]]], picture: Path) -> None:
    """Draw both against length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    per_token, memory = figure.subplots(1, 2)
    for way in found:
        lengths, (label, colour) = sorted(found[way]), LINES[way]
        micro = [1e6 * found[way][n][0] / n / LAYERS for n in lengths]
        per_token.plot(lengths, micro, "-o", color=colour, markersize=3, label=label)
        memory.plot(lengths, [found[way][n][1] for n in lengths], "-o", color=colour, markersize=3)
    for ax, unit in ((per_token, "microseconds per token and layer"), (memory, "peak MB above the loaded model")):
        ax.set(xscale="log", yscale="log", xlabel="tokens", ylabel=unit)
        ticks = sorted({n for lengths in found.values() for n in lengths})
        ax.set_xticks(ticks, [f"{n:,}" for n in ticks])
        ax.minorticks_off()
        ax.yaxis.set_major_formatter("{x:g}")
        ax.grid(alpha=0.3)
    per_token.set_ylim(bottom=50)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(picture, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536, 131072])
    parser.add_argument("--threads", type=int, default=bench.THREADS)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one, args.tokens[0], args.threads)))
        return
    print(
        f"{LAYERS} layer, {args.threads} threads\n{'':24}{'tokens':>9}{'seconds':>9}{'us / token, layer':>19}{'peak MB':>9}"
    )
    found: dict[str, dict[int, tuple[float, float]]] = {}
    for way in args.ways:
        for n in args.tokens:
            command = [sys.executable, __file__, "--one", way, "--tokens", str(n), "--threads", str(args.threads)]
            told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            took, peak = json.loads(told.splitlines()[-1])
            found.setdefault(way, {})[n] = (took, peak)
            print(f"{way:24}{n:9,}{took:9.1f}{1e6 * took / n / LAYERS:19.1f}{peak:9.0f}", flush=True)
    if args.picture:
        draw(found, args.picture)


if __name__ == "__main__":
    main()
