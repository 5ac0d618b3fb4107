"""Expectations under the model from a sample of hypotheses."""

import torch
from torch import Tensor

from .hypotheses import Hypotheses


def weights(hyps: Hypotheses, normalized: bool = True) -> Tensor:
    """What each hypothesis counts for in an expectation, so that ``E[f] ~ (weights * f).sum(1)``.

    - ``fb.Stochastic`` (Kool, van Hoof, Welling 2019, section 4.2): ``q / P(G > kappa)``; the last of the K sets the
      threshold kappa and has weight 0. Where fewer than K sequences exist all are there and count their probability.
    - ``fb.ConditionalPoisson`` (Horvitz-Thompson): ``q / pi`` with pi the product, over the steps, of the inclusion
      probabilities along the hypothesis' own path: unbiased from a single run, by the tower property.
    - ``fb.Sample``, ``fb.Arithmetic``: ``1 / K``.

    with q the probability under what was sampled from. These make the estimator unbiased; ``normalized`` divides them
    by their sum: mostly far less variance, for a bias that vanishes as K grows. Over long sequences the products of
    fb.ConditionalPoisson spread over orders of magnitude, and one run tells little either way.

    Args:
        hyps: all K hypotheses of each request, as ``finalize(state)`` gives them.
        normalized: let the weights of a request sum to 1.

    Returns:
        float64 ``[B, N]``; 0 where not valid.

    Raises:
        TypeError: ``hyps`` is something else.
        ValueError: the hypotheses are no sample, or not all of it, or a Stochastic one of less than 2.
    """
    if not isinstance(hyps, Hypotheses):
        raise TypeError(f"hyps: expected Hypotheses, got {type(hyps).__name__}")
    if hyps.sampling_log_probs is None:
        raise ValueError("hyps: expected a sample, such as fb.Stochastic draws, got hypotheses of a search")
    count = hyps.valid.shape[1]
    widest = int(hyps.beam_size.max()) if hyps.beam_size.numel() else 0
    if count < widest:
        raise ValueError(f"hyps: expected all {widest} hypotheses of each request, got {count}")
    log_weights = torch.zeros_like(hyps.sampling_log_probs, dtype=torch.float64)
    counted = hyps.valid
    if hyps.log_inclusion is not None:
        log_weights = hyps.sampling_log_probs.double() - hyps.log_inclusion
    if hyps.perturbed is not None and hyps.threshold is not None:
        if bool((hyps.beam_size < 2).any()):
            raise ValueError("hyps: expected a beam_size of 2 or more: the last of fb.Stochastic sets the threshold")
        counted = counted & (hyps.perturbed > hyps.threshold[:, None])
    if hyps.log_inclusion is None and not normalized:
        return counted / hyps.beam_size[:, None].double()
    log_weights = log_weights.masked_fill(~counted, -torch.inf)
    return log_weights.softmax(1).nan_to_num(0.0) if normalized else log_weights.exp()


def estimate(hyps: Hypotheses, values: Tensor, normalized: bool = True) -> Tensor:
    """Estimate the expectation of a function of sequences under the distribution that was sampled.

    For a standard error decode the same prompt as R independent requests (other ``request_ids``) or with R seeds: the
    estimates are independent, so it is their standard deviation over sqrt(R). The weights of one run do not tell it.

    Args:
        hyps: all K hypotheses of each request.
        values: ``[B, N]``, the function of each; ignored where not valid.
        normalized: see :func:`weights`; otherwise the estimate is unbiased.

    Returns:
        float64 ``[B]``.

    Raises:
        TypeError, ValueError: ``values`` has another shape, or see :func:`weights`.
    """
    if not isinstance(hyps, Hypotheses):
        raise TypeError(f"hyps: expected Hypotheses, got {type(hyps).__name__}")
    if not isinstance(values, Tensor):
        raise TypeError(f"values: expected a tensor, got {type(values).__name__}")
    if values.shape != hyps.valid.shape:
        raise ValueError(f"values: expected shape {list(hyps.valid.shape)}, got {list(values.shape)}")
    share = weights(hyps, normalized)
    return (share * values.double().masked_fill(share == 0.0, 0.0)).sum(1)
