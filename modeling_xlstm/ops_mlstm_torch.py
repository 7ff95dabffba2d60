"""The mLSTM over a sequence in PyTorch, chunkwise, and for one token.

The gates are small ([B, T, H]): autograd differentiates them, stabiliser and all, so the gradients are exact for every
gate, reset and epsilon. The products are large: `ops_mlstm_chunks` differentiates those by hand.

Letters: N chunks of J blocks of L tokens. Gates are [B, H, N, J L]. `a` is a token's log input gate relative to the
decay b up to it, `M` the stabiliser relative to b.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops_common import log_gates
from .ops_mlstm_chunks import Chunks
from .ops_mlstm_weights import HIGHEST, Gates, are_near
from .states_xlstm import MLSTMState, compute_dtype


def _prepare_gates(
    log_i: Tensor, log_f: Tensor, m: Tensor, document: Tensor | None, sigmoid_gate: bool, dtype: torch.dtype
) -> tuple[Gates, Tensor]:
    """Turn log gates [B, H, N, J L] and the first stabiliser [B, H] into `Gates` of a dtype and the last stabiliser.

    The log gates come wider than that dtype: sums over a chunk take digits that differences between neighbours need.
    `document` counts the resets since the start of each chunk, [B, 1, N, J L]; tokens of the same one see each other.
    """
    b = log_f.cumsum(-1)
    a = log_i - b
    if document is None:
        highest, decay, reaches_end = a.cummax(-1).values, b[..., -1], None
    else:
        reached = (document == 0).expand_as(b).to(b.dtype)  # 1 where the state before the chunk reaches the token
        is_reset = F.pad(document, (1, 0)).diff(dim=-1) > 0
        # b just before the first token of the token's document; b never rises.
        base = F.pad(b, (1, -1)).masked_fill(~is_reset, 0.0).cummin(-1).values
        highest, decay = a.gather(-1, _of_highest(a, document)), b[..., -1] - base[..., -1]
        reaches_end = reached[..., -1]
    before, m = _stabilisers(m, highest[..., -1] + b[..., -1], decay, reaches_end, sigmoid_gate)
    start = weight = before[..., None]  # the weight of what was before the document is relative to b
    if document is not None:
        start = start * reached
        weight = start - base
    M = start - b if sigmoid_gate else torch.maximum(highest, weight)
    # The last M weighs the state after the chunk and is exact; a stabiliser of a token alone may be rounded.
    last = M[..., -1:]
    a, M = a - last, (M - last).to(dtype)
    m_t, carry = b + last + M, weight - last - M
    if document is not None:
        carry = carry.masked_fill(reached == 0, -torch.inf)
    rounded = a.to(dtype)
    rest = (a - rounded).detach().nan_to_num(nan=0.0)  # of what is -inf
    return Gates(rounded, M, carry.to(dtype), _log_floor(m_t.to(dtype)), rest.to(dtype)), m


def _widened(x: Tensor) -> Tensor:
    """x in float64, as far as there is: Apple's GPUs have no more than float32."""
    return x if x.device.type == "mps" else x.double()


@torch.no_grad()
def _of_highest(a: Tensor, document: Tensor) -> Tensor:
    """Where a [..., J L] was highest so far in the document of each token."""
    lowest = a.masked_fill(a == -torch.inf, torch.inf).amin(-1, keepdim=True)
    span = (a.amax(-1, keepdim=True) - lowest).clamp(min=0.0, max=1e30)
    # Each document lies above all of the one before.
    return (a.clamp(min=lowest - 1) + (span + 2) * document).cummax(-1).indices


def _log_floor(m: Tensor) -> Tensor:
    """-m, bounded: exp of a very high one would be infinite, and the gradient of x / infinity 0 * infinity."""
    return (-m).clamp(max=HIGHEST[m.dtype])


def _stabilisers(
    m: Tensor, own: Tensor, decay: Tensor, reaches_end: Tensor | None, sigmoid_gate: bool
) -> tuple[Tensor, Tensor]:
    """The stabilisers before each chunk, [B, H, N], and after the last: m = max(own, m + decay) from chunk to chunk.

    `own` is the highest log weight of a chunk's own tokens at its end, `decay` the log weight of what was before it.
    `reaches_end` is 0 where a document that began in the chunk cut that off, so that m starts from 0 there, else 1.
    """
    if sigmoid_gate:
        kept = m[..., None] * (torch.ones_like(own) if reaches_end is None else reaches_end).cumprod(-1)
        return torch.cat([m[..., None], kept[..., :-1]], -1), kept[..., -1].clone()  # of returned views FSDP2 warns
    if reaches_end is None:
        total = F.pad(decay.cumsum(-1), (1, 0))
        kept = torch.cat([m[..., None], own - total[..., 1:]], -1).cummax(-1).values + total
        return kept[..., :-1], kept[..., -1].clone()
    before = []
    for own_c, decay_c, reaches_c in zip(own.unbind(-1), decay.unbind(-1), reaches_end.unbind(-1), strict=True):
        before.append(m)
        m = torch.maximum(own_c, m * reaches_c + decay_c)
    return torch.stack(before, -1), m


@torch.no_grad()
def _least(log_i: Tensor, log_f: Tensor, m: Tensor) -> Tensor:
    """Log forget gates [B, 1, H] that leave nothing of any state that wide log gates [B, T, H] can make.

    Lower ones would only take digits from sums over a chunk, all of them at -inf.
    """
    highest = torch.maximum(log_i.amax(1), m) + log_f.clamp(min=0).sum(1)
    return -(1e5 + highest.clamp(min=0)).nan_to_num(nan=0.0)[:, None]


