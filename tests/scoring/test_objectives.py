"""Choice scoring: which tokens are asked for, and the loss that comes of their log-probabilities."""

import numpy as np
import pytest
import torch
from tiny import VOCAB, tiny_tokenizer

from zoray.models.tokens import Encoder
from zoray.records import ConfigError, Example, TokenSequence
from zoray.scoring.objectives import ChoiceNLL, Sums

WORDS = (" terrible", " great")


@pytest.fixture(scope="module", params=[False, True], ids=["no-bos", "bos"])
def tokenizer(request: pytest.FixtureRequest):
    return tiny_tokenizer(bos=request.param)


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text)["input_ids"]


def word_ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def made_up_logits(tokens: np.ndarray) -> torch.Tensor:
    """(T, VOCAB) next-token logits that depend on the tokens so far; stands for a model."""
    generator = torch.Generator().manual_seed(int((tokens * np.arange(1, len(tokens) + 1)).sum()))
    return torch.randn(len(tokens), VOCAB, generator=generator, dtype=torch.float64) * 3


def sums(sequence: TokenSequence) -> np.ndarray:
    """What an engine returns for a sequence, by its definition in TokenSequence."""
    logps = torch.log_softmax(made_up_logits(sequence.tokens), dim=-1)
    result = np.zeros(sequence.n_outputs)
    for row, target, output in zip(sequence.rows, sequence.targets, sequence.outputs, strict=True):
        result[output] += float(logps[row, target])
    return result


def option_logit(tokenizer, prompt: str, option: str, shared: int) -> torch.Tensor:
    """Mean log-probability of the option's tokens, straight from the text."""
    tokens = ids(tokenizer, prompt + option)
    logps = torch.log_softmax(made_up_logits(np.array(tokens[:-1])), dim=-1)
    return torch.stack([logps[i - 1, tokens[i]] for i in range(shared, len(tokens))]).mean()


def batch(summed, counts, options, labels) -> Sums:
    """Of examples each of which has one right option."""
    options, labels = np.asarray(options), np.asarray(labels)
    right = np.zeros(len(summed), bool)
    right[np.cumsum(options) - options + labels] = True
    return Sums(np.asarray(summed), np.asarray(counts), options, labels, right)


def test_single_token_options_share_one_sequence(tokenizer):
    example = Example("the film is It was", (*WORDS, " wonderful"), 1)
    (sequence,) = ChoiceNLL(single_token=True).encode(example, Encoder(tokenizer))
    prompt = ids(tokenizer, example.prompt)
    assert sequence.tokens.tolist() == prompt
    assert sequence.rows.tolist() == [len(prompt) - 1] * 3
    assert sequence.targets.tolist() == [word_ids(tokenizer, word)[0] for word in example.options]
    assert sequence.outputs.tolist() == [0, 1, 2] and sequence.n_outputs == 3
    for array in (sequence.tokens, sequence.rows, sequence.targets, sequence.outputs):
        assert array.dtype == np.int32


@pytest.mark.parametrize("options", [(" great", " wonderful thing"), (" wonderful thing", " dull and lifeless")])
def test_options_of_several_tokens_are_a_sequence_each(tokenizer, options):
    example = Example("It was", options, 0)
    sequences = ChoiceNLL().encode(example, Encoder(tokenizer))
    prompt = ids(tokenizer, example.prompt)
    assert len(sequences) == 2
    for option, sequence in zip(options, sequences, strict=True):
        continuation = word_ids(tokenizer, option)
        assert sequence.tokens.tolist() == prompt + continuation[:-1]
        assert sequence.targets.tolist() == continuation
        assert sequence.rows.tolist() == list(range(len(prompt) - 1, len(prompt) + len(continuation) - 1))
        assert sequence.outputs.tolist() == [0] * len(continuation) and sequence.n_outputs == 1


@pytest.mark.parametrize(
    "options",
    [WORDS, (" great", " wonderful thing"), (" dull and lifeless", " wonderful thing", " terrible")],
)
def test_reduce_is_the_cross_entropy_over_the_options(tokenizer, options):
    """Also: the logit of an option of several tokens is their mean, not their sum."""
    for label in range(len(options)):
        example = Example("the film is a wonderful thing to see It was", options, label)
        shared = len(ids(tokenizer, example.prompt))
        logits = torch.stack([option_logit(tokenizer, example.prompt, option, shared) for option in options])
        expected = torch.nn.functional.cross_entropy(logits[None], torch.tensor([label]))
        sequences = ChoiceNLL().encode(example, Encoder(tokenizer))
        counts = np.concatenate([np.bincount(sequence.outputs) for sequence in sequences])
        summed, n = np.concatenate([sums(sequence) for sequence in sequences]), np.array([len(options)])
        outcomes = ChoiceNLL().reduce(batch(summed, counts, n, [label]))
        assert outcomes.losses[0] == pytest.approx(float(expected), rel=1e-9)
        assert outcomes.scores[0] == float(int(logits.argmax()) == label)
        assert outcomes.columns["predicted"][0] == int(logits.argmax())


