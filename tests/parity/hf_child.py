"""Runs inside the environment of scripts/hf_env.py: gx.check_parity on pairs of transformers, from small configurations
with random weights. Prints one JSON object: {case: findings}.

    python hf_child.py [CASE ...]
"""

from __future__ import annotations

import copy
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
warnings.filterwarnings("ignore")

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from transformers.models.bert.modeling_flax_bert import FlaxBertForMaskedLMModule  # noqa: E402
from transformers.models.clip.modeling_flax_clip import FlaxCLIPModule  # noqa: E402
from transformers.models.gpt2.modeling_flax_gpt2 import FlaxGPT2LMHeadModule  # noqa: E402
from transformers.models.llama.modeling_flax_llama import FlaxLlamaForCausalLMModule  # noqa: E402
from transformers.models.t5.modeling_flax_t5 import FlaxT5ForConditionalGenerationModule  # noqa: E402
from transformers.models.vit.modeling_flax_vit import FlaxViTForImageClassificationModule  # noqa: E402
from transformers.models.wav2vec2.modeling_flax_wav2vec2 import FlaxWav2Vec2Module  # noqa: E402

import graftax as gx  # noqa: E402
from graftax.execute.opening import open_tree  # noqa: E402

transformers.logging.set_verbosity_error()
CLIP = jnp.clip
# T5's relative positions call jnp.clip with argument names that jax has dropped since.
jnp.clip = lambda x, min=None, max=None, a_min=None, a_max=None: CLIP(
    x, min if a_min is None else a_min, max if a_max is None else a_max
)
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """A pair. torch, flax: its classes; inputs: keyword arguments of both sides, NumPy, images NCHW; pick: the outputs
    that are compared; square: the leaf that is left untransposed; faults: (what, change of the configuration, whether
    the first layer is a 'norm' or comes 'in' to one); flax_only: arguments that only Flax needs."""

    torch: Callable[[Any], torch.nn.Module]
    flax: Any
    config: Any
    inputs: dict[str, np.ndarray]
    pick: tuple[str, ...]
    square: str
    faults: tuple[tuple[str, Callable[[Any], None]], ...]
    flax_only: dict[str, np.ndarray]
    rules: str | None = None


def change(name: str, value: Any, *parts: str) -> Callable[[Any], None]:
    """The change of one setting of a configuration, or of its sub-configurations."""

    def apply(config: Any) -> None:
        for one in [getattr(config, part) for part in parts] or [config]:
            setattr(one, name, value)

    return apply


def text(rng: np.random.Generator, length: int = 9) -> tuple[np.ndarray, np.ndarray]:
    """Token ids (2, length), mask: the second text is shorter."""
    ids = rng.integers(3, 90, (2, length))
    mask = np.ones_like(ids)
    mask[1, length - 3 :] = 0
    return ids, mask


