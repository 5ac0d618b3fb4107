"""The tensors a search keeps on the device, and how candidates that end are told from those that live on.

Everything is preallocated; one decode step writes it in place. K slots, T steps, F places in the pool of finished
hypotheses, ``T + 1`` lengths. A hypothesis is a path through the history of (token, parent): no prefix is copied.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .bitmask import bits_at
from .keys import adjust, lexsort_descending, pack_key, token_log_prob
from .lse import FLAG_INF, FLAG_NAN

FLAG_DEAD_END = 4
FLAG_INEXACT = 8


class Slots(NamedTuple):
    """What is in each beam slot."""

    log_probs: Tensor  # float32 [B, K], cumulative, natural log; -inf in an empty slot
    lengths: Tensor  # int32 [B, K], generated tokens, EOS included
    ranks: Tensor  # int32 [B, K], place among the candidates of the last step
    ended: Tensor  # bool [B, K], ends with EOS and stays in its slot (in place only)
    active: Tensor  # bool [B, K], is to be expanded: its row of logits is read
    scores: Tensor  # float32 [B, K], what is ranked, before a length norm: log_probs, less penalties; or perturbed


class Draws(NamedTuple):
    """What rules that sample keep for each slot."""

    nodes: Tensor  # int64 [B, K], hash of the prefix: see kernels/random.py
    sampling_log_probs: Tensor  # float32 [B, K], cumulative, of what was sampled from
    # float32 [B, K], what inclusion probabilities are made from: for fb.ConditionalPoisson their cumulative logarithm,
    # for fb.Stochastic the threshold so far, the same in every slot
    inclusion: Tensor
    codes: Tensor  # int64 [B, K], an arithmetic code's 64 bits


class Requests(NamedTuple):
    """How far each request is."""

    done: Tensor  # bool [B]
    flags: Tensor  # int32 [B], FLAG_NAN, FLAG_INF, FLAG_DEAD_END, FLAG_INEXACT
    steps: Tensor  # int32 [B], decode steps made; stands still when done


class History(NamedTuple):
    """What was chosen at each step."""

    tokens: Tensor  # int32 [T, B, K]
    parents: Tensor  # int32 [T, B, K], slot at the step before
    token_log_probs: Tensor  # float32 [T, B, K]; -inf where the step filled no slot


class Pool(NamedTuple):
    """Finished hypotheses: a path through the history to (step - 1, parent), then an EOS token at ``step``."""

    scores: Tensor  # float32 [B, F]; -inf in an empty place
    log_probs: Tensor  # float32 [B, F]
    token_log_probs: Tensor  # float32 [B, F], of the EOS
    tokens: Tensor  # int32 [B, F], the EOS
    parents: Tensor  # int32 [B, F]
    steps: Tensor  # int32 [B, F], counted from 0
    ranks: Tensor  # int32 [B, F], place among the candidates of that step


class Limits(NamedTuple):
    """What the user set, per request. Constant during a search."""

    width: Tensor  # int32 [B], beams in use
    min_length: Tensor  # int32 [B]
    max_length: Tensor  # int32 [B]
    quota: Tensor  # int32 [B], finished hypotheses that end the request, whatever else does
    length_norm: Tensor  # float32 [B, T + 1], score = log_prob / length_norm[length] of a finished hypothesis
    bound_norm: Tensor  # float32 [B, T + 1], greatest norm of a length still open after so many tokens


class Rule(NamedTuple):
    """What a pool keeps, and when its request is done; besides, ``Limits.quota`` hypotheses in it end a request."""

    by_arrival: bool = False  # the pool keeps hypotheses in order of arrival, not the best by score
    overflow: str = "last"  # by arrival, when more than the quota are kept: "never", at the "last" step, at any "step"
    best_live: bool = False  # done once the pool is full and the best live beam, scored as it is, is not better
    exact: bool = False  # done once the pool is full and no live beam can still enter it
    shrinks: bool = False  # every hypothesis in the pool takes a beam away
    awaits_best: bool = False  # the quota ends a request only once the best candidate of some step has finished


class Moves(NamedTuple):
    """Which beams go on, for the caller's loop: see ``Step`` in flashbeam."""

    tokens: Tensor  # int64 [B, K]
    parents: Tensor  # int64 [B, K]
    source_rows: Tensor  # int64 [B * K]
    valid: Tensor  # bool [B, K]


class Endings(NamedTuple):
    """The EOS candidates of a step, ``E = P * n_eos`` per request."""

    log_probs: Tensor  # float32 [B, E]; -inf where EOS may not follow
    parents: Tensor  # int64 [B, E]
    tokens: Tensor  # int64 [B, E]
    token_log_probs: Tensor  # float32 [B, E]
    scores: Tensor  # float32 [B, E]
    adjusted: Tensor  # float32 [B, E]


