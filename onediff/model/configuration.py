"""OneDiffConfig: what a saved model needs to stand up again."""

from dataclasses import field
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


class OneDiffConfig(PreTrainedConfig):
    """Tower and language model as transformers describes them, plus the Visual Delta Module and how the three join.

    `delta_levels` has one entry per cross-attention: the tower's hidden state that it reads (0 = embeddings).
    `reading` A splices [before][after][delta] before the text, B joins every patch with its delta-enhanced self by
    channel, C splices [before; after], joined by channel, and [delta]; a single image is read as [image; image].
    `delta_num_tokens` 0 leaves the Visual Delta Module out.
    """

    model_type = "onediff"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    vision_config: Any = None  # given as a dict, a PreTrainedConfig or None; a PreTrainedConfig once made
    text_config: Any = None  # likewise
    reading: str = "A"
    patch_level: int = -2
    patch_pool: int = 1
    delta_num_tokens: int = 32
    delta_width: int = 768
    delta_heads: int = 12
    delta_levels: list[int] = field(default_factory=list)  # empty: the paper's
    delta_cross_attention_every: int = 1
    delta_inputs: str = "pair"
    delta_image_ids: bool = True
    template: str = "vicuna_v1"
    image_token_id: int = -1
    delta_token_id: int = -1
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.delta_levels = list(self.delta_levels or [8, 8, 16, 16, 24, 24])
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))

    @property
    def patches_per_side(self) -> int:
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of one image as the tower gives them, N."""
        return self.patches_per_side**2

    @property
    def tokens_per_image(self) -> int:
        """Patch tokens of one image that the language model reads; under reading C those of both."""
        return (self.patches_per_side // self.patch_pool) ** 2

    @property
    def delta_tokens_read(self) -> int:
        """Delta tokens of one pair that the language model reads: under reading B they act through the patches."""
        return 0 if self.reading == "B" else self.delta_num_tokens

    @property
    def patch_state(self) -> int:
        """`patch_level` counted from the embeddings up."""
        return (self.patch_level if self.patch_level >= 0
                else self.vision_config.num_hidden_layers + 1 + self.patch_level)

    @property
    def read_levels(self) -> list[int]:
        """The hidden states of the tower that anything reads, each once, rising: the L axis of `states`."""
        return sorted({*(self.delta_levels if self.delta_num_tokens else ()), self.patch_state})


AutoConfig.register(OneDiffConfig.model_type, OneDiffConfig, exist_ok=True)  # so that AutoTokenizer knows the folder
