"""Metrics of queries, keys, values, outputs and the residual stream, against loops over what Hugging Face's modules give."""

import math

import numpy as np
import pytest
import torch

import sinkscope as ss
from sinkscope.metrics import BUILT_IN, MECHANISM
from sinkscope.models.versions import check_bridge
from sinkscope.testing import check_metric, tiny_hf_model, tiny_model
from tests.conftest import table, total
from tests.model.compare import IDS, TL4

KEYS = (0, 3)
#: Value heads are fewer than query heads here; positions are rotary, and absolute.
FAMILIES = ("llama", "gpt2")


def seen_by_hugging_face(family, ids):
    """Give per layer q, k, v, z `[position, head, d]` of attention, A `[head, query, key]`, h `[position, d]`."""
    network = tiny_hf_model(family)
    heads, kept = network.config.num_attention_heads, {}

    def keep(name):
        return lambda module, args, output: kept.setdefault(name, []).append((args[0][0], output[0]))

    layers = network.model.layers if family == "llama" else network.transformer.h
    for block in layers:
        if family == "llama":
            for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
                getattr(block.self_attn, part).register_forward_hook(keep(part))
        else:
            block.attn.c_attn.register_forward_hook(keep("qkv"))
            block.attn.c_proj.register_forward_hook(keep("o_proj"))
        block.register_forward_hook(lambda module, args, output: kept.setdefault("h", []).append(first(output)[0]))
    with torch.no_grad():
        pattern = network(input_ids=torch.tensor([ids]), output_attentions=True).attentions
    found = []
    for layer in range(len(layers)):
        z = kept["o_proj"][layer][0].unflatten(-1, (heads, -1))
        if family == "llama":
            q, k, v = (kept[p][layer][1].unflatten(-1, (-1, z.shape[-1])) for p in ("q_proj", "k_proj", "v_proj"))
            q, k = rotated(network, q, k)
        else:
            q, k, v = (part.unflatten(-1, (heads, -1)) for part in kept["qkv"][layer][1].chunk(3, -1))
        found.append({"q": q, "k": k, "v": v, "z": z, "A": pattern[layer][0], "h": kept["h"][layer]})
    return [{name: x.double().numpy() for name, x in layer.items()} for layer in found]


def first(output):
    return output[0] if isinstance(output, tuple) else output


def rotated(network, q, k):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    cos, sin = network.model.rotary_emb(q, torch.arange(len(q))[None])
    q, k = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    return q[0].transpose(0, 1), k[0].transpose(0, 1)


def norm(x):
    return math.sqrt(math.fsum(float(a) ** 2 for a in x))


def median(numbers):
    ordered, n = sorted(numbers), len(numbers)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2


