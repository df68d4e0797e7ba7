"""The Visual Delta Module: learnable delta tokens read both images and carry away what differs.

Two images in, K delta tokens out.

Shapes:  B pairs, L levels, N patches per image, C tower width, K delta tokens, W width of the module.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertModel

from onediff.model.configuration import OneDiffConfig

SPREAD = 0.3  # of the vectors added to normed features: near enough to 1 to have an effect from the first step
BERT_NAMES = {"self_attention.query": "attention.self.query", "self_attention.key": "attention.self.key",
              "self_attention.value": "attention.self.value", "self_attention.out": "attention.output.dense",
              "self_attention.norm": "attention.output.LayerNorm", "up": "intermediate.dense", "down": "output.dense",
              "norm": "output.LayerNorm"}  # modules of a DeltaLayer -> modules of a layer of BERT


class Attention(nn.Module):
    """Multi-head attention with BERT's post-norm residual; queries from one sequence, keys and values from another.

    Where few queries (delta tokens) read a long context, no keys and values are computed: the queries are multiplied by
    the key weights, and the mean of the context by the value weights. These are the same sums in another order, for a
    fraction of the work.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.value, self.out = (nn.Linear(width, width) for _ in range(3))
        self.key = nn.Linear(width, width, bias=False)  # a bias would move all scores of a query alike: no effect
        self.norm = nn.LayerNorm(width)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        """queries (B, Q, W), context (B, S, W) -> (B, Q, W)."""
        attend = self.by_queries if self.has_few_queries(queries.shape[1], context.shape[1]) else self.by_keys
        query = self.query(queries).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, Q, W / heads)
        return self.norm(queries + self.out(attend(query, context).transpose(1, 2).flatten(2)))

    def has_few_queries(self, num_queries: int, num_keys: int) -> bool:
        return num_queries < num_keys and self.heads * num_queries < self.query.in_features

    def by_keys(self, query: Tensor, context: Tensor) -> Tensor:
        """query (B, heads, Q, W / heads), context (B, S, W) -> (B, heads, Q, W / heads)."""
        key, value = (part(context).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.key, self.value))
        return functional.scaled_dot_product_attention(query, key, value)

    def by_queries(self, query: Tensor, context: Tensor) -> Tensor:
        """As by_keys."""
        key, value = (part.weight.unflatten(0, (self.heads, -1)) for part in (self.key, self.value))
        wide = torch.einsum("bhqd, hdw -> bhqw", query, key).flatten(1, 2)[:, None]  # one head of width W
        keys = context[:, None]
        mean = functional.scaled_dot_product_attention(wide, keys, keys, scale=query.shape[-1] ** -0.5)[:, 0]
        mixed = torch.einsum("bhqw, hdw -> bhqd", mean.unflatten(1, (self.heads, -1)), value)
        return mixed + self.value.bias.unflatten(0, (self.heads, 1, -1))


class DeltaLayer(nn.Module):
    """Self-attention among the delta tokens, cross-attention to the images (where the layer has one), feed-forward."""

    def __init__(self, width: int, heads: int, *, cross: bool) -> None:
        super().__init__()
        self.self_attention = Attention(width, heads)
        self.cross_attention = Attention(width, heads) if cross else None
        self.up, self.down, self.norm = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), nn.LayerNorm(width)

    def forward(self, delta: Tensor, context: Tensor) -> Tensor:
        """delta (B, K, W), context (B, S, W) -> (B, K, W)."""
        delta = self.self_attention(delta, delta)
        if self.cross_attention is not None:
            delta = self.cross_attention(delta, context)
        return self.norm(delta + self.down(functional.gelu(self.up(delta))))


