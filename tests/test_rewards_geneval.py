"""Claims about the reward `geneval`: its rules against cases reasoned by hand, its networks on small random checkpoints.

The checkpoints are of transformers' own classes, saved and loaded in the hub's format; what they find means nothing,
and what is made of it must be what transformers itself and the paper make of it.
"""

import itertools
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import prompts
from engines import geneval
from engines.geneval import Detection, check_prompt, geneval_relations, geneval_score
from harness.report import mean_scores
from harness.scoring import check_reward_prompts
from rewards import build_reward, build_rewards


def at(name, x=0, y=0, confidence=0.95, color=None):
    """A detection of 10 x 10 pixels whose centre is x, y."""
    return Detection(name, confidence, (x - 5, y - 5, x + 5, y + 5), color=color)


def want(name, count=1, **attributes):
    return {"class": name, "count": count, **attributes}


def judge(tag, include, found, exclude=()):
    return geneval_score(found, {"tag": tag, "include": include, "exclude": list(exclude)})


# ---------------------------------------------------------------- the rules

DOG = [want("dog")]
CAT_AND_DOG = [want("cat"), want("dog")]
THREE_DOGS = [want("dog", 3)]
FOUR_DOGS = [want("dog", 4)]
RED_CAR = [want("car", color="red")]
RED_CAR_BLUE_DOG = [want("car", color="red"), want("dog", color="blue")]
TWO_RED_CARS = [want("car", 2, color="red")]
RED_DOG_AND_CAT_LEFT = [want("dog", color="red"), want("cat", position=["left of", 0])]
DOG_AND_RED_CAT_LEFT = [want("dog"), want("cat", color="red", position=["left of", 0])]


def cat_from_dog(relation, cats=1):
    return [want("dog"), want("cat", cats, position=[relation, 0])]


