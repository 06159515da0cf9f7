"""Write the prompt sets for models that have none of their own: calibration, held_out and showcase, which share no scene.

Seventeen kinds of scene (people, animals, text in the picture, counting, several colours, motion, ...), twelve each, spread evenly over the
sets. Some get a style or a longer description, so that prompts are from 1 to about 70 words long.
"""

from itertools import pairwise

import numpy as np
from common import GENERAL_PROMPTS_FILE, write_json

SEED = 5
CALIBRATION, HELD_OUT, SHOWCASE = 64, 128, 12

SCENES = {
    "landscape": (
        "a lighthouse on a rocky coast at dusk", "a desert road under a stormy sky", "terraced rice fields seen from above",
        "a mountain village under the northern lights", "a frozen lake with cracks in the ice", "poppies along a railway line",
        "fog lifting from a pine forest", "a volcano behind a fishing harbour", "salt flats after rain, mirroring the clouds",
        "a canyon river at noon", "dunes with one set of footprints", "an orchard in blossom beside a stone wall"),
    "city": (
        "an old bookshop with warm lamps, seen through a rainy window", "a tram in a narrow street at night",
        "laundry between balconies in a southern alley", "a rooftop garden above a busy crossing", "an empty subway platform",
        "a market hall with iron arches", "a bridge with a thousand padlocks", "scaffolding around a cathedral tower",
        "a petrol station in the desert, neon on", "a courtyard with a dry fountain", "a ferry terminal before sunrise",
        "graffiti on a shutter that is half open"),
    "animals": (
        "a red fox asleep in fresh snow", "two parrots on a branch, one green and one red", "a tabby cat looking out of a window",
        "a jellyfish in dark water", "an elephant calf under its mother", "a heron standing in reeds",
        "a beetle with a metallic shell", "sheep blocking a mountain road", "an octopus opening a jar",
        "a horse shaking off water", "a hedgehog in autumn leaves", "a snow leopard on a cliff"),
    "people": (
        "a woman with grey hair and round glasses", "a man laughing at a kitchen table", "a child in a yellow raincoat",
        "a welder behind a dark mask", "a violinist tuning backstage", "twins with the same freckles",
        "a fisherman mending a net", "a dancer caught in mid-air", "a nurse at the end of a night shift",
        "an old couple sharing an umbrella", "a goalkeeper covered in mud", "a girl reading by torchlight under a blanket"),
    "food": (
        "a bowl of ramen with a soft egg", "pancakes with blueberries and syrup", "a loaf of rye bread, cut open",
        "oysters on crushed ice", "a market stall of spices in cones", "a wedding cake with sugar roses",
        "dumplings in a bamboo steamer", "a half-eaten sandwich", "espresso pouring into a glass", "a pomegranate torn apart",
        "a picnic on a checked blanket", "noodles hanging up to dry"),
    "objects": (
        "a glass of water on a marble table", "a violin on a velvet chair", "a plush bear on a suitcase",
        "a rusty key in an open palm", "a typewriter with one sheet of paper", "a chessboard in the last moves of a game",
        "a broken vase mended with gold", "a compass on an old map", "an hourglass lying on its side",
        "a bicycle leaning on a yellow wall", "a stack of worn paperbacks", "a soldering iron and a circuit board"),
    "text": (
        'a street sign that says "OPEN LATE" in blue neon', 'a handwritten note that says "back in five minutes"',
        'a chalkboard with the words "soup of the day"', 'a T-shirt printed with "GRADIENT DESCENT"',
        'a birthday cake with "Happy 40th" in icing', 'a book cover titled "The Quiet Machine"',
        'a departure board showing "Lisbon 07:45"', 'a tattoo that reads "stay curious"', 'a jar labelled "sea salt"',
        'a billboard with the single word "PAUSE"', 'a postcard that begins with "Dear Anna,"',
        'a newspaper headline "Comet returns tonight"'),
    "counting": (
        "four apples and one pear on a blue plate", "exactly three candles, two of them lit", "six umbrellas in a row",
        "a shelf with five mugs and one empty hook", "seven geese flying in formation", "two chairs facing one table",
        "nine buttons on a grey coat", "a dozen eggs with one missing", "three boats on a calm lake",
        "one red balloon among ten white ones", "five fingers holding four cards", "two moons above one mountain"),
    "colours and places": (
        "a green cube on top of a red ball", "a blue door between two orange windows", "a white cat to the left of a black dog",
        "a yellow book under a purple lamp", "a silver spoon inside a clear jar, beside a brown egg",
        "a pink flamingo behind a grey fence", "a red car parked in front of a turquoise house",
        "a golden ring around a green bottle", "a violet scarf over a beige armchair", "an orange kite above a navy tent",
        "a striped towel next to a dotted one", "a black umbrella on a white staircase"),
    "interiors": (
        "a tiny kitchen seen from the corner", "a greenhouse full of ferns", "a library with a rolling ladder",
        "a barber shop at closing time", "a spiral staircase from below", "an attic with dust in the light",
        "a laboratory with coloured flasks", "a theatre before the curtain", "a workshop with tools on the wall",
        "a hotel corridor with a patterned carpet", "a bathroom with green tiles", "a train compartment with velvet seats"),
    "fantasy": (
        "an astronaut riding a horse", "a wooden robot playing chess in a park", "a whale swimming between skyscrapers",
        "a dragon made of paper", "a door standing alone in a meadow", "a city on the back of a turtle",
        "a knight with a lantern in a cave", "a library on the moon", "a tree that grows light bulbs", "a fox in a judge's robe",
        "a staircase into the clouds", "a ship sailing on sand"),
    "macro": (
        "a dewdrop on a leaf", "the eye of a gecko", "salt crystals", "the teeth of a zip", "pollen on a bee's legs",
        "a cracked phone screen", "the edge of a feather", "bubbles in amber", "moss on a brick", "the tip of a fountain pen",
        "frost on a window", "threads of a woven cloth"),
    "motion": (
        "a child flying a kite on a windy beach", "a skateboarder in mid-jump", "milk splashing into tea",
        "a train rushing past a platform", "a dog shaking itself dry", "a pole vaulter above the bar",
        "sparks from a grinding wheel", "a flag torn by the wind", "a glass falling from a table", "a flock of starlings turning",
        "a potter at a spinning wheel", "a wave breaking over a pier"),
    "drawing": (
        "a whale under a ship, woodcut", "a bridge, drawn with one line", "a botanical plate of an artichoke",
        "a floor plan of a castle", "a comic panel of a surprised cook", "a map of an island that does not exist",
        "a stained glass window of a hare", "a child's crayon drawing of a family", "a blueprint of a flying bicycle",
        "a charcoal study of hands", "a pixel-art tavern", "a tarot card of the wheel"),
    "short": (
        "pizza", "a portrait", "autumn", "robots", "blue", "an old man", "silence", "a castle", "rain", "fruit", "speed", "home"),
    "light": (
        "a paper boat in a puddle, city lights reflected", "a single lamp in a dark field", "sunbeams in a barn",
        "a face lit by a phone", "a candle behind frosted glass", "fireworks over a harbour", "a solar eclipse above a crowd",
        "headlights in a snowstorm", "a prism on a white wall", "lanterns on a river", "moonlight on a tiled roof",
        "a lightning strike seen from a plane"),
    "machines": (
        "a steam train crossing a stone bridge", "a crane lifting a glass panel", "a tractor at the edge of a field",
        "a submarine in dry dock", "the gears of a tower clock", "an espresso machine taken apart",
        "a wind turbine blade on a lorry", "a sewing machine by a window", "a rocket on its launch pad at dawn",
        "a rowing machine in an empty gym", "a printing press with wet ink", "a telescope with its dome open"),
}
AS_THEY_ARE = ("short", "drawing")
STYLES = (
    "", "", "", "", ", oil painting", ", watercolour", ", black and white film", ", studio light", ", long exposure", ", isometric drawing",
    ", shallow depth of field", ", seen from above", ", soft morning light", ", flat illustration", ", 35 mm photograph", ", pencil sketch")
