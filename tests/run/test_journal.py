"""The journal: what goes in comes out, every damage is found where it is, and a killed process loses nothing."""

import base64
import json
import math
import os
import random
import signal
import subprocess
import sys
import zlib
from dataclasses import fields, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from zoray.methods.optimizers import to_float32
from zoray.records import Commit, ConfigError, JournalError
from zoray.run import journal
from zoray.run.journal import Journal, StepRecord

HEADER = {"model": "tiny", "space": {"name": "Lora", "rank": 2}, "run": {"seed": 3}, "note": "ä"}
RECORDS = [
    StepRecord(Commit(0, (0.1, to_float32(-1 / 3))), (0.5, 0.25, math.nan, 1e-9), "00ff00ff00ff00ff"),
    StepRecord(Commit(1, (0.0,), decay=0.999), (math.inf, 0.5)),
    StepRecord(Commit(2, (to_float32(1e-45), to_float32(3.4e38), -0.0)), (0.1 + 0.2, 1.0, -2.0, 3.0, 4.0, 5.0)),
    StepRecord(Commit(3, (-7.0,)), (1.0, 2.0), "0123456789abcdef"),
    StepRecord(
        Commit(
            4,
            (0.5,),
            decay=0.99,
            anchor=0.75,
            momentum=to_float32(0.9),
            rate=to_float32(-1 / 3),
            gains=(to_float32(0.1), 0.0),
            signs=bytes(range(256)),
        ),
        (1.0, -1.0),
        "fedcba9876543210",
        (0.1 + 0.2, 0.99**5, 5e-324, 1.0),
        (3.0, -0.25),
    ),
    StepRecord(Commit(5, (), momentum=0.0), (), optimizer=(-0.0,)),
]
LAST = len(RECORDS)


def write(path: Path, records: list[StepRecord] = RECORDS) -> Path:
    with Journal.create(path, HEADER) as log:
        for record in records:
            log.append(record)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "journal.jsonl")


def put(path: Path, content: bytes) -> None:
    """`write_bytes`, without emptying the file first: many file systems make that a slow one."""
    with path.open("r+b") as file:
        file.write(content)
        file.truncate()


def plain(record: StepRecord) -> StepRecord:
    """With null for every loss that is not finite, so that records compare equal."""
    return replace(record, losses=tuple(loss if math.isfinite(loss) else None for loss in record.losses))


# what goes in comes out


def test_round_trip(path):
    contents = journal.read(path)
    assert contents.header == {"format": 3, **HEADER}
    assert [plain(record) for record in contents.steps] == [plain(record) for record in RECORDS]
    assert contents.valid_bytes == path.stat().st_size
    for found, put in zip(contents.steps, RECORDS, strict=True):
        bits = [np.array(record.commit.coefficients, np.float32).tobytes() for record in (found, put)]
        assert bits[0] == bits[1]
    assert math.isnan(contents.steps[0].losses[2]) and math.isnan(contents.steps[1].losses[0])


def test_records_use_every_field_that_there_is():
    """So that the round trip is one of all fields, and a field that is added needs a value here."""
    neutral = {"decay": 1.0, "anchor": 1.0, "momentum": None, "rate": 1.0, "gains": (), "signs": b""}
    assert {field.name for field in fields(Commit)} == {"step", "coefficients", *neutral}
    assert {field.name for field in fields(StepRecord)} == {"commit", "losses", "digest", "optimizer", "trust"}
    assert all(getattr(RECORDS[4].commit, name) != value for name, value in neutral.items())
    assert RECORDS[4].digest is not None and RECORDS[4].optimizer and RECORDS[4].trust


@pytest.mark.parametrize("momentum", [None, 0.0, 0.5])
@pytest.mark.parametrize("anchor", [1.0, 0.0, 0.75])
@pytest.mark.parametrize("decay", [1.0, 0.0, 0.75])
def test_what_is_neutral_is_not_written_and_comes_back(tmp_path, decay, anchor, momentum):
    rates = (1.0, 0.0, -0.25) if momentum is not None else (1.0,)
    records = [
        StepRecord(Commit(step, (0.5,), decay, anchor, momentum, rate), (1.0,)) for step, rate in enumerate(rates)
    ]
    contents = journal.read(write(tmp_path / "journal.jsonl", records))
    assert list(contents.steps) == records
    written = [set(json.loads(line)) for line in (tmp_path / "journal.jsonl").read_text().splitlines()[1:]]
    for rate, names in zip(rates, written, strict=True):
        expected = {"step", "c", "losses", "prev", "crc"}
        expected |= {"decay"} if decay != 1 else set()
        expected |= {"anchor"} if anchor != 1 else set()
        expected |= {"momentum"} if momentum is not None else set()
        expected |= {"rate"} if rate != 1 else set()
        assert names == expected


