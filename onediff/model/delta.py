"""The Visual Delta Module (VDM): K learned query tokens attend to both images and describe the difference.

The output of the module, the delta tokens, is given to the language model.

Shapes:  B pairs, L levels of the vision tower, N patches per image, C width of the vision tower, K delta tokens,
         W width of this module, Q queries and S context tokens of an attention layer.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertModel

from onediff.model.configuration import OneDiffConfig

# The random position and image embeddings have this standard deviation, large enough to matter from the first step on.
SPREAD = 0.3
# Maps each submodule of a DeltaLayer to the submodule of a BERT layer from which `copy_bert` copies the weights.
BERT_NAMES = {"self_attention.query": "attention.self.query", "self_attention.key": "attention.self.key",
              "self_attention.value": "attention.self.value", "self_attention.out": "attention.output.dense",
              "self_attention.norm": "attention.output.LayerNorm", "up": "intermediate.dense", "down": "output.dense",
              "norm": "output.LayerNorm"}


class Attention(nn.Module):
    """Multi-head attention from queries to a context, followed by a residual connection and LayerNorm, as in BERT.

    `by_keys` is the usual computation. `by_queries` gives equal results, up to rounding, with fewer operations if few
    queries read a long context: it multiplies the queries by the key weights, and the averaged context by the value
    weights, so that it computes no key and no value for each context token.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.value, self.out = (nn.Linear(width, width) for _ in range(3))
        self.key = nn.Linear(width, width, bias=False)  # softmax cancels a key bias
        self.norm = nn.LayerNorm(width)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        """Let the queries attend to the context, and return the updated queries.

        The queries are (pairs, queries, width), and the context is (pairs, context tokens, width).
        """
        attend = self.by_queries if self.has_few_queries(queries.shape[1], context.shape[1]) else self.by_keys
        query = self.query(queries).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, Q, W/heads)
        return self.norm(queries + self.out(attend(query, context).transpose(1, 2).flatten(2)))

    def has_few_queries(self, num_queries: int, num_keys: int) -> bool:
        """Return whether `by_queries` needs fewer operations than `by_keys` for these numbers of queries and keys."""
        return num_queries < num_keys and self.heads * num_queries < self.query.in_features

    def by_keys(self, query: Tensor, context: Tensor) -> Tensor:
        """Compute attention in the usual way, with a key and a value for each token of the context.

        The queries are (pairs, heads, queries, width of a head), the context is (pairs, context tokens, width).
        """
        key, value = (part(context).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.key, self.value))
        return functional.scaled_dot_product_attention(query, key, value)

    def by_queries(self, query: Tensor, context: Tensor) -> Tensor:
        """Compute the result of `by_keys` without keys and values; the docstring of the class explains how."""
        key, value = (part.weight.unflatten(0, (self.heads, -1)) for part in (self.key, self.value))
        wide = torch.einsum("bhqd, hdw -> bhqw", query, key).flatten(1, 2)[:, None]  # (B, 1, heads*Q, W)
        keys = context[:, None]
        mean = functional.scaled_dot_product_attention(wide, keys, keys, scale=query.shape[-1] ** -0.5)[:, 0]
        mixed = torch.einsum("bhqw, hdw -> bhqd", mean.unflatten(1, (self.heads, -1)), value)
        return mixed + self.value.bias.unflatten(0, (self.heads, 1, -1))


class DeltaLayer(nn.Module):
    """A transformer layer: self-attention of the delta tokens, optional cross-attention to the images, feed-forward."""

    def __init__(self, width: int, heads: int, *, cross: bool) -> None:
        super().__init__()
        self.self_attention = Attention(width, heads)
        self.cross_attention = Attention(width, heads) if cross else None
        self.up, self.down, self.norm = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), nn.LayerNorm(width)

    def forward(self, delta: Tensor, context: Tensor) -> Tensor:
        """Return the updated delta tokens (pairs, tokens, width). `context` has the tokens of the images."""
        delta = self.self_attention(delta, delta)
        if self.cross_attention is not None:
            delta = self.cross_attention(delta, context)
        return self.norm(delta + self.down(functional.gelu(self.up(delta))))


