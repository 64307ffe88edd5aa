"""Every architecture of TransformerLens's registry has the row in docs/compatibility.md that is found when it is tried."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

import sinkscope as ss
from sinkscope.testing import tiny_hf_model, tiny_model
from sinkscope.testing.architectures import ARCHITECTURES
from tests.model.compare import TL4

DOCS = Path(__file__).parents[2] / "docs"
pytestmark = pytest.mark.skipif(not TL4, reason="the page is of TransformerLens 4")
#: Plain ones have tests of their own; these are tried in every run: gates, hybrids with hooks and without, latent keys,
#: chosen keys, chunks, a text model inside, unequal heads, another name, no attention, images.
FAST = """
Qwen3NextForCausalLM GraniteMoeHybridForCausalLM NemotronHForCausalLM Zamba2ForCausalLM DeepseekV3ForCausalLM
GlmMoeDsaForCausalLM Llama4ForCausalLM Gemma4ForConditionalGeneration Qwen3VLForConditionalGeneration LagunaForCausalLM
PhiMoEForCausalLM RwkvForCausalLM ViTModel
"""


def script():
    spec = importlib.util.spec_from_file_location("architectures", DOCS / "architectures.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def rows() -> dict[str, str]:
    """The page's row of each architecture."""
    section = (DOCS / "compatibility.md").read_text(encoding="utf-8").partition("\n## Every architecture")[2]
    return {found[1]: line for line in section.splitlines() if (found := re.match(r"\| `(\w+)` \|", line))}


if TL4:
    MADE, COUNTS = script(), script().registry()
    OTHERS = [name for name in COUNTS if name not in FAST.split()]
else:
    OTHERS = []


@pytest.mark.parametrize("name", [*FAST.split(), *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_a_row_is_current(name):
    assert MADE.row(MADE.tried(name, COUNTS[name])) == rows()[name]


def test_every_architecture_has_a_row_and_none_is_wrong():
    found = rows()
    assert list(found) == [name for name, _ in COUNTS.most_common()]
    for name, line in found.items():
        _, _, models, verdict, _, _ = (cell.strip() for cell in re.split(r"(?<!\\)\|", line))
        assert models == f"{COUNTS[name]:,}"
        assert verdict in (MADE.RIGHT, MADE.REFUSED, MADE.REMOTE, MADE.UNTRIED)
    right = sum(COUNTS[name] for name, line in found.items() if f"| {MADE.RIGHT} |" in line)
    assert right / COUNTS.total() > 0.97


def test_a_wrong_number_would_be_seen(monkeypatch):
    monkeypatch.setattr(MADE, "attentions", lambda plain, ids: [w.flip(0) for w in attentions(plain, ids)])
    attentions = script().attentions
    assert MADE.tried("LlamaForCausalLM", 1).verdict == MADE.WRONG
    monkeypatch.setattr(ss, "load_model", lambda place: 1 / 0)
    assert MADE.tried("LlamaForCausalLM", 1).verdict == MADE.FOREIGN


def test_tiny_models_are_known_by_architecture():
    model = tiny_model("Qwen2ForCausalLM")
    assert type(model.original_model).__name__ == "Qwen2ForCausalLM"
    assert len(ARCHITECTURES) > 125
    with pytest.raises(ss.SinkscopeError, match="unknown family 'Qwen2ForCausal'; did you mean 'Qwen2ForCausalLM'"):
        tiny_model("Qwen2ForCausal")


@pytest.mark.parametrize("engine", ["auto", "hooks"])
def test_queries_see_the_keys_of_their_own_chunk(engine):
    """Chunks of 8: key 0 is seen by the first eight queries alone, and is a fair share of their keys."""
    report = ss.measure(tiny_model("Llama4ForCausalLM"), [[1, *range(4, 23)]], ["visible_sink_mass"], engine=engine)
    assert "chunks of 8 tokens" in report.about["engine_why"] or engine == "hooks"
    nulls = report.frame.groupby("layer")["null"].first()
    inside = sum(1 / (i + 1) for i in range(8)) / 8
    whole = sum(1 / (i + 1) for i in range(20)) / 20
    assert nulls.tolist() == pytest.approx([inside, whole] * 2)


@pytest.mark.parametrize(("name", "reads"), [("ViTModel", "pixel_values"), ("HubertModel", "input_values")])
def test_encoders_of_images_and_sound_take_no_text(name, reads):
    for make in (tiny_hf_model, tiny_model):
        with pytest.raises(ss.SinkscopeError, match=f"{name}.* reads {reads}: give what its processor gives"):
            ss.measure(make(name), [[1, 2, 3]])
        with pytest.raises(ss.SinkscopeError, match=f"{name}.* reads {reads}, which ss.measure"):
            ss.sink_mask(make(name), [[1, 2, 3]])


def test_a_bridge_that_does_not_run_is_refused_in_words():
    model = tiny_model("GraniteMoeHybridForCausalLM")
    model.original_model.model.rotary_emb = torch.nn.Linear(3, 3)
    with pytest.raises(ss.SinkscopeError, match=r"does not run as it is, .*TypeError.* made by other means"):
        ss.measure(model, [[1, 5, 6, 7]])
