"""A GPT with memory layers ("Memory Layers at Scale", Meta FAIR 2024) for transformers.

It is in plain torch and needs neither Megatron nor megamem. Where megamem is installed and the
table is on a GPU, rows are read by its kernel.

Tensor names in the memory end in one letter per axis:

    T tokens            D hidden size           H heads of the memory   K rows read by a head
    Q = 2C query width  C sub-key width         N sub-keys per half     P pairs of ranks
    V row width         R = N * N rows          L = H * K rows read for a token
    U different rows of a batch

and for UltraMem (Huang et al. 2024), where N is the number of its virtual sub-keys per half

    A Tucker rank       O cores                 F rows read by a head   L = H * F rows
    Y sums (virtual blocks) of a token
"""

import dataclasses
import json
import math
import mmap
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import cached_file, can_return_tuple

from .configuration_megamem import MegamemConfig

# transformers asks for every package that is imported, but for those between try and except
try:  # noqa: SIM105
    from megamem.ops import embedding_bag as megamem_embedding_bag
except ImportError:
    megamem_embedding_bag = None  # type: ignore[assignment]

# what transformers calls the keys and values of earlier tokens; releases before 5.2x say the latter
CACHE = "cache"
if CACHE not in {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}:
    CACHE = "past_key_values"
PRE_VALUES = "p"
# numbers of rows that are held at a time where rows are not summed as they are read
NUMBERS_AT_ONCE = 2**26
# how quantised numbers are held; two of int4 are in a byte
QUANTISED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.uint8}
# safetensors' names of the dtypes of tables
STORED = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}


def norm(config: MegamemConfig, width: int) -> nn.Module:
    """The norm of the model."""
    kind = MegamemRMSNorm if config.normalization == "RMSNorm" else nn.LayerNorm
    return kind(width, eps=config.norm_eps)


