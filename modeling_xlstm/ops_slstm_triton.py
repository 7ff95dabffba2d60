"""The sLSTM in Triton kernels: a sequence with exact gradients, or one token."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .ops_common import differentiable_once, dtypes_obstacle, is_small
from .ops_slstm_triton_kernels import (
    _slstm_recurrent_bwd_kernel,
    _slstm_recurrent_bwd_slices_kernel,
    _slstm_recurrent_fwd_kernel,
    _slstm_recurrent_fwd_slices_kernel,
)
from .states_xlstm import SLSTMState

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The Triton kernels need the package `triton`; `backend='auto'` does without it.") from error

LARGEST_P = 512
BB = 16  # rows of a tile
LARGEST_ROWS = 65_535 * BB  # of the tiles on a grid's second axis
HELD_BYTES = 136 * 1024  # of the recurrent weights that a program of several keeps on the chip


def slstm_sizes_obstacle(x: Tensor, recurrent: Tensor, state: SLSTMState | None) -> str:
    """Why the kernels cannot take these tensors; empty if they can."""
    P = x.shape[-1]
    if P % 16 or P > LARGEST_P:
        return f"the head dim must be a multiple of 16 up to P = {LARGEST_P}; got P = {P}"
    if x.shape[0] > LARGEST_ROWS:
        return f"the batch must be {LARGEST_ROWS} rows at most; got {x.shape[0]}"
    return dtypes_obstacle(x, recurrent, *(state or ()))


def is_shared(x: Tensor, R: Tensor) -> bool:
    """Whether several programs share a head; else one holds its recurrent weights and runs the whole sequence."""
    half = x.dtype == R.dtype == torch.bfloat16
    return x.shape[1] == 1 or x.shape[-1] * (1 if half else 2) > (64 if is_small(x.device) else 128)


@functools.cache
def programs_at_once(device: torch.device) -> int:
    """Programs of any size that run at the same time, one on each multiprocessor; 0 where none may wait for another."""
    if device.type != "cuda" or torch.version.hip:
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count


class Together(NamedTuple):
    """Whether programs may wait for each other inside a launch, and for how many looks: -1 for as long as it takes."""

    allowed: bool = True
    patience: int = -1


TOGETHER = Together()


class _Sizes(NamedTuple):
    """Sizes of one call.

    Attributes:
        B, T, H, P: as everywhere.
        whole: whether one program holds a head's recurrent weights and runs the whole sequence.
        stride: tokens of one launch where programs share a head: all if they may wait for each other, else one.
        patience: see `Together`.
        options: what every kernel takes.
    """

    B: int
    T: int
    H: int
    P: int
    whole: bool
    stride: int
    patience: int
    options: dict[str, Any]

    @classmethod
    def of(
        cls, x: Tensor, R: Tensor, marks: tuple[Tensor | None, Tensor | None], sigmoid: bool, together: Together
    ) -> _Sizes:
        """The sizes of a call; nothing that is compiled depends on B or T."""
        B, T, H, P = x.shape
        half = x.dtype == R.dtype == torch.bfloat16
        options: dict[str, Any] = {
            "H": H,
            "P": P,
            "BB": BB,
            "SIGMOID": sigmoid,
            "PADDED": marks[0] is not None,
            "RESET": marks[1] is not None,
            # As in the mLSTM's kernels: float16 products run in TensorFloat-32, which has their digits and more range.
            "DOT": tl.bfloat16 if half else tl.float32,
            "PRECISION": "tf32" if x.dtype == torch.float16 else "ieee" if torch.version.hip else "tf32x3",
        }
        if not is_shared(x, R):
            # One stage: what tokens are read ahead must not take the weights' place.
            options |= {"BP": triton.next_power_of_2(P), "num_stages": 1, "num_warps": 8 if P > 64 or not half else 4}
            return cls(B, T, H, P, True, T, -1, options)
        # Three products instead of one take the digits of float32 apart, and keep both halves.
        size = 2 if half else 8 if options["PRECISION"] == "tf32x3" else 4
        held = _held(P, size, is_small(x.device))
        together = together if held else together._replace(allowed=False)
        at_once = H * triton.cdiv(P, held.get("BU", P)) * triton.cdiv(B, options["BB"])
        if T > 1 and together.allowed and at_once <= programs_at_once(x.device):
            options |= {**held, "HELD": True, "launch_cooperative_grid": True}
            return cls(B, T, H, P, False, T, together.patience, options)
        # The interpreter runs the same code, but one program after the other.
        if T > 1 and together.allowed and x.device.type == "cpu":
            options |= {**held, "HELD": True}
        else:
            options |= {
                "BP": min(triton.next_power_of_2(P), 64),
                "BU": min(triton.next_power_of_2(P), 32),
                "HELD": False,
            }
        return cls(B, T, H, P, False, 1, -1, options)

    def flags(self, like: Tensor) -> Tensor:
        """What programs count tokens in, zero at the start of a launch; one number that none reads if they do not."""
        if not self.options["HELD"]:
            return torch.empty(1, dtype=torch.int32, device=like.device)
        return torch.zeros(self.H * triton.cdiv(self.B, BB), dtype=torch.int32, device=like.device)

    @property
    def grid(self) -> tuple[int, int]:
        """Heads, or blocks of their channels, times tiles of rows."""
        blocks = 1 if self.whole else triton.cdiv(self.P, self.options["BU"])
        return self.H * blocks, triton.cdiv(self.B, self.options["BB"])


def _held(P: int, size: int, small: bool) -> dict[str, Any]:
    """Options of the programs that share a head and keep their slices of its weights, of `size` bytes a number.

    Empty if even the narrowest slices take more than a program may keep.
    """
    BP = 64 if P <= 256 else 128
    budget = HELD_BYTES // (2 if small else 1)
    widths = [BU for BU in (64, 32, 16) if 4 * triton.cdiv(P, BP) * BP * BU * size <= budget]
    return {"BP": BP, "BU": widths[0], "num_stages": 1, "num_warps": 8} if widths else {}


def _forward(
    x: tuple[Tensor, ...], R: Tensor, state: tuple[Tensor, ...], marks: tuple[Tensor, ...], size: _Sizes, save: bool
) -> tuple[Tensor, list[Tensor], tuple[Tensor, ...]]:
    """Run all tokens.

    Args:
        x: the four gates' pre-activations without their recurrent part, each [B, T, H, P].
        R: recurrent weights, [4, H, P, P].
        state: c, n, m, h before the first token, each [B, H, P].
        marks: lengths [B] and resets [B, T], or any tensor where there are none.
        size: sizes of the call.
        save: whether to keep what the backward pass needs.

    Returns:
        h: of every token, [B, T, H, P].
        saved: pre-activations [4, B, T, H, P] and c, n, m, each [B, T, H, P]; empty if not asked for.
        state: c, n, m, h after the last real token.
    """
    h = torch.empty_like(x[0])
    shape = (size.B, size.T, size.H, size.P) if save else (0,)
    saved = [state[0].new_empty(4, *shape), *(state[0].new_empty(shape) for _ in range(3))]
    after = tuple(torch.empty_like(s) for s in state)
    if size.whole:
        _slstm_recurrent_fwd_kernel[size.grid](
            *x, R, *state, *marks, h, *saved, *after, size.B, size.T, SAVE=save, **size.options
        )
        return h, saved, after
    first_h = state[3]
    other = tuple(torch.empty_like(s) for s in state) if size.stride < size.T else after
    for t in range(0, size.T, size.stride):
        # Of h the first state's is read, and then what is in `h`, where weights are held.
        before = (*state[:3], first_h) if size.options["HELD"] else state
        _slstm_recurrent_fwd_slices_kernel[size.grid](
            *x,
            R,
            *before,
            *marks,
            h,
            *saved,
            *after,
            size.flags(h),
            size.B,
            size.T,
            t,
            t + size.stride,
            size.patience,
            SAVE=save,
            **size.options,
        )
        # The state given is never written to: the two new ones take turns.
        state, after = after, other if t == 0 else state
    return h, saved, state


class _SLSTM(torch.autograd.Function):
    """The four gates, R and the first state to h [B, T, H, P] and the state after each row's last real token."""

    @staticmethod
    def forward(
        ctx: Any, x_i: Tensor, x_f: Tensor, x_z: Tensor, x_o: Tensor, R: Tensor, c: Tensor, n: Tensor, m: Tensor,
        h: Tensor, lengths: Tensor | None, reset: Tensor | None, size: _Sizes,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        marks = (c if lengths is None else lengths, c if reset is None else reset)
        h_all, saved, after = _forward((x_i, x_f, x_z, x_o), R, (c, n, m, h), marks, size, True)
        ctx.save_for_backward(R, c, n, m, h, *marks, h_all, *saved, *after[:2])
        ctx.size = size
        ctx.set_materialize_grads(False)
        return h_all, *after

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dh_all: Tensor | None, *d_last: Tensor | None) -> tuple[Tensor | None, ...]:
        R, c, n, m, h, lengths, reset, h_all, gates, c_all, n_all, m_all, c_last, n_last = ctx.saved_tensors
        size, marks = ctx.size, (lengths, reset)
        dh_all = torch.zeros_like(h_all) if dh_all is None else dh_all.contiguous()
        dc, dn, dm, dh = (torch.zeros_like(c) if d is None else d.contiguous() for d in d_last)
        # With c exp(m) and n exp(m) held, the last m also scales the last c and n.
        ends = dc, dn, dm - c_last * dc - n_last * dn, dh
        saved, first = (gates, c_all, n_all, m_all), (c, n, m)
        dgates, (dc, dn, dm, dh) = _backward(dh_all, R, marks, saved, first, ends, size)
        h_before = torch.cat([h[:, None].to(h_all.dtype), h_all[:, :-1]], 1)
        if size.options["RESET"]:
            h_before = h_before.masked_fill(reset[..., None, None], 0.0)
        dtype = torch.promote_types(h_before.dtype, R.dtype)
        dR = torch.einsum("gbtho,bthi->ghoi", dgates.to(dtype), h_before.to(dtype)).to(R.dtype)
        return *dgates.unbind(0), dR, dc, dn, dm + c * dc + n * dn, dh, None, None, None


