"""Headway in transformers 5.16 to 5.23: ``enable()``, then ``attn_implementation="headway"``.

    from headway.integrations.transformers import enable

    enable()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="headway")
    model.generate(...)         # also generate_batch(...), which batches continuously

``transformers serve`` has no place for plugins, so the same command is reached through this module:
``python -m headway.integrations.transformers serve --attn-implementation headway ...``.

One name is what transformers needs for ``generate``. Its continuous batching decides by the spelling of a
name whether it speaks of a flash implementation (contains "flash") that can append in place (then a 2 or
3), so while it runs, models carry :data:`PAGED_NAME`. The few functions of transformers that hold lists of
their own are wrapped; what they do for other names stays as it is.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.generation.continuous_batching import continuous_api, initialization
from transformers.utils.import_utils import is_tracing

from headway import gradients, interface
from headway.compat import flash_attn_interface
from headway.errors import UnsupportedError

#: The attention implementation that users name.
NAME = "headway"

#: The same while transformers batches continuously. Its spelling says what transformers asks of a name.
PAGED_NAME = "headway_flash_attention_3"

#: Before 5.19 such names had a prefix, and the function behind them updated the cache another way.
_SPELLS_PAGED = hasattr(flash_utils, "lazy_import_paged_flash_attention")
_PREFIX = "paged|"

_OLDEST = (5, 16)


def enable() -> None:
    """Make ``attn_implementation="headway"`` known to transformers in this process. May be repeated.

    Raises:
        UnsupportedError: transformers is older than 5.16.
    """
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version < _OLDEST:
        raise UnsupportedError(f"transformers {transformers.__version__}: 5.16 or newer is needed")
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)
    for name in (PAGED_NAME, _PREFIX + PAGED_NAME):
        AttentionInterface.register(name, paged_attention_forward)
    manager = continuous_api.ContinuousBatchingManager
    _wrap(flash_utils, "_lazy_imports", _lazy_imports)
    _wrap(manager, "switch_to_cb_friendly_attn", _switch_to_paged)
    _wrap(transformers.PreTrainedModel, "_check_and_adjust_attn_implementation", _check_and_adjust)
    _wrap(initialization, "ensure_decode_fast_path_is_available", _ensure_decode_fast_path)
    try:
        from transformers.cli.serving.model_manager import ModelManager
    except ImportError:  # what `transformers serve` needs is not installed
        return
    _wrap(ModelManager, "_validate_args", _validate_args)


# --- the attention function ---------------------------------------------------------------------------


@torch.compiler.disable
def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' models call it.

    Args:
        query: (B, Hq, Sq, D); key: (B, Hkv, Sk, D); value: (B, Hkv, Sk, Dv).
        attention_mask: None; what :func:`attention_mask` returned; or four dimensions that broadcast to
            (B, Hq, Sq, Sk), boolean or to be added to the scores.
        sliding_window: keys that a query sees, itself among them.
        position_bias: (1 or B, 1 or Hq, Sq, Sk), added to the scores.
        kwargs: ``cu_seq_lens_q`` .. ``max_length_k`` say where sequences in one row begin.

    Returns:
        (B, Sq, Hq, Dv) and None, since attention weights never exist.

    Raises:
        UnsupportedError: dropout, gradients, attention weights, or an argument that Headway has not got.
    """
    _refuse(module, dropout, kwargs)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    call: dict[str, Any] = {
        "softmax_scale": scaling,
        "causal": bool(causal),
        "softcap": softcap or 0.0,
        "sinks": s_aux,
        "window_size": _window(sliding_window, bool(causal)),
    }
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    with torch.no_grad():
        if kwargs.get("cu_seq_lens_q") is not None:
            if attention_mask is not None or position_bias is not None:
                raise UnsupportedError("cu_seq_lens_q beside a mask or bias: give one of them")
            out = _ragged(q, k, v, call, kwargs)
        elif attention_mask is not None and _is_spans(attention_mask):
            out = _attend_spans(q, k, v, call, attention_mask[:, 0, :, 0], position_bias)
        else:
            call.update(_mods(attention_mask, position_bias, q, k))
            attended = interface.flash_attn_func(q, k, v, **call)
            assert isinstance(attended, Tensor)
            out = attended
    if gradients.required(query, key, value):
        instead = 'train with attn_implementation="sdpa"'
        return gradients.refused(out, query, key, value, instead=instead), None
    return out, None


