"""Time, memory and exactness on one CUDA device: `tests/gpu/run.sh` calls it, `--cpu` rehearses it at toy sizes.

Random weights of Llama-3.2-1B's shape, the vocabulary cut to 1,024 words: no logits are computed but those of `evaluate`, and
embeddings cost nothing that is measured. Queries are drawn wide, so that attention is far from uniform. Ways take turns,
round after round; a way's time is wall-clock between two synchronisations. Memory is the allocator's peak above what was
allocated before the run: the models.

Lengths ascend, and a way is left out, and said to be, when its time at the length before says that it would not end in time.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import importlib.metadata
import io
import math
import platform
import pstats
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

import sinkscope as ss
from sinkscope.models import bridge
from sinkscope.testing import tiny_tokenizer
from tests.gpu.record import Record

FIRST_TOKEN = ["sink_mass", "sink_mass_excess", "last_row_share", "received", "sink_rate"]
ROUNDS, VOCAB = 5, 1024
#: What float32 may differ by from other float32, between kernels and devices.
EXACT = 1e-5
#: Seconds for the rounds of one way at one length, beyond which there are fewer; for one run, beyond which it comes last.
SECONDS, PATIENCE = 3.0, 3.0
LLAMA = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
TOY = dict(zip(LLAMA, (64, 128, 2, 4, 2, 16), strict=True))
LENGTHS, TOY_LENGTHS = (1024, 2048, 4096, 8192, 16_384, 32_768), (64, 128, 256)
WINDOW = 256


@dataclass(frozen=True)
class Way:
    """What is timed: a function of (plain model, bridge, ids); run at `lengths` alone, where these are given."""

    what: str
    run: Callable[[Any, Any, torch.Tensor], Any]
    longest: int = LENGTHS[-1]
    lengths: tuple[int, ...] | None = None


def body(attention: str, network: Any, _: Any, ids: torch.Tensor) -> Any:
    """Hugging Face's body, no logits: with `eager` all attentions, reduced as a script would."""
    network.set_attn_implementation(attention)
    try:
        with torch.no_grad():
            out = network.model(input_ids=ids, use_cache=False, output_attentions=attention == "eager")
            return [(p[..., 0].mean(-1), torch.special.entr(p).sum(-1).mean(-1), p.mean(2)) for p in out.attentions or ()]
    finally:
        network.set_attn_implementation("sdpa")


def repeated(_: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: None, scaling: float, **rest: Any) -> Any:
    """Attend by SDPA as Hugging Face does, but for its `enable_gqa`, which CUDA's kernel for float32 does not know."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def measured(metrics: list[str] | None, engine: str, chunk: int | None, network: Any, bridge: Any, ids: torch.Tensor) -> Any:
    """`ss.measure`: flash on Hugging Face's model as it is, hooks on a bridge."""
    return ss.measure(network if engine == "flash" else bridge, ids, metrics, engine=engine, chunk=chunk)


@ss.metric(needs="pattern")
def largest(block: ss.Block) -> torch.Tensor:
    """Mean of the largest weight in a row."""
    return block.pattern.amax(-1)


def formed(network: Any, _: Any, ids: torch.Tensor) -> Any:
    """Metrics of whole rows, and one for which these must be formed."""
    return ss.measure(network, ids, ["row_entropy", "received_profile", largest], engine="flash")


def evaluated(network: Any, _: Any, ids: torch.Tensor) -> Any:
    """The dense pass and two windows, losses and divergences included."""
    return ss.evaluate(network, ids, [ss.Window(WINDOW), ss.SinkWindow(WINDOW, sinks=4)])


def edited(network: Any, _: Any, ids: torch.Tensor) -> Any:
    """The body under an edit."""
    with torch.no_grad(), ss.SinkWindow(WINDOW, sinks=4).on(network):
        return network.model(input_ids=ids, use_cache=False)


