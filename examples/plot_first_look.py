"""
A first look at a model's sinks
===============================

How much attention does the first token get, where in the model, and how much would chance give it?
"""

# %%
# Load a small real model and a few texts. Any TransformerLens model of your own will do as well.
import matplotlib.pyplot as plt

import sinkscope as ss
from sinkscope.samples import samples

model = ss.load_model("smollm2-135m")
texts = {label: text for label, text in samples().items() if len(text) < 1_000}

# %%
# One call measures everything that attention alone can tell. Every number comes with its null: the same statistic on
# attention that is uniform over the keys a query can see.
report = ss.measure(model, texts)
print(report)
print(report.about["bos"])
print(report.intervals().set_index("metric").loc[["sink_mass", "sink_rate@0.3", "last_row_share"]])

# %%
# The first token gets far more than its share, but not everywhere: the first layers do not see a sink at all.
fig, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
report.heatmap("sink_mass", ax=left)
report.progression("sink_mass", ax=right)

# %%
# Which heads are the strongest sinks, and which positions act as sinks besides the first?
print(report.top("sink_mass", 5)[["layer", "head", "value", "null"]])
print(report.sink_positions())

# %%
# Averages hide the shape: attention over positions, with position 0 marked.
report.positions()
plt.show()
