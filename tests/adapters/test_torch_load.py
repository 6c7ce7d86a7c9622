"""A torch Module takes weights through its own load_state_dict, whatever its state_dict gives: either its output is the
right one, or an error is raised and nothing has changed."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import graftax as gx
from graftax.errors import GraftaxError, PlanError

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.out = nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.register_buffer("offset", torch.zeros(4), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.norm(self.fc(x)))) + self.offset


class Cloned(Plain):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {key: value.detach().cpu().clone() for key, value in super().state_dict(*args, **kwargs).items()}


class NoArguments(Plain):
    def state_dict(self) -> Any:  # type: ignore[override]
        return OrderedDict((key, value.clone()) for key, value in super().state_dict().items())

    def load_state_dict(self, state: Any) -> Any:  # type: ignore[override]
        return super().load_state_dict(state)


class HalfOfThem(Plain):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        return {key: value.clone() if "running" in key else value for key, value in state.items()}


class Frozen(Plain):
    """Leaves a part out of what it saves."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        return OrderedDict((key, value.clone()) for key, value in state.items() if not key.startswith("norm."))


class Doubled(Plain):
    """Saves twice its weights, and halves what it loads."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        return OrderedDict((key, value * 2 if value.is_floating_point() else value) for key, value in state.items())

    def load_state_dict(self, state: Any, *args: Any, **kwargs: Any) -> Any:
        halves = {key: value / 2 if value.is_floating_point() else value for key, value in state.items()}
        return super().load_state_dict(halves, *args, **kwargs)


class DoubledOnly(Plain):
    """Saves twice its weights, and loads them as they are."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        return OrderedDict((key, value * 2 if value.is_floating_point() else value) for key, value in state.items())


class Turned(Plain):
    """Saves a square matrix transposed, and loads it as it is."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        return OrderedDict((key, value.T if key == "out.weight" else value) for key, value in state.items())


class Deaf(Plain):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return OrderedDict((key, value.clone()) for key, value in super().state_dict(*args, **kwargs).items())

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return None


class Breaks(Plain):
    """Fails when all of it is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_post_hook(self.check)

    @staticmethod
    def check(module: Any, keys: Any) -> None:
        module.note = "loaded"
        raise ValueError("a checkpoint of another version")