WAYS = {
    "sdpa": Way("Hugging Face SDPA body, no statistics: the limit", partial(body, "sdpa")),
    "repeated": Way("the same with key heads repeated: what float32 needs for a fused kernel", partial(body, "repeated")),
    "mass": Way("`measure`, flash, first-token metrics", partial(measured, FIRST_TOKEN, "flash", None)),
    "all": Way("`measure`, flash, all metrics", partial(measured, None, "flash", None)),
    "formed": Way(
        "`measure`, flash, whole rows: entropy, profile, a metric of one's own that reads the pattern", formed, 16_384
    ),
    "edited": Way("the body under `SinkWindow(256, sinks=4).on(model)`", edited),
    "attentions": Way("Hugging Face `output_attentions=True`, then a reduction", partial(body, "eager")),
    "evaluate": Way("`evaluate`: none, `Window(256)`, `SinkWindow(256, sinks=4)`", evaluated, lengths=(4096, 16_384, 128)),
    "hooks-mass": Way(
        "`measure`, hooks in one shot, first-token metrics", partial(measured, FIRST_TOKEN, "hooks", None), 4096
    ),
    "hooks-all": Way("`measure`, hooks in one shot, all metrics", partial(measured, None, "hooks", None), 4096),
    "chunks-all": Way("`measure`, hooks in chunks of 512, all metrics", partial(measured, None, "hooks", 512), 4096),
}


