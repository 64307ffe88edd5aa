"""
Bring your own model
====================

Whatever you have loaded works as it is, with your hooks in place, and is left exactly as it was.
"""

# %%
# A plain Hugging Face model: engine *flash* runs it without TransformerLens. (This one is tiny and random.)
import tempfile

import sinkscope as ss
from sinkscope.testing import tiny_hf_model, tiny_tokenizer

network = tiny_hf_model("llama")
report = ss.measure(network, [[1, 5, 9, 23, 14, 7, 31], [1, 8, 8, 40, 2, 19]], ["sink_mass", "value_drain"])
print(report)
print(report.summary("all"))
report.heatmap("sink_mass")

# %%
# A TransformerBridge, with a hook of your own beside sinkscope's: it fires as always (here also while the engine is proved).
# (`ss.models.bridge` wraps a network that you have; `TransformerBridge.boot_transformers` does the same with more to say.)
model = ss.models.bridge(tiny_hf_model("llama"), tiny_tokenizer("llama"), "mine")
norms: list[float] = []


def mine(value, hook):
    norms.append(round(float(value.norm()), 3))


with model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", mine)]):
    ss.measure(model, "so it goes", ["sink_mass"])
print("my hook saw", norms)
assert not model.hook_dict["blocks.1.hook_resid_post"].fwd_hooks

# %%
# Your own code under an edit, generation included.
ids = model.to_tokens("so it goes")
with ss.MaskKeys(0).on(model):
    edited = model(ids)
print("largest change of a logit:", round((edited - model(ids)).abs().max().item(), 4))

# %%
# A model that is too large for one device: `device_map` spreads its layers over the GPUs that there are, and keeps in
# memory or on disk what does not fit; hooks and edits work on every device. (Here all of it goes to the one device of this
# machine; on a machine with GPUs write `device_map="auto"`.)
with tempfile.TemporaryDirectory() as folder:
    network.save_pretrained(folder)
    tiny_tokenizer("llama").save_pretrained(folder)
    spread = ss.load_model(folder, device_map="cpu")
    print(ss.measure(spread, "so it goes", ["sink_mass"]).summary("all"))

# %%
# Several GPUs, or several machines, and many texts: let every process have the model, and share the texts. The command line
# does it under torchrun, `torchrun --nproc-per-node 4 -m sinkscope measure gpt2 --file corpus.jsonl --out results`; in a
# script, every process makes the same call with `distributed=True` and gets the whole report.

# %%
# What a model can't give is said, with what works instead.
try:
    ss.measure(network, [[1, 5, 9]], ["massive_activation"])
except ss.SinkscopeError as error:
    print(error)
