"""What must stay true of the repository as a whole: who imports whom, what the README shows, what no file may name."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
PACKAGES = ("pipelines", "stages", "serving")


def tracked() -> list[Path]:
    """Files of the repository: what git knows or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=REPO, capture_output=True, text=True, check=False
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return sorted(REPO / name for name in set(listed.stdout.splitlines()) if (REPO / name).is_file())


def text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def imports(path: Path) -> Iterator[str]:
    """Modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


def offenders(package: str, forbidden: set[str]) -> list[str]:
    files = sorted((REPO / package).rglob("*.py"))
    assert files, package
    return [f"{path.relative_to(REPO)} imports {name}" for path in files for name in imports(path) if name.split(".")[0] in forbidden]


# ---------------------------------------------------------------------------------------------------- who knows whom


def test_stages_are_plain_pytorch() -> None:
    assert offenders("stages", {"ray", "mlflow", "fastapi", "starlette", "pipelines", "serving"}) == []


def test_pipelines_and_serving_meet_at_the_bundle() -> None:
    assert offenders("pipelines", {"serving", "fastapi", "starlette"}) == []
    assert offenders("serving", {"pipelines", "mlflow"}) == []


def test_stages_do_not_read_each_others_training() -> None:
    """Only the joint stage composes others."""
    allowed = {("joint", "diffusion"), ("joint", "translator")}
    seen = {
        (path.parent.name, name.split(".")[1])
        for path in (REPO / "stages").glob("*/*.py")
        for name in imports(path)
        if re.fullmatch(r"stages\.\w+\.training", name) and name.split(".")[1] != path.parent.name
    }
    assert seen <= allowed


def test_stages_import_without_ray() -> None:
    code = "import sys; sys.modules['ray'] = sys.modules['mlflow'] = None; import stages.variants; print('fastapi' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "False", done.stderr


COMMON = {
    "cluster",
    "leases",
    "outbox",
    "plots",
    "tables",
    "tracking",
    "weights",
}  # files of pipelines/ that every room may import; the other files are commands
ROOMS = {
    "corpora": set[str](),
    "demo_corpus": set[str](),
    "features": set[str](),
    "evaluation": {"corpora", "features"},
    "training": {"features", "evaluation"},
    "page": {"features", "evaluation"},
}
LINES = {"demo", "finetune", "selfcheck"}  # commands that are made of other commands
BORROWED = {
    ("train", "variants"),  # `--dry-run` prints the variant
}


def neighbours(path: Path) -> set[str]:
    """Files and folders of pipelines/ that a file imports, by name."""
    found = {name.split(".")[1] for name in imports(path) if name.startswith("pipelines.")}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "pipelines":
            found |= {alias.name for alias in node.names}
    return found


def test_rooms_of_pipelines_import_downwards() -> None:
    """A room imports common ground and the rooms it is allowed, common ground only itself, and only `LINES` a command."""
    wrong = set()
    for path in (REPO / "pipelines").rglob("*.py"):
        room = path.relative_to(REPO / "pipelines").parts[0].removesuffix(".py")
        if room in ROOMS:
            allowed = COMMON | ROOMS[room] | {room}
        else:
            allowed = COMMON if room in COMMON else COMMON | set(ROOMS)
        if room not in LINES:
            wrong |= {(room, name) for name in neighbours(path) - allowed}
    assert wrong - BORROWED == set()


def test_ray_workers_start_light() -> None:
    """Ray's controller imports this module before every stage, and needs none of what takes seconds to import."""
    assert list(imports(REPO / "pipelines" / "training" / "__init__.py")) == []
    code = "import sys, pipelines.training.ray_worker; print({'torch', 'transformers', 'diffusers', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "set()", done.stdout + done.stderr


# -------------------------------------------------------------------------------------------------------------- sizes

LONGEST_FILE, LONGEST_FUNCTION = 450, 70  # lines
LONGER: dict[str, str] = {}  # path, or path::function → why it may be longer


def too_long() -> Iterator[str]:
    for package in ("pipelines", "stages"):
        for path in sorted((REPO / package).rglob("*.py")):
            name, text = path.relative_to(REPO).as_posix(), path.read_text(encoding="utf-8")
            if len(text.splitlines()) > LONGEST_FILE:
                yield name
            for node in ast.walk(ast.parse(text)):
                long = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (node.end_lineno or 0) - node.lineno >= LONGEST_FUNCTION
                if long:
                    yield f"{name}::{node.name}"


def test_files_and_functions_stay_short() -> None:
    assert sorted(too_long()) == sorted(LONGER)


SKIP = "fmt: " + "skip"


def test_the_formatter_decides() -> None:
    """Where its form is ugly, the signature is too long."""
    skipped = [path.relative_to(REPO).as_posix() for path in tracked() for _ in range(text_of(path).count(SKIP))]
    assert len(skipped) < 10, skipped


# --------------------------------------------------------------------------------------------------------- the README


