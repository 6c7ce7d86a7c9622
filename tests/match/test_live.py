"""Live modules: kinds settle what files leave open, and forbid what names suggest."""

from __future__ import annotations

from typing import Any

import pytest

from graftax.match import infer
from graftax.plans import Proposal

torch = pytest.importorskip("torch")


def _ends(module: Any, model: Any, *inputs: Any) -> tuple[Any, Any]:
    import graftax as gx
    from graftax.execute.opening import open_tree

    return open_tree(module), open_tree(gx.linen(model, *inputs))


def _ops(found: Proposal, target: str) -> list[str]:
    (entry,) = [entry for entry in found.entries if target in entry.targets]
    return [op.text for op in entry.ops]


@pytest.mark.parametrize("kernel", [False, True], ids=["default", "transpose_kernel"])
def test_a_square_transposed_convolution_is_settled_by_its_setting(kernel: bool) -> None:
    import flax.linen as nn
    import jax.numpy as jnp

    class Up(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.ConvTranspose(4, (2, 2), transpose_kernel=kernel, name="up")(x)

    class Torch(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = torch.nn.ConvTranspose2d(4, 4, 2)

    found = infer(*_ends(Torch(), Up(), jnp.zeros((1, 4, 4, 4))), "torch", "flax", Proposal())
    assert not found.questions
    assert ("flip axes 0,1" in _ops(found, "params/up/kernel")) is not kernel


def test_a_transposed_convolution_against_a_file_is_asked_about() -> None:
    """No file shows whether Flax flips the kernel, whatever the layer is called."""
    import numpy as np

    import graftax as gx

    net = torch.nn.ModuleDict({"a": torch.nn.ConvTranspose2d(4, 4, 3), "b": torch.nn.Conv2d(3, 4, 3)})
    tree = {"a": (3, 3, 4, 4), "b": (3, 3, 3, 4)}
    like = {
        "params": {name: {"kernel": np.zeros(shape, "f4"), "bias": np.zeros(4, "f4")} for name, shape in tree.items()}
    }
    (question,) = gx.plan(net, like).questions
    assert [one.rule.partition("layout = ")[2] for one in question.candidates] == [
        '"conv_transpose" }', '"conv_transpose default" }'
    ]  # fmt: skip


def test_recurrent_layers_and_attention_are_connected_whole() -> None:
    import flax.linen as nn
    import jax.numpy as jnp

    class Flax(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.MultiHeadDotProductAttention(2, name="mha")(x, x)
            return nn.RNN(nn.OptimizedLSTMCell(8), name="lstm")(x)

    class Torch(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha = torch.nn.MultiheadAttention(8, 2)
            self.lstm = torch.nn.LSTM(8, 8)

    import graftax as gx

    plan = gx.plan(Torch(), gx.linen(Flax(), jnp.zeros((1, 3, 8))))
    assert plan.complete, str(plan)
    assert {name for entry in plan.entries for name in entry.sources} == set(plan.source.specs)


def test_kinds_that_cannot_be_one_are_never_paired() -> None:
    """An Embedding and a Dense of one name and one shape are two things."""
    import flax.linen as nn
    import jax.numpy as jnp

    class Flax(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Dense(6, use_bias=False, name="table")(x)

    class Torch(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(6, 6)

    found = infer(*_ends(Torch(), Flax(), jnp.zeros((1, 6))), "torch", "flax", Proposal())
    assert not found.entries
    assert found.questions


# ---------------------------------------------------------------- the order of calls


def _linen(call: Any, *shape: int) -> Any:
    import flax.linen as nn
    import jax

    import graftax as gx

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return call(nn, x)

    return gx.linen(Model(), jax.ShapeDtypeStruct(shape, "float32"))


def _two(forward: Any, names: tuple[str, str] = ("fc1", "fc2")) -> Any:
    class Torch(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in names:
                setattr(self, name, torch.nn.Linear(8, 8))

        def forward(self, x: Any) -> Any:
            return forward(self, x)

    return Torch()


def _inner_first(nn: Any, x: Any) -> Any:
    return nn.Dense(8)(nn.relu(nn.Dense(8)(x)))


def _outputs(module: Any, like: Any, x: Any) -> tuple[Any, Any]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    import graftax as gx

    with jax.default_matmul_precision("highest"):
        made = like.module.apply(gx.port(module, like), jnp.asarray(x))
    given = torch.from_numpy(np.ascontiguousarray(x))
    there = module(given if x.ndim == 2 else given.permute(0, x.ndim - 1, *range(1, x.ndim - 1)))
    return np.asarray(made), there.detach().numpy()


def _same_outputs(module: Any, like: Any, *shape: int) -> None:
    import numpy as np

    here, there = _outputs(module.eval(), like, np.random.default_rng(0).standard_normal(shape).astype("f4"))
    np.testing.assert_allclose(here, there, rtol=1e-5, atol=1e-6)


def _orders(plan: Any) -> list[str]:
    return [str(a) for a in plan.assumptions if a.text.startswith("call order")]


def test_layers_that_are_constructed_inside_out_are_ported_in_the_order_of_calls() -> None:
    """`nn.Dense(8)(nn.relu(nn.Dense(8)(x)))`: Dense_0 is the outer one."""
    import graftax as gx

    module = _two(lambda m, x: m.fc2(torch.relu(m.fc1(x))))
    like = _linen(_inner_first, 1, 8)
    for source, traced in ((module, True), (module.state_dict(), False)):
        plan = gx.plan(source, like, inputs=False)
        assert plan.complete, str(plan)
        assert ["but torch's are not" in said for said in map(str, plan.assumptions)] == ([] if traced else [True])
        (entry,) = [entry for entry in plan.entries if entry.sources == ("fc1.weight",)]
        assert entry.targets == ("params/Dense_1/kernel",)
        assert any("the calls are traced" in why for why in entry.evidence)
    _same_outputs(module, like, 3, 8)
    back = gx.plan(like, module)
    assert {e.sources for e in back.entries if e.targets == ("fc1.bias",)} == {("params/Dense_1/bias",)}


def test_files_alone_say_that_a_counter_is_no_order_of_calls() -> None:
    import jax

    import graftax as gx
    from graftax.execute.opening import open_tree

    names = open_tree(_linen(_inner_first, 1, 8))
    tree: dict[str, Any] = {"params": {}}
    for path, spec in names.items():
        _, module, leaf = path.split("/")
        tree["params"].setdefault(module, {})[leaf] = jax.ShapeDtypeStruct(spec.shape, spec.dtype)
    (said,) = _orders(gx.plan(_two(None).state_dict(), tree))
    assert "Dense(8)(Dense(8)(x))" in said
    assert "gx.linen" in said


def test_blocks_that_are_constructed_inside_out() -> None:
    import flax.linen as nn
    import jax

    import graftax as gx

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return x + nn.Dense(8, name="b")(nn.relu(nn.Dense(8, name="a")(x)))

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return Block()(Block()(Block()(x)))

    class Part(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

        def forward(self, x: Any) -> Any:
            return x + self.b(torch.relu(self.a(x)))

    module = torch.nn.Sequential(Part(), Part(), Part())
    like = gx.linen(Model(), jax.ShapeDtypeStruct((1, 8), "float32"))
    plan = gx.plan(module, like)
    assert {e.targets for e in plan.entries if e.sources == ("0.a.weight",)} == {("params/Block_2/a/kernel",)}
    assert not _orders(plan)
    _same_outputs(module, like, 3, 8)
    names = [f"params/Block_{n}/{k}/{leaf}" for n in range(3) for k in "ab" for leaf in ("kernel", "bias")]
    tree: dict[str, Any] = {"params": {}}
    for name in names:
        _, block, layer, leaf = name.split("/")
        shape = (8, 8) if leaf == "kernel" else (8,)
        tree["params"].setdefault(block, {}).setdefault(layer, {})[leaf] = jax.ShapeDtypeStruct(shape, "float32")
    (said,) = _orders(gx.plan(module.state_dict(), tree))
    assert "the numbers of params/Block_{0..2} count constructions" in said


def test_torch_that_is_live_is_traced_too() -> None:
    import graftax as gx

    like = _linen(_inner_first, 1, 8)
    control = _two(lambda m, x: m.fc2(m.fc1(x)) if x.sum() > 0 else x)
    (said,) = _orders(gx.plan(control, like))
    assert "but torch's are not" in said
    backwards = _two(lambda m, x: m.fc1(torch.relu(m.fc2(x))))  # its numbers are not the order of calls
    plan = gx.plan(backwards, like)
    assert not _orders(plan)
    assert {e.targets for e in plan.entries if e.sources == ("fc2.weight",)} == {("params/Dense_1/kernel",)}
    _same_outputs(backwards, like, 3, 8)


def test_a_counter_that_decides_nothing_is_no_assumption() -> None:
    """One module of its kind cannot be out of order; nor can those that their shapes tell apart."""
    import jax

    import graftax as gx

    def tree(**kernels: tuple[int, ...]) -> Any:
        return {"params": {k: {"kernel": jax.ShapeDtypeStruct(s, "float32")} for k, s in kernels.items()}}

    state = {"fc1.weight": torch.zeros(5, 3), "fc2.weight": torch.zeros(7, 5)}
    assert not _orders(gx.plan(state, tree(Dense_0=(3, 5), Dense_1=(5, 7))))
    table = {"Embed_0": {"embedding": jax.ShapeDtypeStruct((9, 4), "float32")}}
    assert not _orders(gx.plan({"embed.weight": torch.zeros(9, 4)}, {"params": table}))
    square = {"fc1.weight": torch.zeros(4, 4), "fc2.weight": torch.zeros(4, 4), "out.weight": torch.zeros(3, 4)}
    assert _orders(gx.plan(square, tree(Dense_0=(4, 4), Dense_1=(4, 4), out=(4, 3))))


# ---------------------------------------------------------------- flattened maps


def _net(flatten: Any, width: int = 32 * 12) -> Any:
    class Torch(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = torch.nn.Conv2d(3, 16, 3), torch.nn.Conv2d(16, 32, 3)
            self.norm, self.fc1, self.fc2 = (
                torch.nn.LayerNorm(width),
                torch.nn.Linear(width, 20),
                torch.nn.Linear(20, 5),
            )
            torch.nn.init.normal_(self.norm.weight)
            torch.nn.init.normal_(self.norm.bias)

        def forward(self, x: Any) -> Any:
            x = torch.max_pool2d(torch.relu(self.conv1(x)), 2)
            x = torch.nn.functional.max_pool2d(torch.relu(self.conv2(x)), 2)
            return self.fc2(torch.relu(self.fc1(self.norm(flatten(x)))))

    return Torch()


def _flat(first: bool = False) -> Any:
    def call(nn: Any, x: Any) -> Any:
        for features in (16, 32):
            x = nn.relu(nn.Conv(features, (3, 3), padding="VALID")(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = (x.transpose(0, 3, 1, 2) if first else x).reshape((x.shape[0], -1))
        return nn.Dense(5)(nn.relu(nn.Dense(20)(nn.LayerNorm(epsilon=1e-5)(x))))

    return _linen(call, 1, 18, 22, 3)


@pytest.mark.parametrize("first", [False, True], ids=["linen as it is", "linen channels first"])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (0, 3, 2, 1)], ids=["C H W", "H W C", "W H C"])
def test_a_flatten_is_traced_in_both_models(order: tuple[int, ...], first: bool) -> None:
    import graftax as gx

    module, like = _net(lambda x: x.permute(*order).flatten(1)), _flat(first)
    plan = gx.plan(module, like, inputs=False)
    assert plan.complete, str(plan)
    (entry,) = [entry for entry in plan.entries if entry.sources == ("fc1.weight",)]
    assert any(why.startswith("traced") for why in entry.evidence)
    _same_outputs(module, like, 2, 18, 22, 3)
    assert gx.plan(like, module).complete


def test_a_flatten_that_one_trace_shows_is_asked_with_its_lengths() -> None:
    import graftax as gx

    plan = gx.plan(_net(lambda x: x.flatten(1)).state_dict(), _flat())
    (question,) = [q for q in plan.questions if "params/Dense_1/kernel" in q.targets]
    assert question.kind == "flatten"
    assert "C=32 H=3 W=4" in question.candidates[0].rule
    hidden = _net(lambda x: x.flatten(1) if x.sum() > 0 else x)
    assert gx.plan(hidden, _flat()).questions


def test_maps_of_another_size_in_the_two_models_are_asked_about() -> None:
    """The example input makes a map of 3 x 4, and the adaptive pool of torch one of 4 x 3."""
    import graftax as gx

    module = _net(lambda x: torch.nn.functional.adaptive_avg_pool2d(x, (4, 3)).flatten(1))
    assert any(question.kind == "flatten" for question in gx.plan(module, _flat()).questions)


def test_channels_that_are_averaged_are_no_map() -> None:
    """As wide as 32 channels of two positions, but the trace shows 64 channels."""
    import graftax as gx

    class Torch(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Conv2d(3, 64, 3), torch.nn.Conv2d(64, 32, 3)
            self.c, self.fc = torch.nn.Conv2d(3, 64, 3), torch.nn.Linear(64, 5)

        def forward(self, x: Any) -> Any:
            return self.fc(self.c(x).mean((2, 3))) + self.b(self.a(x)).mean()

    def call(nn: Any, x: Any) -> Any:
        y = nn.Conv(64, (3, 3), padding="VALID", name="c")(x).mean((1, 2))
        z = nn.Conv(32, (3, 3), padding="VALID", name="b")(nn.Conv(64, (3, 3), padding="VALID", name="a")(x))
        return nn.Dense(5, name="fc")(y) + z.mean()

    assert gx.plan(Torch().state_dict(), _linen(call, 1, 9, 9, 3)).complete
    assert gx.plan(Torch(), _linen(call, 1, 9, 9, 3)).complete


def test_a_map_that_a_matrix_makes_is_traced_too() -> None:
    import graftax as gx

    class Torch(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.bn = torch.nn.Linear(20, 96), torch.nn.LayerNorm(96)
            self.conv = torch.nn.Conv2d(8, 3, 3, padding=1)
            torch.nn.init.normal_(self.bn.weight)

        def forward(self, z: Any) -> Any:
            return self.conv(torch.relu(self.bn(self.fc(z))).view(-1, 8, 4, 3)).permute(0, 2, 3, 1)

    def call(nn: Any, z: Any) -> Any:
        x = nn.relu(nn.LayerNorm(epsilon=1e-5, name="bn")(nn.Dense(96, name="fc")(z)))
        return nn.Conv(3, (3, 3), name="conv")(x.reshape(-1, 4, 3, 8))

    module, like = Torch(), _linen(call, 1, 20)
    plan = gx.plan(module, like)
    assert plan.complete, str(plan)
    _same_outputs(module, like, 2, 20)


@pytest.mark.parametrize("around", [False, True], ids=["alone", "in a model"])
def test_no_kind_of_module_says_how_fused_parts_lie(around: bool) -> None:
    """A live Linear of queries, keys and values against a live DenseGeneral of (heads, 3 x head_dim)."""
    import flax.linen as nn
    import jax

    import graftax as gx

    class Flax(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.DenseGeneral((2, 12), use_bias=False, name="qkv")(x)
            return nn.Dense(5, use_bias=False, name="out")(x.reshape(*x.shape[:-2], 24)) if around else x

    module = torch.nn.Module()
    module.qkv = torch.nn.Linear(8, 24, bias=False)
    if around:
        module.out = torch.nn.Linear(24, 5, bias=False)
    plan = gx.plan(module, gx.linen(Flax(), jax.ShapeDtypeStruct((1, 8), "float32")))
    assert [question.targets for question in plan.questions] == [("params/qkv/kernel",)]
    assert len(plan.questions[0].candidates) > 1