def cases() -> dict[str, Callable[[], Case]]:
    rng = np.random.default_rng(0)
    ids, mask = text(rng)
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    image = rng.normal(size=(2, 3, 32, 32)).astype(np.float32)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    words = {"vocab_size": 99, "max_position_embeddings": 40}

    def bert() -> Case:
        config = transformers.BertConfig(**size, **words)
        return Case(
            transformers.BertForMaskedLM, FlaxBertForMaskedLMModule, config,
            {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids % 2}, ("logits",),
            "params/bert/encoder/layer/1/attention/self/key/kernel",
            (("norm", change("layer_norm_eps", 1e-6)), ("in", change("hidden_act", "gelu_new"))),
            {"position_ids": positions, "head_mask": np.ones((2, 4), np.float32)},
        )  # fmt: skip

    def gpt2() -> Case:
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=40, vocab_size=99, use_cache=False)
        return Case(
            transformers.GPT2LMHeadModel, FlaxGPT2LMHeadModule, config,
            {"input_ids": ids, "attention_mask": mask, "position_ids": positions}, ("logits",),
            "params/transformer/h/1/attn/c_proj/kernel",
            (("norm", change("layer_norm_epsilon", 1e-3)), ("in", change("activation_function", "gelu"))), {},
        )  # fmt: skip

    def llama() -> Case:
        config = transformers.LlamaConfig(**size, **words, num_key_value_heads=2, use_cache=False)
        return Case(
            transformers.LlamaForCausalLM, FlaxLlamaForCausalLMModule, config,
            {"input_ids": ids, "attention_mask": mask, "position_ids": positions}, ("logits",),
            "params/model/layers/0/self_attn/o_proj/kernel",
            (("norm", change("rms_norm_eps", 1e-3)), ("in", change("hidden_act", "gelu"))), {},
        )  # fmt: skip

    def t5() -> Case:
        config = transformers.T5Config(
            d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=99, use_cache=False,
            relative_attention_num_buckets=8, relative_attention_max_distance=16,
        )  # fmt: skip
        inputs = {
            "input_ids": ids,
            "attention_mask": mask,
            "decoder_input_ids": ids[:, :5],
            "decoder_attention_mask": mask[:, :5],
        }
        return Case(
            transformers.T5ForConditionalGeneration, FlaxT5ForConditionalGenerationModule, config, inputs, ("logits",),
            "params/decoder/block/1/layer/1/EncDecAttention/q/kernel",
            (("norm", change("layer_norm_epsilon", 1e-3)), ("in", change("dense_act_fn", "gelu"))), {},
        )  # fmt: skip

    def vit() -> Case:
        config = transformers.ViTConfig(**size, image_size=32, patch_size=8, num_labels=5)
        return Case(
            transformers.ViTForImageClassification, FlaxViTForImageClassificationModule, config,
            {"pixel_values": image}, ("logits",), "params/vit/encoder/layer/1/attention/attention/query/kernel",
            (("norm", change("layer_norm_eps", 1e-5)), ("in", change("hidden_act", "gelu_new"))), {},
        )  # fmt: skip

    def wav2vec2() -> Case:
        config = transformers.Wav2Vec2Config(
            **size, vocab_size=32, conv_dim=(16, 16, 16), conv_kernel=(8, 3, 3), conv_stride=(4, 2, 2),
            num_feat_extract_layers=3, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
            do_stable_layer_norm=True, feat_extract_norm="layer",
        )  # fmt: skip
        return Case(
            transformers.Wav2Vec2Model, FlaxWav2Vec2Module, config,
            {"input_values": rng.normal(size=(2, 400)).astype(np.float32)}, ("last_hidden_state",),
            "params/encoder/layers/1/attention/k_proj/kernel",
            (("norm", change("layer_norm_eps", 1e-3)), ("in", change("hidden_act", "relu"))), {},
        )  # fmt: skip

    def clip() -> Case:
        config = transformers.CLIPConfig(
            text_config={**size, **words}, vision_config={**size, "image_size": 32, "patch_size": 8}, projection_dim=16
        )
        parts = ("text_config", "vision_config")
        return Case(
            transformers.CLIPModel, FlaxCLIPModule, config,
            {"input_ids": ids, "pixel_values": image, "attention_mask": mask, "position_ids": positions},
            ("logits_per_text", "text_embeds", "image_embeds"),
            "params/text_model/encoder/layers/1/self_attn/v_proj/kernel",
            (("norm", change("layer_norm_eps", 1e-3, *parts)), ("in", change("hidden_act", "gelu", *parts))), {},
        )  # fmt: skip

    return {made.__name__: made for made in (bert, gpt2, llama, t5, vit, wav2vec2, clip)}


# ---------------------------------------------------------------- one pair


