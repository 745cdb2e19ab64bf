"""GenEval's verdicts: by hand, by closed form near every threshold, and against a second formulation."""

import itertools
import math
import random
from dataclasses import replace

import pytest

from flowopd.prompts.geneval import COLOURS, OBJECTS, RELATIONS, TAGS, official
from flowopd.records import Prompt
from flowopd.rewards.geneval import Detection, Scene, correct, partial, relations, select, strict
from flowopd.rewards.geneval.verdicts import to_color

EPSILON = 1e-6


def at(x, y, width=10, height=None):
    """A box around a point."""
    height = width if height is None else height
    return (x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def thing(label, score=0.95, color="red", box=None):
    """A detection and its colour."""
    return Detection(label, score, box or at(0, 0)), color


def clause(label, count=1, color=None, position=None):
    entry = {"class": label, "count": count}
    return entry | ({"color": color} if color else {}) | ({"position": list(position)} if position else {})


def scene(*include, tag="two_object", exclude=()):
    return Scene.of(Prompt("a prompt", "geneval", {"tag": tag, "include": list(include), "exclude": list(exclude)}))


def judge(wanted, things):
    """(correct, strict, partial, partial as flow_grpo counts)."""
    names = {id(detection): color for detection, color in things}
    found = select([detection for detection, _ in things], wanted.tag)

    def color(detection):
        return names[id(detection)]

    scores = [partial(found, wanted, color, compat) for compat in ("fixed", "flow_grpo")]
    return correct(found, wanted, color), strict(found, wanted, color), *scores


# -------------------------------------------------------------------------------------------------------------- by hand


A_CAT = clause("cat")
TWO_CATS = clause("cat", 2)
A_RED_CAT = clause("cat", color="red")
A_DOG_LEFT = clause("dog", position=("left of", 0))
CAT = thing("cat")
BLUE_CAT = thing("cat", color="blue")
DOG = thing("dog")
LEFT_DOG, RIGHT_DOG = thing("dog", box=at(-100, 0)), thing("dog", box=at(100, 0))
FAR_LEFT_DOG = thing("dog", box=at(-300, 0))


BY_HAND = {
    # one object: terms [1 - |1 - found|]
    "it is there": ([A_CAT], [CAT], (True, True, 1, 1)),
    "it is not": ([A_CAT], [], (False, False, 0, 0)),
    "another is": ([A_CAT], [DOG], (False, False, 0, 0)),
    "another is too": ([A_CAT], [CAT, DOG], (True, True, 1, 1)),
    "twice": ([A_CAT], [CAT] * 2, (True, False, 0, 0)),
    "three times": ([A_CAT], [CAT] * 3, (True, False, 0, -1)),
    "sixteen times": ([A_CAT], [CAT] * 16, (True, False, 0, -14)),
    "only sixteen are seen": ([A_CAT], [CAT] * 40, (True, False, 0, -14)),
    "too unsure": ([A_CAT], [thing("cat", 0.3)], (False, False, 0, 0)),
    "just sure enough": ([A_CAT], [thing("cat", 0.3001)], (True, True, 1, 1)),
    "the unsure one is not counted": ([A_CAT], [CAT, thing("cat", 0.29)], (True, True, 1, 1)),
    # two objects: the mean of two counts
    "both": ([A_CAT, clause("dog")], [CAT, DOG], (True, True, 1, 1)),
    "one of both": ([A_CAT, clause("dog")], [CAT], (False, False, 1 / 2, 1 / 2)),
    "none of both": ([A_CAT, clause("dog")], [], (False, False, 0, 0)),
    "one of them twice": ([A_CAT, clause("dog")], [CAT, DOG, DOG], (True, False, 1 / 2, 1 / 2)),
    "one of them thrice": ([A_CAT, clause("dog")], [CAT, DOG, DOG, DOG], (True, False, 1 / 2, 0)),
    "the same clause twice": ([A_CAT, A_CAT], [CAT], (True, True, 1, 1)),
    # counts: 1 - |2 - found| / 2
    "two of two": ([TWO_CATS], [CAT] * 2, (True, True, 1, 1)),
    "one of two": ([TWO_CATS], [CAT], (False, False, 1 / 2, 1 / 2)),
    "three of two": ([TWO_CATS], [CAT] * 3, (True, False, 1 / 2, 1 / 2)),
    "four of two": ([TWO_CATS], [CAT] * 4, (True, False, 0, 0)),
    "five of two": ([TWO_CATS], [CAT] * 5, (True, False, 0, -1 / 2)),
    # colours: [count, colour], or [count, 0]
    "the right colour": ([A_RED_CAT], [CAT], (True, True, 1, 1)),
    "the wrong colour": ([A_RED_CAT], [BLUE_CAT], (False, False, 1 / 2, 1 / 2)),
    "no object to colour": ([A_RED_CAT], [], (False, False, 0, 0)),
    "two in the right colour": ([A_RED_CAT], [CAT, CAT], (True, False, 0, 0)),
    "the surest is wrong": ([A_RED_CAT], [thing("cat", 0.99, "blue"), CAT], (False, False, 0, 0)),
    "the surest is right": ([A_RED_CAT], [thing("cat", 0.99, "red"), BLUE_CAT], (True, False, 0, 0)),
    "three in the right colour": ([A_RED_CAT], [CAT] * 3, (True, False, 0, -1 / 2)),
    "one of two in the right colour": (
        [clause("cat", 2, "red")],
        [CAT, BLUE_CAT],
        (False, False, (1 + 1 / 2) / 2, (1 + 1 / 2) / 2),
    ),
    "colours exchanged": (
        [A_RED_CAT, clause("dog", color="blue")],
        [BLUE_CAT, thing("dog", color="red")],
        (False, False, 1 / 2, 1 / 2),
    ),
    "one colour of two": (
        [A_RED_CAT, clause("dog", color="blue")],
        [CAT, thing("dog", color="red")],
        (False, False, 3 / 4, 3 / 4),
    ),
    # positions: [count, count, position]; a wrong one is worth 0, or 0 and 1
    "in place": ([A_CAT, A_DOG_LEFT], [CAT, LEFT_DOG], (True, True, 1, 1)),
    "out of place": ([A_CAT, A_DOG_LEFT], [CAT, RIGHT_DOG], (False, False, 2 / 3, 3 / 4)),
    "on top of it": ([A_CAT, A_DOG_LEFT], [CAT, DOG], (False, False, 2 / 3, 3 / 4)),
    "nothing to be left of": ([A_CAT, A_DOG_LEFT], [LEFT_DOG], (False, False, 1 / 3, 1 / 3)),
    "nothing to place": ([A_CAT, A_DOG_LEFT], [CAT], (False, False, 1 / 3, 1 / 3)),
    "two dogs, both in place": ([A_CAT, A_DOG_LEFT], [CAT, LEFT_DOG, FAR_LEFT_DOG], (True, False, 1 / 3, 1 / 3)),
    "two dogs, the surer in place": (
        [A_CAT, A_DOG_LEFT],
        [CAT, LEFT_DOG, thing("dog", 0.4, box=at(100, 0))],
        (True, False, 1 / 3, 1 / 3),
    ),
    "two dogs, the surer out of place": (
        [A_CAT, A_DOG_LEFT],
        [CAT, thing("dog", 0.96, box=at(100, 0)), LEFT_DOG],
        (False, False, 1 / 3, 1 / 3),
    ),
    "two cats, the surer in place": (  # strict refuses two cats, so the dog has no target
        [A_CAT, A_DOG_LEFT],
        [CAT, thing("cat", 0.4, box=at(-500, 0)), LEFT_DOG],
        (True, False, 1 / 3, 1 / 3),
    ),
    "two of two in place": (
        [A_CAT, clause("dog", 2, position=("left of", 0))],
        [CAT, LEFT_DOG, FAR_LEFT_DOG],
        (True, True, 1, 1),
    ),
    "one of two in place": (
        [A_CAT, clause("dog", 2, position=("left of", 0))],
        [CAT, LEFT_DOG, RIGHT_DOG],
        (False, False, 2 / 3, 3 / 4),
    ),
    "left of one target of two": (
        [TWO_CATS, A_DOG_LEFT],
        [CAT, thing("cat", box=at(-200, 0)), LEFT_DOG],
        (False, False, 2 / 3, 3 / 4),
    ),
    "the colour of the target is wrong": (
        [A_RED_CAT, A_DOG_LEFT],
        [BLUE_CAT, LEFT_DOG],
        (False, False, 2 / 4, 2 / 4),  # 1, 0; 1, 0
    ),
    "the placed one has the wrong colour": (  # then its place is not asked for
        [A_CAT, clause("dog", 1, "blue", ("left of", 0))],
        [CAT, LEFT_DOG],
        (False, False, 2 / 3, 2 / 3),  # 1; 1, 0
    ),
    "colour and place": (
        [A_CAT, clause("dog", 1, "red", ("left of", 0))],
        [CAT, LEFT_DOG],
        (True, True, 1, 1),
    ),
    "colour but not place": (
        [A_CAT, clause("dog", 1, "red", ("left of", 0))],
        [CAT, RIGHT_DOG],
        (False, False, 3 / 4, 4 / 5),  # 1; 1, 1, 0 and perhaps 1
    ),
    "a chain": (  # the bird is left of a dog that is not left of the cat
        [A_CAT, A_DOG_LEFT, clause("bird", position=("left of", 1))],
        [CAT, RIGHT_DOG, thing("bird", box=at(-500, 0))],
        (False, False, 3 / 5, 4 / 6),  # 1; 1, 0 and perhaps 1; 1, 0
    ),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_verdicts_by_hand(case):
    include, things, expected = BY_HAND[case]
    assert judge(scene(*include), things) == pytest.approx(expected, abs=1e-12)


HAND_PLACED = [  # offset of a 10 px box from another: both |r| = |d| - 2; u = r / ‖d‖
    ((-100, 0), {"left of"}),
    ((100, 0), {"right of"}),
    ((0, -100), {"above"}),
    ((0, 100), {"below"}),
    ((-100, -100), {"left of", "above"}),  # u = -98 / 141.4 on both axes
    ((100, -100), {"right of", "above"}),
    ((-100, 100), {"left of", "below"}),
    ((100, 100), {"right of", "below"}),
    ((-100, -55), {"left of"}),  # u = (-98, -53) / 114.1
    ((-100, -65), {"left of", "above"}),  # u = (-98, -63) / 119.3
    ((0, 0), set()),
    ((-2, 0), set()),  # r = 0
    ((-2.0005, 0), set()),  # |r| < 0.001
    ((-2.5, 0), set()),  # r = -0.5, u = -0.2
    ((-4, 0), set()),  # r = -2, u = -0.5 exactly
    ((-4.01, 0), {"left of"}),
    ((0, 4), set()),
    ((0, 4.01), {"below"}),
    ((-4, -4), set()),  # u = -2 / 5.66
    ((-7, -7), {"left of", "above"}),  # u = -5 / 9.9 = -0.505
    ((-6.8, -6.8), set()),  # u = -4.8 / 9.62 = -0.499
]


@pytest.mark.parametrize(("offset", "expected"), HAND_PLACED)
def test_relations_by_hand(offset, expected):
    assert relations(at(*offset), at(0, 0)) == expected
    assert relations(at(50 + offset[0], 20 + offset[1]), at(50, 20)) == expected


def test_large_boxes_must_be_further_apart():
    assert relations(at(-23, 0, 10), at(0, 0, 100)) == {"left of"}  # r = -12, u = -0.52
    assert relations(at(-21, 0, 10), at(0, 0, 100)) == set()  # r = -10, u = -0.48
    assert relations(at(-21, 0, 10, 300), at(0, 0, 10, 300)) == {"left of"}  # sizes count per axis


# ------------------------------------------------------------------------------------------------------- by closed form


SCORES = [0.3 - EPSILON, 0.3, 0.3 + EPSILON, 0.6, 0.9 - EPSILON, 0.9, 0.9 + EPSILON]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("tag", TAGS)
def test_counts_near_the_thresholds(tag, score):
    least = 0.9 if tag == "counting" else 0.3
    for asked, given in itertools.product(range(1, 5), range(8)):
        seen = given if score > least else 0
        closeness = 1 - abs(asked - seen) / asked
        verdicts = judge(scene(clause("bench", asked), tag=tag), [thing("bench", score)] * given)
        assert verdicts == pytest.approx((seen >= asked, seen == asked, max(closeness, 0), closeness))


@pytest.mark.parametrize("limit", range(1, 18))
def test_exclusions_forbid_their_count_and_more(limit):
    for asked, seen in itertools.product(range(1, 4), range(20)):
        wanted = scene(clause("bench", asked), tag="counting", exclude=[clause("bench", limit)])
        kept = min(seen, 16)
        right, exact, *_ = judge(wanted, [thing("bench")] * seen)
        assert right == (asked <= kept < limit)
        assert exact == (kept == asked)  # strict reads no exclusion


def test_one_exclusion_of_many_is_enough():
    wanted = scene(A_CAT, exclude=[clause("dog", 2), clause("bird", 1)])
    for dogs, birds in itertools.product(range(4), range(3)):
        things = [CAT, *[DOG] * dogs, *[thing("bird")] * birds]
        assert judge(wanted, things)[0] == (dogs < 2 and birds < 1)
        assert judge(wanted, things)[1:] == (True, 1, 1)


@pytest.mark.parametrize("size", [2, 10, 40])
@pytest.mark.parametrize("relation", RELATIONS)
def test_every_relation_on_a_grid(relation, size):
    wanted = scene(A_CAT, clause("dog", position=(relation, 0)), tag="position")
    axis, sign = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}[relation]
    for offset in itertools.product(range(-30, 31, 5), repeat=2):
        gap = sign * offset[axis] - 0.2 * size  # between squares of one size, along the axis that is asked for
        holds = gap > 0.5 * math.hypot(*offset) + 1e-9
        expected = (1, 1, 1, 1) if holds else (0, 0, 2 / 3, 3 / 4)
        verdicts = judge(wanted, [thing("cat", box=at(0, 0, size)), thing("dog", box=at(*offset, size))])
        assert verdicts == pytest.approx(expected), (offset, relations(at(*offset, size), at(0, 0, size)))


@pytest.mark.parametrize("asked", range(1, 5))
def test_colours_count_only_where_the_number_is_right(asked):
    for right, wrong in itertools.product(range(5), repeat=2):
        seen = right + wrong
        things = [thing("cup", 0.9, "green")] * right + [thing("cup", 0.8, "pink")] * wrong
        verdicts = judge(scene(clause("cup", asked, "green"), tag="colors"), things)
        color = 1 - (asked - right) / asked if seen == asked else 0
        count = 1 - abs(asked - seen) / asked
        expected = (right >= asked, right == seen == asked, (max(count, 0) + color) / 2, (count + color) / 2)
        assert verdicts == pytest.approx(expected)


# ------------------------------------------------------------------------------ against a second formulation, at random


def second_relations(a, b):
    """In the complex plane, as one product of signs and lengths per axis."""
    ca, cb = complex(a[0] + a[2], a[1] + a[3]) / 2, complex(b[0] + b[2], b[1] + b[3]) / 2
    d = ca - cb
    slack = complex(a[2] - a[0] + b[2] - b[0], a[3] - a[1] + b[3] - b[1]) / 10
    x = math.copysign(max(abs(d.real) - slack.real, 0), d.real)
    y = math.copysign(max(abs(d.imag) - slack.imag, 0), d.imag)
    if abs(x) < 1e-3 and abs(y) < 1e-3:
        return frozenset()
    x, y = x / abs(d), y / abs(d)
    return frozenset(
        ["left of"] * (x < -0.5) + ["right of"] * (x > 0.5) + ["above"] * (y < -0.5) + ["below"] * (y > 0.5)
    )


def second_judge(wanted, things):
    """One walk over the clauses with a state per way of counting, as the rules tell it."""
    least = 0.9 if wanted.tag == "counting" else 0.3
    by_class = {
        name: sorted((one for one in things if one[0].label == name and one[0].score > least), key=by_score)[:16]
        for name in OBJECTS
    }
    outcomes = [walk(wanted, by_class, loose=True)[0], walk(wanted, by_class, loose=False)[0]]
    if any(len(by_class[bad.label]) >= bad.count for bad in wanted.exclude):
        outcomes[0] = False
    for fixed in (True, False):
        terms = walk(wanted, by_class, loose=False, fixed=fixed)[1]
        outcomes.append(math.fsum(terms) / len(terms))
    return tuple(outcomes)


def by_score(one):
    return -one[0].score


def walk(wanted, by_class, loose, fixed=True):
    good, terms, groups = True, [], []
    for want in wanted.include:
        n, pile = want.count, by_class[want.label]
        pile = pile[:n] if loose else pile
        matched = len(pile) >= n if loose else len(pile) == n
        terms.append(1 - abs(n - len(pile)) / n)
        if not matched and (want.color or want.position):
            terms.append(0.0)
        if matched and want.color:
            k = [color for _, color in pile].count(want.color)
            terms.append(1 - abs(n - k) / n)
            matched = k == n
        if matched and want.position:
            relation, index = want.position
            if groups[index] is None:
                matched = False
                terms.append(0.0)
            else:
                pairs = itertools.product(pile, groups[index])
                matched = all(relation in second_relations(a[0].box, b[0].box) for a, b in pairs)
                terms += [1.0] if matched else [0.0] if fixed else [0.0, 1.0]
        good = good and matched
        groups.append(pile if matched else None)
    return good, [min(max(term, 0.0), 1.0) for term in terms] if fixed else terms


def random_scene(draw):
    labels = draw.sample(OBJECTS[:6], draw.randint(1, 3))
    include = []
    for k, label in enumerate(labels):
        color = draw.choice([None, *COLOURS[:2]])
        position = (draw.choice(RELATIONS), draw.randrange(k)) if k and draw.random() < 0.6 else None
        include.append(clause(label, draw.choice([1, 1, 1, 2, 3, 4]), color, position))
    exclude = [clause(draw.choice(OBJECTS[:6]), draw.randint(1, 5)) for _ in range(draw.choice([0, 0, 1, 2]))]
    return scene(*include, tag=draw.choice(TAGS), exclude=exclude)


def random_things(draw, wanted):
    """About as many as are asked for, on a coarse grid, with scores at, below and above both thresholds."""
    things = []
    for want in wanted.include:
        crowd = draw.randint(14, 20) if draw.random() < 0.03 else max(want.count + draw.choice([-1, 0, 0, 0, 1, 2]), 0)
        for _ in range(crowd):
            color = want.color if want.color and draw.random() < 0.8 else draw.choice(COLOURS[:3])
            things.append(thing(want.label, random_score(draw), color, random_box(draw)))
    things += [
        thing(draw.choice(OBJECTS[:6]), random_score(draw), "red", random_box(draw)) for _ in range(draw.randint(0, 2))
    ]
    draw.shuffle(things)
    return things


def random_score(draw):
    near = draw.choice([0.3, 0.9, 0.95, 0.95, 0.95]) + draw.choice([-1e-4, 0, 1e-4])
    return near + 1e-9 * draw.randrange(1000) * (near not in (0.3, 0.9))


def random_box(draw):
    left, top = draw.randrange(0, 500, 50), draw.randrange(0, 500, 50)
    return (left, top, left + draw.choice([0, 50, 100]), top + draw.choice([0, 50, 100]))


@pytest.fixture(scope="module")
def worlds():
    draw = random.Random(0)
    scenes = [random_scene(draw) for _ in range(6000)]
    return [(wanted, random_things(draw, wanted)) for wanted in scenes]


def test_verdicts_agree_with_a_second_formulation(worlds):
    outcomes = [(judge(*world), second_judge(*world)) for world in worlds]
    for (ours, theirs), world in zip(outcomes, worlds, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-12), world
    share = [sum(ours[i] for ours, _ in outcomes) / len(outcomes) for i in (0, 1)]
    assert all(0.05 < each < 0.95 for each in share), "the random worlds are all right or all wrong"
    assert len({round(ours[3], 6) for ours, _ in outcomes}) > 50


def test_relations_agree_with_a_second_formulation():
    draw = random.Random(1)
    for _ in range(20_000):
        a, b = random_box(draw), random_box(draw)
        assert relations(a, b) == second_relations(a, b), (a, b)


# ----------------------------------------------------------------------------------------------------------------- laws


OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
TURNED = {"left of": "above", "right of": "below", "above": "left of", "below": "right of"}


def test_relations_turn_with_the_picture():
    draw = random.Random(2)
    for _ in range(5000):
        a, b = random_box(draw), random_box(draw)
        seen = relations(a, b)
        assert relations(b, a) == {OPPOSITE[relation] for relation in seen}
        assert relations(turned(a), turned(b)) == {TURNED[relation] for relation in seen}
        assert relations(moved(a), moved(b)) == seen
        assert not {"left of", "right of"} <= seen
        assert not {"above", "below"} <= seen


def turned(box):
    """x and y exchanged."""
    return (box[1], box[0], box[3], box[2])


def moved(box):
    """Shifted, and twice as large."""
    return tuple(2 * side + shift for side, shift in zip(box, (64, 256, 64, 256), strict=True))


def test_verdicts_do_not_depend_on_the_order_of_unequal_detections(worlds):
    for wanted, things in worlds[:1500]:
        unequal = [(replace(one, score=one.score + 1e-7 * i), color) for i, (one, color) in enumerate(things)]
        assert judge(wanted, unequal) == judge(wanted, unequal[::-1])


def test_what_nobody_asked_for_changes_nothing(worlds):
    others = [thing("toothbrush", box=at(i, i)) for i in range(20)]
    unsure = [thing(label, 0.3, box=at(250, 250)) for label in OBJECTS[:6]]
    for wanted, things in worlds[:1500]:
        assert judge(wanted, things) == judge(wanted, [*others, *things, *unsure])


def test_the_picture_may_be_moved_and_scaled(worlds):
    for wanted, things in worlds[:1500]:
        shifted = [(replace(one, box=moved(one.box)), color) for one, color in things]
        assert judge(wanted, things) == judge(wanted, shifted)


def test_partial_is_one_exactly_where_strict_holds_and_stays_in_the_unit_interval(worlds):
    for wanted, things in worlds:
        right, exact, fixed, original = judge(wanted, things)
        assert 0 <= fixed <= 1
        assert exact == (fixed == 1)
        if exact:
            assert original == 1
            assert right or wanted.exclude


def test_strict_is_correct_and_exact_numbers(worlds):
    for wanted, things in worlds:
        right, exact, *_ = judge(replace(wanted, exclude=()), things)
        found = select([one for one, _ in things], wanted.tag)
        numbers = all(len(found.get(want.label, ())) == want.count for want in wanted.include)
        assert exact == (right and numbers)


def test_flow_grpo_pays_for_a_wrong_place_and_has_no_floor():
    misplaced = judge(scene(A_CAT, A_DOG_LEFT, tag="position"), [CAT, RIGHT_DOG])
    assert misplaced[2:] == pytest.approx((2 / 3, 3 / 4))
    lowest = [judge(scene(A_CAT), [CAT] * crowd)[2:] for crowd in range(1, 17)]
    assert lowest == [(max(2 - crowd, 0), 2 - crowd) for crowd in range(1, 17)]


def test_equal_scores_keep_the_order_of_detection():
    things = [thing("cat", 0.5, box=at(i, 0)) for i in range(20)]
    kept = select([one for one, _ in things], "colors")["cat"]
    assert [one.box for one in kept] == [one.box for one, _ in things[:16]]


def test_colours_are_asked_only_of_objects_that_a_verdict_reads(worlds):
    for wanted, things in worlds[:1500]:
        found = select([one for one, _ in things], wanted.tag)
        asked = []
        for verdict in (correct, strict, partial):
            verdict(found, wanted, lambda one, asked=asked: asked.append(id(one)) or "red")
        assert set(asked) <= {id(one) for one in to_color(found, wanted)}
        assert len(to_color(found, wanted)) <= sum(want.count for want in wanted.include if want.color)


# ------------------------------------------------------------------------------------------------------------- metadata


def asks(*include, **more):
    return {"tag": "colors", "include": list(include), **more}


BAD = {
    "nothing": ({}, "^prompt 'a cat' has no GenEval metadata, only \\[\\]; expected 'tag' and 'include'"),
    "no clause": (asks(), "has no GenEval metadata"),
    "no tag": ({"include": [A_CAT]}, "has no GenEval metadata, only \\['include'\\]"),
    "no mapping": (asks("cat"), "a GenEval clause needs 'class' and 'count', got 'cat'"),
    "no list": ({"tag": "colors", "include": 3}, "^prompt 'a cat': 'int' object is not iterable"),
    "unknown tag": ({"tag": "Counting", "include": [A_CAT]}, "unknown tag 'Counting'; expected one of single_object"),
    "no count": (
        {"tag": "colors", "include": [{"class": "cat"}]},
        "^prompt 'a cat': a GenEval clause needs 'class' and",
    ),
    "object": (asks(clause("dragon")), "unknown object 'dragon'; GenEval knows COCO's 80"),
    "excluded object": (asks(A_CAT, exclude=[clause("elf")]), "unknown object 'elf'"),
    "coco's own name": (asks(clause("mouse")), "unknown object 'mouse'"),
    "colour": (
        {"tag": "colors", "include": [clause("cat", 1, "mauve")]},
        "unknown colour 'mauve'; expected one of red, ",
    ),
    "relation": (asks(A_CAT, clause("dog", 1, None, ("near", 0))), "unknown relation 'near'"),
    "itself": (asks(clause("cat", 1, None, ("above", 0))), "clause 0 is placed relative to"),
    "a later one": (
        {"tag": "colors", "include": [A_CAT, clause("dog", 1, None, ("above", 2))]},
        "expected an earlier one",
    ),
    "half a position": (
        {"tag": "colors", "include": [A_CAT, clause("dog", 1, None, ("above",))]},
        r"\[relation, clause\]",
    ),
    "no number": (
        {"tag": "colors", "include": [clause("cat", "two")]},
        "expected a count of at least 1 cat, got 'two'",
    ),
    "none": (asks(clause("cat", 0)), "expected a count of at least 1 cat, got 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_metadata_is_one_sentence(case):
    metadata, expected = BAD[case]
    with pytest.raises(ValueError, match=expected):
        Scene.of(Prompt("a cat", "geneval", metadata))


def test_the_official_prompts_are_read_and_a_picture_of_each_earns_everything():
    prompts = official()
    assert len(prompts) == 553
    for prompt in prompts:
        wanted = Scene.of(prompt)
        assert judge(wanted, picture(wanted)) == (True, True, 1, 1), prompt.text
        assert judge(wanted, picture(wanted)[:-1])[:2] == (False, False), prompt.text


def picture(wanted):
    """Sure detections of what is asked for, each clause in its place."""
    steps = {"left of": (-100, 0), "right of": (100, 0), "above": (0, -100), "below": (0, 100)}
    return [
        thing(want.label, 0.95, want.color, at(*(steps[want.position[0]] if want.position else (0, 0))))
        for want in wanted.include
        for _ in range(want.count)
    ]
