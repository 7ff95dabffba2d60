"""Triton kernels of the mLSTM's backward pass.

The states before every chunk are computed again, the gradients of the states after every chunk in reverse. With
D_t = max(|q n|, exp(-m)) + eps, delta_t = dh_t . h_t and P_ts = scale (q_t . k_s) exp(a_s - M_t), the gradients are
those of h = P v / D with the stabiliser held constant, and a correction for it: the gate that set m_t, now or earlier
in the document, is owed -delta_t eps / D_t, and what a loss on the last C, n, m owes to the last m. Together they are
exact. dh is used as it came and never scaled before a product.
"""

from __future__ import annotations

from .ops_mlstm_triton_fwd import (
    bound,
    carries,
    columns_tile,
    decays,
    keeps,
    log_sigmoid,
    product,
    rows_tile,
    soft_cap,
    writes,
)

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The Triton kernels need the package `triton`; `backend='auto'` does without it.") from error


@triton.jit
def earlier_sum(kept, total, kept_before, total_before):
    """x -> total + kept x, two of them one after the other."""
    return kept * kept_before, total_before + kept_before * total


@triton.jit(do_not_specialize=["T"])
def _mlstm_chunkwise_bwd_rows_kernel(
    dh, h, qn, m, over_D, dqn, dm, T, eps, dh_t, dh_h,
    H: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    # grid: (cdiv(T, BT), B * H). Writes 1 / D, the gradients of q n and, direct only, of m.
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = row // H, row % H
    rows = tl.arange(0, BT)
    left = T - tile * BT
    first = batch * T + tile * BT
    at = row * T + tile * BT + rows
    delta = tl.zeros([BT], tl.float32)
    for of in range(0, V, BV):
        of_v = of + tl.arange(0, BV)
        dh_tile = rows_tile(dh + first * dh_t + head * dh_h, rows, of_v, dh_t, left, V).to(tl.float32)
        h_tile = rows_tile(h + (first * H + head) * V, rows, of_v, H * V, left, V).to(tl.float32)
        delta += tl.sum(dh_tile * h_tile, 1)
    qn_t = tl.load(qn + at, mask=rows < left, other=0.0)
    floor = bound(tl.load(m + at, mask=rows < left, other=0.0))
    over = 1.0 / (tl.maximum(tl.abs(qn_t), floor) + eps)
    sign = tl.where(qn_t > 0.0, 1.0, -1.0)
    tl.store(over_D + at, over, mask=rows < left)
    tl.store(dqn + at, tl.where(tl.abs(qn_t) < floor, 0.0, -delta * over * sign), mask=rows < left)
    tl.store(dm + at, -delta * over * eps, mask=rows < left)


@triton.jit(do_not_specialize=["T", "N"])
def _mlstm_chunkwise_bwd_states_kernel(
    q, dh, M, over_D, dqn, document, m_in, C, n, C_last, n_last, dC_last, dn_last, dC, dn, dC_0, dn_0, overlap, T, N,
    q_t, q_h, dh_t, dh_h,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, L: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, RESET: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # grid: (cdiv(K, BK) * cdiv(V, BV), B * H). Writes the gradients of C, n after every chunk and before the first,
    # and what each program sees of C . dC + n . dn after every chunk.
    NV: tl.constexpr = (V + BV - 1) // BV
    PER_CHUNK: tl.constexpr = L // BT
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = row // H, row % H
    i_v = block % NV
    of_k, of_v, rows = (block // NV) * BK + tl.arange(0, BK), i_v * BV + tl.arange(0, BV), tl.arange(0, BT)
    q += batch * T * q_t + head * q_h
    dh += batch * T * dh_t + head * dh_h
    M += row * T
    over_D += row * T
    dqn += row * T
    m_in += row * (N + 1)
    document += batch * T
    overlap += (row * N) * tl.num_programs(0) + block
    matrix = of_k[:, None] * V + of_v[None, :]
    in_matrix = (of_k < K)[:, None] & (of_v < V)[None, :]
    dC_t = tl.load(dC_last + row * K * V + matrix, mask=in_matrix, other=0.0)
    dn_t = tl.load(dn_last + row * K + of_k, mask=of_k < K, other=0.0)
    C_t = tl.load(C_last + row * K * V + matrix, mask=in_matrix, other=0.0)
    n_t = tl.load(n_last + row * K + of_k, mask=of_k < K, other=0.0)
    tiles = tl.cdiv(T, BT)
    for back in range(0, tiles):
        tile = tiles - 1 - back
        c = tile // PER_CHUNK
        start = c * L
        last = tl.minimum(start + L, T) - 1
        state = row * N + c
        if tile == last // BT:
            tl.store(dC + state * K * V + matrix, dC_t.to(dC.dtype.element_ty), mask=in_matrix)
            seen = tl.sum(tl.sum(C_t * dC_t, 1), 0)
            if i_v == 0:
                tl.store(dn + state * K + of_k, dn_t, mask=of_k < K)
                seen += tl.sum(n_t * dn_t, 0)
            tl.store(overlap + tl.cast(c, tl.int64) * tl.num_programs(0), seen)
            C_t = tl.load(C + state * K * V + matrix, mask=in_matrix, other=0.0).to(tl.float32)
            n_t = tl.load(n + state * K + of_k, mask=of_k < K, other=0.0)
            keep = keeps(document, tl.load(m_in + c), tl.load(M + last), start, last, RESET)
            dC_t = dC_t * keep
            dn_t = dn_t * keep
        first = tl.cast(tile * BT, tl.int64)
        left = T - tile * BT
        within = tile * BT - start + rows
        M_t = tl.load(M + first + rows, mask=rows < left, other=float("inf"))
        carry = carries(document, tl.load(m_in + c), M_t, within, start, T - start, RESET)
        read = columns_tile(q + first * q_t, rows, of_k, q_t, left, K).to(tl.float32) * carry[None, :]
        dn_t += tl.sum(read * tl.load(dqn + first + rows, mask=rows < left, other=0.0)[None, :], 1)
        read = read * tl.load(over_D + first + rows, mask=rows < left, other=0.0)[None, :]
        dC_t = product(read, rows_tile(dh + first * dh_t, rows, of_v, dh_t, left, V), dC_t, DOT, PRECISION)
    tl.store(dC_0 + row * K * V + matrix, dC_t, mask=in_matrix)
    if i_v == 0:
        tl.store(dn_0 + row * K + of_k, dn_t, mask=of_k < K)


@triton.jit(do_not_specialize=["T", "N"])
def _mlstm_chunkwise_bwd_dq_kernel(
    q, k, v, dh, a, M, over_D, dqn, document, m_in, C, n, dq, qdq, T, N, scale,
    q_t, q_h, k_t, k_h, v_t, v_h, dh_t, dh_h,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, L: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, RESET: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # grid: (N * (L // BT) * cdiv(K, BK), B * H). Writes dq and what each program sees of q . dq.
    NK: tl.constexpr = (K + BK - 1) // BK
    PER_CHUNK: tl.constexpr = L // BT
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = row // H, row % H
    i_k, tile = block % NK, block // NK
    c, i = tile // PER_CHUNK, tile % PER_CHUNK
    start = c * L
    left = T - start
    if i * BT >= left:
        return
    first = batch * T + start
    q += first * q_t + head * q_h
    k += first * k_t + head * k_h
    v += first * v_t + head * v_h
    dh += first * dh_t + head * dh_h
    gates = row * T + start
    state = row * N + c
    of_k, rows = i_k * BK + tl.arange(0, BK), tl.arange(0, BT)
    t = i * BT + rows
    M_t = tl.load(M + gates + t, mask=t < left, other=float("inf"))
    over_t = tl.load(over_D + gates + t, mask=t < left, other=0.0)
    dqn_t = tl.load(dqn + gates + t, mask=t < left, other=0.0)
    dq_t = tl.zeros([BT, BK], tl.float32)
    for of in range(0, V, BV):
        of_v = of + tl.arange(0, BV)
        dh_tile = rows_tile(dh, t, of_v, dh_t, left, V)
        dq_t = product(dh_tile, columns_tile(C + state * K * V, of_k, of_v, V, K, V), dq_t, DOT, PRECISION)
    n_tile = tl.load(n + state * K + of_k, mask=of_k < K, other=0.0)
    carry = carries(document + batch * T, tl.load(m_in + row * (N + 1) + c), M_t, t, start, left, RESET)
    dq_t = dq_t * (carry * over_t)[:, None] + (carry * dqn_t)[:, None] * n_tile[None, :]
    for j in range(0, i + 1):
        s = j * BT + rows
        dS = tl.zeros([BT, BT], tl.float32)
        for of in range(0, V, BV):
            of_v = of + tl.arange(0, BV)
            dh_tile = rows_tile(dh, t, of_v, dh_t, left, V)
            dS = product(dh_tile, columns_tile(v, s, of_v, v_t, left, V), dS, DOT, PRECISION)
        a_s = tl.load(a + gates + s, mask=s < left, other=-float("inf"))
        dS = (dS * over_t[:, None] + dqn_t[:, None]) * decays(document + first, a_s, M_t, s, t, left, True, RESET)
        dq_t = product(dS * scale, rows_tile(k, s, of_k, k_t, left, K), dq_t, DOT, PRECISION)
    q_tile = rows_tile(q, t, of_k, q_t, left, K).to(tl.float32)
    tl.store(qdq + (i_k * tl.num_programs(1) + row) * T + start + t, tl.sum(q_tile * dq_t, 1), mask=t < left)
    at = (first + t)[:, None] * (H * K) + head * K + of_k[None, :]
    tl.store(dq + at, dq_t.to(dq.dtype.element_ty), mask=(t < left)[:, None] & (of_k < K)[None, :])


@triton.jit(do_not_specialize=["T", "N"])
def _mlstm_chunkwise_bwd_dk_kernel(
    q, k, v, dh, a, M, over_D, dqn, document, dC, dn, dk, kdk, T, N, scale,
    q_t, q_h, k_t, k_h, v_t, v_h, dh_t, dh_h,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, L: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, RESET: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # grid: (N * (L // BT) * cdiv(K, BK), B * H). Writes dk and what each program sees of k . dk.
    NK: tl.constexpr = (K + BK - 1) // BK
    PER_CHUNK: tl.constexpr = L // BT
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = row // H, row % H
    i_k, tile = block % NK, block // NK
    c, j = tile // PER_CHUNK, tile % PER_CHUNK
    start = c * L
    left = T - start
    if j * BT >= left:
        return
    last = tl.minimum(start + L, T) - 1
    first = batch * T + start
    q += first * q_t + head * q_h
    k += first * k_t + head * k_h
    v += first * v_t + head * v_h
    dh += first * dh_t + head * dh_h
    gates = row * T + start
    state = row * N + c
    of_k, rows = i_k * BK + tl.arange(0, BK), tl.arange(0, BT)
    s = j * BT + rows
    a_s = tl.load(a + gates + s, mask=s < left, other=-float("inf"))
    dk_s = tl.zeros([BT, BK], tl.float32)
    for of in range(0, V, BV):
        of_v = of + tl.arange(0, BV)
        v_tile = rows_tile(v, s, of_v, v_t, left, V)
        dk_s = product(v_tile, columns_tile(dC + state * K * V, of_k, of_v, V, K, V), dk_s, DOT, PRECISION)
    dn_tile = tl.load(dn + state * K + of_k, mask=of_k < K, other=0.0)
    M_last = tl.load(M + row * T + last)
    write = writes(document + batch * T, a_s, M_last, s, start, left, last, RESET)
    dk_s = (dk_s + dn_tile[None, :]) * write[:, None]
    for i in range(j, tl.minimum(PER_CHUNK, tl.cdiv(left, BT))):
        t = i * BT + rows
        dS = tl.zeros([BT, BT], tl.float32)  # [s, t]
        for of in range(0, V, BV):
            of_v = of + tl.arange(0, BV)
            v_tile = rows_tile(v, s, of_v, v_t, left, V)
            dS = product(v_tile, columns_tile(dh, t, of_v, dh_t, left, V), dS, DOT, PRECISION)
        M_t = tl.load(M + gates + t, mask=t < left, other=float("inf"))
        over_t = tl.load(over_D + gates + t, mask=t < left, other=0.0)
        dqn_t = tl.load(dqn + gates + t, mask=t < left, other=0.0)
        dS = (dS * over_t[None, :] + dqn_t[None, :]) * decays(document + first, a_s, M_t, s, t, left, False, RESET)
        dk_s = product(dS, rows_tile(q, t, of_k, q_t, left, K), dk_s, DOT, PRECISION)
    dk_s = dk_s * scale
    k_tile = rows_tile(k, s, of_k, k_t, left, K).to(tl.float32)
    tl.store(kdk + (i_k * tl.num_programs(1) + row) * T + start + s, tl.sum(k_tile * dk_s, 1), mask=s < left)
    at = (first + s)[:, None] * (H * K) + head * K + of_k[None, :]
    tl.store(dk + at, dk_s.to(dk.dtype.element_ty), mask=(s < left)[:, None] & (of_k < K)[None, :])


@triton.jit(do_not_specialize=["T", "N"])
def _mlstm_chunkwise_bwd_dv_kernel(
    q, k, dh, a, M, over_D, document, dC, dv, T, N, scale, q_t, q_h, k_t, k_h, dh_t, dh_h,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, L: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, RESET: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # grid: (N * (L // BT) * cdiv(V, BV), B * H). Writes dv.
    NV: tl.constexpr = (V + BV - 1) // BV
    PER_CHUNK: tl.constexpr = L // BT
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = row // H, row % H
    i_v, tile = block % NV, block // NV
    c, j = tile // PER_CHUNK, tile % PER_CHUNK
    start = c * L
    left = T - start
    if j * BT >= left:
        return
    last = tl.minimum(start + L, T) - 1
    first = batch * T + start
    q += first * q_t + head * q_h
    k += first * k_t + head * k_h
    dh += first * dh_t + head * dh_h
    gates = row * T + start
    state = row * N + c
    of_v, rows = i_v * BV + tl.arange(0, BV), tl.arange(0, BT)
    s = j * BT + rows
    a_s = tl.load(a + gates + s, mask=s < left, other=-float("inf"))
    dv_s = tl.zeros([BT, BV], tl.float32)
    for of in range(0, K, BK):
        of_k = of + tl.arange(0, BK)
        k_tile = rows_tile(k, s, of_k, k_t, left, K)
        dv_s = product(k_tile, rows_tile(dC + state * K * V, of_k, of_v, V, K, V), dv_s, DOT, PRECISION)
    M_last = tl.load(M + row * T + last)
    dv_s = dv_s * writes(document + batch * T, a_s, M_last, s, start, left, last, RESET)[:, None]
    for i in range(j, tl.minimum(PER_CHUNK, tl.cdiv(left, BT))):
        t = i * BT + rows
        P = tl.zeros([BT, BT], tl.float32)  # [s, t]
        for of in range(0, K, BK):
            of_k = of + tl.arange(0, BK)
            k_tile = rows_tile(k, s, of_k, k_t, left, K)
            P = product(k_tile, columns_tile(q, t, of_k, q_t, left, K), P, DOT, PRECISION)
        M_t = tl.load(M + gates + t, mask=t < left, other=float("inf"))
        over_t = tl.load(over_D + gates + t, mask=t < left, other=0.0)
        P = P * decays(document + first, a_s, M_t, s, t, left, False, RESET) * over_t[None, :]
        dv_s = product(P, rows_tile(dh, t, of_v, dh_t, left, V), dv_s, DOT, PRECISION)
    at = (first + s)[:, None] * (H * V) + head * V + of_v[None, :]
    dv_s = dv_s * scale
    tl.store(dv + at, dv_s.to(dv.dtype.element_ty), mask=(s < left)[:, None] & (of_v < V)[None, :])


@triton.jit
def cap_slope(y, CAP: tl.constexpr):
    """The derivative of a soft cap where it gave y; 0 beyond it, where no token is."""
    part = tl.minimum(tl.abs(y) / CAP, 1.0)
    return 1.0 - part * part


@triton.jit
def gates_at(
    i_tilde, f_tilde, document, m, m_first, t, T,
    H: tl.constexpr, SIGMOID: tl.constexpr, CAP: tl.constexpr, RESET: tl.constexpr,
):  # fmt: skip
    """Capped pre-activations of tokens, whether a document begins with them, and whether the input gate set m there."""
    real = t < T
    i = tl.load(i_tilde + t.to(tl.int64) * H, mask=real, other=-float("inf")).to(tl.float32)
    f = tl.load(f_tilde + t.to(tl.int64) * H, mask=real, other=0.0).to(tl.float32)
    i, f = tl.where(real, soft_cap(i, CAP), -float("inf")), soft_cap(f, CAP)
    begins = t < 0
    if RESET:
        own = tl.load(document + t, mask=real, other=0)
        begins = real & (own != tl.load(document + t - 1, mask=real & (t > 0), other=0))
    m_before = tl.load(m + t - 1, mask=real & (t > 0), other=0.0)
    m_before = tl.where(begins, 0.0, tl.where(t == 0, m_first, m_before))
    by_i = t < 0
    if not SIGMOID:
        by_i = real & (i >= log_sigmoid(f) + m_before)
    return i, f, begins, by_i


@triton.jit(do_not_specialize=["T", "N"])
def _mlstm_chunkwise_bwd_gates_kernel(
    i_tilde, f_tilde, document, m_0, m, qdq, kdk, dm, overlap, dm_last, di, df, dm_0, T, N,
    H: tl.constexpr, L: tl.constexpr, PARTS: tl.constexpr, BLOCKS: tl.constexpr, BP: tl.constexpr,
    SIGMOID: tl.constexpr, CAP: tl.constexpr, RESET: tl.constexpr,
):  # fmt: skip
    # grid: (B * H,). Writes the gradients of the gates, and what the first m is owed through later ones.
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // H, row % H
    gates = batch * T * H + head
    i_tilde += gates
    f_tilde += gates
    document += batch * T
    m += row * T
    offsets, blocks = tl.arange(0, L), tl.arange(0, BP)
    parts = overlap + row * N * BLOCKS + blocks
    m_first = tl.load(m_0 + row)
    # What m is owed; the last state stands for a token after the last.
    owed = tl.load(dm_last + row) - tl.sum(tl.load(parts + (N - 1) * BLOCKS, mask=blocks < BLOCKS, other=0.0), 0)
    before_first = owed
    for back in range(0, N):
        c = N - 1 - back
        t = c * L + offsets
        real = t < T
        own = tl.zeros([L], tl.float32)
        other = tl.zeros([L], tl.float32)
        for part in range(0, PARTS):
            at = (part * tl.num_programs(0) + row) * T + t
            own += tl.load(qdq + at, mask=real, other=0.0)
            other += tl.load(kdk + at, mask=real, other=0.0)
        i, f, begins, by_i = gates_at(i_tilde, f_tilde, document, m, m_first, t, T, H, SIGMOID, CAP, RESET)
        # log f of token t decays all before it: x_t = (q dq - k dk)_t + x_{t + 1}, from the state after the chunk.
        open = tl.where(begins, 0.0, 1.0)
        kept, total = tl.associative_scan((open, open * (own - other)), 0, earlier_sum, reverse=True)
        in_state = tl.sum(tl.load(parts + tl.cast(c, tl.int64) * BLOCKS, mask=blocks < BLOCKS, other=0.0), 0)
        dlog_f = total + kept * in_state
        # m of token t is owed x_t = dm_t + x_{t + 1}, unless token t + 1 set its own m.
        _, _, begins_next, by_i_next = gates_at(
            i_tilde, f_tilde, document, m, m_first, t + 1, T, H, SIGMOID, CAP, RESET
        )
        open = tl.where(begins_next | by_i_next, 0.0, 1.0)
        direct = tl.load(dm + row * T + t, mask=real, other=0.0)
        kept, total = tl.associative_scan((open, direct), 0, earlier_sum, reverse=True)
        owed_t = total + kept * owed
        owed = tl.sum(tl.where(offsets == 0, owed_t, 0.0), 0)
        before_first = tl.sum(tl.where((offsets == 0) & ~begins & ~by_i, owed_t, 0.0), 0)
        dlog_i = other
        if not SIGMOID:
            dlog_i += tl.where(by_i, owed_t, 0.0)
            dlog_f += tl.where(by_i, 0.0, owed_t)
        else:
            dlog_i = dlog_i * tl.sigmoid(-i)
        df_t = dlog_f * tl.sigmoid(-f)
        if CAP > 0:
            dlog_i = dlog_i * cap_slope(i, CAP)
            df_t = df_t * cap_slope(f, CAP)
        tl.store(di + gates + t.to(tl.int64) * H, dlog_i.to(di.dtype.element_ty), mask=real)
        tl.store(df + gates + t.to(tl.int64) * H, df_t.to(df.dtype.element_ty), mask=real)
    tl.store(dm_0 + row, before_first)