# tag, include, what is seen, what is excluded -> score, strict, accuracy; the terms of each score stand beside it
TABLE = [
    # ---- one class: the term of its count
    ("single_object", DOG, [at("dog")], [], 1, 1, 1),
    ("single_object", DOG, [], [], 0, 0, 0),  # 1 - 1/1
    ("single_object", DOG, [at("cat")], [], 0, 0, 0),
    ("single_object", DOG, [at("dog"), at("cat")], [], 1, 1, 1),  # what nobody asked for does no harm
    ("single_object", DOG, [at("dog")] * 2, [], 0, 0, 1),  # 1 - 1/1; at least one is there
    ("single_object", DOG, [at("dog")] * 3, [], -1, 0, 1),  # 1 - 2/1
    ("single_object", DOG, [at("dog")] * 20, [], -14, 0, 1),  # 16 of them are looked at: 1 - 15/1
    ("single_object", DOG, [at("dog", confidence=0.3)], [], 0, 0, 0),  # not over 0.3
    ("single_object", DOG, [at("dog", confidence=0.31)], [], 1, 1, 1),
    # ---- two classes: the mean of two terms
    ("two_object", CAT_AND_DOG, [at("cat"), at("dog")], [], 1, 1, 1),
    ("two_object", CAT_AND_DOG, [at("dog")], [], 1 / 2, 0, 0),  # 0, 1
    ("two_object", CAT_AND_DOG, [at("cat"), at("dog"), at("dog")], [], 1 / 2, 0, 1),  # 1, 0
    ("two_object", CAT_AND_DOG, [at("cat")] * 2 + [at("dog")] * 3, [], -1 / 2, 0, 1),  # 0, -1
    # ---- counts, over and under; the confidence is 0.9; a fourth is excluded
    ("counting", THREE_DOGS, [at("dog")] * 3, FOUR_DOGS, 1, 1, 1),
    ("counting", THREE_DOGS, [], FOUR_DOGS, 0, 0, 0),
    ("counting", THREE_DOGS, [at("dog")] * 2, FOUR_DOGS, 2 / 3, 0, 0),
    ("counting", THREE_DOGS, [at("dog")] * 4, FOUR_DOGS, 2 / 3, 0, 0),
    ("counting", THREE_DOGS, [at("dog")] * 4, [], 2 / 3, 0, 1),
    ("counting", THREE_DOGS, [at("dog")] * 7, FOUR_DOGS, -1 / 3, 0, 0),  # 1 - 4/3
    ("counting", THREE_DOGS, [at("dog")] * 3 + [at("dog", confidence=0.9)], FOUR_DOGS, 1, 1, 1),
    ("counting", THREE_DOGS, [at("dog")] * 3 + [at("dog", confidence=0.91)], FOUR_DOGS, 2 / 3, 0, 0),
    ("counting", THREE_DOGS, [at("dog")] * 2 + [at("dog", confidence=0.8)], FOUR_DOGS, 2 / 3, 0, 0),
    # ---- colours: count, colour
    ("colors", RED_CAR, [at("car", color="red")], [], 1, 1, 1),
    ("colors", RED_CAR, [at("car", color="blue")], [], 1 / 2, 0, 0),  # 1, 0
    ("colors", RED_CAR, [], [], 0, 0, 0),  # 0, 0
    ("colors", RED_CAR, [at("car", color="red")] * 2, [], 0, 0, 1),  # 0, 0
    ("colors", RED_CAR, [at("car", color="red")] * 3, [], -1 / 2, 0, 1),  # -1, 0
    ("colors", RED_CAR, [at("car", 0, 0, 0.8, "red"), at("car", 0, 0, 0.7, "blue")], [], 0, 0, 1),  # the best is red
    ("colors", RED_CAR, [at("car", 0, 0, 0.7, "red"), at("car", 0, 0, 0.8, "blue")], [], 0, 0, 0),  # the best is blue
    ("colors", TWO_RED_CARS, [at("car", color="red"), at("car", color="blue")], [], 3 / 4, 0, 0),  # 1, 1/2
    ("colors", TWO_RED_CARS, [at("car", color="red")] * 2, [], 1, 1, 1),
    ("colors", TWO_RED_CARS, [at("car", color="red")], [], 1 / 4, 0, 0),  # 1/2, 0
    # ---- two colours: count, colour, count, colour
    ("color_attr", RED_CAR_BLUE_DOG, [at("car", color="red"), at("dog", color="blue")], [], 1, 1, 1),
    ("color_attr", RED_CAR_BLUE_DOG, [at("car", color="blue"), at("dog", color="red")], [], 1 / 2, 0, 0),  # 1, 0, 1, 0
    ("color_attr", RED_CAR_BLUE_DOG, [at("car", color="red"), at("dog", color="red")], [], 3 / 4, 0, 0),  # 1, 1, 1, 0
    ("color_attr", RED_CAR_BLUE_DOG, [at("car", color="red")], [], 1 / 2, 0, 0),  # 1, 1, 0, 0
    # ---- positions: count of the target, count, position
    ("position", cat_from_dog("left of"), [at("dog"), at("cat", -40, 0)], [], 1, 1, 1),
    ("position", cat_from_dog("right of"), [at("dog"), at("cat", 40, 0)], [], 1, 1, 1),
    ("position", cat_from_dog("above"), [at("dog"), at("cat", 0, -40)], [], 1, 1, 1),
    ("position", cat_from_dog("below"), [at("dog"), at("cat", 0, 40)], [], 1, 1, 1),
    ("position", cat_from_dog("left of"), [at("dog"), at("cat", 40, 0)], [], 2 / 3, 0, 0),  # 1, 1, 0
    ("position", cat_from_dog("right of"), [at("dog"), at("cat", -40, 0)], [], 2 / 3, 0, 0),
    ("position", cat_from_dog("above"), [at("dog"), at("cat", 0, 40)], [], 2 / 3, 0, 0),
    ("position", cat_from_dog("below"), [at("dog"), at("cat", 0, -40)], [], 2 / 3, 0, 0),
    ("position", cat_from_dog("below"), [at("dog"), at("cat", 40, 0)], [], 2 / 3, 0, 0),
    ("position", cat_from_dog("left of"), [at("dog"), at("cat")], [], 2 / 3, 0, 0),  # in the same place: no relation
    ("position", cat_from_dog("left of"), [at("cat", -40, 0)], [], 1 / 3, 0, 0),  # 0, 1, 0: there is no target
    ("position", cat_from_dog("left of"), [at("dog")], [], 1 / 3, 0, 0),  # 1, 0, 0
    ("position", cat_from_dog("left of"), [], [], 0, 0, 0),
    ("position", cat_from_dog("left of"), [at("dog")] + [at("cat", -40, 0)] * 2, [], 1 / 3, 0, 1),  # 1, 0, 0
    ("position", cat_from_dog("left of"), [at("dog")] * 2 + [at("cat", -40, 0)], [], 1 / 3, 0, 1),  # 0, 1, 0
    ("position", cat_from_dog("left of", 2), [at("dog"), at("cat", -40, 0), at("cat", -40, 9)], [], 1, 1, 1),
    ("position", cat_from_dog("left of", 2), [at("dog"), at("cat", -40, 0), at("cat", 40, 0)], [], 2 / 3, 0, 0),
    # the benchmark looks at the most confident objects only
    ("position", cat_from_dog("left of"), [at("dog"), at("cat", -40, 0), at("cat", 40, 0, 0.5)], [], 1 / 3, 0, 1),
    ("position", cat_from_dog("left of"), [at("dog"), at("cat", -40, 0, 0.5), at("cat", 40, 0)], [], 1 / 3, 0, 0),
    ("position", cat_from_dog("left of"), [at("dog"), at("dog", -80, 0, 0.5), at("cat", -40, 0)], [], 1 / 3, 0, 1),
    # ---- a colour and a position at once
    ("position", DOG_AND_RED_CAT_LEFT, [at("dog"), at("cat", -40, 0, color="red")], [], 1, 1, 1),
    ("position", DOG_AND_RED_CAT_LEFT, [at("dog"), at("cat", -40, 0, color="pink")], [], 3 / 4, 0, 0),  # 1, 1, 0, 1
    ("position", DOG_AND_RED_CAT_LEFT, [at("dog"), at("cat", 40, 0, color="pink")], [], 1 / 2, 0, 0),  # 1, 1, 0, 0
    ("position", DOG_AND_RED_CAT_LEFT, [at("dog")], [], 1 / 3, 0, 0),  # 1, 0, and one 0 for both
    ("position", RED_DOG_AND_CAT_LEFT, [at("dog", color="red"), at("cat", -40, 0)], [], 1, 1, 1),
    ("position", RED_DOG_AND_CAT_LEFT, [at("dog", color="pink"), at("cat", -40, 0)], [], 1 / 2, 0, 0),  # 1, 0, 1, 0
    # ---- exclude: fewer than its count
    ("two_object", DOG, [at("dog"), at("cat")], [want("cat")], 1, 0, 0),
    ("two_object", DOG, [at("dog"), at("cat")], [want("cat", 2)], 1, 1, 1),
    ("two_object", DOG, [at("dog")], [want("cat"), want("car")], 1, 1, 1),
    ("two_object", DOG, [at("dog"), at("car")], [want("cat"), want("car")], 1, 0, 0),
    ("two_object", DOG, [at("dog"), at("cat", confidence=0.3)], [want("cat")], 1, 1, 1),
]


