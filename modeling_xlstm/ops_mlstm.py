"""The door to the mLSTM cell: checks shapes, chooses a worker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .ops_common import (
    bind_shapes,
    check_gates,
    choose_backend,
    disagreement,
    mark_tokens,
    on_device,
    self_check,
    without_autocast,
)
from .ops_lean import soft_cap
from .ops_mlstm_reference import mlstm_chunkwise, mlstm_recurrent
from .ops_mlstm_torch import mlstm_chunkwise_torch, mlstm_step_torch
from .states_xlstm import MLSTMState


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i_tilde: Tensor,
    f_tilde: Tensor,
    state: MLSTMState | None = None,
    *,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    chunk_size: int = 64,
    eps: float = 1e-6,
    input_gate: str = "exp",
    gate_soft_cap: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, MLSTMState]:
    """Run the mLSTM cell over T tokens (xLSTM paper, mLSTM forward pass, stabilised).

    Args:
        q: queries, [B, T, H, K].
        k: keys, [B, T, H, K]; scaled by K**-0.5 here, so pass them unscaled.
        v: values, [B, T, H, V].
        i_tilde: input-gate pre-activation, [B, T, H]; natural log of the gate if `input_gate` is 'exp', else its logit.
        f_tilde: forget-gate pre-activation, [B, T, H]; logit of the gate, or its log if `input_gate` is 'exp_both'.
        state: state before the first token; None starts from zeros.
        lengths: number of real tokens of each row, [B]; the tokens after them, any finite numbers, write nothing and
            forget nothing.
        reset: True at the first token of a new document, [B, T]; the state returns to zeros before that token.
        chunk_size: tokens per chunk, of a block of longer chunks in 'torch'; never changes the result.
        eps: added to the normaliser, dimensionless; 1e-6 in the published checkpoints.
        input_gate: 'exp' (paper), 'sigmoid' (bounded by 1; the stabiliser then stays at its start) or 'exp_both', where
            the forget gate is exponential too.
        gate_soft_cap: bounds both pre-activations smoothly first, x -> cap * tanh(x / cap); None leaves them.
        backend: 'auto', 'triton', 'torch' or 'reference'; see docs/kernels.md.

    Returns:
        h: cell output, [B, T, H, V], in the dtype of `v`; zero after the real tokens of a row.
        state: state after the last real token, float32 or wider; the one passed in is not modified.

    Raises:
        ValueError: shapes, devices or kinds of numbers disagree, T is 0, `lengths` are not from 0 to T,
            `chunk_size` is below 1, `gate_soft_cap` is not above 0, the backend or gate is unknown, a `reset` meets
            'exp_both', or the backend asked for cannot run on these tensors.
    """
    size = _bind(q, k, v, i_tilde, f_tilde, state)
    padded, reset = mark_tokens(size["T"], size["B"], lengths, reset, q.device)
    if chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1; got {chunk_size}.")
    check_gates(input_gate, gate_soft_cap)
    if reset is not None and input_gate == "exp_both":
        raise ValueError(
            "`reset` needs a forget gate of at most 1; got input_gate='exp_both'. Run documents one by one."
        )
    variant = "" if input_gate != "exp_both" else "no kernel has input_gate='exp_both'"
    chosen = choose_backend(backend, q, lambda: variant or _triton_obstacle(q, k, v, state))
    if size["B"] == 0:
        chosen = "reference"  # no row has no chunks
    if gate_soft_cap is not None and (chosen != "triton" or padded is not None):
        # Padding stands above every cap; without it the kernels do this themselves.
        wide = torch.promote_types(i_tilde.dtype, torch.float32)
        i_tilde, f_tilde = (soft_cap(x.to(wide), gate_soft_cap) for x in (i_tilde, f_tilde))
        gate_soft_cap = None
    if padded is not None:
        # A padded token writes nothing and forgets nothing, so padding cannot reach the state.
        i_tilde = i_tilde.masked_fill(padded[..., None], -torch.inf)
        f_tilde = f_tilde.masked_fill(padded[..., None], 0.0 if input_gate == "exp_both" else torch.inf)
    options: dict[str, Any] = {"reset": reset, "eps": eps, "input_gate": input_gate}
    with without_autocast(q.device), on_device(q.device):
        if size["T"] == 1 and chosen != "triton":
            step = mlstm_step_torch if chosen == "torch" else mlstm_recurrent
            h, state = step(q, k, v, i_tilde, f_tilde, state, **options)
        else:
            options |= {"gate_soft_cap": gate_soft_cap} if chosen == "triton" else {}
            h, state = _worker(chosen)(q, k, v, i_tilde, f_tilde, state, chunk_size=chunk_size, **options)
    h = h.to(v.dtype)
    return h if padded is None else h.masked_fill(padded[..., None, None], 0.0), state


def mlstm_step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i_tilde: Tensor,
    f_tilde: Tensor,
    state: MLSTMState,
    *,
    eps: float,
    input_gate: str,
    gate_soft_cap: float | None,
    backend: str,
) -> tuple[Tensor, MLSTMState]:
    """As `mlstm` for one real token, T = 1, that continues a document, but the state passed in may be written over.

    Only the state returned counts; its C is the one passed in where the kernels run, which then read and write it once.
    """
    size = _bind(q, k, v, i_tilde, f_tilde, state)
    options: dict[str, Any] = {"eps": eps, "input_gate": input_gate, "gate_soft_cap": gate_soft_cap}
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, i_tilde, f_tilde, *state))
    kernels = size["T"] == 1 and input_gate != "exp_both" and not needs_grad
    if kernels and choose_backend(backend, q, lambda: _triton_obstacle(q, k, v, state)) == "triton":
        check_gates(input_gate, gate_soft_cap)
        from .ops_mlstm_triton import mlstm_step_triton_

        with without_autocast(q.device), on_device(q.device):
            h, state = mlstm_step_triton_(q, k, v, i_tilde, f_tilde, state, **options)
        return h.to(v.dtype), state
    return mlstm(q, k, v, i_tilde, f_tilde, state, backend=backend, **options)


def _bind(
    q: Tensor, k: Tensor, v: Tensor, i_tilde: Tensor, f_tilde: Tensor, state: MLSTMState | None
) -> dict[str, int]:
    """Check every shape and return the size of each letter."""
    given = MLSTMState(None, None, None) if state is None else state  # type: ignore[arg-type]
    return bind_shapes(
        q=(q, "B T H K"),
        k=(k, "B T H K"),
        v=(v, "B T H V"),
        i_tilde=(i_tilde, "B T H"),
        f_tilde=(f_tilde, "B T H"),
        C=(given.C, "B H K V"),
        n=(given.n, "B H K"),
        m=(given.m, "B H"),
    )


def _worker(name: str) -> Callable[..., tuple[Tensor, MLSTMState]]:
    if name == "triton":
        # Here, because Triton may be absent and takes a second to import.
        from .ops_mlstm_triton import mlstm_chunkwise_triton

        return mlstm_chunkwise_triton
    return {"torch": mlstm_chunkwise_torch, "reference": mlstm_chunkwise}[name]


def _triton_obstacle(q: Tensor, k: Tensor, v: Tensor, state: MLSTMState | None) -> str:
    """What keeps Triton's kernels from this call; empty if nothing does."""
    from .ops_mlstm_triton import mlstm_sizes_obstacle

    return mlstm_sizes_obstacle(q, k, v, state) or self_check(_compare, v.device, v.dtype)


