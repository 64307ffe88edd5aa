"""
The collapse under a sliding window
===================================

Keep only the latest keys in the cache, and the model falls apart as soon as the first token is evicted. Keep that one token
as well, and most of the damage is undone. Hide the same token in a dense pass, and hardly anything happens.
"""

# %%
# The first 768 tokens of a sample text, and a budget of 128 keys. Every window has the same budget.
import matplotlib.pyplot as plt

import sinkscope as ss
from sinkscope.samples import samples

model = ss.load_model("smollm2-135m")
text = max(samples().values(), key=len)

window, one_sink, four_sinks = ss.Window(128), ss.SinkWindow(128, sinks=1), ss.SinkWindow(128, sinks=4)
placebo = four_sinks.placebo(seed=0)  # keeps four later keys instead of the first
masked = ss.MaskKeys(0)  # no window: every query sees all keys but the first
effect = ss.evaluate(model, text, [window, one_sink, four_sinks, placebo, masked], max_tokens=768, score_from=256)

columns = ["intervention", "loss", "perplexity", "delta_loss", "low", "high", "sink_mass", "sink_position", "sink_token"]
print(effect.summary()[columns].to_string(index=False))

# %%
# The loss rises where the first token leaves the window: it is still there for the first 128 tokens.
everywhere = ss.evaluate(model, text, [window, four_sinks], max_tokens=768)
everywhere.loss_curve()
plt.show()

# %%
# *Evicting is not masking.* With the first token hidden from everybody, the next one becomes the sink: see `sink_position`.
# Under a window no token can take over for good, since each is evicted in its turn.
#
# Where this is one model and one text, the interval says how much the text's parts differ, not how much models do.
