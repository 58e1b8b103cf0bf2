r"""What a network predicts, and the exact maps between the kinds. The only place that knows them.

With $x_t = \alpha x_0 + \sigma\varepsilon$, every kind is a combination $f = A x_0 + B \varepsilon$, and the data prediction a combination
$x_0 = a\,x_t + b\,f$ with $a = B / (\alpha B - \sigma A)$ and $b = -\sigma / (\alpha B - \sigma A)$:

| kind | f | source |
| --- | --- | --- |
| `noise` | $\varepsilon$ | arXiv 2006.11239 |
| `data` | $x_0$ | arXiv 2006.11239 |
| `velocity` | $\alpha\varepsilon - \sigma x_0$ | "Progressive Distillation", arXiv 2202.00512, appendix D |
| `flow` | $\varepsilon - x_0$ | "Rectified Flow", arXiv 2209.03003 |
| `score` | $-\varepsilon / \sigma$ | arXiv 2011.13456 |
"""

from __future__ import annotations

from typing import Any

from fewstep.errors import UnknownNameError

__all__ = ["PREDICTIONS", "check_prediction", "data_coefficients", "target_coefficients"]

PREDICTIONS = ("noise", "data", "velocity", "flow", "score")
"""The names of the kinds."""


ELSEWHERE = {
    "eps": "noise",
    "epsilon": "noise",
    "x0": "data",
    "x_start": "data",
    "sample": "data",
    "v": "velocity",
    "v_prediction": "velocity",
    "flow_prediction": "flow",
    "velocity_field": "flow",
}
"""The names that other libraries and papers use."""


def check_prediction(predicts: str) -> str:
    """Return `predicts` if it names a kind.

    Raises:
        UnknownNameError: otherwise, with the nearest name.
    """
    if predicts in ELSEWHERE:
        raise UnknownNameError(
            "prediction", predicts, PREDICTIONS, hint=f"What others call {predicts!r} is {ELSEWHERE[predicts]!r} here."
        )
    if predicts not in PREDICTIONS:
        raise UnknownNameError("prediction", predicts, PREDICTIONS)
    return predicts


def target_coefficients(predicts: str, alpha: Any, sigma: Any) -> tuple[Any, Any]:
    """A and B of f = A x_0 + B eps: what a network of this kind is trained to give.

    Args:
        predicts: one of `PREDICTIONS`.
        alpha, sigma: numbers, arrays or tensors of one shape.

    Example:
        >>> target_coefficients("velocity", 0.6, 0.8)
        (-0.8, 0.6)
    """
    check_prediction(predicts)
    zero, one = alpha * 0.0, alpha * 0.0 + 1.0
    if predicts == "score":
        return zero, -1.0 / sigma
    return {"noise": (zero, one), "data": (one, zero), "velocity": (-sigma, alpha), "flow": (-one, one)}[predicts]


def data_coefficients(predicts: str, alpha: Any, sigma: Any) -> tuple[Any, Any]:
    """A and b of x_0 = a x_t + b f: how the data prediction is read off the network's output f.

    Args:
        predicts: one of `PREDICTIONS`.
        alpha, sigma: numbers, arrays or tensors of one shape. For `noise` and `score` alpha must not be 0.

    Example:
        >>> data_coefficients("flow", 0.25, 0.75)
        (1.0, -0.75)
    """
    check_prediction(predicts)
    if predicts == "data":
        return alpha * 0.0, alpha * 0.0 + 1.0
    if predicts == "noise":
        return 1.0 / alpha, -sigma / alpha
    if predicts == "score":
        return 1.0 / alpha, sigma * sigma / alpha
    scale = 1.0 / (alpha + sigma) if predicts == "flow" else 1.0 / (alpha * alpha + sigma * sigma)
    return (scale, -sigma * scale) if predicts == "flow" else (alpha * scale, -sigma * scale)
