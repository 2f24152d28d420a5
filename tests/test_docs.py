"""The documents say what is so: their Python runs, their commands, options, make targets and links exist."""

from __future__ import annotations

import doctest
import re
import shlex
from pathlib import Path

import pytest
import typer

import arrowquant_gpu
from arrowquant_gpu import errors
from arrowquant_gpu.cli import app

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
COMMANDS = typer.main.get_command(app).commands
GLOBAL_OPTIONS = {"--version", "--help"}


def names(documents: list[Path]) -> list[str]:
    return [str(d.relative_to(ROOT)) for d in documents]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def code(text: str) -> list[str]:
    """Lines of fenced and indented blocks, and code spans, without the prompt."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    lines += re.findall(r"^ {4}(\S.*)$", prose, re.MULTILINE)
    lines += re.findall(r"`([^`\n]+)`", prose)
    return [line.strip().removeprefix("$ ") for line in lines]


def words(line: str) -> list[str]:
    """The line as a shell reads it; as it stands where it is no shell line."""
    try:
        return shlex.split(line, comments=True)
    except ValueError:
        return line.split()


def wrong_commands(text: str) -> list[str]:
    """Every `arrowquant` and `make` line that names a command, option or target that does not exist."""
    targets, wrong = make_targets(), []
    for line in code(text):
        line = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", line)
        match words(line):
            case ["make", *rest]:
                asked = {w for w in rest if "=" not in w and not w.startswith("-")}
                wrong += [f"{line}: no target {t}" for t in sorted(asked - targets)]
            case ["arrowquant", first, *rest] if not first.startswith("-"):
                if first not in COMMANDS:
                    wrong.append(f"{line}: no command {first}")
                    continue
                known = {o for p in COMMANDS[first].params for o in (*p.opts, *p.secondary_opts)} | GLOBAL_OPTIONS
                used = {w.partition("=")[0] for w in rest if re.match(r"--?[a-z]", w)}
                wrong += [f"{line}: no option {o}" for o in sorted(used - known)]
    return wrong


def broken_links(document: Path) -> list[str]:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text())
    return [t for t in targets if not t.startswith(("http:", "https:")) and not (document.parent / t).exists()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=names(DOCUMENTS))
def test_python_of_a_document_runs(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Doctest examples must print what they show; other python blocks must run. In order, in one namespace."""
    monkeypatch.chdir(tmp_path)
    text, namespace = document.read_text(), {"__name__": "__main__"}
    for match in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        line = text[: match.start()].count("\n") + 1
        if ">>>" not in match[1]:
            exec(compile("\n" * line + match[1], str(document), "exec"), namespace)
            continue
        test = doctest.DocTestParser().get_doctest(match[1], namespace, document.name, str(document), line)
        failures: list[str] = []
        doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(
            test, out=failures.append, clear_globs=False
        )
        assert not failures, "".join(failures)
        namespace = test.globs


@pytest.mark.parametrize("document", DOCUMENTS, ids=names(DOCUMENTS))
def test_commands_and_links_of_a_document_exist(document: Path) -> None:
    assert wrong_commands(document.read_text()) == []
    assert broken_links(document) == []


@pytest.mark.parametrize(
    "text",
    ["    make quikstart", "run `arrowquant compress a b`", "```console\n$ arrowquant verify a --vs b\n```"],
)
def test_a_wrong_command_is_noticed(text: str) -> None:
    assert wrong_commands(text)


def test_a_broken_link_is_noticed(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text("[here](page.md#part) [there](gone.md) [far](https://example.org/x)")
    assert broken_links(document) == ["gone.md"]


def test_every_option_and_command_is_documented() -> None:
    text = (ROOT / "docs" / "cli.md").read_text()
    for name, command in COMMANDS.items():
        assert f"arrowquant {name}" in text, name
        for parameter in command.params:
            spellings = [o for o in (*parameter.opts, *parameter.secondary_opts) if o.startswith("--")]
            assert not spellings or any(f"`{o}" in text for o in spellings), f"{name} {spellings}"


def test_every_exit_code_is_documented() -> None:
    """The table of docs/cli.md and the classes of errors.py name the same codes."""
    from arrowquant_gpu import cli_run

    rows = re.findall(r"^\| (\d+) \| (.*?) \|", (ROOT / "docs" / "cli.md").read_text(), re.MULTILINE)
    documented = {int(code): text for code, text in rows}
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.ArrowQuantError)]
    own = {0, cli_run.BUG, cli_run.INTERRUPTED, cli_run.BROKEN_PIPE, cli_run.TERMINATED}
    assert set(documented) == {c.exit_code for c in classes} | own
    for c in classes:
        if c.__base__.__dict__.get("exit_code") != c.exit_code:
            assert f"`{c.__name__}`" in documented[c.exit_code], c.__name__


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {p.name for p in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert {p for p in pages if f"({p})" not in index} == set()


def test_readme_names_every_make_target_of_daily_use() -> None:
    text = (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    assert all(f"make {t}" in text for t in ("quickstart", "test", "lint", "gpu", "sanitize"))


def test_changelog_has_the_version_to_come() -> None:
    assert (
        "## Unreleased" in (ROOT / "CHANGELOG.md").read_text()
        or arrowquant_gpu.__version__ in (ROOT / "CHANGELOG.md").read_text()
    )
