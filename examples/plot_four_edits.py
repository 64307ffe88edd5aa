"""
Zero, mask, drop, evict: four edits, and why they differ
========================================================

"Remove the first token" can mean four things. *Zero*: it gets its attention, and gives nothing. *Mask*: nobody sees it, and
the other keys share what it got. *Drop*: it was never there. *Evict*: it is there until the window has passed it. They cost
very different amounts, and where the sink goes says why. (Where positions are rotary, mask and drop are the same: distances
alone count.) And there is a fifth way: break what makes the token a sink.
"""

# %%
import matplotlib.pyplot as plt
import torch

import sinkscope as ss
from sinkscope.interventions import DropTokens, EditActivation, ZeroAttention
from sinkscope.samples import samples

model = ss.load_model("smollm2-135m")
text = max(samples().values(), key=len)

edits = {
    "zero": ZeroAttention(0),
    "mask": ss.MaskKeys(0),
    "drop": DropTokens(0),
    "evict": ss.Window(64),
    "evict all but it": ss.SinkWindow(64, sinks=1),
    "break it": EditActivation(),  # its massive activations, located and set to zero
}
effect = ss.evaluate(model, text, list(edits.values()), max_tokens=512, score_from=128)
table = effect.summary().set_index("intervention").loc[[str(edit) for edit in edits.values()]]
table.insert(0, "edit", list(edits))
print(table[["edit", "delta_loss", "low", "high", "kl", "sink_mass", "sink_position", "sink_token"]].to_string(index=False))

figure, ax = plt.subplots(figsize=(7, 2.8), layout="constrained")
errors = [table["delta_loss"] - table["low"], table["high"] - table["delta_loss"]]
ax.barh(list(edits), table["delta_loss"], xerr=errors, color="#4c72b0", ecolor="#555555")
ax.set(xlabel="loss, difference to the unedited run in nats", xscale="symlog")
ax.invert_yaxis()
plt.show()

# %%
# Where attention goes: once the first token is hidden or dropped, the next one takes its place (`sink_position`). Under a
# window every such token is evicted in its turn. And what makes a token a sink in this model sits in very few numbers:
print(effect.about["located"])

# %%
# The same edits around any code of your own, generation included.
prompt = model.to_tokens(text)[:, :100]
for edit in (ss.Window(64), ss.SinkWindow(64, sinks=1)):
    with torch.no_grad(), edit.on(model):
        made = model.original_model.generate(prompt, max_new_tokens=24, do_sample=False, pad_token_id=0)
    print(f"{edit}: {model.tokenizer.decode(made[0, 100:])!r}")
