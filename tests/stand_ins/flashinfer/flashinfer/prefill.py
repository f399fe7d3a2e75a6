"""Stand-in for FlashInfer's prefill wrappers: planned on the host, then run; LSEs in base 2."""

import math

import torch
from tests.stand_ins import record
from tests.stand_ins.compute import attend


class _Wrapper:
    def __init__(
        self,
        float_workspace_buffer,
        kv_layout="NHD",
        use_cuda_graph=False,
        backend="auto",
        **buffers,
    ):
        assert kv_layout == "NHD"
        assert float_workspace_buffer.dtype == torch.uint8
        assert float_workspace_buffer.numel() >= 128 << 20
        assert backend in ("auto", "fa2", "fa3")
        made = {"graph": use_cuda_graph, "workspace": float_workspace_buffer, "backend": backend}
        record(f"flashinfer.{type(self).__name__}", made)
        self._graph = use_cuda_graph
        self._buffers = buffers
        self._planned = None

    def _remember(self, **arguments):
        record(f"flashinfer.{type(self).__name__}.plan", arguments)
        for name, value in arguments.items():
            if name.endswith(("indptr", "last_page_len")):
                assert value.device.type == "cpu", "a device tensor would be copied back"
                assert value.dtype == torch.int32
        assert arguments["head_dim_qk"] in (64, 128, 256, 192)
        queries = arguments["qo_indptr"].diff()
        if arguments["uniform_q_len"] is not None:
            assert self._graph
            assert (queries == arguments["uniform_q_len"]).all()
        if self._graph:
            self._fill(arguments)
        self._planned = arguments

    def _fill(self, arguments):
        """What a graph was captured with stays; everything else is copied to where it reads."""
        was = self._planned or arguments
        for name, value in arguments.items():
            if f"{name}_buf" in self._buffers:
                buffer = self._buffers[f"{name}_buf"]
                exact = name != "paged_kv_indices"
                assert len(buffer) == len(value) if exact else len(buffer) >= len(value)
                assert buffer.dtype == value.dtype == torch.int32
                buffer[: len(value)].copy_(value.clone())
                arguments[name] = buffer
            elif not isinstance(value, torch.Tensor):
                assert was[name] == value, f"{name} is captured"

    def _attend(self, q, k, v, out, return_lse, **lengths):
        record(f"flashinfer.{type(self).__name__}.run", {"q": q, "k": k, "v": v, "out": out})
        plan = self._planned
        assert plan is not None, "run before plan"
        assert q.dtype == plan["q_data_type"]
        assert k.dtype == plan["kv_data_type"]
        assert q.shape[0] == int(plan["qo_indptr"][-1])
        assert (q.shape[1], k.shape[-2]) == (plan["num_qo_heads"], plan["num_kv_heads"])
        got, lse = attend(
            "flash_attn_varlen_func",
            q,
            k,
            v,
            cu_seqlens_q=plan["qo_indptr"],
            softmax_scale=plan["sm_scale"],
            causal=plan["causal"],
            window_size=(plan["window_left"], -1),
            softcap=plan["logits_soft_cap"] or 0.0,
            **lengths,
            **({} if out is None else {"out": out}),
        )
        lse = (lse / math.log(2)).masked_fill(lse == float("-inf"), -5e4 + 0.5).T.contiguous()
        return (got, lse) if return_lse else got


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    def __init__(
        self,
        float_workspace_buffer,
        kv_layout="NHD",
        use_cuda_graph=False,
        qo_indptr_buf=None,
        paged_kv_indptr_buf=None,
        paged_kv_indices_buf=None,
        paged_kv_last_page_len_buf=None,
        custom_mask_buf=None,
        mask_indptr_buf=None,
        backend="auto",
    ):
        buffers = {
            "qo_indptr_buf": qo_indptr_buf,
            "paged_kv_indptr_buf": paged_kv_indptr_buf,
            "paged_kv_indices_buf": paged_kv_indices_buf,
            "paged_kv_last_page_len_buf": paged_kv_last_page_len_buf,
        }
        assert all((b is not None) == use_cuda_graph for b in buffers.values())
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph, backend, **buffers)

    def plan(
        self,
        qo_indptr,
        paged_kv_indptr,
        paged_kv_indices,
        paged_kv_last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim_qk,
        page_size,
        head_dim_vo=None,
        custom_mask=None,
        packed_custom_mask=None,
        causal=False,
        pos_encoding_mode="NONE",
        use_fp16_qk_reduction=False,
        sm_scale=None,
        window_left=-1,
        logits_soft_cap=None,
        rope_scale=None,
        rope_theta=None,
        q_data_type="float16",
        kv_data_type=None,
        o_data_type=None,
        non_blocking=True,
        seq_lens=None,
        disable_split_kv=False,
        uniform_q_len=None,
    ):
        arguments = dict(locals())
        del arguments["self"]
        self._remember(**arguments)

    def run(
        self,
        q,
        paged_kv_cache,
        *args,
        q_scale=None,
        k_scale=None,
        v_scale=None,
        out=None,
        lse=None,
        return_lse=False,
        enable_pdl=None,
        window_left=None,
        sinks=None,
    ):
        k, v = paged_kv_cache
        indptr, last = (self._planned[f"paged_kv_{n}"] for n in ("indptr", "last_page_len"))
        counts = indptr[1:] - indptr[:-1]
        size = self._planned["page_size"]
        assert k.shape[1] == v.shape[1] == size
        lengths = torch.where(counts > 0, (counts - 1) * size + last, 0).to(torch.int32)
        assert torch.equal(lengths, self._planned["seq_lens"])
        table = torch.zeros(len(counts), max(1, int(counts.max())), dtype=torch.int32)
        for b, count in enumerate(counts.tolist()):
            table[b, :count] = self._planned["paged_kv_indices"][indptr[b] : indptr[b] + count]
        return self._attend(q, k, v, out, return_lse, page_table=table, seqused_k=lengths)


class BatchPrefillWithRaggedKVCacheWrapper(_Wrapper):
    def plan(
        self,
        qo_indptr,
        kv_indptr,
        num_qo_heads,
        num_kv_heads,
        head_dim_qk,
        head_dim_vo=None,
        custom_mask=None,
        packed_custom_mask=None,
        causal=False,
        pos_encoding_mode="NONE",
        use_fp16_qk_reduction=False,
        window_left=-1,
        logits_soft_cap=None,
        sm_scale=None,
        rope_scale=None,
        rope_theta=None,
        q_data_type="float16",
        kv_data_type=None,
        o_data_type=None,
        non_blocking=True,
        disable_split_kv=False,
        uniform_q_len=None,
    ):
        arguments = dict(locals())
        del arguments["self"]
        self._remember(**arguments)

    def run(
        self,
        q,
        k,
        v,
        *args,
        q_scale=None,
        k_scale=None,
        v_scale=None,
        o_scale=None,
        out=None,
        lse=None,
        return_lse=False,
        enable_pdl=None,
    ):
        return self._attend(q, k, v, out, return_lse, cu_seqlens_k=self._planned["kv_indptr"])
