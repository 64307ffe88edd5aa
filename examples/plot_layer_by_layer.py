"""
Take the first token away, layer by layer and head by head
==========================================================

Which layers need their sink? Zero the attention to the first token in one layer at a time, or hide the token there, so that
the other keys share what it got. Then go into the layers where it matters most, and edit one head at a time.
"""

# %%
# One short text. Each edit below is a forward pass of its own on the same tokens; the loss is compared token by token.
import matplotlib.pyplot as plt
import numpy as np

import sinkscope as ss
from sinkscope.interventions import ZeroAttention
from sinkscope.samples import samples

model = ss.load_model("smollm2-135m")
text = max(samples().values(), key=len)
layers, heads = model.cfg.n_layers, model.cfg.n_heads

zeroed = [ZeroAttention(0, layers=layer) for layer in range(layers)]
hidden = [ss.MaskKeys(0, layers=layer) for layer in range(layers)]
effect = ss.evaluate(model, text, [*zeroed, *hidden], max_tokens=64)
delta = effect.summary().set_index("intervention")["delta_loss"]

figure, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
for edits, label in (
    (zeroed, "attention to token 0 zeroed: rows lose it"),
    (hidden, "token 0 hidden: rows are renormalised"),
):
    ax.plot([delta[str(edit)] for edit in edits], marker="o", markersize=3, label=label)
ax.axhline(0, color="grey", linewidth=0.8)
ax.set(xlabel="layer that is edited", ylabel="loss, difference in nats", title="One layer at a time")
ax.legend(frameon=False, fontsize=8)
plt.show()

# %%
# The three layers that suffer most from zeroing, one head at a time.
worst = sorted(sorted(range(layers), key=lambda layer: -delta[str(zeroed[layer])])[:3])
one_head = [ZeroAttention(0, layers=layer, heads=head) for layer in worst for head in range(heads)]
by_head = ss.evaluate(model, text, one_head, max_tokens=64).summary().set_index("intervention")
values = by_head.loc[[str(edit) for edit in one_head], "delta_loss"].to_numpy().reshape(3, heads)

figure, ax = plt.subplots(figsize=(7, 2.2), layout="constrained")
limit = np.abs(values).max()
image = ax.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
ax.set(xlabel="head", ylabel="layer", title="Attention to token 0 zeroed in one head", yticks=range(3), yticklabels=worst)
figure.colorbar(image, label="nats")
plt.show()

row = by_head.nlargest(1, "delta_loss").iloc[0]
print(f"most of all: {row.name}: {row['delta_loss']:+.3f} nats, 95% interval {row['low']:+.3f} to {row['high']:+.3f}")

# %%
# One text of 64 tokens: the interval is over its parts, and says nothing about other texts. A head whose edit costs nothing
# may be needed on another text, or its work may be done by another head.
