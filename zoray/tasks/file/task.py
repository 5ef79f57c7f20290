"""Your own data: JSONL, CSV, TSV or Parquet files, plain text, or a data set on the Hub.

Guarantees: every row is used or refused, and a refusal names file, line and column. Rows that repeat an earlier row's
prompt are left out, so that no prompt is in two splits (prompts are told apart by 64 bits of a hash). A large file is
read once, and the place, label and hash of each row are kept; its training examples are read again on demand, and are
the same as if the file were small and in memory.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from glob import glob
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from zoray.records import WHOLE, ConfigError, Sampling, Splits, require, settled
from zoray.records.overrides import check_whole, mapping_of, setting
from zoray.records.paths import user_path
from zoray.tasks.base import Task, check_sizes, check_words, seeded_parts
from zoray.tasks.file.cells.example import Reader
from zoray.tasks.file.cells.labels import MOST as MOST_LABELS
from zoray.tasks.file.cells.labels import label_text, label_words
from zoray.tasks.file.cells.spacing import gap
from zoray.tasks.file.columns import CONTROL, KINDS, NAMES, ROLES, Schema, infer
from zoray.tasks.file.rows.faults import Faults, WrongRow
from zoray.tasks.file.rows.hub import hub_rows
from zoray.tasks.file.rows.parquet import parquet_rows
from zoray.tasks.file.rows.plain_text import FEWEST_WORDS, PLAIN_SUFFIXES, PlainText
from zoray.tasks.file.rows.text import TEXT_SUFFIXES, Rows, TextFiles, several_rows
from zoray.tasks.file.stream import Examples, Scan, first_of_each, once, scan

SUFFIXES = (*TEXT_SUFFIXES, ".parquet", *PLAIN_SUFFIXES)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?")
FOREIGN = {  # how to convert a file of another format
    **dict.fromkeys((".xlsx", ".xls", ".ods", ".numbers"), "In the spreadsheet: Save as, CSV UTF-8"),
    ".json": "Write one JSON object a line, and call it .jsonl",
    **dict.fromkeys((".gz", ".zip", ".bz2", ".xz", ".zst"), "Unpack it"),
    **dict.fromkeys((".tab", ".data", ".arrow", ".xml", ".html", ".pkl"), "Convert the file"),
}
LOOK = 1000  # rows from which the columns of JSON lines are first inferred
SHOWN = 100  # examples that the description is based on
SHARE, MOST = 10, {"dev": 500, "test": 1000}  # dev and test are a tenth of a file each, up to these sizes


@dataclass(frozen=True)
class File(Task):
    """A file of yours; its columns say which kind of data it has.

    text, label                 a choice among label words, which follow the text
    prompt, completion          an answer to write; several right ones as a JSON list, training takes the first
    messages                    a chat, [{"role": ..., "content": ...}, ...], whose last message is the answer
    prompt, chosen, rejected    a preference
    prompt                      a text to complete, for a reward to judge
    instruction, input, output  prompt and completion; input, system and history may be empty, or not be there

    A .txt or .md has no columns: the first third of each paragraph is a prompt, the rest its completion.

    Args:
        path: a file, a pattern such as data/*.jsonl, or org/name (org/name:configuration) on the Hub. CSV and TSV need
            a header line; a cell with a separator, a quote or a line break in it is quoted, as spreadsheets do.
        words: label -> label word, {negative: " terrible", positive: " great"}, or a list for labels 0, 1, ...; as a
            text in JSON for labels that a Hydra mapping can't express. null takes each label after a space.
        text_column: the column with the text; null for the one called text. The other columns work the same way.
        template: the prompt, with columns in braces, {input?} for one that may be empty; null is "{text} It was" for a
            choice, else the prompt itself.
        train: examples to learn from; null for all that dev and test leave.
        dev: null is 10 %, and at most 500.
        test: null is 10 %, and at most 1,000.
        kind: choice, completion, chat, preference or prompt, where the columns do not decide.
        chat: make a plain prompt one message of a user, so that a chat model sees its own template.
        metric: what judges an answer that the model writes, "f1", "exact_match", ...; null leaves it to the loss, or
            to accuracy where there are options.
        max_tokens: longest answer that the model writes.
        stop: texts that end an answer.
        space: whether to put a space between a prompt and what follows if the file has none there, and before labels
            as words; null puts one unless the script has none (Chinese, Japanese, Thai, ...).
        control_tokens: whether the model's control tokens count in the plain text of rows, as in prompts that a chat
            template has rendered already; otherwise they are text. Those of `template` and `words` always count.
        turns: which turns of the assistant in a chat are learnt, "all" or "last".
        ignore: keys of messages to leave out, such as name; the model's chat template has to write all others. `tools`
            leaves out the column of that name.
    """

    cached: ClassVar[bool] = True  # whether the result of reading a large file may be kept in the cache

    path: str
    words: Mapping[str, str] | Sequence[str] | str | None = None
    text_column: str | None = None
    label_column: str | None = None
    template: str | None = None
    train: int | None = None
    dev: int | None = None
    test: int | None = None
    seed: int = 0
    prompt_column: str | None = None
    completion_column: str | None = None
    messages_column: str | None = None
    chosen_column: str | None = None
    rejected_column: str | None = None
    kind: str | None = None
    chat: bool = False
    metric: str | None = None  # pyright: ignore[reportIncompatibleVariableOverride]  # a setting here, as `sampling`
    max_tokens: int = 50
    stop: tuple[str, ...] = ()
    space: bool | None = None
    control_tokens: bool = False
    turns: str = "all"
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_path(self.path)
        if self.words is not None:
            object.__setattr__(self, "words", _words(self.words))
        if self.template is not None and (not isinstance(self.template, str) or not NAMES.search(self.template)):
            raise ConfigError(
                f"template must be text with a column in braces, such as '{{text}} It was'; got {self.template!r}"
            )
        for name in ("template", *(f"{role}_column" for role in ROLES)):
            check_whole(getattr(self, name) or "", f"task.{name}") if isinstance(getattr(self, name), str) else None
        train, dev, test = (1 if size is None else size for size in (self.train, self.dev, self.test))
        check_sizes(train, dev, test, self.seed)
        for role in ROLES:
            name = getattr(self, f"{role}_column")
            if name is not None and (not isinstance(name, str) or not name):
                raise ConfigError(f"{role}_column must be a column's name, or null; got {name!r}")
        require(self.kind in (*KINDS, None), f"task.kind to be one of {', '.join(KINDS)}, or null", self.kind)
        require(isinstance(self.chat, bool), "task.chat to be true or false", self.chat)
        require(isinstance(self.control_tokens, bool), "task.control_tokens to be true or false", self.control_tokens)
        ok = not isinstance(self.ignore, str) and all(isinstance(key, str) and key for key in self.ignore)
        require(ok, "task.ignore to be a list of keys, such as [name]", self.ignore)
        object.__setattr__(self, "ignore", tuple(self.ignore))
        require(self.turns in ("all", "last"), "task.turns to be all or last", self.turns)
        require(self.space in (True, False, None), "task.space to be true, false or null", self.space)
        ok = self.metric is None or (isinstance(self.metric, str) and self.metric.isidentifier())
        require(ok, "task.metric to be null or a metric's name, such as f1 or exact_match", self.metric)
        object.__setattr__(self, "stop", self.sampling.stop)

    @property
    def sampling(self) -> Sampling:  # pyright: ignore[reportIncompatibleVariableOverride]
        """How answers are written."""
        return Sampling(max_tokens=self.max_tokens, stop=self.stop)

    def tables(self) -> dict[str, Rows]:
        """Its rows, as open_rows returns them."""
        return open_rows(self.path)

    def load(self) -> Splits:
        """Read every row once, check it, and split them."""
        tables = self.tables()
        stamps = tables["train"].stamps if self.cached else None
        taken, lines = once(self, stamps, lambda: self._scan(tables))
        object.__setattr__(self, "_lines", lines)  # what describe says; no part of the config
        train = taken["train"]
        return Splits(train if len(train) > WHOLE else train[:], taken["dev"][:], taken["test"][:])

    def _scan(self, tables: dict[str, Rows]) -> tuple[dict[str, Examples], list[str]]:
        """The examples of each split, and what `describe` says."""
        if self.test == 0:
            tables.pop("test", None)  # its labels may be hidden
        reader, scans, numbers = self._passed(tables)
        if not len(scans["train"].places):
            raise ConfigError(f"{self.path} has no rows; expected one example a row")
        rows = tables["train"]
        if isinstance(rows, TextFiles):
            _check_doubts(rows, reader, numbers)
        if reader.schema.kind == "choice" and reader.words is None:
            reader = replace(
                reader, words=label_words(list(numbers), self.path, self._ending(reader.schema), self.space)
            )
        known = list(reader.words or ())
        labels = np.array([known.index(label) for label in numbers] or [0], np.int64)
        first = first_of_each([found.keys for found in scans.values()])
        kept = {
            name: Examples(tables[name], reader, found.places[own], labels[found.labels[own]])
            for (name, found), own in zip(scans.items(), first, strict=True)
        }
        if not len(kept["train"]):
            raise ConfigError(
                f"{self.path}: all of its rows are held out as well, and a row can't be in both. Hold out other rows"
            )
        count = sum(map(len, first))
        return self._split(kept, count), _description(self.path, reader, rows, count, kept)

    def _passed(self, tables: dict[str, Rows]) -> tuple[Reader, dict[str, Scan], dict[str, int]]:
        """The reader of the rows, their scans, and the labels' numbers by first appearance.

        All columns of JSON lines are known only after a whole pass; if they change the reader, there is another pass.
        """
        _look(tables["train"], self.path)
        again = self._reader(tables["train"])
        while True:
            reader, numbers, error = again, dict[str, int](), None
            number_of = partial(_number, numbers, reader.words is None)
            scans = {}
            try:
                for name in ("test", "dev", "train"):
                    if name in tables:
                        scans[name] = scan(tables[name], reader, number_of)
            except ConfigError as wrong:
                error = wrong
            again = self._reader(tables["train"])
            if again == reader:
                if error is not None:
                    raise error
                return reader, scans, numbers

    @property
    def kind_found(self) -> str:
        """`kind`, or what the columns say."""
        rows = open_rows(self.path)["train"]
        _look(rows, self.path)
        return self._reader(rows).schema.kind

    def describe(self) -> list[str]:
        """How the file was understood."""
        if not hasattr(self, "_lines"):
            self.load()
        return list(getattr(self, "_lines"))  # noqa: B009

    def _reader(self, rows: Rows) -> Reader:
        """The reader that makes examples of the rows, from their columns."""
        given = {role: name for role in ROLES if (name := getattr(self, f"{role}_column"))}
        kind = self.kind or ("choice" if self.words is not None else None)
        schema = infer(rows.columns, given, kind, self.template, rows.header)
        if schema.kind != "choice":
            require(self.words is None, f"no task.words for {schema.kind}, which has no labels", self.words)
        choices = schema.kind in ("choice", "preference")
        if self.metric is not None:
            ok = self.metric in ("accuracy", "f1") if choices else self.metric != "accuracy"
            instead = "accuracy or f1" if choices else "f1, exact_match or another of answers"
            require(ok, f"task.metric to be null, {instead} for {schema.kind}", self.metric)
        words: Any = self.words
        if words is None and schema.kind == "choice":
            names = rows.words.get(schema.columns["label"], {})
            if 0 < len(names) <= MOST_LABELS:
                ending = self._ending(schema)
                words = {label: gap(ending, name, self.space) + name for label, name in names.items()}
        kept = (self.space, self.control_tokens, self.turns, self.ignore)
        return Reader(schema, self.chat, rows.cells, words, *kept)

    def _ending(self, schema: Schema) -> str:
        """The end of a prompt, as far as it is known; label words of a chat stand alone."""
        return "" if schema.template is None or self.chat else schema.template.texts[-1]

    def _split(self, kept: Mapping[str, Examples], count: int) -> dict[str, Examples]:
        """Test, dev and train, drawn from the rows in this order, unless they have rows of their own.

        `count` is that of all rows, those with an earlier row's prompt too.
        """
        pool = kept["train"]
        tenth = max(1, len(pool) // SHARE)
        taken: dict[str, Examples] = {}
        sizes: dict[str, int] = {}
        for name in ("test", "dev"):
            size = getattr(self, name)
            if name in kept:
                own = kept[name]
                size = max(int(name == "dev"), min(MOST[name], len(own))) if size is None else size
                taken[name] = own.part(seeded_parts(len(own), [size], self.seed, f"{self.path} ({name})")[0])
            else:
                sizes[name] = min(MOST[name], tenth) if size is None else size
        sizes["train"] = max(1, len(pool) - sum(sizes.values())) if self.train is None else self.train
        repeats = count - sum(map(len, kept.values()))
        source = f"{self.path}, less {repeats:,} rows with the prompt of an earlier one," if repeats else self.path
        parts = seeded_parts(len(pool), list(sizes.values()), self.seed, source)
        return taken | {name: pool.part(part) for name, part in zip(sizes, parts, strict=True)}


def open_rows(path: str) -> dict[str, Rows]:
    """The rows that a path names: all of them as "train"; of a data set on the Hub its "dev" and "test" as well.

    Raises:
        ConfigError: nothing is there, or files of more than one format.
    """
    here = user_path(path)
    if here.is_dir():
        raise ConfigError(
            f"expected task.path to be a file; {path} is a folder. Give its files: "
            f"{setting('task.path', f'{path}/*.csv')}"
        )
    if not here.exists() and not _is_pattern(path):
        if here.suffix.lower() not in SUFFIXES:
            return dict(hub_rows(path))
        raise ConfigError(f"can't read task.path={path}: No such file or directory. Give an existing file")
    found = [here] if here.exists() else sorted(map(Path, glob(str(here), recursive=True)))
    files = [file for file in found if not file.is_dir()]
    if not files:
        raise ConfigError(f"can't read task.path={path}: no file matches it. Look with: ls {_globbed(path)}")
    suffixes = {file.suffix.lower(): file for file in reversed(files)}
    for suffix, file in suffixes.items():
        if suffix not in SUFFIXES:
            raise ConfigError(_foreign(suffix, f"{file} (of task.path={path})" if len(files) > 1 else path))
    if len(suffixes) > 1:
        names = ", ".join(f"{suffixes[suffix].name} and others in {suffix}" for suffix in sorted(suffixes))
        raise ConfigError(
            f"expected files of one format for task.path={path}; got {names}. Narrow the pattern, such as "
            f"{setting('task.path', f'{here.parent}/*{min(suffixes)}')}"
        )
    (suffix,) = suffixes
    kind = parquet_rows if suffix == ".parquet" else PlainText if suffix in PLAIN_SUFFIXES else TextFiles
    return {"train": kind(path, files)}


def _globbed(pattern: str) -> str:
    """A pattern for a shell, which matches nothing within quotes."""
    return re.sub(r"[^*?\[\]]+", lambda found: shlex.quote(found[0]), pattern)


def _is_pattern(path: str) -> bool:
    return any(character in path for character in "*?[")


def _check_path(path: object) -> None:
    """Refuse a path that can't be a file, a pattern or a data set on the Hub."""
    if isinstance(path, str) and path:
        suffix = Path(path).suffix.lower()
        if suffix in SUFFIXES or (suffix not in FOREIGN and (_is_pattern(path) or HUB_ID.fullmatch(path))):
            return
        if user_path(path).is_dir():
            return  # open_rows says what to do
    raise ConfigError(_foreign(Path(str(path)).suffix.lower(), path))


def _foreign(suffix: str, path: object) -> str:
    wanted = ", ".join(SUFFIXES)
    advice = FOREIGN.get(suffix, "Convert the file, or give org/name for a data set on the Hub")
    return f"task.path must end in {wanted}; got {str(path)!r}. {advice}"


def _words(given: object) -> dict[str, str]:
    """Label -> label word, from a setting."""
    listed = mapping_of(given) if isinstance(given, str) else given
    if isinstance(listed, str) or not isinstance(listed, Mapping | Sequence):
        example = setting("task.words", {"no": " terrible", "yes": " great"})
        raise ConfigError(f"words must map labels to label words, or list them; got {given!r}. For example {example}")
    pairs = listed if isinstance(listed, Mapping) else dict(enumerate(listed))
    words = {label_text(label): word for label, word in pairs.items()}
    check_words(list(words.values()))
    if len(words) < len(pairs):
        raise ConfigError(f"words must have each label once; got {list(pairs)}. Leave one out")
    for text in (*words, *words.values()):
        check_whole(text, "task.words")
    return {label: settled(word) if any(mark in word for mark in CONTROL) else word for label, word in words.items()}


def _look(rows: Rows, path: str) -> None:
    """Read the first rows, so that columns are known; raise ConfigError if none can be read."""
    faults, good = Faults(), 0
    for number, (_, _, row) in enumerate(rows):
        if isinstance(row, WrongRow):
            faults.add(row)
        else:
            good += 1
        if good and number >= LOOK:
            return
    if not rows.columns or not good:
        faults.check()
    if not good:
        raise ConfigError(f"{path} has no rows; expected one example a row")


def _number(numbers: dict[str, int], words: bool, label: str, where: str) -> int:
    """The number of a label; `words`: whether labels are their own words."""
    if label not in numbers and len(numbers) == MOST_LABELS and words:
        raise ConfigError(
            f"{where}: expected at most {MOST_LABELS} labels that are label words themselves; {label!r} is one more. "
            "Give task.words=..., a mapping of labels to words, or name another column: task.label_column=..."
        )
    return numbers.setdefault(label, len(numbers))


def _check_doubts(rows: TextFiles, reader: Reader, labels: Mapping[str, int]) -> None:
    """Refuse a row with a quoted cell that holds whole lines, if each line has a label of the file."""
    column, faults = reader.schema.columns.get("label"), Faults()
    if column is None:
        return
    for where, lines in rows.doubts:
        if all(label_text(line[column].strip().strip('"')) in labels for line in lines):
            faults.add(several_rows(where, len(lines), f"each of which has a label in column {column!r}", "CSV"))
    faults.check()


def _description(path: str, reader: Reader, rows: Rows, count: int, kept: Mapping[str, Examples]) -> list[str]:
    """The schema, labels with their counts, where spaces were put, and how many rows were left out."""
    schema, usable = reader.schema, sum(map(len, kept.values()))
    lines = [f"{path}: {count:,} rows, {schema.kind}"]
    if schema.columns:
        named = (f"{column!r} is the {role}" for role, column in schema.columns.items())
        lines.append(f"columns: {', '.join(named)}")
    if schema.template is not None:
        marks = zip(schema.template.columns, schema.template.optional, strict=True)
        text = schema.template.fill([f"{{{column}{'?' * optional}}}" for column, optional in marks])
        lines.append(f"prompt: {text!r}" + (", as one message of a user" if reader.chat else ""))
    if reader.words is not None:
        counts = np.bincount(np.concatenate([own.labels for own in kept.values()]), minlength=len(reader.words))
        each = zip(reader.words.items(), counts.tolist(), strict=True)
        lines.append("labels: " + ", ".join(f"{label!r} as {word!r} ({count:,})" for (label, word), count in each))
    if reader.space is None and schema.kind in ("completion", "preference"):
        lines += _spaces(reader, kept["train"])
    if isinstance(rows, TextFiles):
        lines += _oddities(rows)
    if isinstance(rows, PlainText) and rows.short:
        lines.append(f"left out, since they have fewer than {FEWEST_WORDS} words: {rows.short:,} paragraphs")
    if count > usable:
        lines.append(f"left out, since an earlier row has the same prompt: {count - usable:,} rows")
    return lines


def _spaces(reader: Reader, examples: Examples) -> list[str]:
    """Whether spaces are put before completions, by the first examples."""
    few, never = range(min(SHOWN, len(examples))), replace(reader, space=False)
    put = sum(example != examples.at(i, never) for i, example in enumerate(examples.take(few)))
    if not put:
        return []
    every = "the" if put == len(few) else f"{put} of the first {len(few)}"
    return [f"a space is put before {every} completions, which have none ({setting('task.space', False)} for none)"]


def _oddities(rows: TextFiles) -> list[str]:
    """Oddities of a table, which may mean that it has another number of rows."""
    lines = []
    if rows.empty:
        lines.append(f"left out, since all their cells are empty: {rows.empty:,} rows")
    if rows.long:
        lines.append(
            f"cells go on over several lines in {rows.long:,} row{'s' * (rows.long != 1)}, first in {rows.first_long}"
        )
    if rows.doubts:
        where, several = rows.doubts[0]
        lines[-1] += (
            f". Of {len(rows.doubts):,} of them each line could be a row of its own, first in {where} ({len(several)} "
            "lines). If they are rows, write the quote that a cell begins with twice, within quotes"
        )
    return lines
