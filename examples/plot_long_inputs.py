"""
Long inputs, and which engine runs
==================================

A pattern of T x T is what makes attention statistics heavy. Two engines avoid it; a third way forgets the past.
"""

# %%
# A text that every Python has, long enough, and a small real model.
import time

import sinkscope as ss
from sinkscope.studies.texts import long_text

model = ss.load_model("smollm2-135m")
(text,) = long_text().values()

# %%
# By itself `measure` takes engine *flash*: fused attention that keeps each row's log-sum-exp. The attention to any key is
# then exp(score - log-sum-exp), exactly, and no pattern is ever formed. It is proved equal on the first tokens of your text
# first, and the report says so.
seconds = {}
for length in (256, 1024):
    start = time.perf_counter()
    report = ss.measure(model, text, ["sink_mass", "sink_rate"], max_tokens=length)
    seconds[length] = time.perf_counter() - start
print(report.about["engine"], "-", report.about["engine_why"])
print({length: f"{s:.1f} s" for length, s in seconds.items()})

# %%
# Engine *hooks* sits on TransformerLens's ``hook_pattern``, for every model that has one. Long texts run in chunks of
# query rows, if the model's KV cache has been proved right. Both give the same numbers.
hooks = ss.measure(model, text, ["sink_mass", "sink_rate"], max_tokens=1024, engine="hooks")
print(hooks.about["engine"], "-", hooks.about["engine_why"])
print(report.compare(hooks)[["metric", "value", "value_other", "difference"]])

# %%
# Past the context nothing dense can go. A streaming window can: it keeps a few sinks and the latest keys, and counts
# positions inside its cache, so that a text may be as long as you like in memory that does not grow.
stream = ss.interventions.StreamingWindow(128, sinks=4)
effect = ss.evaluate(model, text, [stream, ss.Window(128)], max_tokens=1536, score_from=256)
print(effect.summary()[["intervention", "tokens", "loss", "delta_loss"]])
effect.loss_curve()