class MegamemRMSNorm(nn.Module):
    """weight * x / rms(x) over the last axis, computed in fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), x.shape[-1:], self.weight.to(wide), self.eps).to(x.dtype)


class MegamemTableFile:
    """The tensors of a table in the files of a model, memory-mapped when they are first read."""

    def __init__(self, config: MegamemConfig, ending: str) -> None:
        """Remember where to look.

        Args:
            config: of a model that is being loaded from a folder or from the hub.
            ending: of the table's name, as "tables.shared.v".

        Raises:
            ValueError: the model is not loaded from anywhere.
        """
        self.source = config.name_or_path or ""
        self.revision = getattr(config, "_commit_hash", None)
        self.ending = ending
        self.found: dict[str, Tensor] = {}
        if not self.source:
            raise ValueError(
                'memory_table_device="disk" needs a model that is loaded with from_pretrained; use '
                "cuda or cpu for a new one."
            )

    def __getstate__(self) -> dict[str, Any]:
        """A copy maps the file itself."""
        return self.__dict__ | {"found": {}}

    def __getitem__(self, kind: str) -> Tensor:
        """The tensor "weight", "scale" or "row_of", which is read-only."""
        if kind not in self.found:
            self.found[kind] = self._mapped(f"{self.ending}.{kind}")
        return self.found[kind]

    def _mapped(self, ending: str) -> Tensor:
        for path in self._files(ending):
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            for name, entry in header.items():
                if f".{name}".endswith(f".{ending}"):
                    # the pages beside a row are of other rows, so they need not be read with it
                    if hasattr(mmap, "MADV_RANDOM"):
                        content.madvise(mmap.MADV_RANDOM)
                    dtype, offset = STORED[entry["dtype"]], 8 + length + entry["data_offsets"][0]
                    count = math.prod(entry["shape"])
                    with warnings.catch_warnings(), torch.device("cpu"):
                        # torch warns that the buffer must not be written to
                        warnings.simplefilter("ignore", UserWarning)
                        flat = torch.frombuffer(content, dtype=dtype, count=count, offset=offset)
                    return flat.view(entry["shape"])
        raise ValueError(f"no file of {self.source} has {ending}; copy or download it again.")

    def _files(self, ending: str) -> list[str]:
        index = self._path("model.safetensors.index.json")
        if index is None:
            names = {"model.safetensors"}
        else:
            with open(index) as file:
                places = json.load(file)["weight_map"]
            names = {place for name, place in places.items() if f".{name}".endswith(f".{ending}")}
        return [path for name in names if (path := self._path(name)) is not None]

    def _path(self, name: str) -> str | None:
        found: str | None = cached_file(
            self.source,
            name,
            revision=self.revision,
            _raise_exceptions_for_missing_entries=False,
        )
        return found


class MegamemTable(nn.Module):
    """The rows of a table. Row i * N + j is the value of the pair of sub-keys (i, j).

    A table that is not where the model is, is quantised, or lacks rows, is read in one way: the
    different rows of a batch are taken from it, copied at once, and made numbers where they are
    used. The weights of a quantised table are not trained.
    """

    def __init__(self, config: MegamemConfig, name: str) -> None:
        """Make an empty table, or find it on disk.

        Args:
            config: of the model.
            name: of the table, as "shared.v".
        """
        super().__init__()
        self.place, self.kind = config.memory_table_device, config.memory_table_dtype
        self.dtype = torch.get_default_dtype()
        self.num_pairs, width = config.memory_rows, config.memory_value_dim
        if name.endswith(f".{PRE_VALUES}"):
            width = config.memory_pre_value_dim
        rows = config.memory_table_rows.get(name)
        self.pruned = rows is not None
        self.file: MegamemTableFile | None = None
        if self.place == "disk":
            self.file = MegamemTableFile(config, f"tables.{name}")
            return
        rows = self.num_pairs if rows is None else rows
        if self.kind is None:
            self.weight = nn.Parameter(torch.empty(rows, width))
        else:
            width = width // 2 if self.kind == "int4" else width
            self.register_buffer("weight", torch.empty(rows, width, dtype=QUANTISED[self.kind]))
            self.register_buffer("scale", torch.empty(rows, 1, dtype=torch.float32))
        if self.pruned:
            self.register_buffer("row_of", torch.empty(self.num_pairs, dtype=torch.int32))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Move what may be moved: not a table in host memory, and no number of a quantised one."""
        wanted = fn(torch.empty(0, dtype=self.dtype, device="cpu"))
        self.dtype = wanted.dtype

        def moved(x: Tensor) -> Tensor:
            if self.whole or x.is_meta:
                return fn(x)
            rounded = self.kind is None and x.is_floating_point()
            device = x.device if self.place == "cpu" else wanted.device
            return x.to(device, self.dtype if rounded else x.dtype)

        return super()._apply(moved, recurse)

    def forward(self, row_ids_TL: Tensor, weights_TL: Tensor) -> Tensor:
        """The weighted sum of the rows of each token, [T, V], where the weights are."""
        home = weights_TL.device
        rows_RV: Tensor
        if self.whole:
            rows_RV = self.weight
            row_ids_TL, weights_TL = row_ids_TL.to(rows_RV.device), weights_TL.to(rows_RV.device)
        else:
            rows_RV, row_ids_TL = self._different_rows(row_ids_TL)
        if megamem_embedding_bag is not None and rows_RV.is_cuda:
            ends = torch.arange(len(row_ids_TL) + 1, device=rows_RV.device) * row_ids_TL.shape[1]
            out_TV = megamem_embedding_bag(
                rows_RV, row_ids_TL.flatten(), weights_TL.flatten(), ends
            )
        else:
            weights_TL = weights_TL.to(rows_RV.dtype)
            out_TV = F.embedding_bag(row_ids_TL, rows_RV, per_sample_weights=weights_TL, mode="sum")
        return out_TV.to(home)

    def rows(self, row_ids_TL: Tensor) -> Tensor:
        """The rows themselves, [T, L, V], where the ids are."""
        if not self.whole:
            rows_UV, places_TL = self._different_rows(row_ids_TL)
            return F.embedding(places_TL, rows_UV)
        found = F.embedding(row_ids_TL.to(self.weight.device), self.weight)
        return found.to(row_ids_TL.device)

    @property
    def whole(self) -> bool:
        """Whether rows can be summed where the table is."""
        return self.place == "cuda" and self.kind is None and not self.pruned

    def _different_rows(self, row_ids_TL: Tensor) -> tuple[Tensor, Tensor]:
        """The different rows among some, [U, V], and which of them each is; where the ids are.

        Rows that the table lacks are zeros.
        """
        home = row_ids_TL.device
        rows_U, places_TL = row_ids_TL.unique(return_inverse=True)
        lacks = None
        if self.pruned:
            row_of_R = self._tensor("row_of")
            rows_U = row_of_R.index_select(0, rows_U.to(row_of_R.device))
            lacks, rows_U = (rows_U < 0).to(home)[:, None], rows_U.clamp(min=0)
        found_UV = self._taken("weight", rows_U, home)
        if self.kind is None:
            found_UV = found_UV.to(self.dtype)
        else:
            found_UV = unpacked(found_UV, self.kind) * self._taken("scale", rows_U, home)
        return found_UV if lacks is None else found_UV.masked_fill(lacks, 0), places_TL

    def _taken(self, kind: str, rows_U: Tensor, home: torch.device) -> Tensor:
        stored = self._tensor(kind)
        # torch selects rows of bytes on every device, and not those of fp8
        eight = stored.dtype == torch.float8_e4m3fn
        numbers = stored.view(torch.uint8) if eight else stored
        found = numbers.index_select(0, rows_U.to(stored.device))
        if home.type == "cuda" and not found.is_cuda:
            found = found.pin_memory()
        found = found.to(home, non_blocking=True)
        return found.view(stored.dtype) if eight else found

    def _tensor(self, kind: str) -> Tensor:
        found: Tensor = getattr(self, kind) if self.file is None else self.file[kind]
        return found