@dataclass
class Bench:
    """One run: where it goes, on what, and until when."""

    record: Record
    device: torch.device
    shape: dict[str, int]
    deadline: float
    seconds: dict[tuple[str, str, int], float] = field(default_factory=dict)
    failed: bool = False

    def left(self) -> float:
        """Seconds that are left."""
        return self.deadline - time.time()

    def sync(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def once(self, run: Callable[[], Any]) -> tuple[float, float | None]:
        """Seconds and peak MB of one run."""
        gpu = self.device.type == "cuda"
        if self.failed:  # only now does nobody hold the error, and with it what it was made with
            self.failed = False
            self.free()
        self.sync()
        before = torch.cuda.memory_allocated() if gpu else 0
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        result = run()
        self.sync()
        seconds = time.perf_counter() - start
        del result
        return seconds, (torch.cuda.max_memory_allocated() - before) / 1e6 if gpu else None

    @contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """Go on after an error, which is written down."""
        try:
            yield
        except torch.OutOfMemoryError:
            self.failed = True
            self.record.found["skipped"].append(f"{what}: out of memory")
        except Exception as error:
            self.failed = True
            lines = traceback.format_exc().strip().splitlines()
            self.record.found["errors"].append(f"{what}: {type(error).__name__}: {error}"[:400])
            self.record.found.setdefault("tracebacks", []).append([what, *lines[-12:]])
        self.record.write()

    def free(self) -> None:
        """Give memory back, and write what is known."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.record.write()

    def network(self, dtype: torch.dtype) -> Any:
        """Random weights on the device, from a seed."""
        from transformers import LlamaConfig, LlamaForCausalLM

        spread = 0.9 * self.shape["hidden_size"] ** -0.5  # 0.02, as published
        config = LlamaConfig(
            vocab_size=VOCAB, max_position_embeddings=131_072, rope_theta=500_000.0, initializer_range=spread, **self.shape
        )
        config.architectures = ["LlamaForCausalLM"]
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with self.device:
                network = LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(before)
        with torch.no_grad():
            for layer in network.model.layers:
                layer.self_attn.q_proj.weight.mul_(4)
        return network.requires_grad_(False)

    def ids(self, tokens: int) -> torch.Tensor:
        """Random ids, on the device."""
        return torch.randint(3, VOCAB, (1, tokens), generator=torch.Generator().manual_seed(0)).to(self.device)


# --- times --------------------------------------------------------------------------------------------------------


def cell(bench: Bench, models: tuple[Any, Any], dtype: str, tokens: int, ways: list[str], patience: float) -> list[str]:
    """Some ways at one length and dtype: once each for what they take, then in turn. Gives those that would take too long."""
    ids, runs, late = bench.ids(tokens), {}, []
    for name in ways:
        before = [(n, s) for (w, d, n), s in bench.seconds.items() if (w, d) == (name, dtype)]
        n, takes = max(before, default=(tokens, 0.0))
        guess = takes * (tokens / n) ** 2
        if guess > min(patience, bench.left() / 2):
            late.append(name)
            continue
        bench.seconds[name, dtype, tokens] = math.inf  # where it fails, it is not tried on longer ones
        with bench.guarded(f"{name}, {dtype}, {tokens:,} tokens"):
            run = partial(WAYS[name].run, *models, ids)
            seconds, peak = bench.once(run)
            bench.seconds[name, dtype, tokens] = seconds
            slow = seconds > SECONDS  # then warming up is a small part of it, and the run counts
            runs[name] = run, {"way": name, "what": WAYS[name].what, "dtype": dtype, "tokens": tokens, "rounds": ROUNDS}
            runs[name][1].update({"seconds": [seconds] if slow else [], "peak_mb": peak})
    for _ in range(ROUNDS):
        for name, (run, row) in runs.items():
            spent = sum(row["seconds"])
            if spent and (spent + bench.seconds[name, dtype, tokens] > SECONDS or bench.left() < 20):
                continue
            with bench.guarded(f"{name}, {dtype}, {tokens:,} tokens, again"):
                seconds, peak = bench.once(run)
                row["seconds"].append(seconds)
                row["peak_mb"] = peak and max(peak, row["peak_mb"])
    bench.record.found["timings"] += [row for _, row in runs.values()]
    bench.free()
    return late


def times(bench: Bench, lengths: tuple[int, ...]) -> None:
    """Every length with both dtypes, the shortest first; what would take long comes last, while there is time."""
    models: dict[str, tuple[Any, Any]] = {}
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        with bench.guarded(f"building the models, {name}"):
            models[name] = bench.network(dtype), bridge(bench.network(dtype), tiny_tokenizer(), f"llama-1b-shape-{name}")
    late = []
    for tokens in lengths:
        ways = [name for name, way in WAYS.items() if tokens <= way.longest and tokens in (way.lengths or lengths)]
        for dtype, pair in models.items():
            late += [(tokens, dtype, name) for name in cell(bench, pair, dtype, tokens, ways, PATIENCE)]
    tokens = lengths[min(2, len(lengths) - 1)]
    for dtype, pair in models.items():
        with bench.guarded(f"profiles, {dtype}"):
            profile(bench, "mass", pair, dtype, lengths[0])
            profile(bench, "all", pair, dtype, tokens)
    for tokens, dtype, name in late:
        if cell(bench, models[dtype], dtype, tokens, [name], math.inf):
            failed = math.inf in (s for (w, d, _), s in bench.seconds.items() if (w, d) == (name, dtype))
            why = "it failed on fewer tokens" if failed else f"it would take too long: {bench.left():.0f} s were left"
            bench.record.found["skipped"].append(f"{name}, {dtype}, {tokens:,} tokens: {why}")
    bench.record.write()


def profile(bench: Bench, way: str, models: tuple[Any, Any], dtype: str, tokens: int) -> None:
    """Where the processor's time goes: the functions that take most of it themselves."""
    run = partial(WAYS[way].run, *models, bench.ids(tokens))
    run()
    profiler = cProfile.Profile()
    profiler.enable()
    run()
    bench.sync()
    profiler.disable()
    told = io.StringIO()
    pstats.Stats(profiler, stream=told).sort_stats("tottime").print_stats(25)
    lines = [line.rstrip() for line in told.getvalue().splitlines() if line.strip()]
    bench.record.found.setdefault("profiles", {})[f"{way}, {dtype}, {tokens} tokens"] = lines


# --- numbers ------------------------------------------------------------------------------------------------------

Statistics = dict[str, torch.Tensor]


def theirs(network: Any, ids: torch.Tensor) -> Statistics:
    """Per layer and head (the profile: per layer and key) from Hugging Face's `output_attentions`, reduced in float64."""
    network.set_attn_implementation("eager")
    found: dict[str, list[torch.Tensor]] = {"sink_mass": [], "last_row_share": [], "row_entropy": [], "received_profile": []}
    with torch.no_grad():
        for a in network.model(input_ids=ids, use_cache=False, output_attentions=True).attentions:
            p = a[0].double()
            found["sink_mass"].append(p[..., 0].mean(-1))
            found["last_row_share"].append(p[:, -1, 0])
            found["row_entropy"].append(torch.special.entr(p).sum(-1).mean(-1))
            found["received_profile"].append(p.sum(1).mean(0) / torch.arange(p.shape[-1], 0, -1, device=p.device))
    return {name: torch.stack(values).cpu() for name, values in found.items()}


def ours(model: Any, ids: torch.Tensor, engine: str = "flash") -> Statistics:
    """The same from `ss.measure`."""
    names = ["sink_mass", "last_row_share", "row_entropy", "received_profile"]
    frame = ss.measure(model, ids, names, engine=engine).frame
    frame = frame[frame["text"] == "text 0"]
    found = {}
    for name in names:
        rows = frame[frame["metric"] == name]
        shape = [rows[axis].nunique() for axis in ("layer", "key" if name == "received_profile" else "head")]
        found[name] = torch.tensor(rows["value"].to_numpy(float)).view(shape)
    return found


def compare(a: Statistics, b: Statistics) -> dict[str, float]:
    """Largest absolute differences: shares of attention, nats for entropies."""
    return {name: float((a[name] - b[name]).abs().max()) for name in a}


def numbers(bench: Bench, tokens: int) -> None:
    """Flash on the device against Hugging Face's attentions there, and against the CPU."""
    ids = bench.ids(tokens)
    network = bench.network(torch.float32)
    found = bench.record.found["numbers"]
    kept: dict[str, Statistics] = {}

    def note(name: str, what: str, make: Callable[[], Statistics], against: str = "", limit: float = math.inf) -> None:
        with bench.guarded(what):
            kept[name] = make()
            if against in kept:
                found[what] = compare(kept[name], kept[against])
                if not max(found[what].values()) <= limit:
                    bench.record.found["errors"].append(f"{what}: {max(found[what].values()):.1e}, more than {limit}")

    note("truth", "output_attentions, float32", lambda: theirs(network, ids))
    note("flash", "flash, float32, against output_attentions there", lambda: ours(network, ids), "truth", EXACT)
    note("hooks", "hooks, float32, against output_attentions there", lambda: _hooks(bench, ids), "truth", EXACT)
    if bench.left() > 60:
        cpu = bench.network(torch.float32).cpu()
        cpu.load_state_dict(network.state_dict())
        note("cpu", "flash on the CPU, float32, against flash on the device", lambda: ours(cpu, ids.cpu()), "flash", EXACT)
        del cpu
    torch.set_float32_matmul_precision("high")
    note("tf32", "flash, float32 with products in TF32, against float32", lambda: ours(network, ids), "truth")
    note("eager tf32", "output_attentions, TF32, against float32", lambda: theirs(network, ids), "truth")
    torch.set_float32_matmul_precision("highest")
    half = bench.network(torch.bfloat16)
    with torch.no_grad():
        network.load_state_dict(half.state_dict())
    note("truth", "output_attentions, float32, weights of bfloat16", lambda: theirs(network, ids))
    note("flash half", "flash, bfloat16, against float32 with the same weights", lambda: ours(half, ids), "truth")
    note("eager half", "output_attentions, bfloat16, against the same", lambda: theirs(half, ids), "truth")


def _hooks(bench: Bench, ids: torch.Tensor) -> Statistics:
    return ours(bridge(bench.network(torch.float32), tiny_tokenizer(), "llama-1b-shape"), ids, "hooks")


def about(device: torch.device) -> dict[str, Any]:
    """Device and versions."""
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    names = ("torch", "transformers", "transformer-lens", "sinkscope", "numpy")
    return {
        "device": f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" if gpu else "a CPU: a rehearsal at toy sizes",
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
        "cuda": torch.version.cuda or "none",
        "float32 products": torch.get_float32_matmul_precision(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="where gpu.json and gpu.md go")
    parser.add_argument("--until", type=float, help="seconds since 1970 at which to be done; default: in 5 minutes")
    parser.add_argument("--cpu", action="store_true", help="rehearse at toy sizes")
    args = parser.parse_args()
    device = torch.device("cpu" if args.cpu else "cuda:0")
    record = Record(args.folder)
    record.found["about"] |= about(device) | {"shape": str(TOY if args.cpu else LLAMA), "rounds": ROUNDS}
    record.write()
    AttentionInterface.register("repeated", repeated)
    bench = Bench(record, device, TOY if args.cpu else LLAMA, args.until or time.time() + 300)
    lengths = TOY_LENGTHS if args.cpu else LENGTHS
    numbers(bench, lengths[0])
    times(bench, lengths)
    record.found["about"]["seconds left"] = round(bench.left())
    record.write()


if __name__ == "__main__":
    main()