def test_the_optimizers_state_round_trips_to_the_bit(tmp_path):
    states = [
        (),
        (0.0,),
        (0.1, 0.2, 0.1 + 0.2),
        (-0.0, 5e-324, 1.7976931348623157e308),
        (math.pi, math.nextafter(1, 2)),
    ]
    records = [StepRecord(Commit(step, (1.0,)), (1.0,), optimizer=state) for step, state in enumerate(states)]
    path = write(tmp_path / "journal.jsonl", records)
    for step, state in zip(journal.read(path).steps, states, strict=True):
        assert np.array(step.optimizer).tobytes() == np.array(state).tobytes()
        assert type(step.optimizer) is tuple and all(type(number) is float for number in step.optimizer)
    bodies = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    assert "optimizer" not in bodies[0] and bodies[2]["optimizer"] == [0.1, 0.2, 0.30000000000000004]


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_number_that_json_has_not_is_refused_and_writes_nothing(path, number):
    """The optimizer and the estimator refuse it earlier; a line that cannot be read back must not come to be."""
    before = path.read_bytes()
    with Journal.resume(path, journal.read(path)) as log:
        for record in (
            StepRecord(Commit(LAST, (number,)), (1.0,)),
            StepRecord(Commit(LAST, (1.0,), momentum=0.5, rate=number), (1.0,)),
            StepRecord(Commit(LAST, (1.0,)), (1.0,), optimizer=(number,)),
        ):
            with pytest.raises(ValueError, match="not JSON compliant"):
                log.append(record)
        assert path.read_bytes() == before
        log.append(StepRecord(Commit(LAST, (1.0,)), (1.0,)))
    assert len(journal.read(path).steps) == LAST + 1


def sealed(body: dict) -> bytes:
    """A line as the format describes it: its body, then the CRC-32 of the body's text."""
    text = json.dumps(body, separators=(",", ":"))
    return f'{text[:-1]},"crc":"{zlib.crc32(text.encode()):08x}"}}\n'.encode()


def by_hand(header: dict, bodies: list[dict]) -> bytes:
    lines = [sealed(header)]
    for body in bodies:
        lines.append(sealed({**body, "prev": sha256(lines[-1][:-1]).hexdigest()[:16]}))
    return b"".join(lines)


FORMAT_1 = [  # the decay was always written
    {"step": 0, "c": [0.1, -0.33333334], "decay": 1.0, "losses": [0.5, None], "digest": "00ff00ff00ff00ff"},
    {"step": 1, "c": [0.0], "decay": 0.999, "losses": [0.5, 0.25]},
    {"step": 2, "c": [1e-45, -0.0], "decay": 1.0, "losses": [0.5, 0.25]},
]


