"""The command that a hint names works for how tuner was installed, whatever its distribution is called."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import packaging
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.installation import PUBLISHED, Installation, installation, version

ROOT = Path(__file__).parents[1]
GIT = {"url": "https://example.org/tuner.git", "vcs_info": {"vcs": "git", "commit_id": "a" * 40}}
TEXTS = {".py", ".md", ".json", ".yaml", ""}
WHEEL = {"url": "file:///tmp/tuner_study-1-py3-none-any.whl", "archive_info": {}}


def folder(path: Path, **about: Any) -> dict[str, Any]:
    return {"url": path.as_uri(), "dir_info": about}


@pytest.mark.parametrize(
    ("installed", "command"),
    [
        (Installation(), "pip install 'tuner-study[wandb]'"),
        (Installation(tool="uv"), "uv pip install 'tuner-study[wandb]'"),
        (Installation(tool="uv tool"), "uv tool install 'tuner-study[wandb]'"),
        (Installation(tool="pipx"), "pipx install --force 'tuner-study[wandb]'"),
        (Installation(origin=folder(ROOT)), f"pip install '{ROOT}[wandb]'"),
        (Installation(origin=folder(ROOT, editable=True)), f"pip install --editable '{ROOT}[wandb]'"),
        (Installation(origin=GIT), f"pip install 'tuner-study[wandb] @ git+{GIT['url']}'"),
        (
            Installation(origin=GIT | {"vcs_info": {"vcs": "git", "requested_revision": "v1"}}),
            f"pip install 'tuner-study[wandb] @ git+{GIT['url']}@v1'",
        ),
        (
            Installation(origin=GIT | {"subdirectory": "python"}),
            f"pip install 'tuner-study[wandb] @ git+{GIT['url']}#subdirectory=python'",
        ),
        (Installation(origin=WHEEL), f"pip install 'tuner-study[wandb] @ {WHEEL['url']}'"),
    ],
)
def test_the_command_that_adds_an_extra(installed: Installation, command: str) -> None:
    assert installed.command("wandb") == command


@pytest.mark.parametrize(
    ("tool", "is_named"), [("pip", True), ("uv", True), ("pipx", False), ("uv tool", False)]
)
def test_an_extra_with_versions_of_its_own_is_installed_with_them(tool: str, is_named: bool) -> None:
    """Without them pip takes older versions of everything, or none fits."""
    command = Installation(origin=folder(ROOT), tool=tool).command("unsloth")
    assert (f"--constraint {ROOT / 'constraints-unsloth.txt'}" in command) == is_named


def test_a_source_that_is_gone(tmp_path: Path) -> None:
    """As in a container that was built elsewhere: the extra's packages are named themselves."""
    gone = folder(tmp_path / "gone")
    requires = ("torch>=2", 'wandb>=0.20; extra == "wandb"', 'gguf>=1; extra == "gguf"')
    assert Installation(origin=gone, requires=requires).command("wandb") == "pip install 'wandb>=0.20'"
    two = ('a>=1; extra == "x"', 'b; extra == "x"')
    assert Installation(origin=gone, requires=two).command("x") == "pip install 'a>=1' b"
    uv_tool = Installation(origin=gone, requires=two, tool="uv tool")
    assert uv_tool.command("x") == "uv tool install tuner-study --with 'a>=1' --with b"


def test_how_a_newer_version_comes(tmp_path: Path) -> None:
    assert Installation().upgrade == "pip install --upgrade tuner-study"
    editable = Installation(origin=folder(tmp_path, editable=True)).upgrade
    assert editable == f"bring {tmp_path} up to date, then: pip install --editable {tmp_path}"


@given(st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1, max_size=9))
def test_any_folder_reaches_pip_as_it_is(name: str) -> None:
    """With blanks, quotes and brackets. The folder is not there, and no packages are known."""
    path = Path("/nowhere") / name
    words = shlex.split(Installation(origin=folder(path)).command("x"))
    assert words == ["pip", "install", f"{path}[x]"]


@pytest.mark.parametrize("name", [PUBLISHED, "tuner"])
@pytest.mark.parametrize("is_editable", [True, False])
def test_it_is_found_under_any_name(tmp_path: Path, name: str, is_editable: bool) -> None:
    """As pip leaves it in site-packages; under its old name as under its new one."""
    found = tmp_path / f"{name.replace('-', '_')}-0.0.7.dist-info"
    found.mkdir()
    (found / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.0.7\n")
    (found / "top_level.txt").write_text("tuner\n")
    (found / "direct_url.json").write_text(json.dumps(folder(tmp_path, editable=is_editable)))
    (tmp_path / "tuner").symlink_to(ROOT / "tuner")
    (tmp_path / "packaging").symlink_to(Path(packaging.__path__[0]))
    said = ask("install_command('wandb'), version()", tmp_path, options=["-S"])  # without the real one
    editable = "--editable " if is_editable else ""
    assert said == f"pip install {editable}'{tmp_path}[wandb]' 0.0.7\n"


def test_the_published_name_comes_first(tmp_path: Path) -> None:
    for name, number in (("tuner", "1"), (PUBLISHED, "2")):
        found = tmp_path / f"{name.replace('-', '_')}-{number}.dist-info"
        found.mkdir()
        (found / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")
        (found / "top_level.txt").write_text("tuner\n")
    assert ask("install_command('x'), version()", tmp_path, ROOT) == "pip install 'tuner-study[x]' 2\n"


def test_where_it_is_only_imported(tmp_path: Path) -> None:
    """Nothing is known of it, and nothing fails."""
    (tmp_path / "tuner").symlink_to(ROOT / "tuner")
    (tmp_path / "packaging").symlink_to(Path(packaging.__path__[0]))
    said = ask("install_command('x'), version()", tmp_path, options=["-S"])
    assert said == "pip install 'tuner-study[x]' unknown\n"


def test_this_installation() -> None:
    assert installation().name in (PUBLISHED, "tuner")
    assert version()[0].isdecimal()


def test_nobody_is_told_to_install_another_project() -> None:
    """On package indexes `tuner` is not this one."""
    texts = [path for path in files_of("tuner", "docs", "docker", "benchmarks") if path.suffix in TEXTS]
    texts += [ROOT / "README.md", ROOT / "AGENTS.md", ROOT / "CHANGELOG.md", ROOT / "pyproject.toml"]
    assert len(texts) > 250
    wrong = re.compile(r"""\binstall (--?[\w-]+ )*['"]?tuner(?![-\w])|['"`]tuner\[""")
    assert [str(path) for path in texts if wrong.search(path.read_text("utf-8"))] == []


def files_of(*names: str) -> list[Path]:
    return [path for name in names for path in (ROOT / name).rglob("*") if path.is_file()]


def ask(expression: str, *path: Path, options: Sequence[str] = ()) -> str:
    """What a new interpreter prints of `tuner.installation`."""
    done = subprocess.run(
        [sys.executable, *options, "-c", f"from tuner.installation import *; print({expression})"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))},
        cwd="/",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
