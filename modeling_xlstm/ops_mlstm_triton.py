"""The mLSTM in Triton kernels: a sequence chunkwise with exact gradients, or one token."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .ops_common import differentiable_once, dtypes_obstacle, is_small
from .ops_mlstm_triton_bwd import (
    _mlstm_chunkwise_bwd_dk_kernel,
    _mlstm_chunkwise_bwd_dq_kernel,
    _mlstm_chunkwise_bwd_dv_kernel,
    _mlstm_chunkwise_bwd_gates_kernel,
    _mlstm_chunkwise_bwd_rows_kernel,
    _mlstm_chunkwise_bwd_states_kernel,
)
from .ops_mlstm_triton_fwd import (
    _mlstm_chunkwise_fwd_gates_kernel,
    _mlstm_chunkwise_fwd_h_kernel,
    _mlstm_chunkwise_fwd_states_kernel,
    _mlstm_recurrent_fwd_step_kernel,
)
from .states_xlstm import MLSTMState

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The Triton kernels need the package `triton`; `backend='auto'` does without it.") from error

LARGEST_K, LARGEST_V = 512, 1024
LARGEST_ROWS = 65_535  # of a grid's second axis


def mlstm_sizes_obstacle(q: Tensor, k: Tensor, v: Tensor, state: MLSTMState | None) -> str:
    """Why the kernels cannot take these tensors; empty if they can."""
    K, V = q.shape[-1], v.shape[-1]
    if K % 16 or V % 16 or K > LARGEST_K or V > LARGEST_V:
        return f"head dims must be multiples of 16 up to K = {LARGEST_K}, V = {LARGEST_V}; got K = {K}, V = {V}"
    if q.shape[0] * q.shape[2] > LARGEST_ROWS:
        return f"batch times heads must be {LARGEST_ROWS} at most; got {q.shape[0]} times {q.shape[2]}"
    return dtypes_obstacle(q, k, v, *(state or ()))


class _Sizes(NamedTuple):
    """Sizes of one call and of the tiles that share its work.

    Attributes:
        B, T, H, K, V: as everywhere.
        N: chunks.
        L: tokens of a chunk, a power of two.
        BT: tokens of a tile.
        wide: channels of a tile that is summed up in registers; narrow: of one that is read for it.
        options: what every kernel with products takes.
    """

    B: int
    T: int
    H: int
    K: int
    V: int
    N: int
    L: int
    BT: int
    wide: int
    narrow: int
    options: dict[str, Any]

    @classmethod
    def of(cls, q: Tensor, v: Tensor, document: Tensor | None, chunk_size: int) -> _Sizes:
        """The sizes of a call; nothing that is compiled depends on B or T."""
        (B, T, H, K), V = q.shape, v.shape[-1]
        L = min(max(triton.next_power_of_2(chunk_size), 16), 1024)
        half = v.dtype == torch.bfloat16
        # Larger tiles spill registers (scripts/compile_kernels.py).
        BT, wide, narrow = (min(L, 64), 256, 64) if half else (min(L, 32), 64, 32)
        options = {
            "H": H,
            "K": K,
            "V": V,
            "L": L,
            "BT": BT,
            "RESET": document is not None,
            # float16 products overflow: its numbers are exact in TensorFloat-32, whose range is that of float32.
            "DOT": tl.bfloat16 if half else tl.float32,
            "num_stages": 3 if half and not is_small(v.device) else 2,
            "PRECISION": "tf32" if v.dtype == torch.float16 else "ieee" if torch.version.hip else "tf32x3",
        }
        return cls(B, T, H, K, V, math.ceil(T / L), L, BT, wide, narrow, options)

    def blocks(self, k: int, v: int) -> dict[str, Any]:
        """Options of a kernel with products whose tiles have up to so many channels of keys and values."""
        BK, BV = min(triton.next_power_of_2(self.K), k), min(triton.next_power_of_2(self.V), v)
        return {**self.options, "BK": BK, "BV": BV, "num_warps": 8 if max(BK, BV) > 64 else 4}

    @property
    def wide_k(self) -> dict[str, Any]:
        """Options of a kernel that sums over values for a block of keys."""
        return self.blocks(self.wide, self.narrow)

    @property
    def wide_v(self) -> dict[str, Any]:
        """Options of a kernel that sums over keys for a block of values."""
        return self.blocks(self.narrow, self.wide)

    @property
    def state(self) -> dict[str, Any]:
        """Options of a kernel that keeps a block of C or dC."""
        return self.blocks(self.narrow, min(self.wide, 128))

    def tiles(self, channels: int, block: int) -> tuple[int, int]:
        """The grid of a kernel that takes every tile of tokens and block of channels of every head by itself."""
        return self.N * (self.L // self.BT) * triton.cdiv(channels, block), self.B * self.H


def _dense(x: Tensor) -> Tensor:
    """x [B, T, H, .] with unit channel stride and rows right behind one another, copied only if it must be."""
    rows = x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
    return x if rows and x.stride(3) == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    """Strides between tokens and between heads, of every tensor."""
    return tuple(x.stride(axis) for x in tensors for axis in (1, 2))


class _GateRule(NamedTuple):
    """What makes gates of pre-activations, as constants of the kernels.

    Attributes:
        SIGMOID: whether the input gate is bounded by 1.
        CAP: soft cap of both pre-activations, 0 for none.
    """

    SIGMOID: bool
    CAP: float


class _Gates(NamedTuple):
    """What the gates come to; see `ops_mlstm_triton_fwd`.

    Attributes:
        a: [B, H, T].
        M: [B, H, T].
        m: stabiliser of every token, [B, H, T].
        m_in: stabiliser before every chunk and after the last, [B, H, N + 1].
    """

    a: Tensor
    M: Tensor
    m: Tensor
    m_in: Tensor


def _weigh_tokens(
    i_tilde: Tensor, f_tilde: Tensor, document: Tensor | None, m: Tensor, size: _Sizes, rule: _GateRule
) -> _Gates:
    a, M, m_all = (m.new_empty(size.B, size.H, size.T) for _ in range(3))
    m_in = m.new_empty(size.B, size.H, size.N + 1)
    _mlstm_chunkwise_fwd_gates_kernel[(size.B * size.H,)](
        i_tilde, f_tilde, a if document is None else document, m, a, M, m_all, m_in, size.T, size.N,
        H=size.H, L=size.L, **rule._asdict(), RESET=document is not None,
    )  # fmt: skip
    return _Gates(a, M, m_all, m_in)


def _states(
    k: Tensor, v: Tensor, gates: _Gates, document: Tensor, C: Tensor, n: Tensor, size: _Sizes
) -> tuple[Tensor, ...]:
    """C, n before every chunk, [B, H, N, K, V] and [B, H, N, K], and after the last."""
    kept = torch.bfloat16 if v.dtype == torch.bfloat16 else torch.float32
    C_all = C.new_empty(size.B, size.H, size.N, size.K, size.V, dtype=kept)
    n_all = n.new_empty(size.B, size.H, size.N, size.K)
    C_last, n_last = torch.empty_like(C), torch.empty_like(n)
    options = size.state
    grid = triton.cdiv(size.K, options["BK"]) * triton.cdiv(size.V, options["BV"]), size.B * size.H
    _mlstm_chunkwise_fwd_states_kernel[grid](
        k, v, gates.a, gates.M, document, gates.m_in, C, n, C_all, n_all, C_last, n_last, size.T, size.N,
        size.K**-0.5, *_strides(k, v), **options,
    )  # fmt: skip
    return C_all, n_all, C_last, n_last


class _MLSTM(torch.autograd.Function):
    """q, k, v, gates and the first C, n, m to h [B, T, H, V] and the last C, n, m."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, i_tilde: Tensor, f_tilde: Tensor, C: Tensor, n: Tensor, m: Tensor,
        document: Tensor | None, chunk_size: int, eps: float, rule: _GateRule,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        size = _Sizes.of(q, v, document, chunk_size)
        gates = _weigh_tokens(i_tilde, f_tilde, document, m, size, rule)
        documents = gates.a if document is None else document
        C_all, n_all, C_last, n_last = _states(k, v, gates, documents, C, n, size)
        h, qn = v.new_empty(v.shape), torch.empty_like(gates.a)
        options = size.wide_v
        _mlstm_chunkwise_fwd_h_kernel[size.tiles(size.V, options["BV"])](
            q, k, v, *gates[:3], documents, gates.m_in, C_all, n_all, h, qn, size.T, size.N,
            size.K**-0.5, eps, *_strides(q, k, v), **options,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, i_tilde, f_tilde, C, n, m, document, *gates, h, qn, C_last, n_last)
        ctx.size, ctx.eps, ctx.rule = size, eps, rule
        ctx.set_materialize_grads(False)
        return h, C_last, n_last, gates.m_in[..., -1].clone()

    @staticmethod
    @differentiable_once
    def backward(
        ctx: Any, dh: Tensor | None, dC: Tensor | None, dn: Tensor | None, dm: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q, k, v, i_tilde, f_tilde, C, n, m, document, *gates, h, qn, C_last, n_last = ctx.saved_tensors
        size, gates = ctx.size, _Gates(*gates)
        documents = gates.a if document is None else document
        dh = torch.zeros_like(h) if dh is None else _dense(dh)
        over_D, dqn, dm_direct = (torch.empty_like(qn) for _ in range(3))
        _mlstm_chunkwise_bwd_rows_kernel[(triton.cdiv(size.T, size.BT), size.B * size.H)](
            dh, h, qn, gates.m, over_D, dqn, dm_direct, size.T, ctx.eps, *_strides(dh),
            H=size.H, V=size.V, BT=size.BT, BV=size.wide_k["BV"],
        )  # fmt: skip
        ends = [torch.zeros_like(x) if d is None else d.contiguous() for x, d in ((C, dC), (n, dn), (m, dm))]
        C_all, n_all, *_ = _states(k, v, gates, documents, C, n, size)
        rows = (over_D, dqn)
        dC_all, dn_all, dC_0, dn_0, overlap = _state_gradients(
            (q, dh), gates, rows, documents, (C_all, n_all, C_last, n_last, *ends[:2]), size
        )
        dq, dk, dv, qdq, kdk = _token_gradients(
            (q, k, v, dh), gates, rows, documents, (C_all, n_all, dC_all, dn_all), size
        )
        di, df, dm_0 = torch.empty_like(i_tilde), torch.empty_like(f_tilde), torch.empty_like(m)
        _mlstm_chunkwise_bwd_gates_kernel[(size.B * size.H,)](
            i_tilde, f_tilde, documents, m, gates.m, qdq, kdk, dm_direct, overlap, ends[2], di, df, dm_0,
            size.T, size.N,
            H=size.H, L=size.L, PARTS=len(qdq), BLOCKS=overlap.shape[-1], BP=triton.next_power_of_2(overlap.shape[-1]),
            **ctx.rule._asdict(), RESET=document is not None,
        )  # fmt: skip
        dm_0 += (C * dC_0).sum((-2, -1)) + (n * dn_0).sum(-1)
        return dq, dk, dv, di, df, dC_0, dn_0, dm_0, None, None, None, None


def _state_gradients(
    tokens: tuple[Tensor, ...], gates: _Gates, rows: tuple[Tensor, ...], documents: Tensor,
    states: tuple[Tensor, ...], size: _Sizes,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of C, n after every chunk and before the first; C . dC + n . dn after every chunk, in parts."""
    C_all, n_all, C_last, n_last, *_ = states
    dC_all, dn_all = torch.empty_like(C_all), torch.empty_like(n_all)
    dC_0, dn_0 = torch.empty_like(C_last), torch.empty_like(n_last)
    options = size.state
    blocks = triton.cdiv(size.K, options["BK"]) * triton.cdiv(size.V, options["BV"])
    overlap = gates.a.new_empty(size.B, size.H, size.N, blocks)
    _mlstm_chunkwise_bwd_states_kernel[(blocks, size.B * size.H)](
        *tokens, gates.M, *rows, documents, gates.m_in, *states, dC_all, dn_all, dC_0, dn_0, overlap, size.T, size.N,
        *_strides(*tokens), **options,
    )  # fmt: skip
    return dC_all, dn_all, dC_0, dn_0, overlap


def _token_gradients(
    tokens: tuple[Tensor, ...], gates: _Gates, rows: tuple[Tensor, ...], documents: Tensor,
    states: tuple[Tensor, ...], size: _Sizes,
) -> tuple[Tensor, ...]:  # fmt: skip
    """dq, dk, dv, and q . dq and k . dk of every token in parts, [parts, B, H, T]."""
    q, k, v, dh = tokens
    C_all, n_all, dC_all, dn_all = states
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    options, scale = size.wide_k, size.K**-0.5
    grid = size.tiles(size.K, options["BK"])
    qdq, kdk = (gates.a.new_empty(triton.cdiv(size.K, options["BK"]), *gates.a.shape) for _ in range(2))
    _mlstm_chunkwise_bwd_dq_kernel[grid](
        *tokens, gates.a, gates.M, *rows, documents, gates.m_in, C_all, n_all, dq, qdq, size.T, size.N, scale,
        *_strides(*tokens), **options,
    )  # fmt: skip
    _mlstm_chunkwise_bwd_dk_kernel[grid](
        *tokens, gates.a, gates.M, *rows, documents, dC_all, dn_all, dk, kdk, size.T, size.N, scale,
        *_strides(*tokens), **options,
    )  # fmt: skip
    options = size.wide_v
    _mlstm_chunkwise_bwd_dv_kernel[size.tiles(size.V, options["BV"])](
        q, k, dh, gates.a, gates.M, rows[0], documents, dC_all, dv, size.T, size.N, scale,
        *_strides(q, k, dh), **options,
    )  # fmt: skip
    return dq, dk, dv, qdq, kdk


def _step(
    q: Tensor, k: Tensor, v: Tensor, i_tilde: Tensor, f_tilde: Tensor, state: MLSTMState, reset: Tensor | None,
    eps: float, rule: _GateRule, over: bool = False,
) -> tuple[Tensor, MLSTMState]:  # fmt: skip
    """One token, without gradients; `over` writes C where it was, which no other program of the kernel reads."""
    B, _, H, K = q.shape
    V = v.shape[-1]
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    C, n, m = state
    h, after = v.new_empty(v.shape), MLSTMState(C if over else torch.empty_like(C), *map(torch.empty_like, (n, m)))
    BK = triton.next_power_of_2(K)
    # Small blocks of values fill the device at batch 1.
    BV = min(triton.next_power_of_2(V), 32 if BK <= 256 else 16)
    _mlstm_recurrent_fwd_step_kernel[(triton.cdiv(V, BV), B * H)](
        q, k, v, i_tilde, f_tilde, state.m if reset is None else reset.contiguous(), *state, h, *after, K**-0.5, eps,
        *(x.stride(axis) for x in (q, k, v) for axis in (0, 2)),
        H=H, K=K, V=V, BK=BK, BV=BV, **rule._asdict(), RESET=reset is not None, num_warps=4,
    )  # fmt: skip
    return h, after


def mlstm_step_triton_(
    q: Tensor, k: Tensor, v: Tensor, i_tilde: Tensor, f_tilde: Tensor, state: MLSTMState, *,
    eps: float, input_gate: str, gate_soft_cap: float | None,
) -> tuple[Tensor, MLSTMState]:  # fmt: skip
    """One token over the C of the state passed in, which is float32. Arguments and results as in `ops_mlstm`."""
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    C, n, m = (x.to(torch.float32).contiguous() for x in state)
    rule = _GateRule(input_gate == "sigmoid", gate_soft_cap or 0.0)
    tokens = *(x.to(dtype) for x in (q, k, v)), i_tilde.contiguous(), f_tilde.contiguous()
    return _step(*tokens, MLSTMState(C, n, m), None, eps, rule, over=True)


def mlstm_chunkwise_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i_tilde: Tensor,
    f_tilde: Tensor,
    state: MLSTMState | None,
    *,
    reset: Tensor | None = None,
    chunk_size: int,
    eps: float,
    input_gate: str,
    gate_soft_cap: float | None = None,
) -> tuple[Tensor, MLSTMState]:
    """Any number of tokens. Arguments and results as in `ops_mlstm.mlstm`; can be differentiated once.

    Chunks have the next power of two of `chunk_size` tokens, from 16 to 1024.
    """
    B, T, H, K = q.shape
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    i_tilde, f_tilde = i_tilde.contiguous(), f_tilde.contiguous()
    like = v.new_empty((), dtype=torch.float32)
    if state is None:
        state = MLSTMState.zeros(B, H, K, v.shape[-1], like)
    C, n, m = (x.to(torch.float32).contiguous() for x in state)
    rule = _GateRule(input_gate == "sigmoid", gate_soft_cap or 0.0)
    given = (q, k, v, i_tilde, f_tilde, C, n, m)
    if T == 1 and not (torch.is_grad_enabled() and any(x.requires_grad for x in given)):
        return _step(q, k, v, i_tilde, f_tilde, MLSTMState(C, n, m), reset, eps, rule)
    document = None if reset is None else reset.cumsum(1, dtype=torch.int32)
    h, *after = _MLSTM.apply(*map(_dense, (q, k, v)), *given[3:], document, chunk_size, eps, rule)
    return h, MLSTMState(*after)
