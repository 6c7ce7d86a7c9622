"""What no file shows about a layout must be asked, with a candidate for each reading, wherever it hides: a flatten
behind a convolution (in ensembles, under other names, before a norm, before an unflatten), maps that may be channels
last, square transposed convolutions, square matrices of a checkpoint that stores (in, out)."""

from __future__ import annotations

import numpy as np
import pytest

import graftax as gx
from graftax.match import infer
from graftax.match.whole_layers import by_table
from graftax.plans import Proposal, Question
from graftax.rules import apply_rules, load_rules

Shape = tuple[int, ...]
Pair = tuple[dict[str, Shape], dict[str, Shape]]
CONVS_T: dict[str, Shape] = {"conv1.weight": (16, 3, 3, 3), "conv2.weight": (32, 16, 3, 3)}
CONVS_F: dict[str, Shape] = {"conv1/kernel": (3, 3, 3, 16), "conv2/kernel": (3, 3, 16, 32)}


def asked(pairing, pair: Pair, reverse: bool = False) -> dict[str, Question]:
    """Flax leaf -> the question that it waits for. Every candidate of every question must be a rule that works."""
    made = pairing([])
    made.torch = {key: np.zeros(shape, "f4") for key, shape in pair[0].items()}
    made.flax = {key: np.zeros(shape, "f4") for key, shape in pair[1].items()}
    found = made.infer(reverse=reverse)
    assert not found.failures
    source, like = made.ends(reverse)
    for question in found.questions:
        for candidate in question.candidates:
            rules = load_rules(f"rules = [{candidate.rule}]")
            ruled = apply_rules(rules, source, like, source.side, like.side).proposal
            assert ruled.entries, candidate.rule
            assert not ruled.failures, candidate.rule
            assert made.infer(f"rules = [{candidate.rule}]", reverse=reverse).questions != found.questions
    return {leaf: q for q in found.questions for leaf in (q.sources if reverse else q.targets)}


def rules_of(question: Question) -> str:
    return "\n".join(candidate.rule for candidate in question.candidates)


def linear(torch: str, flax: str, out: int, inp: int) -> Pair:
    return {**CONVS_T, f"{torch}.weight": (out, inp)}, {**CONVS_F, f"{flax}/kernel": (inp, out)}


def family(torch: str, flax: str) -> Pair:
    """Members that are a convolution and a Linear behind it."""
    shapes = {"conv": ((8, 3, 3, 3), (3, 3, 3, 8)), "fc": ((5, 128), (128, 5))}
    return (
        {f"{torch}.{i}.{key}.weight": t for i in range(4) for key, (t, _) in shapes.items()},
        {f"{flax}/{i}/{key}/kernel": f for i in range(4) for key, (_, f) in shapes.items()},
    )


