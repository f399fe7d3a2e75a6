"""Headway in vLLM on a CPU, where ``--attention-backend CUSTOM`` needs a word with the platform.

vLLM's CPU platform answers every choice of a backend with its own kernels. :func:`platform` (entry point
``vllm.platform_plugins``) gives vLLM that platform with one change: a backend of Headway's that was asked
for is the answer. Without the flag, and on every other device, nothing changes.

This module is imported while vLLM finds out where it runs, before most of vLLM can be: keep it small.
"""

from __future__ import annotations

from typing import Any

from vllm.platforms.cpu import CpuPlatform

_PACKAGE = "headway.integrations"


def platform() -> str | None:
    """The platform class for vLLM; None: not a CPU, or one that vLLM has a special platform for."""
    from vllm.platforms import cpu_platform_plugin

    if cpu_platform_plugin() != "vllm.platforms.cpu.CpuPlatform":
        return None
    return f"{__name__}.HeadwayCpuPlatform"


class HeadwayCpuPlatform(CpuPlatform):
    """vLLM's CPU platform, which takes CUSTOM, HEADWAY and HEADWAY_MLA at their word."""

    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        if not _is_ours(selected_backend):
            return super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)
        if attn_selector_config.use_mla:
            return f"{_PACKAGE}.vllm_mla.HeadwayMLABackend"
        return f"{_PACKAGE}.vllm.HeadwayBackend"

    @classmethod
    def get_mla_prefill_backend_cls(cls, mla_selector_config: Any) -> Any:
        from vllm.config import get_current_vllm_config

        if not _is_ours(get_current_vllm_config().attention_config.backend):
            return super().get_mla_prefill_backend_cls(mla_selector_config)
        from headway.integrations.vllm_mla import HeadwayMLAPrefill

        return HeadwayMLAPrefill


def _is_ours(backend: Any) -> bool:
    return backend is not None and str(backend.get_path()).startswith(f"{_PACKAGE}.")