def oracle(layer, key):
    """One layer's numbers by name, in plain loops: a list over (key-value) heads."""
    q, k, v, z, pattern = (layer[name] for name in ("q", "k", "v", "z", "A"))
    t, heads, kv = len(q), q.shape[1], k.shape[1]
    group = heads // kv
    found = {name: [] for name in ("value_drain", "key_norm", "key_drain", "query_key_cosine", "sink_output_share")}
    for h in range(kv):
        found["value_drain"].append(norm(v[key, h]) / median([norm(v[j, h]) for j in range(t)]))
        found["key_norm"].append(norm(k[key, h]))
        found["key_drain"].append(norm(k[key, h]) / median([norm(k[j, h]) for j in range(t)]))
    for h in range(heads):
        k0, v0 = k[key, h // group], v[key, h // group]
        cosines = [float(q[i, h] @ k0) / norm(q[i, h]) / norm(k0) for i in range(key, t)]
        shares = [pattern[h, i, key] * norm(v0) / norm(z[i, h]) for i in range(max(1, key), t)]
        found["query_key_cosine"].append(math.fsum(cosines) / len(cosines))
        found["sink_output_share"].append(math.fsum(shares) / len(shares))
    mean_norms = [math.fsum(norm(z[i, h]) for i in range(t)) / t for h in range(heads)]
    found["gate_mean"] = [1.0] * heads
    found["head_output_norm"] = [m / (math.fsum(mean_norms) / heads) for m in mean_norms]
    size = np.abs(layer["h"])
    at = max((size[i, d], i, d) for i in range(t) for d in range(size.shape[1]))
    found["massive_magnitude"], found["massive_position"], found["massive_dimension"] = [at[0]], [at[1]], [at[2]]
    found["residual_norm"] = [norm(layer["h"][i]) for i in range(t)]
    found["residual_peak"] = [max(abs(x) for x in layer["h"][i]) for i in range(t)]
    at_key = layer["h"][key]
    found["sink_cosine"] = [float(layer["h"][i] @ at_key) / norm(layer["h"][i]) / norm(at_key) for i in range(t)]
    found["massive_activation"] = [at[0] / median(size.flatten())]
    p = np.linalg.svd(layer["h"], compute_uv=False) ** 2
    found["matrix_entropy"] = [-math.fsum(x * math.log(x) for x in p / p.sum() if x > 0)]
    return found


@pytest.mark.classes
@pytest.mark.parametrize("engine", ["flash", "hooks"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_number_is_the_oracles(tiny, family, engine):
    """In padded batches, at two keys, on both engines."""
    if engine == "flash":
        check_bridge()
    report = ss.measure(tiny(family), IDS, list(MECHANISM), key=list(KEYS), engine=engine)
    compared = set()
    for label, ids in IDS.items():
        layers = seen_by_hugging_face(family, ids)
        for key in KEYS:
            expected = [oracle(layer, key) for layer in layers]
            for name in expected[0]:
                rows = report.frame[(report.frame["metric"] == name) & (report.frame["text"] == label)]
                at = rows["key"].isna().all()
                if at and key:
                    continue
                axis = "query" if BUILT_IN[name].per_query else "head"
                got = (rows if at else rows[rows["key"] == key]).pivot(index="layer", columns=axis, values="value")
                np.testing.assert_allclose(got, [e[name] for e in expected], rtol=2e-5, atol=1e-6, err_msg=f"{name} {label}")
                compared.add(name)
    assert compared | {"nop_rate", "massive_rule", "gate_closed"} == set(MECHANISM)
    assert report.frame["null"].isna().all()


@pytest.mark.parametrize("name", [n for n in MECHANISM if n not in ("nop_rate", "massive_rule", "gate_closed")])
def test_they_keep_the_contract(name):
    check_metric(name)


def test_a_sink_head_is_nop_or_broadcast(tiny):
    """The label is 1 where the sink key supplies less than the threshold, 0 where more; heads without a sink have none."""
    ids = IDS["text 0"]  # of seven tokens, of which the first gets much by chance
    report = ss.measure(tiny("llama"), [ids], ["received", "sink_output_share", "nop_rate", "nop_rate@0.8"])
    received, share, loose, strict = (table(report, n) for n in report.metrics)
    sink = received > 0.3
    assert sink.any()
    assert not sink.all()
    for got, eps in ((loose, 0.5), (strict, 0.8)):
        np.testing.assert_array_equal(np.isnan(got), ~sink)
        np.testing.assert_array_equal(got[sink], share[sink] < eps)
    assert len(np.unique(np.concatenate([loose[sink], strict[sink]]))) == 2
    assert total(report, "nop_rate") == pytest.approx((share[sink] < 0.5).mean())


def test_the_rule_of_large_models(tiny):
    """Massive by the rule where the magnitude is above 100 and 1,000 times the median: planted in token 5."""
    model = tiny("llama")
    ids = [1, 5, 9, 12, 8, 33, 21]

    def plant(module, args, output):
        (output[0] if isinstance(output, tuple) else output)[:, 5, 7] = 1e5

    handle = model.original_model.model.layers[0].register_forward_hook(plant)
    try:
        names = ["massive_rule", "massive_position", "massive_dimension", "massive_magnitude"]
        report = ss.measure(model, [ids], names, engine="hooks")
    finally:
        handle.remove()
    rule = report.frame[(report.frame["metric"] == "massive_rule") & (report.frame["text"] == "text 0")]
    assert rule.set_index("layer")["value"].to_dict() == {0: 0, 1: 1, 2: 1}
    assert total(report, "massive_rule") == pytest.approx(2 / 3)
    assert table(report, "massive_position")[1:].flatten().tolist() == [5, 5]
    assert table(report, "massive_dimension")[1:].flatten().tolist() == [7, 7]


def test_one_direction_has_no_entropy_and_even_ones_have_all():
    from sinkscope.block import Block, PatternRows

    def entropy(h):
        block = Block(0, 0, PatternRows(torch.ones(1, 1, len(h), len(h))), len(h), torch.tensor([len(h)]), torch.tensor([0]))
        return float(ss.metrics.BUILT_IN["matrix_entropy"](block_with(block, h))[0, 0, 0])

    def block_with(block, h):
        from dataclasses import replace

        return replace(block, activations={"residual": h[None]})

    assert entropy(torch.ones(6, 1) * torch.arange(4.0)) == pytest.approx(0, abs=1e-6)
    assert entropy(torch.eye(6)) == pytest.approx(math.log(6))
    assert entropy(torch.eye(6)[:, :3]) == pytest.approx(math.log(3))


def test_a_plain_model_gives_what_attention_has():
    """No hook points are needed for queries, keys, values and outputs; for the residual stream they are."""
    names = ["value_drain", "key_norm", "query_key_cosine", "sink_output_share", "head_output_norm"]
    network = tiny_hf_model("llama")
    report = ss.measure(network, IDS, names)
    expected = oracle(seen_by_hugging_face("llama", IDS["text 1"])[2], 0)
    for name in names:
        np.testing.assert_allclose(table(report, name, "text 1")[2], expected[name], rtol=2e-5, err_msg=name)
    with pytest.raises(ss.SinkscopeError, match="a metric needs 'residual', and a plain Hugging Face model has no hook"):
        ss.measure(network, IDS, ["massive_activation"])


@pytest.mark.model
def test_smollm2_drains_its_first_value(smollm2):
    """What the literature says of large models, on a small one: a small value, and one huge number, at token 0."""
    report = ss.measure(smollm2, "The lighthouse keeper wrote a letter to his sister and forgot to send it.", list(MECHANISM))
    drain, sink = table(report, "value_drain"), table(report, "massive_position")
    assert np.median(drain[12:]) < 0.5
    assert (sink[12:29] == 0).all()
    assert (table(report, "massive_dimension")[12:29] == 507).all()
    assert total(report, "massive_rule") > 0.3


GATED = ["Qwen3NextForCausalLM", "Qwen3_5ForCausalLM"]


def gates_seen(name, ids):
    """What Hugging Face's modules do to a head's output between attention and the output projection: by layer, z, g z, v."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    network, seen = tiny_hf_model(name), {}

    def attend(module, query, key, value, *args, **kwargs):
        out, weights = sdpa_attention_forward(module, query, key, value, *args, **kwargs)
        seen[module.layer_idx] = [out[0].double(), value[0].transpose(0, 1).double()]
        return out, weights

    for module in network.modules():
        if hasattr(module, "q_proj"):
            module.o_proj.register_forward_pre_hook(lambda _, args, at=module.layer_idx: seen[at].append(args[0][0].double()))
    pattern = tiny_hf_model(name)(input_ids=torch.tensor([ids]), output_attentions=True).attentions
    AttentionInterface.register("looked-at", attend)
    network.set_attn_implementation("looked-at")
    with torch.no_grad():
        network(input_ids=torch.tensor([ids]))
    for (z, v, written), weights in zip(seen.values(), (w for w in pattern if w is not None), strict=True):
        yield z, v, written.unflatten(-1, z.shape[1:]), weights[0].detach().double()


@pytest.mark.skipif(not TL4, reason="these models are new in TransformerLens 4")
@pytest.mark.parametrize("make", [tiny_model, tiny_hf_model])
@pytest.mark.parametrize("name", GATED)
def test_gates_are_what_outputs_are_multiplied_by(make, name):
    ids = IDS["text 0"]
    report = ss.measure(make(name), [ids], ["gate_mean", "gate_closed@0.5", "sink_output_share"])
    found = {metric: [] for metric in ("gate_mean", "sink_output_share")}
    for z, v, written, weights in gates_seen(name, ids):
        gate, heads = written / z, z.shape[1]
        found["gate_mean"].append(gate.mean((0, 2)).numpy())
        v0 = v[0].repeat_interleave(heads // v.shape[1], 0)
        shares = (gate * v0).norm(dim=-1) * weights[:, :, 0].T / written.norm(dim=-1)
        found["sink_output_share"].append(shares[1:].mean(0).numpy())
    for metric, expected in found.items():
        np.testing.assert_allclose(table(report, metric)[report.about["layers"]], expected, rtol=2e-4, err_msg=metric)
    closed = table(report, "gate_closed@0.5")[report.about["layers"]]
    np.testing.assert_array_equal(closed, np.array(found["gate_mean"]) < 0.5)
    assert 0 < closed.mean() < 1
    assert np.ptp(found["gate_mean"]) > 0.01


@pytest.mark.skipif(not TL4, reason="these models are new in TransformerLens 4")
def test_gates_are_read_by_flash_alone():
    with pytest.raises(ss.SinkscopeError, match=r"output gates of .* are read by engine flash alone"):
        ss.measure(tiny_model(GATED[0]), [IDS["text 0"]], ["gate_mean"], engine="hooks")
