"""
A sink over a long generation
=============================

A model writes, and with every token it pays the first one the same toll. Take that token out of a cache of fixed size, and
it has nobody to pay; keep it, and it goes on as before.
"""

# %%
# SmolLM2 writes 64 tokens, watched: with room for everything, with a cache of 24 keys, and with one that keeps the first four
# tokens among its 24. Nothing is added to ``generate``; the edit comes first, so that the edited attention is what is seen.
import matplotlib.pyplot as plt

import sinkscope as ss

model = ss.load_model("smollm2-135m")
prompt = model.to_tokens("The lighthouse keeper had not spoken to anyone for weeks, and then one evening")
caches = {
    "room for 4,096 keys": ss.Window(4096),
    "24 keys, 4 of them the first": ss.SinkWindow(24, sinks=4),
    "the latest 24 keys": ss.Window(24),
}
written, seen = {}, {}
for name, edit in caches.items():
    with edit.on(model), ss.watch(model, ["sink_mass"]) as seen[name]:
        written[name] = model.original_model.generate(prompt, max_new_tokens=64, do_sample=False, pad_token_id=0)

# %%
# Attention to the first token, by the token that pays it.
figure, ax = plt.subplots(figsize=(5.6, 3.2), layout="constrained")
courses = {name: one.series().query("step > 0") for name, one in seen.items()}
for name, series in courses.items():
    ax.plot(series["position"], series["value"], label=name)
series = courses["room for 4,096 keys"]
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
ax = seen["room for 4,096 keys"].report().progression("sink_mass", label="room for 4,096 keys")
seen["24 keys, 4 of them the first"].report().progression("sink_mass", ax=ax, label="24 keys, 4 of them the first")
plt.show()
