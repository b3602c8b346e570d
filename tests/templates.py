"""Real chat templates, from TRL's wheel, on tokenizers that know their marks."""

import functools
import importlib.util
from pathlib import Path

from tokenizers import AddedToken
from transformers import AutoTokenizer

from fdfast.models import fetch_demo_model
from tests.tiny import tiny_tokenizer

CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA = [
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "<|eom_id|>", "<|python_tag|>"),
]
# As in Qwen's vocabularies: added tokens, and not special ones.
XML = [
    f"<{slash}{name}>" for name in ("tool_call", "tool_response", "think") for slash in ("", "/")
]
# name -> the template's file (none: SmolLM2's own), special tokens, other added ones, the tokens
# that end a turn, of which the template writes the first.
KINDS = {
    "smollm2": ("", CHATML, [], ["<|im_end|>"]),
    "qwen2_5": ("qwen2_5", CHATML, XML[:2], ["<|im_end|>", "<|endoftext|>"]),
    "qwen3": ("qwen3", CHATML, XML, ["<|im_end|>", "<|endoftext|>"]),
    "qwen3_5": ("qwen3_5_think", CHATML, XML, ["<|im_end|>", "<|endoftext|>"]),
    "llama3_1": ("llama3_1", LLAMA, [], ["<|eot_id|>", "<|eom_id|>"]),
    "llama3_2": ("llama3_2", LLAMA, [], ["<|eot_id|>", "<|eom_id|>"]),
}
# How a model writes a call of `echo` with a text x, which holds nothing that JSON escapes.
CALLS = {
    "smollm2": '<tool_call>{"name": "echo", "arguments": {"x": "%s"}}</tool_call>',
    "qwen3_5": "<tool_call>\n<function=echo>\n<parameter=x>\n%s\n</parameter>\n</function>\n"
    "</tool_call>",
    "llama3_1": '{"name": "echo", "parameters": {"x": "%s"}}',
}
CALLS |= {"qwen2_5": CALLS["smollm2"], "qwen3": CALLS["smollm2"], "llama3_2": CALLS["llama3_1"]}


def template(file: str) -> str:
    """The text of one of TRL's templates; TRL itself is not imported."""
    folder = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"
    return (folder / f"{file}.jinja").read_text()


def smollm2_template() -> str:
    return AutoTokenizer.from_pretrained(fetch_demo_model()).chat_template


@functools.cache
def tokenizer_of(kind: str, base: str = "tiny"):
    """The tiny tokenizer or SmolLM2's with a template and the tokens that it needs; not to be
    changed.
    """
    file, special, plain, ends = KINDS[kind]
    if base == "tiny":
        tokenizer = tiny_tokenizer()
    else:
        tokenizer = AutoTokenizer.from_pretrained(fetch_demo_model())
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in plain])
    tokenizer.bos_token, tokenizer.eos_token = special[0], ends[0]
    tokenizer.chat_template = template(file) if file else smollm2_template()
    return tokenizer


def end_ids_of(kind: str, base: str = "tiny") -> list[int]:
    return tokenizer_of(kind, base).convert_tokens_to_ids(KINDS[kind][3])