def test_examples_with_different_numbers_of_options_are_reduced_together():
    """Also: an option of several tokens counts with their mean, and of equal options the first is the answer."""
    sums = np.array([-1.5, -2.0, -3.0, -1.0, -4.0, -1.0, -1.0, -0.1])
    counts, options, labels = np.array([1, 2, 1, 1, 2, 1, 1, 1]), np.array([2, 3, 2, 1]), np.array([1, 2, 1, 0])
    outcomes = ChoiceNLL().reduce(batch(sums, counts, options, labels))
    losses, correct = outcomes.losses, outcomes.scores
    rows = [np.array([-1.5, -1.0]), np.array([-3.0, -1.0, -2.0]), np.array([-1.0, -1.0]), np.array([-0.1])]
    expected = [np.log(np.exp(row).sum()) - row[label] for row, label in zip(rows, labels, strict=True)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-12)
    assert correct.tolist() == [1.0, 0.0, 0.0, 1.0]
    assert losses.dtype == correct.dtype == np.float64


def test_reduce_of_extreme_scores_is_finite_and_of_nan_is_nan():
    two, one = np.array([2, 2]), np.ones(4)
    outcomes = ChoiceNLL().reduce(batch(np.array([-1e6, -1.0, np.nan, -1.0]), one, two, [0, 1]))
    losses, correct = outcomes.losses, outcomes.scores
    assert losses[0] == 999999.0 and np.isnan(losses[1]) and correct.tolist() == [0.0, 0.0]


def test_single_token_refuses_a_longer_word_and_names_it(tokenizer):
    example = Example("It was", (" great", " wonderful thing"), 0)
    says = (
        r"expected label words of one token \(objective\.single_token\); got ' wonderful thing', which is 2 tokens: "
        r"\['Ġwonderful', 'Ġthing'\]\. Choose another word in task\.words, or set objective\.single_token=false"
    )
    with pytest.raises(ConfigError, match=says):
        ChoiceNLL(single_token=True).encode(example, Encoder(tokenizer))


@pytest.mark.parametrize("single_token", [False, True])
def test_an_empty_option_is_refused(tokenizer, single_token):
    with pytest.raises(ConfigError, match="option '' adds no token to the prompt 'It was'"):
        ChoiceNLL(single_token).encode(Example("It was", (" great", ""), 0), Encoder(tokenizer))


def test_a_prompt_without_tokens_is_refused_unless_the_tokenizer_adds_one(tokenizer):
    example = Example("", WORDS, 0)
    if ids(tokenizer, ""):
        (sequence,) = ChoiceNLL().encode(example, Encoder(tokenizer))
        assert sequence.tokens.tolist() == [1] and sequence.rows.tolist() == [0, 0]
    else:
        with pytest.raises(ConfigError, match="expected a prompt of at least one token; got ''"):
            ChoiceNLL().encode(example, Encoder(tokenizer))


def test_a_merge_across_the_border_keeps_the_common_prefix(tokenizer):
    """A prompt that ends in a space: its last token becomes the first part of each word."""
    example = Example("It was ", ("terrible", "great"), 0)
    prompt = ids(tokenizer, "It was")
    assert ids(tokenizer, example.prompt) == [*prompt, *word_ids(tokenizer, " ")]
    (merged,) = ChoiceNLL(single_token=True).encode(example, Encoder(tokenizer))
    (plain,) = ChoiceNLL(single_token=True).encode(Example("It was", WORDS, 0), Encoder(tokenizer))
    for name in ("tokens", "rows", "targets", "outputs"):
        assert getattr(merged, name).tolist() == getattr(plain, name).tolist()


def test_one_option_that_merges_shortens_the_prefix_of_all(tokenizer):
    example = Example("It wa", ("s great", " film"), 1)
    shared = ids(tokenizer, "It")
    great, film = ChoiceNLL().encode(example, Encoder(tokenizer))
    assert [*great.tokens.tolist(), great.targets[-1]] == ids(tokenizer, "It was great")
    assert [*film.tokens.tolist(), film.targets[-1]] == ids(tokenizer, "It wa film")
    for sequence in (great, film):
        assert sequence.tokens.tolist()[: len(shared)] == shared
        assert sequence.rows.tolist() == list(range(len(shared) - 1, len(sequence.tokens)))
    assert (len(great.targets), len(film.targets)) == (2, 3)


def test_a_special_token_at_the_end_is_scored_with_every_option():
    """As some tokenizers do: then no word is one token, and the prompt's own end does not stand in between."""

    class Ended:
        inner = tiny_tokenizer()

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [*ids(self.inner, text), 2]}

    prompt = ids(Ended.inner, "It was")
    for word, sequence in zip(WORDS, ChoiceNLL().encode(Example("It was", WORDS, 0), Encoder(Ended())), strict=True):
        assert sequence.tokens.tolist() == prompt + word_ids(Ended.inner, word)
        assert sequence.targets.tolist() == [*word_ids(Ended.inner, word), 2]
