"""
A sink forms while your own model trains
========================================

Any training loop, watched: a small Llama learns a task that needs attention at some tokens only, and what its heads do with
the first token meanwhile is kept, step by step. The loop is plain PyTorch and knows nothing of it.
"""

# %%
# The task: a Markov chain over 32 tokens; after one of three *triggers* comes the token before the trigger. The model is of
# Hugging Face's class, with random weights.
import matplotlib.pyplot as plt
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sinkscope as ss
from sinkscope.studies.toy import BigramBackcopy

task = BigramBackcopy()
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=task.vocabulary + 1,
    max_position_embeddings=64,
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=1,
)
model = LlamaForCausalLM(config)

# %%
# Train as you would. Inside the block every tenth step is looked at; gradients are what they are without it, to the bit.
generator = torch.Generator().manual_seed(0)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.99))
losses = []
with ss.watch(model, ["sink_mass", "sink_rate"], every=10) as seen:
    for _ in range(200):
        ids = task.batch(generator, 32)
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
print(seen)

# %%
# One row per step and metric, with what uniform attention would give; ``by="layer"`` and ``by="head"`` say where.
mass = seen.series(by="layer").query("metric == 'sink_mass'")
figure, (top, bottom) = plt.subplots(2, 1, figsize=(5.2, 4.6), sharex=True, layout="constrained")
top.plot(losses, color="grey", linewidth=0.8)
top.set(ylabel="loss in nats")
for layer, rows in mass.groupby("layer"):
    bottom.plot(rows["step"], rows["value"], "o-", markersize=3, label=f"layer {layer}")
bottom.axhline(mass["null"].iloc[0], color="grey", linestyle="--", label="uniform attention")
bottom.set(xlabel="step", ylabel="attention to the first token")
bottom.legend(frameon=False)
plt.show()

# %%
# All that was seen is a report as well, in which every sequence of every step is a text. In ``transformers.Trainer``,
# ``callbacks=[ss.SinkCallback(["sink_mass"], texts=[...], every=50)]`` measures the same probe texts again and again.
print(seen.report())