def _refuse(module: nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    name = type(module).__name__
    advice = f'set attn_implementation="eager" for {name}'
    if dropout and module.training:
        raise UnsupportedError(f"dropout={dropout}: Headway is for inference; call model.eval()")
    if kwargs.get("output_attentions"):
        raise UnsupportedError(f"output_attentions: attention weights never exist; {advice}")
    for argument in ("indices", "block_indices", "sinks"):
        if kwargs.get(argument) is not None:
            raise UnsupportedError(f"{name} passes {argument}, which has no counterpart; {advice}")


def _window(sliding_window: int | None, causal: bool) -> tuple[int, int]:
    """transformers counts the token itself in the window."""
    if sliding_window is None:
        return -1, -1
    return sliding_window - 1, 0 if causal else sliding_window - 1


def _ragged(
    q: Tensor, k: Tensor, v: Tensor, call: dict[str, Any], kwargs: dict[str, Any]
) -> Tensor:
    """Rows that hold several sequences, (B, S, H, D) with B * S tokens altogether."""
    out = interface.flash_attn_varlen_func(
        q.reshape(-1, *q.shape[2:]),
        k.reshape(-1, *k.shape[2:]),
        v.reshape(-1, *v.shape[2:]),
        kwargs["cu_seq_lens_q"].to(torch.int32),
        kwargs["cu_seq_lens_k"].to(torch.int32),
        _as_int(kwargs.get("max_length_q")),
        _as_int(kwargs.get("max_length_k")),
        **call,
    )
    assert isinstance(out, Tensor)
    return out.view(*q.shape[:-1], v.shape[-1])


def _as_int(length: Any) -> int | None:
    return None if length is None else int(length)


def _is_spans(mask: Tensor) -> bool:
    """Whether it is :func:`attention_mask`'s own kind, int32 (B, 1, 2, 1); others have four dimensions."""
    if mask.dim() == 4:
        return mask.dtype is torch.int32 and mask.shape[1:] == (1, 2, 1)
    raise UnsupportedError(
        f"a mask of shape {tuple(mask.shape)} and {mask.dtype} reached attention: models make theirs with "
        "transformers.masking_utils"
    )


def _attend_spans(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: dict[str, Any],
    spans: Tensor,
    position_bias: Tensor | None,
) -> Tensor:
    """Sequences of different lengths in a rectangle: rows [spans[b, 0], spans[b, 1]) of its keys count."""
    first, end = spans[:, 0].contiguous(), spans[:, 1].contiguous()
    if position_bias is not None:
        # Positions count from a span's first key; rows and columns of the bias do not.
        places = torch.stack([end - first - q.shape[1], -first])
        aux = [places, _over_scores(position_bias, q, k)]
        call = {**call, "aux_tensors": aux, "score_mod": _biased_in_spans}
    out = interface.flash_attn_with_kvcache(
        q, k, v, cache_seqlens=end, cache_leftpad=first, max_seqlen_k=k.shape[1], **call
    )
    assert isinstance(out, Tensor)
    return out


def _mods(mask: Tensor | None, bias: Tensor | None, q: Tensor, k: Tensor) -> dict[str, Any]:
    """A mask of four dimensions says all there is to say of visibility; biases are added to scores."""
    if mask is not None and mask.is_floating_point():
        bias = mask if bias is None else mask + bias
        mask = None
        visible: dict[str, Any] = {"causal": False, "window_size": (-1, -1)}
    elif mask is not None:
        visible = {"causal": False, "window_size": (-1, -1), "mask_mod": _visible}
    else:
        visible = {}
    if mask is None and bias is None:
        return visible
    # Positions count from the first key; rows of the tensors from the first query.
    offset = torch.full((), k.shape[1] - q.shape[1], dtype=torch.int32, device=q.device)
    tensors = [offset, *(_over_scores(x, q, k) for x in (mask, bias) if x is not None)]
    return {**visible, "aux_tensors": tensors, **({} if bias is None else {"score_mod": _biased})}


def _over_scores(x: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """What says something of every score, as (B, Hq, Sq, Sk)."""
    return x[..., : k.shape[1]].expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])


