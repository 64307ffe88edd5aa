"""Every goal of speed in one run, by group, with its verdict: `make bench` (24 minutes on a quiet machine, 2 threads).

Goals are ratios: within a group the ways take turns, round after round, and medians are compared with the group's first way.
Each whole run adds a line to `history.jsonl` beside this file. `--smoke` runs everything once on short texts, to keep this
file alive (`make bench-smoke`, part of `make test`): it judges and writes nothing. `bench.py` has more ways, and memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent))
import bench
import vocabulary
import watched

#: Of all heads, one in so many is zeroed by a call of its own.
ONE_IN = 15
HISTORY = Path(__file__).with_name("history.jsonl")
Ways = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Group:
    """Ways of doing one thing; the first is what the others are compared with.

    Attributes:
        name: what is done.
        goals: by way, what its time may be over the first's; None where there is no goal.
        ways: makes the ways, each a function that is timed, or that gives the seconds by itself.
        rounds: how often at most, where one round takes minutes.
        seconds: by way, how long it may take, where that is the goal.
    """

    name: str
    goals: Mapping[str, float | None]
    ways: Callable[[], Ways]
    rounds: int = 5
    seconds: Mapping[str, float] = field(default_factory=dict)


def groups(smoke: bool) -> list[Group]:
    """List what is measured; short texts for a smoke test."""
    longest, long, middle, short = (640, 512, 256, 4) if smoke else (8192, 4096, 1024, 24)
    fused, hooked = {"sdpa": None, "flash-mass": 1.0, "flash-all": 1.45}, {"plain": None, "mass": 1.0, "measure": 1.05}
    edited: dict[str, float | None] = {"dense": None, "window": None, "stream": None}
    return [
        Group(f"flash, {long} tokens", fused, partial(engines, long, list(fused))),
        Group(f"flash, {longest} tokens", {"sdpa": None, "flash-all": 1.5}, partial(engines, longest, ["sdpa", "flash-all"])),
        Group(f"hooks in one shot, {middle} tokens", hooked, partial(engines, middle, list(hooked))),
        Group(f"edited passes, {middle} tokens", edited, partial(engines, middle, list(edited))),
        Group(f"{short} texts of 64 tokens", {"sdpa": None, "sink_rate": 1.04, "all": 1.12}, partial(texts, short)),
        Group("64 texts of 64 tokens", {"measure": None, "proof": 0.03}, partial(proof, 4 if smoke else 64)),
        Group("generation", {"unwatched": None, "watched": 1.1}, partial(generation, 8 if smoke else 256)),
        Group(
            "every head of every third layer zeroed",
            {"evaluate": None, "sweep": 0.5},
            partial(heads, *((32, [29]) if smoke else (256, list(range(1, 30, 3))))),
            rounds=3,
        ),
        Group("vocabulary of 262,144", {"unavoidable": None, "evaluate": 1.25}, partial(words, 64 if smoke else 512)),
        Group("loading SmolLM2", {"from GGUF": None, "again": None}, loading, seconds={"again": 3.0}),
    ]


def engines(tokens: int, ways: list[str]) -> Ways:
    """Ways of `bench.py`."""
    models, ids = bench.load(ways, tokens, bench.THREADS)
    return {way: bench.make(way, models[bench.WAYS[way][1]], ids) for way in ways}


def texts(many: int) -> Ways:
    """Measure many short texts, eight at a time."""
    import torch

    import sinkscope as ss

    models, _ = bench.load(["sdpa", "flash"], 64, bench.THREADS)
    ids = torch.randint(100, 49000, (many, 64), generator=torch.Generator().manual_seed(0))

    def body() -> None:
        with torch.no_grad():
            for start in range(0, many, 8):
                models["sdpa"].base_model(input_ids=ids[start : start + 8], use_cache=False)

    measure = partial(ss.measure, models["bridge"], ids)
    return {"sdpa": body, "sink_rate": partial(measure, ["sink_rate"]), "all": measure}


def proof(many: int) -> Ways:
    """What of a call the proof of the engine takes: both from the same calls."""
    import torch

    import sinkscope as ss
    from sinkscope.capture import proof as module

    models, _ = bench.load(["flash"], 64, bench.THREADS)
    ids = torch.randint(100, 49000, (many, 64), generator=torch.Generator().manual_seed(0))
    prove, spent = module._prove, [0.0]

    def timed(*given: Any) -> Any:
        start = time.perf_counter()
        try:
            return prove(*given)
        finally:
            spent[0] = time.perf_counter() - start

    def measure() -> None:
        with patch.object(module, "_prove", timed):
            ss.measure(models["bridge"], ids, ["sink_mass"])

    return {"measure": measure, "proof": lambda: spent[0]}


def generation(tokens: int) -> Ways:
    """Generate, watched and not."""
    models, ids = bench.load(["sdpa"], 64, bench.THREADS)
    work = partial(watched.generate, models["sdpa"], ids, tokens)
    timed = partial(watched.timed, work, models["sdpa"])
    return {"unwatched": lambda: timed(None)[0], "watched": lambda: timed(watched.FIRST_TOKEN)[0]}


def heads(tokens: int, layers: list[int]) -> Ways:
    """Zero every head of some layers: one sweep, and single calls for one head in thirty, counted for all."""
    import sinkscope as ss
    from sinkscope.interventions import ZeroHead
    from sinkscope.interventions.places import Place, at

    models, ids = bench.load(["flash"], tokens, bench.THREADS)
    model = models["bridge"]
    every = [(layer, head) for layer in layers for head in range(model.cfg.n_heads)]

    def single() -> float:
        start = time.perf_counter()
        for layer, head in every[::ONE_IN]:
            ss.evaluate(model, [ids[0]], at(ZeroHead(), Place(layer, head)))
        return (time.perf_counter() - start) * len(every) / len(every[::ONE_IN])

    return {"evaluate": single, "sweep": lambda: ss.sweep(model, [ids[0]], ZeroHead(layers=layers), placebo=False)}


def words(tokens: int) -> Ways:
    """Losses of five rows; bodies and one large product for each, in a process of their own."""
    args = argparse.Namespace(tokens=tokens)

    def unavoidable() -> float:
        least = vocabulary.in_a_process("unavoidable", args, 1)
        return float(least["bodies"][0][0] + least["products"][0][0])

    return {
        "unavoidable": unavoidable,
        "evaluate": lambda: float(vocabulary.in_a_process("evaluated", args, 1)["seconds"][0][0]),
    }


def loading() -> Ways:
    """Load in processes of their own: with nothing kept, and what an earlier one kept."""
    kept = tempfile.mkdtemp()

    def load(cache: str) -> float:
        code = "import time, transformer_lens, sinkscope as ss; t = time.perf_counter(); ss.load_model('smollm2-135m')"
        here = os.environ | {"SINKSCOPE_CACHE": cache}
        command = [sys.executable, "-c", f"{code}; print(time.perf_counter() - t)"]
        told = subprocess.run(command, capture_output=True, text=True, check=True, env=here).stdout
        return float(told.splitlines()[-1])

    load(kept)
    return {"from GGUF": partial(load, ""), "again": partial(load, kept)}


def medians(group: Group, rounds: int) -> dict[str, float]:
    """Give the median seconds of each way; they take turns."""
    ways = group.ways()
    seconds: dict[str, list[float]] = {name: [] for name in group.goals}
    for turn in range(rounds + (rounds > 1)):  # the first only warms up
        for name in group.goals:
            start = time.perf_counter()
            own = ways[name]()
            took = own if isinstance(own, float) else time.perf_counter() - start
            if turn or rounds == 1:
                seconds[name].append(took)
    return {name: statistics.median(times) for name, times in seconds.items()}


def commit() -> str:
    """Name the commit, where there is one."""
    told = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=HISTORY.parent)
    return told.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="once, short texts, no verdict")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help="groups whose name has this in it")
    args = parser.parse_args()
    rounds = 1 if args.smoke else args.rounds
    print(f"{platform.machine()}, {os.cpu_count()} cores, {bench.THREADS} threads; medians of {rounds}, taking turns")
    print(f"{'':40}{'seconds':>9}{'x first':>9}{'goal':>7}", flush=True)
    ratios: dict[str, float] = {}
    for group in groups(args.smoke):
        if args.only and args.only not in group.name:
            continue
        found = medians(group, min(rounds, group.rounds))
        print(f"{group.name} (load {os.getloadavg()[0]:.1f})")
        first = next(iter(found.values()))
        for name, goal in group.goals.items():
            ratio = found[name] / first
            ratios[f"{group.name}: {name}"] = round(ratio, 3)
            limit = group.seconds.get(name)
            told = f"{limit:g} s" if limit else f"{goal:g}" if goal else ""
            met = found[name] <= limit if limit else goal is not None and round(ratio, 2) <= goal
            verdict = "" if args.smoke or not told else "met" if met else "missed"
            print(f"  {name:38}{found[name]:9.2f}{ratio:9.2f}{told:>7} {verdict}", flush=True)
    if not (args.smoke or args.only):
        line: dict[str, Any] = {"commit": commit(), "date": time.strftime("%Y-%m-%d"), "cores": os.cpu_count()}
        line |= {"threads": bench.THREADS}
        line |= {"load": os.getloadavg()[0], "rounds": rounds, "ratios": ratios}
        with HISTORY.open("a") as file:
            print(json.dumps(line), file=file)


if __name__ == "__main__":
    main()