def test_format_1_is_read(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(by_hand({"format": 1, **HEADER}, FORMAT_1))
    contents = journal.read(path)
    assert contents.header == {"format": 1, **HEADER}
    assert [plain(record) for record in contents.steps] == [
        StepRecord(Commit(0, (0.1, -0.33333334), 1.0, 1.0, None, 1.0), (0.5, None), "00ff00ff00ff00ff", ()),
        StepRecord(Commit(1, (0.0,), 0.999, 1.0, None, 1.0), (0.5, 0.25), None, ()),
        StepRecord(Commit(2, (1e-45, -0.0), 1.0, 1.0, None, 1.0), (0.5, 0.25), None, ()),
    ]
    with Journal.resume(path, contents) as log:
        log.append(StepRecord(Commit(3, (2.0,)), (1.0,)))
    assert len(journal.read(path).steps) == 4


def test_a_line_of_format_1_as_it_was_written_is_read(tmp_path):
    """Text of an older version, so that `sealed` and this version cannot be wrong in the same way."""
    (tmp_path / "journal.jsonl").write_bytes(
        b'{"format":1,"model":"tiny","run":{"seed":3},"crc":"cd4d8f37"}\n'
        b'{"step":0,"c":[0.5,-0.25],"decay":0.999,"losses":[0.75,null],"prev":"1c390fddf81221ed","crc":"b4e155e3"}\n'
    )
    contents = journal.read(tmp_path / "journal.jsonl")
    assert contents.header == {"format": 1, "model": "tiny", "run": {"seed": 3}}
    assert contents.steps[0].commit == Commit(0, (0.5, -0.25), decay=0.999)
    assert contents.steps[0].losses[0] == 0.75 and math.isnan(contents.steps[0].losses[1])


def test_the_file_is_as_the_format_describes_it(path):
    """Written by hand from the records' plain values: the same bytes."""
    bodies = []
    for record in RECORDS:
        commit = record.commit
        body = {"step": commit.step, "c": list(commit.coefficients)}
        body |= {"decay": commit.decay} if commit.decay != 1 else {}
        body |= {"anchor": commit.anchor} if commit.anchor != 1 else {}
        body |= {"momentum": commit.momentum} if commit.momentum is not None else {}
        body |= {"rate": commit.rate} if commit.rate != 1 else {}
        signs = base64.b85encode(commit.signs).decode()
        body |= {"gains": list(commit.gains), "signs": signs} if commit.signs else {}
        body |= {"losses": [loss if math.isfinite(loss) else None for loss in record.losses]}
        body |= {"optimizer": list(record.optimizer)} if record.optimizer else {}
        body |= {"trust": list(record.trust)} if record.trust else {}
        body |= {"digest": record.digest} if record.digest else {}
        bodies.append(body)
    assert path.read_bytes() == by_hand({"format": 3, **HEADER}, bodies)


def test_a_line_is_plain_json_with_short_numbers(path):
    lines = path.read_text().splitlines()
    bodies = [json.loads(line) for line in lines]
    assert bodies[1]["c"] == [0.1, -0.33333334] and '"c":[0.1,-0.33333334],' in lines[1]
    assert bodies[1]["losses"] == [0.5, 0.25, None, 1e-9]
    assert "digest" not in bodies[2] and bodies[4]["digest"] == "0123456789abcdef"
    assert not any(word in line for line in lines for word in ("NaN", "Infinity"))


def test_a_journal_may_hold_its_header_only(tmp_path):
    contents = journal.read(write(tmp_path / "journal.jsonl", []))
    assert contents.steps == () and contents.header["model"] == "tiny"


def test_a_step_is_on_disk_when_append_returns(tmp_path):
    with Journal.create(tmp_path / "journal.jsonl", HEADER) as log:
        for count, record in enumerate(RECORDS, start=1):
            log.append(record)
            assert len(journal.read(log.path).steps) == count


def test_random_coefficients_and_losses_round_trip(tmp_path):
    generator = np.random.default_rng(0)
    records = [
        StepRecord(Commit(step, tuple(to_float32(c) for c in generator.standard_cauchy(5))), tuple(losses))
        for step, losses in enumerate(generator.standard_cauchy((50, 10)).tolist())
    ]
    assert list(journal.read(write(tmp_path / "journal.jsonl", records)).steps) == records


# what is refused


def test_a_missing_journal_is_the_users_mistake(tmp_path):
    with pytest.raises(ConfigError, match=r"expected a journal at .*journal\.jsonl; there is none.*run=runs/NAME"):
        journal.read(tmp_path / "journal.jsonl")


def test_an_empty_journal_and_a_torn_header_are_refused(path):
    header = path.read_bytes().split(b"\n")[0]
    for content in (b"", header[:10], header):
        path.write_bytes(content)
        with pytest.raises(JournalError, match=r"holds no whole line.*start it again"):
            journal.read(path)


def test_a_second_create_is_refused_and_harms_nothing(path):
    before = path.read_bytes()
    with pytest.raises(JournalError, match=r"expected no journal at .* yet; resume that run, or choose another"):
        Journal.create(path, {"model": "other"})
    assert path.read_bytes() == before


@pytest.mark.parametrize("step", [0, LAST - 1, LAST + 1])
def test_a_wrong_next_step_is_refused_and_writes_nothing(path, step):
    before = path.read_bytes()
    with (
        Journal.resume(path, journal.read(path)) as log,
        pytest.raises(JournalError, match=f"expected step {LAST} next, got step {step}"),
    ):
        log.append(StepRecord(Commit(step, (1.0,)), (1.0, 2.0)))
    assert path.read_bytes() == before


@pytest.mark.parametrize("number", [0, 4, "1", "2", None])
def test_another_format_is_refused(tmp_path, number):
    Journal.create(tmp_path / "journal.jsonl", {"format": number, "model": "tiny"}).close()
    with pytest.raises(JournalError, match=f"expected journal format 3, got {number!r}; use that zoray version"):
        journal.read(tmp_path / "journal.jsonl")


# damage


def test_a_torn_last_line_is_dropped_at_every_length_and_the_run_goes_on_as_if_undisturbed(path):
    whole = path.read_bytes()
    begin = whole[:-1].rfind(b"\n") + 1
    assert len(whole) - begin > 80
    for end in range(begin, len(whole)):
        path.write_bytes(whole[:end])
        contents = journal.read(path)
        assert len(contents.steps) == len(RECORDS) - 1 and contents.valid_bytes == begin
        with Journal.resume(path, contents) as log:
            assert log.next_step == len(RECORDS) - 1
            log.append(RECORDS[-1])
        assert path.read_bytes() == whole


def test_resuming_an_undamaged_journal_goes_on_as_if_undisturbed(path, tmp_path):
    split = write(tmp_path / "split.jsonl", RECORDS[:2])
    for record in RECORDS[2:]:
        with Journal.resume(split, journal.read(split)) as log:
            log.append(record)
    assert split.read_bytes() == path.read_bytes()


def starts_of_lines(whole: bytes) -> list[int]:
    return [0, *(i + 1 for i, byte in enumerate(whole) if byte == 0x0A)]


@pytest.mark.parametrize("mask", [*(1 << bit for bit in range(8)), 0xFF, 0x55])
def test_a_flip_of_any_byte_is_found_in_its_line(path, mask):
    """Each bit alone, and several at once; newlines between lines too, which join two lines to one."""
    whole = path.read_bytes()
    starts = starts_of_lines(whole)
    for position in range(len(whole) - 1):  # without its newline, the last line counts as torn
        damaged = bytearray(whole)
        damaged[position] ^= mask
        put(path, damaged)
        number = sum(start <= position for start in starts)
        with pytest.raises(JournalError, match=rf"journal\.jsonl, line {number}: damaged"):
            journal.read(path)


@pytest.mark.parametrize("mask", [*(1 << bit for bit in range(8)), 0xFF])
def test_a_flip_of_the_last_newline_is_a_torn_line(path, mask):
    whole = path.read_bytes()
    put(path, whole[:-1] + bytes([0x0A ^ mask]))
    contents = journal.read(path)
    assert [plain(record) for record in contents.steps] == [plain(record) for record in RECORDS[:-1]]
    with Journal.resume(path, contents) as log:
        log.append(RECORDS[-1])
    assert path.read_bytes() == whole


@pytest.mark.parametrize("value", [0x00, 0x22, 0x30, 0x7D])
def test_any_byte_overwritten_is_found_in_its_line(path, value):
    whole = path.read_bytes()
    starts = starts_of_lines(whole)
    for position, byte in enumerate(whole[:-1]):
        if byte == value:
            continue
        put(path, whole[:position] + bytes([value]) + whole[position + 1 :])
        number = sum(start <= position for start in starts)
        with pytest.raises(JournalError, match=rf"journal\.jsonl, line {number}: damaged"):
            journal.read(path)


def test_a_lost_and_a_doubled_byte_are_found_in_their_line(path):
    whole = path.read_bytes()
    starts = starts_of_lines(whole)
    for position in range(len(whole) - 1):
        number = sum(start <= position for start in starts)
        put(path, whole[:position] + whole[position + 1 :])
        with pytest.raises(JournalError, match=rf"journal\.jsonl, line {number}: damaged"):
            journal.read(path)
        put(path, whole[: position + 1] + whole[position:])
        after = number + (whole[position] == 0x0A)  # an empty line behind the newline
        with pytest.raises(JournalError, match=rf"journal\.jsonl, line {after}: damaged"):
            journal.read(path)


def test_a_newline_in_place_of_any_byte_is_found_in_its_line(path):
    whole = path.read_bytes()
    starts = starts_of_lines(whole)
    for position, byte in enumerate(whole[:-1]):
        if byte == 0x0A:
            continue
        put(path, whole[:position] + b"\n" + whole[position + 1 :])
        number = sum(start <= position for start in starts)
        with pytest.raises(JournalError, match=rf"journal\.jsonl, line {number}: damaged"):
            journal.read(path)


@pytest.mark.parametrize(
    ("order", "number"),
    [
        ([0, 2, 1, 3, 4, 5, 6], 2),  # swapped
        ([0, 1, 3, 2, 4, 5, 6], 3),
        ([0, 1, 2, 4, 3, 5, 6], 4),
        ([0, 1, 2, 3, 4, 6, 5], 6),
        ([0, 1, 1, 2, 3, 4, 5, 6], 3),  # doubled
        ([0, 1, 2, 3, 4, 5, 6, 6], 8),
        ([0, 2, 3, 4, 5, 6], 2),  # removed
        ([0, 1, 2, 4, 5, 6], 4),
        ([0, 1, 2, 3, 4, 6], 6),
    ],
)
def test_swapped_doubled_and_removed_lines_are_found(path, order, number):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[i] for i in order))
    with pytest.raises(JournalError, match=rf"journal\.jsonl, line {number}: does not follow the line before"):
        journal.read(path)