def readme_tree() -> dict[str, str]:
    """Path → phrase, from the README's tree: a line is `  name   phrase`, folders end in a slash and hold what is indented below."""
    block = re.search(r"<!-- tree -->\n```\n(.*?)```", (REPO / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block, "README.md has no tree"
    found: dict[str, str] = {}
    parents: list[tuple[int, str]] = []
    for line in filter(str.strip, block.group(1).splitlines()):
        match = re.fullmatch(r"( *)(\S+)(?:\s+(.*))?", line)
        assert match, line
        depth, name, phrase = len(match.group(1)), match.group(2), match.group(3) or ""
        while parents and parents[-1][0] >= depth:
            parents.pop()
        path = "".join(parent for _, parent in parents) + name
        if name.endswith("/"):
            parents.append((depth, name))
        found[path] = phrase
    return found


def test_readme_tree_is_true() -> None:
    tree = readme_tree()
    assert [path for path in tree if not (REPO / path).exists()] == []
    modules = [path.relative_to(REPO).as_posix() for p in PACKAGES for path in (REPO / p).rglob("*.py") if path.name != "__init__.py"]
    assert sorted(set(modules) - set(tree)) == []


def test_readme_tree_says_what_each_file_is_for() -> None:
    assert [path for path, phrase in readme_tree().items() if not path.endswith("/") and not phrase] == []


def test_links_between_pages_lead_somewhere() -> None:
    broken = []
    for page in [REPO / "README.md", REPO / "THIRD_PARTY.md", *(REPO / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.name}: {target}")
    assert broken == []


def test_docs_name_options_that_exist() -> None:
    """Every `loa …` line in the shell blocks of the pages names a command that exists, with long options that it knows."""
    import click

    import loa

    wrong = []
    for page in [REPO / "README.md", *(REPO / "docs").glob("*.md")]:
        shell = "\n".join(re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
        for line in re.findall(r"^(?:submit )?((?:loa|python -m pipelines\.\w+) .*)$", shell, re.MULTILINE):
            words = line.split("#")[0].replace("python -m pipelines.", "loa ").split()
            command: click.Command | None = loa.main
            context = click.Context(loa.main)
            for word in words[1:]:
                if isinstance(command, click.Group) and not word.startswith("-"):
                    command = command.get_command(context, word)
            if command is None:
                wrong.append(f"{page.name}: {line}")
                continue
            known = {name for parameter in command.get_params(context) for name in parameter.opts + parameter.secondary_opts}
            wrong += [f"{page.name}: {line}: {w}" for w in words if w.startswith("--") and w.partition("=")[0] not in known]
    assert wrong == []


# ------------------------------------------------------------------------------------------------- what no file names


def test_no_registry_host_and_no_path_of_one_machine() -> None:
    hosts = ["py" + "pi.org", "python" + "hosted", "download." + "pytorch", "npm" + "js", "conda." + "anaconda", "/sim" + "ple/"]
    places = [str(Path.home()), str(REPO), "/op" + "t/", "/Us" + "ers/", ".py" + "env"]
    pattern = re.compile("|".join(re.escape(word) + r"(?![\w-])" for word in [*hosts, *(p for p in places if len(p) > 2)]))
    found = [f"{path.relative_to(REPO)}: {match.group()}" for path in tracked() if (match := pattern.search(text_of(path)))]
    assert found == []


def test_a_wheel_takes_every_file_along() -> None:
    """What is no module travels as package data: the report's frame, style and script, the service's page."""
    data = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    packed = {
        path for package, patterns in data.items() for pattern in patterns for path in (REPO / package.replace(".", "/")).glob(pattern)
    }
    others = {path for path in tracked() if path.suffix != ".py" and path.relative_to(REPO).parts[0] in PACKAGES}
    assert sorted(others - packed) == []


def test_gitignore_is_anchored() -> None:
    """Ray leaves out of an upload what .gitignore matches at any depth: `data/` would remove a package of that name."""
    lines = [line for line in (REPO / ".gitignore").read_text().splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if not line.startswith("/") and line != "__pycache__/"] == []


def test_constraints_pin_everything_exactly() -> None:
    lines = [line for line in (REPO / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.]+", line)] == []
    pinned = {re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in lines}
    wanted = re.findall(r'^ +"([A-Za-z0-9_-]+)', (REPO / "pyproject.toml").read_text().partition("[tool.")[0], re.MULTILINE)
    assert {re.sub(r"[-_.]+", "-", name).lower() for name in wanted} - pinned == set()


def test_repository_is_small() -> None:
    assert [path.name for path in tracked() if path.stat().st_size > 1_000_000] == []


def test_ci_runs_what_the_readme_says() -> None:
    assert "make --no-print-directory lint types test" in (REPO / ".ci" / "run").read_text()
    readme = (REPO / "README.md").read_text()
    assert readme.index("make demo") < readme.index("make test") < 1000