def _visible(b: Any, h: Any, q_idx: Any, kv_idx: Any, aux: tuple[Any, ...]) -> Any:
    return aux[1][b, h, q_idx - aux[0], kv_idx]


def _biased(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any, aux: tuple[Any, ...]) -> Any:
    return score + aux[-1][b, h, q_idx - aux[0], kv_idx]


def _biased_in_spans(
    score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any, aux: tuple[Any, ...]
) -> Any:
    return score + aux[1][b, h, q_idx - aux[0][0, b], kv_idx - aux[0][1, b]]


# --- the mask function --------------------------------------------------------------------------------


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,  # an int; a tensor with static caches
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """What a step's layers need to know of its mask beyond what each says itself.

    Returns:
        None where causality and the layers' windows say everything; int32 (B, 1, 2, 1), the first key of
        each sequence and the one behind its last, where there is padding around them; else the mask itself,
        boolean (B, 1, q_length, kv_length). All have four dimensions: generate() makes the masks of static
        caches ahead of the model, which takes what has four for finished and would read two as padding.
    """
    causal_plain = allow_is_causal_skip and not _is_chunked(
        config, local_size, kv_length + kv_offset
    )
    plain = causal_plain or (allow_is_bidirectional_skip and local_size is None)
    padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        padding = padding[:, kv_offset : kv_offset + kv_length].bool()
    tracing = isinstance(q_offset, Tensor) or (padding is not None and is_tracing(padding))
    at_the_end = not tracing and q_offset + q_length == kv_offset + kv_length
    if plain and not tracing and (at_the_end or not allow_is_causal_skip):
        if padding is None:
            return None
        full, spanned, spans = _as_spans(padding, may_end=not allow_is_causal_skip)
        if full:
            return None
        if spanned:
            return spans
    return masking_utils.sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        **kwargs,
    )


def _is_chunked(config: Any, local_size: int | None, positions: int) -> bool:
    """Whether the mask is of chunks, and more than one: layers do not say so themselves."""
    return local_size is not None and (
        local_size == getattr(config, "attention_chunk_size", None) and positions > local_size
    )


def _as_spans(padding: Tensor, may_end: bool) -> tuple[bool, bool, Tensor]:
    """Whether all of ``padding`` (B, Sk) is true; whether each row is one run of it; and the runs.

    Runs end with the row unless ``may_end``. One synchronisation, as transformers' own mask functions
    for flash attention have it.
    """
    keys = padding.shape[1]
    first = padding.to(torch.int32).argmax(1, keepdim=True)
    end = first + padding.sum(1, keepdim=True)
    places = torch.arange(keys, device=padding.device)
    one_run = (padding == ((places >= first) & (places < end))).all()
    to_the_end = (end == keys).all()
    answers = torch.stack([padding.all(), one_run, to_the_end]).tolist()
    spans = torch.stack([first, end], 1).int()
    return answers[0], answers[1] and (may_end or answers[2]), spans[:, None]


# --- continuous batching ------------------------------------------------------------------------------