def test_a_removed_header_and_a_second_one_are_found(path):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[1:]))
    with pytest.raises(JournalError, match="expected journal format 3, got None"):
        journal.read(path)
    path.write_bytes(b"".join([lines[0], *lines]))
    with pytest.raises(JournalError, match="line 2: does not follow the line before"):
        journal.read(path)


def test_a_line_of_another_run_is_found(path, tmp_path):
    """Whole, with a right checksum and the right step, but not a successor of the line before."""
    others = [StepRecord(Commit(record.commit.step, (9.0,)), (1.0, 2.0)) for record in RECORDS]
    other = write(tmp_path / "other.jsonl", others).read_bytes().splitlines(keepends=True)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], other[3], *lines[4:]]))
    with pytest.raises(JournalError, match="line 4: does not follow the line before"):
        journal.read(path)


# kill


def made_up_record(step: int) -> StepRecord:
    return StepRecord(Commit(step, (to_float32(1 / (step + 1)),) * 40), tuple([step / 7, -step / 3] * 40))


CHILD = """
import sys
from dataclasses import replace
from pathlib import Path
from test_journal import HEADER, made_up_record
from zoray.run import journal

path = Path(sys.argv[1])
if path.exists():
    log = journal.Journal.resume(path, journal.read(path))
else:
    log = journal.Journal.create(path, HEADER)
while True:
    log.append(made_up_record(log.next_step))
    print(log.next_step, flush=True)
"""


