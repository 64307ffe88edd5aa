"""Draw time and peak memory against length from what `bench.py --json FILE` wrote: `plot.py FILE PICTURE`."""

import json
import statistics
import sys
from pathlib import Path

from matplotlib.figure import Figure

#: Way -> label, colour, line style.
LINES = {
    "attentions": ("Hugging Face eager, output_attentions=True", "#b2182b", "-"),
    "measure": ("measure, hooks in one shot, all metrics", "#ef8a62", "-"),
    "measure-chunked": ("measure, hooks in chunks, all metrics", "#e6ab02", "-"),
    "flash-all": ("measure, flash, all metrics", "#67a9cf", "-"),
    "flash-mass": ("measure, flash, first-token metrics", "#2166ac", "-"),
    "window": ("edited pass, window of 256 keys", "#7570b3", ":"),
    "stream": ("edited pass, streaming window of 256 keys", "#1b7837", ":"),
    "sdpa": ("Hugging Face SDPA, no statistics: the limit", "#555555", "--"),
}


def main(file: str, picture: str) -> None:
    rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    time, memory = figure.subplots(1, 2)
    for way, (label, colour, style) in LINES.items():
        here = {r["tokens"]: r for r in rows if r["way"] == way and r["seconds"]}
        tokens = sorted(here)
        seconds = [statistics.median(wall for wall, _ in here[t]["seconds"]) for t in tokens]
        time.plot(tokens, seconds, style, color=colour, marker="o", markersize=3, label=label)
        memory.plot(tokens, [here[t]["peak_mb"] for t in tokens], style, color=colour, marker="o", markersize=3)
    for ax, unit in ((time, "seconds"), (memory, "peak MB above the loaded model")):
        ax.set(xscale="log", yscale="log", xlabel="tokens", ylabel=unit)
        ticks = sorted({r["tokens"] for r in rows})
        ax.set_xticks(ticks, [f"{t:,}" for t in ticks])
        low, high = ax.get_ylim()
        round_numbers = [n * 10**e for e in range(-1, 5) for n in (1, 2, 5)]
        ax.set_yticks([y for y in round_numbers if low <= y <= high], [f"{y:g}" for y in round_numbers if low <= y <= high])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(picture, dpi=150)


if __name__ == "__main__":
    main(*sys.argv[1:])
