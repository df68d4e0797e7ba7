"""The attributes of a change that the model learns to name beside the caption, and the classes of each attribute."""

COLORS = ("gray", "red", "blue", "green", "brown", "purple", "cyan", "yellow")
MATERIALS = ("matte", "shiny")

# Attribute -> its classes. config.json of a model keeps the classes with which the model was trained.
CLASSES: dict[str, tuple[str, ...]] = {
    "color": COLORS, "shape": ("cube", "sphere", "cylinder"), "size": ("small", "big"), "material": MATERIALS,
    "change_type": ("none", "color", "texture", "add", "drop", "move", "brighten", "darken", "more_contrast",
                    "less_contrast", "color_cast", "black_and_white", "blur", "crop", "rotate", "remove", "paste",
                    "remove_cast", "colorize", "sharpen", "zoom_out", "restore"),
    "new": (*COLORS, *MATERIALS),  # the new color or material of an object, or the color of a tint
    "direction": ("left", "right", "front", "back"), "place": ("left", "right", "top", "bottom", "center"),
    "turn": ("to the left", "to the right")}
