"""Time and peak memory of measuring, against what it replaces: `make bench` (SmolLM2-135M, float32, 2 threads).

Every figure comes from one run: the ways take turns, round after round, and medians are reported. Memory is the peak
resident size above the loaded model, each way in a process of its own. The full table takes about half an hour.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

THREADS = 2
WAYS = {
    "plain": "bridge forward, logits included, no statistics",
    "mass": "measure one-shot, first-token metrics",
    "measure": "measure one-shot, all metrics",
    "mass-chunked": "measure chunked, first-token metrics",
    "measure-chunked": "measure chunked, all metrics",
    "cache": "run_with_cache on all patterns, then the same reduction",
    "attentions": "Hugging Face output_attentions=True, then the same reduction",
}
FIRST_TOKEN = ["sink_mass", "sink_mass_excess", "last_row_share", "received", "sink_rate"]
#: These keep every layer's pattern: 30 x 9 x T x T x 4 bytes, 18 GB at 4,096 tokens.
KEEPS_PATTERNS = {"cache", "attentions"}


def reduce_patterns(patterns: list[Any]) -> list[Any]:
    """What the script of old did with the tensors that it kept: mass, entropy and position profile."""
    import torch

    return [(p[..., 0].mean(-1), torch.special.entr(p).sum(-1).mean(-1), p.mean(2)) for p in patterns]


def make(way: str, model: Any, hugging_face: Any, ids: Any) -> Callable[[], Any]:
    """Give the function that is timed."""
    import torch

    import sinkscope as ss

    def plain() -> Any:
        with torch.no_grad():
            return model(ids)

    def cache() -> Any:
        with torch.no_grad():
            _, kept = model.run_with_cache(ids, names_filter=lambda name: name.endswith("hook_pattern"))
            return reduce_patterns(list(kept.values()))

    def attentions() -> Any:
        with torch.no_grad():
            return reduce_patterns(list(hugging_face(ids, output_attentions=True, use_cache=False).attentions))

    def measured(metrics: list[str] | None, chunk: int | None) -> Callable[[], Any]:
        return lambda: ss.measure(model, ids, metrics, chunk=chunk)

    return {
        "plain": plain,
        "mass": measured(FIRST_TOKEN, None),
        "measure": measured(None, None),
        "mass-chunked": measured(FIRST_TOKEN, 128),
        "measure-chunked": measured(None, 128),
        "cache": cache,
        "attentions": attentions,
    }[way]


def load(ways: list[str], tokens: int) -> tuple[Any, Any, Any]:
    import torch

    import sinkscope as ss
    from sinkscope.models.load import _load_hugging_face, _locate

    torch.set_num_threads(THREADS)
    model = ss.load_model("smollm2-135m")
    hugging_face = _load_hugging_face(_locate("smollm2-135m"), torch.float32)[0] if "attentions" in ways else None
    ids = torch.randint(100, 49000, (1, tokens), generator=torch.Generator().manual_seed(0))
    return model, hugging_face, ids


def time_all(ways: list[str], tokens: int, rounds: int) -> dict[str, list[float]]:
    """Time the ways in turn, after one warm-up round on a short input."""
    model, hugging_face, ids = load(ways, tokens)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for way in ways:
        make(way, model, hugging_face, ids[:, :64])()
    for _ in range(rounds):
        for way in ways:
            run = make(way, model, hugging_face, ids)
            start = time.perf_counter()
            run()
            seconds[way].append(time.perf_counter() - start)
    return seconds


def peak(way: str, tokens: int) -> float:
    """Peak resident size above the loaded model, in MB; to be called in a process of its own."""
    model, hugging_face, ids = load([way], tokens)
    run = make(way, model, hugging_face, ids)
    make(way, model, hugging_face, ids[:, :64])()
    statm = Path("/proc/self/statm")
    before = int(statm.read_text().split()[1]) * resource.getpagesize()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    run()
    status = Path("/proc/self/status").read_text()
    high = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    return (high - before) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print(json.dumps(peak(args.peak, args.tokens[0])))
        return
    for tokens in args.tokens:
        ways = [way for way in args.ways if way not in KEEPS_PATTERNS or tokens <= 2048]
        seconds = time_all(ways, tokens, args.rounds)
        print(f"\n{tokens} tokens, {THREADS} threads, medians of {args.rounds}, alternating", flush=True)
        print(f"{'':62}{'seconds':>9}{'x plain':>9}{'min-max':>16}{'peak MB':>9}")
        plain = statistics.median(seconds["plain"]) if "plain" in seconds else float("nan")
        for way in ways:
            command = [sys.executable, __file__, "--tokens", str(tokens), "--peak", way]
            memory = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
            times = seconds[way]
            middle = statistics.median(times)
            spread = f"{min(times):.2f}-{max(times):.2f}"
            print(f"{WAYS[way]:62}{middle:9.2f}{middle / plain:9.2f}{spread:>16}{memory:9.0f}", flush=True)
        for way in set(args.ways) - set(ways):
            print(f"{WAYS[way]:62} not run: it would keep {30 * 9 * tokens**2 * 4 / 1e9:.0f} GB of patterns")


if __name__ == "__main__":
    main()
