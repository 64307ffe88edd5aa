"""
A metric of your own, in ten lines
==================================

A metric is a function of a block: some query rows of one layer, all keys. Everything around it (streaming, pads, batches,
averages, the null) is the library's.
"""

# %%
# How far does a head look back? One number per (sequence, head, query).
import matplotlib.pyplot as plt

import sinkscope as ss


@ss.metric(needs="pattern", unit="tokens")
def distance(block):
    """Mean distance, in tokens, from a query to what it attends to."""
    return (block.pattern * block.distance).sum(-1)


# %%
# Before trusting it: `check_metric` splits rows into blocks, sequences into batches, and adds pads full of nonsense.
# Nothing of that may change a number.
ss.testing.check_metric(distance)

# %%
# Attention that is not on patterns: any other hook point of a layer, by its TransformerLens name. A metric without a
# head axis gives it length one.


@ss.metric(needs="mlp.hook_post")
def mlp_scale(block):
    """Mean absolute MLP activation at each position."""
    return block["mlp.hook_post"].abs().mean(-1)[:, None]


# %%
# A planted sink, so that the answer is known: BOS gets score c in each head, every other key 0. The stronger the sink, the
# further back a head looks, since the sink is at the start.
model = ss.testing.planted_sink()
report = ss.measure(model, "the quick brown fox jumps over the lazy dog", ["sink_mass", distance, mlp_scale])
print(report.summary("all"))

wide = report.frame.pivot_table(index=["layer", "head"], columns="metric", values="value")
ax = wide.plot.scatter("sink_mass", "distance")
ax.axhline(report.frame.query("metric == 'distance'")["null"].iloc[0], linestyle="--", color="grey")
ax.set_title("distance looked back, and its null (dashed)")
plt.show()