@pytest.mark.parametrize("tag, include, found, exclude, score, strict, accuracy", TABLE)
def test_a_picture_is_judged_as_reasoned_by_hand(tag, include, found, exclude, score, strict, accuracy):
    metadata = {"tag": tag, "include": include, "exclude": exclude}
    check_prompt("a prompt", metadata)
    assert geneval_score(found, metadata) == (pytest.approx(score, abs=1e-12), strict, accuracy)


def test_the_table_covers_every_tag():
    assert {row[0] for row in TABLE} == set(geneval.GENEVAL_TAGS)


def test_exclude_may_be_left_out():
    assert geneval_score([at("dog")], {"tag": "single_object", "include": DOG}) == (1, 1, 1)


def test_a_wrong_position_earns_nothing():
    # The reference's stray 1 made (1 + 1 + 0 + 1) / 4 of this, and two thirds of a wrong position right.
    score, strict, accuracy = judge("position", cat_from_dog("above"), [at("dog"), at("cat", 0, 40)])
    assert (score, strict, accuracy) == (pytest.approx((1 + 1 + 0) / 3), 0, 0)


@pytest.mark.parametrize(
    "offset, relations",
    [
        # Between 10 x 10 boxes the margin is 2 on each axis.
        ((10, 0), {"right of"}),  # (8, 0) / 10
        ((-10, 0), {"left of"}),
        ((0, 10), {"below"}),
        ((0, -10), {"above"}),
        ((10, 10), {"right of", "below"}),  # (8, 8) / 14.1 = .57
        ((-10, 10), {"left of", "below"}),
        ((10, 4), {"right of"}),  # (8, 2) / 10.8 = .74, .19
        ((-4, -10), {"above"}),
        ((6, 6), set()),  # (4, 4) / 8.5 = .47
        ((2, 0), set()),  # nothing is left of it
        ((4, 0), set()),  # 2 / 4 does not exceed a half
        ((4.2, 0), {"right of"}),  # 2.2 / 4.2 = .52
        ((0, 0), set()),
    ],
)
def test_a_relation_needs_more_than_the_margin_and_half_of_the_direction(offset, relations):
    assert geneval_relations(at("cat", *offset).box, at("dog").box) == relations