class PatchMatch(nn.Module):
    """How each patch differs from its match in the other image: a mean of similar and near patches, by two learned
    numbers.
    """

    distances: Tensor

    def __init__(self, side: int) -> None:
        super().__init__()
        self.sharpness, self.nearness = nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([0.3]))
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        places = torch.stack([rows.flatten(), columns.flatten()], 1).float()
        self.register_buffer("distances", torch.cdist(places, places).square())  # (N, N), in patches

    def forward(self, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        """before, after (B, N, C), normed -> the part of each that is not in the other, (B, N, C) twice."""
        similarity = self.sharpness * before @ after.transpose(1, 2) / before.shape[-1] ** 0.5
        similarity = similarity - self.nearness * self.distances
        return before - similarity.softmax(-1) @ after, after - similarity.transpose(1, 2).softmax(-1) @ before


class VisualDeltaModule(nn.Module):
    """In the paper 6 layers of BERT-base width over three levels of the tower, reading both images' patch tokens.

    Beyond the paper, `delta_inputs` lets the cross-attention also read how the images differ:
    `pair_and_difference`: `after - before` per patch, as a third set of tokens;
    `pair_and_matched_difference`: each patch also tells how it differs from its best match in the other image, for
    pairs whose camera moved, where the same place shows something else.
    """

    def __init__(self, config: OneDiffConfig) -> None:
        super().__init__()
        width, tower = config.delta_width, config.vision_config.hidden_size
        self.levels = [config.read_levels.index(level) for level in config.delta_levels]
        self.every, self.inputs = config.delta_cross_attention_every, config.delta_inputs
        self.marked = config.delta_image_ids
        self.tokens = nn.Parameter(torch.randn(config.delta_num_tokens, width))
        self.query_norm = nn.LayerNorm(width)
        self.level_norms = nn.ModuleDict({str(level): nn.LayerNorm(tower)  # raw norms differ
                                          for level in sorted(set(self.levels))})
        if self.marked:
            self.image_ids = nn.Parameter(SPREAD * torch.randn(3, 1, tower))  # before, after, difference
        self.positions = nn.Parameter(SPREAD * torch.randn(config.num_patches, tower))
        self.reduce = nn.Linear(tower, width)
        if self.inputs == "pair_and_matched_difference":
            self.match = nn.ModuleDict({level: PatchMatch(config.patches_per_side) for level in self.level_norms})
            self.contrast = nn.Sequential(nn.Linear(tower, width), nn.GELU(), nn.Linear(width, width))
        self.layers = nn.ModuleList([DeltaLayer(width, config.delta_heads, cross=(i + 1) % self.every == 0)
                                     for i in range(len(self.levels) * self.every)])
        self.norm = nn.LayerNorm(width)

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        """before, after (B, L, N, C) -> delta (B, K, W)."""
        contexts = {level: self.read(before[:, level], after[:, level], level) for level in sorted(set(self.levels))}
        delta = self.query_norm(self.tokens).expand(len(before), -1, -1)
        for i, layer in enumerate(self.layers):
            delta = layer(delta, contexts[self.levels[i // self.every]])
        return self.norm(delta)

    def read(self, before: Tensor, after: Tensor, level: int) -> Tensor:
        """before, after (B, N, C) -> keys and values (B, 2N or 3N, W): normed, marked by image and place, projected."""
        norm = self.level_norms[str(level)]
        views = [norm(before), norm(after)]
        if self.inputs == "pair_and_difference":
            views.append(views[1] - views[0])
        marks = self.image_ids if self.marked else torch.zeros(3, 1, 1, device=before.device)
        context = self.reduce(torch.cat([view + self.positions + mark
                                         for view, mark in zip(views, marks, strict=False)], dim=1))
        if self.inputs == "pair_and_matched_difference":
            context = context + self.contrast(torch.cat(self.match[str(level)](*views), dim=1))
        return context

    def copy_bert(self, bert: BertModel) -> None:
        """Copies self-attention and feed-forward of each layer from a layer of BERT, in order.

        Cross-attention stays random, as in BLIP-2's Q-Former. Raises ValueError if BERT has too few layers or another
        width.
        """
        if bert.config.hidden_size != self.tokens.shape[1] or bert.config.num_hidden_layers < len(self.layers):
            raise ValueError(f"model.delta.init: BERT has {bert.config.num_hidden_layers} layers of width "
                             f"{bert.config.hidden_size}, the delta module {len(self.layers)} of width "
                             f"{self.tokens.shape[1]}; choose another BERT or init: random")
        for ours, theirs in zip(self.layers, bert.encoder.layer, strict=False):
            for name, bert_name in BERT_NAMES.items():
                target, state = ours.get_submodule(name), theirs.get_submodule(bert_name).state_dict()
                target.load_state_dict({key: state[key] for key in target.state_dict()})
