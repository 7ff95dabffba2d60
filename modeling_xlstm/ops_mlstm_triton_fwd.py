"""Triton kernels of the mLSTM's forward pass, and what the backward pass shares with them.

Letters: N chunks of L tokens, tiles of BT tokens, BK key and BV value channels. Tokens stand at [B, T, H, .] with any
stride between tokens and heads, the numbers of a token's gates at [B, H, T] in float32. For token t of a chunk, with b
the running sum of log f since the chunk began and m the stabiliser of the recurrent form: `a = log i - b`, `M = m - b`,
so exp(a_s - M_t) weighs token s at token t, exp(m_in - M_t) the state before the chunk, and exp(a_s - M_last) token s
in the state after it. All exponents but m's own are <= 0.

`document` counts the resets of a row up to each token, [B, T]: tokens of the same one see each other.
"""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The Triton kernels need the package `triton`; `backend='auto'` does without it.") from error

# exp(-m) stays finite in float32, as in the reference: log(largest float32) - 3.
_LARGEST_EXPONENT = tl.constexpr(85.72)


@triton.jit
def log_sigmoid(x):
    """log(1 / (1 + exp(-x))) without overflow, with all digits of gates near 1."""
    e = tl.exp(-tl.abs(x))
    # log(1 + e) = 2 artanh(s), as a series: 1 + e would round e away. s is at most 1/3, so seven terms do for float32.
    s = e / (2.0 + e)
    w = s * s
    series = 1 / 3 + w * (1 / 5 + w * (1 / 7 + w * (1 / 9 + w * (1 / 11 + w * (1 / 13)))))
    return tl.minimum(x, 0.0) - 2.0 * (s + s * w * series)


@triton.jit
def soft_cap(x, CAP: tl.constexpr):
    """CAP tanh(x / CAP), tanh by the sigmoid; a CAP of 0 leaves x."""
    if CAP > 0:
        x = CAP * (2.0 * tl.sigmoid(2.0 * x / CAP) - 1.0)
    return x


@triton.jit
def later_maximum(decay, highest, decay_next, highest_next):
    """m -> max(decay + m, highest), two of them one after the other."""
    return decay + decay_next, tl.maximum(decay_next + highest, highest_next)