def test_the_margin_of_each_axis_is_a_tenth_of_the_sizes_along_it():
    wide, target = (-10, 30, 190, 40), (0, 0, 100, 10)  # offset (40, 30); margins 30 and 2
    assert geneval_relations(wide, target) == {"below"}  # (10, 28) / 50


def scenes(count, seed=0):
    """Random detections and metadata of all kinds, as small worlds where much is right by chance."""
    rng = np.random.default_rng(seed)
    pick = lambda options: options[rng.integers(len(options))]
    for _ in range(count):
        include = []
        for name in ("dog", "cat")[: rng.integers(1, 3)]:
            clause = want(name, int(rng.integers(1, 3)))
            if rng.random() < 0.4:
                clause["color"] = pick(("red", "blue"))
            if include and rng.random() < 0.6:
                clause["position"] = [pick(geneval.GENEVAL_RELATIONS), 0]
            include.append(clause)
        exclude = [want(pick(("dog", "cat")), int(rng.integers(2, 4)))] if rng.random() < 0.3 else []
        found = [
            at(pick(("dog", "cat")), *rng.uniform(0, 100, 2), rng.uniform(0.2, 1), pick(("red", "red", "red", "blue")))
            for _ in range(rng.integers(0, 6))
        ]
        yield found, {"tag": pick(geneval.GENEVAL_TAGS), "include": include, "exclude": exclude}


def test_strict_is_a_score_of_one_with_nothing_excluded_and_implies_accuracy():
    judged = set()
    for found, metadata in scenes(3000):
        score, strict, accuracy = geneval_score(found, metadata)
        unrestricted = geneval_score(found, metadata | {"exclude": []})
        assert score == unrestricted[0] <= 1
        assert unrestricted[1] == (score == 1)
        assert strict <= unrestricted[1] and strict <= accuracy <= unrestricted[2]
        judged.add((score == 1, strict, accuracy))
    assert judged == {(False, 0, 0), (False, 0, 1), (True, 0, 0), (True, 1, 1)}


def test_the_order_of_detections_does_not_matter():
    rng = np.random.default_rng(1)
    for found, metadata in scenes(500):
        shuffled = [found[i] for i in rng.permutation(len(found))]
        assert geneval_score(shuffled, metadata) == geneval_score(found, metadata)


def test_a_mirrored_or_enlarged_picture_is_judged_alike():
    swapped = {"left of": "right of", "right of": "left of"}
    for found, metadata in scenes(500):
        mirrored, enlarged = (
            [Detection(each.name, each.confidence, box(*each.box), color=each.color) for each in found]
            for box in (lambda x0, y0, x1, y1: (100 - x1, y0, 100 - x0, y1), lambda *box: tuple(4 * x for x in box))
        )
        include = [
            clause | {"position": [swapped.get(clause["position"][0], clause["position"][0]), 0]}
            if "position" in clause else clause for clause in metadata["include"]
        ]
        judged = geneval_score(found, metadata)
        assert geneval_score(enlarged, metadata) == judged
        assert geneval_score(mirrored, metadata | {"include": include}) == judged


def test_only_the_colours_that_are_asked_for_matter():
    for found, metadata in scenes(500):
        judged = geneval_score(found, metadata)
        asked = geneval.geneval_color_asked(found, metadata)
        for each in found:
            if each not in asked:
                each.color = None
        assert geneval_score(found, metadata) == judged


# ---------------------------------------------------------------- metadata


