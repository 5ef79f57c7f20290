"""Which examples a step sees, and what is known and checked before a model loads."""

import json
import pickle
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from orders import batch_indices, stratified_indices

from zoray.methods.estimators import TwoPoint
from zoray.methods.spaces import Lora, LowRank, Lozo
from zoray.models.folder import Model
from zoray.records import ConfigError, Example, Splits
from zoray.scoring.objectives import ChoiceNLL
from zoray.scoring.workload import ReplicaSpec, load_workload

# These must never change: a journal is worth nothing to a version that shows other examples.
GOLDEN = {
    (0, 0, 8, 10): [8, 7, 0, 5, 2, 9, 6, 1],
    (0, 1, 8, 10): [3, 4, 3, 4, 6, 2, 9, 1],
    (4294967295, 7, 3, 1000): [939, 631, 354],
}
STRATIFIED = [2, 3, 8, 1, 6, 4]  # seed 0, step 1, batch 6
WORDS = (" terrible", " great")


# which examples a step sees


@pytest.mark.parametrize("n", [1, 2, 7, 100])
@pytest.mark.parametrize("batch", [1, 3, 16])
def test_each_epoch_shows_every_example_once(n, batch):
    """Whether or not the batch divides the epoch, or is even larger."""
    steps = -(-5 * n // batch)
    seen = np.concatenate([batch_indices(3, step, batch, n) for step in range(steps)])
    assert len(seen) == steps * batch
    for epoch in range(5):
        assert sorted(seen[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))


def test_the_order_does_not_depend_on_the_batch_size():
    orders = [np.concatenate([batch_indices(3, step, b, 7) for step in range(60 // b)]) for b in (1, 4, 6, 15, 60)]
    assert all(order.tolist() == orders[0].tolist() for order in orders)


def test_a_batch_straddles_epochs():
    batch = batch_indices(3, 1, 6, 10).tolist()
    first = batch_indices(3, 0, 6, 10).tolist()
    assert len(batch) == 6 and set(first) | set(batch[:4]) == set(range(10))
    assert batch[4:] == batch_indices(3, 1, 10, 10).tolist()[:2]


def test_each_epoch_and_seed_has_an_order_of_its_own():
    epochs = [tuple(batch_indices(seed, epoch, 30, 30).tolist()) for seed in (0, 1) for epoch in range(20)]
    assert len(set(epochs)) == 40
    assert tuple(range(30)) not in epochs
    places = np.array([batch_indices(0, epoch, 10, 10) for epoch in range(2000)])
    counts = np.stack([np.bincount(places[:, i], minlength=10) for i in range(10)])
    assert np.abs(counts - 200).max() < 5 * np.sqrt(2000 * 0.1 * 0.9)  # no example prefers a place


@pytest.mark.parametrize("address", GOLDEN)
def test_the_order_is_pinned(address):
    assert batch_indices(*address).tolist() == GOLDEN[address]


LABELS = [0, 0, 0, 1, 2, 0, 1, 0, 2, 0]  # six, two and two


@pytest.mark.parametrize("batch", [3, 6, 12])
def test_stratified_batches_have_as_many_examples_of_each_label(batch):
    for step in range(20):
        labels = [LABELS[i] for i in stratified_indices(3, step, batch, LABELS)]
        assert [labels.count(label) for label in (0, 1, 2)] == [batch // 3] * 3
        assert labels == [0, 1, 2] * (batch // 3)  # in turn, so that tiles of a batch are balanced as well


@pytest.mark.parametrize("batch", [1, 3, 5, 60])
def test_stratified_labels_come_epoch_after_epoch_on_their_own(batch):
    """Whatever the batch size; the order is that of one long list."""
    seen = np.concatenate([stratified_indices(3, step, batch, LABELS) for step in range(-(-180 // batch))])[
        :180
    ].tolist()
    assert seen == stratified_indices(3, 0, 180, LABELS).tolist()
    for label, count in ((0, 6), (1, 2), (2, 2)):
        own = [i for i in seen if LABELS[i] == label]
        epochs = [own[k : k + count] for k in range(0, 60, count)]
        assert all(sorted(epoch) == [i for i in range(10) if LABELS[i] == label] for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 1


def test_one_label_is_the_plain_order_and_seeds_differ():
    assert stratified_indices(3, 2, 8, [4] * 10).tolist() == batch_indices(3, 2, 8, 10).tolist()
    orders = {tuple(stratified_indices(seed, 0, 20, LABELS).tolist()) for seed in (0, 1, 2, 2**32 - 1)}
    assert len(orders) == 4
    balanced = [0, 1] * 50
    order = stratified_indices(0, 0, 100, balanced) // 2
    assert order[::2].tolist() != order[1::2].tolist()  # labels of equal counts have orders of their own


def test_the_stratified_order_is_pinned():
    assert stratified_indices(0, 1, 6, LABELS).tolist() == STRATIFIED


# the workload


@dataclass(frozen=True)
class FewTexts:
    """A task by hand; `long` is where a text of 40 words goes, if anywhere."""

    train: int = 3
    dev: int = 2
    test: int = 1
    options: tuple[str, ...] = WORDS
    long: tuple[str, int] | None = None

    def load(self) -> Splits:
        def example(split: str, i: int) -> Example:
            text = "the film is far too long " * 10 if (split, i) == self.long else f"the film {'!' * (i + 1)} It was"
            return Example(text, self.options, i % 2)

        sizes = {"train": self.train, "dev": self.dev, "test": self.test}
        return Splits(**{split: tuple(example(split, i) for i in range(n)) for split, n in sizes.items()})


@dataclass(frozen=True)
class ShortEngine:
    """An engine's config, as far as the data needs it."""

    longest: int

    def length_limit(self, model_limit: int) -> int:
        return min(model_limit, self.longest)


@pytest.fixture
def spec(tiny_models: dict[str, Path]) -> ReplicaSpec:
    folder = str(tiny_models["llama"])
    return ReplicaSpec(Model(folder), FewTexts(), ChoiceNLL(), Lora(), TwoPoint(), ShortEngine(10_000), 0, 0, 2)


def test_load_workload_has_every_example_of_every_split(spec, tiny_models):
    workload = load_workload(spec)
    assert workload.folder == tiny_models["llama"].resolve()
    assert workload.splits == spec.task.load()
    assert {split: len(examples) for split, examples in workload.encoded.items()} == {"train": 3, "dev": 2, "test": 1}
    for split in ("train", "dev", "test"):
        for i in range(len(workload.splits[split])):
            example, (sequence,) = workload.example(split, i)
            assert example == workload.splits[split][i]
            assert sequence.n_outputs == 2 and sequence.rows.tolist() == [len(sequence.tokens) - 1] * 2
    lengths = [len(sequences[0].tokens) for sequences in workload.encoded["train"]]
    assert lengths == sorted(set(lengths))  # one exclamation mark more each


def test_load_workload_has_the_models_matrices(spec, tiny_models):
    matrices = load_workload(spec).matrices
    assert len(matrices) == 14 and matrices["model.layers.1.mlp.down_proj"] == (64, 128)
    opt = load_workload(replace(spec, model=Model(str(tiny_models["opt"]))))
    assert opt.matrices["model.decoder.layers.0.fc1"] == (128, 64)
    assert opt.example("train", 0)[1][0].tokens[0] == 1  # its tokenizer puts <s> first


def test_options_of_several_tokens_are_sequences_each(spec):
    workload = load_workload(replace(spec, task=FewTexts(options=(" great", " wonderful thing"))))
    assert [len(sequences) for sequences in workload.encoded["train"]] == [2, 2, 2]


@pytest.mark.parametrize("where", [("train", 2), ("dev", 1), ("test", 0)])
def test_a_text_too_long_for_the_engine_is_named(spec, where):
    spec = replace(spec, task=FewTexts(long=where), engine=ShortEngine(30))
    says = (
        rf"at most 30 tokens, the limit of the engine \(engine\.max_length, engine\.max_tokens\); got \d+ tokens in "
        rf"{where[0]} example {where[1]} \('the film is far too long"
    )
    with pytest.raises(ConfigError, match=says):
        load_workload(spec)


def test_a_text_too_long_for_the_model_is_named(spec):
    """The limit is on what runs through the model: exactly as many tokens pass, one more does not."""

    @dataclass(frozen=True)
    class OneText:
        text: str

        def load(self) -> Splits:
            return Splits((Example(self.text, WORDS, 0),), ())

    fits = load_workload(replace(spec, task=OneText("!" * 256)))
    assert len(fits.example("train", 0)[1][0].tokens) == 256
    says = r"at most 256 tokens, the limit of the model; got 257 tokens in train example 0 \('!!!"
    with pytest.raises(ConfigError, match=says):
        load_workload(replace(spec, task=OneText("!" * 257)))


def test_no_training_examples_are_refused(spec):
    with pytest.raises(ConfigError, match=r"expected at least one training example; got none. Raise task\.train"):
        load_workload(replace(spec, task=FewTexts(train=0)))


def test_unknown_targets_are_refused_before_a_model_loads(spec):
    with pytest.raises(ConfigError, match=r"ends in c_attn; it has .*down_proj"):
        load_workload(replace(spec, space=Lora(targets=("c_attn",))))


@pytest.mark.parametrize("space", [Lozo, LowRank])
def test_head_and_embedding_are_not_folded_into(space, spec):
    targets = ("all-linear", "lm_head", "embed_tokens")
    says = rf"inner layers for space={space.__name__.lower()}; got lm_head, model\.embed_tokens: .* Take space=lora"
    with pytest.raises(ConfigError, match=says):
        load_workload(replace(spec, space=space(targets=targets)))
    found = load_workload(replace(spec, space=Lora(targets=targets))).matrices
    assert found.keys() - load_workload(spec).matrices.keys() == {"lm_head", "model.embed_tokens"}


@pytest.fixture
def quantised(tiny_models, tmp_path) -> Path:
    """A model whose config.json says that its weights are quantised; neither its weights nor its tokenizer load."""
    folder = Path(shutil.copytree(tiny_models["llama"], tmp_path / "quantised"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (folder / "config.json").write_text(json.dumps(config))
    for file in folder.glob("*.safetensors"):
        file.write_bytes(b"not weights")
    return folder


@pytest.mark.parametrize("space", [Lozo(), LowRank()], ids=["lozo", "lowrank"])
def test_folding_into_a_quantised_model_is_refused_before_anything_loads(space, spec, quantised):
    for file in quantised.glob("tokenizer*"):
        file.unlink()
    spec = replace(spec, model=Model(str(quantised)), space=space)
    name = type(space).__name__.lower()
    says = rf"space={name} folds its steps .* those of .*quantised are quantised \(gptq\): .* Take space=lora, which"
    with pytest.raises(ConfigError, match=says):
        load_workload(spec)
    with pytest.raises(ConfigError, match="no tokenizer"):  # what the same model would stop at next
        load_workload(replace(spec, space=Lora()))


def test_a_quantised_model_takes_space_lora(spec, quantised):
    workload = load_workload(replace(spec, model=Model(str(quantised))))
    assert len(workload.matrices) == 14 and len(workload.encoded["train"]) == 3


@pytest.mark.parametrize("space", [Lozo(), LowRank()], ids=["lozo", "lowrank"])
def test_a_plain_model_takes_any_space(space, spec):
    workload = load_workload(replace(spec, space=space))
    assert workload.encoded.keys() == {"train", "dev", "test"}


def test_a_spec_pickles(spec):
    assert pickle.loads(pickle.dumps(spec)) == spec
