"""Routes that find their expert full move to another expert of their token that has room.

An expert that is asked for more routes than its capacity keeps those with the largest plan mass.
The others, the open routes, are placed in three stages:

1. asking: each open route asks for the best expert that has room and that its token does not use;
   an expert takes the largest plan masses first. What was refused asks again in the next round.
2. pairing: open routes and free slots are listed, and the n-th route takes the n-th slot, unless
   its token uses that expert already.
3. swaps: the n-th token with an open route and the n-th free slot, at expert j, are paired again.
   If the token uses j, a donor makes room elsewhere: a token without open routes that does not use
   j gives up one of its experts, e, and takes j; the open route takes e. Every donor has such an e,
   for it uses more experts than the token with the open route. There are donors, for j has a free
   slot and fewer slots than there are tokens, so that more tokens do without j than j has free
   slots; those of them with open routes take j themselves.

The numbers of rounds are fixed, so that nothing is read from the device; where reading is free the
rounds end when nothing is left to place, with the same result, and only rows with an open route
are worked on.

Shapes: T tokens, E experts, K choices a token, A tokens worked on in a round, D donors looked at.
The board's tensors have one row (T + 1) and one column (E + 1) more, which take the writes that are
to have no effect.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ssr_deepspeed.ot.problem import readable
from ssr_deepspeed.routing.ranks import asked_routes, rank_in_expert

# Measured on 512 tokens, 32 experts, clustered: without asking the mean score of a route is 1.66
# below that of the best assignment (k = 1), after 1, 4, 6 and 16 rounds 1.12, 0.39, 0.25 and 0.24.
ASKING_ROUNDS = 6
# Beside one for each choice: a round places one route of a token. Where 2 k >= E few tokens can be
# donors, and another two for each choice were needed (17 in all at k = 8, E = 9).
SWAP_ROUNDS = 6
DONORS = 16
# A prime above any number of tokens: multiplying by it permutes them, so that neighbours, which are
# often alike, are not looked at together.
STRIDE = 2654435761
GOLDEN = 0.618


@dataclass(frozen=True)
class Placement:
    """Where each route went."""

    experts_TK: Tensor
    """int64; those that are kept are distinct in each row, the others are as they were."""
    kept_TK: Tensor
    """bool; False marks a route without a slot: padding, or no slot is left that its token could use."""


@torch.no_grad()
def place_overflow(
    experts: Tensor, log_mass: Tensor, scaled: Tensor, capacity: int, used: Tensor | None = None
) -> Placement:
    """Keep the most probable routes of each expert and move the others to experts with room.

    With `capacity * E >= T * k` nothing is dropped: always for k = 1; for k > 1 in all that was measured
    without padding (k up to 16 and E up to 128 with equal rows, 32,768 tokens that prefer the same experts
    in the same order), but the rounds are bounded, so not by proof.

    Args:
        experts: `[T, K]`, int64, distinct in each row, best first.
        log_mass: `[T, K]`, fp32, logarithm of the plan mass of these routes.
        scaled: `[T, E]`, fp32, `(C + g) / xi`: the larger, the better for that token.
        capacity: slots of each expert.
        used: `[T]`, bool; False marks padding, which is neither kept nor moved.
    """
    tokens, choices = experts.shape
    asked_TK = asked_routes(experts, used)
    if capacity >= tokens:
        return Placement(experts, asked_TK)
    count = scaled.shape[1]
    kept_TK = asked_TK & (rank_in_expert(experts, log_mass, asked_TK, count) < capacity)
    board = _Board.start(experts, asked_TK, kept_TK, count, capacity)
    log_total_T1 = scaled.gather(1, experts[:, :1]) - log_mass[:, :1]
    for _ in range(ASKING_ROUNDS):
        if (rows_A := board.open_rows()) is None:
            break
        _ask(board, rows_A, scaled, log_total_T1)
    if (rows_A := board.open_rows()) is not None:
        _pair(board, rows_A)
    # With k = 1 an open route's token uses no expert, and pairing has placed it.
    swaps = 0 if choices == 1 else SWAP_ROUNDS + choices * (3 if 2 * choices >= count else 1)
    for turn in range(swaps):
        if (rows_A := board.open_rows()) is None:
            break
        _swap(board, rows_A, scaled, asked_TK[:, 0], turn, swaps)
    return Placement(board.experts_TK[:-1], asked_TK & ~board.open_TK[:-1])


@dataclass(frozen=True)
class _Board:
    """The state of the placement, changed in place."""

    experts_TK: Tensor
    open_TK: Tensor
    """bool, routes asked for that have no slot."""
    taken_TE: Tensor
    """bool, whether a token has a slot at an expert."""
    free_E: Tensor
    """int64, slots left."""
    yes: Tensor
    """True as a 0-dim bool tensor: Python's would be copied to the device at each assignment, which waits for it."""
    no: Tensor

    @classmethod
    def start(cls, experts_TK: Tensor, asked_TK: Tensor, kept_TK: Tensor, count: int, capacity: int) -> _Board:
        tokens, choices = experts_TK.shape
        spare_1K = experts_TK.new_zeros(1, choices)
        board = cls(
            torch.cat([experts_TK, spare_1K]),
            torch.cat([asked_TK, spare_1K.bool()]),
            asked_TK.new_zeros(tokens + 1, count + 1),
            experts_TK.new_full((count + 1,), capacity),
            asked_TK.new_ones(()),
            asked_TK.new_zeros(()),
        )
        board.seat(torch.arange(tokens, device=experts_TK.device), experts_TK, kept_TK)
        return board

    def open_rows(self) -> Tensor | None:
        """Rows to work on, in order; None if it is known that nothing is left to place."""
        if not readable(self.open_TK):
            return torch.arange(self.open_TK.shape[0] - 1, device=self.open_TK.device)
        if not bool((self.free_E[:-1] > 0).any()):
            return None
        rows_A = self.open_TK.any(dim=1).nonzero().squeeze(1)
        return rows_A if len(rows_A) else None

    def slot(self, place: Tensor, share: float = 0.0) -> tuple[Tensor, Tensor]:
        """Expert of each place in the list of free slots, rotated by a share of it, and whether it is that long."""
        end_E = torch.cumsum(self.free_E[:-1], dim=0)
        slot = (place + (end_E[-1] * share).long()) % end_E[-1].clamp_min(1)
        expert = torch.searchsorted(end_E, slot, right=True)
        return expert.clamp_max(end_E.shape[0] - 1), place < end_E[-1]

    def seat(self, rows_A: Tensor, wish_AK: Tensor, granted_AK: Tensor) -> None:
        """Give granted routes a slot of the expert they wish for."""
        column_AK = torch.where(granted_AK, wish_AK, self.free_E.shape[0] - 1)
        self.experts_TK[rows_A] = torch.where(granted_AK, wish_AK, self.experts_TK[rows_A])
        self.open_TK[rows_A] = self.open_TK[rows_A] & ~granted_AK
        self.taken_TE[rows_A.unsqueeze(1), column_AK] = self.yes
        self.free_E.scatter_add_(0, column_AK.reshape(-1), -granted_AK.reshape(-1).long())