@torch.compiler.disable
def paged_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over transformers' paged cache: query (1, Hq, T, D), tokens of all sequences in one row.

    Steps in which every sequence has one token append to the cache's pages in place and attend to them
    where they lie. Others have the cache gather the keys, as it does for every implementation.

    Returns:
        (1, T, Hq, Dv) and None.
    """
    if cache is None:
        raise UnsupportedError(f'{PAGED_NAME} is for continuous batching: name "{NAME}" elsewhere')
    _refuse(module, dropout, kwargs)
    if attention_mask is not None or kwargs.get("position_bias") is not None:
        raise UnsupportedError(f"{type(module).__name__}: no mask or bias in continuous batching")
    call: dict[str, Any] = {
        "softmax_scale": scaling,
        "causal": True,
        "softcap": softcap or 0.0,
        "sinks": s_aux,
        "window_size": _window(sliding_window, causal=True),
    }
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    run = _append_in_place if kwargs.get("block_table") is not None else _gathered
    with torch.no_grad():
        out = run(module, q, k, v, cache, call, kwargs)
    return out.unsqueeze(0), None


def _append_in_place(
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: Any,
    call: dict[str, Any],
    kwargs: dict[str, Any],
) -> Tensor:
    if _SPELLS_PAGED:
        pages = _pages_before_5_19(module, cache, kwargs)
    else:
        # Updates nothing but kwargs, where the kernel does the writing.
        cache.update(k, v, layer_idx=module.layer_idx, kwargs=kwargs)
        pages = (
            kwargs["k_cache"],
            kwargs["v_cache"],
            kwargs["block_table"],
            kwargs["cu_seq_lens_k"],
        )
    k_cache, v_cache, page_table, cu_seqlens_k = pages
    # Rows that pad a batch to a captured size have no token, and -1 keys before it.
    lengths = (cu_seqlens_k[1:] - cu_seqlens_k[:-1] - 1).clamp_(min=0).to(torch.int32)
    new = kwargs["cu_seq_lens_q"].to(torch.int32)
    out = interface.flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        cache_seqlens=lengths,
        page_table=page_table,
        cu_seqlens_q=new,
        cu_seqlens_k_new=new,
        max_seqlen_q=1,
        **call,
    )
    assert isinstance(out, Tensor)
    return out


def _pages_before_5_19(module: Any, cache: Any, kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    if hasattr(cache, "get_cache_for_block_table"):  # 5.18
        group, keys, values = cache.get_cache_for_block_table(module.layer_idx)
    else:
        group, place = cache.layer_index_to_group_indices[module.layer_idx]
        shape = (-1, cache.block_size, cache.num_key_value_heads, cache.head_dim)
        keys, values = cache.key_cache[place].view(shape), cache.value_cache[place].view(shape)
    cu_seqlens_k, _ = _of_layer(module, kwargs)
    return keys, values, kwargs["block_table"][group], cu_seqlens_k


def _of_layer(module: Any, kwargs: dict[str, Any]) -> tuple[Tensor, int]:
    """cu_seqlens_k and max_seqlen_k of a layer's type, before 5.19."""
    cu_seqlens_k, longest = kwargs["cu_seq_lens_k"], kwargs["max_seqlen_k"]
    if isinstance(cu_seqlens_k, dict):
        slides = getattr(module, "sliding_window", None)
        kind = "sliding_attention" if slides else "full_attention"
        return cu_seqlens_k[kind], longest[kind]
    return cu_seqlens_k, longest


def _gathered(
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: Any,
    call: dict[str, Any],
    kwargs: dict[str, Any],
) -> Tensor:
    layer = module.layer_idx
    k, v = (x.transpose(0, 1).unsqueeze(0) for x in (k, v))
    if _SPELLS_PAGED:
        indices = {name: kwargs[name] for name in ("read_index", "write_index")}
        k, v = cache.update(k, v, layer_idx=layer, **indices)
        cu_seqlens_k, longest_k = _of_layer(module, kwargs)
        longest_q = kwargs["max_seqlen_q"]
    else:
        k, v = (x[0].transpose(0, 1) for x in cache.update(k, v, layer_idx=layer, kwargs=kwargs))
        cu_seqlens_k, longest_k = kwargs["cu_seq_lens_k"], kwargs["max_length_k"]
        longest_q = kwargs["max_length_q"]
    out = interface.flash_attn_varlen_func(
        q,
        k,
        v,
        kwargs["cu_seq_lens_q"].to(torch.int32),
        cu_seqlens_k.to(torch.int32),
        longest_q,
        longest_k,
        **call,
    )
    assert isinstance(out, Tensor)
    return out