def _whole_chunks(x: Tensor, missing: int, fill: float = 0.0) -> Tensor:
    """[B, T, ...] -> [B, T + missing, ...]."""
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing), value=fill) if missing else x


def _cut(T: int, longest: int, block: int) -> tuple[int, int, int]:
    """Cut T tokens into chunks of blocks of tokens, as equal as can be, so that the last is nearly full: N, J, L."""
    N = math.ceil(T / longest)
    J = math.ceil(math.ceil(T / N) / block)
    return N, J, math.ceil(T / (N * J))


def _gates_of_chunks(
    gates: tuple[Tensor, Tensor],
    m: Tensor,
    reset: Tensor | None,
    cut: tuple[int, int, int],
    sigmoid_gate: bool,
    dtype: torch.dtype,
) -> tuple[Gates, Tensor, Tensor | None]:
    """Wide log gates [B, T, H] -> `Gates`, the last stabiliser and documents by chunk, [B, N, J, L]."""
    (N, J, L), document = cut, None
    missing = N * J * L - gates[0].shape[1]
    log_i, log_f = gates
    if reset is not None:
        if sigmoid_gate:  # at a reset nothing is left to forget, and the stabiliser stays
            log_f = log_f.masked_fill(reset[..., None], 0.0)
        document = _whole_chunks(reset.long(), missing).unflatten(1, (N, J * L)).cumsum(-1)
    padded = (_whole_chunks(x, missing, fill) for x, fill in ((log_i, -torch.inf), (log_f, 0.0)))
    log_i, log_f = (x.transpose(1, 2).unflatten(-1, (N, J * L)).contiguous() for x in padded)
    by_token = None if document is None else document[:, None]
    made, m = _prepare_gates(log_i, log_f, m, by_token, sigmoid_gate, dtype)
    return made, m.to(dtype), None if document is None else document.unflatten(-1, (J, L))


@torch.compiler.disable  # a compiler would unroll the loop over chunks, for minutes
def mlstm_chunkwise_torch(
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
) -> tuple[Tensor, MLSTMState]:
    """All heads together, chunk by chunk. Arguments and results as in `ops_mlstm.mlstm`; can be differentiated once.

    Where every chunk is near (see `ops_mlstm_chunks`), chunks are four blocks of `chunk_size` tokens, and else twice
    `chunk_size`: what suits a GPU is half of what suits a CPU, whose calls cost more beside the products.
    """
    (B, T, H, K), V = q.shape, v.shape[-1]
    dtype = compute_dtype(v, state)
    i_tilde, f_tilde = (_widened(x.to(dtype)) for x in (i_tilde, f_tilde))
    C, n, m = (None, None, i_tilde.new_zeros(B, H)) if state is None else (x.to(dtype) for x in state)
    (log_i, log_f), m, sigmoid_gate = log_gates(i_tilde, f_tilde, input_gate), _widened(m), input_gate == "sigmoid"
    gates = log_i, log_f.clamp(min=_least(log_i, log_f, m))
    block = chunk_size
    # Of wide heads the states between short chunks would take more memory and time than the scores in longer ones.
    while 16 * block**2 < K * V:
        block *= 2
    short, long = _cut(T, 2 * block, 2 * block), _cut(T, max(4 * chunk_size, 2 * block), block)
    cut, made = long, _gates_of_chunks(gates, m, reset, long, sigmoid_gate, dtype)
    if long[1] > 1 and not all(are_near(made[0].M)):
        cut, made = short, _gates_of_chunks(gates, m, reset, short, sigmoid_gate, dtype)
    by_chunk, m, document = made
    h, C, n = Chunks.apply(q, k, v, torch.stack(by_chunk).unflatten(-1, cut[1:]), C, n, document, eps)
    return h, MLSTMState(C, n, m)


def mlstm_step_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i_tilde: Tensor,
    f_tilde: Tensor,
    state: MLSTMState | None,
    *,
    reset: Tensor | None = None,
    eps: float,
    input_gate: str,
) -> tuple[Tensor, MLSTMState]:
    """One token in few operations, C read and written once. Arguments and results as in `ops_mlstm.mlstm`."""
    B, _, H, K = q.shape
    V, rows = v.shape[-1], B * H
    dtype = compute_dtype(v, state)
    state = MLSTMState.zeros(B, H, K, V, like=v) if state is None else state
    given = (q, k, v, i_tilde, f_tilde, *state)
    q, k, v, i_tilde, f_tilde, C, n, m = (x if x.dtype is dtype else x.to(dtype) for x in given)
    if reset is not None:
        C, n, m = (x * ~reset.view(B, *(1,) * (x.dim() - 1)) for x in (C, n, m))
    # One row per head: views, for every operation costs more than the numbers it works on.
    m = m.reshape(rows, 1, 1)
    log_i, log_f = log_gates(i_tilde.reshape(rows, 1, 1), f_tilde.reshape(rows, 1, 1), input_gate)
    log_f = log_f + m
    m_next = m if input_gate == "sigmoid" else torch.maximum(log_f, log_i)
    f_prime, i_prime = (log_f - m_next).exp_(), (log_i - m_next).exp_()
    kw = k.reshape(rows, K, 1) * i_prime
    C = (C.reshape(rows, K, V) * f_prime).addcmul_(kw, v.reshape(rows, 1, V), value=K**-0.5)
    n = (n.reshape(rows, K, 1) * f_prime).add_(kw, alpha=K**-0.5)
    q = q.reshape(rows, 1, K)
    normaliser = torch.maximum(torch.bmm(q, n).abs_(), _log_floor(m_next).exp_()).add_(eps)
    h = torch.bmm(q, C).div_(normaliser)
    return h.view(B, 1, H, V), MLSTMState(C.view(B, H, K, V), n.view(B, H, K), m_next.view(B, H))