class PatchMatch(nn.Module):
    """Subtract from each patch its match in the other image, so that only content without a match remains.

    The match is a weighted mean of all patches of the other image. A softmax gives high weights to patches that have
    similar features and a near position. The learned scalar `sharpness` scales the similarity of the features, and
    the learned scalar `nearness` scales the distance of the positions. `spacing` is the distance of neighbouring
    positions, in patches of the vision tower, so that `nearness` has one meaning on grids of any size.
    """

    distances: Tensor

    def __init__(self, side: int, *, spacing: float = 1.0) -> None:
        super().__init__()
        self.sharpness, self.nearness = nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([0.3]))
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        positions = spacing * torch.stack([rows.flatten(), columns.flatten()], 1).float()
        self.register_buffer("distances", torch.cdist(positions, positions).square())  # (N, N), patches^2

    def forward(self, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        """Return the before patches minus their matches, and the after patches minus theirs.

        All inputs and outputs are (B pairs, N patches, C channels), and the inputs are normalized.
        """
        similarity = self.sharpness * before @ after.transpose(1, 2) / before.shape[-1] ** 0.5
        similarity = similarity - self.nearness * self.distances
        return before - similarity.softmax(-1) @ after, after - similarity.transpose(1, 2).softmax(-1) @ before


class VisualDeltaModule(nn.Module):
    """The stack of DeltaLayers that turns the two encoded images of a pair into delta tokens.

    The paper uses 6 layers, which read the patches of both images at three levels of the vision tower.
    `delta_inputs` chooses the tokens that the cross-attention reads:
    `pair`, as in the paper: one token for each patch of both images.
    `pair_and_difference`: these tokens, and one token for the difference `after - before` at each position.
    `pair_and_matched_difference`: the tokens of `pair`, and to each one is added how the patch differs from its match
    in the other image (`PatchMatch`). It is meant for pairs whose camera moved between the images.
    """

    def __init__(self, config: OneDiffConfig) -> None:
        super().__init__()
        width, tower = config.delta_width, config.vision_config.hidden_size
        self.levels = [config.read_levels.index(level) for level in config.delta_levels]
        self.every, self.inputs = config.delta_cross_attention_every, config.delta_inputs
        self.marked = config.delta_image_ids
        self.tokens = nn.Parameter(torch.randn(config.delta_num_tokens, width))
        self.query_norm = nn.LayerNorm(width)
        # Each level of the vision tower needs a LayerNorm, because the hidden states of the levels differ in scale.
        self.level_norms = nn.ModuleDict({str(level): nn.LayerNorm(tower) for level in sorted(set(self.levels))})
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

    def forward(self, before: Tensor, after: Tensor, fused: Tensor | None = None) -> Tensor:
        """Return delta tokens (B pairs, K tokens, width), computed from the hidden states of both images.

        `before` and `after` are hidden states of the vision tower (B pairs, L levels, N patches, C channels). `fused`
        are the keys of Fusion (B pairs, N patches, width), which every cross-attention reads beside the patches.
        """
        contexts = {level: self.read(before[:, level], after[:, level], level) for level in sorted(set(self.levels))}
        if fused is not None:
            contexts = {level: torch.cat([context, fused], 1) for level, context in contexts.items()}
        delta = self.query_norm(self.tokens).expand(len(before), -1, -1)
        for i, layer in enumerate(self.layers):
            delta = layer(delta, contexts[self.levels[i // self.every]])
        return self.norm(delta)

    def read(self, before: Tensor, after: Tensor, level: int) -> Tensor:
        """Return the context that the cross-attention reads, computed from the patches of both images at one level.

        The patches are normalized, embeddings of position and image are added, and a linear layer maps the sum to the
        width of this module. `before` and `after` are (pairs, N patches, channels). The result has 2N tokens per pair,
        or 3N if it includes the difference of the images.
        """
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
        """Copy self-attention and feed-forward weights from the first layers of BERT to the layers of this module.

        Cross-attention keeps random weights, as in the Q-Former of BLIP-2. Raises ValueError if BERT has too few
        layers or another width than this module.
        """
        if bert.config.hidden_size != self.tokens.shape[1] or bert.config.num_hidden_layers < len(self.layers):
            raise ValueError(f"params.yaml: model.delta.init: BERT must have at least {len(self.layers)} layers of "
                             f"width {self.tokens.shape[1]} to initialize the delta module, got "
                             f"{bert.config.num_hidden_layers} layers of width {bert.config.hidden_size}; choose "
                             "another BERT, or set model.delta.init to random")
        for delta_layer, bert_layer in zip(self.layers, bert.encoder.layer, strict=False):
            for name, bert_name in BERT_NAMES.items():
                target, state = delta_layer.get_submodule(name), bert_layer.get_submodule(bert_name).state_dict()
                target.load_state_dict({key: state[key] for key in target.state_dict()})


def is_inherited(name: str) -> bool:
    """Return whether `copy_bert` sets the parameter of OneDiff with this name, such as delta.layers.0.up.weight."""
    words = name.split(".", 3)  # delta, layers, the index of the layer, the name inside the layer
    return words[:2] == ["delta", "layers"] and words[3].rpartition(".")[0] in BERT_NAMES


class Enhance(nn.Module):
    """The cross-attention of token layout B, in which the image patches of a pair attend to its delta tokens."""

    def __init__(self, tower_width: int, delta_width: int, heads: int) -> None:
        super().__init__()
        self.norm, self.reduce = nn.LayerNorm(tower_width), nn.Linear(tower_width, delta_width)
        self.attention, self.expand = Attention(delta_width, heads), nn.Linear(delta_width, tower_width)

    def forward(self, patches: Tensor, delta: Tensor) -> Tensor:
        """Let the patches of each image attend to the delta tokens of its pair, and return the enhanced patches.

        The patches are (images, patches, channels), and the delta tokens are (images, delta tokens, width).
        """
        return self.expand(self.attention(self.reduce(self.norm(patches)), delta))
