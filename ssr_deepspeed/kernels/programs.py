"""The Triton programs. Imported only where they run, for Triton may be missing.

Each holds a tile of R rows (tokens) and all columns (experts, padded to a power of two) and takes
tiles at a stride of all programs. Sums over rows stay in registers until the last tile and end as
one partial sum a program, so the result does not depend on which program is faster. Names carry
the tensor they point to; tile variables carry R (rows) and C (padded columns).
"""

import triton
import triton.language as tl

LARGEST = tl.constexpr(3.4028234663852886e38)  # fp32
# A program's column sum below this is done again in logarithms. Terms that fp32 flushes to zero are below 1.2e-38: in
# 1e5 rows they are less than 1e-7 of a sum above it.
FAINT = tl.constexpr(1e-25)


@triton.jit
def _tile(scores_TE, start, tokens, E: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row_R = start + tl.arange(0, ROWS)
    column_C = tl.arange(0, COLUMNS)
    # T x E may pass 2**31.
    offset_RC = row_R.to(tl.int64)[:, None] * E + column_C[None, :]
    mask_RC = (row_R < tokens)[:, None] & (column_C < E)[None, :]
    return tl.load(scores_TE + offset_RC, mask=mask_RC, other=0.0), offset_RC, mask_RC


@triton.jit
def _rank(value_RC, E: tl.constexpr, COLUMNS: tl.constexpr):
    """The order of choice: finite for experts (NaN first, as in torch.topk), -inf for padding."""
    finite_RC = tl.minimum(tl.maximum(value_RC, -LARGEST), LARGEST)
    # A GPU's maximum drops a NaN, numpy's, in the interpreter, keeps it.
    finite_RC = tl.where(value_RC == value_RC, finite_RC, LARGEST)
    return tl.where((tl.arange(0, COLUMNS) < E)[None, :], finite_RC, -float("inf"))


@triton.jit
def _total(value_RC, largest_R, scale, E: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum of exp((value - largest) * scale); NaN for a row with a NaN or plus infinity."""
    term_RC = tl.exp((value_RC - largest_R[:, None]) * scale)
    total_R = tl.sum(tl.where((tl.arange(0, COLUMNS) < E)[None, :], term_RC, 0.0), axis=1)
    # Divided by an infinity, the row would seem to have a mass of zero.
    return tl.where(total_R < float("inf"), total_R, float("nan"))


@triton.jit
def _choose(rank_RC, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHOICES: tl.constexpr):
    """The K largest of each row, best first, the left one of equals; their columns; the ranks with them at -inf.

    They are gathered in a tile: stores of one choice at a time would exchange it among threads each time.
    """
    choice_K = tl.arange(0, CHOICES)[None, :]
    value_RK = tl.zeros([ROWS, CHOICES], dtype=tl.float32)
    expert_RK = tl.zeros([ROWS, CHOICES], dtype=tl.int32)
    for i in tl.static_range(K):
        best_R, expert_R = tl.max(rank_RC, axis=1, return_indices=True, return_indices_tie_break_left=True)
        rank_RC = tl.where(tl.arange(0, COLUMNS)[None, :] == expert_R[:, None], -float("inf"), rank_RC)
        value_RK = tl.where(choice_K == i, best_R[:, None], value_RK)
        expert_RK = tl.where(choice_K == i, expert_R[:, None], expert_RK)
    return tl.where(value_RK == -LARGEST, -float("inf"), value_RK), expert_RK, rank_RC


@triton.jit
def _softmax_at(chosen_RC, score_RC, E: tl.constexpr, COLUMNS: tl.constexpr):
    score_R = tl.sum(tl.where(chosen_RC, score_RC, 0.0), axis=1)
    largest_R = tl.max(_rank(score_RC, E, COLUMNS), axis=1)
    return tl.exp(score_R - largest_R) / _total(score_RC, largest_R, 1.0, E, COLUMNS)


@triton.jit
def route_program(
    scores_TE,
    potentials_E,
    used_T,
    experts_TK,
    mass_TK,
    log_mass_TK,
    demand_E,
    tokens,
    inverse_entropy,
    E: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHOICES: tl.constexpr,
):
    column_C = tl.arange(0, COLUMNS)
    choice_K = tl.arange(0, CHOICES)[None, :]
    asked_RC = tl.zeros([ROWS, COLUMNS], dtype=tl.int32)
    for start in range(tl.program_id(0) * ROWS, tokens, tl.num_programs(0) * ROWS):
        score_RC, _, mask_RC = _tile(scores_TE, start, tokens, E, ROWS, COLUMNS)
        value_RC = score_RC
        if potentials_E is not None:
            value_RC += tl.load(potentials_E + column_C, mask=column_C < E, other=0.0)[None, :]
        rank_RC = _rank(value_RC, E, COLUMNS)
        largest_R = tl.max(rank_RC, axis=1)
        total_R = _total(value_RC, largest_R, inverse_entropy, E, COLUMNS)
        value_RK, expert_RK, rank_RC = _choose(rank_RC, K, ROWS, COLUMNS, CHOICES)
        # What was chosen is the only real expert at -inf.
        chosen_RC = mask_RC & (rank_RC == -float("inf"))
        distance_RK = (value_RK - largest_R[:, None]) * inverse_entropy
        mass_RK = tl.exp(distance_RK) / total_R[:, None]
        if K == 1:
            softmax_R = _softmax_at(chosen_RC, score_RC, E, COLUMNS)
            mass_RK = tl.where(choice_K == 0, softmax_R[:, None], mass_RK)
        row_R = start + tl.arange(0, ROWS)
        offset_RK = row_R.to(tl.int64)[:, None] * K + choice_K
        mask_RK = (row_R < tokens)[:, None] & (choice_K < K)
        tl.store(experts_TK + offset_RK, expert_RK.to(tl.int64), mask=mask_RK)
        tl.store(mass_TK + offset_RK, mass_RK, mask=mask_RK)
        tl.store(log_mass_TK + offset_RK, distance_RK - tl.log(total_R)[:, None], mask=mask_RK)
        counted_RC = chosen_RC
        if used_T is not None:
            counted_RC = counted_RC & (tl.load(used_T + row_R, mask=row_R < tokens, other=0) != 0)[:, None]
        asked_RC += counted_RC.to(tl.int32)
    asked_C = tl.sum(asked_RC, axis=0)
    tl.atomic_add(demand_E + column_C, asked_C.to(tl.int64), mask=(column_C < E) & (asked_C > 0), sem="relaxed")


@triton.jit
def route_backward_program(
    gradient_TK,
    mass_TK,
    experts_TK,
    scores_TE,
    scores_gradient_TE,
    potentials_gradient_PE,
    tokens,
    inverse_entropy,
    E: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column_C = tl.arange(0, COLUMNS)
    sum_RC = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(tl.program_id(0) * ROWS, tokens, tl.num_programs(0) * ROWS):
        row_R = start + tl.arange(0, ROWS)
        inside_R = row_R < tokens
        offset_RC = row_R.to(tl.int64)[:, None] * E + column_C[None, :]
        mask_RC = inside_R[:, None] & (column_C < E)[None, :]
        slope_RC = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        for i in tl.static_range(K):
            offset_R = row_R.to(tl.int64) * K + i
            expert_R = tl.load(experts_TK + offset_R, mask=inside_R, other=0)
            mass_R = tl.load(mass_TK + offset_R, mask=inside_R, other=0.0)
            flow_R = mass_R * tl.load(gradient_TK + offset_R, mask=inside_R, other=0.0)
            here_RC = column_C[None, :] == expert_R[:, None]
            if K == 1:
                score_RC, _, _ = _tile(scores_TE, start, tokens, E, ROWS, COLUMNS)
                largest_R = tl.max(_rank(score_RC, E, COLUMNS), axis=1)
                total_R = _total(score_RC, largest_R, 1.0, E, COLUMNS)
                softmax_RC = tl.exp(score_RC - largest_R[:, None]) / total_R[:, None]
                slope_RC = flow_R[:, None] * (here_RC.to(tl.float32) - softmax_RC)
            else:
                slope_RC = tl.where(here_RC, (flow_R * inverse_entropy)[:, None], slope_RC)
        tl.store(scores_gradient_TE + offset_RC, slope_RC, mask=mask_RC)
        if potentials_gradient_PE is not None:
            sum_RC += tl.where(mask_RC, slope_RC, 0.0)
    if potentials_gradient_PE is not None:
        offset_C = tl.program_id(0) * E + column_C
        tl.store(potentials_gradient_PE + offset_C, tl.sum(sum_RC, axis=0), mask=column_C < E)


@triton.jit
def _rows_of_the_plan(
    scaled_TE, potential_C, weight_T, start, tokens, E: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Distance to the row's largest, `-inf` in padding; the row's total; the row's weight."""
    scaled_RC, _, _ = _tile(scaled_TE, start, tokens, E, ROWS, COLUMNS)
    value_RC = tl.where((tl.arange(0, COLUMNS) < E)[None, :], scaled_RC + potential_C[None, :], -float("inf"))
    distance_RC = value_RC - tl.max(value_RC, axis=1)[:, None]
    row_R = start + tl.arange(0, ROWS)
    weight_R = tl.load(weight_T + row_R, mask=row_R < tokens, other=0.0)
    return distance_RC, tl.sum(tl.exp(distance_RC), axis=1), weight_R


@triton.jit
def _faint_columns(
    scaled_TE, potential_C, weight_T, tokens, E: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """The program's column sums by a running log-sum-exp: they keep what fp32 cannot hold as a sum."""
    peak_C = tl.full([COLUMNS], -float("inf"), dtype=tl.float32)
    sum_C = tl.zeros([COLUMNS], dtype=tl.float32)
    for start in range(tl.program_id(0) * ROWS, tokens, tl.num_programs(0) * ROWS):
        distance_RC, total_R, weight_R = _rows_of_the_plan(
            scaled_TE, potential_C, weight_T, start, tokens, E, ROWS, COLUMNS
        )
        log_plan_RC = distance_RC + tl.log(weight_R / total_R)[:, None]
        log_plan_RC = tl.where((weight_R != 0.0)[:, None], log_plan_RC, -float("inf"))
        raised_C = tl.maximum(peak_C, tl.max(log_plan_RC, axis=0))
        origin_C = tl.where(raised_C == -float("inf"), 0.0, raised_C)
        sum_C = sum_C * tl.exp(peak_C - origin_C) + tl.sum(tl.exp(log_plan_RC - origin_C[None, :]), axis=0)
        peak_C = raised_C
    return sum_C.to(tl.float64) * tl.exp(peak_C.to(tl.float64))


@triton.jit
def columns_program(
    scaled_TE,
    potential_E,
    weight_T,
    columns_PE,
    tokens,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column_C = tl.arange(0, COLUMNS)
    potential_C = tl.load(potential_E + column_C, mask=column_C < E, other=0.0)
    sum_RC = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(tl.program_id(0) * ROWS, tokens, tl.num_programs(0) * ROWS):
        distance_RC, total_R, weight_R = _rows_of_the_plan(
            scaled_TE, potential_C, weight_T, start, tokens, E, ROWS, COLUMNS
        )
        plan_RC = tl.exp(distance_RC) * (weight_R / total_R)[:, None]
        # Not by the weight alone: zero times NaN is NaN.
        sum_RC += tl.where((weight_R != 0.0)[:, None], plan_RC, 0.0)
    sum_C = tl.sum(sum_RC, axis=0)
    result_C = sum_C.to(tl.float64)
    if tl.min(tl.where(column_C < E, sum_C, 1.0), axis=0) < FAINT:
        result_C = _faint_columns(scaled_TE, potential_C, weight_T, tokens, E, ROWS, COLUMNS)
    tl.store(columns_PE + tl.program_id(0) * E + column_C, result_C, mask=column_C < E)