def test_a_killed_process_loses_no_step_that_append_returned_for(tmp_path):
    path, before = tmp_path / "journal.jsonl", 0
    random_moment = random.Random()
    for _ in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(path)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        )
        assert child.stdout is not None
        for _ in range(random_moment.randrange(1, 300)):
            announced = int(child.stdout.readline())
        child.send_signal(signal.SIGKILL)
        announced = max([announced, *map(int, child.stdout.read().split("\n")[:-1])])
        child.stdout.close()
        assert child.wait(timeout=60) == -signal.SIGKILL
        contents = journal.read(path)
        assert before < announced <= len(contents.steps) <= announced + 1
        assert all(found == made_up_record(step) for step, found in enumerate(contents.steps))
        before = len(contents.steps)


def test_a_run_that_was_cut_within_its_header_begins_anew(tmp_path):
    """Nothing of it was journalled, so its folder is as good as new."""
    from zoray.run.journal import read_journal

    path = tmp_path / "journal.jsonl"
    for left in (b"", b'{"format":2,"mod'):
        path.write_bytes(left)
        assert read_journal(path, {"model": "m"}) is None and not path.exists()
    assert read_journal(path, {"model": "m"}) is None


def test_a_journal_has_one_writer_at_a_time(tmp_path):
    path = tmp_path / "journal.jsonl"
    with journal.Journal.create(path, HEADER) as log:
        log.append(RECORDS[0])
        contents = journal.read(path)
        with pytest.raises(JournalError, match="being written by another process"):
            journal.Journal.resume(path, contents)
        log.append(RECORDS[1])
    with pytest.raises(JournalError, match="has grown since it was read"):
        journal.Journal.resume(path, contents)
    assert [noted.commit for noted in journal.read(path).steps] == [noted.commit for noted in RECORDS[:2]]
    with journal.Journal.resume(path, journal.read(path)) as log:
        log.append(RECORDS[2])
