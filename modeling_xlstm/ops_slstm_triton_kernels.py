"""Triton kernels of the sLSTM, forward and backward: a head in one program, or in slices of its channels.

In the sequence kernels one program keeps a head's recurrent weights and some rows of the batch. Wider heads do not fit
into one program: the slices kernels give every program a block of channels. Run for one token at a time, the launches
themselves pass h or its gradient on; run for many, the programs of a head wait for each other, which only a cooperative
launch may do, for it runs all programs at once. Letters: tiles of BB rows, BP channels of a head, BU channels of a
block. Tokens stand at [B, T, H, P], states at [B, H, P].
"""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The Triton kernels need the package `triton`; `backend='auto'` does without it.") from error


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
def tanh(x):
    """By the sigmoid, which every device has; near zero, where that has no digits, as a series."""
    w = x * x
    series = x + x * w * (-1 / 3 + w * (2 / 15 + w * (-17 / 315 + w * (62 / 2835))))
    return tl.where(tl.abs(x) < 0.25, series, 2.0 * tl.sigmoid(2.0 * x) - 1.0)


@triton.jit
def weights(R, gate, head, rows, columns, H: tl.constexpr, P: tl.constexpr, DOT: tl.constexpr):
    """Recurrent weights [rows, columns] of a gate, as [out, in] or [in, out] as `rows` and `columns` say."""
    mask = (rows < P) & (columns < P)
    return tl.load(R + (gate * H + head).to(tl.int64) * P * P + rows * P + columns, mask=mask, other=0.0).to(DOT)


