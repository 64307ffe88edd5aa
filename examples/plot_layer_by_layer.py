"""
Take the first token away, layer by layer and head by head
==========================================================

Which layers need their sink? Zero the attention to the first token in one layer at a time, or hide the token there, so that
the other keys share what it got. Then go into the layers where it matters most, and edit one head at a time.
"""

# %%
# One short text. A sweep makes an edit in every layer in turn, on the same tokens; the loss is compared token by token.
import matplotlib.pyplot as plt

import sinkscope as ss
from sinkscope.interventions import ZeroAttention
from sinkscope.samples import samples

model = ss.load_model("smollm2-135m")
text = max(samples().values(), key=len)

zeroed = ss.sweep(model, text, ZeroAttention(0), over="layers", max_tokens=64, placebo=False).summary()
hidden = ss.sweep(model, text, ss.MaskKeys(0), over="layers", max_tokens=64, placebo=False).summary()

figure, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
for rows, label in (
    (zeroed, "attention to token 0 zeroed: rows lose it"),
    (hidden, "token 0 hidden: rows are renormalised"),
):
    ax.plot(rows["layer"], rows["delta_loss"], marker="o", markersize=3, label=label)
ax.axhline(0, color="grey", linewidth=0.8)
ax.set(xlabel="layer that is edited", ylabel="loss, difference in nats", title="One layer at a time")
ax.legend(frameon=False, fontsize=8)
plt.show()

# %%
# The three layers that suffer most from zeroing, one head at a time.
worst = sorted(zeroed.nlargest(3, "delta_loss")["layer"])
by_head = ss.sweep(model, text, ZeroAttention(0, layers=worst), over="heads", max_tokens=64, placebo=False)
by_head.heatmap()
plt.show()

row = by_head.top(1).iloc[0]
print(
    f"most of all: {row['intervention']}: {row['delta_loss']:+.3f} nats, 95% interval {row['low']:+.3f} to {row['high']:+.3f}"
)

# %%
# One text of 64 tokens: the interval is over its parts, and says nothing about other texts. A head whose edit costs nothing
# may be needed on another text, or its work may be done by another head.
