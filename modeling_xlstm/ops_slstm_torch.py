"""The sLSTM over a sequence in PyTorch with a backward pass written by hand: the same numbers, several times faster.

What makes it fast: a block of tokens' gates is laid out by time before its steps, each step runs few operations in
buffers made before, most of them NumPy's on the CPU, whose calls cost a third of torch's, and the backward loop only
carries dh, dc, dn; the gradient of the recurrent weights is one product a block. Letters: gates are [T, 4, H, B, P] in
the order i, f, z, o, states [H, B, P].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .ops_common import differentiable_once, has_numpy_2, keep_freed_memory, log_gates, token_blocks
from .states_xlstm import SLSTMState, compute_dtype


def _numbers(x: Tensor) -> tuple[Any, Callable[[Tensor], Any]]:
    """What computes with the numbers of tensors like x, NumPy on the CPU if it can, and how it sees them."""
    if x.is_cpu and type(x) is Tensor and has_numpy_2():
        return np, lambda tensor: tensor.detach().numpy()
    return torch, lambda tensor: tensor


def _forward(
    gates: Tensor, states: tuple[Tensor, ...], R: Tensor, state: tuple[Tensor, ...], reset: Tensor | None,
    input_gate: str, output_tanh: bool,
) -> None:  # fmt: skip
    """Run all tokens.

    Args:
        gates: pre-activations without their recurrent part, [T, 4, H, B, P]; written over: i and f with the recurrent
            part, z and o activated.
        states: where c, n, m, h after every token are written, each [T, H, B, P]. The state before the first token may
            be the last of these.
        R: recurrent weights, [H, P in, 4 P out].
        state: c, n, m, h before the first token, each [H, B, P]; m is -inf where n is 0.
        reset: True where a row begins anew, [T, B]; or None.
        input_gate: 'exp', 'sigmoid' or 'exp_both'.
        output_tanh: whether c / n passes a tanh.
    """
    _, _, H, B, P = gates.shape
    recurrent, prime = gates.new_empty(H, B, 4 * P), gates.new_empty(2, H, B, P)
    xp, see = _numbers(recurrent)
    (c, n, m), h = map(see, state[:3]), state[3]
    by_gate, term = see(recurrent.unflatten(-1, (4, P)).movedim(-2, 0)), see(torch.empty_like(prime[0]))
    prime = see(prime)
    i_prime, f_prime = prime[0], prime[1]
    begins = [] if reset is None else reset.any(1).tolist()
    # All views at once: made in the loop, they would take as long as the operations.
    steps = zip(
        zip(*(gates[:, gate].unbind() for gate in (0, 1, 3)), states[3].unbind(), strict=True),
        see(gates),
        zip(*map(see, states), strict=True),
        strict=True,
    )
    for t, ((i_tilde, f_tilde, o, h_after), g, (c_t, n_t, m_t, h_t)) in enumerate(steps):
        if begins and begins[t]:
            row = reset[t, :, None]  # type: ignore[index]
            c, n, m = (xp.where(see(row), empty, s) for s, empty in ((c, 0.0), (n, 0.0), (m, -math.inf)))
            h = h.masked_fill(row, 0.0)
        torch.bmm(h, R, out=recurrent)
        xp.add(g, by_gate, out=g)
        log_i, log_f = map(see, log_gates(i_tilde, f_tilde, input_gate))
        log_f = xp.add(log_f, m)
        m = xp.maximum(log_i, log_f, out=m_t)
        xp.subtract(log_i, m, out=i_prime)
        xp.subtract(log_f, m, out=f_prime)
        xp.exp(prime, out=prime)
        z = xp.tanh(g[2], out=g[2])
        c = xp.multiply(f_prime, c, out=c_t)
        xp.add(c, xp.multiply(i_prime, z, out=term), out=c)
        n = xp.multiply(f_prime, n, out=n_t)
        xp.add(n, i_prime, out=n)
        xp.divide(c, n, out=h_t)
        if output_tanh:
            xp.tanh(h_t, out=h_t)
        o.sigmoid_()
        xp.multiply(h_t, g[3], out=h_t)
        h = h_after


class _Factors(NamedTuple):
    """What the backward steps multiply with.

    Attributes:
        from_c: d gates (i, f, z) / d c, [3, T, H, B, P].
        from_n: d gates (i, f) / d n, [2, T, H, B, P].
        from_ratio: d h / d c, n held constant, [T, H, B, P]; o / n without a tanh.
        ratio: c / n, [T, H, B, P].
        from_h: d gate o / d h, [T, H, B, P].
        i_prime, f_prime: the stabilised gates, each [T, H, B, P].
        closing: d log gate / d pre-activation of i and f, [2, T, H, B, P] (1 for an exponential gate).
        h_before: the h each token saw, [T, H, B, P].
    """

    from_c: Tensor
    from_n: Tensor
    from_ratio: Tensor
    ratio: Tensor
    from_h: Tensor
    i_prime: Tensor
    f_prime: Tensor
    closing: Tensor
    h_before: Tensor

    @classmethod
    def of(
        cls, gates: Tensor, states: tuple[Tensor, ...], first: tuple[Tensor, ...], reset: Tensor | None,
        input_gate: str, output_tanh: bool,
    ) -> _Factors:  # fmt: skip
        """For all tokens at once, from what `_forward` left and was given."""
        c, n, m, _ = states
        before = [torch.cat([s[None], x[:-1]]) for s, x in zip(first, states, strict=True)]
        if reset is not None:
            empty = 0.0, 0.0, -math.inf, 0.0
            before = [x.masked_fill(reset[:, None, :, None], e) for x, e in zip(before, empty, strict=True)]
        c_before, n_before, m_before, h_before = before
        i_tilde, f_tilde, z, o = gates.unbind(1)
        log_i, log_f = log_gates(i_tilde, f_tilde, input_gate)
        i_prime, f_prime = torch.exp(log_i - m), torch.exp(m_before.add_(log_f).sub_(m))
        closing = torch.sigmoid(-gates[:, :2]).transpose(0, 1).contiguous()
        if input_gate != "sigmoid":
            closing[0] = 1.0
        if input_gate == "exp_both":
            closing[1] = 1.0
        from_n = torch.stack([i_prime, f_prime * n_before]).mul_(closing)
        from_c = torch.stack([i_prime * z * closing[0], f_prime * c_before * closing[1], i_prime * (1 - z * z)])
        ratio, from_ratio = c / n, o / n
        out = torch.tanh(ratio) if output_tanh else ratio
        if output_tanh:
            from_ratio = from_ratio * (1 - out * out)
        from_h = out * o * (1 - o)
        return cls(from_c, from_n, from_ratio, ratio, from_h, i_prime, f_prime, closing, h_before)


_Ends = tuple[Tensor, Tensor, Tensor | None, Tensor]
_After = tuple[Tensor, Tensor | None, Tensor]  # gradients of c and n, of m where it is owed any, and of h


def _backward(
    dgates: Tensor, dh_out: Tensor, d_ends: list[_Ends | None], after: _After, R_T: Tensor,
    factors: _Factors, reset: Tensor | None,
) -> _After:  # fmt: skip
    """Run the tokens backwards.

    The stabiliser m is held constant, for h does not depend on it. A loss that sees the final c, n or m does: `dm`
    carries what it is owed to the one gate that set m.

    Args:
        dgates: where the gradient of the pre-activations is written, [T, H, B, 4 P].
        dh_out: gradient of every h, [T, H, B, P].
        d_ends: gradients of the state c, n, m, h that some rows end with at token t, or None, for each t; as
            `_at_constant_m` returns them.
        after: gradients that later tokens owe the state c, n [2, H, B, P], m and h after the last.
        R_T: recurrent weights, [H, 4 P out, P in].
        factors: of these tokens.
        reset: True where a row begins anew, [T, B]; or None.

    Returns:
        before: the same of the state before the first token, that of m with the memories held, as in `d_ends`.
    """
    T, P = dh_out.shape[0], dh_out.shape[-1]
    dcn, dm, dh_next = after
    dc, dn = dcn
    begins = [] if reset is None else reset.any(1).tolist()
    by_gate = dgates.unflatten(-1, (4, P)).movedim(-2, 1)  # [T, 4, H, B, P]
    steps = zip(
        range(T),
        d_ends,
        *(x.unbind() for x in (dh_out, factors.from_ratio, factors.ratio, factors.from_h, factors.f_prime, dgates)),
        factors.from_c.unbind(1),
        factors.from_n.unbind(1),
        *(x.unbind() for x in (by_gate[:, :3], by_gate[:, :2], by_gate[:, 3])),
        strict=True,
    )
    for t, ends, dh_t, from_ratio_t, ratio_t, from_h_t, f_prime, dg, from_c_t, from_n_t, *parts in reversed([*steps]):
        d3, d2, do = parts
        dh = dh_next + dh_t
        if ends is not None:
            dcn += torch.stack(ends[:2])
            dh = dh + ends[3]
            if ends[2] is not None:
                dm = ends[2] if dm is None else dm + ends[2]
        dq = dh * from_ratio_t
        dc += dq
        dn.addcmul_(dq, ratio_t, value=-1)
        torch.mul(from_c_t, dc, out=d3)
        d2.addcmul_(from_n_t, dn)
        torch.mul(from_h_t, dh, out=do)
        if dm is not None:
            set_by_i = factors.i_prime[t] >= f_prime  # the larger is 1
            d2.addcmul_(factors.closing[:, t], torch.stack([dm * set_by_i, dm * ~set_by_i]))
            dm = dm * ~set_by_i
        dcn *= f_prime
        dh_next = torch.bmm(dg, R_T)
        if begins and begins[t]:
            dh_next = dh_next.masked_fill(reset[t, :, None], 0.0)  # type: ignore[index]
    return dcn, dm, dh_next


def _at_constant_m(cnm: Tensor, d: tuple[Tensor, ...]) -> _Ends:
    """Gradients of a state c, n, m, h, that of m with the memories c exp(m) and n exp(m) held; None if it is rounding.

    It is that where only later tokens see the state, and without it the steps before are quicker.
    """
    (c, n, _), (dc, dn, dm, dh) = cnm, d
    by_c, by_n = c * dc, n * dn
    rest = dm - by_c - by_n
    rounding = 4 * torch.finfo(rest.dtype).eps * (by_c.abs() + by_n.abs())
    return dc, dn, None if (rest.abs() <= rounding).all() else rest, dh


class _SLSTM(torch.autograd.Function):
    """R, the first state and the four gates [B, T, H, P] to h of every token and the state after each row's last."""

    @staticmethod
    def forward(
        ctx: Any, R: Tensor, c: Tensor, n: Tensor, m: Tensor, h: Tensor, last: Tensor | None, reset: Tensor | None,
        input_gate: str, output_tanh: bool, *x: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        T, is_kept, first = x[0].shape[1], any(ctx.needs_input_grad), (c, n, m.masked_fill(n == 0, -torch.inf), h)
        blocks = token_blocks(T, 4 * c.numel())
        # Of what no backward pass needs, only one block is ever held.
        length = T if is_kept else blocks[0].stop
        gates, states, outputs = (c.new_empty(*size, *c.shape) for size in ((length, 4), (3, length), (T,)))
        running: tuple[Tensor, ...] = first
        ends: tuple[Tensor, ...] = c, n, m, h
        for block in blocks:
            resets = None if reset is None else reset[block]
            place = block if is_kept else slice(block.stop - block.start)
            for to, gate in zip(gates[place].unbind(1), x, strict=True):
                to.copy_(gate[:, block].permute(1, 2, 0, 3))
            made = *states[:, place], outputs[block]
            with np.errstate(all="ignore"):
                _forward(gates[place], made, R, running, resets, input_gate, output_tanh)
            running = tuple(s[-1] for s in made)
            if last is not None:
                at = last[None, None, :, None] - block.start
                index = at.clamp(0, len(made[0]) - 1).expand(1, *c.shape[:1], -1, c.shape[-1])
                is_here = ((at >= 0) & (at < len(made[0])))[0]
                ends = tuple(torch.where(is_here, s.gather(0, index)[0], e) for s, e in zip(made, ends, strict=True))
        ctx.save_for_backward(gates, states, outputs, R, *first, last, reset)
        ctx.input_gate, ctx.output_tanh, ctx.dtypes = input_gate, output_tanh, [gate.dtype for gate in x]
        ctx.set_materialize_grads(False)
        return outputs, *(tuple(s.clone() for s in running) if last is None else ends)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dh_out: Tensor | None, *d_last: Tensor | None) -> tuple[Tensor | None, ...]:
        gates, cnm, outputs, R, c, n, m, h, last, reset = ctx.saved_tensors
        dh_out = torch.zeros_like(outputs) if dh_out is None else dh_out
        ends: list[_Ends | None] = [None] * dh_out.shape[0]
        d_empty: tuple[Tensor, ...] | None = None
        if any(d is not None for d in d_last):
            dc, dn, dm, dh = (torch.zeros_like(c) if d is None else d for d in d_last)
            if last is None:
                ends[-1] = _at_constant_m(cnm[:, -1], (dc, dn, dm, dh))
            else:
                for t in last.unique().tolist():
                    d_t = tuple(d * (last == t)[:, None] for d in (dc, dn, dm, dh))
                    if t < 0:
                        d_empty = d_t
                    else:
                        ends[t] = _at_constant_m(cnm[:, t], d_t)
        T, _, H, B, P = gates.shape
        blocks, dR, R_T = token_blocks(T, 4 * c.numel()), torch.zeros_like(R), R.mT.contiguous()
        dx = [gates.new_empty(H, B, T, P, dtype=dtype) for dtype in ctx.dtypes]
        dgates = gates.new_empty(blocks[0].stop, H, B, 4 * P)
        after: _After = torch.stack([torch.zeros_like(c)] * 2), None, torch.zeros_like(c)
        for block in reversed(blocks):
            states, resets = (*cnm[:, block], outputs[block]), None if reset is None else reset[block]
            before = (*cnm[:, block.start - 1], outputs[block.start - 1]) if block.start else (c, n, m, h)
            factors = _Factors.of(gates[block], states, before, resets, ctx.input_gate, ctx.output_tanh)
            dg = dgates[: block.stop - block.start]
            after = _backward(dg, dh_out[block], ends[block], after, R_T, factors, resets)
            for to, gate in zip(dx, dg.unflatten(-1, (4, P)).unbind(-2), strict=True):
                to[:, :, block] = gate.permute(1, 2, 0, 3)
            dR.baddbmm_(factors.h_before.movedim(0, 1).flatten(1, 2).mT, dg.movedim(0, 1).flatten(1, 2))
        (dc_0, dn_0), dm_0, dh_0 = after
        d_first = [dc_0, dn_0, c * dc_0 + n * dn_0 + (0.0 if dm_0 is None else dm_0), dh_0]
        if d_empty is not None:
            d_first = [a + b for a, b in zip(d_first, d_empty, strict=True)]
        return dR, *d_first, None, None, None, None, *(gate.permute(1, 2, 0, 3) for gate in dx)


