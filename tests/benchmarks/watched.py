"""What `ss.watch` costs: `python tests/benchmarks/watched.py` (SmolLM2-135M, float32, 2 threads, Hugging Face with SDPA).

Generation of 256 tokens after a prompt of 64, greedy, and training steps on one text of 256 tokens; unwatched, watched with
first-token metrics, and with whole rows. The ways take turns, round after round; medians are reported, wall-clock and
processor time, with the ratio to the unwatched way. The limit is 1.1 for generation with first-token metrics.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

FIRST_TOKEN, WHOLE = ["sink_mass", "sink_rate"], ["sink_mass", "sink_rate", "row_entropy"]
WAYS = {"unwatched": None, "watched, first-token metrics": FIRST_TOKEN, "watched, whole rows": WHOLE}


def generate(model: Any, ids: Any, tokens: int) -> None:
    """Generate greedily; nothing ends it early."""
    model.generate(ids[:, :64], max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)


def train(model: Any, ids: Any, tokens: int) -> None:
    """Take the gradients of one step."""
    model.zero_grad()
    model(ids[:, :tokens], labels=ids[:, :tokens]).loss.backward()


def timed(work: Callable[[], None], model: Any, metrics: list[str] | None) -> tuple[float, float]:
    """Give wall-clock and processor seconds, what was seen included."""
    import sinkscope as ss

    start, used = time.perf_counter(), time.process_time()
    if metrics is None:
        work()
    else:
        with ss.watch(model, metrics) as seen:
            work()
        seen.report()
    return time.perf_counter() - start, time.process_time() - used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    import torch

    from sinkscope.models.load import _load_hugging_face, located

    torch.set_num_threads(args.threads)
    model = _load_hugging_face(located("smollm2-135m"), torch.float32, {})[0]
    model.set_attn_implementation("sdpa")
    ids = torch.randint(100, 49000, (1, args.tokens), generator=torch.Generator().manual_seed(0))
    for name, step in (("generation", generate), ("training step", train)):
        step(model, ids, 8)
        seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
        for _ in range(args.rounds):
            for way, metrics in WAYS.items():
                seconds[way].append(timed(partial(step, model, ids, args.tokens), model, metrics))
        load = os.getloadavg()[0]
        print(f"\n{name} of {args.tokens} tokens, {args.threads} threads, medians of {args.rounds}; load {load:.1f}")
        print(f"{'':32}{'seconds':>9}{'x first':>9}{'min-max':>16}{'cpu s':>9}{'x first':>9}")
        wall, cpu = ({way: statistics.median(t[i] for t in times) for way, times in seconds.items()} for i in (0, 1))
        for way, times in seconds.items():
            spread = f"{min(times)[0]:.2f}-{max(times)[0]:.2f}"
            first = wall["unwatched"], cpu["unwatched"]
            print(f"{way:32}{wall[way]:9.2f}{wall[way] / first[0]:9.2f}{spread:>16}{cpu[way]:9.2f}{cpu[way] / first[1]:9.2f}")


if __name__ == "__main__":
    main()