def _ask(board: _Board, rows_A: Tensor, scaled_TE: Tensor, log_total_T1: Tensor) -> None:
    open_AK = board.open_TK[rows_A]
    barred_AE = board.taken_TE.index_select(0, rows_A)[:, :-1] | (board.free_E[:-1] <= 0)
    scaled_AE = scaled_TE.index_select(0, rows_A).masked_fill_(barred_AE, -math.inf)
    # A maximum takes a third of the time of a top-1 (256 experts, CPU).
    choices = open_AK.shape[1]
    best_AK, expert_AK = scaled_AE.max(dim=1, keepdim=True) if choices == 1 else scaled_AE.topk(choices, dim=1)
    nth_AK = _nth_open(open_AK)
    wish_AK = expert_AK.gather(1, nth_AK)
    asking_AK = open_AK & ~barred_AE.gather(1, wish_AK)
    # At most 0 but for rounding, as the ranking requires.
    log_mass_AK = (best_AK.gather(1, nth_AK) - log_total_T1[rows_A]).clamp_max(0)
    rank_AK = rank_in_expert(wish_AK, log_mass_AK, asking_AK, scaled_TE.shape[1])
    board.seat(rows_A, wish_AK, asking_AK & (rank_AK < board.free_E[wish_AK]))


def _pair(board: _Board, rows_A: Tensor) -> None:
    open_AK = board.open_TK[rows_A]
    # All first open routes are listed before all second ones: those of one token lie far apart in the
    # list and mostly meet different experts.
    has_nth_KA = torch.arange(open_AK.shape[1], device=open_AK.device).unsqueeze(1) < open_AK.sum(dim=1)
    place_KA = torch.cumsum(has_nth_KA.reshape(-1), dim=0).view_as(has_nth_KA) - 1
    wish_AK, exists_AK = board.slot(place_KA.t().gather(1, _nth_open(open_AK)))
    fitting_AK = open_AK & exists_AK & ~board.taken_TE[rows_A.unsqueeze(1), wish_AK]
    earlier_AKK = ((wish_AK.unsqueeze(2) == wish_AK.unsqueeze(1)) & fitting_AK.unsqueeze(1)).tril(-1)
    board.seat(rows_A, wish_AK, fitting_AK & ~earlier_AKK.any(dim=2))


