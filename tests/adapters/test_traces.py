"""What traces show without inputs or values: the order of calls, and in which order a map is flattened."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
F = torch.nn.functional
tnn = torch.nn
MAP = (("c", 32), ("h", None), ("w", None))


def columns(forward: Any, width: int = 288) -> Any:
    """What the trace says of `fc`, in a model of two convolutions."""
    from graftax.adapters.torch_trace import trace_module

    class Model(tnn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = tnn.Conv2d(3, 16, 3), tnn.Conv2d(16, 32, 3)
            self.bn, self.pool, self.fc = tnn.BatchNorm2d(32), tnn.AdaptiveAvgPool2d((3, 3)), tnn.Linear(width, 5)

        def forward(self, x: Any) -> Any:
            return self.fc(forward(self, self.conv2(F.relu(self.conv1(x)))))

    return trace_module(Model()).columns.get("fc.weight")


def unpacked(model: Any, x: Any) -> Any:
    n, c, h, w = x.shape
    return x.reshape(n, c * h * w)


def control(model: Any, x: Any) -> Any:
    return x.flatten(1) if x.sum() > 0 else x.permute(0, 2, 3, 1).flatten(1)


WAYS: dict[str, tuple[Any, Any]] = {
    "view": (lambda m, x: x.view(x.size(0), -1), MAP),
    "view of a width": (lambda m, x: F.max_pool2d(x, 2).view(-1, 288), MAP),
    "shape": (lambda m, x: x.reshape(x.shape[0], -1), MAP),
    "unpacked": (unpacked, MAP),
    "flatten": (lambda m, x: torch.flatten(F.relu(m.bn(x)), 1), MAP),
    "residual": (lambda m, x: (x + F.gelu(x) * 2).flatten(1), MAP),
    "pooled": (lambda m, x: m.pool(x).flatten(1), (("c", 32), ("h", 3), ("w", 3))),
    "permuted": (lambda m, x: x.permute(0, 3, 2, 1).contiguous().view(-1, 288), (MAP[2], MAP[1], MAP[0])),
    "transposed": (lambda m, x: x.transpose(1, 3).flatten(1), (MAP[2], MAP[1], MAP[0])),
    "channels last": (lambda m, x: x.permute(0, 2, 3, 1).flatten(1), (MAP[1], MAP[2], MAP[0])),
    "averaged": (lambda m, x: x.mean([2, 3]), (("c", 32),)),
    "averaged, kept": (lambda m, x: x.mean((2, 3), keepdim=True).flatten(1), (("c", 32),)),
    "squeezed": (lambda m, x: F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1), (("c", 32),)),
    "side by side": (lambda m, x: torch.cat([x, x], 1).flatten(1), (("c", 64), ("h", None), ("w", None))),
    "control flow": (control, None),
    "shuffled": (lambda m, x: x.view(x.size(0), 2, 16, 9).transpose(1, 2).flatten(1), None),
    "batch flattened too": (lambda m, x: x.flatten(), None),
    "sorted": (lambda m, x: torch.sort(x, 1)[0].flatten(1), None),
}


@pytest.mark.parametrize("way", WAYS)
def test_how_torch_flattens(way: str) -> None:
    forward, axes = WAYS[way]
    assert columns(forward) == axes


def test_a_trace_leaves_the_module_alone(capsys: pytest.CaptureFixture[str]) -> None:
    from graftax.adapters.torch_trace import trace_module

    class Model(tnn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = tnn.Linear(4, 4)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Any) -> Any:
            print("called")
            self.last = self.fc(x)
            self.calls += 1
            return self.last

    model = Model()
    calls: list[Any] = []
    model.fc.register_forward_hook(lambda *a: calls.append(a))
    trace = trace_module(model)
    assert trace.order == {"fc": 0}
    assert not hasattr(model, "last")
    assert not calls
    assert float(model.calls) == 0
    assert capsys.readouterr().out == ""


def test_a_sequential_shows_its_own_part_where_the_rest_cannot_be_followed() -> None:
    from graftax.adapters.torch_trace import trace_module

    class Model(tnn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = tnn.Sequential(tnn.Conv2d(3, 8, 3), tnn.AdaptiveMaxPool2d(4), tnn.Flatten(), tnn.Linear(128, 7))
            self.head = tnn.Sequential(tnn.Flatten(), tnn.Linear(7, 3))

        def forward(self, x: Any) -> Any:
            return self.head(self.net(x)) if float(x.sum()) > 0 else x

    trace = trace_module(Model())
    assert trace.columns["net.3.weight"] == (("c", 8), ("h", 4), ("w", 4))
    assert "head.1.weight" not in trace.columns
    assert trace.order["net.0"] < trace.order["net.3"]
    assert "net" not in trace.order  # which part comes first is not known


def test_a_decoder_of_torch_makes_its_map_of_rows() -> None:
    from graftax.adapters.torch_trace import trace_module

    class Model(tnn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.bn, self.up = tnn.Linear(20, 128), tnn.BatchNorm1d(128), tnn.ConvTranspose2d(8, 3, 3)

        def forward(self, z: Any) -> Any:
            return self.up(self.bn(self.fc(z)).view(-1, 8, 4, 4))

    rows = trace_module(Model()).rows
    axes = (("c", 8), ("h", 4), ("w", 4))
    assert {rows[name] for name in ("fc.weight", "fc.bias", "bn.weight", "bn.running_mean")} == {axes}


# ---------------------------------------------------------------- Linen


def linen_trace(call: Any, shape: tuple[int, ...]) -> Any:
    import flax.linen as nn
    import jax

    import graftax as gx
    from graftax.execute.opening import open_tree

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: Any, train: bool = True) -> Any:
            return call(nn, x, train)

    end = open_tree(gx.linen(Model(), jax.ShapeDtypeStruct(shape, "float32")))
    assert end.live.trace is not None
    return end.live.trace()


def body(nn: Any, x: Any, train: bool) -> Any:
    x = nn.max_pool(nn.relu(nn.Conv(16, (3, 3), padding="VALID")(x)), (2, 2), strides=(2, 2))
    x = nn.GroupNorm(8)(nn.gelu(nn.BatchNorm(use_running_average=not train)(nn.Conv(32, (3, 3))(x))))
    return nn.avg_pool(x, (2, 2), strides=(2, 2))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("first", [False, True])
def test_how_linen_flattens(first: bool, batch: int) -> None:
    def call(nn: Any, x: Any, train: bool) -> Any:
        x = body(nn, x, train)
        x = (x.transpose(0, 3, 1, 2) if first else x).reshape((x.shape[0], -1))
        x = nn.Dropout(0.5, deterministic=not train)(nn.LayerNorm()(x))
        return nn.Dense(5)(nn.relu(nn.Dense(20, name="fc")(x)))

    trace = linen_trace(call, (batch, 14, 18, 3))
    axes = (("c", 32), ("h", 3), ("w", 4)) if first else (("h", 3), ("w", 4), ("c", 32))
    assert trace.columns["params/fc/kernel"] == axes
    assert trace.rows["params/LayerNorm_0/scale"] == trace.rows["params/LayerNorm_0/bias"] == axes
    assert trace.columns["params/Dense_0/kernel"] == (("x", 20),)


def test_linen_pooling_leaves_channels_alone() -> None:
    trace = linen_trace(lambda nn, x, train: nn.Dense(5)(body(nn, x, train).mean((1, 2))), (2, 14, 14, 3))
    assert trace.columns["params/Dense_0/kernel"] == (("c", 32),)


def test_a_decoder_of_linen_makes_its_map_of_rows() -> None:
    def call(nn: Any, z: Any, train: bool) -> Any:
        return nn.ConvTranspose(3, (3, 3))(nn.LayerNorm()(nn.Dense(128)(z)).reshape(-1, 4, 4, 8))

    rows = linen_trace(call, (2, 20)).rows
    axes = (("h", 4), ("w", 4), ("c", 8))
    assert {rows[f"params/{n}"] for n in ("Dense_0/kernel", "Dense_0/bias", "LayerNorm_0/scale")} == {axes}


def test_what_is_reversed_is_not_known() -> None:
    trace = linen_trace(lambda nn, x, train: nn.Dense(5)(x.reshape((x.shape[0], -1))[:, ::-1]), (2, 4, 4, 3))
    assert not trace.columns
