"""From text to advantages: reasoning steps, tokens by their offsets, values from rollouts."""

import math
import pickle
import re
from itertools import pairwise

import pytest
import torch

from fusedpo import advantages
from fusedpo.advantages import pool_rollouts, segment_steps

NAN = math.nan
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def steps_of(text, **kwargs):
    """The pieces into which the response is split."""
    states = segment_steps([text], [[]], **kwargs).states[0]
    start = len(states[0])
    bounds = [len(state) for state in states] + [len(text)]
    pieces = [text[a:b] for a, b in pairwise(bounds)]
    assert "".join(pieces) == text[start:]
    return pieces


@pytest.mark.parametrize(
    ("text", "kwargs", "expected"),
    [
        ("one", {}, ["one"]),
        ("", {}, [""]),
        ("one\ntwo\nthree", {}, ["one", "\ntwo", "\nthree"]),
        # Empty pieces: at the start they join the first step, elsewhere they are steps.
        ("\n \none\ntwo", {}, ["\n \none", "\ntwo"]),
        ("one\n\ntwo\n", {}, ["one", "\n", "\ntwo", "\n"]),
        ("\n\n", {}, ["\n\n"]),
        # The answer part, and empty pieces before it, join the last step.
        ("one\ntwo\n#### 7", {"answer_prefix": "\n#### "}, ["one", "\ntwo\n#### 7"]),
        ("one\ntwo\n\n \n#### 7", {"answer_prefix": "\n#### "}, ["one", "\ntwo\n\n \n#### 7"]),
        ("one\n#### 7\n#### 8\nmore", {"answer_prefix": "\n#### "}, ["one\n#### 7\n#### 8\nmore"]),
        ("\n#### 7", {"answer_prefix": "\n#### "}, ["\n#### 7"]),
        ("one\ntwo", {"answer_prefix": "\n#### "}, ["one", "\ntwo"]),
        ("one. two. three", {"delimiter": ". "}, ["one", ". two", ". three"]),
        ("----a--b", {"delimiter": "--"}, ["----a", "--b"]),
        # The response starts after the prompt.
        ("a prompt\nof two lines\none\ntwo", {"starts": [22]}, ["one", "\ntwo"]),
        ("only a prompt", {"starts": [13]}, [""]),
        ("aXbcXd", {"delimiter": lambda s: [m.start() for m in re.finditer("X", s)]}, ["a", "Xbc", "Xd"]),
        ("P: aXb", {"delimiter": lambda s: [s.index("X")], "starts": [3]}, ["a", "Xb"]),
    ],
)
def test_split_into_steps(text, kwargs, expected):
    assert steps_of(text, **kwargs) == expected


def test_states_are_the_prefixes():
    steps = segment_steps(["Q\nx\ny", "Q\nz"], [[], []], starts=[2, 2])
    assert steps.states == [["Q\n", "Q\nx"], ["Q\n"]]
    assert steps.step_ids.shape == (2, 0)


def test_tokens_belong_to_the_step_of_their_first_character():
    #        0123456789
    text = "ab\ncd\nef"
    offsets = [(0, 2), (2, 3), (3, 4), (4, 7), (7, 8), (0, 0)]
    #           ab      \n      c   d\ne: step 1   f    EOS
    assert segment_steps([text], [offsets]).step_ids.tolist() == [[0, 1, 1, 1, 2, 2]]
    # A token that starts in a step and runs over several steps is the first one's.
    assert segment_steps([text], [[(0, 8)]]).step_ids.tolist() == [[0]]
    # Tokens without characters in the middle copy too; before the first token there is nothing to copy.
    assert segment_steps([text], [[(0, 0), (0, 3), (3, 3), (3, 8), (8, 8)]]).step_ids.tolist() == [[-1, 0, 0, 1, 1]]


def test_tokens_of_the_prompt_belong_to_no_step():
    text = "Q: ?\na\nb"
    offsets = [(0, 0), (0, 2), (2, 5), (5, 6), (6, 8), (0, 0)]
    assert segment_steps([text], [offsets], starts=[5]).step_ids.tolist() == [[-1, -1, -1, 0, 1, 1]]