def _backward(
    dh_all: Tensor, R: Tensor, marks: tuple[Tensor, ...], saved: tuple[Tensor, ...], first: tuple[Tensor, ...],
    ends: tuple[Tensor, ...], size: _Sizes,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """Run the tokens backwards: gradients of the pre-activations, [4, B, T, H, P], and of the state before them."""
    dgates = dh_all.new_empty(4, *dh_all.shape)
    if size.whole:
        d_first = tuple(torch.empty_like(d) for d in ends)
        _slstm_recurrent_bwd_kernel[size.grid](
            dh_all, R, *marks, *saved, *first, *ends, dgates, *d_first, size.B, size.T, **size.options
        )
        return dgates, d_first
    d_first = (*(d.clone() for d in ends[:3]), torch.empty_like(ends[3]))
    # Down to token -1, before the first: there dh alone is wanted.
    launches = [(size.T - 1, size.T + 1)] if size.stride == size.T > 1 else [(t, 1) for t in range(size.T - 1, -2, -1)]
    for newest, count in launches:
        _slstm_recurrent_bwd_slices_kernel[size.grid](
            dh_all, R, *marks, *saved, *first, *d_first[:3], ends[3], dgates, d_first[3], size.flags(dh_all), size.B,
            size.T, newest, count, size.patience, **size.options,
        )  # fmt: skip
    return dgates, d_first


def slstm_recurrent_triton(
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
    together: Together = TOGETHER,
) -> tuple[Tensor, SLSTMState]:
    """All tokens of a sequence. Arguments and results as in `ops_slstm.slstm`; can be differentiated once."""
    B, T, H, P = i_tilde.shape
    dtype = torch.promote_types(
        torch.promote_types(i_tilde.dtype, f_tilde.dtype), torch.promote_types(z_tilde.dtype, o_tilde.dtype)
    )
    x = tuple(g.to(dtype).contiguous() for g in (i_tilde, f_tilde, z_tilde, o_tilde))
    if state is None:
        state = SLSTMState.zeros(B, H, P, like=x[0].new_empty((), dtype=torch.float32))
    first = tuple(s.to(torch.float32).contiguous() for s in state)
    R = recurrent.contiguous()
    lengths = None if lengths is None else lengths.to(x[0].device, torch.int32).clamp(max=T)
    reset = None if reset is None else reset.contiguous()
    size = _Sizes.of(x[0], R, (lengths, reset), input_gate == "sigmoid", together)
    if torch.is_grad_enabled() and any(y.requires_grad for y in (*x, R, *first)):
        h, *after = _SLSTM.apply(*x, R, *first, lengths, reset, size)
    else:
        marks = (first[0] if lengths is None else lengths, first[0] if reset is None else reset)
        h, _, after = _forward(x, R, first, marks, size, False)
    return h, SLSTMState(*after)