def test_the_names_are_those_of_the_built_in_prompts():
    assert list(geneval.GENEVAL_CLASSES) == prompts.GENEVAL_OBJECTS
    assert list(geneval.GENEVAL_COLORS) == prompts.GENEVAL_COLORS
    assert geneval.GENEVAL_RELATIONS == prompts.GENEVAL_POSITIONS
    assert set(geneval.GENEVAL_TAGS) == set(prompts.GENEVAL_SIZES)


@pytest.mark.parametrize("split", prompts.SPLITS)
def test_every_built_in_prompt_can_be_judged(split):
    built_in = prompts.load_prompts("geneval", split)
    check_reward_prompts({"geneval": 1}, [each.text for each in built_in], [each.metadata for each in built_in])


def test_objects_with_null_for_what_they_do_not_have_are_judged_as_without():
    """The library `datasets` writes every field of any object back, null where an object has none."""
    for tag, include, found, exclude, *_ in TABLE:
        nulls = [{"color": None, "position": None} | clause for clause in include]
        metadata = {"tag": tag, "include": nulls, "exclude": exclude or None}
        check_prompt("a prompt", metadata)
        assert geneval_score(found, metadata) == geneval_score(found, {"tag": tag, "include": include, "exclude": exclude})


def with_clause(**change):
    return {"tag": "position", "include": [want("dog"), want("cat") | change]}


@pytest.mark.parametrize(
    "metadata, contents",
    [
        ({}, ["'a photo'", '"tag"', "single_object", ".jsonl"]),
        ({"include": DOG}, ['"tag"', "None"]),
        ({"tag": "colours", "include": DOG}, ["'colours'", "color_attr"]),
        ({"tag": "colors"}, ['"include"', "None", ".jsonl"]),
        ({"tag": "colors", "include": []}, ['"include"', "[]"]),
        ({"tag": "colors", "include": "dog"}, ['"include"', "'dog'"]),
        ({"tag": "colors", "include": ["dog"]}, ['"include"', "'dog'", '"class"']),
        ({"tag": "colors", "include": [{"count": 1}]}, ['"class"', "None"]),
        ({"tag": "colors", "include": [{"class": "dog"}]}, ['"count"', "'dog'", "None"]),
        ({"tag": "colors", "include": DOG, "exclude": 3}, ['"exclude"', "3"]),
        ({"tag": "colors", "include": DOG, "exclude": [want("dgo")]}, ['"exclude"', "'dgo'", "'dog'"]),
        ({"tag": "colors", "include": DOG, "exclude": [want("dog", 0)]}, ['"count"', "0"]),
        (with_clause(**{"class": "mouse"}), ["'mouse'", "did you mean 'computer mouse'?"]),
        (with_clause(**{"class": "xyzzy"}), ["'xyzzy'", "teddy bear"]),
        (with_clause(**{"class": ["cat"]}), ["['cat']"]),
        (with_clause(count=0), ['"count"', "not 0", "at least 1"]),
        (with_clause(count=-2), ["not -2"]),
        (with_clause(count=1.5), ["not 1.5"]),
        (with_clause(count=True), ["not True"]),
        (with_clause(count="2"), ["not '2'"]),
        (with_clause(color="grey"), ["'grey'", "white"]),
        (with_clause(position="left of"), ["'left of'", "[relation"]),
        (with_clause(position=["left of"]), ["['left of']"]),
        (with_clause(position=["beside", 0]), ["'beside'", "left of, right of, above, below"]),
        (with_clause(position=["above", 2]), ["not 2", "earlier entry"]),
        (with_clause(position=["above", 1]), ["not 1", "earlier entry"]),
        (with_clause(position=["above", -1]), ["not -1", "earlier entry"]),
        (with_clause(position=["above", "0"]), ["not '0'"]),
    ],
)
def test_metadata_that_cannot_be_judged_is_an_error_that_names_the_value(metadata, contents):
    with pytest.raises(ValueError) as error:
        check_reward_prompts({"geneval": 1}, ["fine", "a photo"], [{"tag": "colors", "include": DOG}, metadata])
    message = str(error.value)
    assert "\n" not in message and message.startswith("reward 'geneval': prompt 'a photo'")
    for content in contents:
        assert content in message


# ---------------------------------------------------------------- the networks