DETAILS = (
    ". The light comes from the left and is warm; the background is out of focus, and small things lie about that tell of someone who has "
    "just left. Colours are muted except for one, which draws the eye. The picture is sharp where it matters, with visible grain, and "
    "nothing in it looks posed",
    ". Wide view with much empty space above, low horizon, late afternoon. Long shadows run towards the viewer, the air is slightly hazy, "
    "the ground is wet from a shower that has just passed, and every surface shows its age: scratches, dust, worn paint",
    ". Seen close up and a little from below, with strong contrast between a dark foreground and a bright, simple background. The palette "
    "is limited to three colours. Fine detail in the textures, clean edges, and a calm, almost symmetrical composition",
)


def main() -> None:
    rng = np.random.default_rng(SEED)
    mixed = [[scenes[i] for i in rng.permutation(len(scenes))] for scenes in SCENES.values()]
    order = [kind[turn] for turn in range(len(mixed[0])) for kind in mixed]  # one of each kind after the other: every set has all kinds
    prompts = []
    for scene in order:
        style, detail = STYLES[rng.integers(len(STYLES))], DETAILS[rng.integers(len(DETAILS))] if rng.random() < 0.15 else ""
        prompts.append(scene if any(scene in SCENES[kind] for kind in AS_THEY_ARE) else f"{scene}{style}{detail}")
    ends = np.cumsum([0, CALIBRATION, HELD_OUT, SHOWCASE])
    sets = [prompts[first:last] for first, last in pairwise(ends)]
    write_json(GENERAL_PROMPTS_FILE, dict(zip(("calibration", "held_out", "showcase"), sets)))


if __name__ == "__main__":
    main()