@torch.compiler.disable  # a compiler would unroll the loop over tokens, for minutes
def slstm_recurrent_torch(
    i_tilde: Tensor,
    f_tilde: Tensor,
    z_tilde: Tensor,
    o_tilde: Tensor,
    recurrent: Tensor,
    state: SLSTMState | None,
    *,
    lengths: Tensor | None,
    reset: Tensor | None,
    input_gate: str,
    output_tanh: bool = False,
) -> tuple[Tensor, SLSTMState]:
    """All tokens of a sequence. Arguments and results as in `ops_slstm.slstm`; can be differentiated once."""
    keep_freed_memory()
    dtype = compute_dtype(i_tilde, state)
    B, _, H, P = i_tilde.shape
    x = i_tilde, f_tilde, z_tilde, o_tilde
    R = recurrent.to(dtype).permute(1, 3, 0, 2).flatten(2)  # [H, P in, 4 P out]
    state = SLSTMState.zeros(B, H, P, like=R) if state is None else SLSTMState(*(s.to(dtype) for s in state))
    first = (s.transpose(0, 1).contiguous() for s in state)
    last = None if lengths is None else lengths.to(R.device).long().clamp(max=i_tilde.shape[1]) - 1
    by_time = None if reset is None else reset.T.contiguous()
    h, *after = _SLSTM.apply(R, *first, last, by_time, input_gate, output_tanh, *x)
    # Copies: of views that a block returns FSDP2 warns.
    return h.permute(2, 0, 1, 3), SLSTMState(*(s.transpose(0, 1).clone() for s in after))


