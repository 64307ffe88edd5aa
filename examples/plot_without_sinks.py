"""
Leave sinks out of an autoencoder's data, of a probe, of a mean
===============================================================

A sink's activation is a hundred times as long as any other, and says nothing about the text. What you fit to activations, you
fit to sinks first. Here: which tokens they are, and what changes without them, on SmolLM2-135M in the middle of its layers.
"""

# %%
# Twelve pieces of technical prose that every Python brings along, BOS first.
import pydoc_data.topics

import matplotlib.pyplot as plt
import torch

import sinkscope as ss

model = ss.load_model("smollm2-135m")
prose = " ".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
texts = [prose[start : start + 2000] for start in range(0, 120_000, 10_000)]

# %%
# Which tokens are sinks? Three rules, how many tokens each takes, and how far they agree. Hard-coding "the first 16
# positions" takes an eighth of all tokens, nearly all of them ordinary, and misses the sinks that come later.
mask = ss.sink_mask(model, texts, by=["attention", "norm", "massive"], eps={"norm": 10}, max_tokens=128)
print(mask.agreement().round(3).to_string(index=False))
print(mask.table().head(12).to_string(index=False))

# %%
# The activations, `[text, position, d_model]`, and the two masks, `[text, position]`, padded alike.
layer = 15
ids = torch.stack([s.ids for s in ss.tokenize(model.tokenizer, texts, bos=True, max_tokens=128).sequences])
with torch.no_grad():
    _, cache = model.run_with_cache(ids, names_filter=f"blocks.{layer}.hook_resid_post")
activations = cache[f"blocks.{layer}.hook_resid_post"]
sinks, real = mask.padded()
keep = real & ~sinks

# %%
# **A sparse autoencoder** learns from rows of activations: `[token, d_model]` is what the training loops of SAELens and of
# dictionary_learning take, whatever buffer it comes from.
with_sinks, without = activations[real], activations[keep]
print(f"{len(with_sinks)} rows with sinks, {len(without)} without")
print(f"mean norm {with_sinks.norm(dim=-1).mean():.0f} with sinks, {without.norm(dim=-1).mean():.0f} without")
print(f"largest over median norm {with_sinks.norm(dim=-1).max() / with_sinks.norm(dim=-1).median():.0f}", end=" with sinks, ")
print(f"{without.norm(dim=-1).max() / without.norm(dim=-1).median():.1f} without")

# %%
# A small linear autoencoder (16 principal components), fitted to half of the texts with and without sinks. With sinks, the
# variance that it explains in the other half looks perfect. It is the sinks' own: on ordinary tokens it explains no more than
# the one that never saw a sink, which says so.
half = torch.arange(len(texts)) % 2 == 0


def components(rows, k=16):
    """Mean and first k principal directions."""
    return rows.mean(0), torch.linalg.svd(rows - rows.mean(0), full_matrices=False).Vh[:k]


def explained(rows, fit):
    """Share of the rows' variance that the directions explain."""
    mean, directions = fit
    left = (rows - mean) - (rows - mean) @ directions.T @ directions
    return float(1 - left.square().sum() / (rows - rows.mean(0)).square().sum())


ordinary = activations[~half][keep[~half]]
scores = {}
for name, chosen in (("with sinks", real), ("without", keep)):
    fit = components(activations[half][chosen[half]])
    scores[name] = explained(activations[~half][chosen[~half]], fit), explained(ordinary, fit)
    print(f"fitted {name}: explains {scores[name][0]:.3f} of the like, {scores[name][1]:.3f} of the ordinary tokens")

# %%
# **A linear probe**: does the next token begin a word? Least squares on standardised activations of half of the texts,
# accuracy on the ordinary tokens of the others. A sink or two per text hardly matter to it.
starts = torch.tensor([[s.startswith(" ") for s in model.to_str_tokens(row)] for row in ids])
target = torch.zeros_like(starts)
target[:, :-1] = starts[:, 1:]
keep[:, -1] = real[:, -1] = False


def probe(chosen):
    """Accuracy on ordinary tokens of a probe that was fitted to the chosen tokens of the first half."""
    rows, truth = activations[half][chosen[half]].double(), target[half][chosen[half]].double()
    mean, scale = rows.mean(0), rows.std(0)
    system = torch.cat([(rows - mean) / scale, torch.ones(len(rows), 1).double()], dim=1)
    weights = torch.linalg.solve(system.T @ system + 30 * torch.eye(system.shape[1]).double(), system.T @ truth)
    tested = activations[~half][keep[~half]].double()
    guess = ((tested - mean) / scale) @ weights[:-1] + weights[-1] > 0.5
    return float((guess == target[~half][keep[~half]]).double().mean())


base = float(target[~half][keep[~half]].double().mean())
print(f"accuracy {probe(real):.3f} with sinks, {probe(keep):.3f} without; always the same answer: {max(base, 1 - base):.3f}")

# %%
# **A mean direction**, as for steering: the mean activation is a BOS in disguise.
mean_with, mean_without = activations[real].mean(0), activations[keep].mean(0)
bos = activations[:, 0].mean(0)
cosine = torch.nn.functional.cosine_similarity
print(f"norm of the mean: {mean_with.norm():.0f} with sinks, {mean_without.norm():.0f} without")
print(f"its cosine with BOS: {cosine(mean_with, bos, dim=0):.2f} with sinks, {cosine(mean_without, bos, dim=0):.2f} without")

# %%
# Norms by position, the sinks marked.
fig, ax = plt.subplots()
ax.semilogy(activations.norm(dim=-1).T, color="0.8", linewidth=0.5)
text, position = sinks.nonzero(as_tuple=True)
ax.plot(position, activations.norm(dim=-1)[text, position], "o", label="flagged")
ax.set(xlabel="position", ylabel=f"norm of the residual stream after layer {layer}")
ax.legend()
plt.show()
