"""The contenders at three sizes: OneDiff, and transformers' LLaVA with the same tower and decoder.

All weights are random, which take as long as trained ones.

tiny    the sizes of presets/tiny.yaml: CLIP tower 128 x 4 at 96 px (64 patches), Llama 128 x 3, 0.7k tokens
small   about 50M parameters: CLIP tower 384 x 8 at 112 px (64 patches), Llama 512 x 8 with 8,192 tokens, VDM 384 x 4
paper   presets/paper.yaml: CLIP-L/14 at 336 px (576 patches), Vicuna-7B, VDM 768 x 6, in bfloat16; for a GPU

Texts are those of the tiny preset's tokenizer and template (the paper's template for its preset) for both contenders.
"""

from __future__ import annotations

from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onediff.config import Config, load_params

if TYPE_CHECKING:
    import torch
    from transformers import LlavaForConditionalGeneration

    from onediff.inputs.processing import OneDiffProcessor
    from onediff.model.configuration import OneDiffConfig
    from onediff.model.onediff import OneDiffForConditionalGeneration

PRESETS = ("tiny", "small", "paper")
HOME = Path(".onediff/benchmarks")
BACKBONES, ARCHITECTURES = Path("presets/backbones/tiny"), Path("presets/architectures")
MAX_LENGTH = 2048
ALL_PATCHES: dict[str, Any] = {"patch_pool": 1, "reading": "A"}  # every patch of both images, as LLaVA reads them
SMALL_TOWER = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 6,
               "image_size": 112, "patch_size": 14}
SMALL_LANGUAGE = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8,
                  "vocab_size": 8192, "max_position_embeddings": 2048, "tie_word_embeddings": True,
                  "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def settings(preset: str, **model: Any) -> Config:
    """The preset's params.yaml, its models given by their config.json alone; `model` changes its section of that name
    and, for num_tokens, the VDM's. Raises ValueError for an unknown preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"--preset {preset}: must be one of {', '.join(PRESETS)}")
    values = load_params(Path(f"presets/{'paper' if preset == 'paper' else 'tiny'}.yaml")).model_dump(mode="json")
    section = values["model"]
    if preset == "small":
        section["vision"] |= {"path": str(_small("vision")), "image_px": 112, "patch_px": 14, "layers": 8}
        section["language"] = str(_small("language"))
        section["delta"] |= {"width": 384, "heads": 6, "levels": [4, 4, 8, 8]}
    elif preset == "paper":
        section["vision"]["path"] = str(ARCHITECTURES / section["vision"]["path"])
        section["language"] = str(ARCHITECTURES / section["language"])
        section["delta"]["init"] = "random"
    if "num_tokens" in model:
        section["delta"]["num_tokens"] = model.pop("num_tokens")
    values["model"] |= {"max_length": MAX_LENGTH} | model
    return Config.model_validate(values)


def _small(part: str) -> Path:
    """A folder with the config.json of the small preset's tower or decoder."""
    from transformers import CLIPVisionConfig, LlamaConfig

    folder = HOME / "small" / part
    if not (folder / "config.json").exists():
        made = CLIPVisionConfig(**SMALL_TOWER) if part == "vision" else LlamaConfig(**SMALL_LANGUAGE)
        made.save_pretrained(folder)
    return folder


def processor_of(config: Config) -> OneDiffProcessor:
    from transformers import AutoTokenizer

    from onediff.inputs.processing import OneDiffProcessor, load_image_processor

    images, px, model = load_image_processor(BACKBONES / "vision"), config.model.vision.image_px, config.model
    images.size = images.crop_size = {"height": px, "width": px}
    side = px // model.vision.patch_px // model.patch_pool
    return OneDiffProcessor(images, AutoTokenizer.from_pretrained(BACKBONES / "language"), tokens_per_image=side**2,
                            delta_tokens=0 if model.reading == "B" else model.delta.num_tokens,
                            images_joined=model.reading == "C", template=model.template, max_length=model.max_length)


def configuration_of(config: Config, processor: OneDiffProcessor) -> OneDiffConfig:
    from onediff.model.assemble import configure

    made = configure(config.model)
    made.image_token_id, made.delta_token_id = processor.image_token_id, processor.delta_token_id
    return made


def onediff(config: Config, device: str) -> tuple[OneDiffForConditionalGeneration, OneDiffProcessor]:
    """In the preset's precision on a GPU, in float32 on a CPU, where bfloat16 is far slower."""
    from onediff.model.onediff import OneDiffForConditionalGeneration

    processor = processor_of(config)
    with _made_on(device, config):
        return OneDiffForConditionalGeneration(configuration_of(config, processor)), processor


def llava(config: Config, device: str) -> tuple[LlavaForConditionalGeneration, OneDiffProcessor]:
    """transformers' own with SDPA, reading every patch of each image; its prompts have no delta tokens."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    processor = processor_of(settings_without_delta(config))
    ours = configuration_of(settings_without_delta(config), processor)
    text = deepcopy(ours.text_config)
    text.vocab_size = max(text.vocab_size, ours.image_token_id + 1)  # it looks its placeholders up, too
    made = LlavaConfig(vision_config=ours.vision_config, text_config=text, image_token_index=ours.image_token_id,
                       image_seq_length=ours.num_patches, vision_feature_layer=ours.patch_level,
                       tie_word_embeddings=text.tie_word_embeddings)
    with _made_on(device, config):
        return LlavaForConditionalGeneration._from_config(made, attn_implementation="sdpa"), processor


def settings_without_delta(config: Config) -> Config:
    """OneDiff with all patches and no VDM: what LLaVA computes."""
    model = config.model
    return config.model_copy(update={"model": model.model_copy(update={
        **ALL_PATCHES, "delta": model.delta.model_copy(update={"num_tokens": 0})})})


def _made_on(device: str, config: Config) -> ExitStack:
    import torch

    torch.manual_seed(config.seed)
    made = ExitStack()
    made.enter_context(torch.device(device))
    before = torch.get_default_dtype()
    made.callback(torch.set_default_dtype, before)
    torch.set_default_dtype(torch.float32 if device == "cpu" else getattr(torch, config.model.precision))
    return made


def same_weights(ours: OneDiffForConditionalGeneration, theirs: LlavaForConditionalGeneration) -> None:
    """Ours into theirs, whose embedding may have more rows."""
    import torch

    with torch.no_grad():
        theirs.model.vision_tower.load_state_dict(ours.vision.tower.state_dict())
        state = ours.language.get_decoder().state_dict()
        rows = state.pop("embed_tokens.weight")
        theirs.model.language_model.load_state_dict(state, strict=False)
        theirs.model.language_model.embed_tokens.weight[: len(rows)].copy_(rows)
        theirs.lm_head.weight[: len(rows)].copy_(ours.language.get_output_embeddings().weight)
        projector: torch.nn.Module = theirs.model.multi_modal_projector
        projector.load_state_dict({f"linear_{1 + number // 2}.{part}": ours.projector.state_dict()[f"{number}.{part}"]
                                   for number in (0, 2) for part in ("weight", "bias")})
