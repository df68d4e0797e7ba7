"""The attributes of a change that the model learns to name beside the caption, and the classes of each attribute."""

COLORS = ("gray", "red", "blue", "green", "brown", "purple", "cyan", "yellow")
MATERIALS = ("matte", "shiny")

OF_THE_OBJECT = ("color", "shape", "size", "material")

# Attribute -> its classes. config.json of a model keeps the classes with which the model was trained. `result` is the
# new color or material of an object, the color of a tint, the direction of a move or a turn, or the place of an edit.
CLASSES: dict[str, tuple[str, ...]] = {
    "color": COLORS, "shape": ("cube", "sphere", "cylinder"), "size": ("small", "big"), "material": MATERIALS,
    "change_type": ("none", "color", "texture", "add", "drop", "move", "brighten", "darken", "more_contrast",
                    "less_contrast", "color_cast", "black_and_white", "blur", "crop", "rotate", "remove", "paste",
                    "remove_cast", "colorize", "sharpen", "zoom_out", "restore"),
    "result": (*COLORS, *MATERIALS, "left", "right", "front", "back", "top", "bottom", "center")}


def result_of(new: str) -> str:
    """Return the class of `result` for the value `new` of a provenance, such as "left" for "to the left"."""
    return new.removeprefix("to the ")


def words_of(option: str) -> str:
    """Return a class as text, such as "more contrast" for "more_contrast"."""
    return option.replace("_", " ")
