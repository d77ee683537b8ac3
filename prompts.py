"""Prompt sets, and which prompts an epoch draws.

A set is a built-in name ("words", "ocr", "geneval"), or a file or directory of the user's: one prompt a line, or
GenEval metadata (arXiv 2310.11513), one JSON object a line. The splits "train" and "test" of a built-in set are
disjoint; a directory has a file for each; a single file serves as both.
"""

import json
import os
import re
from dataclasses import dataclass, field
from hashlib import sha256
from io import StringIO
from itertools import combinations, permutations, product
from random import Random

import numpy as np

SPLITS = ("train", "test")
SPLIT_FILES = ("{}.txt", "{}_metadata.jsonl")
SEED = 0  # of the built-in sets: what is in them, and which split holds it


@dataclass(frozen=True)
class Prompt:
    """A prompt and what a reward needs to know beyond its text: {} or, from GenEval metadata, the whole object."""

    text: str
    metadata: dict = field(default_factory=dict, hash=False)


def load_prompts(source: str, split: str) -> list[Prompt]:
    """The prompts of `source` (a built-in name, a directory or a file) for `split` ("train" or "test").

    A built-in name wins over a path of the same name: write "./words" for a directory called words.

    Raises FileNotFoundError where there is no such file, ValueError where its contents are not prompts or the split is
    neither; both say in one line where the fault is and what to do.
    """
    _check_split(split)
    if source in BUILT_IN:
        return BUILT_IN[source](split)
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        path = _split_file(path, split)
    elif not os.path.isfile(path):
        raise FileNotFoundError(f"prompts {source!r}: no such file or directory; give a .txt or .jsonl file, "
                                f"a directory, or a built-in set: {', '.join(BUILT_IN)} "
                                "(the README tells how to fetch published ones)")
    extension = os.path.splitext(path)[1].lower()
    if extension not in (".txt", ".jsonl"):
        raise ValueError(f"prompts {source!r}: unknown kind of file {extension!r}; give a .txt file (one prompt a "
                         "line) or a .jsonl file (one GenEval object a line)")
    lines = _numbered_lines(path)
    prompts = ([Prompt(line) for _, line in lines] if extension == ".txt" else
               [_metadata_prompt(line, f"{path}:{number}") for number, line in lines])
    if not prompts:
        raise ValueError(f"{path}: holds no prompts; write one a line")
    return prompts


