"""The synthetic world: a coarse look shows no pattern, questions and answers agree."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from helpers.arr_coc import world


def test_a_coarse_look_shows_no_pattern():
    given = world.scenes(64, seed=0, trap=True)
    small = functional.avg_pool2d(given.images, 4).unflatten(2, (4, 4)).unflatten(4, (4, 4))
    hues = torch.tensor([rgb for _, rgb in world.HUES])[given.colours]
    cells = small.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # rows, cells, 3, 4, 4
    assert torch.allclose(cells, hues[..., None, None].expand_as(cells), atol=1e-6)


def test_patterns_differ_and_colours_are_all_there():
    textures = world._textures().flatten(1)
    assert len({tuple(row.tolist()) for row in textures}) == len(world.PATTERNS)
    given = world.scenes(32, seed=1)
    assert all(sorted(row.tolist()) == list(range(16)) for row in given.colours)


@pytest.mark.parametrize("kind", world.KINDS)
def test_the_answer_is_what_the_image_holds(kind):
    given = world.scenes(40, seed=2, kinds=(kind,))
    for i in range(len(given)):
        words = world.in_words(given.questions[i]).split()
        answer = world.WORDS[given.answers[i]]
        colours = [world.COLOURS[c] for c in given.colours[i]]
        patterns = [world.PATTERNS[p] for p in given.patterns[i]]
        if kind == "pattern":
            cell = colours.index(words[3])
            assert answer == patterns[cell] and given.needed[i].nonzero().tolist() == [[cell]]
        elif kind == "colour":
            row, column = int(words[2][-1]), int(words[3][-1])
            assert answer == colours[4 * row + column] and not given.needed[i].any()
        else:
            row = int(words[3][-1])
            assert int(answer) == patterns[4 * row : 4 * row + 4].count(words[2])
            assert given.needed[i].nonzero().flatten().tolist() == list(range(4 * row, 4 * row + 4))


def test_the_trap_is_never_asked_about():
    given = world.scenes(256, seed=3, kinds=("pattern",), trap=True)
    spread = given.images.mean(1).unflatten(1, (4, 16)).unflatten(3, (4, 16)).std((2, 4))
    loudest = spread.flatten(1).topk(2).indices
    assert not given.needed.gather(1, loudest).any()


def test_another_question_needs_another_cell():
    given = world.scenes(128, seed=4, kinds=("pattern",))
    again = world.asked_again(given, seed=5)
    assert torch.equal(again.images, given.images)
    assert not (again.needed & given.needed).any()


def test_renaming_moves_half_of_the_patterns_names_and_nothing_else():
    given = world.scenes(400, seed=6)
    new = world.renamed(given)
    index = given.answers - world.WORD[world.PATTERNS[0]]
    moves = (given.kinds == 0) & (index < len(world.PATTERNS) // 2)
    assert torch.equal(new.answers != given.answers, moves)
    names = {world.WORDS[i] for i in new.answers[moves]}
    assert names == set(world.PATTERNS[: len(world.PATTERNS) // 2])  # a permutation of them


def test_scenes_come_from_their_seed_alone():
    one, two, other = (world.scenes(8, seed=s) for s in (7, 7, 8))
    assert torch.equal(one.images, two.images) and not torch.equal(one.images, other.images)


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="'shape'; there is pattern"):
        world.scenes(2, seed=0, kinds=("shape",))
