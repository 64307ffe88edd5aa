"""Time and peak memory of measuring, against what it replaces: `make bench` (SmolLM2-135M, float32, 2 threads).

Every figure comes from one run: the ways take turns, round after round, and medians are reported. Memory is the peak
resident size above the loaded model, each way in a process of its own, and beside it the peak of live tensors, counted by
torch's profiler in another run there: what the C library keeps for later is in the first alone.

The limit is Hugging Face's own body with SDPA and no statistics at all. Beside wall-clock time stands the processor time
of the run, whose ratios are steadier on a machine that is not idle; the load is printed with the table.
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
from functools import cache
from pathlib import Path
from typing import Any

THREADS = 2
#: What is run, and which model it takes.
WAYS = {
    "sdpa": ("Hugging Face SDPA body, no statistics: the limit", "sdpa"),
    "flash": ("flash, body alone, no metric", "bridge"),
    "flash-mass": ("measure flash, first-token metrics", "bridge"),
    "flash-all": ("measure flash, all metrics", "bridge"),
    "plain": ("bridge forward, logits included, no statistics", "bridge"),
    "mass": ("measure hooks one-shot, first-token metrics", "bridge"),
    "measure": ("measure hooks one-shot, all metrics", "bridge"),
    "mass-chunked": ("measure hooks chunked, first-token metrics", "bridge"),
    "measure-chunked": ("measure hooks chunked, all metrics", "bridge"),
    "dense": ("edited pass, no edit: what interventions are compared with", "bridge"),
    "window": ("edited pass, window of 256 keys", "bridge"),
    "stream": ("edited pass, 4 sinks and 252 recent keys, cache positions", "bridge"),
    "table": ("evaluate: none, window, 1 sink, 4 sinks, cache positions", "bridge"),
    "loop": ("token by token with an evicting cache, one such row", "eager"),
    "cache": ("run_with_cache on all patterns, then the same reduction", "bridge"),
    "attentions": ("Hugging Face output_attentions=True, then the same reduction", "eager"),
}
FIRST_TOKEN = ["sink_mass", "sink_mass_excess", "last_row_share", "received", "sink_rate"]
#: These keep every layer's pattern: 30 x 9 x T x T x 4 bytes, 18 GB at 4,096 tokens.
KEEPS_PATTERNS = {"cache", "attentions"}
#: The longest input that is run, where it is not any: `KEEPS_PATTERNS` need 30 x 9 x T x T x 4 bytes and more.
LONGEST = {"cache": 2048, "attentions": 2048, "loop": 1024}
WINDOW = 256


def reduce_patterns(patterns: list[Any]) -> list[Any]:
    """What the script of old did with the tensors that it kept: mass, entropy and position profile."""
    import torch

    return [(p[..., 0].mean(-1), torch.special.entr(p).sum(-1).mean(-1), p.mean(2)) for p in patterns]


def make(way: str, model: Any, ids: Any) -> Callable[[], Any]:
    """Give the function that is timed."""
    import torch

    import sinkscope as ss
    from sinkscope.capture.flash import flash as engine
    from sinkscope.models import adapt

    def sdpa() -> Any:
        with torch.no_grad():
            return model.base_model(input_ids=ids, use_cache=False)

    def flash() -> Any:
        with engine(adapt(model), frozenset({frozenset({"mass"})}), "bench") as capture:
            return capture.run(next(ss.tokenize(None, ids).batches(1)), lambda block, group: None, lambda: None)

    def plain() -> Any:
        with torch.no_grad():
            return model(ids)

    def cache() -> Any:
        with torch.no_grad():
            _, kept = model.run_with_cache(ids, names_filter=lambda name: name.endswith("hook_pattern"))
            return reduce_patterns(list(kept.values()))

    def attentions() -> Any:
        with torch.no_grad():
            return reduce_patterns(list(model(ids, output_attentions=True, use_cache=False).attentions))

    def edited(edit: Any) -> Callable[[], Any]:
        from sinkscope.capture.plans import plan
        from sinkscope.capture.routes import Route, way

        tokens = ss.tokenize(None, ids)

        def run() -> Any:
            route = Route("", edit, way(adapt(model), edit, ids.shape[1]))
            with plan(adapt(model), tokens, [edit]) as capture:
                return [len(piece) for piece in capture.pieces(next(tokens.batches(1)), route, lambda: None)]

        return run

    window, stream = ss.Window(WINDOW), ss.interventions.StreamingWindow(WINDOW, sinks=4)
    rows = [window, ss.SinkWindow(WINDOW, sinks=1), ss.SinkWindow(WINDOW, sinks=4), stream]

    def loop() -> Any:
        sys.path.insert(0, str(Path(__file__).parents[2]))
        from tests.oracles import evicting_loop

        return evicting_loop(model, ids[0], WINDOW, 4, cache_positions=True)

    def measured(metrics: list[str] | None, engine: str, chunk: int | None = None) -> Callable[[], Any]:
        return lambda: ss.measure(model, ids, metrics, engine=engine, chunk=chunk)

    return {
        "sdpa": sdpa,
        "flash": flash,
        "flash-mass": measured(FIRST_TOKEN, "flash"),
        "flash-all": measured(None, "flash"),
        "plain": plain,
        "mass": measured(FIRST_TOKEN, "hooks"),
        "measure": measured(None, "hooks"),
        "mass-chunked": measured(FIRST_TOKEN, "hooks", 128),
        "measure-chunked": measured(None, "hooks", 128),
        "dense": edited(ss.interventions.Intervention()),
        "window": edited(window),
        "stream": edited(stream),
        "table": lambda: ss.evaluate(model, ids, rows),
        "loop": loop,
        "cache": cache,
        "attentions": attentions,
    }[way]


def load(ways: list[str], tokens: int, threads: int) -> tuple[dict[str, Any], Any]:
    """Load the models that some ways take, and the ids."""
    import torch

    torch.set_num_threads(threads)
    models = {kind: model_of(kind) for kind in {WAYS[way][1] for way in ways}}
    return models, torch.randint(100, 49000, (1, tokens), generator=torch.Generator().manual_seed(0))


@cache
def model_of(kind: str) -> Any:
    """Load SmolLM2 once, as a bridge or with a kind of attention."""
    import torch

    import sinkscope as ss
    from sinkscope.models.load import _load_converted, located

    if kind == "bridge":
        return ss.load_model("smollm2-135m")
    model = _load_converted(located("smollm2-135m"), torch.float32, {})[0]
    model.set_attn_implementation(kind)
    return model


def time_all(ways: list[str], tokens: int, rounds: int, threads: int) -> dict[str, list[tuple[float, float]]]:
    """Time the ways in turn, after one warm-up round on a short input: wall-clock and processor seconds."""
    models, ids = load(ways, tokens, threads)
    seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for way in ways:
        make(way, models[WAYS[way][1]], ids[:, :64])()
    for _ in range(rounds):
        for way in ways:
            run = make(way, models[WAYS[way][1]], ids)
            start, used = time.perf_counter(), time.process_time()
            run()
            seconds[way].append((time.perf_counter() - start, time.process_time() - used))
    return seconds


def peak(way: str, tokens: int, threads: int) -> tuple[float, float]:
    """Peak resident size above the loaded model, and peak of live tensors, in MB; to be called in a process of its own."""
    models, ids = load([way], tokens, threads)
    (model,) = models.values()
    run = make(way, model, ids)
    make(way, model, ids[:, :64])()
    statm = Path("/proc/self/statm")
    before = int(statm.read_text().split()[1]) * resource.getpagesize()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    run()
    status = Path("/proc/self/status").read_text()
    high = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    return (high - before) / 1e6, live(make(way, model, ids))


def live(run: Callable[[], Any]) -> float:
    """Count the bytes of tensors alive at once that a run has made, in MB."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    alive = most = 0
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        alive += size
        most = max(most, alive)
    return most / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--rounds", type=int, default=5, help="0: memory alone")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--longest", type=int, help="run what keeps patterns up to this length as well, memory permitting")
    parser.add_argument("--json", type=Path, help="append every figure to this file, one line each")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print(json.dumps(peak(args.peak, args.tokens[0], args.threads)))
        return
    for tokens in args.tokens:
        ways = [way for way in args.ways if tokens <= (args.longest or LONGEST.get(way, tokens))]
        seconds = time_all(ways, tokens, args.rounds, args.threads) if args.rounds else {}
        load_before = os.getloadavg()[0]
        print(f"\n{tokens} tokens, {args.threads} threads, medians of {args.rounds}, alternating; load {load_before:.1f}")
        print(
            f"{'':62}{'seconds':>9}{'x first':>9}{'min-max':>16}{'cpu s':>9}{'x first':>9}{'peak MB':>9}{'live MB':>9}",
            flush=True,
        )
        wall, cpu = ({way: statistics.median(t[i] for t in times) for way, times in seconds.items()} for i in (0, 1))
        for way in ways:
            command = [sys.executable, __file__, "--tokens", str(tokens), "--threads", str(args.threads), "--peak", way]
            told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            memory, counted = json.loads(told.splitlines()[-1])
            line = f"{WAYS[way][0]:62}"
            if args.rounds:
                spread = f"{min(seconds[way])[0]:.2f}-{max(seconds[way])[0]:.2f}"
                line += f"{wall[way]:9.2f}{wall[way] / wall[ways[0]]:9.2f}{spread:>16}"
                line += f"{cpu[way]:9.2f}{cpu[way] / cpu[ways[0]]:9.2f}"
            else:
                line += " " * 52
            print(f"{line}{memory:9.0f}{counted:9.0f}", flush=True)
            if args.json:
                row = {"way": way, "tokens": tokens, "seconds": seconds.get(way), "peak_mb": memory, "live_mb": counted}
                row |= {"threads": args.threads}
                with args.json.open("a") as file:
                    print(json.dumps(row), file=file)
        for way in args.ways:
            if way not in ways:
                why = (
                    f"it would keep {30 * 9 * tokens**2 * 4 / 1e9:.0f} GB of patterns"
                    if way in KEEPS_PATTERNS
                    else "too slow"
                )
                print(f"{WAYS[way][0]:62} not run: {why}")


if __name__ == "__main__":
    main()