def _nth_open(open_AK: Tensor) -> Tensor:
    """How many open routes of its token come before each open route."""
    return (torch.cumsum(open_AK, dim=1) - 1).clamp_min(0)


def _swap(board: _Board, rows_A: Tensor, scaled_TE: Tensor, used_T: Tensor, turn: int, turns: int) -> None:
    tokens, count = scaled_TE.shape
    open_A = board.open_TK[rows_A].any(dim=1)
    place_A = torch.cumsum(open_A, dim=0) - 1
    wish_A, exists_A = board.slot(place_A, turn / turns)
    paired_A = open_A & exists_A
    direct_A = paired_A & ~board.taken_TE[rows_A, wish_A]
    donor_A = _donors(board, place_A, wish_A, paired_A & ~direct_A, used_T, turn)
    swapped_A = donor_A < tokens

    # What the donor gives up: the expert with which both together lose least.
    gift_AK = board.experts_TK[donor_A]
    change_AK = scaled_TE[rows_A.unsqueeze(1), gift_AK]
    change_AK = change_AK - scaled_TE[donor_A.clamp_max(tokens - 1).unsqueeze(1), gift_AK]
    change_AK = change_AK.nan_to_num(nan=torch.finfo(change_AK.dtype).min)
    change_AK = change_AK.masked_fill(board.taken_TE[rows_A.unsqueeze(1), gift_AK], -math.inf)
    column_A1 = change_AK.argmax(dim=1, keepdim=True)
    gift_A = gift_AK.gather(1, column_A1).squeeze(1)
    board.experts_TK[donor_A, column_A1.squeeze(1)] = wish_A
    board.taken_TE[donor_A, torch.where(swapped_A, gift_A, count)] = board.no
    board.taken_TE[donor_A, torch.where(swapped_A, wish_A, count)] = board.yes

    placed_A = direct_A | swapped_A
    row_A = torch.where(placed_A, rows_A, tokens)
    column_A = board.open_TK[row_A].long().argmax(dim=1)
    expert_A = torch.where(direct_A, wish_A, gift_A)
    board.experts_TK[row_A, column_A] = expert_A
    board.open_TK[row_A, column_A] = board.no
    board.taken_TE[row_A, torch.where(placed_A, expert_A, count)] = board.yes
    board.free_E.scatter_add_(0, wish_A, -placed_A.long())


def _donors(board: _Board, place_A: Tensor, wish_A: Tensor, wanted_A: Tensor, used_T: Tensor, turn: int) -> Tensor:
    """A token of its own for each pair that wants one, which can take `wish_A`; T where there is none."""
    tokens = used_T.shape[0]
    # The pairs start at equal distances, so that they seldom meet, and elsewhere in each round.
    first_A = place_A * tokens // (place_A[-1] + 1).clamp_min(1) + int(GOLDEN * turn * tokens)
    donor_D = torch.arange(min(tokens, DONORS), device=place_A.device)
    donor_AD = (first_A.unsqueeze(1) + donor_D) * STRIDE % tokens
    placed_T = used_T & ~board.open_TK[:-1].any(dim=1)
    able_AD = wanted_A.unsqueeze(1) & placed_T[donor_AD] & ~board.taken_TE[donor_AD, wish_A.unsqueeze(1)]
    at_A1 = able_AD.long().argmax(dim=1, keepdim=True)
    able_A = able_AD.gather(1, at_A1).squeeze(1)
    donor_A = torch.where(able_A, donor_AD.gather(1, at_A1).squeeze(1), tokens)
    # Of several pairs that chose one donor the first has it.
    row_A = torch.arange(place_A.shape[0], device=place_A.device)
    owner_T = row_A.new_full((tokens + 1,), tokens).scatter_reduce_(0, donor_A, row_A, "amin")
    return torch.where(able_A & (owner_T[donor_A] == row_A), donor_A, tokens)