class ModulePair:
    """A torch model with random weights, and what gx.check_parity is called with."""

    def __init__(self, case: Case) -> None:
        self.case = case
        torch.manual_seed(0)
        self.torch = case.torch(copy.deepcopy(case.config)).eval()
        with torch.no_grad():
            for name, value in self.torch.named_parameters():
                if value.ndim < 2:
                    value.copy_(torch.randn(value.shape) * 0.1 + name.endswith(("weight", "original0")))
                elif "embed" not in name:
                    fan_in = value[0].numel() if "Conv1D" not in name else value.shape[0]
                    value.copy_(torch.randn(value.shape) * max(fan_in, 1) ** -0.5)
        flax = {**case.inputs, **case.flax_only}
        flax = {name: jnp.asarray(channels_last(value)) for name, value in flax.items()}
        sides = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in case.inputs.items()}
        self.inputs = gx.Inputs(torch=((), sides), flax=((), flax), torch_call=self.picked, flax_call=self.picked)
        self.flax_inputs = flax

    def picked(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        out = module(*args, **kwargs, return_dict=True)
        return {name: out[name] for name in self.case.pick}

    def like(self, config: Any = None) -> Any:
        return gx.linen(self.case.flax(copy.deepcopy(config or self.case.config)), **self.flax_inputs)

    def check(self, like: Any, weights: Any = None) -> Any:
        return gx.check_parity(self.torch, like, self.inputs, weights, rules=self.case.rules)


def channels_last(value: np.ndarray) -> np.ndarray:
    return value.transpose(0, 2, 3, 1) if value.ndim == 4 else value


def findings(case: Case) -> dict[str, Any]:
    start = time.perf_counter()
    pair = ModulePair(case)
    like = pair.like()
    weights = gx.port(pair.torch, like, rules=case.rules, unused="drop")
    report = pair.check(like, weights)
    own = {
        name.partition(".parametrizations.")[0]
        for name, module in pair.torch.named_modules()
        if list(module.parameters(recurse=False))
    }
    rows = {row.site_torch.path for row in report.layers if row.status != "not compared"}
    out: dict[str, Any] = {
        "ok": report.ok,
        "first": None if report.first is None else str(report.first.site_flax),
        "ratio": max(row.ratio for row in report.outputs),
        "worst": max([max(r.in_ratio or 0.0, r.out_ratio or 0.0) for r in report.layers], default=None),
        "layers": len(report.layers),
        "weights": [row.path for row in report.weights],
        "settings": [f"{row.flax} {row.setting}" for row in report.settings if row.severity == "error"],
        "parametrised": len(own),
        "unpaired": sorted(own - rows),
        "not_traced": dict(report.not_traced),
        "faults": [],
        "seconds": [round(time.perf_counter() - start, 1)],
    }
    for what, apply in (("weights", None), *case.faults):
        start = time.perf_counter()
        config = copy.deepcopy(case.config)
        changed = weights
        if apply is None:
            changed = untransposed(like, weights, case.square)
        else:
            apply(config)
        out["faults"].append({"what": what, **fault(case, what, pair.check(pair.like(config), changed))})
        out["seconds"].append(round(time.perf_counter() - start, 1))
    return out


def untransposed(like: Any, weights: Any, path: str) -> Any:
    tree = open_tree(weights)
    arrays = {name: np.asarray(tree.read(name)) for name in tree}
    assert arrays[path].shape[0] == arrays[path].shape[1], path
    arrays[path] = arrays[path].T.copy()
    return open_tree(like).live.rebuild({name: jnp.asarray(array) for name, array in arrays.items()})


def fault(case: Case, what: str, report: Any) -> dict[str, Any]:
    """Whether a fault was found where it is."""
    first = report.first
    path = None if first is None else first.site_flax.path
    right = (
        first is not None
        and {
            "weights": path == case.square.removeprefix("params/").rpartition("/")[0],
            "norm": report.where == "out" and "orm" in first.kind,
            "in": report.where == "in" or not first.pair.leaf,  # behind the function, or the container it stands in
        }[what]
    )
    causes = [cause.name for cause in report.causes]
    return {
        "found": not report.ok and bool(right),
        "ok": report.ok,
        "first": path,
        "where": report.where,
        "causes": causes,
    }


def main() -> None:
    known = cases()
    asked = sys.argv[1:] or list(known)
    print(json.dumps({name: findings(known[name]()) for name in asked}, indent=1))


if __name__ == "__main__":
    main()