class Cached(Plain):
    """Computes with what a hook derives from the weights when they are loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = self.out.weight.detach() * 2
        self.register_load_state_dict_post_hook(self.fuse)

    @staticmethod
    def fuse(module: Any, keys: Any) -> None:
        module.fused = module.out.weight.detach() * 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(torch.relu(self.norm(self.fc(x))), self.fused, self.out.bias)


class Wrapper(nn.Module):
    """Saves its model as if it were the model."""

    def __init__(self) -> None:
        super().__init__()
        self.module = Plain()

        def strip(module: Any, state: Any, prefix: str, meta: Any) -> None:
            for key in list(state):
                state[key.removeprefix("module.")] = state.pop(key)

        self.register_state_dict_post_hook(strip)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)


class Assigned(Plain):
    """Puts new Parameters into place."""

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict(state, strict=strict, assign=True)


def hooked(hook: Callable[[Any], Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        net = Plain()
        net.register_state_dict_post_hook(lambda module, state, prefix, meta: hook(state))
        return net

    return make


def renamed(change: Callable[[str], str], back: Callable[[str], str] | None = None) -> Callable[[], nn.Module]:
    """A wrapper whose hook renames what is saved; and, with `back`, what is loaded."""

    def make() -> nn.Module:
        net = Plain()

        def saved(module: Any, state: Any, prefix: str, meta: Any) -> None:
            for key in list(state):
                state[f"new.{change(key)}"] = state.pop(key)
            for key in list(state):
                state[key.removeprefix("new.")] = state.pop(key)

        net.register_state_dict_post_hook(saved)
        if back is not None:

            def loaded(module: Any, state: Any, *rest: Any) -> None:
                for key in list(state):
                    state[f"new.{back(key)}"] = state.pop(key)
                for key in list(state):
                    state[key.removeprefix("new.")] = state.pop(key)

            net.register_load_state_dict_pre_hook(loaded)
        return net

    return make


def swap(key: str) -> str:
    """`fc` and `out` exchange their biases, of one shape."""
    return {"fc.bias": "out.bias", "out.bias": "fc.bias"}.get(key, key)


def rename_all(state: Any) -> None:
    for key in list(state):
        state[f"model.{key}"] = state.pop(key).clone()


def clone_all(state: Any) -> None:
    state.update({key: value.clone() for key, value in state.items()})


def views_of_one_buffer() -> nn.Module:
    """As cuDNN's flattened RNN weights, or an optimizer's flat buffer: neighbours, no overlap."""
    net = Plain()
    flat, at = torch.zeros(sum(p.numel() for p in net.parameters())), 0
    for p in net.parameters():
        p.data = flat[at : at + p.numel()].view(p.shape)
        at += p.numel()
    return net


def interleaved() -> nn.Module:
    net = Plain()
    both = torch.zeros(4, 2)
    net.fc.bias, net.out.bias = nn.Parameter(both[:, 0]), nn.Parameter(both[:, 1])
    return net


def parametrized() -> nn.Module:
    net = Plain()
    nn.utils.parametrizations.weight_norm(net.fc)
    nn.utils.parametrizations.spectral_norm(net.out)
    return net


def old_norms() -> nn.Module:
    net = Plain()
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(net.fc)
    nn.utils.spectral_norm(net.out)
    return net


RIGHT = {
    "plain": Plain,
    "override that clones": Cloned,
    "override without arguments": NoArguments,
    "some are copies": HalfOfThem,
    "a part is left out": Frozen,
    "inverse overrides": Doubled,
    "derived values": Cached,
    "assign=True": Assigned,
    "hook that clones": hooked(clone_all),
    "hook that strips a prefix": Wrapper,
    "hook that swaps two names": renamed(swap),
    "hooks that rename both ways": renamed(lambda key: f"model.{key}", lambda key: key.removeprefix("model.")),
    "hook that renames what is saved": renamed(lambda key: f"model.{key}"),
    "neighbours in one buffer": views_of_one_buffer,
    "interleaved": interleaved,
    "parametrized": parametrized,
    "old norms": old_norms,
    "torch.compile": lambda: torch.compile(Plain()),
    "DataParallel": lambda: nn.DataParallel(Plain()),
    "AveragedModel": lambda: torch.optim.swa_utils.AveragedModel(Plain()),
    "scripted": lambda: torch.jit.script(Plain()),
    "no gradients": lambda: Plain().requires_grad_(False),
}
WRONG = {
    "override without its inverse": DoubledOnly,
    "transposed view of a square": Turned,
    "load_state_dict that does nothing": Deaf,
    "hook that fails": Breaks,
    "copies under other names": hooked(rename_all),
}


def drawn(net: nn.Module, seed: int) -> dict[str, np.ndarray]:
    """What the module's own state_dict may hold."""
    rng = np.random.default_rng(seed)
    state = net.state_dict()
    return {
        key: (rng.random(tuple(value.shape)) + 0.5).astype(str(value.dtype).removeprefix("torch."))
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
    }


def everything(net: nn.Module) -> dict[str, bytes]:
    tensors = [*net.named_parameters(), *net.named_buffers(), *((k, v) for k, v in vars(net).items() if k == "fused")]
    return {name: value.detach().numpy().tobytes() for name, value in tensors}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", RIGHT)
def test_the_output_is_the_right_one(name: str) -> None:
    """The weights of a twin, filled by hand, arrive: the same output."""
    torch.manual_seed(0)
    net, twin = RIGHT[name]().eval(), RIGHT[name]().eval()
    kept = "norm." if name == "a part is left out" else "offset"  # what is not saved stays
    own, other = [[*m.named_parameters(), *m.named_buffers()] for m in (net, twin)]
    with torch.no_grad():
        for (path, value), (_, new) in zip(own, other, strict=True):
            if kept in path or "offset" in path:
                value.copy_(new)
            elif new.is_floating_point():
                new.copy_(torch.rand_like(new) + 0.5)
    if name == "derived values":
        twin.fused = twin.out.weight.detach() * 2
    source = {key: value.clone() for key, value in twin.state_dict().items() if isinstance(value, torch.Tensor)}
    held = list(net.parameters())
    assert gx.load_into(net, OrderedDict(source)) is net
    if name not in ("assign=True", "scripted"):
        assert all(a is b for a, b in zip(held, net.parameters(), strict=True))
    assert everything(net) == everything(twin)
    if name != "torch.compile":  # compiles for minutes
        with torch.no_grad():
            assert torch.equal(net(X), twin(X))


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_taken_back_is_refused_and_nothing_changes(name: str) -> None:
    net = WRONG[name]()
    before, attributes = everything(net), set(vars(net))
    with pytest.raises(GraftaxError, match="state_dict"):
        gx.load_into(net, drawn(net, 1), to="torch", rules=None)
    assert everything(net) == before
    assert set(vars(net)) == attributes