def test_padding_and_masks():
    texts = ["a\nb", "cd"]
    offsets = [[(0, 1), (1, 3), (0, 0)], [(0, 2)]]
    assert segment_steps(texts, offsets).step_ids.tolist() == [[0, 1, 1], [0, -1, -1]]
    mask = torch.tensor([[1, 0, 1], [1, 0, 0]])
    assert segment_steps(texts, offsets, mask=mask).step_ids.tolist() == [[0, -1, 1], [0, -1, -1]]
    padded = torch.tensor([[(0, 1), (1, 3), (0, 0)], [(0, 2), (0, 0), (0, 0)]])
    for tensor in (padded, padded.int()):
        result = segment_steps(texts, tensor, mask=mask.bool()).step_ids
        assert result.tolist() == [[0, -1, 1], [0, -1, -1]]
        assert result.dtype == torch.int64
    left = padded.flip(1)[1:]
    assert segment_steps(texts[1:], left).step_ids.tolist() == [[-1, -1, 0]]
    empty = segment_steps([], [])
    assert empty.states == []
    assert empty.step_ids.shape == (0, 0)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "match"),
    [
        (("a\nb", [[]]), {}, TypeError, "texts must be a sequence of str, got a str"),
        (([3], [[]]), {}, TypeError, "texts must be a sequence of str, got one of int"),
        ((["a"], []), {}, ValueError, "offsets must have one entry per text, got 0 for 1"),
        ((["a"], torch.zeros(1, 4, dtype=torch.int64)), {}, ValueError, r"offsets .*\[1, T, 2\].*\[1, 4\]"),
        ((["a"], torch.zeros(1, 4, 2)), {}, TypeError, "offsets .*float32"),
        ((["a"], [[]]), {"delimiter": ""}, ValueError, "delimiter must not be empty"),
        ((["a"], [[]]), {"answer_prefix": ""}, ValueError, "answer_prefix must not be empty"),
        ((["a"], [[]]), {"starts": [0, 0]}, ValueError, "starts must have one entry per text, got 2 for 1"),
        ((["a"], [[]]), {"starts": [2]}, ValueError, "starts must lie in their texts, got 2 for one of 1"),
        (
            (["abc"], [[]]),
            {"delimiter": lambda s: [2, 1]},
            ValueError,
            "increasing pos.* 3 char.*got 1 at index 1",
        ),
        ((["abc"], [[]]), {"delimiter": lambda s: [0]}, ValueError, "increasing positions .*got 0 at index 0"),
        ((["abc"], [[]]), {"delimiter": lambda s: [4]}, ValueError, "increasing positions .*got 4 at index 0"),
        ((["a"], [[(0, 1)]]), {"mask": torch.ones(2, 1)}, ValueError, r"mask .*\[1, 1\].*\[2, 1\]"),
    ],
)
def test_segment_steps_errors(args, kwargs, error, match):
    with pytest.raises(error, match=match):
        segment_steps(*args, **kwargs)


# ----------------------------------------------------------------------------------------------------- pool_rollouts


def test_pool_rollouts():
    states = [["Q", "Qa", "Qab"], ["Q", "Qc"], ["R"]]
    rollouts = [("Q", 1), ("Qa", 0.5), ("Q", 0), ("Qc", True), ("Q", 0.5), ("Q", torch.tensor(0.5))]
    values = pool_rollouts(states, rollouts)
    assert values.dtype == torch.float32
    expected = torch.tensor([[0.5, 0.5, NAN, NAN], [0.5, 1.0, NAN, NAN], [NAN, NAN, NAN, NAN]])
    torch.testing.assert_close(values, expected, equal_nan=True)
    assert pool_rollouts(states, iter(rollouts), dtype=torch.float64).dtype == torch.float64
    assert pool_rollouts([], []).shape == (0, 1)
    with pytest.raises(ValueError, match="rollouts must start from a state in states, got 1 .*'Qb'"):
        pool_rollouts(states, [("Qb", 1.0)])


class Counting(str):
    """A text that counts the characters and pieces that are copied out of it, and where that is asked of it."""

    copied = 0

    def __getitem__(self, index):
        piece = str.__getitem__(self, index)
        Counting.copied += len(piece)
        return Counting(piece)

    def partition(self, separator):
        return tuple(map(Counting, str.partition(self, separator)))

    def join(self, pieces):
        pieces = list(pieces)
        Counting.copied += sum(map(len, pieces))
        return str.join(self, pieces)


