"""Shells of all kinds: other locales and encodings, readers that go away, closed streams, a full disk."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from zoray.run.folder import load_run_config
from zoray.run.journal import read

TALK = r"""
import sys
from zoray.records.process import streams
streams.settle()
print("\u201c\xfc\u201d", sys.argv[1:], flush=True)
for _ in range(20_000):
    print("a line of the thousands that a pipe has no room for")
print("to the end", file=sys.stderr)
"""
STDERR_CLOSED = """
import os, sys
from zoray.records.process import streams
streams.settle()
os.write(int(sys.argv[1]), b"%d" % os.open(sys.argv[2], os.O_CREAT | os.O_WRONLY))
print("nobody hears", file=sys.stderr)
"""


@pytest.fixture(scope="module")
def latin1(tmp_path_factory) -> dict[str, str]:
    """Variables of a shell in ISO-8859-1, which few machines have made."""
    if shutil.which("localedef") is None or not os.path.exists("/usr/share/i18n/locales/en_US"):
        pytest.skip("lacks localedef and its sources (Debian: locales)")
    folder = tmp_path_factory.mktemp("locales")
    command = ["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(folder / "en_US.ISO-8859-1")]
    subprocess.run(command, check=True, capture_output=True)
    return {"LOCPATH": str(folder), "LC_ALL": "en_US.ISO-8859-1"}


def talk(*arguments: str | bytes, **variables: str) -> bytes:
    """The first line of what TALK says in a shell with these variables; it is to come to its end."""
    command = [sys.executable, "-c", TALK, *arguments]
    done = subprocess.run(command, capture_output=True, env={**os.environ, **variables})
    assert (done.returncode, done.stderr) == (0, b"to the end\n")
    return done.stdout.splitlines()[0]


@pytest.mark.parametrize(
    "locale", [{}, {"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_the_command_line_is_utf8_in_a_locale_without_characters(locale):
    assert talk("ü", **locale) == "\u201cü\u201d ['ü']".encode()


def test_the_command_line_is_utf8_in_a_locale_of_another_encoding(latin1):
    assert talk("ü", **latin1) == "\u201cü\u201d ['ü']".encode()


def test_a_terminal_of_another_encoding_reads_what_it_can(latin1):
    assert talk(**latin1) == rb"\u201c" + b"\xfc" + rb"\u201d []"
    assert talk(b"\xfc", **latin1) == rb"\u201c" + b"\xfc" + rb"\u201d ['" + b"\xfc']"  # it says itself what it is


def test_what_an_encoding_lacks_is_an_escape():
    assert talk("ü", PYTHONIOENCODING="ascii") == rb"\u201c\xfc\u201d ['\xfc']"
    assert talk(b"\xfc") == "\u201cü\u201d ['\\udcfc']".encode()  # half a character


@pytest.mark.parametrize("python", ["", "-u"])
@pytest.mark.parametrize("ending", ["| head -n 1", "2>&1 >&-", "> /dev/full"])
def test_a_stream_that_takes_no_more_ends_nothing(tmp_path, python, ending):
    shell = f'"$0" {python} -c "$1" 2> {tmp_path}/told {ending}; echo "${{PIPESTATUS[0]}}"'
    done = subprocess.run(["bash", "-c", shell, sys.executable, TALK], capture_output=True, encoding="utf-8")
    assert done.stdout.splitlines()[-1] == "0", done
    lost = "output is lost: No space left on device\n" if "full" in ending else ""
    assert (tmp_path / "told").read_text() == ("" if "2>" in ending else f"{lost}to the end\n")


def test_a_file_never_has_the_number_of_a_closed_stream(tmp_path):
    shell = f'exec "$0" -c "$1" 3 {tmp_path}/file 3>&1 1>&- 2>&-'
    done = subprocess.run(["bash", "-c", shell, sys.executable, STDERR_CLOSED], capture_output=True)
    assert int(done.stdout) > 2
    assert (tmp_path / "file").read_bytes() == b""


@pytest.mark.ray
def test_a_run_minds_neither_the_locale_nor_who_listens(tmp_path, tiny_models, latin1):
    """A template and rows with an umlaut, from a shell in ISO-8859-1 whose output nobody reads; then read elsewhere."""
    data = tmp_path / "über.csv"
    data.write_text("text,label\n" + "".join(f"“Es war” {i},{i % 2}\n" for i in range(40)), encoding="utf-8")
    words = "task.words=[' terrible',' great']"
    command = [sys.executable, "-m", "zoray.launch", f"model.path={tiny_models['llama']}", "task=file", words]
    command += [f"task.path={data}", "task.template='{text}, für mich'", "engine=hf", "estimator=two_point"]
    command += ["task.dev=8", "run.test=false", "run.steps=2", "run.batch=2", f"run.folder={tmp_path}", "run.name=run"]
    variables = {**os.environ, **latin1, "PYTHONIOENCODING": "ascii"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=variables)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    told = process.stderr.read()
    assert process.wait() == 0, told
    assert b"Error" not in told
    assert load_run_config(tmp_path / "run").task.template == "{text}, für mich"
    assert len(read(tmp_path / "run" / "journal.jsonl").steps) == 2
