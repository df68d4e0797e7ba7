"""The words for generated changes: synonyms, and several caption templates for each kind of change."""

from numpy.random import Generator

SYNONYMS = {"sphere": ("sphere", "ball"), "cube": ("cube", "block"), "cylinder": ("cylinder",),
            "small": ("small", "little"), "big": ("big", "large"),
            "matte": ("matte", "rubber"), "shiny": ("shiny", "metal")}
DIRECTIONS = {"left": "to the left", "right": "to the right", "front": "to the front", "back": "to the back"}

SCENE_TEMPLATES: dict[str, tuple[str, ...]] = {
    "color": ("the {old} became {new}", "the {old} turned {new}", "the {old} is now {new}",
              "the color of the {old} changed to {new}", "someone painted the {old} {new}"),
    "texture": ("the {old} became {new}", "the {old} turned {new}", "the {old} is now {new}",
                "the material of the {old} changed to {new}", "the surface of the {old} is {new} now"),
    "add": ("a {old} was added", "a {old} appeared", "there is a new {old}", "someone placed a {old} on the table",
            "a {old} has been put there"),
    "drop": ("the {old} was removed", "the {old} disappeared", "the {old} is gone", "the {old} is missing",
             "someone took the {old} away"),
    "move": ("the {old} moved {new}", "the {old} was moved {new}", "the {old} changed its location {new}",
             "someone pushed the {old} {new}", "the {old} has shifted {new}"),
    "none": ("nothing has changed", "there is no difference", "the two scenes are the same", "no change was made",
             "nothing was changed", "the scene is the same as before"),
}

EDIT_TEMPLATES: dict[str, tuple[str, ...]] = {
    "brighten": ("brighten the image", "make the photo brighter", "increase the brightness", "lighten the picture"),
    "darken": ("darken the image", "make the photo darker", "decrease the brightness",
               "reduce the light in the picture"),
    "more_contrast": ("increase the contrast", "add more contrast to the image", "make the contrast stronger",
                      "raise the contrast of the photo"),
    "less_contrast": ("reduce the contrast", "lower the contrast of the image", "make the contrast weaker",
                      "decrease the contrast of the photo"),
    "color_cast": ("add a {new} tint", "make the image more {new}", "give the photo a {new} cast",
                   "tint the whole picture {new}"),
    "remove_cast": ("remove the {new} tint", "take the {new} cast out of the photo",
                    "correct the {new} tint of the image", "undo the {new} tint of the picture"),
    "black_and_white": ("make the image black and white", "convert the photo to black and white",
                        "remove all the colors", "turn the picture into grayscale"),
    "colorize": ("make the colors come back", "bring back the colors of the photo", "turn the gray picture into color",
                 "add the missing colors to the image"),
    "blur": ("blur the image", "make the photo blurry", "apply a blur to the picture", "make the image less sharp"),
    "sharpen": ("sharpen the image", "make the photo sharper", "remove the blur from the picture",
                "bring the image back into focus"),
    "crop": ("crop the photo to its {new}", "keep only the {new} of the picture", "zoom into the {new} of the image",
             "cut out the {new} of the picture"),
    "zoom_out": ("zoom out from the {new}", "show more of the picture around the {new}",
                 "widen the view beyond the {new}", "show the whole photo and not only its {new}"),
    "rotate": ("rotate the image {new}", "turn the photo {new}", "rotate the picture by 90 degrees {new}"),
    "remove": ("remove the object at the {new}", "erase the thing at the {new}", "take out the object at the {new}",
               "delete what is at the {new}"),
    "restore": ("put the missing part at the {new} back", "restore what was at the {new}",
                "bring back what was erased at the {new}", "fill in the missing part at the {new}"),
    "paste": ("add a {old} at the {new}", "paste a {old} at the {new}", "put a {old} at the {new}",
              "insert a {old} at the {new}"),
    "none": ("leave the image as it is", "nothing was edited", "no edit was made", "keep the photo unchanged"),
}

# Questions that fit every source. They use many different words, so that a model does not depend on one wording.
QUESTIONS = (
    "What changed between the two images?", "What is the difference between the two pictures?",
    "Describe the difference between the first and the second image.", "Can you spot the change?",
    "Which difference do you see between these photos?", "What does the second photo show that the first did not?",
    "Please describe what is different now.", "Tell me the difference in one sentence.", "Is there anything new?",
    "Look at the pictures before and after. What happened?", "In what way do the two photos differ?",
    "What is special about the later image?", "Compare both images and describe the change.",
    "Explain what has happened to the picture.", "Do the two versions differ, and how?", "List the change.",
    "I took two pictures. What has become different?", "What would I have to do to get the second image?",
    "Name what is not as it was before.", "By which change did the second picture come about?",
    "Find the difference, please.",
    "Give me a short description of the change.", "Are these images equal? If not, say why.", "What was altered here?",
    "Between the earlier and the later version, what was modified?", "Summarize the change in a few words.",
)

INSTRUCTIONS: dict[str, tuple[str, ...]] = {
    "scenes": (*QUESTIONS, "Describe the change between the scenes.", "What is different in the second image?",
               "How does the second scene differ from the first?", "Has anything changed?", "Compare the two scenes.",
               "Say what happened between the two images.", "Name the difference between the two scenes.",
               "What happened on the table?"),
    "edits": (*QUESTIONS, "What edit turns the first image into the second?", "Describe the edit as an instruction.",
              "How was the image edited?", "What was done to the photo?", "Which edit was made?",
              "Tell me how to get the second picture from the first.", "Write the instruction for this edit.",
              "How must the first image be edited to get the second?", "Which change was made to the picture?"),
}


def pick(rng: Generator, options: tuple[str, ...]) -> str:
    """Return one of the options at random, each with equal probability."""
    return options[int(rng.integers(len(options)))]


def say(rng: Generator, word: str) -> str:
    """Return a random synonym of the word, or the word itself if it has none."""
    return pick(rng, SYNONYMS.get(word, (word,)))


def phrasings(rng: Generator, templates: tuple[str, ...], count: int) -> list[str]:
    """Return `count` different caption templates in random order; all templates if there are fewer than `count`."""
    return [templates[int(i)] for i in rng.permutation(len(templates))[:count]]