@pytest.mark.parametrize("answer_prefix", [None, "\n#### "])
def test_a_text_of_many_steps_takes_linear_time(answer_prefix):
    """Counted in characters copied: a model writes the text, and may write a line break after every letter."""

    def copied(steps):
        text = Counting("Q: ?\n" + "a\n" * steps + "\n#### 1")
        Counting.copied = 0
        split = segment_steps([text], [[]], starts=[5], delimiter=Counting("\n"), answer_prefix=answer_prefix)
        states = split.states[0]
        assert len(states) == (steps if answer_prefix else steps + 2)
        values = pool_rollouts(split.states, [("Q: ?\n", 0.5), ("Q: ?\na\na", 0.25)])
        assert values[0, [0, 2]].tolist() == [0.5, 0.25]
        return Counting.copied

    assert 0 < copied(2000) < 2.1 * copied(1000)


def test_prefixes():
    texts = ["Q\na\nb\nc", "Q\na\n\ud800\n\u00e9", "Q"]
    states = segment_steps(texts, [[], [], []]).states
    assert states == [["", "Q", "Q\na", "Q\na\nb"], ["", "Q", "Q\na", "Q\na\n\ud800"], [""]]
    first = states[0]
    assert (first[-1], first[1:3], first[::-2]) == ("Q\na\nb", ["Q", "Q\na"], ["Q\na\nb", "Q"])
    assert first != ["Q"]
    assert first != "QQQ"
    assert pickle.loads(pickle.dumps(states)) == states
    every = [(state, float(len(state))) for row in states for state in row]
    expected = [[float(len(state)) for state in row] + [NAN] * (5 - len(row)) for row in states]
    for given in (states, [list(row) for row in states], [states[0], *map(list, states[1:])]):
        torch.testing.assert_close(pool_rollouts(given, every), torch.tensor(expected), equal_nan=True)
    with pytest.raises(ValueError, match="got 1 that do not") as error:
        pool_rollouts(states, [("x" * 100_000, 1.0)])
    assert len(str(error.value)) < 400


# -------------------------------------------------------------------------------------------------------- all of it


def tokenize(prompt, response):
    """Offsets in both, as of a fast tokenizer: words with the space or newline before them; then EOS."""
    words = [[match.span() for match in re.finditer(r"[ \n]?[^ \n]+|[ \n]", text)] for text in (prompt, response)]
    return [*words[0], *((a + len(prompt), b + len(prompt)) for a, b in words[1]), (0, 0)]


def test_from_text_to_token_advantages():
    prompts = ["Two plus two?\n", "Two plus two?\n", "One?\n"]
    responses = ["\nAdd two and two.\nThat is four.\n#### 4", "Add.\nGuess.\nSay five.\n#### 5", "One.\n#### 1"]
    outcome = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    offsets = [tokenize(*pair) for pair in zip(prompts, responses, strict=True)]
    steps = segment_steps(texts, offsets, starts=[len(prompt) for prompt in prompts], answer_prefix="\n#### ")
    assert [len(states) for states in steps.states] == [2, 3, 1]

    unique = list(dict.fromkeys(state for states in steps.states for state in states))
    assert len(unique) == 5  # the two responses to the same prompt share its state
    generator = torch.Generator().manual_seed(0)
    rollouts = [(state, float(r)) for state in unique for r in torch.rand(9, generator=generator)]
    values = pool_rollouts(steps.states, rollouts, dtype=torch.float64)
    assert values[0, 0] == values[1, 0]

    num_steps = torch.tensor([len(states) for states in steps.states])
    step_rewards = torch.zeros(3, 3, dtype=torch.float64).scatter(1, num_steps[:, None] - 1, outcome[:, None])
    result = advantages.vineppo(values, step_rewards=step_rewards, step_ids=steps.step_ids)

    for b in range(3):
        ids = steps.step_ids[b].tolist()
        in_prompt = sum(start < len(prompts[b]) for start, end in offsets[b] if end > start)
        assert ids[:in_prompt] == [-1] * in_prompt
        assert sorted(set(ids[in_prompt : len(offsets[b])])) == list(range(num_steps[b]))
        # One token of each step: the advantages telescope to the outcome minus the value of the prompt.
        total = sum(result[b, ids.index(s)] for s in range(num_steps[b]))
        torch.testing.assert_close(total, outcome[b] - values[b, 0], **CLOSE)
        assert (result[b][steps.step_ids[b] < 0] == 0).all()
        eos = len(offsets[b]) - 1
        assert result[b, eos] == result[b, eos - 1]
    # By hand: the second step of the second response.
    expected = values[1, 2] - values[1, 1]
    torch.testing.assert_close(result[1, steps.step_ids[1].tolist().index(1)], expected, **CLOSE)