# COCO's names, as the checkpoint's config has them, and a class that GenEval does not ask for
LABELS = ["dog", "mouse", "remote", "keyboard", "car", "wall"]
RENAMED = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
HEIGHT, WIDTH = 40, 72


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories in the hub's format: {name for `models`: a small random checkpoint}."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import (CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer, Mask2FormerConfig,
                              Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor, SwinConfig)

    torch.manual_seed(0)
    stages = dict(depths=[1] * 4, num_heads=[1] * 4, out_features=["stage1", "stage2", "stage3", "stage4"])
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(image_size=64, embed_dim=8, window_size=4, **stages), id2label=dict(enumerate(LABELS)),
        feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16, dim_feedforward=16,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=6)
    detector = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():  # so that its classes are decided and its masks have edges, as a trained network's
        detector.class_predictor.weight *= 200
        for name, parameter in detector.named_parameters():
            if "mask_embedder" in name:
                parameter *= 8

    characters = sorted(ByteLevel.alphabet())
    pieces = characters + [each + "</w>" for each in characters] + ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=77)
    size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    ids = dict(vocab_size=len(pieces), bos_token_id=len(pieces) - 2, eos_token_id=len(pieces) - 1, pad_token_id=len(pieces) - 1)
    clip = CLIPModel(CLIPConfig(
        text_config=size | ids, vision_config=size | dict(image_size=32, patch_size=8), projection_dim=12))
    with torch.no_grad():  # louder than the library's initial values, so that pictures and words differ in colour
        for name, parameter in clip.named_parameters():
            if "patch_embedding" in name or "token_embedding" in name:
                parameter *= 100
            elif "layers" in name and parameter.ndim == 2:
                parameter *= 5
        clip.text_model.final_layer_norm.weight[:3] *= 8  # and texts in length, which must not weigh

    directories = {name: str(tmp_path_factory.mktemp(name)) for name in ("geneval", "geneval.clip")}
    detector.save_pretrained(directories["geneval"])
    settings = dict(size={"height": 64, "width": 64}, num_labels=len(LABELS))
    Mask2FormerImageProcessor(**settings).save_pretrained(directories["geneval"])
    clip.save_pretrained(directories["geneval.clip"])
    square = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(square, tokenizer).save_pretrained(directories["geneval.clip"])
    return directories