def test_the_reason_is_said() -> None:
    with pytest.raises(PlanError, match="a checkpoint of another version"):
        gx.load_into(Breaks(), drawn(Breaks(), 1))
    with pytest.raises(PlanError, match=r"fc\.weight: does not read back"):
        gx.load_into(Deaf(), drawn(Deaf(), 1))


def test_values_that_disagree_where_parameters_overlap_are_refused() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            base = torch.zeros(6, 4)
            self.a, self.b = nn.Parameter(base[:4]), nn.Parameter(base[2:])

    base = torch.arange(24.0).reshape(6, 4)
    net = gx.load_into(Views(), {"a": base[:4].clone(), "b": base[2:].clone()})
    assert torch.equal(net.a, base[:4])
    assert torch.equal(net.b, base[2:])
    with pytest.raises(PlanError, match="b: overlaps in memory with a"):
        gx.load_into(net, {"a": torch.ones(4, 4), "b": torch.full((4, 4), 2.0)})
    assert torch.equal(net.a, base[:4])
    assert torch.equal(net.b, base[2:])


def test_a_matrix_that_overlaps_itself_is_refused() -> None:
    net = nn.Module()
    net.w = nn.Parameter(torch.arange(5.0).as_strided((3, 3), (1, 1)))
    before = net.w.detach().clone()
    with pytest.raises(PlanError, match="does not read back"):
        gx.load_into(net, {"w": torch.arange(9.0).reshape(3, 3)})
    assert torch.equal(net.w, before)
    hankel = torch.tensor([[5.0, 6, 7], [6, 7, 8], [7, 8, 9]])
    assert torch.equal(gx.load_into(net, {"w": hankel}).w, hankel)


def test_modules_are_known_under_the_names_that_a_hook_gives() -> None:
    """A square Linear under another name is still a Linear: nothing is asked."""

    def make() -> nn.Module:
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

        def hook(module: Any, state: Any, prefix: str, meta: Any) -> None:
            for key in list(state):
                state[f"body.{key}"] = state.pop(key)

        net.register_state_dict_post_hook(hook)
        return net

    from graftax.execute.opening import open_tree

    modules = open_tree(make()).live.modules
    assert dict(modules["0"].leaves) == {"weight": "body.0.weight", "bias": "body.0.bias"}


def test_extra_state_stays() -> None:
    class Extra(nn.Linear):
        note: Any = None

        def get_extra_state(self) -> Any:
            return {"note": self.note}

        def set_extra_state(self, state: Any) -> None:
            self.note = state["note"]

    net = Extra(2, 2)
    net.note = "kept"
    gx.load_into(net, {"weight": torch.ones(2, 2), "bias": torch.ones(2)})
    assert net.note == "kept"
    assert (net.weight == 1).all()


def test_loading_does_not_share_memory_with_its_source() -> None:
    net, source = Assigned(), {key: torch.tensor(value) for key, value in drawn(Plain(), 3).items()}
    before = copy.deepcopy(source)
    gx.load_into(net, source)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert all(torch.equal(before[key], source[key]) for key in source)


@pytest.mark.filterwarnings("ignore")
def test_weights_packed_into_a_tuple_are_refused() -> None:
    """torch.ao's quantized Linear: its weight is no tensor of the state_dict."""

    class Packed(nn.Linear):
        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            weight = torch.quantize_per_tensor(self.weight.detach(), 0.1, 0, torch.qint8)
            return OrderedDict(packed=(weight, self.bias), scale=torch.ones(()))

    with pytest.raises(GraftaxError, match="packed: holds quantized weights"):
        gx.load_into(Packed(2, 2), {"scale": torch.ones(())})