# name: (pair, the Flax leaves that wait, what one candidate says)
FLATTENED: dict[str, tuple[Pair, str, str]] = {
    "a head named mlp": (linear("mlp.0", "mlp/dense_0", 20, 512), "mlp/dense_0/kernel", "C=32 H=4 W=4"),
    "a value head": (linear("value_fc", "value_fc", 7, 512), "value_fc/kernel", "C=32 H=4 W=4"),
    "an intermediate": (linear("intermediate", "intermediate", 7, 512), "intermediate/kernel", "C=32 H=4 W=4"),
    "three positions": (
        (
            {"c.weight": (8, 3, 5), "fc.weight": (10, 24)},
            {"c/kernel": (5, 3, 8), "fc/kernel": (24, 10)},
        ),
        "fc/kernel",
        "C=8 H=3 W=1",
    ),
    "as wide as another convolution": (
        (
            {"conv1.weight": (64, 3, 3, 3), "conv2.weight": (16, 64, 3, 3), "fc.weight": (10, 64)},
            {"conv1/kernel": (3, 3, 3, 64), "conv2/kernel": (3, 3, 64, 16), "fc/kernel": (64, 10)},
        ),
        "fc/kernel",
        "C=16 H=2 W=2",
    ),
    "another branch of that width": (
        (
            {**CONVS_T, "fc1.weight": (512, 6), "fc2.weight": (10, 512)},
            {**CONVS_F, "fc1/kernel": (6, 512), "fc2/kernel": (512, 10)},
        ),
        "fc2/kernel",
        "C=32 H=4 W=4",
    ),
    "two heads, one as wide as the trunk": (
        (
            {"trunk.weight": (128, 3, 3, 3), "policy.weight": (2, 128, 1, 1), "policy_fc.weight": (73, 128),
             "value.weight": (1, 128, 1, 1), "value_fc.weight": (1, 64)},
            {"trunk/kernel": (3, 3, 3, 128), "policy/kernel": (1, 1, 128, 2), "policy_fc/kernel": (128, 73),
             "value/kernel": (1, 1, 128, 1), "value_fc/kernel": (64, 1)},
        ),
        "policy_fc/kernel",
        "C=2 H=8 W=8",
    ),
    "an ensemble": (family("members", "members"), "members/0/fc/kernel", "C=8 H=4 W=4"),
    "a last layer that two maps may feed": (
        (
            {"a.weight": (16, 3, 3, 3), "b.weight": (32, 3, 3, 3), "fc.weight": (10, 128)},
            {"a/kernel": (3, 3, 3, 16), "b/kernel": (3, 3, 3, 32), "fc/kernel": (128, 10)},
        ),
        "fc/kernel",
        "C=16 H=8 W=1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("reverse", [False, True], ids=["to flax", "to torch"])
@pytest.mark.parametrize("name", FLATTENED)
def test_a_flatten_is_asked(name: str, reverse: bool, pairing) -> None:
    pair, leaf, says = FLATTENED[name]
    found = asked(pairing, pair, reverse)
    assert found[leaf].kind == "flatten"
    assert says in rules_of(found[leaf])
    assert 'layout = "linear"' in rules_of(found[leaf])
    assert "any other order" in found[leaf].text


def test_twin_critics_are_asked(pairing) -> None:
    shapes = {"conv": ((8, 3, 3, 3), (3, 3, 3, 8)), "fc": ((5, 128), (128, 5))}
    torch = {f"q{i}.{key}.weight": t for i in (1, 2) for key, (t, _) in shapes.items()}
    flax = {f"q{i}/{key}/kernel": f for i in (1, 2) for key, (_, f) in shapes.items()}
    found = asked(pairing, (torch, flax))
    assert {"q1/fc/kernel", "q2/fc/kernel"} <= {leaf for leaf, q in found.items() if q.kind == "flatten"}


def test_an_ensemble_stacked_on_the_other_side_is_asked(pairing) -> None:
    torch, _ = family("members", "members")
    found = asked(pairing, (torch, {"members/conv/kernel": (4, 3, 3, 3, 8), "members/fc/kernel": (4, 128, 5)}))
    assert found["members/fc/kernel"].kind == "flatten"
    assert "stack" in rules_of(found["members/fc/kernel"])


@pytest.mark.parametrize("statistics", [False, True], ids=["layer norm", "batch norm"])
def test_a_norm_behind_the_flatten_is_asked_with_its_linear(statistics: bool, pairing) -> None:
    torch = {**CONVS_T, "norm.weight": (512,), "norm.bias": (512,), "fc.weight": (10, 512)}
    flax = {**CONVS_F, "norm/scale": (512,), "norm/bias": (512,), "fc/kernel": (512, 10)}
    if statistics:
        torch |= {"norm.running_mean": (512,), "norm.running_var": (512,)}
        flax |= {"norm/mean": (512,), "norm/var": (512,)}
    found = asked(pairing, (torch, flax))
    leaves = [leaf for leaf in flax if leaf.startswith("norm/")]
    assert {found[leaf].kind for leaf in (*leaves, "fc/kernel")} == {"flatten"}
    assert "(c h w) -> (h w c)" in rules_of(found["norm/scale"])


LATENT: dict[str, tuple[Pair, str]] = {
    "a generator": (
        (
            {"l1.weight": (256, 20), "l1.bias": (256,), "conv1.weight": (8, 16, 3, 3)},
            {"l1/kernel": (20, 256), "l1/bias": (256,), "conv1/kernel": (3, 3, 16, 8)},
        ),
        "l1",
    ),
    "an autoencoder": (
        (
            {**CONVS_T, "fc1.weight": (40, 512), "fc2.weight": (20, 40), "fc3.weight": (512, 20),
             "back.weight": (32, 16, 2, 2), "back.bias": (16,)},
            {**CONVS_F, "fc1/kernel": (512, 40), "fc2/kernel": (40, 20), "fc3/kernel": (20, 512),
             "back/kernel": (2, 2, 32, 16), "back/bias": (16,)},
        ),
        "fc3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LATENT)
def test_an_unflatten_is_asked(name: str, pairing) -> None:
    pair, module = LATENT[name]
    found = asked(pairing, pair)
    for leaf in pair[1]:
        if leaf.startswith(f"{module}/"):
            assert found[leaf].kind == "flatten"
            assert "-> i (h w c)" in rules_of(found[leaf]) or "(c h w) -> (h w c)" in rules_of(found[leaf])


def test_what_is_no_flatten_is_not_asked(pairing) -> None:
    """Channels that a Linear takes, blocks behind a patch convolution, the layers behind a flatten's own Linear."""
    pooled = linear("fc", "fc", 10, 32)
    assert not asked(pairing, pooled)
    block = {"norm1": (8,), "attn.q": (8, 8), "mlp.fc1": (32, 8), "mlp.fc2": (8, 32)}
    torch: dict[str, Shape] = {"patch.weight": (8, 3, 4, 4), "head.weight": (5, 8)}
    flax: dict[str, Shape] = {"patch/kernel": (4, 4, 3, 8), "head/kernel": (8, 5)}
    for i in range(3):
        torch |= {f"blocks.{i}.{key}.weight": shape for key, shape in block.items()}
        for key, shape in block.items():
            leaf = "scale" if len(shape) == 1 else "kernel"
            flax[f"blocks/{i}/{key.replace('.', '/')}/{leaf}"] = shape[::-1]
    assert not asked(pairing, (torch, flax))
    behind = {**CONVS_T, "fc1.weight": (64, 512), "out.weight": (10, 64)}
    found = asked(pairing, (behind, {**CONVS_F, "fc1/kernel": (512, 64), "out/kernel": (64, 10)}))
    assert set(found) == {"fc1/kernel"}


MAPS: dict[str, tuple[Pair, dict[str, str]]] = {
    "a norm over a map": (
        (
            {"ln.weight": (64, 8, 8), "ln.bias": (64, 8, 8), "fc.weight": (3, 5)},
            {"ln/scale": (8, 8, 64), "ln/bias": (8, 8, 64), "fc/kernel": (5, 3)},
        ),
        {"ln/scale": "c h w -> h w c", "ln/bias": "c h w -> h w c"},
    ),
    "a constant map": (
        (
            {"c.weight": (16, 3, 3, 3), "const": (16, 4, 4)},
            {"c/kernel": (3, 3, 3, 16), "const": (4, 4, 16)},
        ),
        {"const": "c h w -> h w c"},
    ),
    "an untied bias": (
        (
            {"conv.weight": (16, 3, 3, 3), "conv.bias": (16, 4, 4)},
            {"conv/kernel": (3, 3, 3, 16), "conv/bias": (4, 4, 16)},
        ),
        {"conv/bias": "c h w -> h w c"},
    ),
    "cubes": (
        (
            {"c.weight": (4, 3, 3, 3), "ln.weight": (4, 4, 4), "pos": (1, 4, 4, 4)},
            {"c/kernel": (3, 3, 3, 4), "ln/scale": (4, 4, 4), "pos": (1, 4, 4, 4)},
        ),
        {"ln/scale": "c h w -> h w c", "pos": "n c h w -> n h w c"},
    ),
    "a square norm": (
        (
            {"ln.weight": (8, 8), "ln.bias": (8, 8), "fc.weight": (3, 5)},
            {"ln/scale": (8, 8), "ln/bias": (8, 8), "fc/kernel": (5, 3)},
        ),
        {"ln/scale": "c l -> l c", "ln/bias": "c l -> l c"},
    ),
}


@pytest.mark.parametrize("name", MAPS)
def test_a_map_that_may_be_channels_last_is_asked(name: str, pairing) -> None:
    pair, wanted = MAPS[name]
    found = asked(pairing, pair)
    assert set(found) == set(wanted)
    for leaf, pattern in wanted.items():
        assert f'"{pattern}"' in rules_of(found[leaf])
        assert len(found[leaf].candidates) == 2


def convs(*names: str, kernel: tuple[int, ...] = (3, 3), other: dict[str, Shape] | None = None) -> Pair:
    torch: dict[str, Shape] = {f"{name}.weight": (8, 8, *kernel) for name in names}
    flax: dict[str, Shape] = {f"{name.replace('.', '_')}/kernel": (*kernel, 8, 8) for name in names}
    return {**torch, "stem.weight": (8, 3, *kernel)}, {**flax, "stem/kernel": (*kernel, 3, 8)}


@pytest.mark.parametrize("name", ["up1", "ups.1", "upsample", "decoder.3", "trans", "deconv2"])
@pytest.mark.parametrize("kernel", [(3, 3), (4,)], ids=["odd", "even"])
def test_a_square_convolution_that_may_be_transposed_is_asked(name: str, kernel: tuple[int, ...], pairing) -> None:
    found = asked(pairing, convs(name, kernel=kernel))
    (question,) = set(found.values())
    assert question.kind == "layout"
    assert 'layout = "conv"' in rules_of(question) or 'layout = "conv_transpose"' in rules_of(question)
    assert 'layout = "conv_transpose default"' in rules_of(question)
    for candidate in question.candidates:
        assert f'layout = "{candidate.evidence.partition("the layout is ")[2]}"' in candidate.rule


def asked_of_one_layer(pairing, pair: Pair) -> set[str]:
    """The Flax leaves of a tree of one layer that wait for an answer, after the layer table has had its say."""
    made = pairing([])
    made.torch, made.flax = ({key: np.zeros(shape, "f4") for key, shape in side.items()} for side in pair)
    source, like = made.ends()
    found = infer(source, like, "torch", "flax", by_table(source, like, "torch", "flax", Proposal()))
    return {leaf for question in found.questions for leaf in question.targets}


@pytest.mark.parametrize("name", ["up1", "trans", "decoder.0.deconv"])
def test_the_only_layer_is_asked_as_well(name: str, pairing) -> None:
    torch, flax = f"{name}.weight", f"{name.replace('.', '/')}/kernel"
    assert asked_of_one_layer(pairing, ({torch: (8, 8, 3, 3)}, {flax: (3, 3, 8, 8)})) == {flax}
    assert not asked_of_one_layer(pairing, ({"conv1.weight": (8, 8, 3, 3)}, {"conv1/kernel": (3, 3, 8, 8)}))


def test_the_only_norm_is_asked_as_well(pairing) -> None:
    pair: Pair = {"ln.weight": (8, 8), "ln.bias": (8, 8)}, {"ln/scale": (8, 8), "ln/bias": (8, 8)}
    assert asked_of_one_layer(pairing, pair) == {"ln/scale", "ln/bias"}


def test_a_square_one_beside_a_transposed_one_is_asked(pairing) -> None:
    torch: dict[str, Shape] = {"grow.0.weight": (16, 8, 3, 3), "grow.0.bias": (8,)}
    torch |= {"grow.1.weight": (8, 8, 3, 3), "grow.1.bias": (8,)}
    flax: dict[str, Shape] = {"grow_0/kernel": (3, 3, 16, 8), "grow_0/bias": (8,)}
    flax |= {"grow_1/kernel": (3, 3, 8, 8), "grow_1/bias": (8,)}
    assert set(asked(pairing, (torch, flax))) == {"grow_1/kernel"}


def test_a_square_convolution_under_a_plain_name_is_one(pairing) -> None:
    assert not asked(pairing, convs("upsampler.conv"))
    assert not asked(pairing, convs("conv1"))


def stored_in_out(torch: dict[str, Shape], flax: dict[str, Shape]) -> Pair:
    shapes = {"fc1": (8, 16), "fc2": (16, 8)}
    rows_t = {f"h.{i}.{key}.weight": shape for i in range(4) for key, shape in shapes.items()}
    rows_f = {f"h_{i}/{key}/kernel": shape for i in range(4) for key, shape in shapes.items()}
    return {**rows_t, **torch}, {**rows_f, **flax}


SQUARES: dict[str, tuple[Pair, str]] = {
    "outside of blocks that store (in, out)": (
        stored_in_out({"proj_in.weight": (8, 8)}, {"proj_in/kernel": (8, 8)}),
        "proj_in/kernel",
    ),
    "bare matrices": (({"A": (8, 5), "B": (8, 8)}, {"A": (5, 8), "B": (8, 8)}), "B"),
    "an embedding kept as a kernel": (
        (
            {"embed.weight": (8, 8), "fc.weight": (5, 8)},
            {"embed/kernel": (8, 8), "fc/kernel": (8, 5)},
        ),
        "embed/kernel",
    ),
}


@pytest.mark.parametrize("name", SQUARES)
def test_a_square_whose_storage_nothing_shows_is_asked(name: str, pairing) -> None:
    pair, leaf = SQUARES[name]
    found = asked(pairing, pair)
    assert set(found) == {leaf}
    assert 'layout = "identity"' in rules_of(found[leaf])
    assert 'layout = "linear"' in rules_of(found[leaf])


def decided(pairing, pair: Pair) -> dict[str, int]:
    """Flax leaf -> the number of ops, where nothing is asked."""
    made = pairing([])
    made.torch = {key: np.zeros(shape, "f4") for key, shape in pair[0].items()}
    made.flax = {key: np.zeros(shape, "f4") for key, shape in pair[1].items()}
    found = made.infer()
    assert not found.questions
    return {entry.targets[0]: len(entry.ops) for entry in found.entries}


def test_a_projection_of_positions_is_no_table(pairing) -> None:
    pair = {"pos_proj.weight": (8, 8), "fc.weight": (5, 8)}, {"pos_proj/w": (8, 8), "fc/w": (8, 5)}
    assert decided(pairing, pair)["pos_proj/w"] == 1


def test_a_weight_norm_of_its_own_is_a_linear(pairing) -> None:
    for rows in (8, 6):
        pair: Pair = (
            {"fc.weight_v": (rows, 8), "fc.weight_g": (rows, 1), "h.weight": (3, rows)},
            {"fc/kernel_v": (8, rows), "fc/kernel_g": (1, rows), "h/kernel": (rows, 3)},
        )
        assert decided(pairing, pair)["fc/kernel_v"] == 1


@pytest.mark.parametrize("sides", [(6, 4), (4, 4)], ids=["rectangular", "square"])
def test_a_bare_map_without_convolutions(pairing, sides: tuple[int, int]) -> None:
    """(1, C, H, W) becomes (1, H, W, C); where all are equal nothing shows it, also where no layer is a convolution."""
    c, h = sides
    pair: Pair = (
        {"synthesis.input.const": (1, c, h, h), "mapping.fc.weight": (8, 6)},
        {"synthesis/input/const": (1, h, h, c), "mapping/fc/kernel": (6, 8)},
    )
    if c != h:
        assert decided(pairing, pair)["synthesis/input/const"] == 1
        return
    rules = [candidate.rule for candidate in asked(pairing, pair)["synthesis/input/const"].candidates]
    assert any("n c h w -> n h w c" in rule for rule in rules)
    assert any('layout = "identity"' in rule for rule in rules)


def test_a_square_table_that_becomes_a_bare_parameter(pairing) -> None:
    """A bare parameter has its own code, which may put the heads first; between two lookup tables nothing moves."""
    pair: Pair = (
        {"block.0.attention_bias.weight": (8, 8), "shared.weight": (50, 6)},
        {"relpos/rel_embedding": (8, 8), "tok/embedding": (50, 6)},
    )
    rules = [candidate.rule for candidate in asked(pairing, pair)["relpos/rel_embedding"].candidates]
    assert any('layout = "linear"' in rule for rule in rules)
    assert any('layout = "identity"' in rule for rule in rules)
    tables: Pair = {"pos_embed.weight": (8, 8)}, {"pos_embed/embedding": (8, 8)}
    assert decided(pairing, tables)["pos_embed/embedding"] == 0


@pytest.mark.parametrize("more", [{}, {"patch.bias": (8,)}], ids=["alone", "with a bias"])
def test_a_matrix_that_becomes_the_window_of_a_convolution_is_asked_about(more: dict[str, tuple[int, ...]]) -> None:
    source = {name: np.zeros(shape, "float32") for name, shape in ({"patch.weight": (8, 12)} | more).items()}
    like = {"params": {"patch": {"kernel": np.zeros((2, 2, 3, 8), "float32")}}}
    if more:
        like["params"]["patch"]["bias"] = np.zeros(8, "float32")
    assert "params/patch/kernel" in {name for q in gx.plan(source, like, to="flax").questions for name in q.targets}
