"""Parity cases of normalisation layers."""

from __future__ import annotations

from typing import Any

from flax import linen as fn
from flax import nnx
from torch import nn

from .harness import Case


def _eval(m: Any, x: Any) -> Any:
    return m(x, use_running_average=True)


NORMS = [
    *(
        Case(
            f"batch norm {len(x) - 2}d", "BatchNorm", lambda kind=kind, n=n: kind(n),
            lambda: fn.BatchNorm(epsilon=1e-5),
            lambda r, n=n: nnx.BatchNorm(n, epsilon=1e-5, rngs=r), x, channels=True, on_flax=_eval,
            variant="batch norm",
        )
        for kind, n, x in (
            (nn.BatchNorm1d, 5, (3, 5)), (nn.BatchNorm1d, 5, (3, 5, 4)), (nn.BatchNorm2d, 3, (2, 3, 4, 5)),
            (nn.BatchNorm3d, 1, (2, 1, 4, 3, 5)),
        )
    ),
    Case(
        "batch norm without affine", "BatchNorm", lambda: nn.BatchNorm1d(5, affine=False),
        lambda: fn.BatchNorm(epsilon=1e-5, use_scale=False, use_bias=False),
        lambda r: nnx.BatchNorm(5, epsilon=1e-5, use_scale=False, use_bias=False, rngs=r), (3, 5), on_flax=_eval,
        variant="batch norm",
    ),
    Case(
        "instance norm with statistics", "BatchNorm",
        lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
        lambda: fn.BatchNorm(epsilon=1e-5), lambda r: nnx.BatchNorm(3, epsilon=1e-5, rngs=r), (2, 3, 4, 5),
        channels=True, on_flax=_eval, variant="batch norm",
    ),
    Case(
        "layer norm", "LayerNorm", lambda: nn.LayerNorm(5), lambda: fn.LayerNorm(epsilon=1e-5),
        lambda r: nnx.LayerNorm(5, epsilon=1e-5, rngs=r), (2, 3, 5), variant="layer norm",
    ),
    Case(
        "layer norm without bias", "LayerNorm", lambda: nn.LayerNorm(5, bias=False),
        lambda: fn.LayerNorm(epsilon=1e-5, use_bias=False),
        lambda r: nnx.LayerNorm(5, epsilon=1e-5, use_bias=False, rngs=r), (2, 3, 5),
    ),
    *(
        Case(
            f"layer norm over {a}x{b}", "LayerNorm", lambda a=a, b=b: nn.LayerNorm((a, b)),
            lambda: fn.LayerNorm(epsilon=1e-5, reduction_axes=(-2, -1), feature_axes=(-2, -1)),
            lambda r, a=a, b=b: nnx.LayerNorm(
                a * b, epsilon=1e-5, reduction_axes=(-2, -1), feature_axes=(-2, -1), rngs=r
            ),
            (2, a, b),
        )
        for a, b in ((3, 5), (4, 4), (1, 5))
    ),
    *(
        Case(
            f"group norm {n} in {g}", "GroupNorm", lambda g=g, n=n: nn.GroupNorm(g, n),
            lambda g=g: fn.GroupNorm(num_groups=g, epsilon=1e-5),
            lambda r, g=g, n=n: nnx.GroupNorm(n, num_groups=g, epsilon=1e-5, rngs=r), (2, n, 3, 4), channels=True,
            variant="group norm", file="first",
        )
        for g, n in ((2, 6), (1, 3), (4, 4))
    ),
    *(
        Case(
            f"instance norm {len(x) - 2}d", "InstanceNorm", lambda kind=kind: kind(3, affine=True),
            lambda: fn.InstanceNorm(epsilon=1e-5), lambda r: nnx.InstanceNorm(3, epsilon=1e-5, rngs=r), x,
            channels=True, variant="instance norm",
        )
        for kind, x in (
            (nn.InstanceNorm1d, (2, 3, 5)), (nn.InstanceNorm2d, (2, 3, 4, 5)), (nn.InstanceNorm3d, (2, 3, 2, 4, 3)),
        )
    ),
    Case(
        "rms norm", "RMSNorm", lambda: nn.RMSNorm(5, eps=1e-6), lambda: fn.RMSNorm(epsilon=1e-6),
        lambda r: nnx.RMSNorm(5, epsilon=1e-6, rngs=r), (2, 3, 5), variant="rms norm",
    ),
    Case(
        "rms norm, default eps", "RMSNorm", lambda: nn.RMSNorm(5), lambda: fn.RMSNorm(epsilon=2.0**-23),
        lambda r: nnx.RMSNorm(5, epsilon=2.0**-23, rngs=r), (2, 3, 5), variant="rms norm",
    ),
]  # fmt: skip


class ZeroCentred(nn.RMSNorm):
    """An RMSNorm whose weight is the scale less one."""

    def forward(self, x: Any) -> Any:
        return nn.functional.rms_norm(x, self.normalized_shape, 1 + self.weight, self.eps)


NORMS.append(
    Case(
        "rms norm, zero-centred", "RMSNorm", lambda: ZeroCentred(16, eps=1e-6), lambda: fn.RMSNorm(epsilon=1e-6),
        lambda r: nnx.RMSNorm(16, epsilon=1e-6, rngs=r), (2, 3, 16), variant="rms norm, zero-centred",
        layout="zero-centred", exact=False,
    )
)  # fmt: skip
