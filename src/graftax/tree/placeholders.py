"""Empty tensors that stand for weights in other files, as DeepSpeed's ZeRO stage 3 leaves them in a state_dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graftax.errors import Failure, FormatError


def refuse_placeholders(tensors: Mapping[str, Any], label: str, sharded: bool = False) -> None:
    """FormatError if the tensors are placeholders: float32[0] and the like, with one axis only. `sharded`: the file
    says that DeepSpeed wrote it, so one placeholder is enough. Otherwise every floating tensor must be one, and a
    single tensor is taken as it is."""
    empty = [name for name, tensor in tensors.items() if tuple(tensor.shape) == (0,) and "float" in tensor.dtype]
    floating = [name for name, tensor in tensors.items() if "float" in tensor.dtype]
    if not empty or not (sharded or (len(empty) == len(floating) and len(empty) > 1)):
        return
    raise FormatError(
        f"{label} holds empty tensors in place of {len(empty)} of its {len(tensors)} weights: DeepSpeed ZeRO stage 3 "
        "keeps the values in other files",
        [Failure("an empty placeholder", label, name, found=f"{tensors[name].dtype}[0]") for name in empty],
        next="Gather them where the run is: `python zero_to_fp32.py RUN_FOLDER OUT` (DeepSpeed puts the script into "
        "the run's folder), or save with stage3_gather_16bit_weights_on_model_save; then port that file.",
    )
