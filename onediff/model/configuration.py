"""OneDiffConfig: the architecture of a OneDiff model, which is saved as config.json beside the weights."""

from dataclasses import field
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


class OneDiffConfig(PreTrainedConfig):
    """The configuration of a OneDiff model: vision tower, language model, and the modules between them.

    `reading` is the token layout A, B or C; the docstring of OneDiffForConditionalGeneration describes the layouts.
    `patch_level` is the index of the hidden state of the vision tower that gives the patches for the language model.
    `patch_pool` is the side, in patches, of the squares of patches that are averaged into one patch token.
    `delta_levels` lists, for each cross-attention of the Visual Delta Module, the index of the hidden state that it
    reads (0 = the patch embeddings). If `delta_num_tokens` is 0, the model has no Visual Delta Module.
    `delta_fusion` holds the sizes of the module Fusion (channels, width, places, blocks), or is None for a model
    without it, as in the paper. `delta_classes` maps each attribute that Fusion reads to its classes, and each
    class to the token ids of its word.
    """

    model_type = "onediff"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    # Each sub-configuration may be a dict, a PreTrainedConfig or None; transformers converts it to a PreTrainedConfig.
    vision_config: Any = None
    text_config: Any = None
    reading: str = "A"
    patch_level: int = -2
    patch_pool: int = 1
    delta_num_tokens: int = 32
    delta_width: int = 768
    delta_heads: int = 12
    delta_levels: list[int] = field(default_factory=list)  # An empty list selects the levels of the paper.
    delta_cross_attention_every: int = 1
    delta_inputs: str = "pair"
    delta_image_ids: bool = True
    delta_fusion: dict[str, int] | None = None
    delta_classes: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    template: str = "vicuna_v1"
    image_token_id: int = -1
    delta_token_id: int = -1
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.delta_levels = list(self.delta_levels or [8, 8, 16, 16, 24, 24])
        # config.json lists the keys of a dict in alphabetical order, and the parameters of Fusion depend on the order.
        self.delta_classes = {name: dict(sorted(options.items()))
                              for name, options in sorted(self.delta_classes.items())}
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))

    @property
    def patches_per_side(self) -> int:
        """Return the number of patches along one side of the square image."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def num_patches(self) -> int:
        """Return the number of patches into which the vision tower divides an image."""
        return self.patches_per_side**2

    @property
    def tokens_per_image(self) -> int:
        """Return the number of patch tokens that an image, or in token layout C a pair, has in the prompt."""
        return (self.patches_per_side // self.patch_pool) ** 2

    @property
    def delta_tokens_read(self) -> int:
        """Return the number of delta tokens in the prompt of a pair, including those of Fusion.

        In token layout B it is 0.
        """
        return 0 if self.reading == "B" else self.delta_num_tokens + self.num_fused_tokens

    @property
    def num_fused_tokens(self) -> int:
        """Return the number of tokens of Fusion: the changed object, the camera motion, and each attribute."""
        return 2 + len(self.delta_classes) if self.delta_fusion else 0

    @property
    def patch_state(self) -> int:
        """Return `patch_level` as a non-negative index of a hidden state; index 0 means the patch embeddings."""
        return (self.patch_level if self.patch_level >= 0
                else self.vision_config.num_hidden_layers + 1 + self.patch_level)

    @property
    def read_levels(self) -> list[int]:
        """Return the sorted indices of the hidden states of the vision tower that the rest of the model reads."""
        return sorted({*(self.delta_levels if self.delta_num_tokens else ()), self.patch_state})


AutoConfig.register(OneDiffConfig.model_type, OneDiffConfig, exist_ok=True)  # AutoTokenizer needs it to load