def unpacked(stored_UV: Tensor, kind: str) -> Tensor:
    """The whole numbers, or those of fp8, of quantised rows in fp32, [U, V]."""
    if kind == "int4":
        # columns 2 i and 2 i + 1 are the lower and the upper half of byte i, plus 8
        halves = torch.stack((stored_UV & 15, stored_UV >> 4), dim=-1)
        return halves.flatten(-2).float() - 8
    return stored_UV.float()


class MegamemMemory(nn.Module):
    """A memory layer: queries, product-key top-k (Lample et al. 2019), read-out, output."""

    def __init__(self, config: MegamemConfig) -> None:
        super().__init__()
        self.variant, self.topk = config.memory_variant, config.memory_topk
        self.heads, self.num_keys = config.memory_heads, config.memory_num_keys
        # of sorted halves, the pair of ranks (a, b), from 1, is behind a * b - 1 others
        self.pairs = [(a, b) for a in range(self.topk) for b in range(self.topk // (a + 1))]
        hidden, width = config.hidden_size, config.memory_value_dim
        query, half = config.memory_key_dim, config.memory_key_dim // 2
        self.query = nn.Linear(hidden, self.heads * query)
        self.sub_keys = nn.Parameter(torch.empty(2, self.heads, self.num_keys, half))
        self.query_norm = MegamemRMSNorm(query, eps=1e-6) if config.memory_qk_norm else None
        self.key_norm = MegamemRMSNorm(half, eps=1e-6) if config.memory_qk_norm else None
        gated = self.variant == "memory+"
        self.gate = nn.Linear(hidden, width) if gated else None
        self.proj = nn.Linear(width, hidden) if gated else None

    def forward(self, hidden_states: Tensor, tables: dict[str, nn.Module]) -> Tensor:
        """The memory's output for each token, in the shape of the hidden states.

        Args:
            hidden_states: [..., D] after the norm.
            tables: v, and u for the variant peer.
        """
        x_TD = hidden_states.flatten(0, -2)
        row_ids_TL, weights_TL = self.look_up(x_TD)
        if self.variant == "peer":
            y_TD = self._experts(x_TD, row_ids_TL, weights_TL, tables)
        else:
            y_TD = tables["v"](row_ids_TL, weights_TL).to(x_TD.dtype)
        if self.gate is not None and self.proj is not None:
            # Memory+ ("Memory Layers at Scale", section 3.1)
            y_TD = self.proj(y_TD * F.silu(self.gate(x_TD)))
        return y_TD.view_as(hidden_states)

    def look_up(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """The rows that each token reads, and their weights in fp32; those of a head sum to one."""
        query_THQ = self.query(x_TD).unflatten(-1, (self.heads, -1))
        sub_keys_2HNC = self.sub_keys
        if self.query_norm is not None and self.key_norm is not None:
            query_THQ, sub_keys_2HNC = self.query_norm(query_THQ), self.key_norm(sub_keys_2HNC)
        wide = torch.promote_types(query_THQ.dtype, torch.float32)
        queries = query_THQ.to(wide).chunk(2, dim=-1)
        # the best K pairs are among the pairs of the best K of either half
        (left_THK, i_THK), (right_THK, j_THK) = (
            torch.einsum("thc,hnc->thn", query, keys.to(wide)).topk(self.topk, dim=-1)
            for query, keys in zip(queries, sub_keys_2HNC, strict=True)
        )
        a_P, b_P = torch.tensor(self.pairs, device=x_TD.device).unbind(1)
        sums_THP = left_THK[..., a_P] + right_THK[..., b_P]
        rows_THP = i_THK[..., a_P] * self.num_keys + j_THK[..., b_P]
        scores_THK, best_THK = sums_THP.topk(self.topk, dim=-1)
        return rows_THP.gather(-1, best_THK).flatten(1), scores_THK.softmax(-1).flatten(1)

    def _experts(
        self, x_TD: Tensor, row_ids_TL: Tensor, weights_TL: Tensor, tables: dict[str, Any]
    ) -> Tensor:
        """The sum of weight * gelu(u . x) * v over the rows of each token (PEER, He 2024)."""
        step = max(1, NUMBERS_AT_ONCE // (row_ids_TL.shape[1] * x_TD.shape[1]))
        factors = []
        for x, rows in zip(x_TD.split(step), row_ids_TL.split(step), strict=True):
            u_TLD = tables["u"].rows(rows).to(weights_TL.dtype)
            factors.append(F.gelu(torch.einsum("tld,td->tl", u_TLD, x.to(weights_TL.dtype))))
        return tables["v"](row_ids_TL, weights_TL * torch.cat(factors)).to(x_TD.dtype)


class MegamemUltraMem(nn.Module):
    """A memory layer of UltraMem or UltraMemV2: Tucker scores, virtual blocks, read-out, output.

    The first stage keeps sub-keys by `directions`, the first singular vectors of each head's core.
    Those of a checkpoint may be of the step before, and say which sign is to be taken.
    """

    directions: Tensor

    def __init__(self, config: MegamemConfig, layer: int) -> None:
        super().__init__()
        self.heads, self.ranks = config.memory_heads, config.memory_tucker_rank
        self.topk, self.final_topk = config.memory_topk, config.memory_final_topk
        self.num_rows, expansion = config.memory_rows, config.memory_expansion
        self.num_keys = math.isqrt(expansion * self.num_rows)
        self.blocks = expansion if config.memory_expansion_proj == "block" else 1
        # where every row has one pair, the tables are in the order of the pairs
        self.seed = config.placement_of(layer) if expansion * config.memory_share_layers > 1 else -1
        hidden, width, half = (
            config.hidden_size,
            config.memory_value_dim,
            config.memory_key_dim // 2,
        )
        self.query_ranks = self.ranks if config.memory_rank_queries else 1
        self.query = nn.Linear(hidden, 2 * self.query_ranks * half, bias=False)
        self.query_norm = MegamemRMSNorm(half, eps=1e-5)
        self.key_norm = MegamemRMSNorm(half, eps=1e-5)
        shape = (2, self.heads, self.num_keys, self.ranks, half)
        self.sub_keys = nn.Parameter(torch.empty(shape))
        square = (config.memory_cores, self.heads, self.ranks, self.ranks)
        self.cores = nn.Parameter(torch.empty(square))
        directions = torch.zeros(2, self.heads, self.ranks, dtype=torch.float32)
        self.register_buffer("directions", directions)
        self.register_buffer("permutation", None)
        if config.memory_placement == "stored":
            dtype = torch.int32 if self.num_keys**2 < 2**31 else torch.int64
            self.permutation = torch.empty(self.num_keys**2, dtype=dtype)
        pre = config.memory_pre_value_dim
        self.pre = nn.Linear(hidden, pre, bias=False) if pre else None
        self.proj = nn.Linear(self.blocks * width, hidden, bias=False)

    def forward(self, hidden_states: Tensor, tables: dict[str, Any]) -> Tensor:
        """The memory's output for each token, in the shape of the hidden states.

        Args:
            hidden_states: [..., D] after the norm.
            tables: v, and p for the variant ultramem-v2.
        """
        x_TD = hidden_states.flatten(0, -2)
        ids_TL, weights_TLO = self.look_up(x_TD)
        placed_TL = self.placed(ids_TL)
        blocks_TL, rows_TL = placed_TL // self.num_rows % self.blocks, placed_TL % self.num_rows
        token_TP = None if self.pre is None else self.pre(x_TD).to(weights_TLO.dtype)
        step = max(1, NUMBERS_AT_ONCE // (rows_TL.shape[1] * x_TD.shape[1]))
        sums = []
        for start in range(0, len(x_TD), step):
            here = slice(start, start + step)
            weights = weights_TLO[here]
            if token_TP is not None:
                pre_TLP = tables[PRE_VALUES].rows(rows_TL[here]).to(weights.dtype)
                weights = weights * torch.einsum("tlp,tp->tl", pre_TLP, token_TP[here])[..., None]
            values_TLV = tables["v"].rows(rows_TL[here]).to(weights.dtype)
            weighted = values_TLV.unflatten(-1, (weights.shape[-1], -1)) * weights[..., None]
            shares_TLY = F.one_hot(blocks_TL[here].long(), self.blocks).to(weights.dtype)
            sums.append(torch.einsum("tlv,tly->tyv", weighted.flatten(-2), shares_TLY).flatten(1))
        return self.proj(torch.cat(sums).to(x_TD.dtype)).view_as(hidden_states)

    def look_up(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """The pairs of sub-keys that each token reads, and the score of each core, in fp32."""
        query_T2AC = self.query(x_TD).unflatten(-1, (2, self.query_ranks, -1))
        query_T2AC, keys_2HNAC = self.query_norm(query_T2AC), self.key_norm(self.sub_keys)
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        query_T2AC = query_T2AC.to(wide).expand(-1, -1, self.ranks, -1)
        scores_2THNA = torch.einsum("tzac,zhnac->zthna", query_T2AC, keys_2HNAC.to(wide))
        cores_OHAA = self.cores.to(wide)
        with torch.no_grad():
            sides_2THN = torch.einsum("zthna,zha->zthn", scores_2THNA, self.leading().to(wide))
            kept_2THK = sides_2THN.topk(self.topk, dim=-1).indices.sort(dim=-1).values
        of_ranks = kept_2THK[..., None].expand(*kept_2THK.shape, self.ranks)
        row_THKA, column_THKA = scores_2THNA.gather(3, of_ranks)
        left_THKA = torch.einsum("thia,hab->thib", row_THKA, cores_OHAA.sum(0))
        pairs_THP = torch.einsum("thib,thjb->thij", left_THKA, column_THKA).flatten(-2)
        best_THF = pairs_THP.topk(self.final_topk, dim=-1).indices
        i_THF, j_THF = best_THF // self.topk, best_THF % self.topk
        row_THFA, column_THFA = (
            side.gather(2, place[..., None].expand(*place.shape, self.ranks))
            for side, place in ((row_THKA, i_THF), (column_THKA, j_THF))
        )
        left_OTHFA = torch.einsum("thfa,ohab->othfb", row_THFA, cores_OHAA)
        weights_THFO = torch.einsum("othfb,thfb->thfo", left_OTHFA, column_THFA)
        ids_THF = kept_2THK[0].gather(-1, i_THF) * self.num_keys + kept_2THK[1].gather(-1, j_THF)
        return ids_THF.flatten(1), weights_THFO.flatten(1, 2)

    def leading(self) -> Tensor:
        """The first singular vectors (u, t) of the core of each head, [2, H, A] in fp64."""
        core_HAA = self.cores.detach().double().sum(0)
        u_HAA, _, t_HAA = torch.linalg.svd(core_HAA)
        found_2HA = torch.stack((u_HAA[..., 0], t_HAA[:, 0]))
        before_2HA = self.directions.double()
        # both signs are singular vectors: the nearer one, and at first that of a positive sum
        nearer_H = (found_2HA + before_2HA).abs().sum((0, 2)) - (found_2HA - before_2HA).abs().sum(
            (0, 2)
        )
        first_H = (before_2HA == 0).all(2).all(0)
        sign_H = torch.where(first_H, found_2HA.sum((0, 2)), nearer_H)
        return torch.where((sign_H < 0)[:, None], -found_2HA, found_2HA)

    def placed(self, ids_TL: Tensor) -> Tensor:
        """Block * R + row for each pair of sub-keys."""
        if self.permutation is not None:
            return self.permutation[ids_TL].long()
        return ids_TL if self.seed < 0 else place_rows(ids_TL, self.num_keys, self.seed)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Move or convert as any module, but leave the directions in fp32."""
        before = self.directions
        super()._apply(fn, recurse)
        if self.directions.dtype != before.dtype:
            self.directions = before.to(self.directions.device)
        return self


MASK = 0xFFFFFFFF
GOLDEN, MIX_A, MIX_B = 0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35


def place_rows(ids: Tensor, num_keys: int, seed: int) -> Tensor:
    """The row of each pair i * N + j: a Feistel network on (i, j) with addition mod N."""
    i, j = ids // num_keys, ids % num_keys
    for number in range(4):
        key: Any = mixed((seed * 4 + number + 1) * GOLDEN & MASK)
        if number % 2 == 0:
            i = (i + mixed((j * GOLDEN + key) & MASK)) % num_keys
        else:
            j = (j + mixed((i * GOLDEN + key) & MASK)) % num_keys
    return i * num_keys + j


def mixed(x: Any) -> Any:
    """A hash of 32 bits, of a number or a tensor."""
    x = ((x ^ (x >> 16)) * MIX_A) & MASK
    x = ((x ^ (x >> 13)) * MIX_B) & MASK
    return x ^ (x >> 16)


class MegamemMLP(nn.Module):
    """A dense feed-forward."""

    def __init__(self, config: MegamemConfig, width: int) -> None:
        super().__init__()
        hidden, bias = config.hidden_size, config.mlp_bias
        self.gate_proj = nn.Linear(hidden, width, bias=bias) if config.gated_mlp else None
        self.up_proj = nn.Linear(hidden, width, bias=bias)
        self.down_proj = nn.Linear(width, hidden, bias=bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        return self.down_proj(
            self.act_fn(up) if self.gate_proj is None else self.act_fn(self.gate_proj(x)) * up
        )


class MegamemRouter(nn.Module):
    """Chooses the experts of each token."""

    def __init__(self, config: MegamemConfig) -> None:
        super().__init__()
        self.scores, self.scaling = config.router_scores, config.router_scaling
        self.count = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(config.num_experts)) if config.router_bias else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The experts of each token and their weights, [tokens, experts of a token]."""
        logits = F.linear(x, self.weight).float()
        if self.scores == "softmax_of_chosen":
            chosen, experts = logits.topk(self.count, dim=-1)
            weights = chosen.softmax(dim=-1)
        elif self.scores == "softmax":
            weights, experts = logits.softmax(dim=-1).topk(self.count, dim=-1)
        else:
            sigmoid = self.scores == "sigmoid"
            scores = logits.sigmoid() if sigmoid else F.softplus(logits).sqrt()
            wanted = scores if self.bias is None else scores + self.bias.float()
            experts = wanted.topk(self.count, dim=-1).indices
            weights = scores.gather(-1, experts)
            if self.count > 1:
                weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return experts, (weights * self.scaling).to(x.dtype)


class MegamemExperts(nn.Module):
    """The weights of all routed experts of a layer."""

    def __init__(self, config: MegamemConfig) -> None:
        super().__init__()
        count, hidden, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gated = config.gated_mlp
        self.act_fn = ACT2FN[config.hidden_act]
        # gate above up, where there is a gate
        self.gate_up_proj = nn.Parameter(torch.empty(count, (1 + self.gated) * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(count, hidden, width))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of the outputs of each token's experts.

        Serving engines put kernels of their own in the place of this module, by these names.
        """
        out = torch.zeros_like(hidden_states)
        for number in top_k_index.unique().tolist():
            tokens, places = (top_k_index == number).nonzero(as_tuple=True)
            up = F.linear(hidden_states[tokens], self.gate_up_proj[number])
            if self.gated:
                gate, up = up.chunk(2, dim=-1)
                up = self.act_fn(gate) * up
            else:
                up = self.act_fn(up)
            found = F.linear(up, self.down_proj[number]) * top_k_weights[tokens, places, None]
            out.index_add_(0, tokens, found.to(out.dtype))
        return out


class MegamemMoE(nn.Module):
    """A mixture of experts, with a shared expert where the model has one."""

    def __init__(self, config: MegamemConfig) -> None:
        super().__init__()
        self.gate = MegamemRouter(config)
        self.experts = MegamemExperts(config)
        shared = config.shared_expert_intermediate_size
        self.shared_expert = MegamemMLP(config, shared) if shared else None
        gated = bool(shared) and config.shared_expert_gate
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        out = self.experts(tokens, *self.gate(tokens))
        if self.shared_expert is not None:
            shared = self.shared_expert(tokens)
            if self.shared_expert_gate is not None:
                shared = shared * self.shared_expert_gate(tokens).sigmoid()
            out = out + shared
        return out.view_as(x)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first dimensions of each head, as many as cos has, by its position's angles."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1)


def frequencies(config: MegamemConfig, device: torch.device) -> Tensor:
    """The angle by which each pair of dimensions turns from one position to the next.

    Raises:
        ValueError: the config has another kind of rotary embedding.
    """
    said = config.rope_parameters
    width = int(config.head_dim * said.get("partial_rotary_factor", 1.0))
    steps = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    turns = 1.0 / said["rope_theta"] ** steps
    kind = said.get("rope_type", "default")
    if kind == "default":
        return turns
    if kind == "linear":
        return turns / said["factor"]
    if kind != "llama3":
        raise ValueError(f"rope_type {kind} is not one of default, linear and llama3.")
    # Llama 3.1: long waves are slowed down, short ones are not, those between are in part
    low, high = said["low_freq_factor"], said["high_freq_factor"]
    rounds = said["original_max_position_embeddings"] * turns / (2 * math.pi)
    share = ((rounds - low) / (high - low)).clamp(0, 1)
    return turns * share + turns / said["factor"] * (1 - share)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention of [batch, heads, tokens, width]: the output, tokens before heads, and weights."""
    groups: Any = module.groups
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[-2]]
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class MegamemAttention(nn.Module):
    """Grouped-query attention with a rotary embedding."""

    def __init__(self, config: MegamemConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim, self.is_causal = config.head_dim, True
        self.groups = config.num_attention_heads // config.num_key_value_heads
        # by this name transformers' own attention functions repeat keys and values
        self.num_key_value_groups = self.groups
        self.scaling = self.head_dim**-0.5
        hidden, bias = config.hidden_size, config.attention_bias
        queries = config.num_attention_heads * self.head_dim
        keys = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(hidden, queries, bias=bias)
        self.k_proj = nn.Linear(hidden, keys, bias=bias)
        self.v_proj = nn.Linear(hidden, keys, bias=bias)
        self.o_proj = nn.Linear(queries, hidden, bias=config.attention_output_bias)
        self.q_norm = norm(config, self.head_dim) if config.qk_norm else None
        self.k_norm = norm(config, self.head_dim) if config.qk_norm else None

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None,
        attention_mask: Tensor | None,
        kept: Cache | None,
        attentions: list[Tensor | None] | None,
        **kwargs: Any,
    ) -> Tensor:
        """The output; the attention weights, where the implementation gives them, are appended."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(shape)
        key = self.k_proj(hidden_states).view(shape)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        if position_embeddings is not None:
            query, key = rotate(query, *position_embeddings), rotate(key, *position_embeddings)
        if kept is not None:
            key, value = kept.update(key, value, self.layer_idx)
        implementation = self.config._attn_implementation
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
        dropout = self.config.attention_dropout if self.training else 0.0
        out, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=self.scaling,
            **kwargs,
        )
        if attentions is not None:
            attentions.append(weights)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1))


class MegamemDecoderLayer(GradientCheckpointingLayer):
    """Attention, then a feed-forward, a mixture of experts, a memory, or a memory beside one."""

    def __init__(self, config: MegamemConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = norm(config, config.hidden_size)
        self.self_attn = MegamemAttention(config, layer_idx)
        self.post_attention_layernorm = norm(config, config.hidden_size)
        remembers = layer_idx in config.memory_layers
        self.memory: nn.Module | None = None
        if remembers:
            tucker = config.memory_tucker_rank > 0
            self.memory = MegamemUltraMem(config, layer_idx) if tucker else MegamemMemory(config)
        self.table = config.table_of(layer_idx)
        self.layer_idx, self.skip = layer_idx, config.memory_skip
        self.mlp: nn.Module | None = None
        if not remembers or config.memory_keep_ffn:
            mixed = layer_idx in config.expert_layers
            dense = None if mixed else MegamemMLP(config, config.intermediate_size)
            self.mlp = dense or MegamemMoE(config)

    def forward(
        self,
        hidden_states: Tensor,
        tables: dict[str, dict[str, nn.Module]],
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        kept: Cache | None = None,
        attentions: list[Tensor | None] | None = None,
        late: dict[int, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The hidden states after the layer.

        Outputs of memories that later layers add are put into `late` by the layers that add them.
        """
        hidden_states = hidden_states + self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings,
            attention_mask,
            kept,
            attentions,
            **kwargs,
        )
        x = self.post_attention_layernorm(hidden_states)
        # added up in Megatron's order
        out = None if self.memory is None else self.memory(x, tables[self.table])
        if self.skip and late is not None:
            if out is not None:
                late[self.layer_idx + self.skip] = out
            out = late.get(self.layer_idx)
        if self.mlp is not None:
            out = self.mlp(x) if out is None else out + self.mlp(x)
        assert out is not None
        return hidden_states + out


class MegamemPreTrainedModel(PreTrainedModel):
    """What transformers asks of a model."""

    config_class = MegamemConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MegamemDecoderLayer", "MegamemTable"]
    _skip_keys_device_placement = ["kept", "tables", "late"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Weights of a new model; the memory's as in the published layer."""
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, MegamemTable):
            if module.kind is None and module.file is None:
                module.weight.normal_(std=self.config.memory_value_dim**-0.5)
        elif isinstance(module, MegamemMemory):
            bound = self.config.memory_key_dim**-0.5
            module.sub_keys.uniform_(-bound, bound)
            if module.key_norm is not None:
                module.key_norm.weight.fill_((self.config.memory_key_dim // 2) ** -0.5)
        elif isinstance(module, MegamemUltraMem):
            width = self.config.memory_key_dim // 2
            module.sub_keys.normal_(std=width**-0.5)
            module.cores.uniform_(0, 1)
            module.query_norm.weight.fill_(width**-0.33)
            module.key_norm.weight.fill_(width**-0.33)
            module.directions.zero_()
            if module.permutation is not None and not module.permutation.is_meta:
                module.permutation.copy_(torch.randperm(len(module.permutation)))
        elif isinstance(module, MegamemRouter):
            module.weight.normal_(std=std)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, MegamemExperts):
            module.gate_up_proj.normal_(std=std)
            module.down_proj.normal_(std=std)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save the model, as for every model of transformers.

        Raises:
            ValueError: the tables are on disk, so the model does not have them.
        """
        if self.config.memory_table_device == "disk":
            raise ValueError(
                f"the tables are in {self.config.name_or_path} and not in the model "
                '(memory_table_device="disk"); load it with memory_table_device="cpu" to save it, '
                "or copy that folder."
            )
        super().save_pretrained(*args, **kwargs)


class MegamemModel(MegamemPreTrainedModel):
    """The model without the output matrix."""

    def __init__(self, config: MegamemConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        learned = config.position_embedding == "learned"
        places = config.max_position_embeddings
        self.embed_positions = nn.Embedding(places, config.hidden_size) if learned else None
        numbers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(MegamemDecoderLayer(config, number) for number in numbers)
        self.norm = norm(config, config.hidden_size)
        names = dict.fromkeys(config.table_of(number) for number in config.memory_layers)
        further = {"peer": "u", "ultramem-v2": PRE_VALUES}
        kinds = ("v", *further.get(config.memory_variant, ""))
        self.tables = nn.ModuleDict()
        for name in names:
            pool = {kind: MegamemTable(config, f"{name}.{kind}") for kind in kinds}
            self.tables[name] = nn.ModuleDict(pool)
        self.gradient_checkpointing = False
        if config.memory_table_device == "disk":
            # they stay in the files
            self._keys_to_ignore_on_load_unexpected = [r"(^|\.)tables\."]
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states after the last norm; see CausalLM for the arguments.

        Raises:
            ValueError: neither or both of input_ids and inputs_embeds are given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give one of input_ids and inputs_embeds.")
        config: Any = self.config
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        kept = cache if cache is not None else past_key_values
        wanted = config.use_cache if use_cache is None else use_cache
        if wanted and kept is None and not (self.gradient_checkpointing and self.training):
            kept = DynamicCache(config=config)
        if position_ids is None:
            seen = 0 if kept is None else kept.get_seq_length()
            position_ids = torch.arange(seen, seen + x.shape[1], device=x.device)[None]
        mask = create_causal_mask(
            config=config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: kept},
        )
        turns = None
        if config.position_embedding == "rope":
            angles = position_ids[..., None].float() * frequencies(config, x.device)
            angles = torch.cat((angles, angles), dim=-1)[:, None]
            turns = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        if self.embed_positions is not None:
            x = x + self.embed_positions(position_ids)
        pools: Any = self.tables.items()
        tables = {name: dict(kinds.items()) for name, kinds in pools}
        states: list[Tensor] = []
        attentions: Any = [] if output_attentions else None
        late: dict[int, Tensor] = {}
        for layer in self.layers:
            states.append(x)
            x = layer(
                x,
                tables,
                attention_mask=mask,
                position_embeddings=turns,
                kept=kept,
                attentions=attentions,
                late=late,
                position_ids=position_ids,
                **kwargs,
            )
        x = self.norm(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            hidden_states=(*states, x) if output_hidden_states else None,
            attentions=None if attentions is None else tuple(attentions),
            **{CACHE: kept},
        )


class MegamemForCausalLM(MegamemPreTrainedModel, GenerationMixin):
    """The model with the output matrix, for training and generation."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan: Any = {"lm_head": (["hidden_states"], ["logits"])}

    def __init__(self, config: MegamemConfig) -> None:
        super().__init__(config)
        self.model = MegamemModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss where there are labels.

        Args:
            input_ids: [batch, tokens].
            attention_mask: 1 for tokens, 0 for padding, [batch, tokens seen].
            position_ids: [batch, tokens]; None counts on from what is in the cache.
            cache: keys and values of earlier tokens.
            past_key_values: the same, by the name in earlier releases of transformers.
            inputs_embeds: embeddings in place of input_ids.
            labels: the tokens themselves, or -100 where there is no loss.
            use_cache: whether to return keys and values; None for the config's.
            logits_to_keep: how many of the last tokens get logits, 0 for all, or which.
            kwargs: for the attention implementation, and output_hidden_states,
                output_attentions and return_dict.
        """
        found = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        places: Any = logits_to_keep
        if isinstance(places, int):
            # all where it is 0
            places = slice(-places, None) if places else slice(None)
        logits = self.lm_head(found.last_hidden_state[:, places])
        loss = None
        if labels is not None:
            kwargs.pop("output_hidden_states", None), kwargs.pop("output_attentions", None)
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=found.hidden_states,
            attentions=found.attentions,
            **{CACHE: found.get(CACHE)},
        )


__all__ = ["MegamemForCausalLM", "MegamemModel", "MegamemPreTrainedModel"]