def _compare(device: torch.device, dtype: torch.dtype) -> str:
    """How the kernels disagree with the reference, for a sequence and for one token; empty if they agree."""
    random = torch.Generator().manual_seed(0)
    B, T, H, K, V = 1, 75, 2, 64, 64
    tokens = [torch.randn(B, T, H, size, generator=random, device="cpu") for size in (K, K, V, 1, 1)]
    state = [torch.randn(B, H, *size, generator=random, device="cpu") for size in ((K, V), (K,), ())]

    def run(worker: str, q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        gates = i.squeeze(-1), f.squeeze(-1) + 2.0
        options: dict[str, Any] = {"chunk_size": 32, "eps": 1e-6, "input_gate": "exp"}
        if worker == "triton":
            options["gate_soft_cap"] = 4.0
        else:
            gates = soft_cap(gates[0], 4.0), soft_cap(gates[1], 4.0)
        h, after = _worker(worker)(q, k, v, *gates, MLSTMState(*state), **options)
        return h, *after

    sequence, token = [*tokens, *state], [*(x[:, :1] for x in tokens), *state]
    for inputs, differentiate in ((sequence, True), (token, False)):
        given = [x.to(dtype) for x in inputs]
        if what := disagreement(run, given, device, differentiate, "Triton kernels of the mLSTM"):
            return what
    return ""