def epoch_prompt_indices(num_prompts: int, groups_per_epoch: int, seed: int, epoch: int) -> list[int]:
    """Which prompt each group of `epoch` (from 0) gets: `groups_per_epoch` indices below `num_prompts`.

    The set is gone through in passes, each a permutation seeded by (seed, pass); an epoch takes the next
    `groups_per_epoch` places of that endless sequence. So every prompt is drawn once before any is drawn twice, and
    the draw is a function of its arguments alone: every rank computes the same, and resuming needs no state.

    Raises ValueError for a set or an epoch without prompts, or a negative seed or epoch.
    """
    for name, value, least in (("num_prompts", num_prompts, 1), ("groups_per_epoch", groups_per_epoch, 1),
                               ("seed", seed, 0), ("epoch", epoch, 0)):
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
    start, stop = epoch * groups_per_epoch, (epoch + 1) * groups_per_epoch
    indices = []
    for pass_index in range(start // num_prompts, (stop - 1) // num_prompts + 1):
        order = np.random.default_rng([seed, pass_index]).permutation(num_prompts)
        first = pass_index * num_prompts
        indices += order[max(start - first, 0):stop - first].tolist()
    return indices


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: must be one of {', '.join(SPLITS)}")


def _split_file(directory: str, split: str) -> str:
    kinds = [kind for kind in SPLIT_FILES
             if any(os.path.isfile(os.path.join(directory, kind.format(name))) for name in SPLITS)]
    if len(kinds) == 2:
        raise ValueError(f"{directory}: holds both plain prompts and GenEval metadata; name the file you mean, "
                         f"such as {os.path.join(directory, SPLIT_FILES[0].format(split))}")
    for kind in kinds:
        path = os.path.join(directory, kind.format(split))
        if os.path.isfile(path):
            return path
    expected = " or ".join(kind.format(split) for kind in kinds or SPLIT_FILES)
    raise FileNotFoundError(f"{directory}: no {expected} in this directory; add it, "
                            "or name a file to use for both splits")


def _numbered_lines(path: str) -> list[tuple[int, str]]:
    with open(path, "rb") as file:
        content = file.read()
    try:
        text = content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        number = len(re.split(b"\r\n|\r|\n", content[:error.start]))
        raise ValueError(f"{path}:{number}: not UTF-8: byte {error.start} of the file is "
                         f"0x{content[error.start]:02x}; save it as UTF-8") from None
    # StringIO ends lines at \n, \r\n and \r alone; str.splitlines would also cut JSON strings at U+2028.
    stripped = ((number, line.strip()) for number, line in enumerate(StringIO(text, newline=None), start=1))
    lines = [(number, line) for number, line in stripped if line]
    if "\0" in text:
        number = next(number for number, line in lines if "\0" in line)
        raise ValueError(f"{path}:{number}: holds a zero byte, as text in UTF-16 does; save it as UTF-8")
    return lines


def _metadata_prompt(line: str, place: str) -> Prompt:
    try:
        metadata = json.loads(line)
        json.dumps(metadata, ensure_ascii=False).encode()      # which half of a surrogate pair is not; nothing could read it
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON: {error.msg} at column {error.colno}; write one object a line") from None
    except UnicodeEncodeError:
        raise ValueError(f"{place}: {_shortened(line)} holds half of a surrogate pair, which is no character") from None
    except (ValueError, RecursionError):                       # what Python's own limits refuse
        raise ValueError(f"{place}: {_shortened(line)} holds a number of thousands of digits, or is nested too deeply") from None
    text = metadata.get("prompt") if isinstance(metadata, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'{place}: {_shortened(line)} is not an object with a non-empty string "prompt"; add one')
    for clause in ("include", "exclude"):
        entries = metadata.get(clause, [])
        if not isinstance(entries, list):
            raise ValueError(f'{place}: "{clause}" is {_shortened(json.dumps(entries))}; make it a list of objects')
        for entry in entries:
            if not _is_object_count(entry):
                raise ValueError(f'{place}: "{clause}" entry {_shortened(json.dumps(entry))} needs a "class" (a name) '
                                 'and a "count" (a whole number, at least 1)')
    return Prompt(text.strip(), metadata)


def _is_object_count(entry) -> bool:
    # type() and not isinstance(): True is an int.
    return (isinstance(entry, dict) and isinstance(entry.get("class"), str) and entry["class"].strip() != ""
            and type(entry.get("count")) is int and entry["count"] >= 1)


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


# ---- words: what the bundled model can spell ----------------------------------------------------------------------

VOCABULARY = """
ace act add age aid aim air ale amp ant any ape apt arc ark arm art ash ask awe axe bad bag ban bar bat bay bed bee
beg bet bib bid big bin bit bow box boy bud bug bun bus but buy bye cab can cap car cat cob cod cog cot cow coy cry
cub cue cup cut dab dad dam day den dew did dig dim dip doe dog dot dry dub due dug duo dye ear eat ebb eel egg ego
elf elk elm emu end era eve ewe eye fad fan far fax fed fee few fig fin fir fit fix fly foe fog for fox fry fun fur
gap gas gel gem get gig gnu got gum guy gym had ham has hat hay hem hen her hex hid him hip his hit hop hot how
hub hue hug hum hut ice icy ink inn ion its ivy jab jam jar jaw jay jet jig job jog jot joy jug keg ken key kid kin
kit lab lad lag lap law lay led leg let lid lip lit log lot low mad man map mat max may men met mid mix mob mom mop
mow mud mug nab nap net new nib nil nod nor not now nut oak oar oat odd off oil old one opt orb ore our out owl own
pad pal pan par pat paw pay pea peg pen pet pew pie pin pit ply pod pop pot pro pry pub pug pup put quo rag ram ran
rap raw ray red rib rid rig rim rip row rub rug run rye sad sap sat saw say sea see set sew she shy sip sir sit six
ski sky sly sob son sow soy spa spy sub sum sun tab tag tan tap tar tax tea ten the tie tin tip toe ton too top
toy try tub tug two urn use van vat vet vex via vie vow wag wax way web wed wet who why wig win wit woe won wow yak
yam yap yaw yes yet yew you zap zen zig zip zoo

able acid aqua arch area army aunt away axis axle baby back bake ball band bank barn bath bead beak beam bean bear
belt bend best bike bird blue boat bold bone book boot bowl bulb bush busy buzz cage cake calm camp cane card cart
cave chef chin city clay clip club coal coat code coin cold cook cool copy cork corn cozy crab crew crow cube curl
dark dawn deep deer desk dial dice dish dive dock doll dome door dove down drum duck dusk dust each earn east easy
echo edge envy epic even ever exam exit face fact fair farm fast feed fern file film fire fish five fizz flag flat
flex flow foam fold folk food foot fork four free frog fuel fuzz gate gaze gift glad glow glue goal goat gold good
gown gray grid grow gulf hair half hall hand harp hawk haze head heap heat herb herd hero high hill hive holy home
hood hook hope horn hour huge hymn icon idea inch iron isle item jade jazz jeep join joke jolt jump junk jury
just kale keen keep kelp kept kilt kind king kite kiwi knee knit know knot lace lake lamb lamp land lane lava
lawn lazy leaf left lens life lily lime line link lion loaf lock loom loud luck lynx mail main make mask maze meal
melt menu milk mill mind mint mole monk moon moss moth move myth name navy neck nest news next nine node noon nose
note oath obey oboe onyx open oval oven over oxen pace page palm park path pave peak pear pine pink plan play plum
poem pond pony pool port puma quad quay quit quiz race raft rail rain reef rice ring road robe rock roof room
rope rose ruby sail salt sand seal seed ship shoe silk sing sink size skip sled snow soap sock sofa song soup star
stem step surf swan swim tail tale tank taxi team tent text tide tile time toad town tray tree trip tuba tuna turn
twig twin undo unit upon urge vase vast veil vein verb very vest view vine visa void volt vote wade wait walk wall
wand warm wave waxy west whip wick wide wild wind wing wink wire wise wolf wood wool word work wrap wren yard yarn
yawn year yell yoga yolk zeal zero zest zinc zone zoom

acorn actor adapt alarm album alert amaze amber angle apple apron arena arrow atlas attic audio award bacon badge
baker banjo basil beach berry bison blaze blend block bloom board bonus brain brave bread brick bride brisk broom
brown brush buyer cabin cable camel candy canoe cargo chair chalk charm chess chief choir cider civic clamp cliff
climb clock cloud clove coach cobra cocoa comet comic coral couch craft crane crazy cream crisp crown crust cycle
daily dairy daisy dance diary digit diner dizzy dozen draft dream dress drive eagle early earth easel eight elbow
ember enjoy equal erase event exact extra fable fairy feast fence fever fiber field fifty flame flask fleet flock
floor flour fluid flute focus forge found frame fresh frost fruit fudge gecko ghost giant glass globe
glove grain grape graph grass green grill group guard guide habit happy hazel heart hedge honey horse hotel
house human humor igloo image index inlet ivory jeans jelly jewel joint joker judge juice jumbo kayak kebab khaki
kneel knife knock koala label lance large laser latch laugh layer learn lemon level light lilac linen lunar lunch
lyric magic mango maple march maxim medal melon mercy metal minor mixed model money month motor mount mouse mouth
movie music ninja noble north novel nurse nylon oasis ocean olive onion opera orbit otter oxide ozone paint panda
panel paper party pasta patio peach pearl pedal phone photo piano pilot pixel pizza plain plant plate plaza plaid
polka poppy pouch power prize proxy pulse puppy quack quail quart queen query quest quick quiet quilt quite quota
quote radar radio raven razor ready relax ridge river robin robot royal ruler salad salsa sauce scarf scout shade
shark sheep shelf shell shirt siren skate skirt sleep slice smile snack snail solar sound space spark spice spoon
squid stage stamp steam stone storm stove sugar sunny sushi swift syrup table tiger toast topaz topic torch total
tower toxic track train tulip tunic tutor twist uncle under unity upper urban usual valid valve vapor vault
video villa vinyl viola visit vital vivid vixen vocal voice wafer wagon waist waltz watch water whale wheat wheel
white widow wider world wrist xenon yacht yeast yield young youth yummy zebra zesty
""".split()

WORDS_TEST_PER_LENGTH = {3: 43, 4: 43, 5: 42}


def words(split: str) -> list[str]:
    """The words of `split` ("train" or "test"), lengths mixed, in an order that never changes."""
    _check_split(split)
    # By hash, not by a random generator: the bundled model's weights rest on this split, whatever the Python version.
    ordered = sorted(VOCABULARY, key=lambda word: sha256(word.encode()).digest())
    test = {word for length, count in WORDS_TEST_PER_LENGTH.items()
            for word in [word for word in ordered if len(word) == length][:count]}
    return [word for word in ordered if (word in test) == (split == "test")]


def word_prompts(split: str) -> list[Prompt]:
    """Prompts `the word "lamp"`; 3 to 5 lower-case letters, 128 of them held out."""
    return [Prompt(f'the word "{word}"') for word in words(split)]


# ---- ocr: scenes with a quoted text, for models that know what a shop sign is ------------------------------------

OCR_SCENES = """
A wooden shop sign above a narrow doorway that reads {}
A neon sign glowing {} in the window of a late-night diner
A chalkboard outside a small cafe with {} written in white chalk
A birthday cake on a kitchen table with {} piped in blue icing
A stack of old books, the top one titled {} in gold letters
A yellow road sign on an empty desert highway saying {}
A faded movie poster on a brick wall with the title {}
A paper coffee cup on a windowsill, its sleeve printed with {}
A hot air balloon over green hills with a banner reading {}
A street mural in bright colors spelling {} across a long wall
A grey cat sitting beside a cardboard sign that says {}
A robot in a workshop holding up a metal plate engraved with {}
A white cotton t-shirt on a hanger with {} printed on the chest
A fishing boat moored at dawn, the name {} painted on its bow
A vintage travel poster of snowy mountains with the headline {}
A train station departure board showing {} in orange lights
A glass jar of honey with a handwritten label that says {}
A brass plaque on a stone gatepost engraved with {}
A cinema marquee at night announcing {} in black letters
A sandy beach with {} drawn in large letters near the waves
A delivery van parked in the rain with {} painted on its side
A mailbox at the end of a country lane marked {}
A spaceship corridor with a warning panel that flashes {}
A child's drawing of a house under a rainbow, titled {}
A newspaper on a park bench with the front-page headline {}
A wine bottle in candlelight whose label reads {}
A market stall full of oranges with a paper sign saying {}
A stained glass window with the words {} along the bottom
A skateboard leaning on a fence, its deck lettered {}
A soccer fan in a crowded stadium waving a flag that says {}
A subway wall of white tiles with {} set in a mosaic
A snow-covered cabin with {} carved over the door
A desk calendar next to a plant, showing the note {}
A laptop in a dark room, its screen filled with the text {}
A wooden crate in a warehouse stencilled with {}
A pink donut box tied with string and stamped {}
A lighthouse on a cliff with {} painted around its tower
A black guitar case covered in stickers, the largest reading {}
A garden gate with a small enamel sign that says {}
A food truck under string lights with the name {} on its awning
A postcard of a quiet harbor with {} in curly script
A baseball cap on a wooden bench embroidered with {}
A museum wall with a single framed print that says {}
A bakery window at sunrise with {} lettered on the glass
A red phone box with a note taped inside reading {}
A leather bracelet beside a compass, stamped with {}
A tall office tower at dusk with {} in lights along the roof
A wizard's spell book open at a page headed {}
A tin lunch box on a school desk labelled {}
A winding forest trail with a carved signpost pointing to {}
A barn painted red with {} in huge white letters
A paper lantern floating on a river, inked with {}
A knitted scarf laid flat with {} worked in green wool
A race car at the starting line with {} across its hood
A fortune cookie broken open, the slip inside reading {}
A library shelf with a brass label that says {}
A green hiking badge sewn on a backpack, reading {}
A theater stage with {} painted on the backdrop
A frosty window on which someone has written {} with a finger
A pocket watch lying open, its lid engraved {}
A circus tent at twilight with a banner announcing {}
A science fair display board with the title {}
A clay pot on a sunny balcony hand-painted with {}
A billboard beside a rainy motorway advertising {}
""".strip().splitlines()

OCR_QUALITIES = """
Amber Ancient Bright Broken Clever Copper Crystal Daily Distant Electric Endless First Flying Forgotten Fresh Gentle
Golden Happy Hidden Honest Humble Jolly Last Little Lucky Midnight Modern Northern Paper Perfect Proud Purple Quiet
Royal Secret Silver Simple Sleepy Southern Sunny Velvet Wandering Wild Winter
""".split()

OCR_THINGS = """
Acorn Anchor Bakery Bicycle Bridge Cactus Canyon Castle Comet Compass Dragon Falcon Forest Fox Galaxy Garden Harbor
Harvest Horizon Island Journey Jungle Kettle Kitchen Lantern Library Lighthouse Market Meadow Melody Mountain Ocean
Orchard Owl Penguin Picnic Planet Puzzle Rabbit River Rocket Sparrow Station Story Summer Teapot Thunder Tiger
Valley Voyage Whistle Window Workshop Zebra
""".split()

OCR_NUMBERED = "Bus Chapter Exit Gate Hangar Lane Locker Pier Platform Route Suite Track".split()

OCR_PHRASES = """
Open / Closed / Welcome / Sold Out / Fresh Bread / Hot Soup / Free Hugs / Mind the Gap / Keep Right / No Parking
Wet Paint / Push / Pull / Handle With Care / This Way Up / Beware of the Dog / Please Knock / Back in Five Minutes
Ring for Service / Quiet Please / Stay Curious / Dream Big / Happy Birthday / Good Morning / Thank You / Best in Show
Congratulations / Made by Hand / Since 1924 / Grand Opening / Half Price / Two for One / Last Chance / Now Hiring
Live Music / Coming Soon / The End / Once Upon a Time / To Be Continued / Lost and Found / Home Sweet Home / Enjoy
Save the Bees / Plant More Trees / Read More Books / Drink More Water / Take It Easy / Follow the Light / Just Begin
Every Day Counts / Better Together / Never Give Up / Think Twice / Look Up / Keep Going / Slow Down / Watch Your Step
Staff Only / Tickets Here / Coats and Bags / Mystery Tour / Lemonade / Strawberry Jam / Apple Pie / Cold Brew
Do Not Feed the Ducks / Love Grows Here / Ask Me Anything / Out to Lunch / Made in the Alps / Room for One More
Gone Fishing / Under New Management / Danger / Caution / Detour / Adventure Awaits / Breathe / Imagine / Explore
""".strip().replace("\n", " / ").split(" / ")

OCR_TEST_TEXTS = 300
OCR_SCENES_PER_TEXT = 5


def ocr_prompts(split: str) -> list[Prompt]:
    """Scenes with one text in double quotes; the texts of the two splits are disjoint, not only the prompts."""
    _check_split(split)
    rng = Random(SEED)
    texts = [f"{quality} {thing}" for quality, thing in product(OCR_QUALITIES, OCR_THINGS)]
    texts += [f"{place} {number}" for place, number in product(OCR_NUMBERED, range(2, 32))]
    texts += OCR_PHRASES
    rng.shuffle(texts)
    scenes = [rng.sample(OCR_SCENES, OCR_SCENES_PER_TEXT) for _ in texts]
    chosen = slice(OCR_TEST_TEXTS) if split == "test" else slice(OCR_TEST_TEXTS, None)
    prompts = [Prompt(scene.format(f'"{text}"'))
               for text, text_scenes in zip(texts[chosen], scenes[chosen]) for scene in text_scenes]
    rng.shuffle(prompts)
    return prompts


# ---- geneval: objects, numbers, colours and places, after GenEval (arXiv 2310.11513) -----------------------------

GENEVAL_OBJECTS = [name.strip() for name in """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag,
tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard,
tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot,
hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, computer mouse,
tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors,
teddy bear, hair drier, toothbrush
""".split(",")]
GENEVAL_COLORS = "red orange yellow green blue purple pink brown black white".split()
GENEVAL_POSITIONS = ("left of", "right of", "above", "below")
NUMBER_WORDS = {2: "two", 3: "three", 4: "four"}
IRREGULAR_PLURALS = {"person": "people", "sheep": "sheep", "knife": "knives", "computer mouse": "computer mice"}
COUNTED_BY = {"skis": "pair", "scissors": "pair", "broccoli": "head"}


def _a(name: str, color: str = "") -> str:
    phrase = f"{color} {name}".strip()
    if name in COUNTED_BY:
        phrase = f"{COUNTED_BY[name]} of {phrase}"
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def _plural(name: str) -> str:
    if name in COUNTED_BY:
        return f"{COUNTED_BY[name]}s of {name}"
    return IRREGULAR_PLURALS.get(name) or name + ("es" if name.endswith(("s", "ch", "sh")) else "s")


def _single_object(name):
    return dict(include=[{"class": name, "count": 1}], prompt=f"a photo of {_a(name)}")


def _two_object(pair):
    return dict(include=[{"class": name, "count": 1} for name in pair],
                prompt=f"a photo of {_a(pair[0])} and {_a(pair[1])}")


def _counting(name, count):
    return dict(include=[{"class": name, "count": count}], exclude=[{"class": name, "count": count + 1}],
                prompt=f"a photo of {NUMBER_WORDS[count]} {_plural(name)}")


def _colors(name, color):
    return dict(include=[{"class": name, "count": 1, "color": color}], prompt=f"a photo of {_a(name, color)}")


def _position(pair, position):
    # The second object stands first in the list: a position refers to an earlier entry by its index.
    return dict(include=[{"class": pair[1], "count": 1}, {"class": pair[0], "count": 1, "position": [position, 0]}],
                prompt=f"a photo of {_a(pair[0])} {position} {_a(pair[1])}")


def _color_attr(pair, colors):
    return dict(include=[{"class": name, "count": 1, "color": color} for name, color in zip(pair, colors)],
                prompt=f"a photo of {_a(pair[0], colors[0])} and {_a(pair[1], colors[1])}")


# Task: distinct test prompts, distinct train prompts, copies of each in train. The mix is the one Flow-GRPO trains on,
# 7 position : 5 counting : 3 color_attr : 1 colors : 1 two_object : 0 single_object (here 60 prompts, not none). Only
# 240 counting prompts exist; without copies they would be one draw in sixty.
GENEVAL_SIZES = {"single_object": (20, 60, 1), "two_object": (240, 1000, 1), "counting": (40, 200, 25),
                 "colors": (240, 500, 2), "position": (240, 7000, 1), "color_attr": (240, 3000, 1)}


def geneval_prompts(split: str) -> list[Prompt]:
    """The six tasks of GenEval, in its metadata format. Test holds each prompt once; train repeats those of the tasks
    that have few (GENEVAL_SIZES)."""
    _check_split(split)
    rng = Random(SEED)
    # Each pair in one order only: "a cat right of a dog" must not be tested after training "a dog left of a cat".
    pairs = [tuple(rng.sample(pair, 2)) for pair in combinations(GENEVAL_OBJECTS, 2)]
    colorable = [name for name in GENEVAL_OBJECTS if name != "person"]
    colorable_pairs = [pair for pair in pairs if "person" not in pair]
    tasks = {
        "single_object": (_single_object, product(GENEVAL_OBJECTS)),
        "two_object": (_two_object, product(pairs)),
        "counting": (_counting, product(GENEVAL_OBJECTS, NUMBER_WORDS)),
        "colors": (_colors, product(colorable, GENEVAL_COLORS)),
        "position": (_position, product(pairs, GENEVAL_POSITIONS)),
        "color_attr": (_color_attr, product(colorable_pairs, permutations(GENEVAL_COLORS, 2))),
    }
    prompts = []
    for tag, (describe, cases) in tasks.items():
        num_test, num_train, copies = GENEVAL_SIZES[tag]
        drawn = rng.sample(list(cases), num_test + num_train)
        for case in drawn[:num_test] if split == "test" else drawn[num_test:] * copies:
            metadata = {"tag": tag, **describe(*case)}
            prompts.append(Prompt(metadata["prompt"], metadata))
    rng.shuffle(prompts)
    return prompts


BUILT_IN = {"words": word_prompts, "ocr": ocr_prompts, "geneval": geneval_prompts}
