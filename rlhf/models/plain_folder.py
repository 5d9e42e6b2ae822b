"""Write a model that was built in code as a plain Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_NAME

from rlhf.system.quiet import quiet_transformers


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a plain float32 model folder, on a process of any rank.

    transformers' own save_pretrained writes nothing on any rank but the first of a process group, and the first rank
    may be waiting for this one to build.
    """
    # Each tied weight once. The architectures that are built here have no buffers to save.
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    model.config.architectures = [type(model).__name__]
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    with quiet_transformers():
        save_file(weights, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