def slstm_step_torch(
    i_tilde: Tensor,
    f_tilde: Tensor,
    z_tilde: Tensor,
    o_tilde: Tensor,
    recurrent: Tensor,
    state: SLSTMState | None,
    *,
    reset: Tensor | None = None,
    input_gate: str,
    output_tanh: bool = False,
) -> tuple[Tensor, SLSTMState]:
    """One token in few operations. Arguments and results as in `ops_slstm.slstm`."""
    B, _, H, P = i_tilde.shape
    dtype = compute_dtype(i_tilde, state)
    state = SLSTMState.zeros(B, H, P, like=i_tilde.to(dtype)) if state is None else state
    c, n, m, h = (s.to(dtype) for s in state)
    if reset is not None:
        c, n, m, h = (s * ~reset[..., None] for s in (c, n, m, h))
    by_gate = (h.transpose(0, 1) @ recurrent.to(dtype).mT).transpose(1, 2)  # [4, B, H, P]
    given = zip((i_tilde, f_tilde, z_tilde, o_tilde), by_gate.unbind(), strict=True)
    i_tilde, f_tilde, z_tilde, o_tilde = (gate[:, 0] + part for gate, part in given)
    log_i, log_f = log_gates(i_tilde, f_tilde, input_gate)
    # A cell that has seen no token forgets nothing, whatever its gate says.
    log_f = (log_f + m).masked_fill(n == 0, -torch.inf)
    m = torch.maximum(log_i, log_f)
    i_prime, f_prime = torch.exp(log_i - m), torch.exp(log_f - m)
    c = (f_prime * c).addcmul(i_prime, torch.tanh(z_tilde))
    n = torch.addcmul(i_prime, f_prime, n)
    h = torch.sigmoid(o_tilde) * (torch.tanh(c / n) if output_tanh else c / n)
    return h[:, None], SLSTMState(c, n, m, h)
