"""Make docs/gallery.md and its pictures of what `sinkscope study all MODEL --out DIR` wrote: `python docs/gallery.py DIR`.

A study that is not in DIR keeps its section.
"""

import json
import re
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
NOTE = """# Gallery: every study on {model}

What {count} published experiments find on one small model, run by `sinkscope study all {model} --out studies`. Each has its
question, its verdict, its picture, and the command. How each is done: [method.md](method.md#studies). One model and one
text in pieces: the intervals (95%) say how much its parts differ, not how much texts or models do. At the end, other models:
[images and sound](#images-and-sound).
"""


def main(directory: str) -> None:
    """Write the page and copy the pictures."""
    from sinkscope.studies import STUDIES

    pictures = HERE / "images" / "gallery"
    pictures.mkdir(parents=True, exist_ok=True)
    seals = [Path(directory) / name / "study.json" for name in STUDIES]
    done = [json.loads(seal.read_text(encoding="utf-8")) for seal in seals if seal.is_file()]
    model, page = done[0]["about"]["model"], HERE / "gallery.md"
    before = re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:] if page.is_file() else []
    sections = {section.partition("\n")[0]: f"## {section.strip()}\n" for section in before}
    for study in done:
        name, picture = study["name"], study["pictures"][0]
        shutil.copy(Path(directory) / name / f"{picture}.png", pictures / f"{name}.png")
        said = f"## {name}\n\n{study['question']}\n\n**{study['verdict']}**\n\n"
        said += f"![{name}: {study['verdict']}](images/gallery/{name}.png)\n\n{study['said']}\n\n"
        sections[name] = said + f"`sinkscope study {name} {model} --out {name}`\n"
    known = [sections[name] for name in STUDIES if name in sections]
    others = [section for name, section in sections.items() if name not in STUDIES]  # docs/senses.py writes one
    page.write_text("\n".join([NOTE.format(model=model, count=len(known)), *known, *others]), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
