"""The residual stream of a model: which matrices write to it, which norms come between, and the gradient at its end.

Guarantees: for a family in FAMILIES the feedback of a matrix in the last block is its exact gradient (tests compare it
with autograd); a model of another family is refused by name, before it loads. Shapes: R scored rows, M targets, H
hidden, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from zoray.records import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch


SKIPPED = 4  # first tokens of a sequence, whose streams are hundreds of times as large as others (attention sinks)
ROWS = 64  # of logits processed at a time


class Family(NamedTuple):
    """A model family's final norm, and its matrices that write to the stream.

    `writers`: the last part of a matrix's name -> the norm of its layer that its output passes first, or None.
    `readers`: the norms of a layer that read the stream before its attention, and before its MLP.
    """

    norm: str
    writers: Mapping[str, str | None]
    readers: tuple[str, str]


PLAIN = Family("model.norm", {"o_proj": None, "down_proj": None}, ("input_layernorm", "post_attention_layernorm"))
NORMED = Family(
    "model.norm",
    {"o_proj": "post_attention_layernorm", "down_proj": "post_feedforward_layernorm"},
    ("input_layernorm", "pre_feedforward_layernorm"),
)
FAMILIES = {  # by config.json's model_type
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3"), PLAIN),
    **dict.fromkeys(("gemma2", "gemma3_text"), NORMED),
    "opt": Family(
        "model.decoder.final_layer_norm",
        {"out_proj": None, "fc2": None},
        ("self_attn_layer_norm", "final_layer_norm"),
    ),
}


def family_of(folder: Path | str, matrices: Iterable[str] = ()) -> Family:
    """The family of a model's folder, checked for feedback on `matrices`; reads no weights.

    Raises:
        ConfigError: the family is unknown, or one of the matrices does not write to the stream.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ConfigError(
            f"expected a model of one of these families for estimator=feedback, which must know its residual stream: "
            f"{', '.join(FAMILIES)}; {folder} is of {config.model_type}. Take estimator=rloo, or another model"
        )
    if config.model_type == "opt" and not (
        config.do_layer_norm_before and config.word_embed_proj_dim == config.hidden_size
    ):
        raise ConfigError(
            f"expected an OPT model with norms before its blocks and no projections for estimator=feedback; {folder} "
            "differs (like OPT-350m). Take estimator=rloo"
        )
    others = sorted({name.rpartition(".")[2] for name in matrices} - family.writers.keys())
    if others:
        raise ConfigError(
            f"expected space.targets among the matrices that write to the residual stream for estimator=feedback: "
            f"{', '.join(family.writers)}; got {', '.join(others)} as well. Set space.targets=residual"
        )
    return family


def norm_behind(family: Family, name: str) -> str | None:
    """The norm that a matrix's output passes before it is added to the stream, if any."""
    prefix, layer, leaf = _layer(name)
    behind = family.writers[leaf]
    return None if behind is None else f"{prefix}.{layer}.{behind}"


def reader_of(family: Family, name: str, layers: int) -> str:
    """The norm that reads the stream right after a matrix has written to it, in a model of `layers` layers."""
    prefix, layer, leaf = _layer(name)
    before_attention, before_mlp = family.readers
    if leaf == next(iter(family.writers)):  # the attention's
        return f"{prefix}.{layer}.{before_mlp}"
    return f"{prefix}.{layer + 1}.{before_attention}" if layer + 1 < layers else family.norm


def _layer(name: str) -> tuple[str, int, str]:
    """model.layers.3.mlp.down_proj -> (model.layers, 3, down_proj)."""
    parts = name.split(".")
    at = next(i for i, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[:at]), int(parts[at]), parts[-1]