@triton.jit
def rows_tile(x, rows, columns, stride, n_rows, n_columns):
    """x[rows, columns] of a matrix with unit column stride; zero outside."""
    mask = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    return tl.load(x + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def columns_tile(x, rows, columns, stride, n_rows, n_columns):
    """The transpose of `rows_tile`, loaded as such: no result of a product is ever transposed."""
    mask = (rows < n_rows)[None, :] & (columns < n_columns)[:, None]
    return tl.load(x + rows[None, :] * stride + columns[:, None], mask=mask, other=0.0)


@triton.jit
def product(x, y, accumulator, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """accumulator + x y with operands in the dtype of the products."""
    return tl.dot(x.to(DOT), y.to(DOT), accumulator, input_precision=PRECISION)


@triton.jit
def document_at(document, position, RESET: tl.constexpr):
    """The document of the token at a position; 0 before the first token."""
    if RESET:
        return tl.load(document + position, mask=position >= 0, other=0)
    else:
        return 0


@triton.jit
def carries(document, m_in, M, rows, start, left, RESET: tl.constexpr):
    """Weight of the state before the chunk at `rows` after its token `start`, of which `left` exist."""
    carry = tl.exp(m_in - M)
    if RESET:
        before = document_at(document, start - 1, RESET)
        own = tl.load(document + start + rows, mask=rows < left, other=-1)
        carry = tl.where(own == before, carry, 0.0)
    return carry


@triton.jit
def writes(document, a, M_last, rows, start, left, last, RESET: tl.constexpr):
    """Weight of the tokens `rows` after `start` in the state after the chunk, whose last token is `last`."""
    write = tl.exp(a - M_last)
    if RESET:
        own = tl.load(document + start + rows, mask=rows < left, other=-1)
        write = tl.where(own == document_at(document, last, RESET), write, 0.0)
    return write


@triton.jit
def keeps(document, m_in, M_last, start, last, RESET: tl.constexpr):
    """Weight of the state before the chunk in the state after it."""
    keep = tl.exp(m_in - M_last)
    if RESET:
        same = document_at(document, start - 1, RESET) == document_at(document, last, RESET)
        keep = tl.where(same, keep, 0.0)
    return keep


@triton.jit
def decays(document, a_s, M_t, s, t, left, LATER_ROWS: tl.constexpr, RESET: tl.constexpr):
    """Weight of token s at token t: [t, s] if the later tokens are the rows, else [s, t]; 0 where t does not see s."""
    if LATER_ROWS:
        exponent = a_s[None, :] - M_t[:, None]
        seen = s[None, :] <= t[:, None]
    else:
        exponent = a_s[:, None] - M_t[None, :]
        seen = s[:, None] <= t[None, :]
    if RESET:
        of_s = tl.load(document + s, mask=s < left, other=-1)
        of_t = tl.load(document + t, mask=t < left, other=-1)
        seen = seen & (of_s[None, :] == of_t[:, None] if LATER_ROWS else of_s[:, None] == of_t[None, :])
    # Masked before exp: a token that is not seen may stand far above the stabiliser.
    return tl.exp(tl.where(seen, exponent, -float("inf")))


@triton.jit(do_not_specialize=["T", "N"])
def _mlstm_chunkwise_fwd_gates_kernel(
    i_tilde, f_tilde, document, m_0, a, M, m, m_in, T, N,
    H: tl.constexpr, L: tl.constexpr, SIGMOID: tl.constexpr, CAP: tl.constexpr, RESET: tl.constexpr,
):  # fmt: skip
    # grid: (B * H,). Writes a, M, m of every token and the stabiliser before every chunk and after the last.
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // H, row % H
    gates = batch * T * H + head
    document += batch * T
    offsets = tl.arange(0, L)
    stabiliser = tl.load(m_0 + row)
    for c in range(0, N):
        tl.store(m_in + row * (N + 1) + c, stabiliser)
        t = c * L + offsets
        real = t < T
        log_i = tl.load(i_tilde + gates + t.to(tl.int64) * H, mask=real, other=-float("inf")).to(tl.float32)
        f = tl.load(f_tilde + gates + t.to(tl.int64) * H, mask=real, other=0.0).to(tl.float32)
        log_i, f = tl.where(real, soft_cap(log_i, CAP), -float("inf")), soft_cap(f, CAP)
        if SIGMOID:
            log_i = log_sigmoid(log_i)
        log_f = tl.where(real, log_sigmoid(f), 0.0)
        b = tl.cumsum(log_f, 0)
        if SIGMOID:
            # That gate cannot exceed 1 and needs no stabiliser: m stays at its start, or at zero after a reset.
            decay, highest = tl.zeros_like(b), tl.full([L], -float("inf"), tl.float32)
        else:
            decay, highest = log_f, log_i
        if RESET:
            own = tl.load(document + t, mask=real, other=0)
            begins = real & (own != tl.load(document + t - 1, mask=real & (t > 0), other=0))
            highest = tl.where(begins, tl.maximum(highest, decay), highest)
            decay = tl.where(begins, -float("inf"), decay)
        decay, highest = tl.associative_scan((decay, highest), 0, later_maximum)
        m_t = tl.maximum(decay + stabiliser, highest)
        at = row * T + t
        tl.store(a + at, log_i - b, mask=real)
        tl.store(M + at, m_t - b, mask=real)
        tl.store(m + at, m_t, mask=real)
        stabiliser = tl.sum(tl.where(t == tl.minimum(c * L + L, T) - 1, m_t, 0.0), 0)
    tl.store(m_in + row * (N + 1) + N, stabiliser)


@triton.jit(do_not_specialize=["T", "N"])
def _mlstm_chunkwise_fwd_states_kernel(
    k, v, a, M, document, m_in, C_0, n_0, C, n, C_last, n_last, T, N, scale, k_t, k_h, v_t, v_h,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, L: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, RESET: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # grid: (cdiv(K, BK) * cdiv(V, BV), B * H). Writes C, n before every chunk and after the last.
    NV: tl.constexpr = (V + BV - 1) // BV
    PER_CHUNK: tl.constexpr = L // BT
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = row // H, row % H
    i_v = block % NV
    of_k, of_v, rows = (block // NV) * BK + tl.arange(0, BK), i_v * BV + tl.arange(0, BV), tl.arange(0, BT)
    k += batch * T * k_t + head * k_h
    v += batch * T * v_t + head * v_h
    a += row * T
    M += row * T
    m_in += row * (N + 1)
    document += batch * T
    C += row * N * K * V
    n += row * N * K
    matrix = of_k[:, None] * V + of_v[None, :]
    in_matrix = (of_k < K)[:, None] & (of_v < V)[None, :]
    C_t = tl.load(C_0 + row * K * V + matrix, mask=in_matrix, other=0.0)
    n_t = tl.load(n_0 + row * K + of_k, mask=of_k < K, other=0.0)
    for tile in range(0, tl.cdiv(T, BT)):
        c = tile // PER_CHUNK
        start = c * L
        last = tl.minimum(start + L, T) - 1
        M_last = tl.load(M + last)
        if tile % PER_CHUNK == 0:
            tl.store(C + tl.cast(c, tl.int64) * K * V + matrix, C_t.to(C.dtype.element_ty), mask=in_matrix)
            if i_v == 0:
                tl.store(n + tl.cast(c, tl.int64) * K + of_k, n_t, mask=of_k < K)
            keep = keeps(document, tl.load(m_in + c), M_last, start, last, RESET)
            C_t = C_t * keep
            n_t = n_t * keep
        left = T - tile * BT
        first = tl.cast(tile * BT, tl.int64)
        a_s = tl.load(a + first + rows, mask=rows < left, other=-float("inf"))
        write = writes(document, a_s, M_last, rows, tile * BT, left, last, RESET) * scale
        written = columns_tile(k + first * k_t, rows, of_k, k_t, left, K).to(tl.float32) * write[None, :]
        n_t += tl.sum(written, 1)
        C_t = product(written, rows_tile(v + first * v_t, rows, of_v, v_t, left, V), C_t, DOT, PRECISION)
    tl.store(C_last + row * K * V + matrix, C_t, mask=in_matrix)
    if i_v == 0:
        tl.store(n_last + row * K + of_k, n_t, mask=of_k < K)


@triton.jit(do_not_specialize=["T", "N"])
def _mlstm_chunkwise_fwd_h_kernel(
    q, k, v, a, M, m, document, m_in, C, n, h, qn, T, N, scale, eps, q_t, q_h, k_t, k_h, v_t, v_h,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, L: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, RESET: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # grid: (N * (L // BT) * cdiv(V, BV), B * H). Writes h and q n, the normaliser before its bound.
    NV: tl.constexpr = (V + BV - 1) // BV
    PER_CHUNK: tl.constexpr = L // BT
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = row // H, row % H
    i_v, tile = block % NV, block // NV
    c, i = tile // PER_CHUNK, tile % PER_CHUNK
    start = c * L
    left = T - start
    if i * BT >= left:
        return
    first = batch * T + start
    q += first * q_t + head * q_h
    k += first * k_t + head * k_h
    v += first * v_t + head * v_h
    a += row * T + start
    M += row * T + start
    state = row * N + c
    of_v, rows = i_v * BV + tl.arange(0, BV), tl.arange(0, BT)
    t = i * BT + rows
    M_t = tl.load(M + t, mask=t < left, other=float("inf"))
    h_t = tl.zeros([BT, BV], tl.float32)
    qn_t = tl.zeros([BT], tl.float32)
    for of in range(0, K, BK):
        of_k = of + tl.arange(0, BK)
        q_tile = rows_tile(q, t, of_k, q_t, left, K)
        h_t = product(q_tile, rows_tile(C + state * K * V, of_k, of_v, V, K, V), h_t, DOT, PRECISION)
        n_tile = tl.load(n + state * K + of_k, mask=of_k < K, other=0.0)
        qn_t += tl.sum(q_tile.to(tl.float32) * n_tile[None, :], 1)
    carry = carries(document + batch * T, tl.load(m_in + row * (N + 1) + c), M_t, t, start, left, RESET)
    h_t = h_t * carry[:, None]
    qn_t = qn_t * carry
    for j in range(0, i + 1):
        s = j * BT + rows
        S = tl.zeros([BT, BT], tl.float32)
        for of in range(0, K, BK):
            of_k = of + tl.arange(0, BK)
            q_tile = rows_tile(q, t, of_k, q_t, left, K)
            S = product(q_tile, columns_tile(k, s, of_k, k_t, left, K), S, DOT, PRECISION)
        a_s = tl.load(a + s, mask=s < left, other=-float("inf"))
        P = S * decays(document + first, a_s, M_t, s, t, left, True, RESET) * scale
        qn_t += tl.sum(P, 1)
        h_t = product(P, rows_tile(v, s, of_v, v_t, left, V), h_t, DOT, PRECISION)
    m_t = tl.load(m + row * T + start + t, mask=t < left, other=0.0)
    h_t = h_t / (tl.maximum(tl.abs(qn_t), bound(m_t)) + eps)[:, None]
    at = (first + t)[:, None] * (H * V) + head * V + of_v[None, :]
    tl.store(h + at, h_t.to(h.dtype.element_ty), mask=(t < left)[:, None] & (of_v < V)[None, :])
    if i_v == 0:
        tl.store(qn + row * T + start + t, qn_t, mask=t < left)


@triton.jit
def bound(m):
    """Lower bound of the normaliser, exp(-m)."""
    return tl.exp(tl.minimum(-m, _LARGEST_EXPONENT))


@triton.jit
def _mlstm_recurrent_fwd_step_kernel(
    q, k, v, i_tilde, f_tilde, reset, C, n, m, h, C_next, n_next, m_next, scale, eps, q_b, q_h, k_b, k_h, v_b, v_h,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SIGMOID: tl.constexpr,
    CAP: tl.constexpr, RESET: tl.constexpr,
):  # fmt: skip
    # grid: (cdiv(V, BV), B * H). Writes h and the state after one token: C is read once and written once.
    i_v, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = row // H, row % H
    of_k, of_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    matrix = row * K * V + of_k[:, None] * V + of_v[None, :]
    in_matrix = (of_k < K)[:, None] & (of_v < V)[None, :]
    # First, for it takes longest.
    C_t = tl.load(C + matrix, mask=in_matrix, other=0.0)
    n_t = tl.load(n + row * K + of_k, mask=of_k < K, other=0.0)
    m_t = tl.load(m + row)
    log_i = soft_cap(tl.load(i_tilde + row).to(tl.float32), CAP)
    log_f = log_sigmoid(soft_cap(tl.load(f_tilde + row).to(tl.float32), CAP))
    k_tile = tl.load(k + batch * k_b + head * k_h + of_k, mask=of_k < K, other=0.0).to(tl.float32) * scale
    q_tile = tl.load(q + batch * q_b + head * q_h + of_k, mask=of_k < K, other=0.0).to(tl.float32)
    v_tile = tl.load(v + batch * v_b + head * v_h + of_v, mask=of_v < V, other=0.0).to(tl.float32)
    keep = 1.0
    if RESET:
        keep = tl.where(tl.load(reset + batch) != 0, 0.0, 1.0)
        m_t = m_t * keep
    if SIGMOID:
        m_after = m_t
        log_i = log_sigmoid(log_i)
    else:
        m_after = tl.maximum(log_f + m_t, log_i)
    i_prime = tl.exp(log_i - m_after)
    f_prime = tl.exp(log_f + m_t - m_after) * keep
    C_t = f_prime * C_t + (i_prime * k_tile)[:, None] * v_tile[None, :]
    n_t = f_prime * n_t + i_prime * k_tile
    tl.store(C_next + matrix, C_t, mask=in_matrix)
    normaliser = tl.maximum(tl.abs(tl.sum(q_tile * n_t, 0)), bound(m_after)) + eps
    h_t = tl.sum(q_tile[:, None] * C_t, 0) / normaliser
    tl.store(h + row * V + of_v, h_t.to(h.dtype.element_ty), mask=of_v < V)
    if i_v == 0:
        tl.store(n_next + row * K + of_k, n_t, mask=of_k < K)
        tl.store(m_next + row, m_after)