@pytest.fixture(scope="module")
def pictures():
    """(B, H, W, 3) uint8, not square: coloured rectangles."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(24):
        color = lambda: tuple(rng.integers(0, 256, 3).tolist())
        image = Image.new("RGB", (WIDTH, HEIGHT), color())
        for _ in range(4):
            x, y, w, h = rng.integers(0, WIDTH), rng.integers(0, HEIGHT), *rng.integers(5, 30, 2)
            ImageDraw.Draw(image).rectangle([x, y, x + w, y + h], fill=color())
        found.append(np.array(image))
    return np.stack(found)


@pytest.fixture(scope="module")
def metadata(pictures):
    """Prompts of every tag for classes that the small checkpoint finds: a list of B dicts."""
    keyboard, remote = "computer keyboard", "tv remote"
    kinds = [
        {"tag": "single_object", "include": [want(keyboard)]},
        {"tag": "two_object", "include": [want(keyboard), want(remote)]},
        {"tag": "counting", "include": [want(keyboard, 2)], "exclude": [want(keyboard, 3)]},
        {"tag": "colors", "include": [want(keyboard, 2, color="pink")]},
        {"tag": "position", "include": [want(keyboard), want(remote, position=["above", 0])]},
        {"tag": "color_attr", "include": [want(keyboard, 1, color="white"), want(remote, 1, color="pink")]},
    ]
    return [kinds[i % len(kinds)] for i in range(len(pictures))]


def reference_detections(models, pictures):
    """For each picture a list of (COCO's name, confidence, mask (H, W) bool), by transformers' own post-processing."""
    from transformers import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor

    processor = Mask2FormerImageProcessor.from_pretrained(models["geneval"])
    network = Mask2FormerForUniversalSegmentation.from_pretrained(models["geneval"])
    with torch.inference_mode():
        outputs = network(**processor(images=[Image.fromarray(picture) for picture in pictures], return_tensors="pt"))
    pages = processor.post_process_instance_segmentation(
        outputs, threshold=0.3, target_sizes=[(HEIGHT, WIDTH)] * len(pictures), return_binary_maps=True)
    return [[(LABELS[info["label_id"]], info["score"], mask.bool().numpy())
             for info, mask in zip(page["segments_info"], page["segmentation"])] for page in pages]


def reference_colors(models):
    """(picture, name, mask) -> the colour of what the mask covers, by the similarities that CLIP itself returns."""
    from transformers import CLIPModel, CLIPProcessor

    clip = CLIPModel.from_pretrained(models["geneval.clip"])
    processor = CLIPProcessor.from_pretrained(models["geneval.clip"])
    grey = Image.new("RGB", (WIDTH, HEIGHT), "#999")

    def color_of(picture, name, mask):
        mask = Image.fromarray(mask)
        crop = Image.composite(Image.fromarray(picture), grey, mask).crop(mask.getbbox())
        texts = [text for color in prompts.GENEVAL_COLORS for text in (
            f"a photo of a {color} {name}", f"a photo of a {color}-colored {name}", f"a photo of a {color} object")]
        with torch.inference_mode():
            outputs = clip(**processor(text=texts, images=crop, padding=True, return_tensors="pt"))
        colors = torch.stack([three.mean(0) for three in outputs.text_embeds.split(3)])  # of vectors of length 1
        return prompts.GENEVAL_COLORS[int(torch.cosine_similarity(colors, outputs.image_embeds).argmax())]

    return color_of


def in_this_process(models, batch=16):
    return build_rewards({"geneval": 1}, models=models, batch=batch)


def test_objects_are_those_of_transformers_own_post_processing(models, pictures):
    with torch.inference_mode():
        found = geneval.geneval_detector(models["geneval"], "cpu")(pictures)
    overlapping = 0
    for detections, reference in zip(found, reference_detections(models, pictures), strict=True):
        detections = sorted(detections, key=lambda detection: detection.confidence)
        reference = sorted(reference, key=lambda each: each[1])
        for detection, (name, confidence, mask) in zip(detections, reference, strict=True):
            assert detection.name == RENAMED.get(name, name)
            assert detection.confidence == pytest.approx(confidence, abs=2e-6)
            assert (detection.mask == mask).all() and mask.shape == (HEIGHT, WIDTH)
            assert detection.box == Image.fromarray(mask).getbbox()
        overlapping += np.max(sum(detection.mask.astype(int) for detection in detections)) > 1
    assert sum(map(len, found)) > 50 and overlapping  # overlapping instances are all kept, whole


def test_a_colour_is_that_of_the_object_alone_on_grey(models, pictures):
    color_of, pairs, expected = reference_colors(models), [], []
    rng = np.random.default_rng(3)
    for picture in [*pictures, *pictures]:
        mask = Image.new("1", (WIDTH, HEIGHT))
        x, y, w, h = rng.integers(0, WIDTH - 6), rng.integers(0, HEIGHT - 6), *rng.integers(5, 40, 2)
        ImageDraw.Draw(mask).ellipse([x, y, x + w, y + h], fill=1)
        name = ("car", "tv remote", "dog")[rng.integers(3)]
        pairs.append((picture, Detection(name, 0.9, mask.getbbox(), np.array(mask))))
        expected.append(color_of(picture, name, np.array(mask)))
    with torch.inference_mode():
        assert geneval.geneval_color_reader(models["geneval.clip"], "cpu", 7)(pairs) == expected
    assert len(set(expected)) > 3


def test_scores_are_the_rules_on_what_the_networks_find(models, pictures, metadata):
    color_of = reference_colors(models)
    expected = []
    for picture, each, reference in zip(pictures, metadata, reference_detections(models, pictures)):
        detections = []
        for name, confidence, mask in reference:
            name = RENAMED.get(name, name)
            colored = any("color" in clause and clause["class"] == name for clause in each["include"])
            color = color_of(picture, name, mask) if colored else None
            detections.append(Detection(name, confidence, Image.fromarray(mask).getbbox(), color=color))
        expected.append(geneval_score(detections, each))
    scores = in_this_process(models)(pictures, ["a photo"] * len(pictures), metadata)
    score, strict, accuracy = zip(*expected)
    np.testing.assert_allclose(scores["geneval"], score, atol=1e-6)
    np.testing.assert_array_equal(scores["geneval/strict_accuracy"], strict)
    np.testing.assert_array_equal(scores["geneval/accuracy"], accuracy)
    assert len(set(score)) > 4 and len(set(strict)) == len(set(accuracy)) == 2  # they differ


def test_each_tag_has_its_accuracies_and_is_nan_elsewhere(models, pictures, metadata):
    scores = in_this_process(models)(pictures, ["a photo"] * len(pictures), metadata)
    names = {"strict_accuracy", "accuracy"}
    for kind, tag in itertools.product(sorted(names), geneval.GENEVAL_TAGS):
        own = np.array([each["tag"] == tag for each in metadata])
        by_tag = scores[f"geneval/{kind}/{tag}"]
        np.testing.assert_array_equal(by_tag[own], scores[f"geneval/{kind}"][own])
        assert own.any() and np.isnan(by_tag[~own]).all()
        names.add(f"{kind}/{tag}")
    assert set(scores) == {"geneval", "total"} | {f"geneval/{name}" for name in names}


def test_an_evaluation_logs_the_strict_accuracy_of_each_tag(models, pictures, metadata):
    scores = in_this_process(models)(pictures, ["a photo"] * len(pictures), metadata)
    logged = mean_scores("eval", {name: torch.from_numpy(values) for name, values in scores.items()})
    for tag in geneval.GENEVAL_TAGS:
        strict = [value for value, each in zip(scores["geneval/strict_accuracy"], metadata) if each["tag"] == tag]
        assert logged[f"eval/geneval/strict_accuracy/{tag}"] == pytest.approx(np.mean(strict))


def test_a_score_does_not_depend_on_its_batch(models, pictures, metadata):
    whole = in_this_process(models)(pictures, ["a photo"] * len(pictures), metadata)
    order = np.random.default_rng(2).permutation(len(pictures))
    shuffled = in_this_process(models, batch=5)(pictures[order], ["a photo"] * len(order), [metadata[i] for i in order])
    one_by_one = in_this_process(models, batch=1)(pictures, ["a photo"] * len(pictures), metadata)
    for name in whole:
        np.testing.assert_allclose(shuffled[name], whole[name][order], atol=1e-6)
        np.testing.assert_allclose(one_by_one[name], whole[name], atol=1e-6)


def test_the_networks_see_at_most_a_batch_and_record_no_gradients(models, pictures, metadata, monkeypatch):
    from transformers import CLIPModel, Mask2FormerForUniversalSegmentation

    seen = []
    for network, method in ((Mask2FormerForUniversalSegmentation, "forward"), (CLIPModel, "get_image_features")):
        def spy(self, *args, original=getattr(network, method), **inputs):
            seen.append((type(self).__name__, len(inputs["pixel_values"]), torch.is_inference_mode_enabled()))
            return original(self, *args, **inputs)
        monkeypatch.setattr(network, method, spy)
    in_this_process(models, batch=5)(pictures, ["a photo"] * len(pictures), metadata)
    assert [size for name, size, _ in seen if name.startswith("Mask2Former")] == [5, 5, 5, 5, 4]
    assert {name for name, _, _ in seen} == {"Mask2FormerForUniversalSegmentation", "CLIPModel"}
    assert all(size <= 5 and inference for _, size, inference in seen)


def test_a_picture_without_objects_is_judged_without_any(models, metadata, monkeypatch):
    monkeypatch.setattr(geneval, "GENEVAL_CONFIDENCE", 1.0)
    blank = np.full((2, HEIGHT, WIDTH, 3), 128, np.uint8)
    scores = in_this_process(models)(blank, ["a photo"] * 2, metadata[3:5])
    assert scores["geneval"].tolist() == scores["geneval/accuracy"].tolist() == [0, 0]


def test_metadata_that_came_past_the_start_up_check_is_an_error_and_not_a_score(models, pictures):
    score = build_reward("geneval", models=models)
    for name, reason in [("unicorn", "GenEval knows"), ("toothbrush", "COCO's 80 classes")]:  # the second: not of LABELS
        with pytest.raises(ValueError, match=reason) as error:
            score(pictures[:1], ["a photo"], [{"tag": "single_object", "include": [want(name)]}])
        assert repr(name) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_package_is_named(models, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ValueError, match="pip install torch transformers scipy"):
        in_this_process(models)
