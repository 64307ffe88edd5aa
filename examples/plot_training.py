"""
Watch a sink appear in training
===============================

A small model, trained from scratch on a task that needs attention at some tokens only (Guo et al. 2024). With softmax a row
has to go somewhere; what does it learn to do where attention is not wanted?
"""

# %%
# The task: a Markov chain over 32 tokens; after one of three *triggers* comes the token before the trigger.
import matplotlib.pyplot as plt
import torch

from sinkscope.studies.toy import BigramBackcopy, train

task = BigramBackcopy()
print(task.batch(torch.Generator().manual_seed(0), 1)[0, :24].tolist())

# %%
# Train with softmax and, as a control, with a sigmoid, whose rows need not sum to one. (The study `emergence` trains longer,
# with seven kinds of attention and three seeds each.)
runs = {attention: train(task, attention, steps=250, every=25) for attention in ("softmax", "sigmoid")}
print(runs["softmax"][["step", "loss", "best_loss", "sink_mass", "null", "value_drain"]].round(3).to_string(index=False))

# %%
# The first token's share of the most sinking head, step by step.
figure, ax = plt.subplots(figsize=(5.2, 3), layout="constrained")
for attention, run in runs.items():
    ax.plot(run["step"], run["sink_mass"], "o-", markersize=3, label=attention)
ax.axhline(runs["softmax"]["null"].iloc[0], color="grey", linestyle="--", label="uniform attention")
ax.set(xlabel="step", ylabel="attention to the first token")
ax.legend(frameon=False)
plt.show()

# %%
# The same on a real model's checkpoints: each step is a revision on the hub, ``EleutherAI/pythia-14m@step1000``. From the
# shell, ``sinkscope study emergence EleutherAI/pythia-14m --checkpoint 0 --checkpoint 1000 --out pythia``; in Python,
# ``ss.studies.emergence("EleutherAI/pythia-14m", checkpoints=[0, 1000, 143000])``, or a mapping from step to any model.