@triton.jit
def held_weights(
    R, head, own, H: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, OUT_ROWS: tl.constexpr, DOT: tl.constexpr
):
    """All tiles of a program's slice of the weights, four gates each: of its outputs, or of its inputs if OUT_ROWS."""
    held = ()
    for tile in tl.static_range((P + BP - 1) // BP):
        for gate in tl.static_range(4):
            others = (tile * BP + tl.arange(0, BP))[:, None]
            if OUT_ROWS:
                held = held + (weights(R, gate, head, others, own[None, :], H, P, DOT),)
            else:
                held = held + (weights(R, gate, head, own[None, :], others, H, P, DOT),)
    return held


@triton.jit
def primes(i, f, n, m, SIGMOID: tl.constexpr):
    """The stabilised gates i', f' and the stabiliser, from pre-activations and the state before."""
    if SIGMOID:
        i = log_sigmoid(i)
    # A cell that has seen no token forgets nothing.
    f = tl.where(n == 0.0, -float("inf"), log_sigmoid(f) + m)
    m = tl.maximum(i, f)
    return tl.exp(i - m), tl.exp(f - m), m


@triton.jit
def cell(i, f, z, o, c, n, m, SIGMOID: tl.constexpr):
    """The state c, n, m, h after a token."""
    i_prime, f_prime, m = primes(i, f, n, m, SIGMOID)
    c = f_prime * c + i_prime * tanh(z)
    n = f_prime * n + i_prime
    return c, n, m, tl.sigmoid(o) * (c / n)


@triton.jit
def cell_gradient(gates, after, before, upstream, SIGMOID: tl.constexpr):
    """Gradients of the pre-activations and of c, n, m before a token; m is held constant in all but its own.

    Takes i, f, z, o; c, n after the token; c, n, m before it; the gradients of h and of c, n, m after it.
    """
    i, f, z, o = gates
    c, n = after
    c_before, n_before, m_before = before
    dh, dc, dn, dm = upstream
    i_prime, f_prime, _ = primes(i, f, n_before, m_before, SIGMOID)
    z, o = tanh(z), tl.sigmoid(o)
    # n is zero only beside what exists: padding after no token.
    n = tl.where(n == 0.0, 1.0, n)
    ratio = c / n
    dc += dh * o / n
    dn -= dh * o / n * ratio
    # What the last m is owed goes to the one gate that set it.
    by_i = i_prime == 1.0
    di = (dc * z + dn) * i_prime + tl.where(by_i, dm, 0.0)
    if SIGMOID:
        di = di * tl.sigmoid(-i)
    dm = tl.where(by_i, 0.0, dm)
    df = ((dc * c_before + dn * n_before) * f_prime + dm) * tl.sigmoid(-f)
    return di, df, dc * i_prime * (1.0 - z * z), dh * ratio * o * (1.0 - o), dc * f_prime, dn * f_prime, dm


@triton.jit(do_not_specialize=["B", "T"])
def _slstm_recurrent_fwd_kernel(
    x_i, x_f, x_z, x_o, R, c_0, n_0, m_0, h_0, lengths, reset, h_all, gates, c_all, n_all, m_all,
    c_last, n_last, m_last, h_last, B, T,
    H: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, BB: tl.constexpr, SIGMOID: tl.constexpr, PADDED: tl.constexpr,
    RESET: tl.constexpr, SAVE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # grid: (H, cdiv(B, BB)). Writes every h and the last state; for the backward pass pre-activations, c, n, m.
    head = tl.program_id(0)
    rows, channels = tl.program_id(1) * BB + tl.arange(0, BB), tl.arange(0, BP)
    mask = (rows < B)[:, None] & (channels < P)[None, :]
    of_in, of_out = channels[:, None], channels[None, :]
    R_i, R_f = weights(R, 0, head, of_out, of_in, H, P, DOT), weights(R, 1, head, of_out, of_in, H, P, DOT)
    R_z, R_o = weights(R, 2, head, of_out, of_in, H, P, DOT), weights(R, 3, head, of_out, of_in, H, P, DOT)
    of_state = (rows[:, None].to(tl.int64) * H + head) * P + channels[None, :]
    c, n = tl.load(c_0 + of_state, mask=mask, other=0.0), tl.load(n_0 + of_state, mask=mask, other=0.0)
    m, h = tl.load(m_0 + of_state, mask=mask, other=0.0), tl.load(h_0 + of_state, mask=mask, other=0.0)
    at = (rows[:, None].to(tl.int64) * T * H + head) * P + channels[None, :]
    i_next, f_next = tl.load(x_i + at, mask=mask, other=0.0), tl.load(x_f + at, mask=mask, other=0.0)
    z_next, o_next = tl.load(x_z + at, mask=mask, other=0.0), tl.load(x_o + at, mask=mask, other=0.0)
    every = tl.cast(B, tl.int64) * T * H * P
    if PADDED:
        length = tl.load(lengths + rows, mask=rows < B, other=0)[:, None]
    for t in range(0, T):
        i, f, z, o = i_next.to(tl.float32), f_next.to(tl.float32), z_next.to(tl.float32), o_next.to(tl.float32)
        # The next token's gates are on their way while this token's products wait for each other.
        more = mask & (rows[:, None] * 0 + t + 1 < T)
        i_next = tl.load(x_i + at + H * P, mask=more, other=0.0)
        f_next = tl.load(x_f + at + H * P, mask=more, other=0.0)
        z_next = tl.load(x_z + at + H * P, mask=more, other=0.0)
        o_next = tl.load(x_o + at + H * P, mask=more, other=0.0)
        c_b, n_b, m_b, h_b = c, n, m, h
        if RESET:
            keep = tl.load(reset + rows.to(tl.int64) * T + t, mask=rows < B, other=0)[:, None] == 0
            c_b, n_b = tl.where(keep, c, 0.0), tl.where(keep, n, 0.0)
            m_b, h_b = tl.where(keep, m, 0.0), tl.where(keep, h, 0.0)
        h_dot = h_b.to(DOT)
        i = tl.dot(h_dot, R_i, i, input_precision=PRECISION)
        f = tl.dot(h_dot, R_f, f, input_precision=PRECISION)
        z = tl.dot(h_dot, R_z, z, input_precision=PRECISION)
        o = tl.dot(h_dot, R_o, o, input_precision=PRECISION)
        c_t, n_t, m_t, h_t = cell(i, f, z, o, c_b, n_b, m_b, SIGMOID)
        if PADDED:
            real = t < length
            c_t, n_t = tl.where(real, c_t, c), tl.where(real, n_t, n)
            m_t, h_t = tl.where(real, m_t, m), tl.where(real, h_t, h)
        c, n, m, h = c_t, n_t, m_t, h_t
        tl.store(h_all + at, h.to(h_all.dtype.element_ty), mask=mask)
        if SAVE:
            tl.store(gates + at, i, mask=mask)
            tl.store(gates + every + at, f, mask=mask)
            tl.store(gates + 2 * every + at, z, mask=mask)
            tl.store(gates + 3 * every + at, o, mask=mask)
            tl.store(c_all + at, c, mask=mask)
            tl.store(n_all + at, n, mask=mask)
            tl.store(m_all + at, m, mask=mask)
        at += H * P
    tl.store(c_last + of_state, c, mask=mask)
    tl.store(n_last + of_state, n, mask=mask)
    tl.store(m_last + of_state, m, mask=mask)
    tl.store(h_last + of_state, h, mask=mask)


@triton.jit
def await_(flag, wanted, patience):
    """Wait until the programs of a head have counted up to `wanted`; give up after `patience` looks, never if -1."""
    looks = patience * 0
    while (tl.atomic_add(flag, 0, sem="acquire", scope="gpu") < wanted) & (looks != patience):
        looks += 1


@triton.jit
def count_(flag):
    """Tell the other programs of a head that what this one stored can be read."""
    tl.debug_barrier()
    tl.atomic_add(flag, 1, sem="release", scope="gpu")


@triton.jit(do_not_specialize=["B", "T", "start", "stop", "patience"])
def _slstm_recurrent_fwd_slices_kernel(
    x_i, x_f, x_z, x_o, R, c_b, n_b, m_b, h_b, lengths, reset, h_all, gates, c_all, n_all, m_all,
    c_next, n_next, m_next, h_next, flags, B, T, start, stop, patience,
    H: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, BU: tl.constexpr, BB: tl.constexpr, SIGMOID: tl.constexpr,
    PADDED: tl.constexpr, RESET: tl.constexpr, SAVE: tl.constexpr, HELD: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # grid: (H * cdiv(P, BU), cdiv(B, BB)). Writes the same for the tokens from start to stop; the state before them
    # stays as it is. HELD: weights stay on the chip, h goes through h_all, programs of a head count tokens in flags.
    BLOCKS: tl.constexpr = (P + BU - 1) // BU
    head, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    rows, own = tl.program_id(1) * BB + tl.arange(0, BB), block * BU + tl.arange(0, BU)
    mask = (rows < B)[:, None] & (own < P)[None, :]
    first = (rows[:, None].to(tl.int64) * H + head) * P
    of_state = first + own[None, :]
    flag = flags + tl.program_id(1) * H + head
    every = tl.cast(B, tl.int64) * T * H * P
    c, n = tl.load(c_b + of_state, mask=mask, other=0.0), tl.load(n_b + of_state, mask=mask, other=0.0)
    m, h = tl.load(m_b + of_state, mask=mask, other=0.0), tl.load(h_b + of_state, mask=mask, other=0.0)
    held = ()
    if HELD:
        held = held_weights(R, head, own, H, P, BP, False, DOT)
        begun = of_state * 0 + start > 0
        at = ((rows[:, None].to(tl.int64) * T + start - 1) * H + head) * P + own[None, :]
        h = tl.where(begun, tl.load(h_all + at, mask=mask & begun, other=0.0).to(tl.float32), h)
    for t in range(start, stop):
        token = ((rows[:, None].to(tl.int64) * T + t) * H + head) * P
        at = token + own[None, :]
        i = tl.load(x_i + at, mask=mask, other=0.0).to(tl.float32)
        f = tl.load(x_f + at, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(x_z + at, mask=mask, other=0.0).to(tl.float32)
        o = tl.load(x_o + at, mask=mask, other=0.0).to(tl.float32)
        keep = (rows >= 0)[:, None]
        if RESET:
            keep = tl.load(reset + rows.to(tl.int64) * T + t, mask=rows < B, other=0)[:, None] == 0
        if HELD:
            await_(flag, (t - start) * BLOCKS, patience)
        if HELD:
            later = (rows[:, None] * 0 + t) > 0
            for tile in tl.static_range((P + BP - 1) // BP):
                others = tile * BP + tl.arange(0, BP)
                seen = (rows < B)[:, None] & (others < P)[None, :] & keep
                h_b_dot = tl.load(h_b + first + others[None, :], mask=seen & ~later, other=0.0).to(DOT)
                # Past the first-level cache, which does not see what other programs wrote.
                before = h_all + token - H * P + others[None, :]
                h_dot = h_b_dot + tl.load(before, mask=seen & later, other=0.0, cache_modifier=".cg").to(DOT)
                i = tl.dot(h_dot, held[tile * 4], i, input_precision=PRECISION)
                f = tl.dot(h_dot, held[tile * 4 + 1], f, input_precision=PRECISION)
                z = tl.dot(h_dot, held[tile * 4 + 2], z, input_precision=PRECISION)
                o = tl.dot(h_dot, held[tile * 4 + 3], o, input_precision=PRECISION)
        else:
            for of in range(0, P, BP):
                others = of + tl.arange(0, BP)
                seen = (rows < B)[:, None] & (others < P)[None, :] & keep
                h_dot = tl.load(h_b + first + others[None, :], mask=seen, other=0.0).to(DOT)
                of_in, of_out = others[:, None], own[None, :]
                i = tl.dot(h_dot, weights(R, 0, head, of_out, of_in, H, P, DOT), i, input_precision=PRECISION)
                f = tl.dot(h_dot, weights(R, 1, head, of_out, of_in, H, P, DOT), f, input_precision=PRECISION)
                z = tl.dot(h_dot, weights(R, 2, head, of_out, of_in, H, P, DOT), z, input_precision=PRECISION)
                o = tl.dot(h_dot, weights(R, 3, head, of_out, of_in, H, P, DOT), o, input_precision=PRECISION)
        c_k, n_k, m_k = tl.where(keep, c, 0.0), tl.where(keep, n, 0.0), tl.where(keep, m, 0.0)
        c_t, n_t, m_t, h_t = cell(i, f, z, o, c_k, n_k, m_k, SIGMOID)
        if PADDED:
            real = t < tl.load(lengths + rows, mask=rows < B, other=0)[:, None]
            c_t, n_t = tl.where(real, c_t, c), tl.where(real, n_t, n)
            m_t, h_t = tl.where(real, m_t, m), tl.where(real, h_t, h)
        c, n, m, h = c_t, n_t, m_t, h_t
        tl.store(h_all + at, h.to(h_all.dtype.element_ty), mask=mask)
        if HELD:
            count_(flag)
        if SAVE:
            tl.store(gates + at, i, mask=mask)
            tl.store(gates + every + at, f, mask=mask)
            tl.store(gates + 2 * every + at, z, mask=mask)
            tl.store(gates + 3 * every + at, o, mask=mask)
            tl.store(c_all + at, c, mask=mask)
            tl.store(n_all + at, n, mask=mask)
            tl.store(m_all + at, m, mask=mask)
    tl.store(c_next + of_state, c, mask=mask)
    tl.store(n_next + of_state, n, mask=mask)
    tl.store(m_next + of_state, m, mask=mask)
    tl.store(h_next + of_state, h, mask=mask)


@triton.jit
def token_gradient(
    gates, states, first, upstream, at, of_state, every, t, mask, keep, HP: tl.constexpr, SIGMOID: tl.constexpr
):
    """`cell_gradient` of token t, whose pre-activations and states stand at `at`, those of the call at `of_state`."""
    c_all, n_all, m_all = states
    c_0, n_0, m_0 = first
    i, f = tl.load(gates + at, mask=mask, other=0.0), tl.load(gates + every + at, mask=mask, other=0.0)
    z, o = tl.load(gates + 2 * every + at, mask=mask, other=0.0), tl.load(gates + 3 * every + at, mask=mask, other=0.0)
    c, n = tl.load(c_all + at, mask=mask, other=0.0), tl.load(n_all + at, mask=mask, other=1.0)
    # The state before: of the token before, of the call, or nothing.
    start = at * 0 + t == 0
    before, at_start = mask & keep & ~start, mask & keep & start
    c_b = tl.load(c_all + at - HP, mask=before, other=0.0) + tl.load(c_0 + of_state, mask=at_start, other=0.0)
    n_b = tl.load(n_all + at - HP, mask=before, other=0.0) + tl.load(n_0 + of_state, mask=at_start, other=0.0)
    m_b = tl.load(m_all + at - HP, mask=before, other=0.0) + tl.load(m_0 + of_state, mask=at_start, other=0.0)
    return cell_gradient((i, f, z, o), (c, n), (c_b, n_b, m_b), upstream, SIGMOID)


@triton.jit(do_not_specialize=["B", "T"])
def _slstm_recurrent_bwd_kernel(
    dh_all, R, lengths, reset, gates, c_all, n_all, m_all, c_0, n_0, m_0, dc_last, dn_last, dm_last, dh_last,
    dgates, dc_0, dn_0, dm_0, dh_0, B, T,
    H: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, BB: tl.constexpr, SIGMOID: tl.constexpr, PADDED: tl.constexpr,
    RESET: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # grid: (H, cdiv(B, BB)). Writes the gradients of the pre-activations and of the first state.
    head = tl.program_id(0)
    rows, channels = tl.program_id(1) * BB + tl.arange(0, BB), tl.arange(0, BP)
    mask = (rows < B)[:, None] & (channels < P)[None, :]
    of_out, of_in = channels[:, None], channels[None, :]
    R_i, R_f = weights(R, 0, head, of_out, of_in, H, P, DOT), weights(R, 1, head, of_out, of_in, H, P, DOT)
    R_z, R_o = weights(R, 2, head, of_out, of_in, H, P, DOT), weights(R, 3, head, of_out, of_in, H, P, DOT)
    of_state = (rows[:, None].to(tl.int64) * H + head) * P + channels[None, :]
    dc, dn = tl.load(dc_last + of_state, mask=mask, other=0.0), tl.load(dn_last + of_state, mask=mask, other=0.0)
    dm, dh = tl.load(dm_last + of_state, mask=mask, other=0.0), tl.load(dh_last + of_state, mask=mask, other=0.0)
    at = ((rows[:, None].to(tl.int64) * T + T - 1) * H + head) * P + channels[None, :]
    every = tl.cast(B, tl.int64) * T * H * P
    keep = (rows >= 0)[:, None]
    if PADDED:
        length = tl.load(lengths + rows, mask=rows < B, other=0)[:, None]
    for back in range(0, T):
        t = T - 1 - back
        if RESET:
            keep = tl.load(reset + rows.to(tl.int64) * T + t, mask=rows < B, other=0)[:, None] == 0
        seen = dh + tl.load(dh_all + at, mask=mask, other=0.0).to(tl.float32)
        di, df, dz, do, dc_b, dn_b, dm_b = token_gradient(
            gates, (c_all, n_all, m_all), (c_0, n_0, m_0), (seen, dc, dn, dm), at, of_state, every, t, mask, keep,
            H * P, SIGMOID,
        )  # fmt: skip
        if PADDED:
            real = t < length
            di, df = tl.where(real, di, 0.0), tl.where(real, df, 0.0)
            dz, do = tl.where(real, dz, 0.0), tl.where(real, do, 0.0)
            dc_b, dn_b, dm_b = tl.where(real, dc_b, dc), tl.where(real, dn_b, dn), tl.where(real, dm_b, dm)
        dc, dn, dm = dc_b, dn_b, dm_b
        tl.store(dgates + at, di.to(dgates.dtype.element_ty), mask=mask)
        tl.store(dgates + every + at, df.to(dgates.dtype.element_ty), mask=mask)
        tl.store(dgates + 2 * every + at, dz.to(dgates.dtype.element_ty), mask=mask)
        tl.store(dgates + 3 * every + at, do.to(dgates.dtype.element_ty), mask=mask)
        dh_b = tl.dot(di.to(DOT), R_i, input_precision=PRECISION)
        dh_b = tl.dot(df.to(DOT), R_f, dh_b, input_precision=PRECISION)
        dh_b = tl.dot(dz.to(DOT), R_z, dh_b, input_precision=PRECISION)
        dh_b = tl.dot(do.to(DOT), R_o, dh_b, input_precision=PRECISION)
        dh_b = tl.where(keep, dh_b, 0.0)
        if PADDED:
            dh_b = tl.where(t < length, dh_b, dh)
        dh = dh_b
        at -= H * P
    tl.store(dc_0 + of_state, dc, mask=mask)
    tl.store(dn_0 + of_state, dn, mask=mask)
    tl.store(dm_0 + of_state, dm, mask=mask)
    tl.store(dh_0 + of_state, dh, mask=mask)


@triton.jit(do_not_specialize=["B", "T", "newest", "count", "patience"])
def _slstm_recurrent_bwd_slices_kernel(
    dh_all, R, lengths, reset, gates, c_all, n_all, m_all, c_0, n_0, m_0, dc, dn, dm, dh_last, dgates, dh_0, flags,
    B, T, newest, count, patience,
    H: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, BU: tl.constexpr, BB: tl.constexpr, SIGMOID: tl.constexpr,
    PADDED: tl.constexpr, RESET: tl.constexpr, HELD: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # grid: (H * cdiv(P, BU), cdiv(B, BB)). Writes the same for `count` tokens back from `newest`, dc, dn, dm in place;
    # token -1 is the first state's and gives dh_0 only. HELD as in the forward pass, but through dgates.
    BLOCKS: tl.constexpr = (P + BU - 1) // BU
    head, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    rows, own = tl.program_id(1) * BB + tl.arange(0, BB), block * BU + tl.arange(0, BU)
    mask = (rows < B)[:, None] & (own < P)[None, :]
    of_state = (rows[:, None].to(tl.int64) * H + head) * P + own[None, :]
    flag = flags + tl.program_id(1) * H + head
    every = tl.cast(B, tl.int64) * T * H * P
    held = ()
    if HELD:
        held = held_weights(R, head, own, H, P, BP, True, DOT)
    dc_t, dn_t = tl.load(dc + of_state, mask=mask, other=0.0), tl.load(dn + of_state, mask=mask, other=0.0)
    dm_t = tl.load(dm + of_state, mask=mask, other=0.0)
    for back in range(0, count):
        t = newest - back
        if HELD:
            await_(flag, back * BLOCKS, patience)
        # What the token after t passes back to h, if there is one, it is real and begins no document; else the end's.
        later = rows * 0 + (t + 1)
        passes = (rows < B) & (later < T)
        last = later >= T
        if PADDED:
            length = tl.load(lengths + rows, mask=rows < B, other=0)
            passes = passes & (later < length)
            last = later >= length
        if RESET:
            passes = passes & (tl.load(reset + rows.to(tl.int64) * T + t + 1, mask=passes, other=0) == 0)
        dh = tl.load(dh_last + of_state, mask=mask & last[:, None], other=0.0)
        dg_first = dgates + ((rows[:, None].to(tl.int64) * T + t + 1) * H + head) * P
        if HELD:
            for tile in tl.static_range((P + BP - 1) // BP):
                others = tile * BP + tl.arange(0, BP)
                seen = passes[:, None] & (others < P)[None, :]
                for gate in tl.static_range(4):
                    dg_at = dg_first + gate * every + others[None, :]
                    dg = tl.load(dg_at, mask=seen, other=0.0, cache_modifier=".cg").to(DOT)
                    dh = tl.dot(dg, held[tile * 4 + gate], dh, input_precision=PRECISION)
        else:
            for of in range(0, P, BP):
                others = of + tl.arange(0, BP)
                seen = passes[:, None] & (others < P)[None, :]
                of_out, of_in = others[:, None], own[None, :]
                for gate in tl.static_range(4):
                    dg = tl.load(dg_first + gate * every + others[None, :], mask=seen, other=0.0).to(DOT)
                    dh = tl.dot(dg, weights(R, gate, head, of_out, of_in, H, P, DOT), dh, input_precision=PRECISION)
        keep = (rows >= 0)[:, None]
        exists = rows * 0 + t >= 0
        if RESET:
            keep = tl.load(reset + rows.to(tl.int64) * T + t, mask=(rows < B) & exists, other=0)[:, None] == 0
        tl.store(dh_0 + of_state, dh, mask=mask & ~exists[:, None])
        now = mask & exists[:, None]
        at = ((rows[:, None].to(tl.int64) * T + t) * H + head) * P + own[None, :]
        dh += tl.load(dh_all + at, mask=now, other=0.0).to(tl.float32)
        di, df, dz, do, dc_b, dn_b, dm_b = token_gradient(
            gates, (c_all, n_all, m_all), (c_0, n_0, m_0), (dh, dc_t, dn_t, dm_t), at, of_state, every, t, now, keep,
            H * P, SIGMOID,
        )  # fmt: skip
        real = exists[:, None]
        if PADDED:
            real = real & (t < length)[:, None]
        dc_t, dn_t, dm_t = tl.where(real, dc_b, dc_t), tl.where(real, dn_b, dn_t), tl.where(real, dm_b, dm_t)
        tl.store(dgates + at, tl.where(real, di, 0.0).to(dgates.dtype.element_ty), mask=now)
        tl.store(dgates + every + at, tl.where(real, df, 0.0).to(dgates.dtype.element_ty), mask=now)
        tl.store(dgates + 2 * every + at, tl.where(real, dz, 0.0).to(dgates.dtype.element_ty), mask=now)
        tl.store(dgates + 3 * every + at, tl.where(real, do, 0.0).to(dgates.dtype.element_ty), mask=now)
        if HELD:
            count_(flag)
    tl.store(dc + of_state, dc_t, mask=mask)
    tl.store(dn + of_state, dn_t, mask=mask)
    tl.store(dm + of_state, dm_t, mask=mask)
