"""
A sink over a long generation
=============================

A model writes, and with every token it pays the first one the same toll. Take that token out of a cache of fixed size, and
it has nobody to pay; keep it, and it goes on as before.
"""

# %%
# SmolLM2 writes 96 tokens, watched: with its whole cache, with a window of 32 keys, and with one that keeps the first four
# tokens besides. Nothing is added to ``generate``; the edit comes first, so that the edited attention is what is seen.
import matplotlib.pyplot as plt

import sinkscope as ss

model = ss.load_model("smollm2-135m")
prompt = model.to_tokens("The lighthouse keeper had not spoken to anyone for weeks, and then one evening")
caches = {
    "the whole cache": ss.interventions.Intervention(),
    "4 first tokens and 28 keys": ss.SinkWindow(32, sinks=4),
    "32 keys": ss.Window(32),
}
written, seen = {}, {}
for name, edit in caches.items():
    with edit.on(model), ss.watch(model, ["sink_mass"]) as seen[name]:
        written[name] = model.original_model.generate(prompt, max_new_tokens=96, do_sample=False, pad_token_id=0)

# %%
# Attention to the first token, by the token that pays it.
figure, ax = plt.subplots(figsize=(5.6, 3.2), layout="constrained")
for name, one in seen.items():
    series = one.series().query("step > 0")
    ax.plot(series["position"], series["value"], label=name)
ax.plot(series["position"], series["null"], color="grey", linestyle="--", label="uniform attention")
ax.set(xlabel="position", ylabel="attention to the first token", ylim=(0, 1))
ax.legend(frameon=False)
plt.show()

# %%
# What became of the text:
for name, ids in written.items():
    print(f"{name}: ...{model.tokenizer.decode(ids[0, -40:])!r}\n")

# %%
# And where: the mean of each layer over the whole text, as in any report.
ax = seen["the whole cache"].report().progression("sink_mass", label="the whole cache")
seen["4 first tokens and 28 keys"].report().progression("sink_mass", ax=ax, label="4 first tokens and 28 keys")
plt.show()