def endings(
    logits: Tensor,
    lse: Tensor,
    bitmask: Tensor | None,
    temperature: Tensor | None,
    eos: Tensor,
    slots: Slots,
    may_end: Tensor,
    penalty: Tensor | None,
    end_scores: Tensor | None = None,
) -> Endings:
    """The EOS candidates of rows ``logits [B * P, V]``; ``may_end`` is bool ``[B]``.

    Their scores are those of their parents plus their own log-probabilities, or ``end_scores`` float32 ``[B, E]``; less
    ``penalty`` float32 ``[B, E]``. A score of -inf, and an infinite penalty, bar a candidate.
    """
    batch = slots.log_probs.shape[0]
    parents, count = logits.shape[0] // batch, eos.shape[0]
    adjusted = adjust(logits[:, eos], None if temperature is None else temperature[:, None])
    if bitmask is not None:
        adjusted = adjusted.masked_fill(~bits_at(bitmask, slice(None), eos), -torch.inf)
    increment = token_log_prob(adjusted, lse[:, None]).view(batch, parents, count)
    open_slots = slots.active[:, :parents] & may_end[:, None]
    log_probs, scores = (
        (field[:, :parents].masked_fill(~open_slots, -torch.inf)[:, :, None] + increment).flatten(1)  # [B, P * n_eos]
        for field in (slots.log_probs, slots.scores)
    )
    if end_scores is not None:
        scores = end_scores.masked_fill(log_probs == -torch.inf, -torch.inf)
        log_probs = log_probs.masked_fill(scores == -torch.inf, -torch.inf)
    if penalty is not None:
        scores = scores - penalty
        log_probs = log_probs.masked_fill(penalty == torch.inf, -torch.inf)
    parent = torch.arange(parents, device=eos.device).repeat_interleave(count).expand(batch, -1)
    token = eos.repeat(parents).expand(batch, -1)
    return Endings(log_probs, parent, token, increment.flatten(1), scores, adjusted.view(batch, -1))


def total_order(*groups: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """Positions int64 ``[B, M]`` that put groups of candidates, side by side, in the total order.

    A group is (scores, parents, adjusted logits, tokens), each ``[B, m]``. Equal candidates keep their order.
    """
    scores, parents, adjusted, tokens = (torch.cat(fields, 1) for fields in zip(*groups, strict=True))
    return lexsort_descending(pack_key(scores, parents), pack_key(adjusted, tokens))


def next_length(requests: Requests, limits: Limits) -> Tensor:
    """int64 ``[B]``: tokens in a hypothesis after this step; stays inside the tables of ``limits``."""
    return (requests.steps + 1).clamp(max=limits.length_norm.shape[1] - 1).long()


def record(
    requests: Requests, history: History, tokens: Tensor, parents: Tensor, increments: Tensor, live: Tensor
) -> None:
    """Write one step ``[B, K]`` of the live requests into the history, count it, and mark nothing else."""
    request = live.nonzero()[:, 0]
    step = requests.steps[request].long()
    now = (tokens, parents, increments)
    same = request.shape[0] == live.shape[0] and bool((step == step[0]).all())  # nobody is done yet
    for field, values in zip(history, now, strict=True):
        if same:
            field[int(step[0])] = values
        else:
            field[step, request] = values[request].to(field.dtype)
    requests.steps.add_(live.int())


def report_faults(requests: Requests, row_flags: Tensor, dead_end: Tensor) -> None:
    """Raise the flags of a step: ``row_flags`` int32 ``[B * P]`` of the rows read, ``dead_end`` bool ``[B]``."""
    if bool(row_flags.any()):
        rows = row_flags.view(requests.flags.shape[0], -1)
        for flag in (FLAG_NAN, FLAG_INF, FLAG_INEXACT):
            requests.flags.bitwise_or_((rows & flag).amax(1))
    requests.flags.bitwise_or_(dead_end.int() * FLAG_DEAD_END)


def make_moves(tokens: Tensor, parents: Tensor, keep: Tensor, moving: Tensor, rows: int, pad_id: int) -> Moves:
    """Moves of the slots in ``keep [B, K]``, whose caches come along where ``moving``; the others are idle."""
    batch, beams = keep.shape
    per_request = rows // batch
    slot = torch.arange(beams, device=keep.device)
    source = torch.where(moving, parents, slot.clamp(max=per_request - 1))
    first_row = torch.arange(0, rows, per_request, device=keep.device)[:, None]
    return Moves(
        torch.where(keep, tokens, pad_id), torch.where(keep, parents, slot), (source + first_row).flatten(), keep
    )


def fake_moves(candidates: list[Tensor]) -> Moves:
    """Shapes and dtypes of :class:`Moves`, for tracing."""
    ids = torch.empty_like(candidates[1])
    return Moves(ids, torch.empty_like(ids), ids.new_empty(ids.numel()), ids.new_empty(ids.shape, dtype=torch.bool))
