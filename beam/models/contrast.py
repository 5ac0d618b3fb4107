"""What an expert says and an amateur does not: contrastive decoding, visual contrast, contrasted layers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from flashbeam.kernels import Summary, contrast, divergence, summarize

from ..arguments import nonnegative_number, positive_number, probability
from .mixture import faults
from .protocol import Combined, Given

DIVERGENCES = ("jsd", "dola")


@dataclass(frozen=True)
class Contrast:
    """Rank by how much likelier an expert finds a token than an amateur, among those the expert finds plausible.

    The first logits of a step are the expert's, e; the others those of one amateur, a: a small model, the same model
    with a distorted image or without context; or of several early layers, of which every row takes the one that
    diverges most from the expert::

        V_head = {v: p_e(v) >= alpha * max p_e}                      the plausibility head, of what may follow
        score += log p_e(v) - log p_a(v)                             weight=None
        score += log p_e(v) + weight * (log p_e(v) - log p_a(v))     otherwise

    Sources: contrastive decoding (Li et al. 2023, section 3): ``fb.Contrast(amateur_temperature=0.5)``; visual
    contrastive decoding (Leng et al. 2024, section 3): ``fb.Contrast(weight=1.0, normalize=True)``; DoLa (Chuang
    et al. 2024, section 2): ``fb.Contrast()`` with the logits of early layers.

    ``log_probs`` are the expert's and ``scores`` accumulate the contrast, which is no log-probability, may be positive
    and has no bound: ``fb.Exact()`` is refused. With ``normalize`` the contrast is renormalised over the head, a
    distribution as any other.

    Args:
        weight: 0 or more, or ``None``, as above. With 0 the search is the expert's, within the head.
        alpha: above 0 and at most 1. One token at least is always plausible.
        amateur_temperature: divides the amateur's logits, above 0. The expert's are divided by the search's
            ``temperature``; with ``normalize`` that divides the contrast instead.
        divergence: ``"jsd"``, the Jensen-Shannon divergence; or ``"dola"``, what DoLa's reference implementation
            computes in its place (docs/models.md). The first of the layers that diverge most is taken.
        normalize: whether the contrast is made a distribution.

    Raises:
        ValueError, TypeError: ``<argument>: expected X, got Y``.
    """

    weight: float | None = None
    alpha: float = 0.1
    amateur_temperature: float = 1.0
    divergence: str = "jsd"
    normalize: bool = False
    reads = None
    falls = False
    weighs = True

    def __post_init__(self) -> None:
        if self.weight is not None:
            nonnegative_number("weight", self.weight)
        probability("alpha", self.alpha)
        positive_number("amateur_temperature", self.amateur_temperature)
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"divergence: expected one of {list(DIVERGENCES)}, got {self.divergence!r}")
        if not isinstance(self.normalize, bool):
            raise TypeError(f"normalize: expected a bool, got {type(self.normalize).__name__}")

    @property
    def rescores(self) -> bool:
        """Unless it is a distribution."""
        return not self.normalize

    def begin(self, batch_size: int, device: torch.device) -> None:
        """Nothing."""

    def check(self, models: int, per_row: Tensor | None) -> None:
        """See :class:`flashbeam.models.Models`."""
        if models < 2:
            raise ValueError(f"logits: expected those of the expert and of one amateur or more, got {models} tensor")

    def combine(self, settings: None, given: Given) -> Combined:
        """See :class:`flashbeam.models.Models`."""
        expert, *amateurs = given.logits
        temperature = None if self.normalize else given.temperature
        other = None
        if self.amateur_temperature != 1:
            other = torch.full_like(given.active, self.amateur_temperature, dtype=torch.float32)

        def summary(x: Tensor, bitmask: Tensor | None, tau: Tensor | None) -> Summary:
            return summarize(x, bitmask=bitmask, temperature=tau, normalize=given.normalize, **given.extent)

        found = summary(expert, given.allowed, temperature)
        others = [summary(x, given.barred, other) for x in amateurs]
        top = found.tiles.tile_max.amax(1).float()
        choice = None
        if len(amateurs) > 1:
            apart = [
                divergence(
                    expert,
                    x,
                    found.lse,
                    lse,
                    kind=self.divergence,
                    temperature=temperature,
                    other_temperature=other,
                    **given.extent,
                )
                for x, (_, lse, _) in zip(amateurs, others, strict=True)
            ]
            choice = torch.stack(apart, 1).argmax(1)
        scores, lost = contrast(
            expert,
            amateurs,
            found.lse,
            torch.stack([lse for _, lse, _ in others], 1),
            top if temperature is None else top / temperature,
            weight=self.weight,
            alpha=self.alpha,
            temperature=temperature,
            amateur_temperature=other,
            choice=choice,
            bitmask=given.allowed,
            **given.extent,
        )
        flags = faults(found.flags, lost, *(flags for _, _, flags in others))
        return Combined(scores, None, flags) if self.normalize else Combined(expert, scores, flags)
