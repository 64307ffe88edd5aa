"""
Which heads need their sink?
============================

Many heads send most of their attention to the first token. Do they need it there? Take it away from one head at a time, all
others as they were, and see what the loss says. The map of that cost is not the map of the sink.
"""

# %%
# `ScaleAttention(0, 0)` gives the first token no weight, and the other keys of the row share what it got. A sweep makes the
# edit at every head in turn, and at each the edit's placebo: the same on an early token that is no sink. The clean run, and
# the layers before the edited one, are computed once. (Three layers here, on short texts, which takes seconds: leave
# `layers=` out for all of them.)
import matplotlib.pyplot as plt

import sinkscope as ss
from sinkscope.interventions import ScaleAttention
from sinkscope.samples import samples

model = ss.load_model("smollm2-135m")
texts = dict(list(samples().items())[1:4])
layers = range(4, model.cfg.n_layers, 10)

cost = ss.sweep(model, texts, ScaleAttention(0, 0, layers=layers), over="heads", max_tokens=40)
print(cost.top(5)[["layer", "head", "delta_loss", "low", "high", "placebo_delta_loss"]].to_string(index=False))

# %%
# Beside it the sink itself, measured on the same tokens.
sink = ss.measure(model, texts, ["sink_mass"], max_tokens=40, per_text=True)
figure, axes = plt.subplots(1, 3, figsize=(11, 2.4), layout="constrained")
ss.plots.heatmap(sink.frame[sink.frame["layer"].isin(layers)], "sink_mass", ax=axes[0])
cost.heatmap(ax=axes[1])
cost.heatmap(placebo=True, ax=axes[2])
plt.show()

# %%
# Do the heads with the largest sinks pay most for losing it? A rank correlation over heads, text by text; the interval is
# across the three texts.
rho = cost.rank_correlation(sink, "sink_mass")
print(f"Spearman's rank correlation of cost and sink mass: {rho.value:+.2f}, 95% interval {rho.low:+.2f} to {rho.high:+.2f}")

# %%
# How much of the whole is the work of few heads? And how large is a placebo's cost, which is what any token would do?
rows = cost.summary()
largest, all_costs = rows["delta_loss"].nlargest(5).sum(), rows["delta_loss"].clip(lower=0).sum()
print(f"five of {len(rows)} heads cost {largest:.3f} nats, all that cost anything {all_costs:.3f}")
sizes = rows[["delta_loss", "placebo_delta_loss"]].abs().median()
print(f"median size of a cost: {sizes['delta_loss']:.4f}; of a placebo's: {sizes['placebo_delta_loss']:.4f}")
for note in cost.about["notes"]:
    print(f"note: {note}")

# %%
# A sink mass says where attention goes; the cost says what the model's predictions owe to it, with all other heads in place.
# A head that costs nothing alone may matter beside others: edit several at once in `ss.evaluate`, with
# `ScaleAttention(0, 0, layers=..., heads=[...])`. The command `sinkscope sweep smollm2-135m --file novel.txt --edit
# "scale_attention(0, 0)" --out map` writes a page with both maps; `cost.beside(sink).save("both")` puts the cost on the page
# of the measurement.