# --- where transformers keeps lists of names -------------------------------------------------------------


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace a function by ``wrapper`` with the original as its first argument; once."""
    original = getattr(owner, name)
    if getattr(original, "__headway__", False):
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    wrapped.__headway__ = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)


def _is_paged(name: str | None) -> bool:
    return name is not None and name.removeprefix(_PREFIX) == PAGED_NAME


def _lazy_imports(
    original: Callable[..., Any], implementation: Any, *args: Any, **kwargs: Any
) -> Any:
    """The flash functions behind a name, for those who call them without an attention function."""
    if implementation != NAME and not _is_paged(implementation):
        return original(implementation, *args, **kwargs)
    return (
        flash_attn_interface.flash_attn_func,
        flash_attn_interface.flash_attn_varlen_func,
        flash_attn_interface.flash_attn_with_kvcache,
        flash_utils._pad_input,
        flash_utils._unpad_input,
    )


def _switch_to_paged(
    original: Callable[..., None], manager: Any, model: Any, *args: Any, **kwargs: Any
) -> None:
    if model.config._attn_implementation != NAME:
        original(manager, model, *args, **kwargs)
        return
    model.set_attn_implementation((_PREFIX if _SPELLS_PAGED else "") + PAGED_NAME)
    manager._original_attn_impl = NAME  # what the manager restores when it stops


def _check_and_adjust(
    original: Callable[..., str], model: Any, implementation: str | None, *args: Any, **kwargs: Any
) -> str:
    """Models list the flash implementations that have sinks, where they need them: this one does.

    Those that compute attention themselves would take this one's masks for theirs. What makes no masks (a
    tower of convolutions, say) may be named along with the rest of its model.
    """
    if implementation is not None and _is_paged(implementation):
        return implementation
    if implementation == NAME and _misreads_masks(type(model)):
        raise UnsupportedError(
            f"{type(model).__name__} computes attention itself and asks no implementation for it: "
            'attn_implementation="eager", for a part of a model {"that_config": "eager"}'
        )
    return original(model, implementation, *args, **kwargs)


def _misreads_masks(model: type) -> bool:
    """Whether a model has masks of attention made for it, yet computes that itself, as its code shows."""
    flags = ("_supports_sdpa", "_supports_flash_attn", "_supports_attention_backend")
    if any(getattr(model, flag, False) for flag in flags):
        return False
    base = transformers.PreTrainedModel
    own = (kind for kind in model.__mro__ if issubclass(kind, base) and kind is not base)
    names = {name for kind in own for name in vars(sys.modules[kind.__module__])}
    made = (name for name in vars(masking_utils) if name.startswith("create_"))
    makers = {name for name in made if name.endswith(("causal_mask", "bidirectional_mask"))}
    return not names.isdisjoint(makers) and "ALL_ATTENTION_FUNCTIONS" not in names


def _ensure_decode_fast_path(
    original: Callable[..., None], config: Any, batching: Any, *args: Any, **kwargs: Any
) -> None:
    """Appending in place works on every device, not on CUDA alone; the rest is the original's to say."""
    if not _is_paged(config._attn_implementation):
        original(config, batching, *args, **kwargs)
        return
    kinds = getattr(initialization, "group_layers_by_attn_type", None)
    if kinds is None or batching.max_blocks_per_request == 0:
        return
    allocators = initialization.ATTN_TYPE_TO_ALLOCATOR
    if not all(allocators[kind].supports_block_table for kind in kinds(config)):
        batching.max_blocks_per_request = 0


def _validate_args(original: Callable[..., None], manager: Any) -> None:
    name = manager.attn_implementation
    if name != NAME:
        original(manager)
        return
    manager.attn_implementation = None
    try:
        original(manager)
    finally:
        manager.attn_implementation = name


def main() -> None:
    """The ``transformers`` command, in a process where Headway is enabled."""
    from transformers.cli.transformers import main as command

    enable()
    sys.argv[0] = "transformers"
    command()


if __name__ == "__main__":
    main()