class Norm(NamedTuple):
    """A norm as numbers, of one of two kinds: root mean square, or (`centred`) mean and variance."""

    weight: torch.Tensor  # (H,) float32
    epsilon: float
    centred: bool

    @classmethod
    def of(cls, module: Any) -> Norm:
        """From a module of transformers or vLLM; Gemma stores weights minus one."""
        kind = type(module).__name__
        centred = "LayerNorm" in kind and "RMS" not in kind
        epsilon = next(getattr(module, key) for key in ("variance_epsilon", "eps") if hasattr(module, key))
        return cls(module.weight.detach().float() + ("Gemma" in kind), float(epsilon), centred)

    def back(self, x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient (R, H) at the input x (R, H) of the norm, from the gradient at its output."""
        x, gradient = x.float(), gradient * self.weight
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        size = (x.square().mean(-1, keepdim=True) + self.epsilon).sqrt()
        along = x / size
        gradient = gradient - along * (gradient * along).mean(-1, keepdim=True)
        return (gradient - gradient.mean(-1, keepdim=True) if self.centred else gradient) / size


class Head(NamedTuple):
    """An LM head: logits = scale * cap(hidden W^T), with cap(z) = soft_cap * tanh(z / soft_cap) if it has one."""

    weight: torch.Tensor  # (V, H)
    scale: float = 1.0
    soft_cap: float | None = None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(R, V) float32."""
        import torch

        raw = (hidden @ self.weight.t()).float()
        capped = raw if self.soft_cap is None else self.soft_cap * torch.tanh(raw / self.soft_cap)
        return capped if self.scale == 1.0 else capped * self.scale

    def back(
        self,
        hidden: torch.Tensor,
        row_of: torch.Tensor,
        targets: torch.Tensor,
        slopes: torch.Tensor,
        chunk: int,
        logps: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The gradient (R, H) of sum_m slopes[m] * log p(targets[m] | hidden[row_of[m]]), hidden (R, H).

        The softmax of a row is computed only if its slopes do not cancel, as those of single-token options do.
        `chunk`: rows whose logits are computed at a time. `logps` (R, V): their log-softmax, if known, for a head
        without cap; it is overwritten.
        """
        import torch

        weight, cap = self.weight, self.soft_cap
        total = torch.zeros(len(hidden), dtype=torch.float32, device=hidden.device).index_add_(0, row_of, slopes)
        size = torch.zeros_like(total).index_add_(0, row_of, slopes.abs())
        gradient = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        if cap is None:
            gradient.index_add_(0, row_of, weight[targets].float() * (slopes * self.scale)[:, None])
        rows = torch.nonzero(total.abs() > 1e-6 * size).flatten() if cap is None else torch.arange(len(hidden))
        for some in rows.to(hidden.device).split(chunk):
            if logps is None or len(some) < len(hidden):
                final = self.logits(hidden[some])
                squashed = None if cap is None else (final / (self.scale * cap)).square()
                back = log_softmax_(final).exp_()
            else:
                squashed, back = None, logps.exp_()
            each = size[some, None].clamp(min=torch.finfo(torch.float32).tiny)  # of a row: 16 bits underflow early
            back *= -self.scale * total[some, None] / each
            if squashed is not None:
                place = torch.full((len(hidden),), -1, dtype=torch.long, device=hidden.device)
                place[some] = torch.arange(len(some), device=hidden.device)
                own = place[row_of] >= 0
                at = place[row_of[own]]
                put = slopes[own] * self.scale / each[at, 0]
                back.index_put_((at, targets[own]), put, accumulate=True)
                back *= 1 - squashed
            gradient[some] += (back.to(weight.dtype) @ weight).float() * each
        return gradient


def log_softmax_(logits: torch.Tensor) -> torch.Tensor:
    """The log-softmax of logits (R, V), in place and by groups of rows, to need no second tensor of this size."""
    import torch

    for part in logits.split(ROWS):
        part.sub_(torch.logsumexp(part, -1, keepdim=True))
    return logits


def outer(
    delta: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of A (rank, in) and B (out, rank), from the gradient at the output (R, out) and the input x (R, in)."""
    x = x.float()
    return (scaling * (delta @ b)).t() @ x, delta.t() @ (scaling * (x @ a.t()))
