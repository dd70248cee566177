"""The config of a GPT with memory layers ("Memory Layers at Scale", Meta FAIR 2024)."""

from typing import Any

from transformers import PretrainedConfig

FORMAT = 3
"""Of config.json and the names of weights; this code reads folders of formats up to it. Format 2
has quantised or pruned tables, format 3 also UltraMem; a folder without any of them says 1, as
earlier code reads it, too."""

TABLE_DEVICES = ("cuda", "cpu", "disk")
TABLE_DTYPES = (None, "int8", "fp8", "int4")


class MegamemConfig(PretrainedConfig):
    """Describes the model in modeling_megamem.py; every field is in config.json."""

    model_type = "megamem"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    attribute_map = {"num_local_experts": "num_experts"}
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 1024,
        intermediate_size: int = 4096,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        hidden_act: str = "silu",
        gated_mlp: bool = True,
        mlp_bias: bool = False,
        attention_bias: bool = False,
        attention_output_bias: bool = False,
        attention_dropout: float = 0.0,
        normalization: str = "RMSNorm",
        norm_eps: float = 1e-5,
        qk_norm: bool = False,
        position_embedding: str = "rope",
        rope_parameters: dict[str, Any] | None = None,
        max_position_embeddings: int = 4096,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        num_experts: int = 0,
        num_experts_per_tok: int = 2,
        expert_layers: list[int] | None = None,
        moe_intermediate_size: int = 0,
        shared_expert_intermediate_size: int = 0,
        shared_expert_gate: bool = False,
        router_scores: str = "softmax_of_chosen",
        router_bias: bool = False,
        router_scaling: float = 1.0,
        memory_layers: list[int] | None = None,
        memory_variant: str = "memory+",
        memory_num_keys: int = 1024,
        memory_heads: int = 4,
        memory_topk: int = 32,
        memory_key_dim: int = 512,
        memory_value_dim: int = 1024,
        memory_pool: str = "shared",
        memory_qk_norm: bool = False,
        memory_keep_ffn: bool = False,
        memory_final_topk: int = 0,
        memory_tucker_rank: int = 0,
        memory_cores: int = 1,
        memory_expansion: int = 1,
        memory_expansion_proj: str = "single",
        memory_rank_queries: bool = False,
        memory_pre_value_dim: int = 0,
        memory_skip: int = 0,
        memory_share_layers: int = 1,
        memory_placement: str = "seed",
        memory_placement_seed: int = 0,
        memory_table_device: str = "cuda",
        memory_table_dtype: str | None = None,
        memory_table_rows: dict[str, int] | None = None,
        megamem_format: int = FORMAT,
        **kwargs: Any,
    ) -> None:
        """Check the fields.

        Args:
            vocab_size: rows of the embedding, which may be more than the tokenizer has pieces.
            hidden_size: D.
            intermediate_size: width of a dense feed-forward.
            num_hidden_layers: layers, of attention and of a feed-forward or memory each.
            num_attention_heads: heads of queries.
            num_key_value_heads: heads of keys and values; None for as many.
            head_dim: width of an attention head; None for D / num_attention_heads.
            hidden_act: activation of feed-forwards, by its name in transformers.
            gated_mlp: whether feed-forwards are down(act(gate x) * up x), or down(act(up x)).
            mlp_bias: whether linears of feed-forwards have biases.
            attention_bias: whether queries, keys and values have biases.
            attention_output_bias: whether the output of attention has one.
            attention_dropout: for training.
            normalization: RMSNorm or LayerNorm.
            norm_eps: added to the variance by all norms outside memory layers.
            qk_norm: whether queries and keys of each attention head are normalized.
            position_embedding: rope, learned (a vector for each position) or none.
            rope_parameters: rope_type, rope_theta and what else transformers needs for it.
            max_position_embeddings: the longest sequence of training.
            initializer_range: standard deviation of new weights.
            use_cache: whether generation keeps keys and values.
            tie_word_embeddings: whether the output matrix is the embedding.
            num_experts: routed experts of a layer of experts.
            num_experts_per_tok: experts that a token is sent to.
            expert_layers: layers, from 0, whose feed-forward is a mixture of experts.
            moe_intermediate_size: width of a routed expert.
            shared_expert_intermediate_size: width of the shared expert; 0 for none.
            shared_expert_gate: whether the output of the shared expert is gated.
            router_scores: softmax_of_chosen (over the chosen experts), softmax (over all),
                sigmoid or sqrtsoftplus (divided by the sum of those chosen).
            router_bias: whether a bias that balances the experts is added before the choice.
            router_scaling: factor of the routed experts' weights.
            memory_layers: layers, from 0, with a memory.
            memory_variant: memory, memory+, peer, ultramem or ultramem-v2.
            memory_num_keys: N, sub-keys per half; a table has N * N rows, for each of the layers
                that share it.
            memory_heads: H.
            memory_topk: K, rows that a head reads for a token; with UltraMem, sub-keys of a half
                that its first stage keeps.
            memory_key_dim: Q, width of one head's query.
            memory_value_dim: V, width of a row.
            memory_pool: shared for one table, layer for one in each memory layer.
            memory_qk_norm: whether queries and sub-keys of memories are normalized.
            memory_keep_ffn: whether memory layers have their feed-forward, too.
            memory_final_topk: F, rows that a head of UltraMem reads for a token.
            memory_tucker_rank: A, numbers per sub-key of which a core makes a score.
            memory_cores: O, cores, each of which weights its own columns.
            memory_expansion: E, virtual blocks of rows that read the same rows.
            memory_expansion_proj: block if each block is projected by itself, or single.
            memory_rank_queries: whether each Tucker rank has a query of its own.
            memory_pre_value_dim: width of a row of the pre-values of ultramem-v2.
            memory_skip: layers between the one where a memory reads and the one that adds it.
            memory_share_layers: neighbouring memory layers that share tables.
            memory_placement: stored where a permutation of rows is among the weights, or seed.
            memory_placement_seed: of the permutation, where a row has several pairs of sub-keys;
                otherwise the rows are in the order of their pairs.
            memory_table_device: where tables are: cuda for where the model is, a CPU included; cpu
                for host memory, whatever device the model is moved to; disk for their files, from
                which rows are read when they are looked up.
            memory_table_dtype: None for numbers as in other weights, or int8, fp8 (e4m3) or int4
                with a scale for each row.
            memory_table_rows: rows of each table from which rows that were never read in training
                are left out, by names as "shared.v".
            megamem_format: the format of the folder.
            kwargs: fields of every config of transformers.

        Raises:
            ValueError: the folder was written by a newer release, or a field of the tables has an
                unknown value.
        """
        if megamem_format > FORMAT:
            raise ValueError(
                f"config.json has megamem_format {megamem_format}, but this code reads formats up "
                f"to {FORMAT}; use the code that is in the folder (trust_remote_code=True)."
            )
        for name, value, known in (
            ("memory_table_device", memory_table_device, TABLE_DEVICES),
            ("memory_table_dtype", memory_table_dtype, TABLE_DTYPES),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value}; use one of {', '.join(map(str, known))}.")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.hidden_act = hidden_act
        self.gated_mlp = gated_mlp
        self.mlp_bias = mlp_bias
        self.attention_bias = attention_bias
        self.attention_output_bias = attention_output_bias
        self.attention_dropout = attention_dropout
        self.normalization = normalization
        self.norm_eps = norm_eps
        self.qk_norm = qk_norm
        self.position_embedding = position_embedding
        self.rope_parameters = rope_parameters or {"rope_type": "default", "rope_theta": 10000.0}
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.expert_layers = expert_layers or []
        self.moe_intermediate_size = moe_intermediate_size
        self.shared_expert_intermediate_size = shared_expert_intermediate_size
        self.shared_expert_gate = shared_expert_gate
        self.router_scores = router_scores
        self.router_bias = router_bias
        self.router_scaling = router_scaling
        self.memory_layers = memory_layers or []
        self.memory_variant = memory_variant
        self.memory_num_keys = memory_num_keys
        self.memory_heads = memory_heads
        self.memory_topk = memory_topk
        self.memory_key_dim = memory_key_dim
        self.memory_value_dim = memory_value_dim
        self.memory_pool = memory_pool
        self.memory_qk_norm = memory_qk_norm
        self.memory_keep_ffn = memory_keep_ffn
        self.memory_final_topk = memory_final_topk
        self.memory_tucker_rank, self.memory_cores = memory_tucker_rank, memory_cores
        self.memory_expansion, self.memory_expansion_proj = memory_expansion, memory_expansion_proj
        self.memory_rank_queries = memory_rank_queries
        self.memory_pre_value_dim = memory_pre_value_dim
        self.memory_skip = memory_skip
        self.memory_share_layers = memory_share_layers
        self.memory_placement, self.memory_placement_seed = memory_placement, memory_placement_seed
        self.memory_table_device = memory_table_device
        self.memory_table_dtype = memory_table_dtype
        self.memory_table_rows = memory_table_rows or {}
        self.megamem_format = megamem_format
        kwargs["tie_word_embeddings"] = tie_word_embeddings
        super().__init__(**kwargs)

    def table_of(self, layer: int) -> str:
        """Name of the table that a memory layer reads."""
        if self.memory_pool == "shared" or layer not in self.memory_layers:
            return "shared" if self.memory_pool == "shared" else f"layer_{layer}"
        # neighbours share the table of the first of them
        place = self.memory_layers.index(layer)
        return f"layer_{self.memory_layers[place - place % self.memory_share_layers]}"

    def placement_of(self, layer: int) -> int:
        """Seed of the permutation of a memory layer's rows."""
        place = self.memory_layers.index(layer)
        return self.memory_placement_seed + place % self.memory_share_layers

    @property
    def memory_rows(self) -> int:
        """R, the rows of a table."""
        return self.memory_share_layers * self.memory_num_keys**2


__all__ = ["MegamemConfig"]
